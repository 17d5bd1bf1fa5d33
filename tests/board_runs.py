"""Small hand-made runs for the tests of leaderboards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.evaluation.rankings import RECENT, Rankings

EVALUATION = {
    "policy": "unified", "exclude_history": True, "eval_unit": "user", "ranking": "full", "counted": None, "topk": [2],
}  # fmt: skip
STAGE = {"name": "train", "fingerprint": "a", "seconds": 2.0, "cached": False, "peak_memory_mb": 100.0, "tokens": 0}


def write_run(
    folder: Path,
    model: str,
    seed: int,
    values: np.ndarray | Mapping[str, np.ndarray],
    valid: float = 0.1,
    users: list[str] | None = None,
    **changes: Any,
) -> Path:
    """Write a run whose users' values are known.

    Args:
        folder: of the run; made.
        model, seed: of the run.
        values: float [U] of ``ndcg@10``, or metric to values.
        valid: every metric on valid.
        users: raw ids, in the values' order; written in an order of the run's own.
        changes: of ``evaluation`` (its keys), ``fingerprint``, and anything else of ``result.json``.
    """
    folder.mkdir(parents=True)
    metrics = {"ndcg@10": values} if isinstance(values, np.ndarray) else dict(values)
    count = len(next(iter(metrics.values())))
    names = np.array(users or [f"u{number}" for number in range(count)])
    order = np.random.default_rng(seed).permutation(count)
    evaluation = {key: changes.pop(key, value) for key, value in EVALUATION.items()}
    result = {
        "schema": 1, "model": model, "dataset": "toy", "seed": seed, "per_user": "per_user.npz", "rankings": None,
        "split": {"fingerprint": changes.pop("fingerprint", "f" * 64), "users": count, "items": 9, "train": 50,
                  "valid": count, "test": count, "dropped_repeats": 0},
        "evaluation": evaluation | {"test_users": count},
        "valid": {name: valid for name in metrics},
        "test": {name: float(value.mean()) for name, value in metrics.items()},
        "curves": {"loss": [0.5, 0.4], "valid_metric": "ndcg@10", "valid": [[1, 0.1], [2, valid]]},
        "stages": [STAGE], "parameters": {"total": 2000, "trainable": 1000},
        "throughput": {"test_users_per_second": 500.0}, "versions": {"recbole_llm": "1"}, "config": {"epochs": 1},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result | changes), encoding="utf-8")
    np.savez(folder / "per_user.npz", user_id=names[order], **{name: value[order] for name, value in metrics.items()})
    return folder


def write_rankings(run: Path, lists: list[list[int]], wanted: list[list[int]], items: int) -> None:
    """Write the rankings of users ``u0``, ``u1``, ...: items recommended and wanted, each a number from 0."""
    with np.load(run / "per_user.npz") as arrays:
        users = [user for user in arrays["user_id"] if int(user[1:]) < len(lists)]
    top, targets = ([own[int(user[1:])] for user in users] for own in (lists, wanted))
    Rankings(
        user_id=np.array(users),
        item_id=np.array([f"i{number}" for number in range(items)]),
        top=np.array(top, dtype=np.int32),
        targets=np.array([item for own in targets for item in own], dtype=np.int32),
        target_offsets=np.cumsum([0, *map(len, targets)]),
        item_count=np.ones(items, dtype=np.int64),
        user_count=np.ones(len(top), dtype=np.int64),
        history_length=np.ones(len(top), dtype=np.int64),
        recent=np.full((len(top), RECENT), -1, dtype=np.int32),
    ).save(run / "rankings.npz")
