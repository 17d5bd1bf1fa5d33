"""LC-Rec's ``.index.json``: ``{"raw item id": ["<a_1>", "<b_2>", ...], ...}``, read and written."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.itemid.item_tokens import LETTERS, ItemTokens

TOKEN = re.compile(r"<([a-z])_(0|[1-9][0-9]{0,8})>")


def write_index(path: Path, item_tokens: ItemTokens, raw_ids: Sequence[str]) -> None:
    """Write codes as LC-Rec's programs read them; equal codes give equal bytes.

    Args:
        path: the file; its folder exists.
        item_tokens: codes; items without tokens are left out.
        raw_ids: by internal id, which is the order of the lines.

    Raises:
        ValueError: the tokens are not codes, or of another number of items.
    """
    if item_tokens.kind != "codes" or len(raw_ids) != item_tokens.n_items:
        raise ValueError(f"{item_tokens.kind} of {item_tokens.n_items} items cannot be written for {len(raw_ids)} ids")
    entries = {str(raw): item_tokens.strings(item) for item, raw in enumerate(raw_ids) if item_tokens.of(item)}
    text = json.dumps(entries, ensure_ascii=False, separators=(", ", ": "))
    write_whole(Path(path), lambda file: file.write_bytes(text.encode("utf-8")))


def read_index(
    path: Path, raw_ids: Sequence[str], sizes: Sequence[int] | None = None, allow_missing: bool = False
) -> ItemTokens:
    """Read codes from a file of LC-Rec's form.

    Args:
        path: the file.
        raw_ids: the data set's, by internal id, the padding item's first.
        sizes: codes of each level; one more than the largest in the file if ``None``.
        allow_missing: items of the data set that the file does not have are left without tokens.

    Raises:
        UserError: no such file, not JSON, an item twice, an item that the data set has not, items of the data set that
            the file has not, a token that is none, items with different numbers of tokens, a code beyond its level.
    """
    path = Path(path)
    entries = entries_of(path)
    numbers = {str(raw): item for item, raw in enumerate(raw_ids) if item}
    _refuse_unknown(path, entries, numbers)
    if not allow_missing:
        missing = [raw for raw in numbers if raw not in entries]
        if missing:
            raise UserError(
                f"{path} has no codes for {len(missing)} of the data set's {len(numbers)} items, the first being "
                f"'{missing[0]}'; make it for this data set, or allow items without codes"
            )
    rows = np.array(_codes(path, entries), dtype=np.int64)
    largest = (rows.max(axis=0) + 1).tolist()
    if sizes is None:
        sizes = largest
    elif len(sizes) != len(largest):
        raise UserError(f"{path} has {len(largest)} codes an item, not {len(sizes)}")
    beyond = np.argwhere(rows >= np.array(sizes))
    if len(beyond):
        place, level = beyond[0].tolist()
        raw = list(entries)[place]
        raise UserError(
            f"{path}: item '{raw}' has {entries[raw][level]}, but level {level + 1} has {sizes[level]} codes"
        )
    codes = np.full((len(raw_ids), len(largest)), -1, dtype=np.int64)
    codes[[numbers[raw] for raw in entries]] = rows
    return ItemTokens.from_codes(codes, sizes, raw_ids)


def entries_of(path: Path) -> dict[str, Any]:
    """What an index file says of each raw item id, unchecked but for its form.

    Raises:
        UserError: no such file, not JSON, or an item twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for raw, tokens in pairs:
            if raw in found:
                raise UserError(f"{path}: item '{raw}' stands there twice")
            found[raw] = tokens
        return found

    try:
        entries = json.loads(path.read_text("utf-8"), object_pairs_hook=once)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"there is no index file {path}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except (UnicodeDecodeError, RecursionError):
        raise UserError(f"{path} is not JSON in UTF-8") from None
    if not isinstance(entries, dict) or not entries:
        raise UserError(f'{path} is no index file: it should be one JSON object {{"item id": ["<a_1>", ...], ...}}')
    return entries


def _refuse_unknown(path: Path, entries: dict[str, Any], numbers: dict[str, int]) -> None:
    unknown = [(place, raw) for place, raw in enumerate(entries, start=1) if raw not in numbers]
    if not unknown:
        return
    place, raw = unknown[0]
    others = f" (nor are {len(unknown) - 1} others)" if len(unknown) > 1 else ""
    raise UserError(
        f"{path}: item '{raw}', entry {place} of {len(entries)}, is not in the data set{others}"
        f"{did_you_mean(raw, numbers)}"
    )


def _codes(path: Path, entries: dict[str, Any]) -> list[list[int]]:
    """Codes of each entry; every item has one of each level."""
    rows: list[list[int]] = []
    first = next(iter(entries))
    for raw, tokens in entries.items():
        if not isinstance(tokens, list) or not tokens or len(tokens) > len(LETTERS):
            raise UserError(f'{path}: item \'{raw}\' should have a list of tokens such as ["<a_1>", "<b_2>"]')
        row: list[int] = []
        for letter, token in zip(LETTERS, tokens):
            match = TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None or match[1] != letter:
                raise UserError(
                    f"{path}: token {len(row) + 1} of item '{raw}' is {token!r}; it should be '<{letter}_' and a "
                    "number and '>'"
                )
            row.append(int(match[2]))
        if rows and len(row) != len(rows[0]):
            raise UserError(f"{path}: item '{raw}' has {len(row)} tokens, but item '{first}' has {len(rows[0])}")
        rows.append(row)
    return rows
