"""What every registered recommender owes, and what RecBole's own calls owe to our models."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import ours
from small_models import SMALL

import recbole_llm
from recbole_llm import registry
from recbole_llm.config import Config
from recbole_llm.training import trainer as trainer_module
from recbole_llm.training.runs import run

MODELS = ("BPR", "EASE", *(name for name in ours() if name not in ("Pop", "NGCF", "SGL")))
SHOWN = {
    "schema", "model", "dataset", "seed", "split", "evaluation", "valid", "test", "per_user", "stages", "parameters",
    "throughput", "device", "versions", "config",
}  # fmt: skip


def quick(settings_of: Callable[..., dict[str, Any]], model: str, **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL.get(model, {})) | more


@pytest.mark.parametrize("model", MODELS)
def test_a_run_reports_and_is_found_again(
    model: str, settings_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    settings = quick(settings_of, model, result_file=str(tmp_path / "copy.json"))
    first = run(model, "small", config_dict=settings)
    written = json.loads(Path(first["result_file"]).read_text(encoding="utf-8"))
    copy = json.loads((tmp_path / "copy.json").read_text(encoding="utf-8"))
    assert set(written) >= SHOWN and written == copy | {"per_user": "per_user.npz", "rankings": "rankings.npz"}
    assert (tmp_path / copy["per_user"]).is_file()
    assert written["evaluation"]["test_users"] == 60
    searches = registry.entries()[model].kind == "language" and model not in ("GLTA", "BIGRec")
    assert written["evaluation"]["ranking"] == ("beam" if searches else "full")
    assert all(0 <= value <= 1 for value in written["test"].values())
    assert set(written["stages"][0]) == {"name", "fingerprint", "seconds", "cached", "peak_memory_mb", "tokens"}
    read = [stage["tokens"] for stage in written["stages"]]
    entry = registry.entries()[model]
    assert (sum(read) > 0) == (entry.kind == "language" or "backbone" in entry.stages)
    assert model == "EASE" or len(written["curves"]["loss"]) == written["config"]["epochs"]
    assert Path(first["log_file"]).read_text(encoding="utf-8")

    again = run(model, "small", config_dict=settings)
    assert all(stage["cached"] for stage in again["stages"]), "nothing changed, so nothing may be trained"
    assert again["test"] == first["test"]

    # Another seed is another model on the same split.
    if model != "EASE":
        other = run(model, "small", config_dict=settings | {"seed": 1})
        assert other["stages"][-1]["fingerprint"] != first["stages"][-1]["fingerprint"]
        assert other["split"]["fingerprint"] == first["split"]["fingerprint"]


@pytest.mark.parametrize("model", MODELS)
def test_recboles_own_way_works(model: str, settings_of: Callable[..., dict[str, Any]]) -> None:
    config = recbole_llm.Config(model, "small", config_dict=quick(settings_of, model))
    dataset = recbole_llm.create_dataset(config)
    train, valid, test = recbole_llm.data_preparation(config, dataset)
    made = recbole_llm.get_model(config["model"])(config, train.dataset).to(config["device"])
    trainer = recbole_llm.get_trainer(config["MODEL_TYPE"], config["model"])(config, made)
    best, result = trainer.fit(train, valid, saved=True, show_progress=False)
    found = trainer.evaluate(test, load_best_model=True, show_progress=False)
    assert best == pytest.approx(result["ndcg@10"]) and 0 <= found["ndcg@10"] <= 1
    known = train._dataset.split.histories(0, 1)
    for user, items in zip(trainer.measured.users.tolist(), trainer.measured.items.tolist(), strict=True):
        assert len(set(items)) == len(items) == 20
        assert not set(items) & {0, *known.of(user).tolist()}


def test_the_graph_model_behind_glta_is_the_leaderboards_own_row(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = quick(settings_of, "GLTA")
    del settings["graph_model.eval_step"]
    inside = run("GLTA", "small", config_dict=settings)
    plain = {key: value for key, value in settings.items() if key in settings_of()}
    alone = run("LightGCN", "small", config_dict=plain | {"epochs": 1})
    assert alone["stages"][0]["cached"]
    assert inside["parts"]["graph_model"]["test"] == alone["test"]
    assert inside["stages"][0]["fingerprint"] == alone["stages"][0]["fingerprint"]


def test_a_refit_keeps_the_schedule(
    settings_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from recbole_llm.training import staged

    ends: list[tuple[str, int]] = []

    class Watched(staged.TrainingLoop):
        def __init__(self, config: Any, model: Any, stage: str, optimizer: Any, batches: int, epochs: int) -> None:
            ends.append((stage, epochs))
            super().__init__(config, model, stage, optimizer, batches, epochs)

    monkeypatch.setattr(staged, "TrainingLoop", Watched)
    settings = quick(settings_of, "GLTA", epochs=6, eval_step=1, refit_on_valid=True, learning_rate=0.1, seed=3)
    result = run("GLTA", "small", config_dict=settings)
    last = [epochs for stage, epochs in ends if stage == "user_item_alignment"]
    assert result["best_epoch"] < 5, "the case of interest: fewer epochs than the schedule"
    assert last == [6, 6]


def test_refit_on_valid_trains_on_both_for_the_best_epochs(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = settings_of(epochs=4)
    plain = run("BPR", "small", config_dict=settings)
    refit = run("BPR", "small", config_dict=settings | {"refit_on_valid": True})
    assert refit["best_epoch"] == plain["best_epoch"] and refit["split"]["fingerprint"] == plain["split"]["fingerprint"]
    assert refit["evaluation"]["refit_on_valid"] and refit["valid"] == plain["valid"]
    # Finding the number of epochs is a part of what a refit costs.
    marks = [stage["fingerprint"] for stage in refit["stages"]]
    assert len(set(marks)) == len(marks) == 2 and marks[0] == plain["stages"][0]["fingerprint"]
    assert refit["stages"][-1]["fingerprint"] != plain["stages"][-1]["fingerprint"]


def test_train_positions_all_is_its_own_named_variant(settings_of: Callable[..., dict[str, Any]]) -> None:
    config = Config("SASRec", "small", config_dict=settings_of(train_positions="all"))
    assert config["model"] == "SASRecAllPositions" and config["train_batch_size"] == 128


def test_every_listed_model_can_be_found() -> None:
    optional = {"lightgbm", "xgboost", "dgl", "torch_scatter", "kmeans_pytorch", "faiss"}
    for name in registry.entries():
        try:
            assert registry.get_model(name).__name__ == name
        except recbole_llm.UserError as error:
            assert any(package in str(error) for package in optional), error


def test_another_packages_model_runs_by_class(settings_of: Callable[..., dict[str, Any]]) -> None:
    from recbole.model.general_recommender.bpr import BPR

    class Outside(BPR):
        """A user's own model."""

    result = run(Outside, "small", config_dict=settings_of())
    # The settings of the class it inherits from are its defaults.
    assert result["model"] == "Outside" and result["config"]["embedding_size"] == 64


def _train(settings: dict[str, Any], model: str) -> None:
    trainer_module.RESUME_SECONDS = 0.0
    torch.set_num_threads(1)
    run(model, "small", config_dict=settings)


def _kept_states(root: Path) -> list[str]:
    """Whole ones of the last stage: one of an epoch before it may be done before it is killed.

    Not by ``rglob``, which raises where a folder goes away while it looks.
    """
    kept = [folder for folder, _, files in os.walk(root) if "resume.safetensors" in files and ".part" not in folder]
    return [folder for folder in kept if "train-DCCF" not in folder]


@pytest.mark.parametrize(
    ("model", "batch"),
    [("LightGCN", 128), ("SASRec", 1024), pytest.param("AlignTokenRec", 128, marks=pytest.mark.slow)],
)
def test_a_killed_run_goes_on_and_ends_with_the_same_numbers(
    model: str, batch: int, settings_of: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "RESUME_SECONDS", 0.0)
    settings = quick(settings_of, model, epochs=12, stopping_step=99, train_batch_size=batch)
    whole = run(model, "small", config_dict=settings | {"output_dir": str(tmp_path / "whole")})
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_train, args=(settings, model))
    process.start()
    deadline = time.monotonic() + 120
    # Killed once it has saved its first state, at no moment of our choosing.
    while not _kept_states(Path(settings["output_dir"])) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert _kept_states(Path(settings["output_dir"])), "the run ended before it could be killed"
    resumed = run(model, "small", config_dict=settings)
    assert "going on where it was cut off" in Path(resumed["log_file"]).read_text(encoding="utf-8")
    assert resumed["test"] == whole["test"] and resumed["best_epoch"] == whole["best_epoch"]
    assert resumed["curves"] == whole["curves"] and len(whole["curves"]["valid"]) == 12


def test_two_runs_in_one_process_keep_their_logs_and_events_apart(
    settings_of: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = settings_of(tensorboard=True, epochs=1)
    first, second = (run(model, "small", config_dict=settings) for model in ("BPR", "LightGCN"))
    logs = [Path(result["log_file"]).read_text(encoding="utf-8") for result in (first, second)]
    assert "train-BPR" in logs[0] and "train-LightGCN" not in logs[0]
    assert "train-LightGCN" in logs[1] and "train-BPR" not in logs[1]
    assert "epoch 0 training" in logs[0], "RecBole's own lines belong in the file"
    folders = [Path(result["result_file"]).parent for result in (first, second)]
    assert folders[0] != folders[1] and all(list((folder / "tensorboard").rglob("events*")) for folder in folders)
    assert not Path("log_tensorboard").exists() and not Path("log").exists()


def test_a_collaborative_model_starts_without_the_libraries_of_language_models() -> None:
    """They take as long to import as all the rest, once for every run of a leaderboard."""
    code = "import sys, recbole_llm.training.runs; print([name for name in sys.modules if '.' not in name])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'torch'" in loaded and "'recbole'" in loaded
    assert not [name for name in ("transformers", "peft", "accelerate") if f"'{name}'" in loaded]
