"""Leaderboards by command: runs side by side, found again, failed and refused rows shown, the same after kills."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from recbole_llm.cli import main
from recbole_llm.errors import DiskFullError, UserError
from recbole_llm.evaluation.pictures import can_draw
from recbole_llm.leaderboard.board import Study, _job, _reason, asked_for, leaderboard
from recbole_llm.leaderboard.cell import FULL_DISK
from recbole_llm.leaderboard.grid import write_grid
from recbole_llm.leaderboard.schedule import Ended
from recbole_llm.leaderboard.suite import Cell, marked

ROOT = Path(__file__).parent.parent
SMALL = {"epochs": 2, "eval_step": 1, "gpu_id": "", "topk": [5, 10]}
STUDY: dict[str, Any] = {
    "title": "a study",
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "settings": SMALL,
    "rows": {"Pop": {"model": "Pop"}, "EASE": {"model": "EASE"}, "BPR": {"model": "BPR", "embedding_size": 8}},
}


def suite(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return f"--suite={path}"


def board_of(folder: Path) -> dict[str, Any]:
    file = folder if folder.suffix else folder / "leaderboard.json"
    return json.loads(file.read_text(encoding="utf-8"))


def run(*arguments: str) -> tuple[str, list[str], int]:
    """One run at a time, as other tests run beside this one."""
    said: list[str] = []
    text, failed = leaderboard([*arguments, "--cores=1"], said.append)
    return text, [line for line in said if line.startswith("[")], failed


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(suite(folder.parent / "study.yaml"), f"--output={folder}")
    (folder.parent / "uninterrupted.json").write_bytes((folder / "leaderboard.json").read_bytes())
    return folder


def test_every_row_has_quality_cost_and_what_stands_behind_it(whole: Path) -> None:
    board = board_of(whole)
    (table,) = board["tables"]
    assert [row["seeds"] for row in table["rows"]] == [[1, 2]] * 3
    means = [row["metrics"]["ndcg@10"]["mean"] for row in table["rows"]]
    assert means == sorted(means, reverse=True) and {row["name"] for row in table["rows"]} == set(STUDY["rows"])
    for row in table["rows"]:
        results = [json.loads(Path(path).read_text(encoding="utf-8")) for path in row["runs"]]
        mean = np.mean([result["test"]["ndcg@10"] for result in results])
        assert row["metrics"]["ndcg@10"]["mean"] == pytest.approx(mean)
        assert (
            row["cost"]["seconds"] > 0 and row["cost"]["peak_memory_mb"] > 100 and row["cost"]["users_per_second"] > 0
        )
        assert row["at_k"]["ndcg"][9] == pytest.approx(mean)
    assert table["best_baseline"] in STUDY["rows"]
    assert {block["name"] for block in table["breakdowns"]} >= {"user activity", "item popularity", "history length"}
    assert table["users"] and all(set(user["top"]) == set(STUDY["rows"]) for user in table["users"])
    assert any(entry["title"] != entry["item"] for user in table["users"] for entry in user["history"])
    assert "recbole-llm leaderboard --suite=" in board["command"]


def test_each_form_of_it_says_the_same(whole: Path) -> None:
    (table,) = board_of(whole)["tables"]
    page, text = ((whole / f"leaderboard.{suffix}").read_text(encoding="utf-8") for suffix in ("html", "md"))
    with (whole / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    for row in table["rows"]:
        mean = row["metrics"]["ndcg@10"]["mean"]
        assert f"{mean:.4f}" in text and row["name"] in page
        assert any(
            float(value) == pytest.approx(mean, abs=1e-9) for line in lines for value in line.values() if _number(value)
        )


def _number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:
        return False
    return True


def test_what_is_there_is_not_run_again(whole: Path) -> None:
    before = board_of(whole)
    text, ran, failed = run(suite(whole.parent / "study.yaml"), f"--output={whole}")
    assert not ran and not failed and board_of(whole)["tables"] == before["tables"]
    assert str(whole / "leaderboard.html") in text


def test_a_damaged_result_is_measured_again(whole: Path) -> None:
    before = board_of(whole)
    cells = sorted(path for path in (whole / "cells").glob("*.json"))
    cells[0].write_bytes(cells[0].read_bytes()[:100])
    cells[1].with_name(f"{cells[1].stem}.per_user.npz").unlink()
    _, ran, failed = run(suite(whole.parent / "study.yaml"), f"--output={whole}")
    assert len(ran) == 2 and not failed
    metrics = [
        {row["name"]: row["metrics"] for row in board["tables"][0]["rows"]} for board in (before, board_of(whole))
    ]
    assert metrics[0] == metrics[1]


def test_another_seed_is_one_more_run_a_row(whole: Path) -> None:
    rows = {"Pop": STUDY["rows"]["Pop"]}
    _, ran, _ = run(suite(whole.parent / "more.yaml", rows=rows, seeds=[1, 2, 3]), f"--output={whole}")
    assert len(ran) == 1 and "Pop, seed 3" in ran[0]


def test_some_rows_are_run_now_and_others_later(tmp_path: Path) -> None:
    rows = {name: STUDY["rows"][name] for name in ("Pop", "EASE")}
    words = [suite(tmp_path / "study.yaml", rows=rows, seeds=[1]), f"--output={tmp_path / 'out'}"]
    text, ran, failed = run(*words, "--only=E*")
    assert len(ran) == 1 and "[1/1]" in ran[0] and "EASE, seed 1" in ran[0] and not failed
    (table,) = board_of(tmp_path / "out")["tables"]
    assert {row["name"]: row["seeds"] for row in table["rows"]} == {"EASE": [1], "Pop": []}
    assert (tmp_path / "out" / "leaderboard.html").is_file() and "EASE" in text
    _, ran, _ = run(*words)
    assert len(ran) == 1 and "Pop, seed 1" in ran[0]
    (table,) = board_of(tmp_path / "out")["tables"]
    assert all(row["seeds"] == [1] for row in table["rows"])


def test_a_pattern_may_be_a_name_with_commas(tmp_path: Path) -> None:
    rows = {"A, 0": {"model": "Pop"}, "A, 1": {"model": "BPR"}, "B [0]": {"model": "EASE"}}
    words = suite(tmp_path / "s.yaml", rows=rows)
    assert asked_for([words]).only is None
    for pattern, found in {"A, 0": {"A, 0"}, "A, *": {"A, 0", "A, 1"}, "B [0]": {"B [0]"}, "*": set(rows)}.items():
        assert asked_for([words, f"--only={pattern}"]).only == found


def altered_copy(folder: Path) -> Path:
    """tiny with one user's last item exchanged for another one that he never had."""
    target = folder / "altered" / "tiny"
    target.mkdir(parents=True)
    for file in (ROOT / "dataset" / "tiny").glob("tiny.*"):
        (target / file.name).write_bytes(file.read_bytes())
    head, *lines = (target / "tiny.inter").read_text(encoding="utf-8").splitlines()
    names = [name.partition(":")[0] for name in head.split("\t")]
    rows = [dict(zip(names, line.split("\t"), strict=True)) for line in lines]
    user = rows[0]["user_id"]
    his = [row for row in rows if row["user_id"] == user]
    last = max(his, key=lambda row: float(row["timestamp"]))
    last["item_id"] = next(row["item_id"] for row in rows if row["item_id"] not in {other["item_id"] for other in his})
    body = ["\t".join(row.values()) for row in rows]
    (target / "tiny.inter").write_text("\n".join([head, *body]) + "\n", encoding="utf-8")
    return target.parent


def test_a_row_with_one_altered_test_interaction_is_refused_by_name(tmp_path: Path) -> None:
    rows = STUDY["rows"] | {"BPR, altered": {"model": "BPR", "data_path": str(altered_copy(tmp_path))}}
    folder = tmp_path / "out"
    text, _, failed = run(suite(tmp_path / "s.yaml", rows=rows, seeds=[1]), f"--output={folder}")
    (table,) = board_of(folder)["tables"]
    bad = next(row for row in table["rows"] if row["name"] == "BPR, altered")
    assert failed == 0 and not bad["metrics"] and "split" in bad["refused"][0]["reason"]
    assert all(not row["refused"] and row["metrics"] for row in table["rows"] if row is not bad)
    assert "BPR, altered" in text and bad["refused"][0]["reason"] in (folder / "leaderboard.md").read_text(
        encoding="utf-8"
    )


def test_it_goes_on_when_a_row_fails_and_tries_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "later"
    rows = {"EASE": {"model": "EASE"}, "broken": {"model": "BPR", "data_path": str(data)}}
    broken = data / "tiny"
    broken.mkdir(parents=True)
    (broken / "tiny.inter").write_text("user_id:token\titem_id:token\n", encoding="utf-8")
    folder = tmp_path / "out"
    words = [suite(tmp_path / "s.yaml", rows=rows, seeds=[1]), f"--output={folder}"]
    assert main(["leaderboard", *words, "--cores=1"]) == 2
    told = capsys.readouterr()
    assert "broken, seed 1: failed" in told.err and "EASE" in told.out
    (table,) = board_of(folder)["tables"]
    row = next(row for row in table["rows"] if row["name"] == "broken")
    assert row["failed"][0]["seed"] == 1 and not row["metrics"]
    assert row["failed"][0]["reason"] in " ".join(told.out.split())
    for file in (ROOT / "dataset" / "tiny").glob("tiny.*"):
        (broken / file.name).write_bytes(file.read_bytes())
    _, ran, failed = run(*words)
    assert failed == 0 and len(ran) == 1 and "broken" in ran[0]


def test_models_and_data_sets_can_be_named_without_a_file(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    words = ["--models=Pop,BPR", "--dataset=tiny", "--epochs=1", "--BPR.epochs=3", "--gpu_id=", f"--output={folder}"]
    run(*words, "--seeds=7", "--reference=Pop")
    (table,) = board_of(folder)["tables"]
    rows = {row["name"]: json.loads(Path(row["runs"][0]).read_text(encoding="utf-8")) for row in table["rows"]}
    assert (rows["Pop"]["config"]["epochs"], rows["BPR"]["config"]["epochs"]) == (1, 3)
    assert rows["BPR"]["seed"] == 7 and table["reference"] == "Pop"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models=[BPR, BPX]", "--dataset=tiny"], "unknown model 'BPX'; did you mean"),
        (["--models=BPR"], "--models and --datasets"),
        (["--suite=quick", "--models=BPR"], "same thing twice"),
        (["--suite=quik"], "quick.yaml"),
        (["--models=BPR", "--dataset=tiny", "--seed=1"], "say --seeds"),
        (["--models=BPR", "--dataset=tiny", "--BRP.epochs=1"], "'BRP' is neither a row nor a part.*mean 'BPR'"),
        (["--models=BPR", "--dataset=tiny", "--cores=0"], "--cores should be a number above 0"),
        (["--models=BPR", "--dataset=tiny", "--memory=lots"], "--memory should be a number above 0"),
        (["--models=BPR", "--dataset=tiny", "--epochs=-1"], "epochs should be int >= 0"),
        (["--models=BPR", "--dataset=tiny", "--metric=NDCG@7"], "NDCG@7 is not among"),
        (["--models=BPR", "--dataset=tiny", "--reference=Pop"], "reference 'Pop' is no row"),
        (["quick"], "is not understood"),
        (["--suite=quick", "--dataset=tiny"], "--datasets replaces the suite's"),
        (["--models=BPR", "--dataset=tiny", "--BPR.seed=5"], "--BPR.seed is each run's own.*say --seeds"),
        (["--models=BPR", "--dataset=tiny", "--BPR.result_file=x.json"], "--BPR.result_file is each run's own"),
        (["--models=BPR", "--dataset=tiny", "--BPR.dataset=x"], "--BPR.dataset is each run's own.*say --datasets"),
        (["--models=BPR", "--models=Pop", "--dataset=tiny"], "--models is given twice"),
        (["--models=BPR", "--dataset=tiny", "--cores=.inf"], "--cores should be a number above 0"),
        (["--models=BPR", "--dataset=nowhere"], "there is no data set"),
        (["--models=BPR", "--dataset=tiny", "--only=BRP"], "--only: no row is called 'BRP'.*mean 'BPR'"),
        (["--models=BPR", "--dataset=tiny", "--only=[BPR, x*]"], "--only: no row is called 'x\\*'"),
    ],
)  # fmt: skip
def test_mistakes_are_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        leaderboard(words, lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_row_is_named_whatever_stands_in_its_name(tmp_path: Path) -> None:
    rows = {"GLTA 1.5": {"model": "GLTA"}, "BPR": {"model": "BPR"}}
    words = ["--GLTA 1.5.epochs=2", "--GLTA 1.5.graph_model.epochs=3", "--graph_model.epochs=4", "--BPR.epochs=5"]
    asked = asked_for([suite(tmp_path / "s.yaml", rows=rows), *words])
    assert asked.of_row == {"GLTA 1.5": ["--epochs=2", "--graph_model.epochs=3"], "BPR": ["--epochs=5"]}
    assert asked.command_line == ["--graph_model.epochs=4"]


def test_a_full_disk_is_told_of_where_its_log_could_not_be_written(tmp_path: Path) -> None:
    asked = asked_for([suite(tmp_path / "s.yaml"), f"--output={tmp_path}"])
    (tmp_path / "cells").mkdir()
    study = Study(marked(asked.suite, tmp_path, [], {}), tmp_path)
    study.file(study.cells[0]).with_suffix(".log").touch()
    with pytest.raises(DiskFullError, match="no space is left"):
        _reason(study.cells[0], study, Ended(FULL_DISK, 1.0, 1.0), asked)


# --- kills -----------------------------------------------------------------------------------------------------------
def figures(folder: Path) -> Any:
    """All that a table says of quality; costs are clocks'."""
    (table,) = board_of(folder)["tables"]
    rows = [
        {key: row[key] for key in ("name", "seeds", "metrics", "at_k", "failed", "refused")} for row in table["rows"]
    ]
    return table["best_baseline"], table["tests"], rows, table["breakdowns"], table["users"]


def killed_and_gone_on(tmp_path: Path, kills: int, draws: random.Random, rows: dict[str, Any]) -> Path:
    """Start it, kill -9 it at random moments, and let it end."""
    folder = tmp_path / "killed"
    words = [suite(tmp_path / "study.yaml", rows=rows), f"--output={folder}", "--cores=2"]
    command = [sys.executable, "-m", "recbole_llm", "leaderboard", *words]
    for _ in range(kills):
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        time.sleep(draws.uniform(4.0, 14.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return folder


def test_killed_it_goes_on_and_ends_with_the_same_table(whole: Path, tmp_path: Path) -> None:
    folder = killed_and_gone_on(tmp_path, 2, random.Random(1), STUDY["rows"])
    assert figures(folder) == figures(whole.parent / "uninterrupted.json")
    assert not list((folder / "cells").glob("*.spec.json"))


def test_of_runs_that_share_a_training_one_goes_first(tmp_path: Path) -> None:
    rows = {
        "SASRec": {"model": "SASRec"},
        "guided": {"model": "MSL", "choose": {"cf_guidance": [0.8, 0.5]}},
        "MSL": {"model": "MSL"},
        "of another rate": {"model": "MSL", "adapter_learning_rate": 0.5},
        "taught": {"model": "TCA4Rec", "base_model": "MSL"},
    }
    words = suite(tmp_path / "s.yaml", rows=rows, settings=SMALL | {"eval_step": 2})
    asked = asked_for([words, f"--output={tmp_path}"])
    study = Study(marked(asked.suite, tmp_path, [], {}), tmp_path)
    study.file(study.cells[0]).parent.mkdir()
    missing = study.wanted()

    def after(missing: list[Cell]) -> dict[str, set[str]]:
        jobs = [_job(cell, study, asked, missing) for cell in missing]
        return {job.name.removeprefix("tiny, "): {name.removeprefix("tiny, ") for name in job.after} for job in jobs}

    first, teacher = "guided, cf_guidance 0.8, seed 1", "SASRec, seed 1"
    waits = after(missing)
    assert waits[first] == {teacher} and waits["guided, cf_guidance 0.5, seed 1"] == {teacher, first}
    assert waits["MSL, seed 1"] == {first} and waits["MSL, seed 2"] == waits["of another rate, seed 1"] == set()
    assert waits["taught, seed 1"] == {teacher}
    # Without the first, the next one is it.
    rest = [cell for cell in missing if cell.row != "guided"]
    assert after(rest)["MSL, seed 1"] == set()
    done = next(cell for cell in missing if cell.row == "MSL" and cell.seed == 1)
    study._whole.add(study.file(done))
    study.file(done).write_text('{"stages": []}', encoding="utf-8")
    assert after(missing)["guided, cf_guidance 0.5, seed 1"] == {teacher}, "what it would wait for is in the cache"


@pytest.mark.slow
def test_killed_five_times_with_models_in_stages_it_ends_with_the_same_table(tmp_path: Path) -> None:
    small = {"llm_train_steps": 20, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "alignment_epochs": 1}
    rows = STUDY["rows"] | {"LightGCN": {"model": "LightGCN"}, "GLTA": {"model": "GLTA", **small}}
    rows["SASRec"] = {"model": "SASRec", "epochs": 6}
    folder = killed_and_gone_on(tmp_path, 5, random.Random(time.time_ns()), rows)
    expected = tmp_path / "expected"
    run(suite(tmp_path / "study.yaml", rows=rows), f"--output={expected}")
    assert figures(folder) == figures(expected)


def test_a_picture_is_drawn_whatever_a_protocol_is_called(tmp_path: Path) -> None:
    def row(name: str) -> dict[str, Any]:
        against = {} if name == "a" else {"a": {"gain": 0.1, "p_adjusted": 0.5}}
        return {"name": name, "metrics": {"ndcg@10": {"mean": 0.1, "std": None, "against": against}}}

    tables = [
        {"dataset": "tiny", "protocol": "8/1/1", "column": name, "rows": [row("a"), row("b | c")]} for name in "xy"
    ]
    lines = write_grid({"title": "t", "metric": "ndcg@10", "tables": tables}, ["a", "b | c"], "a", tmp_path)
    assert r"| b \| c | 0.1000 (+10.0%, p 0.5) | 0.1000" in (tmp_path / "grid.md").read_text(encoding="utf-8")
    assert len(lines) == 2
    assert not can_draw() or (tmp_path / "tiny-8-1-1.png").is_file()
