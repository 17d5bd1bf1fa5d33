"""How far two rankings agree: the collaborative consistency of a list of recommendations with a teacher's own list.

Both measures are symmetric, within 0..1, and say nothing about whether either list is right.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Users whose lists are compared at a time: K x K comparisons each.
USERS = 4096

# What tables call the overlap with the teacher.
NAME = "consistency"


def overlap(recommended: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """Items that are among the first k of both lists, over k.

    Args:
        recommended: item ids, best first, int64 [U, K]; no item twice in a row, -1 where a list is shorter.
        teacher: the same for the teacher, of the same shape.

    Returns:
        float64 [U, K], at every k up to K.

    Raises:
        ValueError: the lists are not of one shape.
    """
    if recommended.shape != teacher.shape or recommended.ndim != 2:
        raise ValueError(f"lists of {recommended.shape} and {teacher.shape}")
    found = np.zeros(recommended.shape)
    if not found.size:
        return found
    ranks = np.arange(recommended.shape[1])
    # An item at places i and j is in both lists from the later one on.
    later = np.maximum(ranks[:, None], ranks[None, :])
    for low in range(0, len(found), USERS):
        ours, theirs = recommended[low : low + USERS], teacher[low : low + USERS]
        user, i, j = np.nonzero((ours[:, :, None] == theirs[:, None, :]) & (ours >= 0)[:, :, None])
        np.add.at(found, (user + low, later[i, j]), 1.0)
    return found.cumsum(axis=1) / (ranks + 1)


def consistency(recommended: np.ndarray, teacher: np.ndarray, topk: Sequence[int]) -> dict[str, np.ndarray]:
    """Both measures, user by user.

    Args:
        recommended: as for :func:`overlap`.
        teacher: as for :func:`overlap`.
        topk: depths, each at most K.

    Returns:
        ``overlap@k`` and ``rbo@k`` (:func:`rank_biased_overlap`) for every depth, float64 [U].
    """
    found = {"overlap": overlap(recommended, teacher), "rbo": rank_biased_overlap(recommended, teacher)}
    return {f"{name}@{k}": values[:, k - 1] for name, values in found.items() for k in topk}


def arrays_of(result: Mapping[str, Any]) -> dict[str, str]:
    """What tables call a run's overlaps with its teachers, to their names in its ``per_user.npz``.

    Args:
        result: the run's.

    Returns:
        E.g. ``consistency@10`` to ``cf_model.overlap@10``; with several teachers ``consistency@10 (cf_model)``.
    """
    teachers = result.get("consistency", {})
    return {
        name.replace("overlap", NAME) + (f" ({part})" if len(teachers) > 1 else ""): f"{part}.{name}"
        for part, found in teachers.items()
        for name in found
        if name.startswith("overlap@")
    }


def figures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """A run's metrics on test, and its overlaps with its teachers beside them under tables' names."""
    found: dict[str, float] = dict(result["test"])
    for name, array in arrays_of(result).items():
        part, _, measure = array.partition(".")
        found[name] = result["consistency"][part][measure]
    return found


def is_consistency(metric: str) -> bool:
    """Whether a table's metric says whom a row agrees with, so that more of it is not better."""
    return metric.startswith(f"{NAME}@")


def rank_biased_overlap(recommended: np.ndarray, teacher: np.ndarray, persistence: float = 0.9) -> np.ndarray:
    """Overlaps at every depth, deeper ones weighing less; extrapolated beyond k with the overlap there.

    Webber, Moffat and Zobel, "A similarity measure for indefinite rankings" (TOIS 2010), RBO_EXT for lists of one
    length: A_k p^k + (1 - p) / p * sum_{d <= k} A_d p^d with A_d the overlap at d.

    Args:
        recommended: as for :func:`overlap`.
        teacher: as for :func:`overlap`.
        persistence: p, above 0 and below 1; of 0.9 the first ten ranks have 86% of the weight.

    Returns:
        float64 [U, K], at every k up to K; 1 for equal lists, 0 for lists with no item in common.

    Raises:
        ValueError: as for :func:`overlap`, or the persistence is out of its range.
    """
    if not 0 < persistence < 1:
        raise ValueError(f"a persistence of {persistence} is not between 0 and 1")
    agreement = overlap(recommended, teacher)
    powers = persistence ** np.arange(1, agreement.shape[1] + 1)
    return agreement * powers + (1 - persistence) / persistence * (agreement * powers).cumsum(axis=1)
