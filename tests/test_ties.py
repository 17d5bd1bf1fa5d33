"""Equal scores are ranked by a hash of the items' names, whatever K and whatever the order of the data."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data.ties import tie_order, top_items

TOKENS = [f"item {number}" for number in range(12)]


def by_hand(row: list[float], k: int) -> list[int]:
    def place(item: int) -> tuple[float, bytes]:
        return -row[item], hashlib.sha256(TOKENS[item].encode()).digest()

    return sorted(range(len(row)), key=place)[:k]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5]), min_size=12, max_size=12), min_size=1, max_size=4),
    st.integers(1, 12),
)
def test_ties_follow_the_names_and_a_shorter_list_is_the_front_of_a_longer_one(rows: list[list[float]], k: int) -> None:
    scores, order = torch.tensor(rows), tie_order(TOKENS)
    assert top_items(scores, k, order).tolist() == [by_hand(row, k) for row in rows]
    assert torch.equal(top_items(scores, 12, order)[:, :k], top_items(scores, k, order))


def test_another_numbering_of_the_items_ranks_the_same_names() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0, 1.0, 2.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0]])
    turned = torch.arange(11, -1, -1)
    one = [TOKENS[item] for item in top_items(scores, 5, tie_order(TOKENS))[0]]
    other_tokens = [TOKENS[item] for item in turned]
    other = [other_tokens[item] for item in top_items(scores[:, turned], 5, tie_order(other_tokens))[0]]
    assert one == other


def test_without_ties_it_is_plain_topk_and_excluded_items_are_no_ties() -> None:
    scores = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    scores[:, :4] = -torch.inf
    assert torch.equal(top_items(scores, 8, tie_order(TOKENS)), scores.topk(8, dim=1).indices)


@pytest.mark.parametrize("k", [3, 12])
def test_recboles_own_order_is_left_alone(k: int) -> None:
    scores = torch.zeros(2, 12)
    assert torch.equal(top_items(scores, k, None), scores.topk(k, dim=1).indices)
