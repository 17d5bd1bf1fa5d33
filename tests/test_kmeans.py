"""k-means against plain loops, and on points that are awkward."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from recbole_llm.errors import UserError
from recbole_llm.itemid.kmeans import _Clusters, assign, kmeans

DISTANCES = ("l2", "cosine")


def blobs(n: int = 900, d: int = 24, groups: int = 40, seed: int = 0, noise: float = 0.3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(groups, d))
    return (centres[rng.integers(groups, size=n)] + noise * rng.normal(size=(n, d))).astype(np.float32)


def plain_distance(point: np.ndarray, centre: np.ndarray, distance: str) -> float:
    if distance == "l2":
        return float(((point - centre) ** 2).sum())
    norms = np.linalg.norm(point) * np.linalg.norm(centre)
    return 1 - float(point @ centre / norms) if norms else 1.0


def plain_objective(points: np.ndarray, assignment: np.ndarray, distance: str) -> float:
    """Of clusters with the best centre that they can have."""
    total = 0.0
    for cluster in np.unique(assignment):
        members = points[assignment == cluster].astype(np.float64)
        mean = members.mean(axis=0)
        for point in members:
            weight = 1.0 if distance == "l2" else float(np.linalg.norm(point))
            total += weight * plain_distance(point, mean, distance)
    return total


@pytest.mark.parametrize("distance", DISTANCES)
class TestKMeans:
    def test_each_point_has_the_nearest_centre(self, distance: str) -> None:
        points = blobs()
        centres, assignment = kmeans(points, 30, seed=1, distance=distance)
        assert centres.shape == (30, 24) and centres.dtype == np.float32 and assignment.dtype == np.int64
        plain = [[plain_distance(point, centre, distance) for centre in centres] for point in points]
        assert np.array_equal(assignment, np.argmin(plain, axis=1))
        gaps = assign(points, centres, distance)[1]
        assert gaps == pytest.approx(np.min(plain, axis=1), rel=1e-3, abs=1e-5)

    def test_centres_are_the_means_of_the_raw_members(self, distance: str) -> None:
        points = blobs() * np.random.default_rng(3).uniform(0.1, 5, size=(900, 1)).astype(np.float32)
        centres, assignment = kmeans(points, 20, seed=1, iterations=200, distance=distance)
        means = np.stack([points[assignment == code].mean(axis=0) for code in range(20)])
        # The last nearest-centre look may move a point that exchanges had left; nearly all centres are untouched.
        same = np.isclose(centres, means, rtol=1e-3, atol=1e-4).all(axis=1)
        assert same.mean() > 0.7
        assert np.linalg.norm(centres, axis=1).std() > 0.05

    def test_equal_seeds_give_equal_centres_and_others_do_not(self, distance: str) -> None:
        points = blobs()
        first, second, other = (kmeans(points, 20, seed=seed, distance=distance)[0] for seed in (1, 1, 2))
        assert np.array_equal(first, second) and not np.array_equal(first, other)

    def test_more_passes_are_never_worse(self, distance: str) -> None:
        points = blobs(noise=1.0)
        found = [
            plain_objective(points, kmeans(points, 60, seed=0, iterations=count, distance=distance)[1], distance)
            for count in (1, 3, 20)
        ]
        assert found[0] > found[1] > found[2] * 0.999

    def test_costs_are_what_the_objective_rises_by(self, distance: str) -> None:
        """Against the objective itself, computed with the point moved to each cluster in turn."""
        points = blobs(60, 5, 6, noise=0.8)
        assignment = np.arange(60) % 4
        clusters = _Clusters(points, assignment.copy(), 4, distance)  # type: ignore[arg-type]
        assert clusters.objective() == pytest.approx(plain_objective(points, assignment, distance), rel=1e-5)
        block = np.arange(20)
        costs = clusters._costs(block, assignment[block])
        for place, point in enumerate(block):
            plain = []
            for cluster in range(4):
                moved = assignment.copy()
                moved[point] = cluster
                plain.append(plain_objective(points, moved, distance))
            found = costs[place] - costs[place].min()
            assert found == pytest.approx(np.array(plain) - min(plain), rel=1e-3, abs=2e-4)

    def test_as_many_clusters_as_points(self, distance: str) -> None:
        points = blobs(16)
        _, assignment = kmeans(points, 16, seed=0, distance=distance)
        assert len(np.unique(assignment)) == 16

    def test_constant_points(self, distance: str) -> None:
        for value in (0.0, 2.0):
            centres, assignment = kmeans(np.full((50, 3), value, dtype=np.float32), 8, seed=0, distance=distance)
            assert np.all(centres == value) and len(np.unique(assignment)) == 1

    def test_copies_of_a_few_points(self, distance: str) -> None:
        few = blobs(7, 4)
        points = np.repeat(few, 9, axis=0)
        centres, assignment = kmeans(points, 20, seed=0, distance=distance)
        assert np.isfinite(centres).all()
        assert len(np.unique(assignment)) == 7
        assert centres[assignment] == pytest.approx(points, abs=1e-5)


@given(st.integers(0, 10**6), st.sampled_from(DISTANCES), st.integers(1, 40), st.integers(1, 4))
def test_any_small_points(seed: int, distance: str, n: int, d: int) -> None:
    """Grids have many equal points, zeros and ties."""
    rng = np.random.default_rng(seed)
    points = rng.integers(-1, 2, size=(n, d)).astype(np.float32)
    size = int(rng.integers(1, n + 1))
    centres, assignment = kmeans(points, size, seed=seed, distance=distance)
    assert centres.shape == (size, d) and np.isfinite(centres).all()
    for point, code in zip(points, assignment):
        gaps = [plain_distance(point, centre, distance) for centre in centres]
        assert gaps[code] == pytest.approx(min(gaps), abs=1e-5)


@pytest.mark.parametrize(("wide", "groups", "noise"), [(24, 300, 0.7), (200, 30, 2.0)])
def test_no_worse_than_lloyd_from_scikit_learn(wide: int, groups: int, noise: float) -> None:
    ours = theirs = 0.0
    for seed in range(3):
        points = blobs(2000, wide, groups, seed, noise)
        centres, assignment = kmeans(points, 64, seed=seed)
        ours += float(((points - centres[assignment]) ** 2).sum())
        theirs += KMeans(64, n_init=1, max_iter=25, random_state=seed).fit(points).inertia_
    assert ours <= theirs * 1.001


def test_empty_clusters_get_the_points_that_are_worst_off() -> None:
    points = np.array([[0, 0], [0.1, 0], [5, 0], [0, 7]], dtype=np.float32)
    clusters = _Clusters(points, np.zeros(4, dtype=np.int64), 3, "l2")
    assert clusters.assignment.tolist() == [0, 0, 2, 1]
    assert clusters.counts.tolist() == [2, 1, 1]
    assert clusters.centres() == pytest.approx(np.array([[0.05, 0], [0, 7], [5, 0]]))


def test_fewer_points_than_centres_is_told() -> None:
    told = r"^fewer items than codes: 5 items for 8 codes a level; set code_size to at most 5$"
    with pytest.raises(UserError, match=told):
        kmeans(blobs(5), 8, seed=0)


def test_values_that_are_no_numbers_are_counted() -> None:
    points = blobs(20)
    points[[4, 11], [0, 3]] = np.nan, np.inf
    with pytest.raises(
        UserError, match=r"^2 of 20 points have values that are NaN or infinite \(the first is row 4\)$"
    ):
        kmeans(points, 8, seed=0)
