"""Settings of a suite's row that are chosen on valid: what runs, what is taken, what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_llm.errors import UserError
from recbole_llm.leaderboard.board import asked_for, leaderboard
from recbole_llm.leaderboard.choice import choices_of, decide
from recbole_llm.leaderboard.markdown import markdown
from recbole_llm.leaderboard.report import page
from recbole_llm.leaderboard.study import Study
from recbole_llm.leaderboard.suite import marked
from recbole_llm.leaderboard.tables import csv_text

# The best of them on valid is not the first.
WEIGHTS = [1000000.0, 1.0, 250.0]
STUDY: dict[str, Any] = {
    "datasets": ["tiny"],
    "seeds": [3, 4],
    "settings": {"gpu_id": "", "topk": [5, 10]},
    "rows": {
        "Pop": {"model": "Pop"},
        "EASE": {"model": "EASE", "choose": {"reg_weight": WEIGHTS}, "against": "Pop"},
    },
}


def suite(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return f"--suite={path}"


def run(*arguments: str) -> tuple[str, list[str], int]:
    said: list[str] = []
    text, failed = leaderboard([*arguments, "--cores=1"], said.append)
    return text, [line for line in said if line.startswith("[")], failed


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "leaderboard.json").read_text(encoding="utf-8"))


def row_of(folder: Path, name: str) -> dict[str, Any]:
    (table,) = read(folder)["tables"]
    return next(row for row in table["rows"] if row["name"] == name)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    folder = tmp_path_factory.mktemp("choices") / "out"
    text, lines, failed = run(suite(folder.parent / "s.yaml"), f"--output={folder}")
    assert not failed
    return folder, text, lines


def test_all_values_run_with_the_first_seed_and_the_best_on_valid_with_all(made: tuple[Path, str, list[str]]) -> None:
    folder, _, lines = made
    row = row_of(folder, "EASE")
    # Two seeds of Pop, three values, and one further seed of one of them.
    assert len(lines) == 6 and lines[-1].startswith("[6/6]")
    valid = {}
    for file in (folder / "cells").glob("*.json"):
        result = json.loads(file.read_text(encoding="utf-8"))
        if result["model"] == "EASE":
            valid.setdefault(result["config"]["reg_weight"], {})[result["seed"]] = result["valid"]["ndcg@10"]
    assert set(valid) == set(WEIGHTS) and len({own[3] for own in valid.values()}) == 3
    best = max(valid, key=lambda weight: valid[weight][3])
    assert best not in (WEIGHTS[0], WEIGHTS[-1]), "else the first or the last value would do as well"
    assert {weight: sorted(own) for weight, own in valid.items()} == {
        weight: [3, 4] if weight == best else [3] for weight in WEIGHTS
    }
    assert row["seeds"] == [3, 4] and row["settings"] == {"reg_weight": best}
    assert row["choice"] == {
        "values": {"reg_weight": best}, "metric": "ndcg@10", "seed": 3,
        "tried": [{"values": {"reg_weight": one}, "valid": valid[one][3], "reason": ""} for one in WEIGHTS],
    }  # fmt: skip


def test_every_form_says_what_was_chosen_among_what(made: tuple[Path, str, list[str]]) -> None:
    folder, text, _ = made
    choice = row_of(folder, "EASE")["choice"]
    (best,) = choice["values"].values()
    for form in (text, (folder / "leaderboard.md").read_text(encoding="utf-8")):
        flat = " ".join(form.split())
        assert f"EASE: reg_weight {best}, chosen by ndcg@10 on valid, never on test, with seed 3 alone" in flat
        for tried in choice["tried"]:
            assert f"reg_weight {tried['values']['reg_weight']}: {tried['valid']:.4f}" in flat
    assert f",reg_weight {best}" in csv_text(read(folder))
    assert json.dumps(choice) in page(read(folder))
    assert "Chosen" not in markdown(read(folder) | {"tables": []})


def test_its_row_is_tested_against_its_own_base(made: tuple[Path, str, list[str]]) -> None:
    folder, text, _ = made
    own = row_of(folder, "EASE")["metrics"]["ndcg@10"]["own"]
    assert own["row"] == "Pop" and "vs own" in text and "Against its own base" in text
    assert "| EASE against its own base Pop |" in (folder / "leaderboard.md").read_text(encoding="utf-8")


def test_what_is_there_is_not_run_again_and_a_fixed_row_takes_the_chosen_runs(
    made: tuple[Path, str, list[str]], tmp_path: Path
) -> None:
    folder = made[0]
    again = suite(folder.parent / "s.yaml")
    assert run(again, f"--output={folder}")[1:] == ([], 0)
    (best,) = row_of(folder, "EASE")["choice"]["values"].values()
    fixed = STUDY["rows"] | {"EASE": {"model": "EASE", "reg_weight": best}}
    assert run(suite(tmp_path / "s.yaml", rows=fixed), f"--output={folder}")[1:] == ([], 0)
    assert row_of(folder, "EASE")["choice"] is None
    run(again, f"--output={folder}")


def broken(folder: Path) -> Path:
    """A folder of data that no run can read, as it has no interaction."""
    (folder / "data" / "tiny").mkdir(parents=True)
    (folder / "data" / "tiny" / "tiny.inter").write_text("user_id:token\titem_id:token\n", encoding="utf-8")
    (folder / "data" / "tiny" / "where").write_text(str(folder), encoding="utf-8")  # Equal data are one run.
    return folder / "data"


def test_a_value_that_fails_is_named_and_another_is_chosen(tmp_path: Path) -> None:
    rows = {"EASE": {"model": "EASE", "choose": {"data_path": [str(broken(tmp_path)), "dataset"]}}}
    text, _, failed = run(suite(tmp_path / "s.yaml", rows=rows, seeds=[1]), f"--output={tmp_path / 'out'}")
    row = row_of(tmp_path / "out", "EASE")
    assert failed == 1 and row["choice"]["values"] == {"data_path": "dataset"} and row["choice"]["tried"][0]["reason"]
    assert row["failed"][0]["reason"].startswith(f"data_path {tmp_path}") and "data: failed" in " ".join(text.split())


def test_a_value_that_failed_in_an_earlier_call_leaves_its_row_its_figures(tmp_path: Path) -> None:
    rows = {
        "Pop": {"model": "Pop"},
        "EASE": {"model": "EASE", "choose": {"data_path": [str(broken(tmp_path)), "dataset"]}},
    }
    words = [suite(tmp_path / "s.yaml", rows=rows), f"--output={tmp_path / 'out'}"]
    first = run(*words)
    before = row_of(tmp_path / "out", "EASE")
    assert first[2] == 1 and before["metrics"]
    _, lines, failed = run(*words, "--only=Pop")
    assert (lines, failed) == ([], 0)
    assert row_of(tmp_path / "out", "EASE") == before
    # It is tried again where its row is run.
    assert len(run(*words)[1]) == 1


def test_where_no_value_runs_nothing_is_chosen_and_no_further_seed_runs(tmp_path: Path) -> None:
    nowhere = [str(broken(tmp_path / place)) for place in "ab"]
    rows = {"EASE": {"model": "EASE", "choose": {"data_path": nowhere}}}
    _, lines, failed = run(suite(tmp_path / "s.yaml", rows=rows), f"--output={tmp_path / 'out'}")
    row = row_of(tmp_path / "out", "EASE")
    assert (failed, len(lines)) == (2, 2) and row["choice"]["values"] is None and not row["metrics"]


def write(path: Path, **valid: float) -> Path:
    path.write_text(json.dumps({"valid": valid}), encoding="utf-8")
    return path


def test_the_best_is_taken_of_equal_ones_the_first_and_nothing_before_all_are_over(tmp_path: Path) -> None:
    low, high = write(tmp_path / "low.json", m=0.1), write(tmp_path / "high.json", m=0.2)
    other = write(tmp_path / "other.json", n=0.9)
    runs = [({"a": place}, file, "") for place, file in enumerate((low, high, high, other))]
    found = decide(runs, "m", 7)
    assert found is not None and found["values"] == {"a": 1} and found["seed"] == 7
    assert found["tried"][3]["reason"] == "it has no m on valid"
    assert decide([*runs, ({"a": 4}, None, "")], "m", 7) is None


def test_several_settings_are_combined(tmp_path: Path) -> None:
    assert choices_of("x", {"a": [1, 2], "b": ["u", "v"]}) == [
        {"a": 1, "b": "u"}, {"a": 1, "b": "v"}, {"a": 2, "b": "u"}, {"a": 2, "b": "v"},
    ]  # fmt: skip
    rows = {"EASE": {"model": "EASE", "choose": {"reg_weight": [1.0, 2.0]}}, "Pop": {"model": "Pop"}}
    asked = asked_for([suite(tmp_path / "s.yaml", rows=rows)])
    study = Study(marked(asked.suite, tmp_path, [], {}), tmp_path, "NDCG@10")
    assert len({cell.mark for cell in study.cells}) == len({str(cell) for cell in study.cells}) == 6
    assert [str(cell) for cell in study.wanted()] == [
        "tiny, EASE, reg_weight 1.0, seed 3", "tiny, EASE, reg_weight 2.0, seed 3", "tiny, Pop, seed 3",
        "tiny, Pop, seed 4",
    ]  # fmt: skip
    assert study.expected() == 5


@pytest.mark.parametrize(
    ("row", "more", "words"),
    [
        ({"choose": {"reg_weight": [1.0]}}, [], "EASE.choose.reg_weight should be a list of two different values"),
        ({"choose": {"reg_weight": [1.0, 1.0]}}, [], "a list of two different values or more, but is"),
        ({"choose": 3}, [], "EASE.choose should read"),
        ({"choose": {"reg_weight": list(range(1, 70))}}, [], "69 combinations, more than 64; .*tune"),
        ({"choose": {"reg_weigth": [1.0, 2.0]}}, [], "unknown setting 'reg_weigth'"),
        ({"choose": {"seed": [1, 2]}}, [], "choose: seed cannot be set here; a suite has seeds"),
        ({"choose": {"reg_weight": [1.0, 2.0]}, "reg_weight": 1.0}, [], "has reg_weight and chooses it too"),
        ({"choose": {"model": ["EASE", "BPR"]}}, [], "has model and chooses it too"),
        ({"choose": {"topk": [[10], [20]]}}, ["--topk=[10]"], "topk is chosen on valid"),
        ({"choose": {"reg_weight": [1.0, 2.0]}}, ["--EASE.reg_weight=3"], "reg_weight is chosen on valid"),
        ({"against": "Popp"}, [], "against should be another row, but is 'Popp'; did you mean 'Pop'"),
        ({"against": "EASE"}, [], "against should be another row, but is 'EASE'"),
    ],
)
def test_mistakes_are_refused_before_any_work(tmp_path: Path, row: dict[str, Any], more: list[str], words: str) -> None:
    rows = {"EASE": {"model": "EASE"} | row, "Pop": {"model": "Pop"}}
    with pytest.raises(UserError, match=words):
        leaderboard([suite(tmp_path / "s.yaml", rows=rows), f"--output={tmp_path / 'out'}", *more])
    assert not (tmp_path / "out").exists()
