"""``title_match``: items of equal titles count as one, in every file and table that a run's figures go into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import SMALL

from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.leaderboard.rows import RowRuns, Run, admit
from recbole_llm.training.runs import run

# Genres for titles: most are shared.
OWN = SMALL["TALLRec"] | {
    "item_title": "{genre}", "beams": 20, "epochs": 0, "eval_step": 0, "show_progress": False, "tensorboard": False,
    "gpu_id": "", "topk": [1, 5], "valid_metric": "NDCG@5",
}  # fmt: skip
TEACHER = {"cf_model.epochs": 1, "cf_model.eval_step": 0, "cf_model.hidden_size": 16, "cf_model.inner_size": 16}


def made(output: Path, **more: Any) -> dict[str, Any]:
    return run("TALLRec", "tiny", config_dict=OWN | {"output_dir": str(output)} | more)


@pytest.mark.parametrize("more", [{}, {"eval_args": {"split": {"RS": [0.5, 0.1, 0.4]}, "order": "RO"}}], ids=str)
def test_rankings_are_of_titles_as_the_metrics_are(tmp_path: Path, more: dict[str, Any]) -> None:
    result = made(tmp_path, title_match=True, **more)
    read = Run.read(result["result_file"])
    assert read.at_k["ndcg"][4] == pytest.approx(result["test"]["ndcg@5"])
    rankings = Rankings.read(Path(result["result_file"]).parent / "rankings.npz")
    assert len(np.unique(rankings.targets)) < 20, "no titles are shared; the test would pass blindly"
    if not more:
        other = made(tmp_path, title_match=True, item_title="{genre} {title}")
        assert other["evaluation"]["counted"] != result["evaluation"]["counted"] == read.judged()["counted"]


def test_a_search_finds_titles_as_a_full_ranking_does(tmp_path: Path) -> None:
    settings = OWN | {"title_match": True, "beams": 20, "epochs": 2, "adapter": "full", "adapter_learning_rate": 0.002}
    found = {}
    for ranking in ("full", "beam", "pruned"):
        result = run("TALLRec", "tiny", config_dict=settings | {"output_dir": str(tmp_path), "ranking": ranking})
        found[ranking] = Rankings.read(Path(result["result_file"]).parent / "rankings.npz").top
        assert result["test"]["ndcg@5"] > 0
    # There are fewer titles than beams, so that no search can miss one.
    assert (found["beam"] == found["full"]).all() and (found["pruned"] == found["full"]).all()


def test_agreement_is_of_titles_too(tmp_path: Path) -> None:
    result = made(tmp_path, title_match=True, cf_guidance=0.0, ranking="full", exclude_history=False, **TEACHER)
    assert result["consistency"]["cf_model"]["overlap@5"] == pytest.approx(1)


def test_a_table_counts_items_or_titles_and_never_both(tmp_path: Path) -> None:
    files = [made(tmp_path, title_match=match, seed=seed)["result_file"] for match, seed in ((False, 1), (True, 1))]
    lines, _ = admit([RowRuns("items", files[:1]), RowRuns("titles", files[1:])])
    assert [len(line.runs) for line in lines] == [1, 0]
    assert "title_match True (this table's is False)" in lines[1].refused[0]["reason"]
