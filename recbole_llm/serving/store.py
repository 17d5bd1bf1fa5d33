"""The top-K store: what every user of a run is recommended, on the disk, found by his raw id in constant time.

    store.json            the card: what it was built for, and its shape; written when the tables are there
    users.*.npy           raw user ids and the hash table over them
    items.*.npy           raw item ids; titles.*.npy their titles
    blocks/N.npy          a row a user: item numbers, scores and a check, for `block` users each
    complete.json         written when every block is there

A user's number gives his block and row. Blocks are made in any order and by any process, each written whole, so that a
build that was killed goes on with the blocks that are missing, and shards need no merging.
"""

from __future__ import annotations

import json
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from recbole_llm.disk import clear_parts, remove, write_whole
from recbole_llm.errors import UserError
from recbole_llm.serving.identity import difference
from recbole_llm.serving.texts import NameIndex, TextTable, map_array, save_array

CARD, COMPLETE, SCHEMA = "store.json", "complete.json", 3
_REPLACE = "; --build=anew puts a new one in its place, --store=DIR takes another"
# Blocks that a store keeps mapped for the next look-up.
OPEN = 256
# What else a build that goes on must have in common with the one that began.
SHAPE = {
    "k": "holds the best {0} items of each user, and --k is {1}",
    "batch": "was begun with {0} users at once, and now it is {1} "
    "(eval_max_cells, eval_batch_size, inference_batch_size)",
    "users": "has {0} users, and the data set has {1}",
    "items": "has {0} items, and the data set has {1}",
}


@dataclass(frozen=True)
class Catalogue:
    """Who is served and with what.

    Attributes:
        users: raw ids, in the order of the rows.
        items: raw ids; a row's item numbers are places in it.
        titles: of the items; an empty text where an item has none.
    """

    users: Sequence[str]
    items: Sequence[str]
    titles: Sequence[str]


@dataclass(frozen=True)
class Plan:
    """The shape of a store.

    Attributes:
        k: items a user.
        batch: users that are ranked together. A live ranking takes the same users, so that no rounding tells them
            apart.
        block: users a file, a multiple of ``batch``.
    """

    k: int
    batch: int
    block: int


class TopKStore:
    """A store that is there. Made by :meth:`begin` and :meth:`open`.

    Args:
        folder: where it is.
        card: its ``store.json``.
    """

    def __init__(self, folder: Path, card: Mapping[str, Any]) -> None:
        self.folder, self.card = folder, card
        self.k, self.block, self.n_users = int(card["k"]), int(card["block"]), int(card["users"])
        self.n_blocks = -(-self.n_users // self.block)
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()
        self._dtype = np.dtype([("items", "<i4", (self.k,)), ("scores", "<f4", (self.k,)), ("check", "<u4")])

    @classmethod
    def begin(
        cls, folder: Path, wanted: Mapping[str, Any], plan: Plan, catalogue: Catalogue, anew: bool = False
    ) -> TopKStore:
        """Make a store without blocks, or go on with the one that is there.

        Args:
            folder: where.
            wanted: from :func:`~recbole_llm.serving.identity.identity`.
            plan: its shape.
            catalogue: users and items.
            anew: put it in the place of one that was built for something else.

        Raises:
            UserError: what is there was built for something else, or is no store.
        """
        shape = {"k": plan.k, "batch": plan.batch, "users": len(catalogue.users), "items": len(catalogue.items)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"store: {folder} cannot be made ({error.strerror})") from None
        with FileLock(str(folder / ".lock")):
            broken, found = False, None
            try:
                found = cls._card_of(folder)
            except UserError:
                broken = True
                if not anew:
                    raise
            if found is not None:
                problem = cls._problem(folder, found, wanted, shape)
                if not problem:
                    _write_tables(folder, catalogue)
                    return cls(folder, found)
                if not anew:
                    raise UserError(problem + _REPLACE)
            elif not {path.name for path in folder.iterdir()} <= _OWN | ({CARD} if broken else set()):
                raise UserError(f"store: {folder} holds something that is no store; name an empty folder or a new one")
            # The card goes first: without it nothing else is read.
            remove(folder / CARD)
            for path in folder.iterdir():
                if path.name != ".lock":
                    remove(path)
            (folder / "blocks").mkdir()
            _write_tables(folder, catalogue)
            # A builder of the store before may still be writing: its blocks are none of this one's.
            number = 0 if found is None else int(found.get("build", 0)) + 1
            card = {"schema": SCHEMA, **shape, "block": plan.block, "build": number, "built_for": dict(wanted)}
            _write_json(folder / CARD, card)
            return cls(folder, card)

    @classmethod
    def open(cls, folder: Path, wanted: Mapping[str, Any], k: int) -> TopKStore:
        """A complete store that answers for a run.

        Args:
            folder: where it is.
            wanted: from :func:`~recbole_llm.serving.identity.identity`.
            k: how many items will be asked for.

        Raises:
            UserError: there is none, it was built for something else, or it is not complete.
        """
        card = cls._card_of(folder)
        if card is None:
            raise UserError(f"there is no store in {folder}; build it: --build=true")
        problem = cls._problem(folder, card, wanted, {"k": k} if k > card["k"] else {})
        if problem:
            raise UserError(f"{problem}; build it anew (--build=anew), or answer live (--store=off)")
        store = cls(folder, card)
        if not (folder / COMPLETE).is_file():
            there = store.n_blocks - len(store.missing())
            raise UserError(
                f"the store in {folder} has {there} of {store.n_blocks} blocks; the command that builds it goes on "
                "(--build=true), and --store=off answers live"
            )
        return store

    @classmethod
    def refuse_other(cls, folder: Path, wanted: Mapping[str, Any], k: int) -> None:
        """Refuse, before a run is loaded, to build where a store of something else is.

        Raises:
            UserError: see :meth:`begin`.
        """
        card = cls._card_of(folder)
        problem = cls._problem(folder, card, wanted, {"k": k}) if card is not None else ""
        if problem:
            raise UserError(problem + _REPLACE)

    @staticmethod
    def exists(folder: Path) -> bool:
        """Whether a store was begun there."""
        return (folder / CARD).is_file()

    @classmethod
    def built_for(cls, folder: Path) -> dict[str, Any]:
        """What a store was built for; nothing where there is none."""
        card = cls._card_of(folder)
        return {} if card is None else dict(card["built_for"])

    @staticmethod
    def _card_of(folder: Path) -> dict[str, Any] | None:
        file = folder / CARD
        if not file.is_file():
            return None
        try:
            card = json.loads(file.read_text(encoding="utf-8"))
            whole = card["schema"] > 0 and all(int(card[key]) > 0 for key in (*SHAPE, "block"))
            if whole and isinstance(card["built_for"], dict):
                return dict(card)
        except (OSError, ValueError, KeyError, TypeError):
            pass
        raise UserError(f"{file} cannot be read{_REPLACE}")

    @staticmethod
    def _problem(folder: Path, card: Mapping[str, Any], wanted: Mapping[str, Any], shape: Mapping[str, int]) -> str:
        if card["schema"] != SCHEMA:
            return f"the store in {folder} was written by another version of this package"
        stale = difference(card["built_for"], wanted)
        if stale:
            return f"the store in {folder} is {stale}"
        for name, value in shape.items():
            if card[name] != value:
                return f"the store in {folder} {SHAPE[name].format(card[name], value)}"
        return ""

    # --- building ----------------------------------------------------------------------------------------------------
    def _file(self, block: int) -> Path:
        return self.folder / "blocks" / f"{block:06d}.npy"

    def rows(self, block: int) -> range:
        """The users of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.n_users))

    def missing(self) -> list[int]:
        """Blocks that are not there yet."""
        return [block for block in range(self.n_blocks) if not self._file(block).is_file()]

    def is_whole(self, block: int) -> bool:
        """Whether a block is there and every row of it is what was written."""
        if not self._file(block).is_file():
            return False
        try:
            table = self._table(block)
            return all(self._check(row, user) == int(row["check"]) for user, row in zip(self.rows(block), table))
        except UserError:
            return False

    def write(self, block: int, items: np.ndarray, scores: np.ndarray) -> None:
        """Write a block whole.

        Args:
            block: its number.
            items: int ``[users of the block, k]``, best first, -1 where a user has fewer.
            scores: float ``[users of the block, k]``.

        Raises:
            UserError: another store was begun here since.
        """
        if self._card_of(self.folder) != self.card:
            raise UserError(f"the store in {self.folder} was begun anew by another command; this one ends here")
        table = np.zeros(len(self.rows(block)), dtype=self._dtype)
        table["items"], table["scores"] = items, scores
        for user, row in zip(self.rows(block), table):
            row["check"] = self._check(row, user)
        save_array(self._file(block), table)

    def finish(self) -> bool:
        """Say that the store is complete, if it is.

        Returns:
            Whether it is.
        """
        if self.missing():
            return False
        # One that was killed right after its block was whole.
        clear_parts(self._file(0).parent)
        _write_json(self.folder / COMPLETE, {"blocks": self.n_blocks})
        return True

    # --- reading -----------------------------------------------------------------------------------------------------
    @cached_property
    def users(self) -> NameIndex:
        """Raw user ids."""
        return NameIndex(self.folder, "users")

    @cached_property
    def items(self) -> TextTable:
        """Raw item ids by number."""
        return TextTable(self.folder, "items")

    @cached_property
    def titles(self) -> TextTable:
        """Titles by number."""
        return TextTable(self.folder, "titles")

    def _check(self, row: np.void, user: int) -> int:
        """Of a row's bytes, whose it is, and which of the stores that stood here in turn it was made for."""
        build = int(self.card.get("build", 0))
        seed = zlib.crc32(str(build).encode(), user) if build else user
        return zlib.crc32(row["items"].tobytes() + row["scores"].tobytes(), seed)

    def _table(self, block: int) -> np.ndarray:
        table = map_array(self._file(block))
        if table.dtype != self._dtype or table.shape != (len(self.rows(block)),):
            raise UserError(f"{self._file(block)} is damaged; build the store again (--build=true)")
        return table

    def look_up(self, user: str, k: int) -> list[tuple[str, str, float]] | None:
        """What a user is recommended, best first: raw item id, title and score. It opens one block and reads one row.

        Args:
            user: his raw id.
            k: how many, at most the store's.

        Returns:
            ``None`` for a user that is not in the store.

        Raises:
            UserError: his row is damaged.
        """
        number = self.users.find(user)
        if number is None:
            return None
        block = number // self.block
        if block not in self._open:
            self._open[block] = self._table(block)
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        row = self._open[block][number - block * self.block]
        if self._check(row, number) != int(row["check"]):
            raise UserError(f"{self._file(block)} is damaged; build the store again (--build=true)")
        return [
            (self.items[item], self.titles[item], float(score))
            for item, score in zip(row["items"][:k].tolist(), row["scores"][:k])
            if item >= 0
        ]


# What a build that was cut off before its card was there may have left.
_OWN = {".lock", "blocks", COMPLETE} | {
    f"{name}.{part}.npy{end}"
    for name in ("users", "items", "titles")
    for part in ("bytes", "places", "slots")
    for end in ("", ".part")
} | {f"{CARD}.part"}  # fmt: skip


def _write_tables(folder: Path, catalogue: Catalogue) -> None:
    """Write what is not there, or damaged."""
    tables: tuple[tuple[type[NameIndex] | type[TextTable], str, Sequence[str]], ...] = (
        (NameIndex, "users", catalogue.users), (TextTable, "items", catalogue.items),
        (TextTable, "titles", catalogue.titles),
    )  # fmt: skip
    for kind, name, texts in tables:
        if not kind.holds(folder, name, texts):
            kind.save(folder, name, texts)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


__all__ = ["Catalogue", "Plan", "TopKStore"]
