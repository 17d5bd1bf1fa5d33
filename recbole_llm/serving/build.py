"""Building a top-K store: what a recommender gives every user, block by block."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.progress import progress
from recbole_llm.serving.recommender import Recommender
from recbole_llm.serving.store import Catalogue, Plan, TopKStore

# A file has about so many users: large enough to be few, small enough to be lost by a kill.
BLOCK_USERS = 1024


def build_store(
    recommender: Recommender,
    folder: Path,
    k: int = 10,
    shard: tuple[int, int] = (0, 1),
    anew: bool = False,
    show: bool = False,
) -> TopKStore:
    """Rank all users of a run into a store, or those of a shard; blocks that are there already are left.

    Args:
        recommender: of the run.
        folder: where; one that another process is building is joined, one that was built for something else refused.
        k: items a user.
        shard: which of how many: every ``n``-th block from the ``i``-th on.
        anew: put it in the place of a store that was built for something else.
        show: tell progress.

    Returns:
        The store, complete where no other shard is still to come.

    Raises:
        UserError: see :meth:`Recommender.check` and :meth:`TopKStore.begin`.
    """
    number, count = shard
    if not 0 <= number < count:
        raise UserError(f"shard should be i/n with i from 0 to n - 1, but is {number}/{count}")
    recommender.check(k)
    batch, pool = recommender.batch, recommender.pool
    plan = Plan(k, batch, batch * max(1, BLOCK_USERS // batch))
    catalogue = Catalogue(recommender.users, pool.raw_ids, pool.titles)
    store = TopKStore.begin(folder, recommender.built_for, plan, catalogue, anew)
    todo = [block for block in range(number, store.n_blocks, count) if not store.is_whole(block)]
    # Steps are batches, so that the time left is known before the first block is done.
    steps = [(block, start) for block in todo for start in range(*_bounds(store, block), batch)]
    items, scores = [], []
    for block, start in progress(steps, f"top-{k} of {recommender.config['model']}", show=show):
        ranked = recommender.rank_batch(start // batch, k)
        items.append(ranked.items)
        scores.append(ranked.scores)
        if start + batch >= _bounds(store, block)[1]:
            store.write(block, np.concatenate(items), np.concatenate(scores))
            items, scores = [], []
    store.finish()
    return store


def _bounds(store: TopKStore, block: int) -> tuple[int, int]:
    rows = store.rows(block)
    return rows.start, rows.stop


__all__ = ["build_store"]
