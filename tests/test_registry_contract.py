"""The contract of every registered recommender, ours and RecBole's alike."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import DRAW, EIGHT, UNSEEN, ours, recboles, settings_for, write_data
from recbole.utils import ModelType, init_seed

from recbole_llm import registry
from recbole_llm.config import Config
from recbole_llm.evaluation.ranking import catalogue_scores
from recbole_llm.limits import REFUSED, packages_missing
from recbole_llm.training import trainer
from recbole_llm.training.found import FoundStages, config_of
from recbole_llm.training.pipeline import Fit, fit, fit_found, store_of
from recbole_llm.training.state import RESUME_FILE

TOP = 10


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("contract"))


def config_for(model: str, data: Path, saved: Path) -> Config:
    settings = {
        "data_path": str(data), "output_dir": str(saved), "epochs": 1, "eval_step": 0, "topk": [TOP],
        "show_progress": False, "tensorboard": False, "gpu_id": "", "item_text": "{movie_title} {class}",
    }  # fmt: skip
    return Config(model, "small", config_dict=settings | settings_for(model))


def scores_of(fitted: Fit, rows: slice = slice(None), seed: int = 0) -> torch.Tensor:
    """Of some of the test rankings over the whole catalogue; what is drawn while ranking is drawn alike every time."""
    loader = fitted.test_data
    interaction, excluded, *_ = loader.collate_fn(loader.order[rows])
    init_seed(seed, True)
    fitted.model.eval()
    with torch.no_grad():
        return catalogue_scores(fitted.model, interaction, excluded, loader.candidates, loader._dataset).clone()


def check(model: str, data: Path, tmp_path: Path) -> None:
    config = config_for(model, data, tmp_path / "first")
    first = fit(config, store_of(config))
    scores = scores_of(first)
    anew = config_for(model, data, tmp_path / "second")
    again = fit(anew, store_of(anew))
    assert torch.equal(scores_of(again), scores), "two fits from one seed are not equal"
    assert again.fingerprint == first.fingerprint

    saved = json.loads(json.dumps({"model": model, "dataset": "small", "config": config.as_dict()}))
    read = config_of(saved)
    assert read.stage_keys() == config.stage_keys(), "a Config does not survive being written and read"
    loaded = fit_found(read, FoundStages(store_of(config).root))
    assert torch.equal(scores_of(loaded), scores), "saved and loaded, it scores otherwise"

    first.trainer.evaluate(first.test_data, load_best_model=False)
    measured, split = first.trainer.measured, first.train_data._dataset.split
    known = split.histories(0, 1)
    assert measured.items.shape == (len(first.test_data.users), TOP)
    for user, items in zip(measured.users.tolist(), measured.items.tolist(), strict=True):
        assert len(set(items)) == TOP and split.candidates[items].all() and 0 not in items, "no valid top-K"
        assert not np.isin(items, known.of(user)).any(), "a user's history is recommended to him"

    assert scores_of(first, slice(0, 0)).shape == (0, scores.shape[1]), "an empty batch"
    draws = not torch.equal(scores_of(first, seed=1), scores)
    assert draws == (model in DRAW), "what draws while it ranks stands in DRAW, tests/contract.py"
    for one in () if draws else (0, len(scores) - 1):
        # Sums of another batch size may differ in their last bits.
        torch.testing.assert_close(
            scores_of(first, slice(one, one + 1)), scores[[one]], rtol=1e-3, atol=1e-4,
            msg=lambda told: f"a user ranked alone is ranked otherwise: {told}",
        )  # fmt: skip
    unseen = first.dataset.token2id(first.dataset.iid_field, UNSEEN)
    assert split.candidates[unseen] and not (known.items == unseen).any()
    own = scores[:, unseen]
    assert not own.isnan().any() and (own < torch.inf).all(), "an item with no interaction"


@pytest.mark.parametrize("model", [*ours(), *EIGHT])
def test_contract(model: str, data: Path, tmp_path: Path) -> None:
    check(model, data, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in recboles() if name not in (*EIGHT, *REFUSED)])
def test_contract_of_the_rest(model: str, data: Path, tmp_path: Path) -> None:
    missing = packages_missing(model)
    if missing:
        pytest.skip(f"PACKAGE MISSING: {model} needs {missing}")
    check(model, data, tmp_path)


class CutError(Exception):
    """What a test ends a training with."""


def of_four_epochs(model: str, data: Path, folder: Path) -> Config:
    """A configuration whose training is validated after each of four epochs and never stops early."""
    config = config_for(model, data, folder)
    config["epochs"], config["eval_step"], config["stopping_step"] = 4, 1, 9
    return config


def check_resumed(model: str, data: Path, tmp_path: Path, kept: bool | None = None) -> None:
    """Cut off after its second epoch, or the only one of a closed form, a model ends as if it had not been."""
    found = []
    last = 0 if registry.get_model(model).type == ModelType.TRADITIONAL else 1

    def watch(epoch: int, _score: float) -> None:
        if epoch == last:
            raise CutError

    for name in ("whole", "cut"):
        config = of_four_epochs(model, data, tmp_path / name)
        if name == "cut":
            with pytest.raises(CutError):
                fit(config, store_of(config), watch)
            if kept is not None:
                assert bool(list((tmp_path / name).rglob(RESUME_FILE))) == kept
            config = of_four_epochs(model, data, tmp_path / name)
        found.append(fit(config, store_of(config)))
    assert found[0].facts["losses"] == found[1].facts["losses"]
    assert torch.equal(*map(scores_of, found))


# A knowledge graph's two loaders; what moves a list, or tensors that are no weights; what keeps its counts elsewhere.
@pytest.mark.parametrize(("model", "kept"), [("CKE", True), ("LINE", False), ("DiffRec", False), ("Pop", False)])
def test_a_model_goes_on_as_if_it_had_not_been_cut_off(
    model: str, kept: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)
    check_resumed(model, data, tmp_path, kept)


def test_what_cannot_go_on_does_not_go_on_from_what_an_earlier_version_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)
    now = trainer._MOVES_MORE

    def settings(name: str) -> Config:
        return of_four_epochs("DiffRec", data, tmp_path / name)

    def cut(epoch: int, _score: float) -> None:
        if epoch == 1:
            raise CutError

    monkeypatch.setattr(trainer, "_MOVES_MORE", frozenset())
    with pytest.raises(CutError):
        fit(settings("cut"), store_of(settings("cut")), cut)
    assert list((tmp_path / "cut").rglob(RESUME_FILE))
    monkeypatch.setattr(trainer, "_MOVES_MORE", now)
    whole, gone_on = (fit(settings(name), store_of(settings(name))) for name in ("whole", "cut"))
    assert whole.facts["losses"] == gone_on.facts["losses"]


@pytest.mark.parametrize("model", ["BPR", "SASRec", "GLTA", "AlignTokenRec"])
@pytest.mark.parametrize(
    ("eval_step", "cut", "begun"),
    [
        (4, 2, [0, 1, 2, 2, 3]),
        # Behind an epoch that was validated and one that was not.
        (2, 3, [0, 1, 2, 3, 3]),
        # In the second validation: its epoch begins again, and is not trained again.
        (2, None, [0, 1, 2, 3, 3]),
    ],
)
def test_a_cut_costs_no_more_than_the_epoch_at_work(
    model: str, eval_step: int, cut: int | None, begun: list[int], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)
    found: list[int] = []
    steps, validations = [0], [0]
    begin, tick, valid = (getattr(trainer.TrainerMixin, name) for name in ("_begin_epoch", "_tick", "_save_resumable"))

    def begins(self: Any, epoch: int) -> bool:
        trained: bool = begin(self, epoch)
        if self.config["model"] == model:
            found.append(epoch)
            if epoch == cut and found.count(epoch) == 1:
                raise CutError
        return trained

    def ticks(self: Any, batch: int) -> None:
        steps[0] += self.config["model"] == model
        tick(self, batch)

    def saves(self: Any, epoch: int, trained: bool = False) -> None:
        valid(self, epoch, trained)
        validations[0] += trained and self.config["model"] == model
        if trained and cut is None and validations[0] == 2:
            validations[0] += 1
            raise CutError

    def settings(name: str) -> Config:
        config = of_four_epochs(model, data, tmp_path / name)
        config["eval_step"] = eval_step
        return config

    monkeypatch.setattr(trainer.TrainerMixin, "_tick", ticks)
    whole = fit(settings("whole"), store_of(settings("whole")))
    trained, steps[0] = steps[0], 0
    monkeypatch.setattr(trainer.TrainerMixin, "_begin_epoch", begins)
    monkeypatch.setattr(trainer.TrainerMixin, "_save_resumable", saves)
    with pytest.raises(CutError):
        fit(settings("cut"), store_of(settings("cut")))
    gone_on = fit(settings("cut"), store_of(settings("cut")))
    assert found == begun and steps[0] == trained
    assert whole.facts["losses"] == gone_on.facts["losses"] and whole.valid == gone_on.valid
    assert whole.facts["valid_curve"] == gone_on.facts["valid_curve"]
    assert torch.equal(scores_of(whole), scores_of(gone_on))


def test_a_run_from_before_a_setting_is_found(data: Path, tmp_path: Path) -> None:
    """What a run that says nothing of ``score_end`` has in its cache goes by the settings of that time."""
    config = config_for("LCRec", data, tmp_path)
    config["score_end"] = False
    before = {"model": "LCRec", "dataset": "small", "config": config.as_dict()}
    assert "score_end" not in config.stage_keys()
    del before["config"]["score_end"]
    assert config_of(before, data_path=str(data)).stage_keys() == config.stage_keys()
    counted = config_for("LCRec", data, tmp_path)
    assert counted.stage_keys() == config.stage_keys() | {"score_end": True}
    # Titles have an end token in any case.
    assert "score_end" not in config_for("TALLRec", data, tmp_path).stage_keys()


def test_what_has_lost_its_best_weights_starts_over(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)

    def cut(epoch: int, _score: float) -> None:
        if epoch == 1:
            raise CutError

    with pytest.raises(CutError):
        fit(of_four_epochs("BPR", data, tmp_path), store_of(of_four_epochs("BPR", data, tmp_path)), cut)
    (kept,) = tmp_path.rglob(RESUME_FILE)
    (kept.parent / "weights.safetensors").unlink()
    whole = fit(of_four_epochs("BPR", data, tmp_path), store_of(of_four_epochs("BPR", data, tmp_path)))
    assert "starts over" in caplog.text and len(whole.facts["losses"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in [*ours(), *recboles()] if name not in REFUSED])
def test_every_model_goes_on_as_if_it_had_not_been_cut_off(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = packages_missing(model)
    if missing:
        pytest.skip(f"PACKAGE MISSING: {model} needs {missing}")
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)
    check_resumed(model, data, tmp_path)


def test_the_cost_of_a_closed_form_is_that_of_its_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole.model.general_recommender import EASE

    fitted = EASE.__init__

    def slowly(self: EASE, *arguments: object) -> None:
        time.sleep(1.0)
        fitted(self, *arguments)

    monkeypatch.setattr(EASE, "__init__", slowly)
    config = config_for("EASE", data, tmp_path)
    (stage,) = fit(config, store_of(config)).stages
    assert stage["seconds"] >= 1.0 and not stage["cached"]
    (again,) = fit(config, store_of(config)).stages
    assert again["seconds"] == stage["seconds"] and again["cached"]


@pytest.mark.parametrize("model", ["EASE", "Pop"])
def test_what_has_a_closed_form_is_validated_however_seldom_the_others_are(
    model: str, data: Path, tmp_path: Path
) -> None:
    config = config_for(model, data, tmp_path)
    config["epochs"], config["eval_step"] = 300, 5
    made = fit(config, store_of(config))
    assert made.facts["best_epoch"] == 0 and len(made.facts["valid_curve"]) == 1
