"""Settings that the project's own search found: where they stand among the others, and what their files must say."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED

from recbole_llm import config as config_module
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.errors import UserError
from recbole_llm.schema import read_yaml
from recbole_llm.training.pipeline import fit, store_of

TUNED = sorted((ROOT / "properties" / "tuned").glob("*/*.yaml"))
IN_THE_WHEEL = {"ml-100k", "tiny"}


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a file among the shipped ones: ``tuned("LightGCN", "epochs: 7")``."""
    own = tmp_path / "properties"
    shutil.copytree(ROOT / "properties", own, ignore=shutil.ignore_patterns("tuned"))
    monkeypatch.setattr(config_module, "properties_dir", lambda: own)

    def put(name: str, text: str, dataset: str = "small") -> None:
        file = own / "tuned" / dataset / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")

    return put


def test_they_stand_above_what_is_shipped_and_below_what_is_given(
    tuned: Callable[[str, str], None], settings_of: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    tuned("LightGCN", "learning_rate: 0.0123\nn_layers: 1\nreg_weight: 0.5\nstopping_step: 4\n")
    file = tmp_path / "own.yaml"
    file.write_text("n_layers: 2\nreg_weight: 0.25\n", encoding="utf-8")
    given = settings_of(tuned=True, reg_weight=0.125)
    config = Config("LightGCN", "small", [file], given, ["--stopping_step=5"])
    keys = ("learning_rate", "n_layers", "reg_weight", "stopping_step", "embedding_size")
    assert [config[key] for key in keys] == [0.0123, 2, 0.125, 5, 64]
    assert Config("LightGCN", "small", [file], given | {"tuned": False})["learning_rate"] == 0.005
    # As typed, it is text until it is parsed.
    assert Config("LightGCN", "small", [], settings_of(), ["--tuned=true"])["learning_rate"] == 0.0123
    assert Config("LightGCN", "small", [], settings_of(), ["--tuned=false"])["learning_rate"] == 0.005
    with pytest.raises(UserError, match="tuned should be bool, but is 'maybe'"):
        Config("LightGCN", "small", [], settings_of(), ["--tuned=maybe"])


def test_they_are_of_one_data_set_and_one_model(
    tuned: Callable[..., None], settings_of: Callable[..., dict[str, Any]]
) -> None:
    tuned("LightGCN", "learning_rate: 0.0123\n", dataset="tiny")
    assert Config("LightGCN", "small", config_dict=settings_of(tuned=True)).tuned_file is None
    assert Config("BPR", "tiny", config_dict={"tuned": True}).tuned_file is None
    assert Config("LightGCN", "tiny", config_dict={"tuned": True})["learning_rate"] == 0.0123


def test_they_reach_a_part_so_that_its_stage_is_shared(
    tuned: Callable[[str, str], None], settings_of: Callable[..., dict[str, Any]]
) -> None:
    tuned("LightGCN", "learning_rate: 0.0123\n")
    more = settings_of(tuned=True, item_text="{movie_title}")
    alone = Config("LightGCN", "small", config_dict=more)
    more["graph_model.epochs"] = more["epochs"]
    part = Config("GLTA", "small", config_dict=more).part("graph_model")
    assert part["learning_rate"] == 0.0123
    assert part.stage_keys() == alone.stage_keys()
    spared = Config("GLTA", "small", config_dict=more | {"graph_model.tuned": False}).part("graph_model")
    assert spared["learning_rate"] == 0.005
    # A search over GLTA may have found settings of its graph model too; the user's own go above them.
    tuned("GLTA", "graph_model.learning_rate: 0.003\nuser_dropout: 0.25\n")
    whole = Config("GLTA", "small", config_dict=more)
    assert (whole["user_dropout"], whole.part("graph_model")["learning_rate"]) == (0.25, 0.003)
    given = Config("GLTA", "small", config_dict=more | {"graph_model.learning_rate": 0.004})
    assert given.part("graph_model")["learning_rate"] == 0.004


def test_a_loss_of_ones_own_has_a_file_of_its_own(
    tuned: Callable[[str, str], None], settings_of: Callable[..., dict[str, Any]]
) -> None:
    tuned("SASRecAllPositions", "loss_type: CE\nlearning_rate: 0.002\n")

    def rate(**more: Any) -> float:
        value = Config("SASRecAllPositions", "small", config_dict=settings_of(tuned=True, **more))["learning_rate"]
        return float(value)

    assert (rate(), rate(loss_type="CE"), rate(loss_type="BCE")) == (0.002, 0.002, 0.001)
    tuned("SASRecAllPositions-BCE", "loss_type: BCE\nlearning_rate: 0.004\n")
    assert (rate(), rate(loss_type="BCE")) == (0.002, 0.004)


def test_the_key_itself_moves_no_stage_and_the_log_says_what_it_came_to(
    tuned: Callable[[str, str], None], settings_of: Callable[..., dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    tuned("LightGCN", "learning_rate: 0.0123\n")
    by_hand = Config("LightGCN", "small", config_dict=settings_of(learning_rate=0.0123))
    by_file = Config("LightGCN", "small", config_dict=settings_of(tuned=True))
    assert by_hand.stage_keys() == by_file.stage_keys()
    caplog.set_level(logging.INFO, logger="recbole_llm")
    made, found = fit(by_hand, store_of(by_hand)), fit(by_file, store_of(by_file))
    assert found.stages[-1]["cached"] and found.fingerprint == made.fingerprint
    assert str(by_file.tuned_file) in caplog.text
    unknown = Config("BPR", "small", config_dict=settings_of(tuned=True, epochs=1))
    assert unknown.stage_keys() == Config("BPR", "small", config_dict=settings_of(epochs=1)).stage_keys()
    fit(unknown, store_of(unknown))
    assert "no search of BPR on small is shipped; it has its usual settings" in caplog.text


# --- what is shipped -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", TUNED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_file_fits_its_model_and_says_what_it_was_searched_on(file: Path) -> None:
    name, _, loss = file.stem.partition("-")
    data = file.parent.name
    given = {"tuned": True} | ({"loss_type": loss} if loss else {})
    if data not in IN_THE_WHEEL:
        given |= {"data_path": str(SHARED)}
    config = Config(name, data, config_dict=given)
    assert config.tuned_file is not None and config.tuned_file.samefile(file)
    # As if the user had written them: every key is known, every value in its range.
    values = read_yaml(file)
    again = Config(name, data, config_dict=values | {key: given[key] for key in given if key != "tuned"})
    assert again.stage_keys() == config.stage_keys()
    header = "\n".join(line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    assert header.startswith(f"# {name} on {data}:")
    for part in ("budget", "trials", "space", "seed", "versions", "command   recbole-llm tune"):
        assert part in header, part
    # Whose settings its first trial had.
    assert ("as in --config_files:" if "--config_files" in header.partition("command ")[2] else "as shipped:") in header
    found = re.search(r"^# split +([0-9a-f]{64})$", header, re.MULTILINE)
    assert found is not None
    if not Path(config["data_path"]).is_dir():
        pytest.skip(f"{data} is not in {SHARED}: its split cannot be made to compare")
    dataset = create_dataset(config)
    assert dataset.make_split(config.split_protocol()).fingerprint == found[1]
