"""Texts and names on the disk, each read by itself: memory-mapped arrays, no pickle.

A :class:`TextTable` has the n-th text, a :class:`NameIndex` the number of a name. Both read a few bytes at known
places, however many texts there are.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tokenize import TokenError

import numpy as np

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError

# A place in the hash table for each name, and at least as many again left empty: few names meet.
ROOM = 2
_DAMAGED = "{} is damaged; build the store again (--build=true)"


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array as ``.npy``, whole or not at all."""
    write_whole(path, partial(_save, array))


def _save(array: np.ndarray, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def map_array(path: Path) -> np.ndarray:
    """A ``.npy`` file as an array that is read where it is looked at.

    Raises:
        UserError: there is none, or its head is damaged.
    """
    try:
        # A plain view of the map: slices of NumPy's own class take several times as long.
        return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)
    except (OSError, ValueError, EOFError, SyntaxError, TypeError, TokenError) as error:
        raise UserError(f"{path} cannot be read ({error}); build the store again (--build=true)") from None


class TextTable:
    """Texts by number.

    Args:
        folder: where they are.
        name: of the table.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._file = folder / f"{name}.bytes.npy"
        self._bytes = map_array(self._file)
        self._places = map_array(folder / f"{name}.places.npy")

    @staticmethod
    def save(folder: Path, name: str, texts: Sequence[str]) -> None:
        """Write a table.

        Args:
            folder: where; it exists.
            name: of the table.
            texts: any.
        """
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        places = np.zeros((len(encoded) + 1, 2), dtype=np.int64)
        np.cumsum([len(text) for text in encoded], out=places[1:, 0])
        places[:-1, 1] = [zlib.crc32(text) for text in encoded]
        # One more byte, as nothing cannot be mapped.
        save_array(folder / f"{name}.bytes.npy", np.frombuffer(b"".join([*encoded, b"\0"]), dtype=np.uint8))
        save_array(folder / f"{name}.places.npy", places)

    @classmethod
    def holds(cls, folder: Path, name: str, texts: Sequence[str]) -> bool:
        """Whether a table is there, whole and of these texts."""
        try:
            table = cls(folder, name)
            return len(table) == len(texts) and all(table[number] == text for number, text in enumerate(texts))
        except UserError:
            return False

    def __len__(self) -> int:
        return len(self._places) - 1

    def raw(self, number: int) -> bytes:
        """The bytes of a text.

        Raises:
            UserError: they are not those that were written.
        """
        (start, check), (end, _) = self._places[number], self._places[number + 1]
        text = self._bytes[start:end].tobytes()
        if zlib.crc32(text) != check:
            raise UserError(_DAMAGED.format(self._file))
        return text

    def __getitem__(self, number: int) -> str:
        return self.raw(number).decode("utf-8", "surrogatepass")


class NameIndex:
    """Names that are all different, by number and back: a hash table with open addressing.

    Args:
        folder: where it is.
        name: of the index.

    Attributes:
        texts: the names by number.
        looked_at: how many places of the hash table the last :meth:`find` has read.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.texts = TextTable(folder, name)
        self._file = folder / f"{name}.slots.npy"
        self._slots = map_array(self._file)
        if self._slots.ndim != 2 or self._slots.shape[1] != 2:
            raise UserError(_DAMAGED.format(self._file))
        self.looked_at = 0

    @staticmethod
    def save(folder: Path, name: str, names: Sequence[str]) -> None:
        """Write an index.

        Args:
            folder: where; it exists.
            name: of the index.
            names: all different.
        """
        size = 1 << (ROOM * len(names)).bit_length()
        slots = np.full((size, 2), -1, dtype=np.int64)
        for number, text in enumerate(names):
            slot = _hash(text.encode("utf-8", "surrogatepass")) & (size - 1)
            while slots[slot, 0] >= 0:
                slot = (slot + 1) & (size - 1)
            slots[slot, 0] = number
        slots[:, 1] = [_check_of(slot, number) for slot, number in enumerate(slots[:, 0].tolist())]
        TextTable.save(folder, name, names)
        save_array(folder / f"{name}.slots.npy", slots)

    @classmethod
    def holds(cls, folder: Path, name: str, names: Sequence[str]) -> bool:
        """Whether an index is there, whole and of these names."""
        try:
            index = cls(folder, name)
            return len(index.texts) == len(names) and all(index.find(text) == n for n, text in enumerate(names))
        except UserError:
            return False

    def find(self, text: str) -> int | None:
        """The number of a name; ``None`` where it is not there.

        Raises:
            UserError: a place that it reads is not what was written: a name must not be missing for that.
        """
        wanted, last = text.encode("utf-8", "surrogatepass"), len(self._slots) - 1
        slot, self.looked_at = _hash(wanted) & last, 0
        while self.looked_at <= last:
            self.looked_at += 1
            number, check = self._slots[slot].tolist()
            if check != _check_of(slot, number):
                raise UserError(_DAMAGED.format(self._file))
            if number < 0:
                return None
            if self.texts.raw(number) == wanted:
                return number
            slot = (slot + 1) & last
        return None


def _check_of(slot: int, number: int) -> int:
    """Of what stands at a place of the hash table."""
    return zlib.crc32(b"%d %d" % (slot, number))


def _hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


__all__ = ["NameIndex", "TextTable", "map_array", "save_array"]
