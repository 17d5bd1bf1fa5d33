"""Nothing fitted may look at valid or test rows, over the registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract import recboles, settings_for, write_data
from worlds import assert_same, check_worlds, fitted_state, settings_of, worlds_of, write_rows

from recbole_llm import registry
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.phases import TRAIN, WITHHELD
from recbole_llm.limits import REFUSED, packages_missing

QUICK = (
    *(entry.name for entry in registry.entries().values() if entry.module.startswith("recbole_llm.")),
    "BPR", "GRU4Rec", "EASE", "ItemKNN",
)  # fmt: skip


@pytest.mark.parametrize("model", QUICK)
def test_exchanged_test_and_valid_items_move_no_fitted_state(model: str, worlds: list[Path], tmp_path: Path) -> None:
    check_worlds(model, worlds, tmp_path)


def test_negatives_at_every_position_know_train_rows_only(worlds: list[Path], tmp_path: Path) -> None:
    check_worlds("SASRecAllPositions", worlds, tmp_path, loss_type="BCE")


def write_with_withheld(source: Path, target: Path, swap: bool) -> None:
    """The data set again, train rows at ``train_share: 0.5`` first and with ranks for times; the withheld rows' items
    exchanged, or not, for other train items that their users do not have."""
    config = Config("BPR", "small", config_dict=settings_of(source, target / "saved", train_share=0.5))
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    tokens = (dataset.field2id_token["user_id"], dataset.field2id_token["item_id"])
    items = split.items.copy()
    train_items = np.unique(items[split.phases == TRAIN])
    rng = np.random.default_rng(0)
    for row in np.flatnonzero((split.phases == WITHHELD) & np.isin(split.items, train_items)) if swap else ():
        taken = set(items[split.users == split.users[row]].tolist()) | set(
            split.items[split.users == split.users[row]].tolist()
        )
        items[row] = rng.choice([item for item in train_items if item not in taken])
    write_rows(source, target, split, tokens, items)


@pytest.mark.parametrize(
    "model",
    [
        "BPR",
        "LightGCN",
        "DCCF",
        "HCCF",
        "LightGCNPlus",
        "RLMRecGen",
        "SASRec",
        "SASRecAllPositions",
        "FMLP",
        "EASE",
        "GLTA",
        "AlignTokenRec",
        "LCRec",
        "LETTER",
        "P5",
        "TIGER",
        "TCA4Rec",
        "MSL",
        "LLaRA",
        "CoLLM",
    ],
)
def test_exchanged_withheld_items_move_no_fitted_state(model: str, small_data: Path, tmp_path: Path) -> None:
    states = []
    for name in ("plain", "swapped"):
        write_with_withheld(small_data, tmp_path / name, swap=name == "swapped")
        states.append(fitted_state(model, tmp_path / name, tmp_path / name / "saved", train_share=0.5))
    assert_same(*states)


@pytest.fixture(scope="module")
def rich_worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """With users' and items' features, a knowledge graph and vectors of its entities beside the rows."""
    return worlds_of(write_data(tmp_path_factory.mktemp("rich")), tmp_path_factory)


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in recboles() if name not in (*QUICK, *REFUSED)])
def test_the_rest_of_the_registry(model: str, rich_worlds: list[Path], tmp_path: Path) -> None:
    missing = packages_missing(model)
    if missing:
        pytest.skip(f"PACKAGE MISSING: {model} needs {missing}")
    check_worlds(model, rich_worlds, tmp_path, **settings_for(model))


def test_the_check_sees_a_leak(worlds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that knows every phase, as RecBole builds it, must be caught."""
    from recbole.sampler import Sampler

    from recbole_llm.data import loaders

    def leaky(config: Any, train: Any) -> Any:
        return Sampler(["all"], [train.cut(train.split.with_valid_in_train())[0]]).set_phase("all")

    monkeypatch.setattr(loaders, "train_sampler", leaky)
    states = [fitted_state("BPR", world, tmp_path / str(number)) for number, world in enumerate((worlds[0], worlds[2]))]
    with pytest.raises(AssertionError):
        assert_same(*states)
