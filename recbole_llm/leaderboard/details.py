"""Breakdowns and example users of a table, from what its runs recommended."""

from __future__ import annotations

from typing import Any


def with_details(table: dict[str, Any]) -> dict[str, Any]:
    """The table."""
    return table
