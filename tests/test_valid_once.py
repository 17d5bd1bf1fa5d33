"""A run that has just trained does not rank valid again for its result, where it would see what it has seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SMALL

from recbole_llm.training import trainer
from recbole_llm.training.runs import run


@pytest.mark.parametrize(
    ("model", "more", "prompts", "again"),
    [
        ("AlignTokenRec", {}, 1, False),
        ("MSL", {"ranking": "pruned"}, 1, False),
        ("AlignTokenRec", {"inference_prompts": "all"}, 5, True),
        ("GLTA", {}, 1, False),
        ("SASRec", {}, 1, True),
    ],
    ids=str,
)
def test_valid_is_ranked_again_where_it_must_be(
    model: str, more: dict[str, Any], prompts: int, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranked: list[str] = []
    plain = trainer.measure

    def counted(made: Any, *given: Any) -> Any:
        ranked.append(type(made).__name__)
        return plain(made, *given)

    monkeypatch.setattr(trainer, "measure", counted)
    own = {
        "output_dir": str(tmp_path), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 2,
        "eval_step": 1, "evaluate_parts": False,
    }  # fmt: skip
    found = []
    for _ in range(2):
        ranked.clear()
        result = run(model, "tiny", config_dict=SMALL.get(model, {}) | own | more, command_line=[])
        found.append((result["valid"], result["test"], result["evaluation"], ranked.count(model)))
    (*trained, times), (*from_cache, asked) = found
    assert trained == from_cache and trained[0]
    # What is found has valid and test ranked, once a prompt; training saw valid after each of two epochs.
    assert asked == 2 * prompts and times == 2 + (asked if again else prompts)
