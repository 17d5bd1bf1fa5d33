"""A table's figures by groups: of users by what is known of them, of test interactions by how popular their item is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.leaderboard.aligned import align, user_values

# Groups of users at most, of about equal size.
USER_GROUPS = 5
# K of the hit rates where the metric has none.
USUAL_K = 10


def breakdowns(rankings: Mapping[str, Sequence[Rankings]], metric: str) -> list[dict[str, Any]]:
    """The breakdowns of one table. Every row is averaged over its seeds.

    *User activity* (train interactions) and *history length* (items that the input at test is cut from) group users
    and average ``metric``; under ``eval_unit: row`` they group rankings, one a test interaction. *Item popularity* and
    *seen and unseen items* group the test interactions, that is the (user, target) pairs, and give the share of them
    whose item stands in the user's first K; K is the metric's, but at most what was kept. Weighted by their counts, the
    groups of a breakdown average to the figure of all.

    Args:
        rankings: row name to the rankings of its seeds, all of one split.
        metric: e.g. ``ndcg@10``; by one that is no mean over users no users are grouped.

    Returns:
        For each breakdown ``name``, ``unit``, ``metric``, ``groups`` (``label`` and ``count``) and ``rows``: row name
        to a value a group; ``None`` for rows without rankings. A breakdown with a single group is left out.

    Raises:
        UserError: runs of one table were not judged on the same users and targets.
    """
    metric = metric.lower()
    aligned = align(rankings)
    if not aligned:
        return []
    facts = _facts([one for seeds in aligned.values() for one in seeds])
    k = min(_k_of(metric), *(one.top.shape[1] for seeds in aligned.values() for one in seeds))
    hits = {name: np.mean([target_hits(one, k) for one in seeds], axis=0) for name, seeds in aligned.items()}
    hit_rate, interactions, counts = f"hit rate@{k}", "test interactions", facts.item_count[facts.targets]
    blocks = [
        _block("item popularity", interactions, hit_rate, _popularity(counts, facts.item_count), hits, rankings),
        _block("seen and unseen items", interactions, hit_rate, _seen(counts), hits, rankings),
    ]
    means = {name: _mean(seeds, metric) for name, seeds in aligned.items()}
    values = {name: own for name, own in means.items() if own is not None}
    if len(values) == len(aligned):
        unit = "users" if len(np.unique(facts.user_id)) == len(facts.user_id) else "rankings"
        blocks = [
            _block("user activity", unit, metric, quantile_groups(facts.user_count), values, rankings),
            _block("history length", unit, metric, quantile_groups(facts.history_length), values, rankings),
            *blocks,
        ]
    return [block for block in blocks if len(block["groups"]) > 1]


def _facts(runs: Sequence[Rankings]) -> Rankings:
    """What is known of users and items, in no run's own way: one trained on valid rows too counts those."""
    least = {
        key: np.min([getattr(one, key) for one in runs], axis=0)
        for key in ("item_count", "user_count", "history_length")
    }
    return replace(runs[0], **least)


def _mean(seeds: Sequence[Rankings], metric: str) -> np.ndarray | None:
    values = [own for own in (user_values(one, metric) for one in seeds) if own is not None]
    return np.asarray(np.mean(values, axis=0)) if len(values) == len(seeds) else None


def target_hits(rankings: Rankings, k: int) -> np.ndarray:
    """Whether each target stands among its user's first k items.

    Args:
        rankings: of one run.
        k: at most what was kept.

    Returns:
        bool [T], in the order of ``rankings.targets``.
    """
    width = len(rankings.item_id)
    owners = np.repeat(np.arange(len(rankings.user_id)), np.diff(rankings.target_offsets))
    given = np.arange(len(rankings.top))[:, None] * width + rankings.top[:, :k].astype(np.int64)
    return np.isin(owners * width + rankings.targets, given)


# A group of each entry, int64 [n], and the groups' labels.
Groups = tuple[np.ndarray, list[str]]


def quantile_groups(values: np.ndarray, most: int = USER_GROUPS) -> Groups:
    """Groups of about equal size by value; equal values are never in two groups.

    Args:
        values: int64 [n].
        most: groups at most; there are fewer where many values are equal.

    Returns:
        int64 [n] group of each entry, from 0 and rising with the values, and labels such as ``6-19``.
    """
    if not len(values):
        return np.zeros(0, dtype=np.int64), []
    cuts = np.unique(np.quantile(values, np.arange(1, most) / most, method="inverted_cdf"))
    _, group = np.unique(np.searchsorted(cuts, values, side="left"), return_inverse=True)
    return group, [_span(values[group == place]) for place in range(int(group.max()) + 1)]


def _span(values: np.ndarray) -> str:
    low, high = int(values.min()), int(values.max())
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _popularity(counts: np.ndarray, item_count: np.ndarray) -> Groups:
    """Head, mid and tail: the items with a third each of the train interactions, and those without any.

    An item belongs to the third in which the interactions of all more popular items end, so that items of equal counts
    stay together.

    Args:
        counts: int64 [T], train interactions of each target.
        item_count: int64 [I], of every item.
    """
    levels, sizes = np.unique(item_count[item_count > 0], return_counts=True)
    taken = (levels * sizes)[::-1]
    above = (np.cumsum(taken) - taken)[::-1]
    third = 3 * above // max(int(taken.sum()), 1)
    group = np.full(len(counts), 3)
    seen = counts > 0
    group[seen] = third[np.searchsorted(levels, counts[seen])]
    labels = [
        f"{name} ({_span(levels[third == place])} in train)" if (third == place).any() else name
        for place, name in enumerate(("head", "mid", "tail"))
    ]
    return _without_empty(group, [*labels, "never seen in training"])


def _seen(counts: np.ndarray) -> Groups:
    return _without_empty((counts == 0).astype(np.int64), ["seen in training", "never seen in training"])


def _without_empty(group: np.ndarray, labels: list[str]) -> Groups:
    present, group = np.unique(group, return_inverse=True)
    return group, [labels[place] for place in present]


def _block(
    name: str,
    unit: str,
    metric: str,
    groups: Groups,
    values: Mapping[str, np.ndarray],
    rows: Mapping[str, Any],
) -> dict[str, Any]:
    group, labels = groups
    counts = np.bincount(group, minlength=len(labels))
    means = {row: np.bincount(group, weights=own, minlength=len(labels)) / counts for row, own in values.items()}
    return {
        "name": name,
        "unit": unit,
        "metric": metric,
        "groups": [{"label": label, "count": count} for label, count in zip(labels, counts.tolist(), strict=True)],
        "rows": {row: means[row].tolist() if row in means else [None] * len(labels) for row in rows},
    }


def _k_of(metric: str) -> int:
    _, _, k = metric.partition("@")
    return int(k) if k.isdigit() else USUAL_K
