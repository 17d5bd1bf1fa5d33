"""What TCA4Rec's released code does otherwise than its paper, as settings with names.

Source: the authors' public code (its collaborative tokenizer and data collator). What it does besides, feature
projectors outside the optimizer and a learning rate that is never passed on, is no matter of the labels and not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Behaviour:
    """How labels are made and averaged.

    Attributes:
        drop_last: last tokens of an item that are no labels. The release masks the last label and appends no end token,
            so of a title with one the last two are never trained.
        dtype: the teacher's logits are rounded to it; the release multiplies bfloat16 embeddings.
        skip_forced: under ``legal_only``, leave positions with but one legal token, whose loss is 0, out of the mean.
    """

    drop_last: int = 0
    dtype: torch.dtype = torch.float32
    skip_forced: bool = True


OURS = Behaviour()
OFFICIAL = Behaviour(drop_last=2, dtype=torch.bfloat16, skip_forced=False)


def behaviour(official_quirks: bool) -> Behaviour:
    """The one or the other.

    Args:
        official_quirks: as the released code does.
    """
    return OFFICIAL if official_quirks else OURS
