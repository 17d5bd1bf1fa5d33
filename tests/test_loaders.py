"""Views and rankings, against plain loops and against RecBole's own augmentation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.loaders import WindowLoader
from recbole_llm.data.phases import TEST, TRAIN, VALID

RANDOM = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
BY_TIME = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}
GLOBAL = {"split": {"TS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}
LAST = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}

Prepared = tuple[Any, Any, Any, Any]


@pytest.fixture
def prepared(settings_of: Callable[..., dict[str, Any]]) -> Callable[..., Prepared]:
    def make(model: str, **more: Any) -> Prepared:
        config = Config(model, "small", config_dict=settings_of(**more))
        return (config, *data_preparation(config, create_dataset(config)))

    return make


def items_of(split: Any, user: int, *phases: int) -> list[int]:
    return [
        int(item)
        for who, item, phase in zip(split.users, split.items, split.phases, strict=True)
        if who == user and phase in phases
    ]


def test_prefix_rows_are_recboles_augmentation(settings_of: Callable[..., dict[str, Any]]) -> None:
    """Under leave-one-out by time the train rows must be the ones that RecBole makes, minus its float32 order."""
    settings = settings_of(MAX_ITEM_LIST_LENGTH=7)
    ours = data_preparation(config := Config("SASRec", "small", config_dict=settings), create_dataset(config))[
        0
    ]._dataset
    stock_config = Config("SASRec", "small", config_dict=settings | {"policy": "recbole"})
    # Dense ranks fit float32, so that RecBole's own order is the exact one.
    stock = create_dataset(stock_config)
    times = stock.inter_feat["timestamp"]
    stock.inter_feat["timestamp"] = times.rank(method="first")
    stock_train = stock.build()[0]

    def rows(dataset: Any) -> set[tuple[int, int, tuple[int, ...]]]:
        feat = dataset.inter_feat
        return {
            (user, item, tuple(history[:length]))
            for user, item, history, length in zip(
                *(feat[name].tolist() for name in ("user_id", "item_id", "item_id_list", "item_length")), strict=True
            )
        }  # fmt: skip

    assert rows(ours) == rows(stock_train)
    assert len(ours.inter_feat) == len(stock_train.inter_feat)


@pytest.mark.parametrize("eval_args", [LAST, BY_TIME, GLOBAL, RANDOM], ids=["LS", "RS-TO", "TS", "RS-RO"])
def test_train_histories_hold_the_users_other_train_rows(
    prepared: Callable[..., Prepared], eval_args: dict[str, Any]
) -> None:
    _, train, _, _ = prepared("SASRec", eval_args=eval_args, MAX_ITEM_LIST_LENGTH=6)
    split, feat = train._dataset.split, train._dataset.inter_feat
    of_user = functools.cache(lambda user: items_of(split, user, TRAIN))
    seen: dict[int, int] = {}
    for user, target, shown, length in zip(
        feat["user_id"].tolist(),
        feat["item_id"].tolist(),
        feat["item_id_list"].tolist(),
        feat["item_length"].tolist(),
        strict=True,
    ):
        own, history = of_user(user), shown[:length]
        if eval_args["order"] == "TO":
            # Rows of a user come in time order, so the n-th one predicts his (n + 1)-th train item.
            seen[user] = seen.get(user, 0) + 1
            assert target == own[seen[user]]
            assert history == own[: seen[user]][-6:]
        else:
            others = own.copy()
            others.remove(target)
            assert history == others[-6:]
        assert not any(shown[length:])


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
@pytest.mark.parametrize("eval_args", [LAST, BY_TIME, GLOBAL, RANDOM], ids=["LS", "RS-TO", "TS", "RS-RO"])
def test_every_model_is_asked_the_same_rankings(
    prepared: Callable[..., Prepared], model: str, eval_args: dict[str, Any]
) -> None:
    _, train, valid, test = prepared(model, eval_args=eval_args)
    split = train._dataset.split
    for loader, phase, known in ((valid, VALID, (TRAIN,)), (test, TEST, (TRAIN, VALID))):
        asked = {}
        for interaction, (rows, items), positive_rows, positive_items in loader:
            for place, user in enumerate(interaction["user_id"].tolist()):
                targets = sorted(positive_items[positive_rows == place].tolist())
                assert sorted(items[rows == place].tolist()) == sorted(items_of(split, user, *known))
                assert user not in asked
                asked[user] = targets
                if model == "SASRec":
                    length = int(interaction["item_length"][place])
                    assert interaction["item_id_list"][place, :length].tolist() == items_of(split, user, *known)[-50:]
        assert asked == {
            user: sorted(items_of(split, user, phase)) for user in set(split.users[split.phases == phase].tolist())
        }


def test_rows_of_recboles_unit_have_one_target_and_everything_before_as_input(
    prepared: Callable[..., Prepared],
) -> None:
    _, train, _, test = prepared("SASRec", eval_args=BY_TIME, eval_unit="row")
    split = train._dataset.split
    rows = [
        (user, history[:length], target)
        for interaction, _, positive_rows, positive_items in test
        for user, history, length, target in zip(
            interaction["user_id"].tolist(), interaction["item_id_list"].tolist(), interaction["item_length"].tolist(),
            positive_items[torch.argsort(positive_rows)].tolist(), strict=True,
        )
    ]  # fmt: skip
    assert len(rows) == split.count(TEST)
    user, history, target = rows[-1]
    assert (history + [target])[-20:] == items_of(split, user, TRAIN, VALID, TEST)[-20:]


def test_exclude_history_recbole_masks_for_general_models_only(prepared: Callable[..., Prepared]) -> None:
    for model, masks in (("BPR", True), ("SASRec", False)):
        *_, test = prepared(model, exclude_history="recbole")
        assert (next(iter(test))[1] is not None) == masks


def test_windows_make_every_item_but_the_first_a_target_once(prepared: Callable[..., Prepared]) -> None:
    config, train, _, _ = prepared("SASRec", MAX_ITEM_LIST_LENGTH=8)
    loader = WindowLoader(config, train._dataset)
    histories = train._dataset.train_histories
    found: dict[int, list[int]] = {}
    for batch in loader:
        for user, inputs, targets, length in zip(
            *(batch[name].tolist() for name in ("user_id", "item_id_list", "target_list", "item_length")), strict=True
        ):
            own = histories.of(user).tolist()
            assert any(
                own[start : start + length] == inputs[:length]
                and own[start + 1 : start + 1 + length] == targets[:length]
                for start in range(len(own))
            )
            assert not any(inputs[length:]) and not any(targets[length:])
            found.setdefault(user, []).extend(targets[:length])
    assert {user: sorted(items) for user, items in found.items()} == {
        user: sorted(histories.of(user)[1:].tolist())
        for user in range(len(histories.lengths))
        if histories.lengths[user] > 1
    }


def test_items_without_interactions_are_no_candidates(prepared: Callable[..., Prepared]) -> None:
    _, train, _, test = prepared(
        "BPR", load_col={"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "movie_title"]}
    )
    assert train._dataset.item_num == 1683
    assert test.candidates.sum() == len(np.unique(train._dataset.split.items)) < 1682
