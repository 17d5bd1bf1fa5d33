"""Batches of prompts of like length, filled up to a budget of tokens: for many users whom nobody waits for."""

from __future__ import annotations

from torch import Tensor


def batches_of(lengths: Tensor, behind: int, tokens: int) -> list[Tensor]:
    """Part prompts into batches that are read at once.

    The longest come first, so that a batch too large for the machine shows at once, and each batch takes the longest
    that are left. Which batch a prompt is in hangs on the lengths alone.

    Args:
        lengths: tokens of each prompt, int64 [B].
        behind: tokens that are read at most behind each prompt.
        tokens: that a batch has at most, every prompt of it counted as long as its longest, with ``behind``. A prompt
            that alone has more is a batch of its own.

    Returns:
        Rows, int64 each; every row once.
    """
    order = lengths.argsort(descending=True, stable=True)
    sizes, ordered, start = [], lengths[order].tolist(), 0
    while start < len(ordered):
        sizes.append(min(max(1, tokens // (ordered[start] + behind)), len(ordered) - start))
        start += sizes[-1]
    return list(order.split(sizes)) if sizes else []


def budget_of(lengths: Tensor, behind: int, users: int) -> int:
    """The tokens that so many users take at most: each as many as the longest prompt.

    Args:
        lengths: tokens of each prompt, int64 [B].
        behind: tokens that are read at most behind each prompt.
        users: at least 1.
    """
    return users * (int(lengths.max()) + behind)
