"""Whether a difference holds from seed to seed: figures, and where a leaderboard says that it does not."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_runs import write_run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from recbole_llm.leaderboard.assemble import board_of, table_of
from recbole_llm.leaderboard.markdown import markdown
from recbole_llm.leaderboard.over_seeds import over_seeds
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.tables import csv_text, terminal
from recbole_llm.leaderboard.words import unlike_seeds

METRIC = "ndcg@10"
USERS = 400


def board_with(tmp_path: Path, means: dict[str, dict[int, float]], **changes: Any) -> dict[str, Any]:
    """A board of rows with these means by seed; users differ alike in all rows, so that small differences show."""
    noise = np.random.default_rng(1).normal(0, 0.1, USERS)
    noise -= noise.mean()
    rows = []
    for place, (name, by_seed) in enumerate(means.items()):
        model = "Pop" if name == "base" else "GLTA"
        own = np.random.default_rng(place + 10).normal(0, 0.01, USERS)
        files = [
            write_run(tmp_path / f"{name}-{seed}", model, seed, noise + own - own.mean() + mean)
            for seed, mean in by_seed.items()
        ]
        rows.append(RowRuns(name, files, against="" if name == "base" else "base"))
    asked: dict[str, Any] = {
        "dataset": "toy", "protocol": "", "column": "", "metric": METRIC, "metrics": [METRIC], "reference": "base",
        "baselines": ["base"], "alpha": 0.05,
    }  # fmt: skip
    return board_of([table_of(rows, **asked | changes)], "A board", "recbole-llm leaderboard", [METRIC], METRIC, 0.05)


def own_test(board: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = (row for row in board["tables"][0]["rows"] if row["name"] == name)
    found: dict[str, Any] = row["metrics"][METRIC]["own"]
    return found


BASE = {1: 0.30, 2: 0.31, 3: 0.29}
# Over users both are far above the base; one of them in two seeds of three alone.
STEADY = {1: 0.32, 2: 0.332, 3: 0.31}
MOODY = {1: 0.35, 2: 0.36, 3: 0.28}


def test_every_test_tells_the_seeds_one_by_one(tmp_path: Path) -> None:
    board = board_with(tmp_path, {"base": BASE, "steady": STEADY, "moody": MOODY})
    for name, means, alike in (("steady", STEADY, 3), ("moody", MOODY, 2)):
        found = own_test(board, name)
        differences = [means[seed] - BASE[seed] for seed in (1, 2, 3)]
        assert [one["seed"] for one in found["by_seed"]] == [1, 2, 3]
        assert [one["difference"] for one in found["by_seed"]] == pytest.approx(differences)
        # The paired t-test by its formula, over three seeds.
        t = np.mean(differences) / (np.std(differences, ddof=1) / math.sqrt(3))
        assert found["seeds_p"] == pytest.approx(2 * stats.t.sf(abs(t), 2))
        assert (found["seeds_alike"], found["seeds_both"], found["mark"]) == (alike, 3, "+")
        (row,) = (row for row in board["tables"][0]["rows"] if row["name"] == name)
        against = row["metrics"][METRIC]["against"]["base"]
        assert against["by_seed"] == found["by_seed"] and against["seeds_p"] == found["seeds_p"]


def test_a_board_names_what_seeds_do_not_share(tmp_path: Path) -> None:
    board = board_with(tmp_path, {"base": BASE, "steady": STEADY, "moody": MOODY})
    text = markdown(board)
    (note,) = unlike_seeds(board, board["tables"][0])
    assert note.startswith("One sign in every seed: 1 of 2 significant differences of ndcg@10; not moody against base")
    assert "moody against base (2 of 3)" in note and "steady" not in note
    assert f"- {note}" in text and note.split(". ")[0] in " ".join(terminal(board).split())
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert lines["moody against its own base base"].split(" | ")[-3:] == [
        "2 of 3", f"{own_test(board, 'moody')['seeds_p']:.2g}", "+ |"
    ]  # fmt: skip
    verdicts = {name: line for name, line in lines.items() if name in ("steady", "moody")}
    assert "+ (2 of 3 seeds)" not in verdicts["steady"]
    assert any("+ (2 of 3 seeds)" in line for line in text.splitlines() if line.startswith("| moody |"))
    (row,) = (line for line in csv.DictReader(io.StringIO(csv_text(board))) if line["row"] == "moody")
    for part in ("own_base", "reference", "best_baseline"):
        assert (row[f"{part}_seeds_alike"], row[f"{part}_seeds_both"]) == ("2", "3")
        assert float(row[f"{part}_seeds_p"]) == pytest.approx(own_test(board, "moody")["seeds_p"])


def test_seeds_that_agree_are_said_to_and_one_seed_says_nothing(tmp_path: Path) -> None:
    board = board_with(tmp_path / "three", {"base": BASE, "steady": STEADY})
    assert unlike_seeds(board, board["tables"][0]) == [
        "One sign in every seed: 1 of 1 significant differences of ndcg@10."
    ]
    assert "seeds)" not in "".join(line for line in markdown(board).splitlines() if line.startswith("| steady |"))
    alone = board_with(tmp_path / "one", {"base": {1: 0.3}, "steady": {1: 0.32}})
    found = own_test(alone, "steady")
    assert (found["seeds_both"], found["seeds_p"], found["mark"]) == (1, None, "+")
    assert unlike_seeds(alone, alone["tables"][0]) == [] and "in every seed" not in terminal(alone)
    (line,) = (line for line in markdown(alone).splitlines() if line.startswith("| steady against its own base"))
    assert line.endswith("| - | - | + |")


def test_only_seeds_that_both_rows_have_are_set_against_each_other(tmp_path: Path) -> None:
    board = board_with(tmp_path, {"base": {1: 0.30, 3: 0.29}, "row": {3: 0.32, 2: 0.5, 1: 0.33}})
    found = own_test(board, "row")
    assert {one["seed"]: one["difference"] for one in found["by_seed"]} == pytest.approx({1: 0.03, 3: 0.03})
    assert found["seeds_both"] == 2


def test_rows_that_draw_nothing_have_no_p_over_seeds() -> None:
    assert over_seeds({1: 0.3, 2: 0.3, 3: 0.3}, {1: 0.1, 2: 0.1, 3: 0.1}).p is None
    third = 0.1 + 0.2
    same = over_seeds({1: third, 2: 0.3}, {1: 0.3, 2: 0.3})
    assert (same.p, same.alike, same.by_seed) == (None, 2, {1: 0.0, 2: 0.0}), "what is rounding is no difference"
    assert over_seeds({1: 0.3}, {2: 0.3}).by_seed == {}


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=6, unique=True))
def test_turned_around_it_is_the_same_with_the_other_sign(pairs: list[tuple[float, float]]) -> None:
    row, base = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    one, other = over_seeds(row, base), over_seeds(base, row)
    assert one.alike == other.alike and 0 <= one.alike <= len(pairs)
    assert {seed: -difference for seed, difference in one.by_seed.items()} == other.by_seed
    assert one.p == pytest.approx(other.p) if one.p is not None else other.p is None
