"""Out-of-fold teachers: no row is taught by a recommender that was trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL
from test_errors import refused

from recbole_llm.config import Config
from recbole_llm.data.folds import deal_folds
from recbole_llm.data.phases import TEST, TRAIN, VALID, WITHHELD
from recbole_llm.data.split import SplitProtocol, make_split
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.serving.recommender import Recommender
from recbole_llm.training.pipeline import fit_parts_of, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.teacher import FoldedTeacher, Teacher, check_folds

FOLDS = 3


def taught_by(settings_of: Callable[..., dict[str, Any]], name: str, data: str = "small", **more: Any) -> Config:
    own = {key: value for key, value in SMALL["TCA4Rec"].items() if not key.startswith("cf_model.")}
    text = {"item_text": "{movie_title} {class}"} if data == "small" else {}
    return Config("TCA4Rec", data, config_dict=settings_of(**own, **text) | {"cf_model": name, **more}, command_line=[])


# --- dealing ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.integers(1, 5), st.integers(0, 9))
def test_every_users_rows_go_to_folds_of_one_size(owners: list[int], count: int, seed: int) -> None:
    users = np.sort(np.array(owners))
    ranks = np.arange(len(users)) - np.searchsorted(users, users)
    names = ["[PAD]", "d", "a", "c", "b"]
    late = ranks > 2
    folds = deal_folds(users, ranks, late, count, names, seed)
    for user in np.unique(users):
        sizes = np.bincount(folds[users == user], minlength=count)
        early = np.bincount(folds[(users == user) & ~late], minlength=count)
        assert sizes.max() - sizes.min() <= 1 and early.max() - early.min() <= 1
    # Other internal numbers for the same users: the same folds.
    number = np.array([0, 4, 3, 2, 1])
    order = np.lexsort((ranks, number[users]))
    moved = deal_folds(number[users][order], ranks[order], late[order], count, ["[PAD]", "b", "c", "a", "d"], seed)
    assert np.array_equal(moved, folds[order])


def test_the_seed_moves_them() -> None:
    users, ranks = np.repeat(np.arange(1, 20), 10), np.tile(np.arange(10), 19)
    names = [str(user) for user in range(20)]
    one, same, other = (deal_folds(users, ranks, ranks > 8, 4, names, seed) for seed in (1, 1, 2))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    assert np.bincount(one).min() > 30


def test_repeats_of_an_interaction_are_in_its_fold() -> None:
    rng = np.random.default_rng(0)
    users, items = np.sort(rng.integers(1, 6, 200)), rng.integers(1, 9, 200)
    times, names = np.arange(200.0), [str(number) for number in range(9)]
    held = []
    for fold in range(FOLDS):
        protocol = SplitProtocol("RS", drop_repeats=False, fold=(fold, FOLDS))
        split = make_split(users, items, times, np.arange(200), names[:6], names, protocol)
        assert np.array_equal(split.held & (split.phases != VALID), split.phases == WITHHELD)
        merged = split.with_valid_in_train()
        assert np.array_equal(split.held, merged.phases == WITHHELD) and not merged.count(VALID)
        pairs = [set(zip(split.users[rows], split.items[rows])) for rows in (split.held, merged.phases == TRAIN)]
        assert pairs[0] and not pairs[0] & pairs[1]
        held.append(split.held)
    assert np.array_equal(np.sum(held, axis=0) == 1, split.phases != TEST)


# --- teachers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_no_row_of_a_fold_is_in_its_teachers_training(settings_of: Callable[..., dict[str, Any]], merged: bool) -> None:
    more = {"merge_valid": True, "valid_metric": "NDCG@10", "eval_step": 0} if merged else {}
    config = taught_by(settings_of, "EASE", **more)
    _, train_data, _, _ = prepared(config)
    whole = train_data._dataset.split
    fit_part = fit_parts_of(config, store_of(config))
    fits = [fit_part("cf_model", (fold, FOLDS)) for fold in range(FOLDS)]
    taken = np.zeros(len(whole.rows), dtype=int)
    marks = set()
    for fitted in fits:
        split = fitted.train_data._dataset.split
        marks.add(fitted.fingerprint)
        assert np.array_equal(split.rows, whole.rows) and np.array_equal(split.candidates, whole.candidates)
        lost = (whole.phases == TRAIN) & (split.phases != TRAIN)
        assert (split.phases[lost] == WITHHELD).all()
        assert np.array_equal(split.phases[~lost], whole.phases[~lost])
        taken += lost
        # What it was trained on are these rows, by the pairs that RecBole's loader has.
        pairs = {(int(user), int(item)) for user, item in zip(split.users[lost], split.items[lost])}
        seen = fitted.train_data._dataset.inter_feat
        trained = set(zip(seen["user_id"].tolist(), seen["item_id"].tolist()))
        assert trained and not pairs & trained
        assert abs(int(lost.sum()) - (whole.phases == TRAIN).sum() / FOLDS) < len(np.unique(whole.users))
    assert np.array_equal(taken == 1, whole.phases == TRAIN) and len(marks) == FOLDS
    assert (whole.count(VALID) == 0) == merged and whole.count(TEST) > 0

    teacher = FoldedTeacher(fits, train_data._dataset)
    moments = train_data.stops[::7]
    found = teacher.logits(moments)
    for fold, fitted in enumerate(fits):
        mine = teacher.folds[moments] == fold
        torch.testing.assert_close(found[mine], Teacher(fitted, train_data._dataset).logits(moments)[mine])
    with pytest.raises(ValueError, match="not each train row once"):
        FoldedTeacher(fits[:2], train_data._dataset)
    with pytest.raises(ValueError, match="not each train row once"):
        FoldedTeacher([*fits, fits[0]], train_data._dataset)


def test_what_a_teacher_trains_first_is_trained_without_the_fold_too(
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    own = {"epochs": 1, "eval_step": 0, "history_length": 5}
    quick = {f"cf_model.{key}": value for key, value in (SMALL["GLTA"] | own).items()}
    config = taught_by(settings_of, "GLTA", **quick)
    whole = prepared(config)[1]._dataset.split
    fitted = fit_parts_of(config, store_of(config))("cf_model", (0, 2))
    graph = fitted.parts["graph_model"].train_data._dataset.split
    held = fitted.train_data._dataset.split.held
    assert held.any() and held.sum() < whole.count(TRAIN)
    assert np.array_equal(graph.held, held) and not (graph.phases[held] == TRAIN).any()


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """A data set in which nothing tells what comes next: items drawn at random."""
    rng = np.random.default_rng(0)
    (tmp_path / "noise").mkdir()
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for user in range(80):
        lines += [f"u{user}\ti{item}\t{time}" for time, item in enumerate(rng.permutation(60)[:12])]
    (tmp_path / "noise" / "noise.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["EASE", "BPR", "SASRec"])
def test_a_teacher_leaks_what_it_was_trained_on_and_one_without_the_fold_does_not(
    name: str, noise: Path, settings_of: Callable[..., dict[str, Any]]
) -> None:
    long = {"epochs": 60, "eval_step": 0, "learning_rate": 0.02, "train_batch_size": 256}
    # It reads what stands before an interaction, and has learned what comes next all the same.
    deep = {"epochs": 60, "eval_step": 0, "learning_rate": 0.005, "train_batch_size": 256}
    own = {"BPR": long, "SASRec": deep, "EASE": {"reg_weight": 1.0}}[name]
    quick = {f"cf_model.{key}": value for key, value in own.items()}
    config = taught_by(
        settings_of, name, "noise", data_path=str(noise), item_tokens="raw", tasks=["sequential"], **quick
    )
    _, train_data, _, _ = prepared(config)
    dataset, fit_part = train_data._dataset, fit_parts_of(config, store_of(config))
    leaky = Teacher(fit_part("cf_model"), dataset)
    clean = FoldedTeacher([fit_part("cf_model", (fold, FOLDS)) for fold in range(FOLDS)], dataset)
    moments = train_data.stops
    targets = train_data.items[moments]
    ranks = {}
    for told, teacher in (("leaky", leaky), ("clean", clean)):
        scores = teacher.logits(moments)
        own = scores.gather(1, targets.unsqueeze(1))
        ranks[told] = float((scores[:, 1:] > own).double().mean())
    # Chance is a half.
    assert ranks["leaky"] < 0.25 and ranks["clean"] > 0.4


# --- runs ------------------------------------------------------------------------------------------------------------


def test_a_run_with_folds_is_found_again_and_one_without_is_as_before(
    settings_of: Callable[..., dict[str, Any]],
) -> None:
    own = {key: value for key, value in SMALL["TCA4Rec"].items() if not key.startswith("cf_model.")}
    settings = settings_of(item_text="{movie_title} {class}", **own, cf_model="EASE") | {"epochs": 1, "eval_step": 0}
    plain = run("TCA4Rec", "small", config_dict=settings)
    folded = run("TCA4Rec", "small", config_dict=settings | {"cf_folds": 2})
    fresh = [stage["name"] for stage in folded["stages"] if not stage["cached"]]
    assert fresh == ["cf_model fold 1 of 2", "cf_model fold 2 of 2", "fine_tuning"]
    assert folded["curves"]["loss"] != plain["curves"]["loss"]
    # The rankings are compared with the one that has all train rows.
    assert folded["parts"]["cf_model"]["test"] == plain["parts"]["cf_model"]["test"] and folded["consistency"]
    again = run("TCA4Rec", "small", config_dict=settings | {"cf_folds": 2})
    assert all(stage["cached"] for stage in again["stages"]) and again["test"] == folded["test"]
    # Labels made before are those of the same teachers, and what is served trains none of them.
    cached = run("TCA4Rec", "small", config_dict=settings | {"cf_folds": 2, "teacher_cache_mib": 64})
    assert [stage["name"] for stage in cached["stages"] if not stage["cached"]] == ["teacher_labels", "fine_tuning"]
    assert cached["curves"]["loss"] == pytest.approx(folded["curves"]["loss"], rel=1e-5)
    recommender = Recommender.of_run(cached["result_file"], ("train", "valid"))
    rankings = Rankings.read(Path(cached["result_file"]).with_name("rankings.npz"))
    served = recommender.recommend([rankings.user_id[3]], k=5)[0]
    assert [item for item, _, _ in served] == rankings.item_id[rankings.top[3, :5]].tolist()
    once = Config("TCA4Rec", "small", config_dict=settings | {"cf_folds": 1}, command_line=[])
    assert once.stage_keys() == Config("TCA4Rec", "small", config_dict=settings, command_line=[]).stage_keys()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cf_folds=0", "cf_model=BPR"], ["cf_folds should be int >= 1"]),
        (["train_fold=[0,2]"], ["unknown setting 'train_fold'"]),
    ],
)
def test_wrong_input_gets_one_line(settings: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "run", "--model=TCA4Rec", "--dataset=tiny", *(f"--{setting}" for setting in settings))
    for word in words:
        assert word in said


def test_more_folds_than_rows_are_refused(settings_of: Callable[..., dict[str, Any]]) -> None:
    config = taught_by(settings_of, "EASE")
    _, train_data, _, _ = prepared(config)
    rows = len(train_data.items)
    check_folds({"cf_folds": rows}, train_data._dataset)
    with pytest.raises(UserError, match=f"{rows + 1} folds are more than the {rows} train rows"):
        check_folds({"cf_folds": rows + 1}, train_data._dataset)
