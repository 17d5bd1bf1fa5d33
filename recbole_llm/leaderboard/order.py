"""How far the order of systems in a table is that of a paper: rank correlations with their exact chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Two systems are always in one order or the other.
FEWEST = 3
# Every order of up to seven systems (5,040) is tried; of more, so many drawn ones.
DRAWN = 9_999


@dataclass(frozen=True)
class Order:
    """The agreement of two rankings of the same systems.

    Attributes:
        systems: how many were compared.
        spearman: rho (Spearman 1904), -1..1; equal figures have the mean of their ranks.
        spearman_p: two-sided, of the permutation test: how often an order that is chance agrees or disagrees as much.
        kendall: tau-b (Kendall 1945), -1..1, which corrects for ties.
        kendall_p: likewise.
    """

    systems: int
    spearman: float
    spearman_p: float
    kendall: float
    kendall_p: float


def order_of(theirs: Sequence[float], ours: Sequence[float]) -> Order | None:
    """Set two rankings against each other.

    Args:
        theirs, ours: a figure a system, in the same order of systems.

    Returns:
        The correlations; ``None`` for fewer than three systems, or where all figures of one side are equal.

    Raises:
        ValueError: the lengths differ.
    """
    if len(theirs) != len(ours):
        raise ValueError(f"there should be as many figures on both sides, but there are {len(theirs)} and {len(ours)}")
    if len(theirs) < FEWEST or len(set(theirs)) == 1 or len(set(ours)) == 1:
        return None
    first, second = stats.rankdata(theirs), stats.rankdata(ours)
    apart = [ranks[:, None] - ranks[None, :] for ranks in (first, second)]
    return Order(
        systems=len(first),
        spearman=float(stats.spearmanr(first, second).statistic),
        spearman_p=_chance(*apart),
        kendall=float(stats.kendalltau(first, second).statistic),
        kendall_p=_chance(*map(np.sign, apart)),
    )


def orders(pairs: Mapping[str, Sequence[tuple[float, float]]]) -> list[dict[str, float | int | str]]:
    """The agreement metric by metric, as plain data.

    Args:
        pairs: by metric, the paper's figure and ours of every system that has both.

    Returns:
        A mapping a metric that can be compared, with ``metric`` and the fields of :class:`Order`.
    """
    found = []
    for metric, figures in pairs.items():
        order = order_of([paper for paper, _ in figures], [ours for _, ours in figures])
        if order is not None:
            found.append({"metric": metric, **vars(order)})
    return found


def _chance(first: np.ndarray, second: np.ndarray) -> float:
    """The share of all orders of the systems whose correlation is at least as far from chance, two-sided.

    Both coefficients are the sum of products of a number a pair of systems (Kendall 1948, chapter 2), over what is the
    same in every order: differences of ranks make rho, their signs tau. scipy's own p-values are for many systems
    (rho), or without ties (tau).

    Args:
        first, second: float [n, n], a number a pair.
    """

    def agreement(places: np.ndarray, axis: int = -1) -> np.ndarray:
        places = np.moveaxis(places, axis, -1)
        return np.einsum("...ij,ij->...", first[places[..., :, None], places[..., None, :]], second)

    test = stats.permutation_test(
        (np.arange(len(first)),), agreement, permutation_type="pairings", vectorized=True, n_resamples=DRAWN,
        rng=np.random.default_rng(0), batch=500,
    )  # fmt: skip
    return float(test.pvalue)
