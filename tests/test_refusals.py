"""RecBole's models that do not run here, or not on this data, get one plain line; and those listed do not run."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from contract import settings_for, write_data

from recbole_llm import limits, refusals, registry
from recbole_llm.cli import main
from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.errors import UserError
from recbole_llm.training.runs import run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("refusals"))


def line_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["run", "--epochs=0", "--show_progress=false", "--tensorboard=false", *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "recbole-llm: " in line]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("model", [*limits.REFUSED, *limits.PACKAGES])
def test_a_model_that_does_not_run_is_refused_with_the_nearest(
    model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in limits.PACKAGES.values():
        monkeypatch.setitem(sys.modules, package, None)
    said = line_of(capsys, f"--model={model}", "--dataset=tiny", f"--output_dir={tmp_path / 'saved'}")
    why = limits.REFUSED[model][0] if model in limits.REFUSED else f"'{limits.PACKAGES[model]}'"
    assert model in said and why in said and not (tmp_path / "saved").exists()
    named = set(re.findall(r"\w+", said)) & set(registry.entries()) - {model}
    assert named and not named & {*limits.REFUSED, *limits.PACKAGES}


@pytest.mark.slow
@pytest.mark.parametrize("model", limits.REFUSED)
def test_a_model_in_the_list_does_not_run(
    model: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refusals, "REFUSED", {})
    settings = {
        "data_path": str(data), "output_dir": str(tmp_path), "epochs": 1, "topk": [10], "gpu_id": "",
        "show_progress": False, "tensorboard": False, "valid_metric": "NDCG@10",
    }  # fmt: skip
    try:
        run(model, "small", config_dict=settings | settings_for(model))
    except Exception as error:
        assert isinstance(error, UserError | AttributeError | KeyError | TypeError | ValueError | FileNotFoundError)
    else:
        pytest.fail(f"{model} runs: take it out of REFUSED in recbole_llm/limits.py, and write docs/models.md anew")


def test_every_package_that_a_model_imports_is_installed_or_listed() -> None:
    for name, entry in registry.entries().items():
        if not entry.module.startswith("recbole.") or name in limits.REFUSED:
            continue
        file = registry.recbole_folder().parent / f"{entry.module.replace('.', '/')}.py"
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        imports = [node for node in tree if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in imports if isinstance(node, ast.ImportFrom) and node.module}
        packages = {module.partition(".")[0] for module in modules} - {limits.PACKAGES.get(name)}
        missing = {one for one in packages if importlib.util.find_spec(one) is None}
        assert all(one in limits.AT_SOME_SETTINGS.get(name, "") for one in missing), f"{name} imports {missing}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model=CKE", "--dataset=tiny"], "CKE learns from a knowledge graph .*no .*tiny.kg; BPR and LightGCN"),
        (["--model=SASRecF", "--dataset=tiny"], "'class', which is no column of .*tiny.item; its columns: item_id,"),
        (["--model=SASRecF", "--dataset=tiny", "--selected_features=[gendre]"], "did you mean 'genre'"),
        (
            ["--model=FDSA", "--dataset=tiny", "--selected_features=[genre]", "--load_col={item: [item_id]}"],
            "'genre'; add it to load_col.item",
        ),
        (["--model=DGCF", "--dataset=tiny"], r"draws \d+ users and as many items .*train_batch_size \(now 2048"),
        (["--model=NCL", "--dataset=tiny"], "num_clusters: 1000 of 121 users and of 81 items; set a lower one"),
    ],
)  # fmt: skip
def test_data_that_a_model_cannot_learn_from_is_told_with_what_it_lacks(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = line_of(capsys, *arguments, f"--output_dir={tmp_path / 'saved'}")
    assert re.search(words, said), said
    assert not list((tmp_path / "saved").glob("*/result.json"))


def test_what_a_model_reads_beyond_interactions_is_loaded_without_being_asked_for() -> None:
    graph = Config("CKE", "ml-100k", command_line=[])["load_col"]
    assert graph["kg"] == ["head_id", "relation_id", "tail_id"] and graph["link"] == ["item_id", "entity_id"]
    assert Config("SASRecF", "ml-100k", command_line=[])["load_col"]["item"] == ["item_id", "class"]
    assert list(Config("SASRec", "ml-100k", command_line=[])["load_col"]) == ["inter"]
    own = {"inter": ["user_id", "item_id", "timestamp"]}
    assert Config("CKE", "ml-100k", config_dict={"load_col": own}, command_line=[])["load_col"] == own


def test_rows_of_items_that_stand_in_no_graph_are_left_out_and_the_others_keep_their_order(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    link = folder / "small" / "small.link"
    head, *lines = link.read_text(encoding="utf-8").splitlines()
    link.write_text("\n".join([head, *lines[::2]]) + "\n", encoding="utf-8")
    linked = {line.split("\t")[0] for line in lines[::2]}
    config = Config("CKE", "small", config_dict={"data_path": str(folder), **settings_for("CKE")}, command_line=[])
    dataset = create_dataset(config)
    train, _, _ = data_preparation(config, dataset)
    split = train._dataset.split
    rows = [
        line.split("\t") for line in (folder / "small" / "small.inter").read_text(encoding="utf-8").splitlines()[1:]
    ]
    kept = [(user, item, float(time)) for user, item, _, time in rows if item in linked]
    assert 0 < len(kept) < len(rows) and len(split.users) == len(kept)
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    found = [
        (users[user], items[item], time)
        for user, item, time in zip(split.users, split.items, dataset.exact_times[split.rows], strict=True)
    ]
    assert sorted(found) == sorted(kept)
    order = {user: [item for one, item, _ in sorted(kept, key=lambda row: row[2]) if one == user] for user in users[1:]}
    assert {user: [item for one, item, _ in found if one == user] for user in users[1:]} == order
    assert np.array_equal(np.sort(dataset.file_order), np.flatnonzero([item in linked for _, item, *_ in rows]))


def test_a_graph_that_knows_no_item_is_told(tmp_path: Path) -> None:
    folder = write_data(tmp_path)
    (folder / "small" / "small.link").write_text("item_id:token\tentity_id:token\nx\ty\n", encoding="utf-8")
    config = Config("CKE", "small", config_dict={"data_path": str(folder), **settings_for("CKE")}, command_line=[])
    with pytest.raises(UserError, match="no item with interactions is linked"):
        create_dataset(config)
