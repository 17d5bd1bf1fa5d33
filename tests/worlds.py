"""The same train rows with other valid and test rows: whatever is fitted must not differ between such worlds."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SMALL

from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.phases import PHASES, TEST, TRAIN, VALID
from recbole_llm.training.pipeline import fit, store_of


def rows_of(folder: Path, name: str) -> tuple[list[str], list[list[str]]]:
    lines = (folder / name / f"{name}.inter").read_text(encoding="utf-8").splitlines()
    return lines[0].split("\t"), [line.split("\t") for line in lines[1:]]


def settings_of(folder: Path, saved: Path, **more: Any) -> dict[str, Any]:
    return {
        "data_path": str(folder), "output_dir": str(saved), "show_progress": False, "tensorboard": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "gpu_id": "", "epochs": 1, "eval_step": 0,
        "item_text": "{movie_title} {class}", "stopping_step": 99,
    } | more  # fmt: skip


def write_by_phase(source: Path, target: Path, swap: Sequence[int], seed: int = 0) -> None:
    """The data set again, train rows first (so that ids do not depend on the rest), some phases' items exchanged.

    Args:
        source: has ``small``.
        target: gets ``small``.
        swap: the phases whose items are replaced by other train items that their users do not have.
        seed: of the choice.
    """
    config = Config("BPR", "small", config_dict=settings_of(source, target / "saved"))
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    tokens = (dataset.field2id_token["user_id"], dataset.field2id_token["item_id"])
    items = split.items.copy()
    train_items = np.unique(items[split.phases == TRAIN])
    rng = np.random.default_rng(seed)
    for row in np.flatnonzero(np.isin(split.phases, swap)):
        taken = set(items[split.users == split.users[row]].tolist())
        items[row] = rng.choice([item for item in train_items if item not in taken])
    # Every item must stand in train, or exchanging the others would change who is a candidate.
    keep = np.isin(split.items, train_items)
    times = dataset.exact_times[split.rows]
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for phase in range(len(PHASES)):
        for row in np.flatnonzero((split.phases == phase) & keep):
            lines.append(f"{tokens[0][split.users[row]]}\t{tokens[1][items[row]]}\t{times[row]:.0f}")
    _write(source, target, lines)


def worlds_of(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same train rows; the test items exchanged in the second, the valid items in the third, both in the last."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "test_swapped", "valid_swapped", "both_swapped")]
    for folder, swap in zip(folders, ((), (TEST,), (VALID,), (VALID, TEST)), strict=True):
        write_by_phase(source, folder, swap)
    return folders


def fitted_state(model: str, folder: Path, saved: Path, **more: Any) -> dict[str, Any]:
    config = Config(model, "small", config_dict=settings_of(folder, saved, **SMALL.get(model, {}) | more))
    trained = fit(config, store_of(config))
    state = dict(trained.model.state_dict())
    for part, inner in trained.parts.items():
        state |= {f"{part}.{name}": value for name, value in inner.model.state_dict().items()}
    if hasattr(trained.model, "backbone"):
        state |= {f"llm.{name}": value for name, value in trained.model.backbone.decoder.state_dict().items()}
    state |= {f"other.{name}": value for name, value in trained.model.other_parameter().items()}
    return {**state, "fingerprint": trained.train_data._dataset.split.fingerprint}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.pop("fingerprint") != second.pop("fingerprint"), (
        "the exchange changed nothing; the test would pass blindly"
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert _alike(value, second[name]), name


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, torch.nn.Module):
        # Its weights are the model's and compared as such; RecBole lists the module beside them.
        return one.state_dict().keys() == other.state_dict().keys()
    if hasattr(one, "toarray"):
        return (one != other).nnz == 0
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_alike(value, other[name]) for name, value in one.items())
    return np.array_equal(np.asarray(one), np.asarray(other))


def check_worlds(model: str, worlds: list[Path], tmp_path: Path, **more: Any) -> None:
    """See that a model's fitted state is the same whatever valid and test rows are; ``more``, its settings."""
    assert_same(*(fitted_state(model, world, tmp_path / world.name, **more) for world in (worlds[0], worlds[-1])))


def write_rows(source: Path, target: Path, split: Any, tokens: Any, items: Any, first: Sequence[str] = ()) -> None:
    """The data set anew, train rows first, with other items in its rows."""
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *first]
    for row in np.argsort(split.phases != TRAIN, kind="stable"):
        lines.append(f"{tokens[0][split.users[row]]}\t{tokens[1][items[row]]}\t{split.ranks[row]}")
    _write(source, target, lines)


def _write(source: Path, target: Path, lines: list[str]) -> None:
    """``small`` with other interactions and the same files beside them."""
    (target / "small").mkdir(parents=True)
    (target / "small" / "small.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for file in (source / "small").iterdir():
        if file.suffix != ".inter":
            shutil.copy(file, target / "small" / file.name)
