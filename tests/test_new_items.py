"""Where items without training are placed: among their users' items, or where their text says."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg  # noqa: F401
import torch
from conftest import ML100K

from recbole_llm.data.histories import Histories
from recbole_llm.errors import UserError
from recbole_llm.itemid.codebook import residual_kmeans
from recbole_llm.itemid.new_items import PENALTY, from_neighbours, from_text
from recbole_llm.training.new_items import had_by_users


def test_neighbours_are_a_plain_loop_and_a_ridge_regression() -> None:
    rng = np.random.default_rng(3)
    points = rng.normal(size=(12, 3))
    table = rng.random((20, 12)) < 0.4
    table[0], table[1] = False, np.arange(12) == 5  # a user without items, and one whose only item is 5
    owners = rng.random((4, 20)) < 0.3
    owners[2], owners[3] = False, np.arange(20) == 0  # nobody's, and only that of the user without items
    made = from_neighbours(points, sp.csr_matrix(table.astype(float)), sp.csr_matrix(owners.astype(float)))

    def mean_of(users: list[int], without: int | None) -> np.ndarray | None:
        means = []
        for user in users:
            had = [item for item in np.flatnonzero(table[user]) if item != without]
            if had:
                means.append(points[had].mean(0))
        return np.mean(means, axis=0) if means else None

    seen = [mean_of(np.flatnonzero(table[:, item]).tolist(), item) for item in range(12)]
    known = [item for item in range(12) if seen[item] is not None]
    x = np.stack([seen[item] for item in known])
    new = np.stack([mean_of(np.flatnonzero(row).tolist(), None) for row in owners[:2]])
    scale = np.sqrt(((x - x.mean(0)) ** 2).mean())
    x, new = (x - x.mean(0)) / scale, (new - x.mean(0)) / scale
    y = points[known]
    weights = np.linalg.solve(x.T @ x + PENALTY * len(x) * np.eye(3), x.T @ (y - y.mean(0)))
    expected = new @ weights + y.mean(0)
    expected *= np.linalg.norm(y, axis=1).mean() / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(made[:2], expected, rtol=1e-5)
    assert (made[2:] == 0).all() and made.dtype == np.float32


def test_what_a_user_has_had_twice_counts_once() -> None:
    """An item is seen without itself, which its second time would bring back."""
    items = np.array([3, 1, 3, 2], dtype=np.int64)
    histories = Histories(np.array([0, 0, 3, 4], dtype=np.int64), items.copy())
    made = had_by_users(SimpleNamespace(train_histories=histories, user_num=3, item_num=4))
    assert made.toarray().tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]
    assert np.array_equal(histories.items, items)


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


def movies() -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """ml-100k: who rated what, points of the movies (main components of that), and their genres."""
    rows = [line.split("\t") for line in (ML100K / "ml-100k.inter").read_text().splitlines()[1:]]
    users, items = np.unique([row[0] for row in rows], return_inverse=True), np.unique([row[1] for row in rows])
    columns = np.searchsorted(items, [row[1] for row in rows])
    history = sp.csr_matrix((np.ones(len(rows)), (users[1], columns)), shape=(len(users[0]), len(items)))
    # Popular items lie far out; what tells them apart is the direction.
    left, size, _ = sp.linalg.svds((history / np.sqrt(history.sum(0))).T.tocsr(), k=16, random_state=0)
    told = [line.split("\t") for line in (ML100K / "ml-100k.item").read_text(encoding="utf-8").splitlines()[1:]]
    kinds = {line[0]: line[3].split() for line in told}
    names = sorted({kind for kind_list in kinds.values() for kind in kind_list})
    genres = np.array([[kind in kinds[item] for kind in names] for item in items], dtype=np.float32)
    return history, (left * size).astype(np.float32), genres


def test_real_items_land_at_their_own_codes() -> None:
    """Popular movies taken for new: their first code is their own several times as often as chance."""
    history, points, genres = movies()
    book = residual_kmeans(points, [32, 32], "cosine", "abs", seed=0)
    codes = book.encode(torch.from_numpy(points))[0][:, 0].numpy()
    popular = np.flatnonzero(np.asarray(history.sum(0)).ravel() >= 30)
    hidden = np.random.default_rng(0).choice(popular, 200, replace=False)
    known = np.ones(len(points), dtype=bool)
    known[hidden] = False
    rest = history.copy().tolil()
    rest[:, hidden] = 0
    placed = {
        "neighbours": from_neighbours(points, rest.tocsr(), history[:, hidden].T.tocsr()),
        "text": from_text(points, genres, known, hidden),
    }
    # Always naming the most common code is the best that chance can do.
    chance = np.bincount(codes[hidden]).max() / len(hidden)
    for name, factor in (("neighbours", 5), ("text", 1.5)):
        found = book.encode(torch.from_numpy(placed[name]))[0][:, 0].numpy()
        share = (found == codes[hidden]).mean()
        print(f"{name}: {share:.3f} at their own first code of 32, the most common one {chance:.3f}")
        assert share > factor * chance, name
