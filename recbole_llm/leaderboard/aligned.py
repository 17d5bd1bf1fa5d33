"""Rankings of several runs brought to one order of users and one coding of items, so that arrays can be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.evaluation.metrics import USER_METRICS
from recbole_llm.evaluation.rankings import Rankings


def align(rankings: Mapping[str, Sequence[Rankings]]) -> dict[str, list[Rankings]]:
    """The same rankings with users in the order of their raw ids, and items as places among all raw ids, sorted.

    Args:
        rankings: row name to the rankings of its seeds.

    Returns:
        Row name to its seeds' rankings; ``user_id``, ``item_id``, ``targets`` and ``target_offsets`` of all are equal.
        Rows without rankings are left out.

    Raises:
        UserError: two runs were judged on other users or targets; the row is named.
    """
    every = [one for seeds in rankings.values() for one in seeds]
    if not every:
        return {}
    items = np.unique(np.concatenate([one.item_id for one in every]))
    made = {name: [_in_order(one, items) for one in seeds] for name, seeds in rankings.items() if seeds}
    name, first = next((name, seeds[0]) for name, seeds in made.items())
    for other, seeds in made.items():
        for one in seeds:
            if not all(np.array_equal(getattr(one, key), getattr(first, key)) for key in ("user_id", *_TARGETS)):
                raise UserError(f"the rankings of {other} are of other users or targets than those of {name}")
    return made


def user_values(rankings: Rankings, metric: str) -> np.ndarray | None:
    """A metric of every user, from his ranking; equal to what ``per_user.npz`` holds.

    Args:
        rankings: of one run.
        metric: e.g. ``ndcg@10``.

    Returns:
        float64 [U]; ``None`` for a metric that is no mean over users, or whose K is more than was kept.
    """
    name, _, k = metric.partition("@")
    if name not in USER_METRICS or not k.isdigit() or not 1 <= int(k) <= rankings.top.shape[1]:
        return None
    return USER_METRICS[name](*rankings.hits())[:, int(k) - 1]


_TARGETS = ("targets", "target_offsets")


def _in_order(one: Rankings, items: np.ndarray) -> Rankings:
    code = np.searchsorted(items, one.item_id)
    # Under eval_unit: row a user has several rankings, which keep their order.
    order = np.argsort(one.user_id, kind="stable")
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    counts = np.diff(one.target_offsets)
    owners, targets = np.repeat(place, counts), code[one.targets]
    item_count = np.zeros(len(items), dtype=np.int64)
    item_count[code] = one.item_count
    recent = one.recent[order]
    return replace(
        one,
        user_id=one.user_id[order],
        item_id=items,
        top=code[one.top[order]],
        targets=targets[np.lexsort((targets, owners))],
        target_offsets=np.concatenate(([0], np.cumsum(counts[order]))),
        item_count=item_count,
        user_count=one.user_count[order],
        history_length=one.history_length[order],
        recent=np.where(recent < 0, -1, code[recent]),
    )
