"""k-means for codebooks: greedy k-means++ in few dimensions, then exchanges of points between clusters.

The start looks at a random projection of the points, which keeps distances well enough to spread the centres at a tenth
of the time.

Lloyd's step gives every point to the nearest mean, its own mean included, which the point itself has pulled near: with
few points a cluster (a codebook has some 60 items a code) that keeps many points where they began. Hartigan's step asks
instead how much the objective rises where the point joins each cluster *without it*, and so goes on where Lloyd's
stops [1]_. Here it is taken for blocks of points at once, as one matrix product a block.

.. [1] M. Telgarsky, A. Vattani. "Hartigan's Method: k-means Clustering without Voronoi". AISTATS 2010.
"""

from __future__ import annotations

from typing import Literal

import faiss
import numpy as np
from scipy import sparse

from recbole_llm.errors import UserError

Distance = Literal["cosine", "l2"]

# The start looks at the points in at most so many dimensions.
START_DIMENSIONS = 128
# Points are exchanged so many blocks a pass: between blocks the centres move.
BLOCKS = 8
# An objective that falls by less than this share in a pass is as good as there.
FLAT = 1e-4


def check_points(points: np.ndarray, what: str = "points") -> None:
    """Refuse vectors that are no numbers.

    Args:
        points: float ``[n, d]``.
        what: what a row is called in the message.

    Raises:
        UserError: a value is NaN or infinite.
    """
    broken = np.flatnonzero(~np.isfinite(points).all(axis=1))
    if len(broken):
        raise UserError(
            f"{len(broken)} of {len(points)} {what} have values that are NaN or infinite (the first is row {broken[0]})"
        )


def check_count(points: int, size: int) -> None:
    """Refuse more codes than there are items to make them of.

    Raises:
        UserError: there are.
    """
    if points < size:
        raise UserError(
            f"fewer items than codes: {points} items for {size} codes a level; set code_size to at most {points}"
        )


def kmeans(
    points: np.ndarray, size: int, *, seed: int, iterations: int = 25, distance: Distance = "l2"
) -> tuple[np.ndarray, np.ndarray]:
    """Cluster points.

    Under ``l2`` the sum of squared distances to the nearest centre falls. Under ``cosine`` it is the sum of cosine
    distances, each weighted by its point's norm: then the best centre of a cluster, given its members, points along
    their sum, and so the mean of the raw members is the best centre for the assignment and, among all vectors, for what
    is left of the members after it is subtracted. Centres are therefore not normalised: a code keeps its norm.

    Args:
        points: float32 ``[n, d]``.
        size: the number of centres.
        seed: of the start; equal seeds and numbers of threads give equal centres.
        iterations: most passes over the points.
        distance: by which a point chooses its centre.

    Returns:
        Centres float32 ``[size, d]``, and each point's nearest one, int64 ``[n]``. Where fewer than ``size`` points
        differ, some centres are equal and some have no point.

    Raises:
        UserError: there are fewer points than centres, or some are NaN or infinite.
    """
    check_count(len(points), size)
    points = np.ascontiguousarray(points, dtype=np.float32)
    check_points(points)
    generator = np.random.default_rng(seed)
    # Blocks are then samples of all points, whatever the order in which they came.
    mixed = points[generator.permutation(len(points))]
    clusters = _Clusters(mixed, _start(mixed, size, distance, generator), size, distance)
    best, centres = clusters.objective(), clusters.centres()
    for _ in range(iterations - 1):
        moved = clusters.exchange()
        moved += clusters.fill_empty()
        objective = clusters.objective()
        if objective >= best:
            break
        flat = best - objective <= FLAT * best
        best, centres = objective, clusters.centres()
        if flat or not moved:
            break
    return centres, assign(points, centres, distance)[0]


def assign(points: np.ndarray, centres: np.ndarray, distance: Distance) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each point.

    Args:
        points: float32 ``[n, d]``.
        centres: float32 ``[size, d]``.
        distance: ``l2`` is squared; the cosine distance from or to a vector of zeros is 1.

    Returns:
        The centre's number, int64 ``[n]``, and the distance, float32 ``[n]``.
    """
    if distance == "cosine":
        similarity, nearest = faiss.knn(_unit(points), _unit(centres), 1, metric=faiss.METRIC_INNER_PRODUCT)
        return nearest[:, 0], 1 - similarity[:, 0]
    gaps, nearest = faiss.knn(points, np.ascontiguousarray(centres), 1)
    return nearest[:, 0], gaps[:, 0]


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)


def _start(points: np.ndarray, size: int, distance: Distance, generator: np.random.Generator) -> np.ndarray:
    """Each point's cluster to begin with, int64 ``[n]``."""
    seen = _unit(points) if distance == "cosine" else points
    if seen.shape[1] > START_DIMENSIONS:
        seen = seen @ generator.standard_normal((seen.shape[1], START_DIMENSIONS), dtype=np.float32)
    return assign(seen, seen[_spread_out(seen, size, generator)], "l2")[0]


def _spread_out(points: np.ndarray, size: int, generator: np.random.Generator) -> np.ndarray:
    """Rows chosen by greedy k-means++.

    Each next row is the best of a few, drawn in proportion to the squared distance from the rows chosen before (D.
    Arthur, S. Vassilvitskii: k-means++, SODA 2007; as many candidates as scikit-learn has).
    """
    squares = np.einsum("nd,nd->n", points, points)[:, None]
    ones = np.ones_like(squares)
    # |x|^2 - 2 x.c + |c|^2 as one product.
    seen, asked = np.hstack([points, squares, ones]), np.hstack([-2 * points, ones, squares])
    chosen = np.empty(size, dtype=np.int64)
    chosen[0] = generator.integers(len(points))
    gaps = np.maximum(seen @ asked[chosen[0]], 0)
    candidates = 2 + int(np.log(size))
    for place in range(1, size):
        cumulative = np.cumsum(gaps, dtype=np.float64)
        marks = generator.random(candidates) * cumulative[-1]
        # Where all that is left is a copy of a chosen row, the marks are 0 and one more copy is chosen.
        drawn = np.minimum(np.searchsorted(cumulative, marks, side="right"), len(points) - 1)
        left = asked[drawn] @ seen.T
        np.minimum(left, gaps, out=left)
        best = left.sum(axis=1).argmin()
        gaps, chosen[place] = np.maximum(left[best], 0), drawn[best]
    return chosen


class _Clusters:
    """Points, whose cluster each is in, and the clusters' sums."""

    def __init__(self, points: np.ndarray, assignment: np.ndarray, size: int, distance: Distance) -> None:
        self.points, self.size, self.distance = points, size, distance
        self.squares = np.einsum("nd,nd->n", points, points)
        self.spread = float(self.squares.sum(dtype=np.float64))
        self.norms = np.sqrt(self.squares)
        self.assignment = assignment
        self.sums = np.zeros((size, points.shape[1]))
        self.counts = np.bincount(self.assignment, minlength=size)
        self._add(points, self.assignment, np.ones(len(points)))
        self.fill_empty()

    def _add(self, rows: np.ndarray, to: np.ndarray, signs: np.ndarray) -> None:
        places = np.arange(len(to)) % max(len(rows), 1)
        self.sums += sparse.csr_matrix((signs, (to, places)), shape=(self.size, len(rows))) @ rows

    def _move(self, places: np.ndarray, new: np.ndarray) -> None:
        old = self.assignment[places]
        signs = np.repeat([1.0, -1.0], len(places))
        self._add(self.points[places], np.concatenate([new, old]), signs)
        self.counts += np.bincount(new, minlength=self.size) - np.bincount(old, minlength=self.size)
        self.assignment[places] = new
        self.sums[self.counts == 0] = 0

    def centres(self) -> np.ndarray:
        """The means of the members; a point where there are none."""
        centres = (self.sums / np.maximum(self.counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(self.counts == 0)
        centres[empty] = self.points[empty]
        return centres

    def objective(self) -> float:
        """What the clustering lowers: see :func:`kmeans`."""
        if self.distance == "cosine":
            return float(self.norms.sum(dtype=np.float64) - np.linalg.norm(self.sums, axis=1).sum())
        squares = np.einsum("kd,kd->k", self.sums, self.sums)
        return self.spread - float((squares / np.maximum(self.counts, 1)).sum())

    def exchange(self) -> int:
        """Give each point to the cluster where it raises the objective least; returns how many moved."""
        moved = 0
        for block in np.array_split(np.arange(len(self.points)), BLOCKS):
            own = self.assignment[block]
            cost = self._costs(block, own)
            cost[:, self.counts == 0] = np.inf
            # A point alone in its cluster costs nothing there.
            cost[self.counts[own] == 1, own[self.counts[own] == 1]] = -np.inf
            new = cost.argmin(axis=1)
            changed = np.flatnonzero(new != own)
            self._move(block[changed], new[changed])
            moved += len(changed)
        return moved

    def _costs(self, block: np.ndarray, own: np.ndarray) -> np.ndarray:
        """How much the objective rises when a block's points join each cluster, float32 ``[b, size]``."""
        points, squares = self.points[block], self.squares[block]
        rows = np.arange(len(block))
        counts = self.counts.astype(np.float32)
        if self.distance == "l2":
            # |x - mean|^2 n / (n + 1); without the point itself, its own cluster has |x - mean|^2 n / (n - 1).
            centres = self.centres()
            share = counts / (counts + 1)
            cost = points @ (centres * (-2 * share)[:, None]).T
            cost += share * np.einsum("kd,kd->k", centres, centres)
            cost += squares[:, None] * share
            cost[rows, own] *= (counts[own] + 1) / np.maximum(counts[own] - 1, 1)
            return cost
        # |S| + |x| - |S + x|, where |x| is the same for all; without the point itself, its own S is S - x.
        sums = self.sums.astype(np.float32)
        lengths = np.einsum("kd,kd->k", sums, sums)
        cost = points @ (2 * sums).T
        inner = cost[rows, own].copy()
        cost += lengths
        cost += squares[:, None]
        np.sqrt(np.maximum(cost, 0, out=cost), out=cost)
        np.subtract(np.sqrt(lengths), cost, out=cost)
        cost[rows, own] = np.sqrt(np.maximum(lengths[own] - inner + squares, 0)) - np.sqrt(lengths[own])
        return cost

    def fill_empty(self) -> int:
        """Put the points that are worst off into the clusters that have none; returns how many moved."""
        empty = np.flatnonzero(self.counts == 0)
        if not len(empty):
            return 0
        centres = self.centres()
        gaps = np.square(self.points - centres[self.assignment]).sum(axis=1)
        gaps[self.counts[self.assignment] == 1] = 0
        worst = np.argsort(-gaps, kind="stable")[: len(empty)]
        worst = worst[gaps[worst] > 0]
        self._move(worst, empty[: len(worst)])
        return len(worst)
