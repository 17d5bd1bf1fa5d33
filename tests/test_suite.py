"""Suites: every cell through the ordinary run, found again, failed ones shown; the shipped files hold together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from recbole_llm.cli import main
from recbole_llm.errors import UserError
from recbole_llm.evaluation import suite as suite_module
from recbole_llm.evaluation.pictures import can_draw
from recbole_llm.evaluation.suite import cells_of, marked, read_suite, run_suite
from recbole_llm.schema import properties_dir

SHIPPED = sorted((properties_dir() / "suite").glob("*.yaml"))
SMALL_LM = {"llm_train_steps": 1, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400}
STUDY: dict[str, Any] = {
    "title": "a study",
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "baseline": "BPR",
    "settings": {"epochs": 2, "eval_step": 0, "gpu_id": "", "topk": [5, 10]},
    "columns": {"whole": {}, "half": {"train_share": 0.5}},
    "rows": {"EASE": {"model": "EASE"}, "BPR": {"model": "BPR", "embedding_size": 8}},
}


def write(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return str(path)


def test_cells_are_run_once_and_compared_at_equal_columns(tmp_path: Path) -> None:
    file, folder = write(tmp_path / "study.yaml"), tmp_path / "out"
    said: list[str] = []
    text, failed = run_suite([file, f"--output={folder}"], said.append)
    assert failed == 0 and len(said) == 8 and not any("found" in line for line in said)
    content = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
    (table,) = content["tables"]
    assert table["splits"]["whole"]["train"] > 1.5 * table["splits"]["half"]["train"]
    assert table["splits"]["whole"]["test"] == table["splits"]["half"]["test"]
    assert [cell["done"] for cell in content["cells"]] == [True] * 8
    for column in ("whole", "half"):
        users: dict[str, Any] = {}
        for row in ("EASE", "BPR"):
            files = [
                folder / cell["file"] for cell in content["cells"] if (cell["row"], cell["column"]) == (row, column)
            ]
            tests = [json.loads(path.read_text(encoding="utf-8"))["test"]["ndcg@10"] for path in files]
            cell = table["rows"][row][column]
            assert cell["mean"] == pytest.approx(np.mean(tests)) and cell["seeds"] == [1, 2]
            arrays = [np.load(path.with_name(f"{path.stem}.per_user.npz")) for path in files]
            users[row] = np.mean([run["ndcg@10"] for run in arrays], axis=0)
        cell = table["rows"]["EASE"][column]
        assert cell["gain"] == pytest.approx(users["EASE"].mean() / users["BPR"].mean() - 1)
        assert cell["p"] == pytest.approx(stats.ttest_rel(users["EASE"], users["BPR"]).pvalue)
        assert "gain" not in table["rows"]["BPR"][column]
    assert (folder / "suite.md").read_text(encoding="utf-8").strip() in text

    again: list[str] = []
    assert run_suite([file, f"--output={folder}"], again.append)[0] == text
    assert all("found" in line for line in again)
    more: list[str] = []
    run_suite([file, f"--output={folder}", "--epochs=3"], more.append)
    assert sum("found" in line for line in more) == 0, "another setting is another cell"


def test_it_goes_on_when_a_cell_fails_and_tries_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from recbole_llm.training import runs

    rows = {**STUDY["rows"], "broken": {"model": "EASE", "reg_weight": 7.0}, "mistaken": {"model": "EASE"}}
    file = write(tmp_path / "study.yaml", rows=rows, columns={}, seeds=[1])
    run = runs.run

    def breaks(*args: Any, **kwargs: Any) -> Any:
        if kwargs["config_dict"].get("reg_weight") == 7.0:
            raise RuntimeError("the seventh\nweight")
        return run(*args, **kwargs)

    monkeypatch.setattr(runs, "run", breaks)
    folder = tmp_path / "out"
    assert main(["suite", file, f"--output={folder}"]) == 2
    shown = capsys.readouterr().out
    assert "RuntimeError: the seventh" in shown and "| broken | failed |" in shown
    assert "breaks" in next((folder / "cells").glob("*broken*.error.txt")).read_text(encoding="utf-8")
    monkeypatch.setattr(runs, "run", run)
    said: list[str] = []
    assert run_suite([file, f"--output={folder}"], said.append)[1] == 0
    assert [line for line in said if "found" not in line] == [line for line in said if "broken" in line]
    assert not list((folder / "cells").glob("*.error.txt"))


def test_what_is_there_is_written_when_it_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recbole_llm.training import runs

    file, folder = write(tmp_path / "study.yaml", columns={}), tmp_path / "out"
    run = runs.run

    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if kwargs["config_dict"]["seed"] == 2:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    monkeypatch.setattr(runs, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_suite([file, f"--output={folder}"], lambda line: None)
    assert "1 of 2 seeds" in (folder / "suite.md").read_text(encoding="utf-8")
    monkeypatch.setattr(runs, "run", run)
    said: list[str] = []
    text, _ = run_suite([file, f"--output={folder}"], said.append)
    assert [("found" in line) for line in said] == [True, True, False, False] and "1 of 2" not in text


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"rows": {"BPR": {"model": "BPR", "embeding_size": 8}}}, [], "BPR, seed 1: unknown setting 'embeding_size'"),
        ({"rows": {"BPR": {"embedding_size": 8}}}, [], "names no model"),
        ({"baseline": "BRP"}, [], "baseline 'BRP' is no row; did you mean 'BPR'"),
        ({"colums": {}}, [], "unknown key 'colums'; did you mean 'columns'"),
        ({"metric": "NDCG@7"}, [], "metric NDCG@7 is not among"),
        ({"seeds": "1"}, [], "seeds should be a list"),
        ({"columns": [1]}, [], "columns should read"),
        ({}, ["--seed=1"], "--seeds"),
        ({}, ["--epochs=-1"], "epochs should be int >= 0"),
    ],
)
def test_mistakes_are_refused_before_any_work(
    tmp_path: Path, changes: dict[str, Any], more: list[str], words: str
) -> None:
    file = write(tmp_path / "study.yaml", **changes)
    with pytest.raises(UserError, match=words):
        run_suite([file, f"--output={tmp_path / 'out'}", *more], lambda line: None)
    assert not (tmp_path / "out").exists()


def test_a_file_and_a_folder_are_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output"):
        run_suite([write(tmp_path / "study.yaml")])
    with pytest.raises(UserError, match="size-by-sparsity"):
        run_suite(["size-by-sparsty", "--output=x"])
    with pytest.raises(UserError, match="one file"):
        run_suite(["--output=x"])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_have_settings_that_every_cell_takes(path: Path, tmp_path: Path) -> None:
    suite = read_suite(path.stem)
    cells = marked(suite, tmp_path, [])
    assert len({cell.mark for cell in cells}) == len(cells) == len(list(cells_of(suite)))
    assert "".join(path.read_text(encoding="utf-8").split("\n")).count(f"suite {path.stem} --output") == 1


@pytest.mark.parametrize("name", [path.stem for path in SHIPPED])
def test_a_shipped_suite_runs_on_the_synthetic_data(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first seed, with GLTA as small as it gets; the widths and depths that the rows vary are left to the study."""
    read = suite_module.read_suite

    def small(file: Any, own: Any = None) -> Any:
        made = read(file, own)
        rows = {row: dict(settings) for row, settings in made.rows.items()}
        for settings in rows.values():
            settings |= {"epochs": 1, "eval_step": 0}
            if settings["model"] == "GLTA":
                settings |= SMALL_LM | {"alignment_epochs": 1, "graph_model.epochs": 1, "graph_model.eval_step": 0}
        return replace(made, rows=dict(list(rows.items())[:2]))

    monkeypatch.setattr(suite_module, "read_suite", small)
    folder = tmp_path / "out"
    arguments = [name, f"--output={folder}", "--datasets=[tiny]", "--seeds=[1]", "--gpu_id="]
    text, failed = run_suite(arguments, lambda line: None)
    assert failed == 0 and "## tiny time" in text
    if can_draw():
        assert (folder / "tiny-time.png").read_bytes().startswith(b"\x89PNG")
    else:
        assert "matplotlib is not installed" in text
