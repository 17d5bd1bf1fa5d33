"""Reading what a run has left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import DAMAGED
from recbole_llm.training.run_files import read_result, result_file


def read_run(path: str | Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """``result.json`` and the users' values of a run.

    Args:
        path: the run's folder or its ``result.json``.

    Returns:
        The result, and each metric's values by name, with the raw user ids; none of a run whose test was sampled or
        has no rows.

    Raises:
        UserError: there is no result there, or it cannot be read.
    """
    result, file = read_result(path), result_file(path)
    if "test" in result and result.get("per_user", "") is None:
        return result, {}
    try:
        with np.load(file.parent / result["per_user"], allow_pickle=False) as arrays:
            return result, {name: arrays[name] for name in arrays.files}
    except DAMAGED as error:
        raise UserError(f"{file} or its per_user.npz cannot be read ({error})") from None
