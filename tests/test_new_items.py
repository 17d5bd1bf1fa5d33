"""Where items without training are placed: among their users' items, or where their text says."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

from recbole_llm.errors import UserError
from recbole_llm.itemid.new_items import from_neighbours, from_text


def test_neighbours_by_hand() -> None:
    points = np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -3.0]])
    # User 0 has had items 1 and 2, user 1 item 2; user 2 nothing.
    history = sp.csr_matrix(np.array([[0, 1, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]))
    users = sp.csr_matrix(np.array([[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]))
    made = from_neighbours(points, history, users)
    np.testing.assert_allclose(made[0], 3 * np.array([1, 1]) / np.sqrt(2), atol=1e-6)
    # Half of (1.5, 1.5) and half of (0, 3), at the usual length 3.
    np.testing.assert_allclose(made[1], 3 * np.array([0.75, 2.25]) / np.hypot(0.75, 2.25), atol=1e-6)
    assert (made[2:] == 0).all() and made.dtype == np.float32


def test_neighbours_find_the_cluster_of_a_hidden_item() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(4, 8)) * 3
    group = np.arange(80) % 4
    points = centres[group] + rng.normal(size=(80, 8)) * 0.1
    owners = np.arange(120) % 4
    history = sp.csr_matrix((rng.random((120, 80)) < 0.3) & (owners[:, None] == group))
    users = sp.csr_matrix((rng.random((4, 120)) < 0.2) & (owners == np.arange(4)[:, None]))
    made = from_neighbours(points, history.astype(float), users.astype(float))
    unit = centres / np.linalg.norm(centres, axis=1, keepdims=True)
    assert ((made @ unit.T).argmax(axis=1) == np.arange(4)).all()
    assert np.allclose(np.linalg.norm(made, axis=1), np.linalg.norm(points, axis=1).mean(), rtol=0.05)


def test_text_finds_a_linear_map_and_leaves_the_known_out_of_it() -> None:
    rng = np.random.default_rng(1)
    texts = rng.normal(size=(300, 12))
    points = texts @ rng.normal(size=(12, 5)) + 2
    known = np.ones(300, dtype=bool)
    known[[0, 7, 8, 9]] = False
    shown = points.copy()
    shown[[7, 8, 9]] = 1e6  # what an untrained table holds there must not matter
    made = from_text(shown, texts, known, np.array([7, 8, 9]))
    for row, item in zip(made, (7, 8, 9), strict=True):
        cosine = row @ points[item] / np.linalg.norm(row) / np.linalg.norm(points[item])
        assert cosine > 0.98
    assert made.dtype == np.float32 and np.array_equal(made, from_text(shown, texts, known, np.array([7, 8, 9])))


def test_text_without_a_known_item() -> None:
    with pytest.raises(UserError, match="no item has a train interaction"):
        from_text(np.ones((3, 2)), np.ones((3, 4)), np.zeros(3, dtype=bool), np.array([1]))
