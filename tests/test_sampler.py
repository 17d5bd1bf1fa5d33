"""Negative sampling: never an item of the user's train history, and the stated distribution over the rest."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recbole_llm import compat
from recbole_llm.data.histories import Histories
from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.errors import UserError

compat.install()

BITMAP, SORTED = {}, {"max_cells": 0}


def histories(*items: list[int]) -> Histories:
    """One list of items a user; user 0 is the padding one."""
    runs = [[], *items]
    offsets = np.cumsum([0, *(len(run) for run in runs)]).astype(np.int64)
    return Histories(offsets, np.array([item for run in runs for item in run], dtype=np.int64))


class TestSampling:
    @given(st.data())
    @settings(max_examples=60, deadline=None)
    def test_never_of_the_history_always_a_candidate(self, data: st.DataObject) -> None:
        n_items = data.draw(st.integers(3, 40))
        items = st.integers(1, n_items - 1)
        runs = data.draw(st.lists(st.lists(items, max_size=60), min_size=1, max_size=6))
        candidates = np.zeros(n_items, dtype=bool)
        candidates[data.draw(st.lists(items, min_size=1))] = True
        keywords = data.draw(st.sampled_from([BITMAP, SORTED]))
        allowed = [set(np.flatnonzero(candidates)) - set(run) for run in runs]
        if not all(allowed):
            with pytest.raises(UserError, match="user_inter_num_interval"):
                NegativeSampler(histories(*runs), n_items, candidates, **keywords)
            return
        sampler = NegativeSampler(histories(*runs), n_items, candidates, seed=1, **keywords)
        users = np.array(data.draw(st.lists(st.integers(1, len(runs)), min_size=1, max_size=30)))
        num = data.draw(st.integers(1, 3))
        drawn = sampler.sample(users, num)
        assert drawn.shape == (len(users) * num,) and drawn.dtype == np.int64
        for place, item in enumerate(drawn):
            assert item in allowed[users[place % len(users)] - 1]  # first all first negatives, then all second ones

    @pytest.mark.parametrize("keywords", [BITMAP, SORTED])
    def test_uniform_over_the_allowed_items(self, keywords: dict[str, int]) -> None:
        sampler = NegativeSampler(histories([1, 3, 5], [2, 2, 7, 8, 9]), 10, seed=0, **keywords)
        for user, allowed in ((1, [2, 4, 6, 7, 8, 9]), (2, [1, 3, 4, 5, 6])):
            counts = np.bincount(sampler.sample(np.full(12_000, user), 2), minlength=10)
            assert set(np.flatnonzero(counts)) == set(allowed)
            assert stats.chisquare(counts[allowed]).pvalue > 0.001

    @pytest.mark.parametrize(("alpha", "weights"), [(1.0, [3, 2, 1]), (0.5, [3**0.5, 2**0.5, 1]), (0.0, [1, 1, 1])])
    def test_popularity_counts_train_rows(self, alpha: float, weights: list[float]) -> None:
        # Items 2, 3 and 4 have 3, 2 and 1 train rows; item 5 has none and can never be drawn.
        runs = histories([1], [2, 3, 4], [2, 3], [2])
        sampler = NegativeSampler(runs, 6, seed=0, distribution="popularity", alpha=alpha)
        counts = np.bincount(sampler.sample(np.full(20_000, 1)), minlength=6)
        assert counts[[0, 1, 5]].sum() == 0
        expected = 20_000 * np.array(weights) / sum(weights)
        assert stats.chisquare(counts[[2, 3, 4]], expected).pvalue > 0.001

    def test_a_user_who_has_had_nearly_everything(self) -> None:
        n_items = 3001
        left = [17, 18, 2500]
        run = sorted(set(range(1, n_items)) - set(left))
        sampler = NegativeSampler(histories(run, [1]), n_items, seed=0)
        counts = np.bincount(sampler.sample(np.full(6000, 1)), minlength=n_items)
        assert counts.sum() == counts[left].sum()
        assert stats.chisquare(counts[left]).pvalue > 0.001

    def test_popularity_for_a_user_who_has_had_nearly_everything_popular(self) -> None:
        runs = histories([1], [1] * 5000, [2], [3, 3, 3])
        sampler = NegativeSampler(runs, 4, seed=0, distribution="popularity")
        counts = np.bincount(sampler.sample(np.full(8000, 1)), minlength=4)
        assert stats.chisquare(counts[[2, 3]], [2000, 6000]).pvalue > 0.001 and counts[1] == 0

    def test_seed_alone_decides(self) -> None:
        def draw(seed: int) -> list[int]:
            return NegativeSampler(histories([1]), 1000, seed=seed).sample(np.ones(50, dtype=int)).tolist()

        state = np.random.get_state()[1].copy()
        assert draw(3) == draw(3) != draw(4)
        assert (np.random.get_state()[1] == state).all()

    def test_ids_out_of_range(self) -> None:
        with pytest.raises(ValueError, match=r"0\.\.1"):
            NegativeSampler(histories([1]), 5).sample(np.array([2]))

    def test_refusals(self) -> None:
        with pytest.raises(UserError, match="uniform or popularity"):
            NegativeSampler(histories([1]), 5, distribution="popular")
        with pytest.raises(UserError, match=r"1 user\(s\).*internal id 2"):
            NegativeSampler(histories([1], [1, 2, 3, 4, 4]), 5)

    def test_answers_as_recboles_sampler(self) -> None:
        sampler = NegativeSampler(histories([1, 2, 2], []), 5, seed=0)
        drawn = sampler.sample_by_user_ids(np.array([1, 2]), np.array([1, 1]), 2)
        assert drawn.dtype == torch.int64 and drawn.shape == (4,)
        assert sampler.used_ids.tolist() == [set(), {1, 2}, set()]
        valid = sampler.set_phase("valid")
        assert (valid.phase, sampler.phase) == ("valid", "train")
        assert valid.generator is sampler.generator


@pytest.fixture(autouse=True)
def own_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])  # RecBole's Config reads the command line of whoever imports it


def stock_loader(model: str, **settings_: Any) -> Any:
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation

    class StockConfig(Config):
        def compatibility_settings(self) -> None:
            """Its aliases of NumPy's names no longer exist."""

    few = {"user_inter_num_interval": "[40,60]", "train_batch_size": 256, "use_gpu": False}
    with compat.anomaly_mode_kept():
        config = StockConfig(model=model, dataset="ml-100k", config_dict={**few, **settings_})
        return data_preparation(config, create_dataset(config))[0]


def epochs(loader: Any, count: int = 2) -> Iterator[Any]:
    np.random.seed(3)
    random.seed(3)
    for _ in range(count):
        yield list(loader)


LOADERS = {
    "pairwise": ("BPR", {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3}}),
    "popularity": ("BPR", {"train_neg_sample_args": {"distribution": "popularity", "sample_num": 1}}),
    "in order": ("BPR", {"shuffle": False}),
    "pointwise with item columns": ("FM", {
        "train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}, "eval_args": {"mode": "full"},
        "metrics": ["NDCG"], "valid_metric": "NDCG@10", "threshold": None,
        "load_col": {"inter": ["user_id", "item_id"], "user": ["user_id", "age"], "item": ["item_id", "class"]},
    }),
    "labels": ("FM", {
        "train_neg_sample_args": None, "eval_args": {"mode": "labeled"}, "metrics": ["AUC"], "valid_metric": "AUC",
        "threshold": {"rating": 3},
    }),
    "sequences": ("SASRec", {"train_neg_sample_args": None}),
    "masked sequences": ("BERT4Rec", {"train_neg_sample_args": None}),
}  # fmt: skip


class TestTrainLoader:
    @pytest.mark.parametrize("case", LOADERS)
    def test_gives_recboles_batches_with_recboles_sampler(self, case: str) -> None:
        from recbole_llm.data.train_loader import FastTrainLoader

        model, settings_ = LOADERS[case]
        stock = stock_loader(model, **settings_)
        fast = FastTrainLoader(stock.config, stock._dataset, stock._sampler, shuffle=stock.shuffle)
        assert len(fast) == len(stock) > 1
        for expected, got in zip(list(epochs(stock)), list(epochs(fast)), strict=True):
            assert len(got) == len(expected) == len(stock)
            for theirs, ours in zip(expected, got, strict=True):
                assert ours.columns == theirs.columns
                for field in theirs.columns:
                    assert ours[field].dtype == theirs[field].dtype
                    assert torch.equal(ours[field], theirs[field]), field

    @pytest.mark.parametrize("case", ["pairwise", "pointwise with item columns"])
    def test_own_sampler_changes_nothing_but_the_negatives(self, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
        from recbole_llm.data import train_loader

        model, settings_ = LOADERS[case]
        stock = stock_loader(model, **settings_)
        data = stock._dataset
        pairs = data.inter_feat
        runs = Histories.from_rows(pairs["user_id"].numpy(), pairs["item_id"].numpy(), data.user_num)
        sampler = NegativeSampler(runs, data.item_num, seed=5)
        monkeypatch.setattr(train_loader, "CHUNK_ROWS", 3 * stock.step)  # so that an epoch has several chunks
        fast = train_loader.FastTrainLoader(stock.config, data, sampler, shuffle=True)
        seen = []
        for theirs, ours in zip(next(epochs(stock)), next(epochs(fast)), strict=True):
            assert ours.columns == theirs.columns and len(ours) == len(theirs)
            positives = len(theirs) // stock.times if model == "FM" else len(theirs)
            for field in ("user_id", "item_id"):
                assert torch.equal(ours[field][:positives], theirs[field][:positives])
            field, start = ("item_id", positives) if model == "FM" else ("neg_item_id", 0)
            users, negatives = ours["user_id"][start:].numpy(), ours[field][start:].numpy()
            assert not any(item in runs.of(user) for user, item in zip(users, negatives, strict=True))
            seen.append(negatives)
            if model == "FM":
                assert torch.equal(ours["class"], data.item_feat["class"][ours["item_id"]])
        assert len(np.unique(np.concatenate(seen))) > 0.9 * data.item_num

    def test_epochs_differ_and_a_seed_repeats_them(self) -> None:
        from recbole_llm.data.train_loader import FastTrainLoader

        stock = stock_loader("BPR")
        one, two = (FastTrainLoader(stock.config, stock._dataset, stock._sampler, shuffle=True) for _ in range(2))
        first, second = ([batch["user_id"] for batch in epoch] for epoch in epochs(one))
        assert not torch.equal(torch.cat(first), torch.cat(second))
        assert torch.equal(torch.cat(first), torch.cat([batch["user_id"] for batch in next(epochs(two))]))

    def test_dynamic_negatives_are_recboles(self) -> None:
        from recbole.model.general_recommender.bpr import BPR

        from recbole_llm.data.train_loader import FastTrainLoader

        dynamic = {"distribution": "uniform", "sample_num": 1, "dynamic": True, "candidate_num": 4}
        stock = stock_loader("BPR", train_neg_sample_args=dynamic)
        fast = FastTrainLoader(stock.config, stock._dataset, stock._sampler, shuffle=True)
        model = BPR(stock.config, stock._dataset)
        for loader in (stock, fast):
            loader.get_model(model)
        for theirs, ours in zip(next(epochs(stock)), next(epochs(fast)), strict=True):
            assert torch.equal(ours["neg_item_id"], theirs["neg_item_id"])
