"""Confidence intervals, paired tests over users and Holm's correction on plain arrays, by scipy and statsmodels."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
# Differences below this share of the largest value are rounding: a row averaged over three seeds that all agree is
# another last bit than one of them.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Interval:
    """A mean and the 95% confidence interval of it, by Student's t over users.

    Attributes:
        mean: of the values.
        low, high: the interval's ends; the mean where all values are equal, ``None`` where there are fewer than two.
    """

    mean: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class PairedTest:
    """How one row differs from another on the same users.

    Attributes:
        difference: mean of row minus base.
        low, high: its 95% confidence interval; ``None`` for fewer than two users.
        gain: ``difference`` over the base's mean; ``None`` where that is 0.
        effect: Cohen's d_z, the mean difference over the standard deviation of the differences (Cohen 1988, section
            2.3.5); ``None`` where that is 0 (unless the mean difference is 0 too) or there are fewer than two users.
        p: two-sided, of the paired t-test. 1 where no user differs or there are fewer than two, 0 where all differ by
            the same amount.
        wilcoxon_p: two-sided, of Wilcoxon's signed-rank test, users without a difference left out; 1 where none differs
            or there are fewer than two.
    """

    difference: float
    low: float | None
    high: float | None
    gain: float | None
    effect: float | None
    p: float
    wilcoxon_p: float


def mean_interval(values: np.ndarray) -> Interval:
    """Mean of float [U] with its confidence interval.

    Raises:
        ValueError: there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values should be [U] with U >= 1, but are {list(values.shape)}")
    mean = float(values.mean())
    if len(values) < 2:
        return Interval(mean, None, None)
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(LEVEL, len(values) - 1, loc=mean, scale=stats.sem(values))
    return Interval(mean, float(low), float(high))


def paired_test(row: np.ndarray, base: np.ndarray) -> PairedTest:
    """Set two rows against each other, user by user.

    Args:
        row, base: float [U], of the same users in the same order.

    Raises:
        ValueError: the shapes differ, or there is no user.
    """
    row, base = np.asarray(row, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if row.shape != base.shape or row.ndim != 1 or not len(row):
        raise ValueError(f"rows should be [U] alike with U >= 1, but are {list(row.shape)} and {list(base.shape)}")
    rounding = ROUNDING * max(np.abs(row).max(), np.abs(base).max())
    row = np.where(np.abs(row - base) <= rounding, base, row)
    differences = row - base
    mean = float(differences.mean())
    gain = mean / float(base.mean()) if base.mean() else None
    if not np.any(differences):
        low, high = (None, None) if len(row) < 2 else (0.0, 0.0)
        return PairedTest(0.0, low, high, None if gain is None else 0.0, 0.0 if len(row) > 1 else None, 1.0, 1.0)
    if len(row) < 2:
        return PairedTest(mean, None, None, gain, None, 1.0, 1.0)
    # Ranked in units of the rounding, so that what differs by less ties.
    wilcoxon_p = float(stats.wilcoxon(np.rint(differences / rounding)).pvalue)
    if np.ptp(differences) <= rounding:
        return PairedTest(mean, mean, mean, gain, None, 0.0, wilcoxon_p)
    test = stats.ttest_rel(row, base)
    low, high = test.confidence_interval(LEVEL)
    effect = mean / float(differences.std(ddof=1))
    return PairedTest(mean, float(low), float(high), gain, effect, float(test.pvalue), wilcoxon_p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust a family of p-values by Holm's step-down method (Holm 1979), in the order given."""
    from statsmodels.stats.multitest import multipletests

    if not len(p_values):
        return []
    with _objects_set_aside():
        return [float(p) for p in multipletests(p_values, method="holm")[1]]


@contextlib.contextmanager
def _objects_set_aside() -> Iterator[None]:
    """Spare what is in memory from garbage collection.

    statsmodels collects at every correction, which takes 0.3 s beside torch: most of the time of a table.
    """
    if gc.get_freeze_count():  # whoever froze them wants them frozen
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
