"""Nothing fitted may look at valid or test rows, over the registry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm import registry
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.phases import PHASES, TEST, TRAIN, VALID, WITHHELD
from recbole_llm.training.pipeline import fit, store_of

QUICK = (
    *(entry.name for entry in registry.entries().values() if entry.module.startswith("recbole_llm.")),
    "BPR", "GRU4Rec", "EASE", "ItemKNN",
)  # fmt: skip
SMALL: dict[str, dict[str, Any]] = {
    "SASRec": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "BERT4Rec": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "BERT4RecWindows": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "SASRecAllPositions": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "FMLP": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "FMLPAllPositions": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "GRU4Rec": {"embedding_size": 16, "hidden_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "SASRecCodes": {
        "hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10, "llm_train_steps": 2, "llm_hidden_size": 16,
        "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400, "embedding_model.epochs": 1,
        "embedding_model.eval_step": 0, "code_levels": 4, "code_size": 8, "code_epochs": 3,
    },
    "AlignTokenRec": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "code_levels": 4, "code_size": 8, "code_epochs": 3,
        "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "negative_ratio": 1, "beams": 20,
    },
    "LCRec": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "code_levels": 4, "code_size": 8, "code_epochs": 3, "code_layers": [16], "code_dim": 8, "history_length": 5,
        "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "text_tokens": 16, "beams": 20,
    },
    "P5": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "id_clusters": 4, "id_leaf_items": 20, "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2,
        "beams": 20,
    },
    "GLTA": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "alignment_epochs": 1, "graph_model.epochs": 1, "graph_model.eval_step": 0,
    },
}  # fmt: skip
SMALL["LETTER"] = SMALL["LCRec"] | {
    "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "embedding_model.hidden_size": 8,
    "embedding_model.inner_size": 16, "embedding_model.MAX_ITEM_LIST_LENGTH": 10, "code_cf_weight": 0.1,
    "code_diversity_weight": 0.1, "code_diversity_clusters": 3,
}  # fmt: skip
SMALL["LightGCNPlus"] = SMALL["HCCFPlus"] = SMALL["RLMRecCon"] = SMALL["RLMRecGen"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
}  # fmt: skip
SMALL["TALLRec"] = SMALL["BIGRec"] = SMALL["MSL"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "adapter_learning_rate": 0.01, "beams": 20,
    "long_titles": "truncate",
}  # fmt: skip
SMALL["LLaRA"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "embedding_model.hidden_size": 16,
    "embedding_model.inner_size": 16, "embedding_model.MAX_ITEM_LIST_LENGTH": 10, "history_length": 3,
    "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 1, "beams": 20, "title_tokens": 8, "long_titles": "truncate",
}  # fmt: skip
SMALL["CoLLM"] = SMALL["LLaRA"] | {"text_epochs": 1}
SMALL["TIGER"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "t5_layers": 1, "t5_hidden_size": 16, "t5_inner_size": 32, "t5_heads": 2, "t5_head_size": 8, "user_tokens": 20,
    "code_size": 8, "code_epochs": 3, "code_layers": [16], "code_dim": 8, "history_length": 5,
    "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "beams": 20,
}  # fmt: skip
SMALL["TCA4Rec"] = SMALL["AlignTokenRec"] | {
    "alpha": 0.5, "cf_model.epochs": 1, "cf_model.eval_step": 0, "cf_model.hidden_size": 16, "cf_model.inner_size": 16,
    "cf_model.MAX_ITEM_LIST_LENGTH": 10,
}  # fmt: skip
# Models that need what the data has not, or a package that is not among the requirements.
OUT_OF_REACH = {
    "NCL": "faiss on a GPU", "GRU4RecKG": "entity embeddings", "KSR": "entity embeddings", "S3Rec": "refused here",
    "LDiffRec": "a trained embedding file", "RaCT": "refused here", "DGCF": "batches larger than this data",
    "SASRecCPR": "refused here", "GRU4RecCPR": "refused here",
    "FDSA": "item features", "SASRecF": "item features", "GRU4RecF": "item features", "NeuMF": "pre-trained parts",
    "ConvNCF": "pre-trained parts", "DIEN": "refused here",
}  # fmt: skip


def rows_of(folder: Path, name: str) -> tuple[list[str], list[list[str]]]:
    lines = (folder / name / f"{name}.inter").read_text(encoding="utf-8").splitlines()
    return lines[0].split("\t"), [line.split("\t") for line in lines[1:]]


def settings_of(folder: Path, saved: Path, **more: Any) -> dict[str, Any]:
    return {
        "data_path": str(folder), "output_dir": str(saved), "show_progress": False, "tensorboard": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "gpu_id": "", "epochs": 1, "eval_step": 0,
        "item_text": "{movie_title} {class}", "stopping_step": 99,
    } | more  # fmt: skip


def write_by_phase(source: Path, target: Path, swap: int | None, seed: int = 0) -> None:
    """The data set again, train rows first (so that ids do not depend on the rest), one phase's items exchanged.

    Args:
        source: has ``small``.
        target: gets ``small``.
        swap: the phase whose items are replaced by other train items that their users do not have; ``None``: none.
        seed: of the choice.
    """
    config = Config("BPR", "small", config_dict=settings_of(source, target / "saved"))
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    tokens = (dataset.field2id_token["user_id"], dataset.field2id_token["item_id"])
    items = split.items.copy()
    train_items = np.unique(items[split.phases == TRAIN])
    rng = np.random.default_rng(seed)
    if swap is not None:
        for row in np.flatnonzero(split.phases == swap):
            taken = set(items[split.users == split.users[row]].tolist())
            items[row] = rng.choice([item for item in train_items if item not in taken])
    # Every item must stand in train, or exchanging the others would change who is a candidate.
    keep = np.isin(split.items, train_items)
    times = dataset.exact_times[split.rows]
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for phase in range(len(PHASES)):
        for row in np.flatnonzero((split.phases == phase) & keep):
            lines.append(f"{tokens[0][split.users[row]]}\t{tokens[1][items[row]]}\t{times[row]:.0f}")
    (target / "small").mkdir(parents=True)
    (target / "small" / "small.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "small" / "small.item").write_bytes((source / "small" / "small.item").read_bytes())


@pytest.fixture(scope="module")
def three_worlds(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same train rows; the test items exchanged in the second, the valid items in the third."""
    folders = [tmp_path_factory.mktemp(name) for name in ("plain", "test_swapped", "valid_swapped")]
    for folder, swap in zip(folders, (None, TEST, VALID), strict=True):
        write_by_phase(small_data, folder, swap)
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
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[name]), name
        elif isinstance(value, torch.nn.Module):
            # Its weights are the model's, compared above; RecBole lists the module beside them.
            assert value.state_dict().keys() == second[name].state_dict().keys(), name
        elif hasattr(value, "toarray"):
            assert (value != second[name]).nnz == 0, name
        else:
            assert np.array_equal(np.asarray(value), np.asarray(second[name])), name


def check(model: str, worlds: list[Path], tmp_path: Path) -> None:
    plain, test_swapped, valid_swapped = (
        fitted_state(model, world, tmp_path / str(number)) for number, world in enumerate(worlds)
    )
    assert_same(dict(plain), test_swapped)
    assert_same(dict(plain), valid_swapped)


@pytest.mark.parametrize("model", QUICK)
def test_exchanged_test_and_valid_items_move_no_fitted_state(
    model: str, three_worlds: list[Path], tmp_path: Path
) -> None:
    check(model, three_worlds, tmp_path)


def test_negatives_at_every_position_know_train_rows_only(three_worlds: list[Path], tmp_path: Path) -> None:
    plain, *swapped = (
        fitted_state("SASRecAllPositions", world, tmp_path / str(number), loss_type="BCE")
        for number, world in enumerate(three_worlds)
    )
    for other in swapped:
        assert_same(dict(plain), other)


def write_rows(source: Path, target: Path, split: Any, tokens: Any, items: Any, first: Sequence[str] = ()) -> None:
    """The data set anew, train rows first, with other items in its rows."""
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *first]
    for row in np.argsort(split.phases != TRAIN, kind="stable"):
        lines.append(f"{tokens[0][split.users[row]]}\t{tokens[1][items[row]]}\t{split.ranks[row]}")
    (target / "small").mkdir(parents=True)
    (target / "small" / "small.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (target / "small" / "small.item").write_bytes((source / "small" / "small.item").read_bytes())


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


def the_rest() -> list[str]:
    entries = registry.entries().values()
    return sorted(
        entry.name for entry in entries
        if entry.kind in ("general", "sequential") and entry.name not in QUICK and entry.name not in OUT_OF_REACH
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("model", the_rest())
def test_the_rest_of_the_registry(model: str, three_worlds: list[Path], tmp_path: Path) -> None:
    check(model, three_worlds, tmp_path)


def test_the_check_sees_a_leak(three_worlds: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler that knows every phase, as RecBole builds it, must be caught."""
    from recbole.sampler import Sampler

    from recbole_llm.data import loaders

    def leaky(config: Any, train: Any) -> Any:
        return Sampler(["all"], [train.cut(train.split.with_valid_in_train())[0]]).set_phase("all")

    monkeypatch.setattr(loaders, "train_sampler", leaky)
    states = [
        fitted_state("BPR", world, tmp_path / str(number))
        for number, world in enumerate((three_worlds[0], three_worlds[2]))
    ]
    with pytest.raises(AssertionError):
        assert_same(*states)
