"""`inspect dataset`: what a data set and its split hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SHARED

from recbole_llm.inspection import inspect

GAMES = "amazon-games-lcrec"


def test_lengths_are_counted_from_the_file() -> None:
    rows = [line.split("\t")[:2] for line in (ROOT / "dataset/tiny/tiny.inter").read_text().splitlines()[1:]]
    pairs = {tuple(row) for row in rows}
    lengths = np.unique([user for user, _ in pairs], return_counts=True)[1]
    text = inspect(["dataset", "tiny"])
    # Repeats of a user and item are dropped where they would be a target, and told; tiny has none among its targets.
    assert f"of {len(lengths)} users; mean {len(rows) / len(lengths):.3f}, min" in text
    assert f"max {lengths.max()}; {(lengths > 20).mean():.2%} have more than 20" in text


def test_a_data_set_of_which_no_row_can_train(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    rows = [f"u{user}\ti{item}\t{item}\n" for user in range(4) for item in range(2)]
    (tmp_path / "x/x.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\n" + "".join(rows))
    words = [f"--data_path={tmp_path}", "--load_col={inter: [user_id, item_id, timestamp]}"]
    assert "train items a user: none" in inspect(["dataset", "x", *words])


def test_games_is_the_papers_games() -> None:
    """ "Semantic Convergence" (Li et al., AAAI 2025), table 2: 50,546 users, 16,859 items, 8.962 a user, 4.80% long."""
    if not (SHARED / GAMES).is_dir():
        pytest.skip(f"REAL DATA MISSING: no folder {Path('..') / 'shared/data' / GAMES}; table 2 is not checked")
    text = inspect(["dataset", GAMES, f"--data_path={SHARED}"])
    assert "users           50546" in text and "items           16859" in text
    assert "452989 of 50546 users; mean 8.962" in text and "4.80% have more than 20" in text
