"""Points for items that the codebooks were not trained with, so that they get codes with nothing trained again.

An item with interactions is placed by its neighbours in the graph, one without by its text.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from recbole_llm.errors import UserError

# How much the ridge may bend, in units of the features' mean square.
PENALTY = 0.1


def from_neighbours(points: np.ndarray, history: sp.csr_matrix, users: sp.csr_matrix) -> np.ndarray:
    """New items among the points of the items that their users have had.

    A new item is the mean over its users of the mean over each user's items (two steps of a random walk on the graph),
    stretched to the items' usual length: an average is shorter than what it averages, and codes know lengths.

    Args:
        points: float ``[n_items, d]`` of the known items.
        history: what users have had of the known items, ``[n_users, n_items]``; values are weights.
        users: who had each new item, ``[n_new, n_users]``.

    Returns:
        float32 ``[n_new, d]``; 0 for an item without a user, or whose users have had none of the known items.
    """
    walk = _by_row(users) @ (_by_row(history) @ np.asarray(points, dtype=np.float64))
    known = np.unique(history.indices)
    usual = np.linalg.norm(points[known], axis=1).mean() if len(known) else 0.0
    length = np.linalg.norm(walk, axis=1, keepdims=True)
    return np.divide(walk * usual, length, out=np.zeros_like(walk), where=length > 0).astype(np.float32)


def _by_row(matrix: sp.csr_matrix) -> sp.csr_matrix:
    """Each row over its sum; empty rows stay."""
    sums = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.divide(1.0, sums, out=np.zeros_like(sums, dtype=np.float64), where=sums > 0)
    return sp.diags(scale) @ matrix


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
    from sklearn.linear_model import Ridge  # slow to import

    if not known.any():
        raise UserError("no item has a train interaction, so nothing says where a text belongs")
    x = np.asarray(texts, dtype=np.float64)
    centre = x[known].mean(0)
    scale = np.sqrt(np.square(x[known] - centre).mean()) or 1.0
    ridge = Ridge(alpha=PENALTY * known.sum()).fit((x[known] - centre) / scale, np.asarray(points)[known])
    made = ridge.predict((x[wanted] - centre) / scale)
    usual = np.linalg.norm(points[known], axis=1).mean()
    length = np.linalg.norm(made, axis=1, keepdims=True)
    return np.divide(made * usual, length, out=np.zeros_like(made), where=length > 0).astype(np.float32)
