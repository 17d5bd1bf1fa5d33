"""Tokens of many texts on disk, of which a batch reads its own rows, and tables of segments behind one numbering."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.prompts import Ragged

VALUES, OFFSETS = "tokens.npy", "offsets.npy"
# Texts that are encoded at a time.
CHUNK = 4096


@dataclass(frozen=True)
class TokenTable:
    """Token ids of texts; those on disk are opened without being read.

    Attributes:
        values: int32 ``[N]``: the rows one after the other.
        offsets: int64 ``[R + 1]``.
        limit: of each row only so many tokens; ``None``, all.
        plus: what is added to every token.
    """

    values: np.ndarray
    offsets: np.ndarray
    limit: int | None = None
    plus: int = 0

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], limit: int | None = None) -> TokenTable:
        """A table in memory."""
        values = np.array([token for row in rows for token in row], dtype=np.int32)
        return cls(values, np.cumsum([0, *map(len, rows)], dtype=np.int64), limit)

    @classmethod
    def write(
        cls, folder: Path, texts: Sequence[str], encode: Callable[[Sequence[str]], list[list[int]]], limit: int
    ) -> TokenTable:
        """Encode texts and keep their tokens, some thousand texts at a time: memory holds these and lengths alone.

        Args:
            folder: where to; the files there are replaced.
            texts: one a row.
            encode: many texts to their token ids.
            limit: each text is cut to so many tokens.
        """
        lengths: list[int] = []
        with open(folder / VALUES, "wb") as file:
            _head(file, 0)
            start = file.tell()
            for first in range(0, len(texts), CHUNK):
                rows = [row[:limit] for row in encode(texts[first : first + CHUNK])]
                lengths += map(len, rows)
                np.array([token for row in rows for token in row], dtype=np.int32).tofile(file)
            file.seek(0)
            # NumPy leaves room in a header for a longer shape, so that it can be written over.
            _head(file, sum(lengths))
            if file.tell() != start:
                raise RuntimeError(f"the header of {VALUES} has moved from {start} to {file.tell()} bytes")
        np.save(folder / OFFSETS, np.cumsum([0, *lengths], dtype=np.int64))
        return cls.open(folder)

    @classmethod
    def open(cls, folder: Path) -> TokenTable:
        """Take up what :meth:`write` left."""
        values, offsets = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in (VALUES, OFFSETS))
        return cls(values, offsets)

    def cut(self, limit: int) -> TokenTable:
        """The same with each row's first ``limit`` tokens alone."""
        return replace(self, limit=limit if self.limit is None else min(limit, self.limit))

    def added(self, number: int) -> TokenTable:
        """The same with a number added to every token, for what marks labels."""
        return replace(self, plus=self.plus + number)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def longest(self) -> int:
        """Tokens of the longest row; 0 where there is none."""
        most = int(np.diff(self.offsets).max()) if len(self) else 0
        return most if self.limit is None else min(most, self.limit)

    def lengths_of(self, rows: Tensor) -> Tensor:
        """Of some rows: int64, in the shape of ``rows``."""
        places = rows.numpy()
        found = torch.from_numpy(np.asarray(self.offsets[places + 1] - self.offsets[places]))
        return found if self.limit is None else found.clamp(max=self.limit)

    def take(self, rows: Tensor) -> Ragged:
        """The given rows (int64 ``[B]``, repeats allowed), in that order; nothing else is read."""
        cut = Ragged.from_lengths(rows, self.lengths_of(rows))  # only its offsets are of use: they are the result's
        starts = torch.from_numpy(np.asarray(self.offsets[rows.numpy()]))
        shift = (starts - cut.offsets[:-1]).repeat_interleave(cut.lengths)
        values = torch.from_numpy(self.values[(torch.arange(len(shift)) + shift).numpy()].astype(np.int64))
        return Ragged(values + self.plus, cut.offsets)


def _head(file: BinaryIO, length: int) -> None:
    """Write what a .npy file of so many int32 begins with."""
    own = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.int32)), "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(file, own)


class Segments:
    """Tables whose rows have one numbering: those of a table come after all of the tables before it.

    Tables in memory that stand side by side are joined; one on disk stays there, and a batch reads its own rows of it.

    Args:
        tables: at least one.

    Attributes:
        bases: int64 ``[tables + 1]``, the number of each table's first row, and how many rows there are.
    """

    def __init__(self, tables: Sequence[Ragged | TokenTable]) -> None:
        self.bases = torch.tensor([0, *(len(table) for table in tables)]).cumsum(0)
        self._tables: list[Ragged | TokenTable] = []
        starts: list[int] = []
        for table, base in zip(tables, self.bases.tolist()):
            last = self._tables[-1] if self._tables else None
            if isinstance(table, Ragged) and isinstance(last, Ragged):
                values = torch.cat([last.values, table.values])
                self._tables[-1] = Ragged.from_lengths(values, torch.cat([last.lengths, table.lengths]))
            else:
                self._tables.append(table)
                starts.append(base)
        self._starts = torch.tensor(starts)

    def _by_table(self, numbers: Tensor) -> list[tuple[Ragged | TokenTable, Tensor, Tensor]]:
        """The tables that have some of flat numbers, which of these, and the rows."""
        which = torch.searchsorted(self._starts, numbers, right=True) - 1
        found = []
        for place, table in enumerate(self._tables):
            mine = (which == place).nonzero().squeeze(1)
            if len(mine):
                found.append((table, mine, numbers[mine] - self._starts[place]))
        return found

    def lengths_of(self, numbers: Tensor) -> Tensor:
        """Tokens of segments: int64, in the shape of ``numbers``."""
        flat = numbers.flatten()
        found = torch.zeros_like(flat)
        for table, mine, rows in self._by_table(flat):
            if isinstance(table, TokenTable):
                found[mine] = table.lengths_of(rows)
            else:
                found[mine] = table.offsets[rows + 1] - table.offsets[rows]
        return found.view_as(numbers)

    def take(self, numbers: Tensor) -> Ragged:
        """Segments by number (int64 ``[B]``, repeats allowed), in that order."""
        parts = self._by_table(numbers)
        if not parts:
            return Ragged(numbers, torch.zeros(1, dtype=torch.long))
        if len(parts) == 1:
            table, _, rows = parts[0]
            return table.take(rows)
        taken = [(table.take(rows), mine) for table, mine, rows in parts]
        order = torch.empty_like(numbers)
        order[torch.cat([mine for _, mine in taken])] = torch.arange(len(numbers))
        values = torch.cat([part.values for part, _ in taken])
        return Ragged.from_lengths(values, torch.cat([part.lengths for part, _ in taken])).take(order)


def fingerprint_of_texts(texts: Sequence[str]) -> str:
    """SHA-256 of texts in their order, without a copy of them all."""
    digest = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()
