"""The evaluator: what it excludes, what it counts, what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.ties import leaders
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import measure, shown_for


class Fixed(torch.nn.Module):
    """Scores every user alike."""

    def __init__(self, scores: torch.Tensor) -> None:
        super().__init__()
        self.scores = scores

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        return self.scores.repeat(len(interaction["user_id"]), 1)


@pytest.fixture
def loaders(settings_of: Callable[..., dict[str, Any]]) -> tuple[Any, Any, Any, Any]:
    metrics = [
        "NDCG",
        "Recall",
        "Hit",
        "Precision",
        "MRR",
        "MAP",
        "GAUC",
        "ItemCoverage",
        "AveragePopularity",
        "GiniIndex",
        "TailPercentage",
        "ShannonEntropy",
    ]
    config = Config(
        "BPR",
        "small",
        config_dict=settings_of(topk=[1, 7], metrics=metrics, valid_metric="NDCG@7", eval_max_cells=9000),
    )
    return (config, *data_preparation(config, create_dataset(config)))


def test_rankings_against_a_plain_loop(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    split = train._dataset.split
    scores = torch.from_numpy(np.random.default_rng(0).random(split.n_items)).float()
    found = measure(Fixed(scores), test, config, train)
    assert len(found.users) == 60 and found.items.shape == (60, 7)
    known, wanted = split.histories(0, 1), split.histories(2)
    for place, user in enumerate(found.users.tolist()):
        allowed = [
            item
            for item in torch.argsort(scores, descending=True).tolist()
            if item and split.candidates[item] and item not in set(known.of(user).tolist())
        ]
        assert found.items[place].tolist() == allowed[:7]
        rank = allowed.index(int(wanted.of(user)[0]))
        assert found.per_user["ndcg@7"][place] == pytest.approx(1 / np.log2(rank + 2) if rank < 7 else 0)
        assert found.per_user["hit@1"][place] == (rank == 0)
    assert 0 < found.metrics["gauc"] < 1
    assert found.metrics["itemcoverage@7"] == pytest.approx(len(np.unique(found.items)) / split.n_items)


def test_targets_that_tie_within_reach_of_the_cut_are_counted(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    split = train._dataset.split
    scores = torch.from_numpy(np.random.default_rng(1).integers(0, 12, split.n_items)).float()
    found = measure(Fixed(scores), test, config, train)
    known, wanted, tied = split.histories(0, 1), split.histories(2), 0
    for user in found.users.tolist():
        legal = [item for item in np.flatnonzero(split.candidates) if item and item not in known.of(user)]
        values = sorted((float(scores[item]) for item in legal), reverse=True)
        own = float(scores[int(wanted.of(user)[0])])
        tied += own >= values[6] and values.count(own) > 1
    assert 0 < tied == found.tied_targets < len(found.users)
    assert measure(Fixed(torch.arange(split.n_items).float()), test, config, train).tied_targets == 0


def test_counting_what_is_recommended_needs_so_much_to_recommend(loaders: tuple[Any, Any, Any, Any]) -> None:
    """To RecBole's ItemCoverage and its like the padding item, where nothing is left, is one that was recommended."""
    config, train, _, test = loaders
    config["topk"] = [1, train._dataset.item_num - 1]
    scores = torch.rand(train._dataset.item_num, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=r"ItemCoverage, .*60 users have fewer than"):
        measure(Fixed(scores), test, config, train)
    config["metrics"] = ["NDCG", "GAUC"]
    assert 0 < measure(Fixed(scores), test, config, train).metrics["ndcg@1"] + 1


def test_gauc_is_the_share_of_pairs_in_order(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    split = train._dataset.split
    scores = torch.from_numpy(np.random.default_rng(1).integers(0, 9, split.n_items)).float()
    found = measure(Fixed(scores), test, config, train)
    known, wanted = split.histories(0, 1), split.histories(2)
    shares = []
    for user in found.users.tolist():
        target = int(wanted.of(user)[0])
        others = [
            item
            for item in range(1, split.n_items)
            if split.candidates[item] and item != target and item not in set(known.of(user).tolist())
        ]
        own = scores[target].item()
        shares.append(np.mean([(own > scores[item].item()) + 0.5 * (own == scores[item].item()) for item in others]))
    assert found.metrics["gauc"] == pytest.approx(float(np.mean(shares)), abs=1e-9)


def test_nan_scores_are_refused(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    scores = torch.zeros(train._dataset.item_num)
    scores[5] = torch.nan
    with pytest.raises(UserError, match="NaN scores"):
        measure(Fixed(scores), test, config, train)


def test_more_items_than_there_are_is_refused(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    config["topk"] = [5000]
    with pytest.raises(UserError, match="5000 items"):
        measure(Fixed(torch.zeros(train._dataset.item_num)), test, config, train)


def test_who_has_fewer_items_left_is_shown_no_more(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    split = train._dataset.split
    there = int(split.candidates.sum())
    config["topk"], config["metrics"] = [there], ["NDCG", "Hit", "GAUC"]
    known, wanted = split.histories(0, 1), split.histories(2)
    found = measure(Fixed(torch.zeros(split.n_items)), test, config, train)
    for place, user in enumerate(found.users.tolist()):
        shown = found.items[place][found.items[place] > 0].tolist()
        left = set(np.flatnonzero(split.candidates).tolist()) - set(known.of(user).tolist())
        assert set(shown) == left and len(shown) == len(left) < there
        assert not found.items[place][len(left) :].any()
        # The target is among what is left, so it is found, whatever stands behind.
        assert int(wanted.of(user)[0]) in left and found.per_user[f"hit@{there}"][place] == 1


def test_what_may_not_be_recommended_is_no_hit(loaders: tuple[Any, Any, Any, Any]) -> None:
    config, train, _, test = loaders
    split = train._dataset.split
    config["topk"], config["metrics"] = [int(split.candidates.sum())], ["NDCG", "Recall", "Hit"]
    # As of a model that bars items by itself, the targets among them.
    found = measure(Fixed(torch.full((split.n_items,), -torch.inf)), test, config, train)
    assert not found.items.any()
    assert not any(values.any() for name, values in found.per_user.items() if "hit" in name or "recall" in name)


@given(data=st.data())
def test_who_leads_a_group_is_its_best_and_of_equals_the_first(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    groups = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count)))
    order = torch.tensor(data.draw(st.permutations(range(count))))
    grid = st.lists(st.sampled_from([-math.inf, 0.0, 1.0, 2.0]), min_size=count, max_size=count)
    scores = torch.tensor(data.draw(st.lists(grid, min_size=1, max_size=3)))
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(count))
    led = leaders(scores, groups, rank)
    counts_as = torch.tensor([groups.tolist().index(group) for group in groups.tolist()])
    shown = shown_for(scores, counts_as, order)
    for row, own in enumerate(scores.tolist()):
        for group in set(groups.tolist()):
            members = [item for item in order.tolist() if groups[item] == group]
            best = max(members, key=lambda item: own[item])  # the first of equals, as the order has them
            assert [item for item in members if led[row, item]] == [best]
            assert int(shown[row, counts_as[best]]) == best
