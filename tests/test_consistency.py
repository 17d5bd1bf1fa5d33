"""Agreement of two rankings, against the definitions written as loops and values by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.evaluation.consistency import consistency, overlap, rank_biased_overlap


@st.composite
def pairs(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    users, k = draw(st.integers(0, 4)), draw(st.integers(0, 6))

    def lists() -> np.ndarray:
        rows = []
        for _ in range(users):
            row = draw(st.lists(st.integers(1, 9), unique=True, max_size=k))
            rows.append(row + [-1] * (k - len(row)))
        return np.array(rows, dtype=np.int64).reshape(users, k)

    return lists(), lists()


@given(pairs())
def test_equal_sets_at_every_depth(lists: tuple[np.ndarray, np.ndarray]) -> None:
    ours, theirs = lists
    found = overlap(ours, theirs)
    assert found.shape == ours.shape
    for user, k in np.ndindex(*found.shape):
        both = set(ours[user, : k + 1].tolist()) & set(theirs[user, : k + 1].tolist()) - {-1}
        assert found[user, k] == pytest.approx(len(both) / (k + 1))
    np.testing.assert_array_equal(found, overlap(theirs, ours))


@given(pairs(), st.floats(0.05, 0.99))
def test_rank_biased_overlap_is_the_papers_sum(lists: tuple[np.ndarray, np.ndarray], p: float) -> None:
    ours, theirs = lists
    found, at = rank_biased_overlap(ours, theirs, p), overlap(ours, theirs)
    for user, k in np.ndindex(*found.shape):
        terms = sum(at[user, d - 1] * p**d for d in range(1, k + 2))
        assert found[user, k] == pytest.approx(at[user, k] * p ** (k + 1) + (1 - p) / p * terms)
    assert ((found >= 0) & (found <= 1 + 1e-12)).all()


def test_golden() -> None:
    # Overlaps 0, 1, 2/3 at depths 1, 2, 3; with p = 0.5: 2/3 / 8 + 1 / 4 + 2/3 / 8.
    ours, theirs = np.array([[1, 2, 3]]), np.array([[2, 1, 4]])
    assert overlap(ours, theirs).tolist() == [[0, 1, pytest.approx(2 / 3)]]
    assert rank_biased_overlap(ours, theirs, 0.5)[0, 2] == pytest.approx(5 / 12)
    assert rank_biased_overlap(ours, ours)[0].tolist() == pytest.approx([1, 1, 1])
    assert not rank_biased_overlap(ours, ours + 10).any()


def test_means_over_users_at_the_depths_asked_for() -> None:
    ours, theirs = np.array([[1, 2, 3], [4, 5, 6]]), np.array([[2, 1, 4], [4, 5, 6]])
    found = {name: float(values.mean()) for name, values in consistency(ours, theirs, [1, 3]).items()}
    assert found == {
        "overlap@1": 0.5, "overlap@3": pytest.approx(5 / 6), "rbo@1": 0.5,
        "rbo@3": pytest.approx((1 + rank_biased_overlap(ours, theirs)[0, 2]) / 2),
    }  # fmt: skip


def test_more_users_than_are_compared_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    ours, theirs = (np.array([rng.permutation(12)[:5] for _ in range(50)]) for _ in "12")
    whole = overlap(ours, theirs)
    monkeypatch.setattr("recbole_llm.evaluation.consistency.USERS", 7)
    np.testing.assert_array_equal(overlap(ours, theirs), whole)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="lists of"):
        overlap(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"1\.0 is not between"):
        rank_biased_overlap(np.zeros((1, 1)), np.zeros((1, 1)), 1.0)
