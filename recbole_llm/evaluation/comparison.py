"""Runs beside each other, paired by user; rows that were not judged alike are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from recbole_llm.errors import UserError, nearest

# What must be the same for two rows to mean the same thing.
_JUDGED_BY = ("policy", "exclude_history", "eval_unit", "ranking")


@dataclass(frozen=True)
class Row:
    """One model's runs over seeds, averaged user by user.

    Attributes:
        model: its name.
        seeds: how many runs.
        users: raw user ids, sorted, [U].
        values: metric to float64 [U], the mean over seeds.
    """

    model: str
    seeds: int
    users: np.ndarray
    values: dict[str, np.ndarray]


def read_run(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``result.json`` and the users' values of a run.

    Args:
        path: the run's folder or its ``result.json``.

    Raises:
        UserError: there is no result there.
    """
    folder = Path(path)
    file = folder if folder.suffix == ".json" else folder / "result.json"
    if not file.is_file():
        runs = sorted(str(run.parent) for run in folder.glob("*/result.json"))
        others = [other.name for other in folder.parent.glob("*/") if other.name != folder.name]
        near = runs or [str(folder.parent / name) for name in nearest(folder.name, others)]
        hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
        raise UserError(f"no result.json in {folder}{hint}")
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        with np.load(file.parent / result["per_user"], allow_pickle=False) as arrays:
            return result, {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} or its per_user.npz cannot be read ({error})") from None


def row_of(name: str, paths: Sequence[str | Path], like: str | Path) -> Row:
    """Average runs, which differ in their seeds, user by user.

    Args:
        name: what to call the row.
        paths: the runs.
        like: a run that they must have been judged like.

    Raises:
        UserError: a run was judged on another split or under another policy; both are named.
    """
    first = read_run(like)[0]
    runs = [read_run(path) for path in paths]
    seeds = [result["seed"] for result, _ in runs]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{name}: a seed stands twice among {', '.join(map(str, paths))}; it would count as two")
    for path, (result, _) in zip(paths, runs, strict=True):
        _refuse_unlike(first, result, str(like), str(path))
    return _average(name, [arrays for _, arrays in runs])


def _refuse_unlike(first: dict[str, Any], other: dict[str, Any], first_name: str, other_name: str) -> None:
    if first["split"]["fingerprint"] is None or first["split"]["fingerprint"] != other["split"]["fingerprint"]:
        raise UserError(
            f"{first_name} and {other_name} were judged on different splits; their numbers cannot be compared"
        )
    for key in _JUDGED_BY:
        if first["evaluation"][key] != other["evaluation"][key]:
            raise UserError(
                f"{first_name} has {key} {first['evaluation'][key]}, {other_name} {other['evaluation'][key]}; "
                "their numbers cannot be compared"
            )


def _average(model: str, runs: list[dict[str, np.ndarray]]) -> Row:
    orders = [np.argsort(run["user_id"], kind="stable") for run in runs]
    users = runs[0]["user_id"][orders[0]]
    names = [name for name in runs[0] if name != "user_id" and all(name in run for run in runs)]
    values = {
        name: np.mean([run[name][order] for run, order in zip(runs, orders, strict=True)], axis=0) for name in names
    }
    return Row(model, len(runs), users, values)


def paired_test(row: Row, base: Row, metric: str) -> tuple[float, float]:
    """Mean difference of two models over users and the p-value of a paired t-test.

    Args:
        row, base: judged on the same users.
        metric: e.g. ``ndcg@10``.

    Returns:
        ``row`` minus ``base``, and the two-sided p (1 when no user differs).
    """
    difference = row.values[metric] - base.values[metric]
    if not np.any(difference):
        return 0.0, 1.0
    return float(difference.mean()), float(stats.ttest_rel(row.values[metric], base.values[metric]).pvalue)
