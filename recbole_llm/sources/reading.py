"""The first pass over raw files: interactions as arrays of integers, and which items have metadata.

What is held is bounded by the number of rows and of distinct ids: 32 bytes an interaction and, with Python's strings
and dictionaries, about 200 bytes a user and an item. No text is held; filtering takes about as much again for a while.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.sources.base import Columns, RawFile
from recbole_llm.sources.filters import NO_METADATA, ROW, TITLE, Rows
from recbole_llm.sources.lines import Tally, parsed_lines
from recbole_llm.sources.text import clean, cut


@dataclass
class Read:
    """The interactions of a file.

    Attributes:
        rows: all that could be read.
        users: raw ids by index.
        items: raw ids by index, with the index.
        taken_for: the item that each is taken for, int32 ``[n_items]``; another than itself where titles are merged.
    """

    rows: Rows
    users: list[str]
    items: dict[str, int]
    taken_for: np.ndarray


def read_interactions(file: RawFile, tally: Tally, show: bool) -> Read:
    """Read every interaction.

    Args:
        file: of interactions.
        tally: counts its lines.
        show: whether to show progress.

    Raises:
        UserError: no interaction is in it, or see :func:`~recbole_llm.sources.lines.parsed_lines`.
    """
    users: dict[str, int] = {}
    items: dict[str, int] = {}
    columns: list[array[Any]] = [array(code) for code in "iiddq"]
    for number, row in parsed_lines(file, tally, "interactions", show):
        values = users.setdefault(row.user, len(users)), items.setdefault(row.item, len(items)), *row[2:], number
        for column, value in zip(columns, values, strict=True):
            column.append(value)
    if not len(columns[0]):
        told = f": {tally.told()}" if tally.broken else ""
        raise UserError(f"{file.path} has no interaction{told}")
    of_users, of_items, ratings, times, lines = (np.frombuffer(column, dtype=column.typecode) for column in columns)
    rows = Rows(of_users, of_items, ratings, times, lines, editions=of_items)
    return Read(rows, list(users), items, np.arange(len(items), dtype=np.int32))


def read_metadata(
    file: RawFile,
    items: dict[str, int],
    columns: Columns,
    title_length: int | None,
    merge: bool,
    tally: Tally,
    show: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Which items have metadata, and which are one.

    Args:
        file: of items; of an id that stands there twice the first row counts.
        items: index by raw id; other items are passed over.
        columns: the source's.
        title_length: see ``properties/sources/overall.yaml``.
        merge: whether items with equal titles are one.
        tally: counts the file's lines.
        show: whether to show progress.

    Returns:
        ``NO_METADATA``, ``ROW`` or ``TITLE`` by item, int8 ``[n_items]``; and the item that each is taken for, int32
        ``[n_items]``: of equal titles the one with the least index.
    """
    found = np.full(len(items), NO_METADATA, dtype=np.int8)
    taken_for = np.arange(len(items), dtype=np.int32)
    by_title: dict[str, list[int]] = {}
    for _, row in parsed_lines(file, tally, "metadata", show):
        item = items.get(row.raw_id)
        if item is None or found[item] != NO_METADATA:
            continue
        title = cut(clean(row.values.get(columns.title, "")), title_length)
        found[item] = TITLE if title else ROW
        if merge and title:
            by_title.setdefault(title, []).append(item)
    for same in by_title.values():
        taken_for[same] = min(same)
    return found, taken_for
