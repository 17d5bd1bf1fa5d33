"""Reading what a run has left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.errors import UserError, nearest
from recbole_llm.evaluation.rankings import DAMAGED


def result_file(path: str | Path) -> Path:
    """The ``result.json`` of a run that is named by its folder or by that file."""
    return Path(path) if Path(path).suffix == ".json" else Path(path) / "result.json"


def read_run(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``result.json`` and the users' values of a run.

    Args:
        path: the run's folder or its ``result.json``.

    Raises:
        UserError: there is no result there, or it cannot be read.
    """
    folder = Path(path)
    file = result_file(path)
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
    except DAMAGED as error:
        raise UserError(f"{file} or its per_user.npz cannot be read ({error})") from None
