"""The second pass over raw files: atomic files, their settings, card and README, in one folder.

Rows stay in the order of the raw file, so the same input gives the same bytes and no text has to be held. Where reviews
stand in a file of their own, in another order, those of rows that stay are laid down in a file beside the output first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from recbole_llm.sources.base import Columns, RawFile
from recbole_llm.sources.card import Filled
from recbole_llm.sources.filters import Rows, pair_keys
from recbole_llm.sources.lines import Tally, parsed_lines
from recbole_llm.sources.reading import Read
from recbole_llm.sources.text import clean, cut

USER, ITEM, RATING, TIME, REVIEW = "user_id", "item_id", "rating", "timestamp", "review"


def write_interactions(
    path: Path, rows: Rows, read: Read, review_file: RawFile | None, same_file: bool, tally: Tally, show: bool
) -> Filled | None:
    """Write the ``.inter`` file.

    Args:
        path: the file.
        rows: what stays.
        read: with the raw ids.
        review_file: of reviews, if they are wanted.
        same_file: whether the interactions were read from the lines of ``review_file`` too.
        tally: counts lines of ``review_file``.
        show: whether to show progress.

    Returns:
        How many reviews there are; ``None`` where none were looked for.
    """
    rated = not np.isnan(rows.ratings).all()
    columns = [f"{USER}:token", f"{ITEM}:token", *([f"{RATING}:float"] * rated), f"{TIME}:float"]
    filled = None
    texts: Iterator[str] | None = None
    if review_file is not None:
        filled, columns = Filled(), [*columns, f"{REVIEW}:token_seq"]
        spool = path.with_suffix(".reviews")
        texts = (
            _reviews_of_lines(review_file, rows, tally, show)
            if same_file
            else _reviews_of_pairs(review_file, rows, read, spool, tally, show)
        )
    items = list(read.items)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\t".join(columns) + "\n")
        for row in range(len(rows)):
            fields = [read.users[rows.users[row]], items[rows.items[row]]]
            if rated:
                fields.append(_number(rows.ratings[row]))
            fields.append(_number(rows.times[row]))
            if texts is not None and filled is not None:
                text = next(texts)
                filled.add(text)
                fields.append(text)
            file.write("\t".join(fields) + "\n")
    if texts is not None:
        # To its end, so that a spool is taken away.
        next(texts, None)
    return filled


def _reviews_of_lines(file: RawFile, rows: Rows, tally: Tally, show: bool) -> Iterator[str]:
    """The review of every row, in the rows' order, from the lines that the rows were read from."""
    following = 0
    for number, review in parsed_lines(file, tally, "reviews", show, only=rows.lines):
        while rows.lines[following] < number:
            following += 1
            yield ""
        following += 1
        yield clean(review.text)
    for _ in range(following, len(rows)):
        yield ""


def _reviews_of_pairs(file: RawFile, rows: Rows, read: Read, spool: Path, tally: Tally, show: bool) -> Iterator[str]:
    """The review of every row, in the rows' order, from a file in any order; of a pair the first review counts.

    Of items that are one by their titles each row has the review of the edition that it was read with.
    """
    users = {raw_id: user for user, raw_id in enumerate(read.users)}
    keys = pair_keys(rows.users, rows.editions)
    order = np.argsort(keys, kind="stable")
    ascending = keys[order]
    starts, lengths = np.zeros(len(rows), dtype=np.int64), np.zeros(len(rows), dtype=np.int64)
    try:
        with open(spool, "wb") as out:
            for _, review in parsed_lines(file, tally, "reviews", show):
                user, item = users.get(review.user), read.items.get(review.item)
                if user is None or item is None:
                    continue
                key = user << 32 | item
                place = int(np.searchsorted(ascending, key))
                if place == len(ascending) or ascending[place] != key or lengths[order[place]]:
                    continue
                text = clean(review.text).encode()
                starts[order[place]], lengths[order[place]] = out.tell(), len(text)
                out.write(text)
        with open(spool, "rb") as texts:
            for start, length in zip(starts.tolist(), lengths.tolist()):
                yield _piece(texts, start, length)
    finally:
        spool.unlink(missing_ok=True)


def _piece(file: BinaryIO, start: int, length: int) -> str:
    if not length:
        return ""
    file.seek(start)
    return file.read(length).decode()


def write_described(
    path: Path, file: RawFile, id_column: str, columns: dict[str, str], stays: set[str], title: tuple[str, int | None],
    tally: Tally, show: bool,
) -> dict[str, Filled]:  # fmt: skip
    """Write an ``.item`` or ``.user`` file, in the order of the raw one.

    Args:
        path: the file.
        file: what describes items or users; of an id that stands there twice the first row counts.
        id_column: the name of the first column.
        columns: the others, with their types.
        stays: raw ids to write.
        title: the column to cut, and to how many characters.
        tally: counts the lines of ``file``.
        show: whether to show progress.

    Returns:
        How much of each column is filled.
    """
    filled = {name: Filled() for name in columns}
    left = set(stays)
    with open(path, "w", encoding="utf-8", newline="\n") as out:
        out.write("\t".join([f"{id_column}:token", *(f"{name}:{kind}" for name, kind in columns.items())]) + "\n")
        for _, row in parsed_lines(file, tally, f"texts of {id_column}", show):
            if row.raw_id not in left:
                continue
            left.remove(row.raw_id)
            texts = {name: clean(row.values.get(name, "")) for name in columns}
            if title[0] in texts:
                texts[title[0]] = cut(texts[title[0]], title[1])
            for name, text in texts.items():
                filled[name].add(text)
            out.write("\t".join([row.raw_id, *texts.values()]) + "\n")
    return filled


def _number(value: float) -> str:
    """The shortest text that reads as this number; whole numbers without a point."""
    value = float(value)
    if np.isnan(value):
        return ""
    return str(int(value)) if value.is_integer() else repr(value)


def settings_text(name: str, head: list[str], columns: Columns, rated: bool, with_items: bool, filled: set[str]) -> str:
    """The settings that a run reads beside the atomic files.

    Args:
        name: of the data set.
        head: comment lines.
        columns: the source's.
        rated: whether there are ratings.
        with_items: whether there is an ``.item`` file.
        filled: columns of items that say something.
    """
    loaded = [USER, ITEM, *([RATING] * rated), TIME]
    lines = [f"# {line}" for line in head]
    lines += [
        "",
        f"# Read by every run of `--dataset={name}`; a setting of a file or of the command line goes before it.",
        f"USER_ID_FIELD: {USER}",
        f"ITEM_ID_FIELD: {ITEM}",
        f"RATING_FIELD: {RATING}",
        f"TIME_FIELD: {TIME}",
        f"load_col: {{inter: [{', '.join(loaded)}]}}",
        "normalize_all: ~",
        "time_scope: global  # real times, in seconds",
    ]
    if with_items and columns.title in filled:
        lines += [f"item_text: {_quoted(columns.item_text)}", f"item_text_fallback: {_quoted(columns.fallback)}"]
        lines.append(f"item_title: {_quoted('{' + columns.title + '}')}")
        if columns.description in filled:
            lines.append(f"item_description: {_quoted('{' + columns.description + '}')}")
    if columns.categories in filled:
        lines.append(f"id_categories: {columns.categories}")
        lines.append(f"id_category_separator: {_quoted(columns.category_separator)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def readme_text(name: str, card: dict[str, Any], shown: list[str]) -> str:
    """The folder's README.

    Args:
        name: of the data set.
        card: what stands in ``stats.json``.
        shown: filters and figures as they are printed.
    """
    made_from = "".join(f"- `{file}`, {size:,} bytes\n" for file, size in card["files"].items())
    broken = "".join(f"- {line}\n" for line in card["left_out"]) or "- no line was broken\n"
    return (
        f"# {name}\n\n{card['title']}, {card['category']}. Licence: {card['licence']}.\n\n"
        f"Made by `recbole-llm prepare` ({card['version']}) from\n\n{made_from}\n"
        "Raw ids and the order of the raw file are kept; times are seconds since 1970 in UTC. Texts are without HTML "
        "and in one line.\n\n"
        f"## Settings\n\n```yaml\n{card['settings_text']}```\n\n"
        f"## Filters, in this order, and what came out\n\n```\n" + "\n".join(shown) + f"\n```\n\n## Lines\n\n{broken}"
    )
