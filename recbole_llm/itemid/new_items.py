"""Points for items that the codebooks were not trained with, so that they get codes with nothing trained again.

An item with interactions is placed by its neighbours in the graph, one without by its text.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from recbole_llm.errors import UserError
from recbole_llm.ridge import ridge

# How much the ridge may bend, in units of the features' mean square.
PENALTY = 0.01


def from_neighbours(points: np.ndarray, history: sp.csr_matrix, users: sp.csr_matrix) -> np.ndarray:
    """New items where the items that their users have had say.

    What is seen of an item is the mean over its users of the mean over each user's other items: two steps on the graph.
    These means lie close together, as all users have had the popular items; where an item stands is read from them by a
    linear map, fitted on the known items, each seen without itself (ridge regression), and stretched to the items'
    usual length.

    Args:
        points: float ``[n_items, d]`` of the known items.
        history: what users have had of the known items, ``[n_users, n_items]``, 1 for each.
        users: who had each new item, ``[n_new, n_users]``, likewise.

    Returns:
        float32 ``[n_new, d]``; 0 for an item without a user, or whose users have had none of the known items.
    """
    points = np.asarray(points, dtype=np.float64)
    sums, counts = history @ points, np.asarray(history.sum(axis=1)).ravel()
    others = np.divide(1.0, counts - 1, out=np.zeros_like(sums[:, 0]), where=counts > 1)
    seen = history.T @ (others[:, None] * sums) - (history.T @ others)[:, None] * points
    owners = history.T @ (counts > 1).astype(np.float64)
    known = np.flatnonzero(owners)
    whole = np.divide(1.0, counts, out=np.zeros_like(others), where=counts > 0)
    wanted, had = users @ (whole[:, None] * sums), users @ (counts > 0).astype(np.float64)
    made = np.zeros_like(wanted)
    rows = np.flatnonzero(had)
    if len(rows) and len(known):
        x, new = seen[known] / owners[known, None], wanted[rows] / had[rows, None]
        made[rows] = _regressed(x, points[known], new)
    return made.astype(np.float32)


def _regressed(x: np.ndarray, points: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Points of ``new`` by a ridge regression with an intercept of ``points`` on ``x``, as long as points are."""
    made = ridge(x, points, new, PENALTY)
    length = np.linalg.norm(made, axis=1, keepdims=True)
    usual = np.linalg.norm(points, axis=1).mean()
    return np.divide(made * usual, length, out=np.zeros_like(made), where=length > 0)


def from_text(points: np.ndarray, texts: np.ndarray, known: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """New items where a linear map from texts to points, fitted on the known items, puts them.

    The map that alignment learns beside the codes is drawn to the codes of every level at once, so it points at no
    item; this one is fitted to the points themselves (ridge regression with an intercept). Its images, too short as a
    regression's are, are stretched to the items' usual length.

    Args:
        points: float ``[n_items, d]``.
        texts: float ``[n_items, H]``.
        known: bool ``[n_items]``, whose points mean something.
        wanted: int64 ``[n_new]``, rows of ``texts`` to place.

    Returns:
        float32 ``[n_new, d]``.

    Raises:
        UserError: no item is known.
    """
    if not known.any():
        raise UserError("no item has a train interaction, so nothing says where a text belongs")
    x = np.asarray(texts, dtype=np.float64)
    return _regressed(x[known], np.asarray(points, dtype=np.float64)[known], x[wanted]).astype(np.float32)
