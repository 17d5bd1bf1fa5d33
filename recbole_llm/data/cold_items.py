"""Which items training never sees under ``cold_item_share``: drawn at random, or the newest."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from recbole_llm.errors import UserError

# The stream of this choice; the seed alone divides random splits, and other numbers beside it withhold train rows.
_STREAM = 5


def draw_cold_items(
    users: np.ndarray,
    items: np.ndarray,
    candidates: np.ndarray,
    share: float,
    item_tokens: Sequence[str],
    seed: int,
    first_seen: np.ndarray | None = None,
) -> np.ndarray:
    """Draw items so that every user keeps a train row.

    Items leave in one order until there are enough, so what is cold at one share is cold at every larger one. The order
    is random, by the seed and the raw item ids, or newest first with ties at random. An item is passed over, and stays,
    when it is all that training would have left of some user: test users and what they are judged on are then the same
    for every share, and no model is asked about a user without a train row.

    Args:
        users, items: int64 [n], the train rows.
        candidates: bool [n_items], the catalogue; ``share`` is of these.
        share: how many of them, rounded to the nearest.
        item_tokens: raw ids by internal id.
        seed: of the order.
        first_seen: float64 [n_items], the time of each item's first interaction; ``None`` draws at random.

    Returns:
        bool [n_items], the cold items.

    Raises:
        UserError: so many cannot be taken without taking a user's last train row.
    """
    cold = np.zeros(len(candidates), dtype=bool)
    wanted = int(np.floor(candidates.sum() * share + 0.5))
    owners, offsets, times_had = _users_by_item(users, items, len(candidates))
    left = np.bincount(users, minlength=int(users.max(initial=0)) + 1)
    found = 0
    for item in _order(candidates, item_tokens, seed, first_seen).tolist():
        if found == wanted:
            break
        own = slice(offsets[item], offsets[item + 1])
        remaining = left[owners[own]] - times_had[own]
        if (remaining > 0).all():
            left[owners[own]] = remaining
            cold[item] = True
            found += 1
    if found < wanted:
        raise UserError(
            f"cold_item_share: {share:g} would take {wanted} of {candidates.sum()} items from training, but after "
            f"{found} every further one is the last train item of some user; take at most {_below(found, candidates)}"
        )
    return cold


def _order(candidates: np.ndarray, item_tokens: Sequence[str], seed: int, first_seen: np.ndarray | None) -> np.ndarray:
    """The catalogue in the order in which items leave, int64 [candidates]; internal ids play no part in it."""
    catalogue = np.flatnonzero(candidates)
    named = catalogue[np.argsort(np.asarray(item_tokens, dtype=str)[catalogue], kind="stable")]
    draws = np.random.Generator(np.random.PCG64([seed, _STREAM])).random(len(named))
    return named[np.argsort(draws) if first_seen is None else np.lexsort((draws, -first_seen[named]))]


def _users_by_item(users: np.ndarray, items: np.ndarray, n_items: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each item's distinct users as a CSR array, its offsets [n_items + 1], and how often each user had the item."""
    width = int(users.max(initial=0)) + 1
    pairs, times_had = np.unique(items * width + users, return_counts=True)
    offsets = np.searchsorted(pairs, np.arange(n_items + 1) * width)
    return pairs % width, offsets, times_had


def _below(found: int, candidates: np.ndarray) -> float:
    """The largest share of two digits that is still possible."""
    return float(np.floor(100 * found / candidates.sum()) / 100)
