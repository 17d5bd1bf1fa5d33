"""The paper's switches, alone and together: each run trains, ranks, and does what the switch is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SMALL

from recbole_llm.config import Config
from recbole_llm.data.phases import VALID
from recbole_llm.tasks import known_tasks
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.tasks.language import QUERY, TEXT
from recbole_llm.training.pipeline import Fit, fit, store_of

BEHAVIOUR_ONLY = {"text_task": False, "query_task": False}
# Its name in the paper: what it is called here.
SWITCHES: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "ED (table 3)": {"item_tokens": "ed"},
    "w/o LA (table 3)": {"code_text_weight": 0.0},
    "w/o NS (table 3)": {"negative_ratio": 0},
    **{f"1:{ratio} (table 4)": {"negative_ratio": ratio} for ratio in (2, 3, 4, 5)},
    "N = 1 (table 5)": {"item_tokens": "raw", "code_levels": 1},
    **{f"N = {levels} (table 5)": {"code_levels": levels} for levels in (2, 3, 5)},
    "a larger language model (table 6)": {"llm_layers": 2, "llm_hidden_size": 32},
    "2 layers (table 7)": {"code_embedding": "mlp2"},
    "3 layers (table 7)": {"code_embedding": "mlp3", "code_embedding_widths": [8, 12]},
    "behaviour only (table 8)": BEHAVIOUR_ONLY,
    "one prompt": {"prompt_set": "first"},
    "the first S - 1 items": {"merge_valid": True},
    "every prefix": {"prefixes_per_user": None, "train_positions": "response"},
    # Together.
    "ED, 2 layers, 1:2, merged": {
        "item_tokens": "ed", "code_embedding": "mlp2", "negative_ratio": 2, "merge_valid": True, "adapter": "lora",
    },
    "w/o LA, w/o NS, behaviour only, one prompt": {
        "code_text_weight": 0.0, "negative_ratio": 0, "prompt_set": "first", **BEHAVIOUR_ONLY,
    },
    "N = 1, 1:5, merged, one prompt": {
        "item_tokens": "raw", "code_levels": 1, "negative_ratio": 5, "merge_valid": True, "prompt_set": "first",
    },
    "N = 5, 3 layers, numbered, behaviour only": {
        "code_levels": 5, "code_embedding": "mlp3", "code_collisions": "extra_token", **BEHAVIOUR_ONLY,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache, so that what a switch does not touch is made once."""
    return tmp_path_factory.mktemp("saved")


def fitted(output: Path, **more: Any) -> Fit:
    # The width of the tokens of N = 2 has to hold 80 items.
    own = SMALL["AlignTokenRec"] | {"code_size": 10, "prefixes_per_user": 1}
    base = {
        "output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
        "evaluate_parts": False,
    }  # fmt: skip
    config = Config("AlignTokenRec", "tiny", config_dict={**own, **base, **more}, command_line=[])
    return fit(config, store_of(config))


def counts(made: Fit) -> dict[str, int]:
    """Samples of an epoch by task."""
    tasks = torch.cat([rows["task"] for rows in made.train_data])
    return {task: int((tasks == number).sum()) for number, task in enumerate(known_tasks())}


@pytest.mark.parametrize("name", SWITCHES)
def test_every_switch_trains_and_recommends(name: str, output: Path) -> None:
    switches = SWITCHES[name]
    made = fitted(output, **switches)
    config, model = made.config, made.model
    result = made.trainer.evaluate(made.test_data, load_best_model=False)
    assert all(0 <= value <= 1 for value in result.values()) and len(made.facts["losses"]) == 1
    found = counts(made)
    assert found[SEQUENTIAL] > 0 and found[NEGATIVE] == config["negative_ratio"] * found[SEQUENTIAL]
    # Tiny has texts and no reviews.
    assert (found[TEXT] > 0) == config["text_task"] and found[QUERY] == 0
    tokens, numbered = model.item_tokens, config["code_collisions"] == "extra_token"
    assert set(tokens.lengths[1:].tolist()) == {config["code_levels"] + numbered}
    assert (tokens.kind == "raw") == (config["code_levels"] == 1)
    assert isinstance(model.code_tokens.inputs, torch.nn.Parameter) == (config["code_embedding"] == "none")
    assert model.backbone.hidden_size == config["llm_hidden_size"]
    names = [line["name"] for line in made.stages]
    assert ("item_texts" in names) == (config["code_text_weight"] > 0 and config["code_levels"] > 1)
    assert len(made.valid_data) == 0 if config["merge_valid"] else made.valid
    assert (made.train_data._dataset.split.count(VALID) == 0) == config["merge_valid"]


def test_each_switch_makes_another_model_and_one_that_is_off_none(output: Path) -> None:
    alone = [name for name, switches in SWITCHES.items() if len(switches) <= 2]
    marks = {name: fitted(output, **SWITCHES[name]).fingerprint for name in alone}
    assert len(set(marks.values())) == len(alone)
    same = fitted(output, item_tokens="literal", negative_ratio=1, code_embedding="none", merge_valid=False)
    assert same.fingerprint == marks["as shipped"]


def test_one_prompt_is_the_papers_first(output: Path) -> None:
    every, one = fitted(output).model.writer, fitted(output, prompt_set="first").model.writer
    tasks = torch.zeros(200, dtype=torch.long)
    drawn = [set(writer.draw(tasks, torch.Generator().manual_seed(0)).tolist()) for writer in (every, one)]
    assert len(drawn[0]) > 1 and len(drawn[1]) == 1
