"""RecBole's ranking metrics as array operations over users, keeping every user's value.

RecBole's classes (evaluator/metrics.py) loop over users in Python for MRR, MAP and NDCG and keep the mean only. The
definitions are RecBole's; its metrics that are no mean over users (coverage, Gini, GAUC, ...) are computed by its own
classes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

UserMetric = Callable[[np.ndarray, np.ndarray], np.ndarray]


def hit(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """1 where a target stands among the first k.

    Args:
        hits: bool [U, K], whether the item at a rank is a target.
        targets: int64 [U], number of targets.

    Returns:
        float64 [U, K]: the metric at every k up to K, as for all functions here.
    """
    return np.maximum.accumulate(hits, axis=1).astype(np.float64)


def mrr(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """One over the rank of the first target, 0 when it stands below k."""
    found = np.maximum.accumulate(hits, axis=1)
    first = np.where(hits.any(axis=1), hits.argmax(axis=1), 0)
    return found / (first + 1.0)[:, None]


def recall(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of the targets among the first k."""
    return np.cumsum(hits, axis=1) / targets[:, None]


def precision(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Share of the first k that are targets."""
    return np.cumsum(hits, axis=1) / np.arange(1, hits.shape[1] + 1)


def ndcg(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Discounted gain over that of a ranking with min(targets, k) targets in front."""
    discounts = 1.0 / np.log2(np.arange(2, hits.shape[1] + 2))
    gains = np.cumsum(np.where(hits, discounts, 0.0), axis=1)
    ideal = np.cumsum(discounts)
    ranks = np.arange(hits.shape[1])
    return gains / ideal[np.minimum(ranks[None, :], np.minimum(targets, hits.shape[1])[:, None] - 1)]


def average_precision(hits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Mean of the precisions at the targets' ranks, over min(targets, k)."""
    gains = np.cumsum(precision(hits, targets) * hits, axis=1)
    ranks = np.arange(1, hits.shape[1] + 1)
    return gains / np.minimum(ranks[None, :], np.minimum(targets, hits.shape[1])[:, None])


USER_METRICS: dict[str, UserMetric] = {
    "hit": hit,
    "mrr": mrr,
    "recall": recall,
    "precision": precision,
    "ndcg": ndcg,
    "map": average_precision,
}
