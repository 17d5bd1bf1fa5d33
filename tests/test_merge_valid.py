"""``merge_valid``: everything is made from train + valid rows, nothing looks at a score, and no test row is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import SMALL
from worlds import assert_same, fitted_state

from recbole_llm.config import Config
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.errors import UserError
from recbole_llm.leaderboard.compare import compare
from recbole_llm.leaderboard.tuning import tune
from recbole_llm.training.item_tokens import ORIGIN
from recbole_llm.training.pipeline import fit, prepared, store_of
from recbole_llm.training.prepare import prepare
from recbole_llm.training.runs import run

Settings = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("model", ["BPR", "SASRecAllPositions", "GLTA", "AlignTokenRec"])
def test_valid_rows_are_learned_from_and_test_rows_are_not(model: str, worlds: list[Path], tmp_path: Path) -> None:
    plain, test_swapped, valid_swapped = (
        fitted_state(model, world, tmp_path / str(number), merge_valid=True) for number, world in enumerate(worlds[:3])
    )
    assert_same(dict(plain), test_swapped)
    with pytest.raises(AssertionError):
        assert_same(dict(plain), valid_swapped)


def test_item_tokens_are_made_from_the_same_rows(settings_of: Settings, tmp_path: Path) -> None:
    settings = settings_of(merge_valid=True, item_text="{movie_title}", **SMALL["AlignTokenRec"])
    result = run("AlignTokenRec", "small", config_dict=settings)
    origin = json.loads((Path(result["result_file"]).parent / ORIGIN).read_text(encoding="utf-8"))
    split = prepared(Config("BPR", "small", config_dict=settings_of()))[1]._dataset.split
    assert origin == {"split": split.fingerprint, "train": split.count(TRAIN) + split.count(VALID)}
    assert result["split"]["fingerprint"] == split.fingerprint and result["split"]["valid"] == 0
    # DCCF is what a refit of it is: its epochs by valid, its weights by both.
    part = [line["fingerprint"] for line in result["stages"] if line["name"] == "embedding_model"]
    refit = run("DCCF", "small", config_dict=settings_of(refit_on_valid=True, epochs=1, eval_step=0))
    assert part == [line["fingerprint"] for line in refit["stages"]] and len(part) == 2
    # So are the tokens that are made without training the model.
    words = [
        f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}" for key, value in settings.items()
    ]
    said = prepare(["--model=AlignTokenRec", "--dataset=small", *words])
    (mark,) = (line["fingerprint"] for line in result["stages"] if line["name"] == "item_tokens")
    assert f"found  {mark[:16]}" in said


def test_every_epoch_is_trained_and_none_is_looked_at(settings_of: Settings) -> None:
    settings = settings_of(epochs=3, stopping_step=0)
    merged = run("BPR", "small", config_dict=settings | {"merge_valid": True})
    assert merged["best_epoch"] == 3 and not merged["valid"] and not merged["curves"]["valid"]
    config = Config("BPR", "small", config_dict=settings | {"merge_valid": True})
    made = fit(config, store_of(config))
    plain = prepared(Config("BPR", "small", config_dict=settings))
    split, before = made.train_data._dataset.split, plain[1]._dataset.split
    assert split.count(TRAIN) == before.count(TRAIN) + before.count(VALID) and not len(made.valid_data)
    # Users are asked for the same, with the same history and the same items left out.
    assert split.count(TEST) == before.count(TEST)
    for own, other in zip(made.test_data, plain[3], strict=True):
        assert np.array_equal(own[2], other[2]) and np.array_equal(own[3], other[3])
        assert all(np.array_equal(ours, theirs) for ours, theirs in zip(own[1], other[1], strict=True))


def test_tables_say_who_has_it(settings_of: Settings) -> None:
    runs = [run("BPR", "small", config_dict=settings_of(merge_valid=merged)) for merged in (False, True)]
    assert [result["evaluation"]["merge_valid"] for result in runs] == [False, True]
    assert runs[0]["stages"][0]["fingerprint"] != runs[1]["stages"][0]["fingerprint"]
    said = compare([str(Path(result["result_file"]).parent) for result in runs])
    assert "BPR (merge_valid true)" in said
    assert "merge_valid: false for BPR (merge_valid null); true for BPR (merge_valid true)." in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"policy": "recbole"}, "merge_valid needs policy: unified"),
        ({"refit_on_valid": True}, "set one"),
    ],
)
def test_what_goes_against_it_is_refused(more: dict[str, Any], words: str, settings_of: Settings) -> None:
    with pytest.raises(UserError, match=words):
        Config("BPR", "small", config_dict=settings_of(merge_valid=True, **more))


def test_a_search_has_nothing_to_judge_by(tmp_path: Path) -> None:
    words = ["--model=BPR", "--dataset=tiny", "--merge_valid=true", f"--output_dir={tmp_path}"]
    with pytest.raises(UserError, match="merge_valid leaves no valid rows"):
        tune(words, lambda *_: None)
