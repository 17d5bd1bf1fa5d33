"""The board as text and files, `compare`, and real runs of which one saw another test interaction."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_runs import write_run

from recbole_llm.cli import main
from recbole_llm.errors import UserError
from recbole_llm.leaderboard.assemble import board_of, table_of
from recbole_llm.leaderboard.compare import compare, rows_of
from recbole_llm.leaderboard.markdown import markdown
from recbole_llm.leaderboard.paper import beside_paper
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.tables import (
    COSTS,
    CSV_COLUMNS,
    NAME_WIDTH,
    TESTED,
    WIDTH,
    _short_names,
    csv_text,
    terminal,
    write,
)
from recbole_llm.leaderboard.words import amount, seconds
from recbole_llm.training.runs import run

METRICS = [f"{name}@{k}" for name in ("ndcg", "recall", "mrr", "hit", "precision") for k in (5, 10, 20)]
TINY = Path(__file__).parent.parent / "dataset" / "tiny"


@pytest.fixture
def board(tmp_path: Path) -> dict[str, Any]:
    """GLTA well above BPR, Pop no different from it, one run refused, one row failed."""
    means = {"BPR": 0.3, "Pop": 0.3, "GLTA": 0.5}
    rows = []
    for place, (name, mean) in enumerate(means.items()):
        rng = np.random.default_rng(place)
        values = {metric: rng.normal(mean, 0.1, 100) for metric in METRICS}
        runs = [
            write_run(tmp_path / f"{name}{seed}", name, seed, values, valid=mean + (name == "BPR")) for seed in (1, 2)
        ]
        rows.append(RowRuns(name, runs, settings={"epochs": 3}))
    other = write_run(tmp_path / "other", "EASE", 7, np.full(100, 0.9), fingerprint="0123456789abcdef" * 4)
    rows.append(RowRuns("EASE | altered", [other]))
    rows.append(
        RowRuns("SASRec", failed=[{"seed": 1, "reason": "the loss is\nno number"}], settings={"model": "SASRec"})
    )
    table = table_of(rows, "toy", "by time", "", "ndcg@10", METRICS, "GLTA", None, 0.05)
    printed = {"T": {"GLTA": {"ndcg@10": 0.6}, "MF": {"ndcg@10": 0.2}, "Pop": {"ndcg@10": 0.1}}}
    stand_for = {"GLTA": "GLTA", "BPR": "MF", "Pop": "Pop"}
    beside = {"source": "", "beside": {"toy": "T"}, "rows": stand_for, "figures": printed}
    table["papers"] = [beside_paper(beside, "toy", table)]
    table["breakdowns"] = [
        {"name": "user activity", "unit": "users", "metric": "ndcg@10", "rows": {"BPR": [0.25, None]},
         "groups": [{"label": "6-19", "count": 60}, {"label": "20-", "count": 40}]}
    ]  # fmt: skip
    return board_of([table], "A board", "recbole-llm leaderboard", METRICS, "ndcg@10", 0.05) | {"commit": "abc123"}


def test_markdown_is_bold_only_where_significant_and_says_all(board: dict[str, Any]) -> None:
    board["tables"][0]["rows"][0]["metrics"]["mrr@5"]["bold"] = False
    text = markdown(board)
    quality = [line for line in text.splitlines() if line.startswith("| ") and "**" in line]
    assert len(quality) == 1 and quality[0].startswith("| GLTA |")
    assert quality[0].count("**") == 2 * (len(METRICS) - 1), "what is bold in the board, and nothing else"
    against = board["tables"][0]["rows"][0]["metrics"]["ndcg@10"]["against"]["BPR"]
    (line,) = (line for line in text.splitlines() if line.startswith("| GLTA against BPR | ndcg@10 |"))
    assert f"{against['p_adjusted']:.2g}" in line and f"{against['effect']:+.3f}" in line
    assert "**failed**: SASRec, seed 1: the loss is no number" in text
    assert "**refused**: EASE \\| altered, seed 7: judged on another split: 0123456789abcdef" in text
    for words in (
        "ffffffffffffffff (100 users, 9 items, 50 train", "policy unified", "20- (40)",
        "Best baseline: BPR, chosen by ndcg@10 on valid, never on test (BPR 1.3000, Pop 0.3000)",
        "| BPR | 0.2500 | - |", "commit `abc123`", "`recbole-llm leaderboard`", "| ndcg@10 | 0.6000 |",
        "The order of the systems beside the paper's", "- ndcg@10, 3 systems: Spearman's rho +",
    ):  # fmt: skip
        assert words in text, words
    assert "commit" not in markdown(board | {"commit": None}), "used from an installed package, there is none"
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}
        assert len(bars) == 1, f"a table whose lines differ in their cells:\n{block}"


def test_the_terminal_table_is_narrow_and_marks_what_is_better(board: dict[str, Any]) -> None:
    text = terminal(board)
    assert max(map(len, text.splitlines())) <= WIDTH
    starred = [line for line in text.splitlines() if re.search(r"\d\*", line)]
    assert len(starred) == 1 and starred[0].startswith("GLTA")
    assert "no room here for" in text and "failed: SASRec, seed 1: the loss is no number" in text
    assert "refused: EASE | altered, seed 7" in text
    lit = terminal(board, tty=True)
    assert not re.search(r"\d\*", lit)
    shown = next(line for line in lit.splitlines() if line.startswith("GLTA"))
    assert f"\x1b[1m{board['tables'][0]['rows'][0]['metrics']['ndcg@10']['mean']:.4f}\x1b[0m" in shown
    assert re.sub(r"\x1b\[\dm", "", shown).split() == starred[0].replace("*", " ").split()


def test_the_terminal_says_what_rows_do_not_share(board: dict[str, Any]) -> None:
    table = board["tables"][0]
    assert "refit_on_valid: true" not in terminal(board)
    table["rows"][0]["evaluation"] = {"refit_on_valid": True}
    assert f"refit_on_valid: true for {table['rows'][0]['name']}." in terminal(board)


def test_long_names_stay_apart(board: dict[str, Any]) -> None:
    rows = board["tables"][0]["rows"]
    rows[0]["name"], rows[1]["name"], rows[2]["name"] = "x" * 50 + "a", "x" * 50 + "b", "y" * 50
    text = terminal(board)
    assert max(map(len, text.splitlines())) <= WIDTH
    names = [line.split()[0] for line in text.splitlines() if line.startswith(("…x", "yy"))]
    assert names == ["…" + "x" * 28 + "a", "…" + "x" * 28 + "b", "y" * 29 + "…"]


def test_with_every_kind_of_test_costs_make_room(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    names = [f"A model with a teacher, alpha {place}" for place in range(3)]
    runs = [write_run(tmp_path / name, "GLTA", 1, rng.normal(0.3, 0.1, 50)) for name in names]
    rows = [RowRuns(name, [run], against=names[0] * (name != names[0])) for name, run in zip(names, runs, strict=True)]
    rows.append(RowRuns("Pop", [write_run(tmp_path / "pop", "Pop", 1, rng.normal(0.2, 0.1, 50))]))
    made = table_of(rows, "toy", "", "", "ndcg@10", ["ndcg@10"], names[1], None, 0.05)
    text = terminal(board_of([made], "A board", "", ["ndcg@10"], "ndcg@10", 0.05))
    assert "vs own" in text and "seconds" in text and "no room here for users/s" in text
    assert max(map(len, text.splitlines())) <= WIDTH


def test_csv_read_back_equals_the_json(board: dict[str, Any], tmp_path: Path) -> None:
    paths = write(board, tmp_path / "new" / "folder")
    assert [path.name for path in paths] == ["leaderboard.md", "leaderboard.csv", "leaderboard.json"]
    (table,) = json.loads(paths[2].read_text(encoding="utf-8"))["tables"]
    assert table == board["tables"][0]
    with paths[1].open(encoding="utf-8", newline="") as stream:
        reader = csv.DictReader(stream)
        lines = list(reader)
    assert tuple(reader.fieldnames or ()) == CSV_COLUMNS
    figures = {(line["row"], line["metric"]): line for line in lines}
    assert len(figures) == len(lines) == 3 * len(METRICS) + 2

    def same(cell: str, content: Any) -> bool:
        if content is None:
            return cell == ""
        return cell == content if isinstance(content, str) else float(cell) == content

    for row in table["rows"]:
        for metric, figure in row["metrics"].items():
            line = figures[row["name"], metric]
            assert all(same(line[key], figure[key]) for key in ("mean", "low", "high", "std", "valid"))
            assert all(same(line[key], row["cost"][key]) for key in COSTS)
            assert line["bold"] == str(figure["bold"]) and line["seeds"] == " ".join(map(str, row["seeds"]))
            for which in ("best_baseline", "reference"):
                against = figure["against"].get(table[which], dict.fromkeys(TESTED))
                assert all(same(line[f"{which}_{name}"], against[name]) for name in TESTED)
    assert figures["SASRec", ""]["failed"] == "seed 1: the loss is no number"
    assert figures["EASE | altered", ""]["refused"].startswith("seed 7: judged on another split")


def test_csv_columns_do_not_depend_on_the_rows(board: dict[str, Any]) -> None:
    board["tables"][0]["rows"] = board["tables"][0]["rows"][-1:]
    assert next(csv.reader(io.StringIO(csv_text(board)))) == list(CSV_COLUMNS)


@pytest.mark.parametrize(
    ("number", "shown"), [(None, "-"), (0, "0"), (999, "999"), (12928, "12.9k"), (123456, "123k"), (2.5e6, "2.5M")]
)
def test_amounts_are_short(number: float | None, shown: str) -> None:
    assert amount(number) == shown


@pytest.mark.parametrize(("number", "shown"), [(None, "-"), (0.004, "0.00"), (12.34, "12.3"), (4321.9, "4322")])
def test_seconds_are_short(number: float | None, shown: str) -> None:
    assert seconds(number) == shown


# --- compare ---------------------------------------------------------------------------------------------------------
def two_models(folder: Path) -> list[str]:
    values = np.random.default_rng(0).random(50)
    return [
        str(write_run(folder / "a1", "BPR", 1, values * 0.5)),
        str(write_run(folder / "a2", "BPR", 2, values * 0.6)),
        str(write_run(folder / "b", "GLTA", 1, values)),
    ]


def test_compare_groups_seeds_and_writes_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = two_models(tmp_path)
    assert [(row.name, len(row.files)) for row in rows_of(paths)] == [("BPR", 2), ("GLTA", 1)]
    assert main(["compare", *paths, "--reference=GLTA", "--metric=NDCG@10", f"--output={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert str(tmp_path / "out" / "leaderboard.md") in shown and "vs ref: GLTA" in shown
    content = json.loads((tmp_path / "out" / "leaderboard.json").read_text(encoding="utf-8"))
    assert (tmp_path / "out" / "leaderboard.html").is_file()
    assert content["tables"][0]["reference"] == "GLTA" and content["versions"] == {"recbole_llm": "1"}


def test_a_setting_that_is_none_is_one_that_an_earlier_run_had_not(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(50)
    configs: list[dict[str, Any]] = [{"epochs": 1}, {"epochs": 1, "clip_grad_norm": None}]
    paths = [str(write_run(tmp_path / str(at), "BPR", at, values, config=own)) for at, own in enumerate(configs)]
    assert [(row.name, len(row.files)) for row in rows_of(paths)] == [("BPR", 2)]


def test_a_result_without_figures_on_test_is_told(tmp_path: Path) -> None:
    paths = two_models(tmp_path)
    file = Path(paths[0]) / "result.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    del result["test"]
    file.write_text(json.dumps(result), encoding="utf-8")
    with pytest.raises(UserError, match="has no figures on test; is it the result of a finished run"):
        compare(paths)


def test_rows_of_one_model_are_called_by_what_differs(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(50)
    configs: list[dict[str, Any]] = [
        {"epochs": 1, "gpu_id": "0"}, {"epochs": 2, "gpu_id": "1"}, {"epochs": 2, "refit_on_valid": True},
    ]  # fmt: skip
    paths = [
        str(write_run(tmp_path / str(place), "BPR", place, values, config=config))
        for place, config in enumerate(configs)
    ]
    assert [row.name for row in rows_of(paths)] == [
        "BPR (epochs 1, refit_on_valid null)", "BPR (epochs 2, refit_on_valid null)",
        "BPR (epochs 2, refit_on_valid true)",
    ]  # fmt: skip
    # Its parts have other settings, which its own do not tell.
    tuned = [
        str(write_run(tmp_path / f"tuned{seed}", "GLTA", seed, values, config={"tuned": seed == 5})) for seed in (4, 5)
    ]
    assert [row.name for row in rows_of(tuned)] == ["GLTA (tuned null)", "GLTA (tuned true)"]
    many = str(write_run(tmp_path / "many", "BPR", 9, values, config={key: 1 for key in "abcdef"}))
    assert rows_of([*paths, many])[-1].name == f"BPR ({many})"


def around_others(folder: Path) -> list[str]:
    """Runs of a model that wraps others, and one of a model without."""
    values = np.random.default_rng(0).random(50)
    shared = {"base_model": "AlignTokenRec", "cf_model": "SASRec", "alpha": 0.1, "epochs": 3}
    configs: list[dict[str, Any]] = [
        shared,
        shared | {"alpha": 0.3},
        shared | {"cf_model": "LightGCN"},
        shared | {"base_model": "LCRec", "epochs": 4, "beams": 5, "tasks": [], "prompts": "lcrec"},
    ]
    runs = [write_run(folder / f"{place}", "TCA4Rec", 1, values, config=own) for place, own in enumerate(configs)]
    return [*map(str, runs), str(write_run(folder / "plain", "AlignTokenRec", 1, values, config={"epochs": 3}))]


def test_rows_of_a_wrapper_are_called_by_what_is_in_it(tmp_path: Path) -> None:
    rows = rows_of(around_others(tmp_path))
    assert [row.name for row in rows] == [
        "TCA4Rec (AlignTokenRec, SASRec, alpha 0.1)", "TCA4Rec (AlignTokenRec, SASRec, alpha 0.3)",
        "TCA4Rec (AlignTokenRec, LightGCN, alpha 0.1)", "TCA4Rec (LCRec, SASRec)", "AlignTokenRec",
    ]  # fmt: skip
    assert rows[1].settings == {"base_model": "AlignTokenRec", "cf_model": "SASRec", "alpha": 0.3}
    assert [row.name for row in rows_of(around_others(tmp_path / "again")[:1])] == ["TCA4Rec (AlignTokenRec, SASRec)"]


def test_long_names_that_differ_in_their_middle_stay_apart() -> None:
    names = [f"TCA4Rec around AlignTokenRec, {alpha}, by SASRec with tuned settings" for alpha in "abc"]
    names += [f"{start} of a long name that goes on and on, {end}" for start in "xy" for end in ("p", "q")]
    short = _short_names(names)
    assert len(set(short)) == len(names) and all(len(one) <= NAME_WIDTH for one in short[3:])


@pytest.mark.parametrize(
    ("changes", "more", "words"),
    [
        ({"fingerprint": "0" * 64}, [], r"other \(Pop\) cannot be compared with .*a1: judged on another split"),
        ({"policy": "recbole"}, [], "policy recbole"),
        ({"seed": 1, "model": "BPR"}, [], "seed 1 stands twice"),
        ({}, ["--metric=NDGC@10"], "did you mean 'ndcg@10'"),
        ({}, ["--reference=GTLA"], "did you mean 'GLTA'"),
        ({}, ["--outptu=x"], "did you mean 'output'"),
        ({}, ["--output"], "not understood"),
    ],
)
def test_compare_refuses_in_one_line(
    tmp_path: Path, changes: dict[str, Any], more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = two_models(tmp_path)
    other = {"model": "Pop", "seed": 5} | changes
    values = np.random.default_rng(0).random(50)
    paths.append(str(write_run(tmp_path / "other", other.pop("model"), other.pop("seed"), values, **other)))
    assert main(["compare", *paths, *more]) == 2
    said = capsys.readouterr()
    assert re.search(words, said.err) and len(said.err.splitlines()) == 1 and not said.out


def test_compare_takes_two_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="two runs or more"):
        compare(two_models(tmp_path)[:1])


# --- real runs -------------------------------------------------------------------------------------------------------
def altered(folder: Path) -> Path:
    """A copy of the data set in which one user's last interaction, his test one, is with another item."""
    shutil.copytree(TINY, folder / "tiny")
    file = folder / "tiny" / "tiny.inter"
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    user, item, rating, time = zip(*(line.split("\t") for line in lines), strict=True)
    last = max((place for place in range(len(lines)) if user[place] == user[0]), key=lambda place: float(time[place]))
    seen = {item[place] for place in range(len(lines)) if user[place] == user[0]}
    new = next(name for name in sorted(set(item)) if name not in seen)
    lines[last] = "\t".join([user[last], new, rating[last], time[last]])
    file.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
    return folder


def test_a_row_that_saw_one_other_test_interaction_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def of(model: str, seed: int, **more: Any) -> str:
        """A run, by the copy of its result that a suite would read."""
        file = tmp_path / "cells" / f"{model}-{seed}.json"
        settings = {
            "epochs": 2, "seed": seed, "output_dir": str(tmp_path / "saved"), "show_progress": False, "gpu_id": "",
            "tensorboard": False, "state": "WARNING", "topk": [5, 10], "result_file": str(file),
        }  # fmt: skip
        run(model, "tiny", config_dict=settings | more)
        return str(file)

    files = {model: [of(model, seed) for seed in (1, 2)] for model in ("Pop", "BPR")}
    odd = of("EASE", 1, data_path=str(altered(tmp_path / "data")))
    rows = [*(RowRuns(model, runs) for model, runs in files.items()), RowRuns("EASE", [odd])]
    made = table_of(rows, "tiny", "", "", "ndcg@10", ["ndcg@10", "recall@5"], None, None, 0.05)
    ease = made["rows"][-1]
    assert (ease["name"], ease["metrics"], ease["runs"]) == ("EASE", {}, [])
    own = json.loads(Path(odd).read_text(encoding="utf-8"))["split"]
    assert own["test"] == made["split"]["test"], "the same sizes: only the fingerprint tells them apart"
    assert own["fingerprint"][:16] in ease["refused"][0]["reason"]
    assert made["split"]["fingerprint"][:16] in ease["refused"][0]["reason"]
    assert {row["name"] for row in made["rows"] if row["metrics"]} == {"Pop", "BPR"}
    for row in made["rows"][:2]:
        assert row["at_k"]["ndcg"][9] == pytest.approx(row["metrics"]["ndcg@10"]["mean"])
        assert row["cost"]["tokens"] == 0 and row["cost"]["seconds"] > 0
    board = board_of([made], "real", "test", ["ndcg@10", "recall@5"], "ndcg@10", 0.05)
    assert "**refused**: EASE, seed 1: judged on another split" in markdown(board)
    assert board["versions"]["recbole"] == "1.2.1"

    assert main(["compare", *files["Pop"], odd]) == 2
    assert f"{odd} (EASE) cannot be compared" in capsys.readouterr().err
