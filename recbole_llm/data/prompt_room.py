"""Prompts that are too long for the language model: left out, or made shorter, and counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_llm.data.prompts import Ragged
from recbole_llm.data.token_table import Segments


class PromptRoom:
    """Makes prompts, as runs of segments, fit into so many tokens.

    Of a history the oldest items go first, all but the latest; then the ends of texts, the last text's first. What the
    instruction itself says, the answer and single items stay as they are.

    Args:
        tokens: that a prompt may have, its answer included.
        segments: what the numbers of a run stand for.
        shown: the first and the last number but one of each table of history items, and the first of the table that
            has the same items as they open a history; among them that table itself.
        texts: the first and the last number but one of each table of texts.
        drop: whether prompts with an answer are left out rather than made shorter.
    """

    def __init__(
        self, tokens: int, segments: Segments, shown: Sequence[tuple[int, int, int]],
        texts: Sequence[tuple[int, int]], drop: bool,
    ) -> None:  # fmt: skip
        self.tokens, self.drop = tokens, drop
        self._segments, self._shown, self._texts = segments, shown, texts

    def too_long(self, runs: Ragged, tokens: int | None = None) -> Tensor:
        """By how much each prompt is too long, int64 ``[B]``; 0 where it is not.

        Args:
            runs: segment numbers, one row a prompt.
            tokens: that it may have, if not :attr:`tokens`.
        """
        lengths = torch.zeros(len(runs), dtype=torch.long)
        lengths.index_add_(0, runs.rows, self._segments.lengths_of(runs.values))
        return (lengths - (self.tokens if tokens is None else tokens)).clamp(min=0)

    def shorten(self, runs: Ragged, tokens: int | None = None) -> tuple[Ragged, Tensor]:
        """Take away what there is no room for.

        Args:
            runs: segment numbers, one row a prompt.
            tokens: that a prompt may have, if not :attr:`tokens`.

        Returns:
            The runs, and int64 ``[N]`` how many tokens of each segment's end are cut off.
        """
        over = self.too_long(runs, tokens)
        if over.any():
            runs = self._without_oldest(runs, over)
            over = self.too_long(runs, tokens)
        return runs, self._cuts(runs, over)

    def _without_oldest(self, runs: Ragged, over: Tensor) -> Ragged:
        numbers, rows = runs.values, runs.rows
        shown, opening = torch.zeros(len(numbers), dtype=torch.bool), numbers.clone()
        for start, stop, first in self._shown:
            mine = (numbers >= start) & (numbers < stop)
            shown |= mine
            opening[mine] += first - start
        at = shown.nonzero().squeeze(1)
        row = rows[at]
        place = Ragged.from_lengths(at, torch.bincount(row, minlength=len(runs))).positions
        lengths = self._segments.lengths_of(numbers[at])
        before = lengths.cumsum(0) - lengths
        # Where the history would begin with each item: what is saved, the blank between it and the one before included.
        saved = before - before[torch.arange(len(at)) - place]
        saved += torch.where(place > 0, lengths - self._segments.lengths_of(opening[at]), 0)
        last = torch.zeros(len(runs), dtype=torch.long).scatter_reduce(0, row, place, "amax")
        fits = torch.where(saved >= over[row], place, last[row])
        begin = last.scatter_reduce(0, row, fits, "amin")[row]
        numbers = numbers.clone()
        numbers[at] = torch.where((place == begin) & (begin > 0), opening[at], numbers[at])
        keep = torch.ones(len(numbers), dtype=torch.bool)
        keep[at] = place >= begin
        return Ragged(numbers, runs.offsets).keep(keep)

    def _cuts(self, runs: Ragged, over: Tensor) -> Tensor:
        numbers, rows = runs.values, runs.rows
        text = torch.zeros(len(numbers), dtype=torch.bool)
        for start, stop in self._texts:
            text |= (numbers >= start) & (numbers < stop)
        lengths = torch.where(text, self._segments.lengths_of(numbers), 0)
        through = lengths.cumsum(0)
        # Tokens of the texts that stand behind a segment in its prompt.
        ends = torch.cat([through.new_zeros(1), through])[runs.offsets[1:]]
        behind = ends[rows] - through
        return torch.minimum((over[rows] - behind).clamp(min=0), lengths)
