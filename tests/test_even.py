"""Codes given out evenly below a shared prefix."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.itemid.codebook import ResidualCodebook, residual_kmeans
from recbole_llm.itemid.even import encode_evenly
from recbole_llm.itemid.sinkhorn import balanced


def book_of(points: np.ndarray, levels: int = 3, size: int = 8) -> ResidualCodebook:
    return residual_kmeans(points, [size] * levels, "l2", "signed", seed=0)


@given(st.integers(0, 10**6))
def test_none_is_the_nearest_and_the_first_level_always_is(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32)
    book, x = book_of(points), torch.from_numpy(points)
    nearest, _ = book.encode(x)
    assert torch.equal(encode_evenly(book, x, 0), nearest)
    for levels in (1, 2, 9):
        even = encode_evenly(book, x, levels)
        kept = 3 - min(levels, 2)
        assert torch.equal(even[:, :kept], nearest[:, :kept])


@given(st.integers(0, 10**6))
def test_a_level_is_balanced_group_by_group(seed: int) -> None:
    points = np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32)
    book, x = book_of(points), torch.from_numpy(points)
    even = encode_evenly(book, x, 1)
    nearest, last = book.encode(x)
    for prefix in torch.unique(nearest[:, :2], dim=0):
        rows = (nearest[:, :2] == prefix).all(dim=1).nonzero().squeeze(1)
        gaps = book.distances(2, last[rows].double())
        expected = gaps.argmin(dim=1) if len(rows) == 1 else balanced(gaps)
        assert torch.equal(even[rows, 2], expected)


def test_like_items_collide_less() -> None:
    rng = np.random.default_rng(0)
    points = (rng.normal(size=(40, 6))[np.arange(600) % 40] + 0.05 * rng.normal(size=(600, 6))).astype(np.float32)
    book, x = book_of(points, size=16), torch.from_numpy(points)
    distinct = [len(torch.unique(encode_evenly(book, x, levels), dim=0)) for levels in (0, 1, 2)]
    assert distinct[0] < distinct[1] <= distinct[2]
    order = torch.from_numpy(rng.permutation(600))
    assert torch.equal(encode_evenly(book, x[order], 2), encode_evenly(book, x, 2)[order])
