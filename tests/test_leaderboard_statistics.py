"""Intervals, paired tests and Holm's correction: scipy on fixed vectors, their definitions in general."""

from __future__ import annotations

import gc
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from recbole_llm.leaderboard.statistics import PairedTest, holm, mean_interval, paired_test

# What a metric takes on, with the many ties and zeros that it has.
VALUES = st.sampled_from([0.0, 0.0, 0.0, 1 / math.log2(3), 0.5, 1 / 3, 0.2, 1.0])
PAIR = st.tuples(VALUES, VALUES)
# Few users or many: between, scipy's exact Wilcoxon test goes through 2^users signs.
PAIRS = st.lists(PAIR, min_size=2, max_size=7) | st.lists(PAIR, min_size=14, max_size=40)


@pytest.fixture(autouse=True)
def no_warning() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def alike(one: PairedTest, other: PairedTest) -> None:
    for name, found in vars(one).items():
        expected = vars(other)[name]
        assert found is expected is None or found == pytest.approx(expected, rel=1e-6, abs=1e-12), name


def test_fixed_vectors_agree_with_scipy() -> None:
    rng = np.random.default_rng(7)
    row, base = rng.random(200), rng.random(200) * 0.9
    found = paired_test(row, base)
    test = stats.ttest_rel(row, base)
    low, high = test.confidence_interval(0.95)
    assert (found.p, found.low, found.high) == pytest.approx((test.pvalue, low, high), rel=1e-12)
    assert found.wilcoxon_p == pytest.approx(stats.wilcoxon(row, base).pvalue, rel=1e-12)
    assert found.difference == pytest.approx(row.mean() - base.mean())
    assert found.gain == pytest.approx(row.mean() / base.mean() - 1)
    assert found.effect == pytest.approx(test.statistic / math.sqrt(200))
    interval = mean_interval(row)
    one = stats.ttest_1samp(row, 0.0).confidence_interval(0.95)
    assert (interval.mean, interval.low, interval.high) == pytest.approx((row.mean(), one.low, one.high), rel=1e-12)


def test_an_example_worked_by_hand() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, t = 2 sqrt(3) with 2 degrees of freedom, whose distribution is
    # known in closed form: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    found = paired_test(np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    t = 2 * math.sqrt(3)
    assert (found.difference, found.effect, found.gain) == pytest.approx((2.0, 2.0, 1.0))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))
    # All three signs agree: one of 2^3 assignments, on either side.
    assert found.wilcoxon_p == pytest.approx(2 / 8)


@given(PAIRS)
def test_the_t_test_is_its_formula(pairs: list[tuple[float, float]]) -> None:
    row, base = np.array(pairs).T
    differences = [a - b for a, b in pairs]
    n, mean = len(pairs), math.fsum(differences) / len(pairs)
    deviation = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1))
    assume(deviation > 1e-9)
    found = paired_test(row, base)
    t = mean / (deviation / math.sqrt(n))
    half = stats.t.isf(0.025, n - 1) * deviation / math.sqrt(n)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), n - 1), rel=1e-9)
    assert found.effect == pytest.approx(mean / deviation, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-12)


@given(PAIRS, st.randoms(use_true_random=False))
def test_the_order_of_the_users_does_not_matter(pairs: list[tuple[float, float]], random: object) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    alike(*(paired_test(*np.array(order).T) for order in (pairs, shuffled)))


@given(PAIRS)
def test_the_other_way_round_only_signs_change(pairs: list[tuple[float, float]]) -> None:
    row, base = np.array(pairs).T
    one, other = paired_test(row, base), paired_test(base, row)
    assert one.difference == -other.difference
    assert (one.p, one.wilcoxon_p) == pytest.approx((other.p, other.wilcoxon_p))
    assert (one.low, one.high) == pytest.approx((-other.high, -other.low))  # type: ignore[operator]


@given(st.lists(st.tuples(PAIR, PAIR), min_size=14, max_size=30))
def test_averaging_seeds_first_is_averaging_the_differences(users: list[tuple[tuple[float, float], ...]]) -> None:
    """Every seed of one row against every seed of the other, averaged by user, is the same test."""
    one, two, three, four = np.array(users).reshape(-1, 4).T
    first = paired_test((one + two) / 2, (three + four) / 2)
    differences = np.mean([a - b for a in (one, two) for b in (three, four)], axis=0)
    again = paired_test(differences, np.zeros(len(users)))
    alike(replace(first, gain=None), again)


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_is_its_definition(p_values: list[float]) -> None:
    expected = []
    ordered = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for own in ordered:
        reached = ordered[: ordered.index(own) + 1]
        stepped = [(len(p_values) - step) * p_values[place] for step, place in enumerate(reached)]
        expected.append(min(1.0, max(stepped)))
    found = holm(p_values)
    assert [found[place] for place in ordered] == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from([0.01, 0.05, 0.1]))
def test_holm_rejects_what_stepping_down_rejects(p_values: list[float], alpha: float) -> None:
    rejected = 0
    for step, p in enumerate(sorted(p_values)):
        if p > alpha / (len(p_values) - step):
            break
        rejected += 1
    near = any(abs(p * (len(p_values) - step) - alpha) < 1e-9 for step, p in enumerate(sorted(p_values)))
    assume(not near)
    assert sum(p <= alpha for p in holm(p_values)) == rejected


def test_rows_that_do_not_differ() -> None:
    same = paired_test(np.array([0.1, 0.5, 0.0]), np.array([0.1, 0.5, 0.0]))
    assert (same.difference, same.low, same.high, same.gain, same.effect) == (0.0, 0.0, 0.0, 0.0, 0.0)
    assert (same.p, same.wilcoxon_p) == (1.0, 1.0)


def test_rounding_of_an_average_is_no_difference() -> None:
    """Three seeds that agree, against one of them: the mean of three equal numbers can be another number."""
    one = np.random.default_rng(3).random(1000)
    three = np.mean([one, one, one], axis=0)
    assert np.any(three != one), "else this tests nothing"
    found = paired_test(three, one)
    assert (found.difference, found.p, found.wilcoxon_p) == (0.0, 1.0, 1.0)


def test_a_constant_difference_has_a_point_for_an_interval() -> None:
    base = np.random.default_rng(5).random(20)
    found = paired_test(base + 0.25, base)
    assert (found.difference, found.low, found.high) == pytest.approx((0.25, 0.25, 0.25))
    assert (found.p, found.effect) == (0.0, None)
    assert 0 < found.wilcoxon_p < 1e-4


def test_one_user_shows_nothing() -> None:
    found = paired_test(np.array([0.5]), np.array([0.25]))
    assert (found.difference, found.gain, found.p, found.wilcoxon_p) == (0.25, 1.0, 1.0, 1.0)
    assert found.low is found.high is found.effect is None
    same = paired_test(np.array([0.5]), np.array([0.5]))
    assert same.p == 1.0 and same.low is None and same.effect is None
    alone = mean_interval(np.array([0.5]))
    assert (alone.mean, alone.low, alone.high) == (0.5, None, None)


def test_a_base_of_zero_has_no_relative_gain() -> None:
    found = paired_test(np.array([0.5, 0.0, 1.0]), np.zeros(3))
    assert found.gain is None and found.p < 1
    assert paired_test(np.zeros(3), np.zeros(3)).gain is None


def test_equal_values_have_a_point_for_an_interval() -> None:
    assert vars(mean_interval(np.full(7, 0.1))) == pytest.approx({"mean": 0.1, "low": 0.1, "high": 0.1})


@pytest.mark.parametrize(
    ("row", "base"), [(np.zeros(3), np.zeros(2)), (np.zeros(0), np.zeros(0)), (np.zeros((2, 2)), np.zeros((2, 2)))]
)
def test_arrays_that_cannot_be_paired(row: np.ndarray, base: np.ndarray) -> None:
    with pytest.raises(ValueError, match="rows should be"):
        paired_test(row, base)
    if row.ndim != 1 or not len(row):
        with pytest.raises(ValueError, match="values should be"):
            mean_interval(row)


def test_the_correction_leaves_garbage_collection_as_it_was() -> None:
    assert gc.get_freeze_count() == 0
    holm([0.1, 0.2])
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        holm([0.1, 0.2])
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
