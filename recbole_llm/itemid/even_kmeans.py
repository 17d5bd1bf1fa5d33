"""k-means whose clusters are about equally large.

Lloyd's algorithm with another assignment: of few points exactly within bounds of a cluster's size (Bradley, Bennett,
Demiriz: Constrained k-means clustering, MSR-TR-2000-65), of many evenly by Sinkhorn's algorithm, as bounds over
thousands of items and hundreds of codes would be an assignment problem of millions of pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from recbole_llm.itemid.kmeans import assign, kmeans
from recbole_llm.itemid.sinkhorn import balanced

# A cluster has so many even shares of the points, at least and at most: LETTER's 10 to 60 of 256 codes in 10 clusters.
LEAST, MOST = 0.4, 2.35
# Lloyd's steps, LETTER's.
ITERATIONS = 10


def bounded_clusters(points: np.ndarray, size: int, seed: int, before: np.ndarray | None = None) -> np.ndarray:
    """Clusters of :data:`LEAST` to :data:`MOST` even shares of the points, of two points at least.

    Args:
        points: float32 ``[n, d]``, two or more; thousands take long.
        size: clusters; fewer where there are not two points for each.
        seed: of the start.
        before: clusters of the same points when they stood elsewhere, int64 ``[n]``, to start from.

    Returns:
        Each point's cluster, int64 ``[n]``.
    """
    size = min(size, len(points) // 2)
    share = len(points) / size
    least, most = max(2, int(LEAST * share)), int(MOST * share)

    def within_bounds(gaps: np.ndarray) -> np.ndarray:
        # Every cluster has `most` places; those that must be taken cost less than any other choice could save.
        prize = (np.arange(most) < least) * (1.0 + float(np.ptp(gaps)) * len(gaps))
        places = linear_sum_assignment((gaps[:, :, None] - prize).reshape(len(gaps), -1))[1]
        return np.asarray(places // most)

    if before is None:
        start = kmeans(points, size, seed=seed, iterations=ITERATIONS)[0]
    else:
        start = _means(points, before, np.zeros((size, points.shape[1]), np.float32))
    return _lloyd(points, start, within_bounds)[1]


def even_residual_kmeans(points: np.ndarray, levels: int, size: int, seed: int) -> np.ndarray:
    """Codes level after level, each at the mean of about as many of the residuals before it.

    Args:
        points: float32 ``[n, d]``.
        levels: of codes.
        size: codes of a level.
        seed: of the start.

    Returns:
        float32 ``[levels, size, d]``.

    Raises:
        UserError: see :func:`~recbole_llm.itemid.kmeans.kmeans`.
    """

    def evenly(gaps: np.ndarray) -> np.ndarray:
        return balanced(torch.from_numpy(gaps)).numpy()

    made = []
    for level in range(levels):
        centres, _ = _lloyd(points, kmeans(points, size, seed=seed + level, iterations=ITERATIONS)[0], evenly)
        made.append(centres)
        points = points - centres[assign(points, centres, "l2")[0]]
    return np.stack(made)


def _lloyd(
    points: np.ndarray, centres: np.ndarray, assigned: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Centres, and each point's, after steps with an assignment by squared distances ``[n, size]``."""
    squares = np.einsum("nd,nd->n", points, points)[:, None]
    labels = np.full(len(points), -1)
    for _ in range(ITERATIONS):
        gaps = squares - 2 * points @ centres.T + np.einsum("kd,kd->k", centres, centres)
        new = assigned(gaps)
        if np.array_equal(new, labels):
            break
        labels = new
        centres = _means(points, labels, centres)
    return centres, labels


def _means(points: np.ndarray, labels: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Means of the clusters' points; where a cluster has none, what was there before."""
    sums = np.zeros(before.shape)
    np.add.at(sums, labels, points)
    counts = np.bincount(labels, minlength=len(before))[:, None]
    return np.where(counts > 0, sums / np.maximum(counts, 1), before).astype(np.float32)
