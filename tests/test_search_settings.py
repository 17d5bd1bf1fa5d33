"""Settings of the search alone train nothing anew, where no validation has picked among epochs by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SMALL
from test_tuning import trials_of

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.leaderboard import tuning
from recbole_llm.leaderboard.marks import training_of
from recbole_llm.serving.identity import TOLD, difference, identity
from recbole_llm.serving.recommender import Recommender
from recbole_llm.training import trainer
from recbole_llm.training.fine_tuning import FineTuningTrainer
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.trainer import TrainerMixin

GUIDE = {"cf_guidance": 0.5, "cf_model.epochs": 1, "cf_model.eval_step": 0, "cf_model.hidden_size": 16}
TITLES = {"ranking": "full", "normaliser": "level", "inference_prompts": "all"}
# One run's settings beside those that a model is trained with at first.
SEARCHES: dict[str, dict[str, Any]] = {
    "AlignTokenRec": {"beams": 25, "normaliser": "level", "score_end": False, **GUIDE},
    "LCRec": {"constraint": "level", "filter_items": False},
    "LETTER": {"ranking": "pruned"},
    "P5": {"beams": 25},
    "TIGER": {"beams": 25},
    "TALLRec": {**TITLES, "title_match": True},
    "BIGRec": {"popularity_gamma": 0.5, "generation_beams": 2, "title_match": True},
    "MSL": {**TITLES, "ranking": "pruned"},
    "LLaRA": {"beams": 25, "title_match": True, **GUIDE},
    "CoLLM": {"normaliser": "legal"},
    "TCA4Rec": {"cf_guidance": 0.5, "beams": 25},
}


def settings_for(model: str, place: Path, **more: Any) -> dict[str, Any]:
    own = {
        "output_dir": str(place), "show_progress": False, "tensorboard": False, "gpu_id": "", "evaluate_parts": False,
        "epochs": 1, "eval_step": 1,
    }  # fmt: skip
    return SMALL.get(model, {}) | own | more


def config_for(model: str, place: Path, **more: Any) -> Config:
    return Config(model, "tiny", config_dict=settings_for(model, place, **more), command_line=[])


def found(model: str, place: Path, **more: Any) -> dict[str, Any]:
    return run(model, "tiny", config_dict=settings_for(model, place, **more), command_line=[])


def told(result: dict[str, Any]) -> tuple[Any, ...]:
    """What a result says of a model's worth."""
    stages = [{key: stage[key] for key in ("name", "fingerprint")} for stage in result["stages"]]
    return result["valid"], result["test"], result["best_epoch"], result["curves"]["loss"], stages


@pytest.mark.parametrize("model", SEARCHES)
def test_another_search_is_of_the_weights_that_are_there(model: str, tmp_path: Path) -> None:
    first = found(model, tmp_path / "one")
    other = found(model, tmp_path / "one", **SEARCHES[model])
    assert other["stages"][-1]["cached"] and not first["stages"][-1]["cached"]
    # The same weights and figures come of training under those settings.
    anew = found(model, tmp_path / "two", **SEARCHES[model])
    assert not anew["stages"][-1]["cached"] and told(other) == told(anew)
    assert all(other["config"][key] != first["config"][key] for key in SEARCHES[model] if "." not in key)


def test_the_curve_is_not_that_of_another_search(tmp_path: Path) -> None:
    first = found("AlignTokenRec", tmp_path)
    other = found("AlignTokenRec", tmp_path, ranking="full", score_end=False)
    assert len(first["curves"]["valid"]) == 1 and other["curves"]["valid"] == []
    assert found("AlignTokenRec", tmp_path)["curves"] == first["curves"]


def test_a_store_answers_for_its_own_search_alone(tmp_path: Path) -> None:
    runs = [found("AlignTokenRec", tmp_path, eval_step=0, beams=beams) for beams in (20, 25)]
    assert runs[0]["stages"][-1]["fingerprint"] == runs[1]["stages"][-1]["fingerprint"]
    built, asked = (identity(made, Path(made["result_file"]), ["train"]) for made in runs)
    assert difference(built, asked) == TOLD["search"] and not difference(built, built)
    with pytest.raises(UserError, match=r"beams, cf_model\.epochs: a run is served as it was evaluated"):
        Recommender.of_run(runs[0]["result_file"], beams=25, **{"cf_model.epochs": 3})


def test_what_means_nothing_to_a_search_is_no_other_search(tmp_path: Path) -> None:
    runs = [
        found("AlignTokenRec", tmp_path, eval_step=0, normaliser="legal", **more)
        for more in ({}, {"score_end": False}, {"cf_model": "BPR"}, {"inference_prompts": "all"})
    ]
    built, *others = (identity(made, Path(made["result_file"]), ["train"]) for made in runs)
    assert built["search"] and not any(difference(built, other) for other in others)
    assert "search" not in found("BPR", tmp_path)


@pytest.mark.parametrize(
    ("model", "before", "after"),
    [
        # Of two epochs the better one is kept, and which that is the search says.
        ("AlignTokenRec", {"epochs": 2}, {"epochs": 2, "beams": 25}),
        # A teacher's labels are learned, whether or not he guides the search as well.
        ("TCA4Rec", {}, {"cf_model.epochs": 2}),
        ("AlignTokenRec", {}, {"learning_rate": 0.1}),
    ],
    ids=["two validations", "teacher", "training"],
)
def test_what_trains_otherwise_is_trained(
    model: str, before: dict[str, Any], after: dict[str, Any], tmp_path: Path
) -> None:
    found(model, tmp_path, **before)
    assert not found(model, tmp_path, **after)["stages"][-1]["cached"]


def test_stages_before_the_last_never_look_at_the_search(tmp_path: Path) -> None:
    first = found("CoLLM", tmp_path, epochs=2)
    other = found("CoLLM", tmp_path, epochs=2, beams=25)
    cached = {stage["name"]: stage["cached"] for stage in other["stages"]}
    last = first["stages"][-1]["name"]
    assert not cached.pop(last) and cached and all(cached.values())


def test_one_who_goes_on_under_another_search_ranks_by_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off after the one validation, with an epoch to go."""
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0)
    steps = {"epochs": 3, "eval_step": 2}
    seen: list[tuple[int, float]] = []

    def watch(epoch: int, score: float) -> None:
        seen.append((epoch, score))
        raise KeyboardInterrupt

    config = config_for("AlignTokenRec", tmp_path, **steps)
    with pytest.raises(KeyboardInterrupt):
        fit(config, store_of(config), watch)
    assert len(seen) == 1
    config = config_for("AlignTokenRec", tmp_path, ranking="full", score_end=False, **steps)
    fitted = fit(config, store_of(config), lambda *told: seen.append(told))
    assert fitted.trainer.start_epoch == 2 and len(seen) == 1
    assert fitted.facts["valid"] == {} and fitted.facts["valid_curve"] == []
    other = found("AlignTokenRec", tmp_path, ranking="full", score_end=False, **steps)
    anew = found("AlignTokenRec", tmp_path / "anew", ranking="full", score_end=False, **steps)
    assert told(other) == told(anew) and other["curves"]["valid"] == []


def test_what_was_begun_when_searches_counted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0)

    def watch(epoch: int, score: float) -> None:
        raise KeyboardInterrupt

    config = config_for("AlignTokenRec", tmp_path, epochs=3, eval_step=2)
    with monkeypatch.context() as patched:
        patched.setattr(FineTuningTrainer, "without_search", TrainerMixin.without_search)
        with pytest.raises(KeyboardInterrupt):
            fit(config, store_of(config), watch)
    assert fit(config, store_of(config)).trainer.start_epoch == 2
    assert not list((tmp_path / "cache" / ".work").glob("fine_tuning*"))


def test_what_was_trained_when_searches_counted_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(FineTuningTrainer, "without_search", TrainerMixin.without_search)
        former = found("CoLLM", tmp_path, **GUIDE)
        assert not found("CoLLM", tmp_path, **GUIDE | {"beams": 25})["stages"][-1]["cached"]
    again = found("CoLLM", tmp_path, **GUIDE)
    assert all(stage["cached"] for stage in again["stages"]) and told(again) == told(former)
    # Whoever wants it made again has it made again, and finds that from then on.
    refreshed = found("CoLLM", tmp_path, cache="refresh", **GUIDE)
    assert told(refreshed)[:3] == told(former)[:3]
    again = found("CoLLM", tmp_path, **GUIDE)
    assert told(again) == told(refreshed) and again["stages"][-1]["cached"]
    # Each is served from its own stages.
    marks = [Recommender.of_run(made["result_file"]).fit.fingerprint for made in (former, refreshed)]
    assert marks == [made["stages"][-1]["fingerprint"] for made in (former, refreshed)] and marks[0] != marks[1]


def test_a_search_of_settings_judges_each_by_its_own_rankings(tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text("trials: 5\nspace: {beams: [20, 21, 22, 23], score_end: [true, false]}\n", encoding="utf-8")
    given = SMALL["AlignTokenRec"] | {"epochs": 1, "eval_step": 1, "gpu_id": "", "output_dir": tmp_path / "one"}
    # As training looks at valid, with one prompt, whether or not a trial trains.
    given |= {"inference_prompts": "all"}
    given |= {"model": "AlignTokenRec", "dataset": "tiny", "space": space, "output": tmp_path / "tune"}
    given.pop("beams")
    tuning.tune([f"--{key}={value}" for key, value in given.items()], lambda _: None)
    trials = trials_of(tmp_path / "tune")
    assert len({trial.user_attrs["stage"] for trial in trials}) == 1
    other = max(trials, key=lambda trial: not trial.user_attrs["values"]["score_end"])
    assert not other.user_attrs["values"]["score_end"] and trials[0].user_attrs["values"]["score_end"]
    anew = found("AlignTokenRec", tmp_path / "two", **other.user_attrs["values"])
    assert other.value == pytest.approx(anew["valid"]["ndcg@10"], abs=1e-12)
    assert len(anew["curves"]["valid"]) == 1
    assert other.value != pytest.approx(trials[0].value, abs=1e-4)


@pytest.mark.parametrize("model", SEARCHES)
def test_a_leaderboard_knows_which_runs_share_a_training(model: str, tmp_path: Path) -> None:
    plain, searched = config_for(model, tmp_path), config_for(model, tmp_path, **SEARCHES[model])
    assert training_of(plain) == training_of(searched) != ""
    for other in ({"seed": 7}, {"epochs": 0}, {"train_share": 0.5}, {"item_text": "no {title}"}):
        assert training_of(config_for(model, tmp_path, **other)) != training_of(plain), other
    assert training_of(config_for(model, tmp_path, epochs=2)) == "", "each validation searches"


def test_of_other_models_a_leaderboard_knows_no_training_that_is_shared(tmp_path: Path) -> None:
    assert training_of(config_for("BPR", tmp_path)) == training_of(config_for("GLTA", tmp_path)) == ""
