"""Batches of which not all labels count: a process's share of the loss is that of the labels that do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.data.instructions import TokenBatch


@dataclass(frozen=True)
class CountedBatch(TokenBatch):
    """A batch of which not all labels count in the mean.

    Attributes:
        counted: bool ``[L]``, those that do.
    """

    counted: Tensor

    def to(self, device: torch.device | str) -> CountedBatch:
        """The same on a device."""
        return CountedBatch(**vars(super().to(device)), counted=self.counted.to(device, non_blocking=True))

    def targets_count(self) -> int:
        """How many labels count."""
        return int(self.counted.sum())

    def share(self, rank: int, count: int) -> CountedBatch:
        """The prompts of one of ``count`` processes."""
        return CountedBatch(**vars(super().share(rank, count)), counted=self.counted[self.rows % count == rank])


def counting(batch: TokenBatch, counted: Tensor) -> CountedBatch:
    """A batch with what counts of it.

    Args:
        batch: of which some labels may be known already not to count.
        counted: bool ``[L]``.
    """
    if isinstance(batch, CountedBatch):
        counted = counted & batch.counted
    told = {name: value for name, value in vars(batch).items() if name != "counted"}
    return CountedBatch(**told, counted=counted)
