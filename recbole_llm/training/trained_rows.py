"""Which rows a run has learned from, kept with its weights: one that goes on from it may test on none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from recbole_llm.data.phases import TRAIN

TRAINED = "trained_rows.npy"


def row_hashes(dataset: Any, *phases: int) -> np.ndarray:
    """A hash of each (raw user id, raw item id) of some phases, the same whatever numbers they have.

    Args:
        dataset: with a split.
        phases: of :mod:`recbole_llm.data.phases`.

    Returns:
        uint64 ``[rows]``, ascending, each once. Two rows of a million have one hash with a chance of some 1e-7.
    """
    split = dataset.split
    chosen = np.isin(split.phases, phases)
    of_users, of_items = (
        pd.util.hash_array(np.asarray(dataset.field2id_token[field], dtype=object), hash_key=key)
        for field, key in ((dataset.uid_field, "interaction:user"), (dataset.iid_field, "interaction:item"))
    )
    return np.unique(of_users[split.users[chosen]] + of_items[split.items[chosen]])


def trained_rows(dataset: Any, before: np.ndarray | None) -> np.ndarray:
    """Hashes of what a run will have learned from: its train rows, and those of the run that it goes on from."""
    own = row_hashes(dataset, TRAIN)
    return own if before is None else np.union1d(own, before)


def write_trained_rows(folder: Path, rows: np.ndarray) -> None:
    """Into the folder of the stage that learned from them."""
    np.save(folder / TRAINED, rows)


def read_trained_rows(folder: Path) -> np.ndarray | None:
    """What :func:`write_trained_rows` left; ``None`` of a stage that was made before there was such a file."""
    file = folder / TRAINED
    return np.asarray(np.load(file, allow_pickle=False)) if file.is_file() else None
