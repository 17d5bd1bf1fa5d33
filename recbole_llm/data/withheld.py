"""Rows that a protocol keeps from training: of cold items, beyond a share, of a fold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from recbole_llm.data.cold_items import draw_cold_items
from recbole_llm.data.folds import deal_folds
from recbole_llm.data.histories import runs
from recbole_llm.data.phases import TRAIN, VALID, WITHHELD

if TYPE_CHECKING:
    from recbole_llm.data.split import SplitProtocol


def withhold_items(
    users: np.ndarray,
    items: np.ndarray,
    clock: np.ndarray,
    phases: np.ndarray,
    candidates: np.ndarray,
    protocol: SplitProtocol,
    item_tokens: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Take the train and valid rows of ``cold_item_share`` of the items out; the items are the second result.

    Valid rows go as well: no epoch can be picked by items that training cannot know, and at test they would stand in
    the inputs of sequential models.
    """
    if protocol.cold_item_share <= 0:
        return phases, np.zeros(len(candidates), dtype=bool)
    train = phases == TRAIN
    first_seen = None
    if protocol.cold_item_choice == "newest":
        first_seen = np.full(len(candidates), np.inf)
        np.minimum.at(first_seen, items, clock)
    cold = draw_cold_items(
        users[train], items[train], candidates, protocol.cold_item_share, item_tokens, protocol.seed, first_seen
    )
    out = phases.copy()
    out[np.isin(phases, (TRAIN, VALID)) & cold[items]] = WITHHELD
    return out, cold


def withhold(
    users: np.ndarray, ranks: np.ndarray, phases: np.ndarray, protocol: SplitProtocol, user_tokens: Sequence[str]
) -> np.ndarray:
    """Take all but ``train_share`` of every user's train rows out, at least one stays.

    What is kept at one share is kept at every larger one: each user's rows leave in one random order, which depends on
    the seed, the raw user ids and the ranks, and so neither on internal ids nor on the file's arrangement.
    """
    if protocol.train_share >= 1:
        return phases
    train = np.flatnonzero(phases == TRAIN)
    place = np.empty(len(user_tokens), dtype=np.int64)
    place[np.argsort(np.asarray(user_tokens, dtype=str), kind="stable")] = np.arange(len(user_tokens))
    named = train[np.lexsort((ranks[train], place[users[train]]))]
    # A stream of its own: that of the seed alone divides random splits.
    draws = np.empty(len(users))
    draws[named] = np.random.Generator(np.random.PCG64([protocol.seed, WITHHELD])).random(len(named))
    leaving = train[np.lexsort((draws[train], users[train]))]
    turns, counts = runs(users[leaving])
    kept = np.maximum(1, np.floor(counts * protocol.train_share + 0.5))
    out = phases.copy()
    out[leaving[turns >= kept]] = WITHHELD
    return out


def withhold_fold(
    users: np.ndarray,
    items: np.ndarray,
    ranks: np.ndarray,
    phases: np.ndarray,
    protocol: SplitProtocol,
    user_tokens: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Take the train rows of ``fold`` out; the rows of the fold are the second result.

    Rows of one user and item go together, or a fold's repeats would tell of it.
    """
    held = np.zeros(len(users), dtype=bool)
    if protocol.fold is not None:
        number, count = protocol.fold
        dealt = np.flatnonzero(np.isin(phases, (TRAIN, VALID)))
        pairs = users[dealt] * (int(items.max()) + 1) + items[dealt]
        _, first, back = np.unique(pairs, return_index=True, return_inverse=True)
        rows = dealt[first]
        folds = deal_folds(users[rows], ranks[rows], phases[rows] == VALID, count, user_tokens, protocol.seed)
        held[dealt] = folds[back] == number
    return np.where(held & (phases == TRAIN), WITHHELD, phases).astype(np.int8), held
