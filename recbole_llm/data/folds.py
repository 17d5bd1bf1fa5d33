"""Folds of train interactions: what a recommender is not trained on that is to be asked about just these."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# The stream of this draw; the seed alone divides random splits, and other numbers beside it withhold rows.
_STREAM = 7


def deal_folds(
    users: np.ndarray, ranks: np.ndarray, late: np.ndarray, count: int, user_tokens: Sequence[str], seed: int
) -> np.ndarray:
    """Deal every user's rows out to folds, in an order of his own: folds are of one size, overall and of each user.

    The order depends on the seed, the raw user ids and the ranks, and so neither on internal ids nor on the file's
    arrangement, nor on which items they are.

    Args:
        users: int64 [n], the rows' users.
        ranks: int64 [n], place of a row in its user's order of time.
        late: bool [n], rows that are dealt after a user's others: valid rows, which may become train rows.
        count: of folds.
        user_tokens: raw ids by internal id.
        seed: of the order.

    Returns:
        int64 [n], numbers from 0 to count - 1.
    """
    place = np.empty(len(user_tokens), dtype=np.int64)
    place[np.argsort(np.asarray(user_tokens, dtype=str), kind="stable")] = np.arange(len(user_tokens))
    generator = np.random.Generator(np.random.PCG64([seed, _STREAM]))
    # Each user begins with a fold of his own, or the first would get all that is left over.
    first = generator.integers(count, size=len(user_tokens))
    draws = np.empty(len(users))
    draws[np.lexsort((ranks, place[users]))] = generator.random(len(users))
    order = np.lexsort((draws, late, users))
    dealt = users[order]
    begins = np.flatnonzero(np.diff(dealt, prepend=-1))
    turns = np.arange(len(dealt)) - np.repeat(begins, np.diff(np.append(begins, len(dealt))))
    folds = np.empty(len(users), dtype=np.int64)
    folds[order] = (turns + first[place[dealt]]) % count
    return folds
