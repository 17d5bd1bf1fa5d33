"""The K best items of a row of scores, with ties in an order that depends on nothing but the items' names.

``torch.topk`` orders equal scores differently for different K, and sorting by internal id would follow the order of the
data file. Models in closed form and counts (Pop) tie often.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch


def tie_order(tokens: Sequence[str]) -> torch.Tensor:
    """Item ids in the order in which equal scores are ranked: that of the SHA-256 of their raw ids.

    Args:
        tokens: raw ids by internal id, [n_items].

    Returns:
        int64 [n_items].
    """
    marks = [hashlib.sha256(str(token).encode()).digest() for token in tokens]
    return torch.tensor(sorted(range(len(marks)), key=marks.__getitem__))


def leaders(scores: torch.Tensor, groups: torch.Tensor, rank: torch.Tensor) -> torch.Tensor:
    """Of each group's members the one that scores best, of equal ones the first in the order of ties.

    Args:
        scores: [B, N].
        groups: of each member, int64 [N], below N or some other number of groups.
        rank: place of each member in the order of ties, int64 [N].

    Returns:
        bool [B, N].
    """
    groups, count = groups.expand_as(scores), int(groups.max()) + 1
    best = torch.full_like(scores[:, :1], -torch.inf).repeat(1, count).scatter_reduce(1, groups, scores, "amax")
    ranks = torch.where(scores == best.gather(1, groups), rank, torch.iinfo(rank.dtype).max)
    first = torch.full_like(ranks[:, :1], torch.iinfo(rank.dtype).max).repeat(1, count)
    return ranks == first.scatter_reduce(1, groups, ranks, "amin").gather(1, groups)


def top_items(scores: torch.Tensor, k: int, order: torch.Tensor | None) -> torch.Tensor:
    """The best items of each row; those of a smaller k are the first of those of a larger one.

    Args:
        scores: [B, n_items].
        k: how many, at most n_items.
        order: from :func:`tie_order`; ``None`` leaves ties to ``torch.topk``, as RecBole does.

    Returns:
        int64 [B, k], best first.
    """
    if order is None:
        return scores.topk(k, dim=1).indices
    # One more than asked for, as the tie that matters most stands across the cut.
    best = scores.topk(min(k + 1, scores.size(1)), dim=1)
    equal = (best.values[:, 1:] == best.values[:, :-1]) & torch.isfinite(best.values[:, 1:])
    top, tied = best.indices[:, :k], equal.any(dim=1)
    if tied.any():
        order = order.to(scores.device)
        ranked = scores[tied][:, order].sort(dim=1, descending=True, stable=True).indices[:, :k]
        top = top.clone()
        top[tied] = order[ranked]
    return top
