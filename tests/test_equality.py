"""Stock RecBole and this package, in one environment: the same numbers under ``policy: recbole``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from contract import DRAW, recboles, settings_for, write_data
from recbole.utils import get_model

from recbole_llm import compat, registry
from recbole_llm.config import Config
from recbole_llm.limits import REFUSED, packages_missing
from recbole_llm.training.runs import run

with compat.anomaly_mode_kept():
    from recbole.model.abstract_recommender import SequentialRecommender

METRICS = ["NDCG", "Recall", "Hit", "Precision", "MRR", "MAP", "GAUC"]
SEQUENTIAL = ("SASRec", "GRU4Rec", "BERT4Rec")
SHARED: dict[str, Any] = {
    "epochs": 2, "topk": [5, 10], "metrics": METRICS, "valid_metric": "NDCG@10", "metric_decimal_place": 12,
    "train_batch_size": 256, "MAX_ITEM_LIST_LENGTH": 10,
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "gpu_id": "", "seed": 7,
}  # fmt: skip
TRANSFORMER = {"hidden_size": 16, "inner_size": 32, "n_layers": 2}
SIZES: dict[str, dict[str, Any]] = {
    "BPR": {"embedding_size": 16}, "LightGCN": {"embedding_size": 16}, "NGCF": {"embedding_size": 16},
    "SGL": {"embedding_size": 16}, "SASRec": TRANSFORMER, "BERT4Rec": TRANSFORMER,
    "GRU4Rec": {"embedding_size": 16, "hidden_size": 16},
}  # fmt: skip


def stock_metrics(
    model: str, settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """RecBole as its own ``run_recbole`` runs it, without the ray that the module needs to be imported."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    monkeypatch.setattr(sys, "argv", ["stock"])
    monkeypatch.setattr(Config, "compatibility_settings", lambda self: None)
    # RecBole pickles its Config into the checkpoint; torch's default loader refuses that.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.chdir(folder)
    with compat.anomaly_mode_kept():
        config = Config(model, "small", config_dict={**settings, "checkpoint_dir": str(folder / "stock")})
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        train, valid, test = data_preparation(config, dataset)
        init_seed(config["seed"] + config["local_rank"], config["reproducibility"])
        made = get_model(model)(config, train._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], model)(config, made)
        trainer.fit(train, valid, saved=True, show_progress=False)
        return dict(trainer.evaluate(test, load_best_model=True, show_progress=False))


@pytest.mark.parametrize("model", list(SIZES))
def test_policy_recbole_gives_stock_metrics(
    model: str, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sequential = model in SEQUENTIAL
    settings = {**SHARED, **SIZES[model], "data_path": str(small_data)}
    if sequential:
        settings["train_neg_sample_args"] = None
    else:
        settings["eval_args"] = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
    stock = stock_metrics(model, settings, tmp_path, monkeypatch)
    result = run(model, "small", config_dict={
        **settings, "policy": "recbole", "output_dir": str(tmp_path / "ours"), "show_progress": False,
        "tensorboard": False,
    })  # fmt: skip
    ours, split = result["test"], result["split"]
    rows = pd.read_csv(small_data / "small" / "small.inter", sep="\t")
    assert split["fingerprint"] is None
    assert split["users"] == rows["user_id:token"].nunique() and split["items"] == rows["item_id:token"].nunique()
    # A sequence has a sample for each item but the first.
    told = split["train"] + split["valid"] + split["test"]
    assert told == len(rows) - (split["users"] if sequential else 0)
    assert not sequential or split["valid"] == split["test"] == split["users"]
    assert set(stock) <= set(ours)
    for name, value in stock.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-6), name
    assert ours["ndcg@10"] > 0


BY_USER = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user"}
LABELS = {
    "eval_args": BY_USER | {"mode": "labeled"}, "train_neg_sample_args": None, "threshold": {"rating": 4},
    "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    "metrics": ["AUC", "LogLoss", "MAE", "RMSE"], "valid_metric": "AUC",
}  # fmt: skip


@pytest.mark.parametrize(
    ("model", "more"),
    [
        ("BPR", {"eval_args": BY_USER | {"mode": "uni50"}}),
        ("NeuMF", {"eval_args": BY_USER | {"mode": "pop50"}}),
        ("FM", LABELS),
    ],
)
def test_candidates_that_are_drawn_and_labels_give_stock_metrics(
    model: str, more: dict[str, Any], small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same(model, {**SHARED, "data_path": str(small_data), **more}, tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def contract_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("contract"))


@pytest.mark.slow
@pytest.mark.parametrize("model", recboles())
def test_every_model_of_recboles_has_stock_metrics(
    model: str, contract_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model in REFUSED or packages_missing(model):
        pytest.skip(f"{model} is refused, or a package of its is not here")
    if model in DRAW:
        pytest.skip(f"{model} draws while it ranks")
    if model == "KSR":
        pytest.skip("stock RecBole multiplies float32 by the float64 of KSR's vectors, and stops")
    settings = SHARED | {"data_path": str(contract_data), "epochs": 1} | settings_for(model)
    with compat.anomaly_mode_kept():
        of_sequences = issubclass(get_model(model), SequentialRecommender)
    leave_one_out = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user"}
    settings["eval_args"] = (leave_one_out if of_sequences else BY_USER) | {"mode": "full"}
    config = Config(model, "small", config_dict=settings | {"policy": "recbole"})
    # Stock RecBole's default is a sampled item beside each: no negative to a softmax, but one more item to learn. Its
    # models of labels have no others here.
    if of_sequences and config["train_neg_sample_args"]["distribution"] == "none":
        settings["train_neg_sample_args"] = None
    if registry.entries()[model].kind == "context":
        settings["train_neg_sample_args"] = {"distribution": "uniform", "sample_num": 1}
    same(model, settings, tmp_path, monkeypatch)


def same(model: str, settings: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = stock_metrics(model, settings, folder, monkeypatch)
    ours = run(model, "small", config_dict={
        **settings, "policy": "recbole", "output_dir": str(folder / "ours"), "show_progress": False,
        "tensorboard": False,
    })["test"]  # fmt: skip
    assert set(stock) <= set(ours)
    for name, value in stock.items():
        assert ours[name] == pytest.approx(float(value), abs=1e-6), name


@pytest.mark.parametrize("model", ["LightGCN", "SASRec"])
def test_the_fast_classes_change_no_number_worth_naming(model: str, settings_of: Callable[..., dict[str, Any]]) -> None:
    more = SIZES[model] | ({"MAX_ITEM_LIST_LENGTH": 10} if model in SEQUENTIAL else {})
    fast, plain = (
        run(
            model,
            "small",
            config_dict=settings_of(fast_baselines=fast, epochs=15, eval_step=15, stopping_step=99, **more),
        )
        for fast in (True, False)
    )
    # Negatives and dropout are drawn from other streams, so equal is not asked; far apart would be a fault.
    assert abs(fast["test"]["ndcg@20"] - plain["test"]["ndcg@20"]) < 0.06


def test_a_users_values_average_to_the_metric(settings_of: Callable[..., dict[str, Any]]) -> None:
    result = run("BPR", "small", config_dict=settings_of())
    arrays = np.load(Path(result["result_file"]).parent / "per_user.npz", allow_pickle=False)
    assert len(arrays["user_id"]) == result["evaluation"]["test_users"] == 60
    for name, value in result["test"].items():
        assert arrays[name].mean() == pytest.approx(value, abs=1e-12)


def test_our_metrics_are_recboles_on_random_rankings() -> None:
    from recbole.evaluator import metrics_dict
    from recbole.evaluator.collector import DataStruct

    from recbole_llm.evaluation.metrics import USER_METRICS

    rng = np.random.default_rng(0)
    hits = rng.random((200, 12)) < 0.15
    targets = np.maximum(hits.sum(axis=1), rng.integers(1, 20, 200))
    struct = DataStruct()
    struct.set("rec.topk", torch.from_numpy(np.concatenate([hits, targets[:, None]], axis=1).astype(np.int64)))
    for name, metric in USER_METRICS.items():
        stock = metrics_dict[name]({"metric_decimal_place": 15, "topk": [1, 5, 12]}).calculate_metric(struct)
        for k in (1, 5, 12):
            assert metric(hits, targets)[:, k - 1].mean() == pytest.approx(stock[f"{name}@{k}"], abs=1e-12)
