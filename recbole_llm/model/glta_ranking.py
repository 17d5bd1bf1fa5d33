"""From GLTA's slot logits to one score per item of the catalogue.

Source: GLTA (WWW 2025 Companion, arXiv 2502.18757), section 3.3 ("first k logits") and the inference ablation.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pick_best(scores: Tensor, remaining: Tensor) -> Tensor:
    """Each row's best remaining item, which then remains no longer.

    Args:
        scores: ``[B, I]``.
        remaining: bool ``[B, I]``; changed in place.

    Returns:
        int64 ``[B]``; 0, the padding item, in a row where nothing remained.
    """
    best, pick = scores.masked_fill(~remaining, -torch.inf).max(1)
    pick = pick.where(best > -torch.inf, torch.zeros_like(pick))
    remaining.scatter_(1, pick.unsqueeze(1), False)
    return pick


def lift_picks(picks: list[Tensor], tail: Tensor, allowed: Tensor) -> Tensor:
    """The tail's scores with the picked items above all of it, first pick first.

    Args:
        picks: item ids int64 ``[B]`` slot by slot, no item twice; 0 is passed over.
        tail: ``[B, I]``, finite where allowed.
        allowed: bool ``[B, I]``, false for item 0.

    Returns:
        ``[B, I]``: finite where allowed, ``-inf`` elsewhere.
    """
    scores = tail.masked_fill(~allowed, -torch.inf)
    # Steps of one above the row's own maximum: exact in float32 at the size of log-probabilities.
    lifts = torch.arange(len(picks), 0, -1, device=tail.device, dtype=tail.dtype)
    lifted = scores.max(1, keepdim=True).values + lifts
    return scores.scatter(1, torch.stack(picks, 1), lifted).masked_fill(~allowed, -torch.inf)


def first_k_scores(log_probs: Tensor, allowed: Tensor) -> Tensor:
    """Scores that rank each slot's best item first, in the slots' order, and all other items below them.

    The slots are trained on randomly shuffled targets, so their best items largely coincide: each slot takes the best
    item that may be recommended and that no slot before it took. The rest is ranked by the mean log-probability over
    the slots.

    Args:
        log_probs: ``[B, k, I]`` log-probabilities at the slots.
        allowed: bool ``[B, I]``, the items that may be recommended.

    Returns:
        ``[B, I]``: finite where allowed, ``-inf`` elsewhere.
    """
    remaining = allowed.clone()
    picks = [pick_best(log_probs[:, slot], remaining) for slot in range(log_probs.shape[1])]
    return lift_picks(picks, log_probs.mean(1), allowed)
