"""Tables of Markdown, printed, and put between their marks in a page."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from _harness import machine


def add_page(parser: argparse.ArgumentParser) -> None:
    """The option that says where tables are put."""
    parser.add_argument("--page", type=Path, help="a file of Markdown in which each table replaces the one of its name")


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines; all columns but the first are numbers."""
    lines = [" | ".join(heads), "|".join(["---"] + ["---:"] * (len(heads) - 1)), *(" | ".join(row) for row in rows)]
    return [f"| {line} |" if "---" not in line else f"|{line}|" for line in lines]


def show(name: str, lines: Sequence[str], page: Path | None) -> None:
    """Print a table, and put it into a page.

    Args:
        name: between ``<!-- name -->`` and ``<!-- end of name -->`` it stands.
        lines: its own.
        page: the file, if any.
    """
    print("\n".join(lines) + "\n", flush=True)
    if page is None:
        return
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = text.partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise SystemExit(f"{page} has no place for '{name}' ({begin.strip()} ... {end})")
    page.write_text("".join((before, begin, *(f"{line}\n" for line in lines), end, after)), encoding="utf-8")


def machine_line() -> str:
    """On what tables were measured, and beside what."""
    facts = machine()
    return (
        f"{facts['cores']} cores of {facts['processor']}, torch {facts['torch']}, threads of torch: "
        f"{facts['threads']}, load average before it {facts['load_average'][0]:.1f}."
    )


def figure(value: float) -> str:
    """Three digits, as one writes them."""
    if value == 0:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
