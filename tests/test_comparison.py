"""Runs beside each other: averaged over seeds, paired by user, refused when they were not judged alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from recbole_llm.errors import UserError
from recbole_llm.evaluation.comparison import paired_test, read_run, row_of


def write_run(folder: Path, model: str, seed: int, values: np.ndarray, **evaluation: Any) -> Path:
    folder.mkdir(parents=True)
    users = np.array([f"u{number}" for number in np.random.default_rng(seed).permutation(len(values))])
    order = [int(user[1:]) for user in users]
    result = {
        "model": model,
        "seed": seed,
        "per_user": "per_user.npz",
        "split": {"fingerprint": evaluation.pop("fingerprint", "f" * 64)},
        "evaluation": {"policy": "unified", "exclude_history": True, "eval_unit": "user", "ranking": "full"}
        | evaluation,
    }
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    np.savez(folder / "per_user.npz", user_id=users, **{"ndcg@10": values[order]})
    return folder


def test_users_are_paired_by_id_and_seeds_averaged(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base, better, best = rng.random(50), rng.random(50), rng.random(50)
    runs = [
        write_run(tmp_path / "a", "A", 1, base),
        write_run(tmp_path / "b1", "B", 2, better),
        write_run(tmp_path / "b2", "B", 3, best),
    ]
    first, second = row_of("A", runs[:1], runs[0]), row_of("B", runs[1:], runs[0])
    assert (first.model, first.seeds, second.seeds) == ("A", 1, 2)
    gain, p = paired_test(second, first, "ndcg@10")
    mean = (better + best) / 2
    assert gain == pytest.approx((mean - base).mean())
    assert p == pytest.approx(stats.ttest_rel(mean, base).pvalue)
    assert paired_test(first, first, "ndcg@10") == (0.0, 1.0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fingerprint": "0" * 64}, "different splits"),
        ({"policy": "recbole"}, "policy"),
        ({"exclude_history": False}, "exclude_history"),
    ],
)
def test_rows_that_were_not_judged_alike_are_refused_by_name(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    one = write_run(tmp_path / "one", "A", 1, np.ones(4))
    other = write_run(tmp_path / "other", "B", 1, np.ones(4), **change)
    with pytest.raises(UserError, match=words) as caught:
        row_of("B", [other], like=one)
    assert "other" in str(caught.value)


def test_a_folder_without_a_result_names_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "GLTA-tiny-1", "A", 1, np.ones(4))
    with pytest.raises(UserError, match="GLTA-tiny-1"):
        read_run(tmp_path / "GLTA-tiny-2")
