"""Wrong settings of the models that generate items: one plain line, before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_models import SMALL

from recbole_llm.config import Config
from recbole_llm.data.templates import read_templates
from recbole_llm.errors import UserError
from recbole_llm.training.pipeline import Fit, fit, store_of

TEMPLATES = {
    "wrapper": "'{instruction}'",
    "separator": "', '",
    "inference": "'After {history}?'",
    "sequential": "['After {history}?']",
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, so that what is asked does not hang on the language model."""
    return tmp_path_factory.mktemp("saved")


def fitted(output: Path, **more: Any) -> Fit:
    own = {"output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1}
    config = Config("AlignTokenRec", "tiny", config_dict=SMALL["AlignTokenRec"] | own | more, command_line=[])
    return fit(config, store_of(config))


def refused(folder: Path, **more: Any) -> str:
    """What is said of settings that are refused, with nothing made."""
    with pytest.raises(UserError) as told:
        fitted(folder, **more)
    assert not list((folder / "cache").glob("*-*")), "it was refused after work"
    return str(told.value)


@pytest.mark.parametrize("wrong", [{"tasks": ["query"]}, {"tasks": ["negative"], "negative_ratio": 0}], ids=str)
def test_tasks_without_a_sample_are_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    said = refused(tmp_path, **wrong)
    assert said.startswith("tasks: ") and wrong["tasks"][0] in said and "no sample" in said


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dislike_below": 3, "negative_ratio": 0}, "dislike_below chooses negatives"),
        ({"dislike_below": 3, "tasks": ["sequential"]}, "dislike_below chooses negatives"),
        ({"code_embedding_widths": [8]}, "code_embedding_widths means nothing with code_embedding: none"),
        ({"filter_items": False}, "filter_items: false means nothing with constraint: trie"),
    ],
    ids=str,
)
def test_a_setting_that_would_do_nothing_is_refused(more: dict[str, Any], words: str, tmp_path: Path) -> None:
    assert words in refused(tmp_path, **more)


@pytest.mark.parametrize("more", [{}, {"exclude_history": False}], ids=str)
def test_more_beams_than_items_are_refused_before_work(more: dict[str, Any], tmp_path: Path) -> None:
    assert "beams 1000" in refused(tmp_path, beams=1000, **more)


def test_a_run_to_go_on_from_that_is_not_there_is_told_by_the_settings_name(tmp_path: Path) -> None:
    assert refused(tmp_path, continue_from=str(tmp_path / "nowhere")).startswith("continue_from: ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("wrapper", "3"), ("wrapper", "~"), ("separator", "[',']"), ("separator", "5"), ("inference", "['{history}']"),
        ("sequential", "[3]"), ("sequential", "~"), ("sequential", "[{ask: ['{history}'], answer: '{target}'}]"),
        ("title_separator", "1"),
    ],
)  # fmt: skip
def test_a_template_that_is_no_text_is_refused(key: str, value: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.yaml"
    file.write_text("\n".join(f"{name}: {text}" for name, text in (TEMPLATES | {key: value}).items()), encoding="utf-8")
    with pytest.raises(UserError, match=f"prompts.yaml, {key}: .*text"):
        read_templates(str(file))


def test_every_prompt_can_be_asked_though_the_sequential_task_is_not_trained(output: Path) -> None:
    made = fitted(output, tasks=["text"], inference_prompts="all", eval_step=0)
    found = made.trainer.evaluate(made.test_data, load_best_model=False)
    assert made.model.prompts_asked > 1 and all(0 <= value <= 1 for value in found.values())
