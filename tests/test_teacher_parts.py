"""Teachers that have parts or files of their own: what these are told, and mistakes in them before anything trains."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract import write_data
from recbole.data.interaction import Interaction
from small_models import SMALL
from test_errors import refused

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.training.guidance import Guidance
from recbole_llm.training.pipeline import Fit, fit, prepared, store_of
from recbole_llm.training.runs import _Numbered, run
from recbole_llm.training.teacher import Teacher, check_graphs

ROWS = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "movie_title", "class"]}
GRAPH = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}


def taught_by(settings: dict[str, Any], name: str, data: str = "small", **more: Any) -> Config:
    own = {key: value for key, value in SMALL["TCA4Rec"].items() if not key.startswith("cf_model.")}
    return Config("TCA4Rec", data, config_dict=settings | own | {"cf_model": name, **more}, command_line=[])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["cf_model.graph_model.epochz=3"], "cf_model: unknown setting 'graph_model.epochz' for LightGCN"),
        (["cf_model.metrics=[Foo]"], "cf_model: unknown metric 'Foo'"),
        (["cf_model.graph_model=Nope"], "cf_model: unknown model 'Nope'"),
        (["cf_model.graph_model.epochs=abc"], "cf_model: graph_model.epochs should be int"),
        (
            ["cf_model.graph_model.split_seed=4"],
            "cf_model: graph_model.split_seed would train LightGCN on another split",
        ),
    ],
)
@pytest.mark.parametrize("model", ["TCA4Rec", "P5"])
def test_mistakes_behind_two_dots_are_told_before_any_work(
    settings: list[str], words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [f"--model={model}", "--dataset=tiny", "--cf_model=GLTA", f"--output_dir={tmp_path / 'out'}"]
    asked += ["--cf_guidance=0.5"] if model == "P5" else []
    assert words in refused(capsys, "run", *asked, *(f"--{one}" for one in settings))
    assert not (tmp_path / "out" / "cache").exists()


def test_a_teacher_that_cannot_run_is_refused_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(
        capsys, "run", "--model=TCA4Rec", "--dataset=tiny", "--cf_model=KGAT", f"--output_dir={tmp_path / 'out'}"
    )
    assert "KGAT needs the package 'dgl'" in told and not (tmp_path / "out" / "cache").exists()


def test_a_teacher_reads_the_texts_that_the_student_reads(settings_of: Callable[..., dict[str, Any]]) -> None:
    controls = {"text_shuffle": 1.0, "text_drop": 0.5, "text_noise_seed": 7, "item_text": "{movie_title}"}
    part = taught_by(settings_of(), "RLMRecCon", **controls).part("cf_model")
    assert {key: part[key] for key in controls} == controls


def test_stages_of_a_teacher_that_has_several_keep_their_names(settings_of: Callable[..., dict[str, Any]]) -> None:
    def fitted(*names: str) -> Fit:
        lines = [{"name": name, "seconds": 1} for name in names]
        return Fit(*[None] * 7, lines, {}, {}, Path(), "")  # type: ignore[arg-type]

    assert [line["name"] for line in fitted("train-EASE").stages_as("cf_model")] == ["cf_model"]
    # Trained again on valid rows it is still one.
    assert [line["name"] for line in fitted("train-BPR", "train-BPR").stages_as("cf_model")] == ["cf_model"] * 2
    several = fitted("graph_model", "fine_tuning").stages_as("cf_model fold 1 of 2")
    assert [line["name"] for line in several] == [
        "cf_model fold 1 of 2 graph_model",
        "cf_model fold 1 of 2 fine_tuning",
    ]


# --- a knowledge graph -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("graph"))


def with_graph(settings_of: Callable[..., dict[str, Any]], data: Path, **more: Any) -> Config:
    text = {"item_text": "{movie_title} {class}"}
    given = settings_of(**text) | {"data_path": str(data), "load_col": ROWS | GRAPH, "epochs": 1, "eval_step": 0}
    return taught_by(given | {"cf_model.epochs": 1, "cf_model.eval_step": 0}, "CKE", **more)


def test_a_model_that_reads_a_knowledge_graph_can_teach(settings_of: Callable[..., dict[str, Any]], data: Path) -> None:
    config = with_graph(settings_of, data)
    result = run("TCA4Rec", "small", config_dict=config.external_config_dict)
    assert result["parts"]["cf_model"]["test"] and result["consistency"]
    # Trained on valid rows too, at once or in the end.
    for more in ({"merge_valid": True}, {"refit_on_valid": True, "eval_step": 1}):
        config = with_graph(settings_of, data, **more)
        assert run("TCA4Rec", "small", config_dict=config.external_config_dict)["consistency"]


@pytest.mark.parametrize("name", ["BPR", "CKE"])
def test_who_only_does_as_its_guide_does_agrees_with_it(
    name: str, settings_of: Callable[..., dict[str, Any]], data: Path
) -> None:
    own = {key: value for key, value in SMALL["AlignTokenRec"].items() if not key.startswith(("code_", "embedding"))}
    given = settings_of(item_text="{movie_title} {class}") | {"data_path": str(data), "load_col": ROWS | GRAPH}
    given |= own | {"item_tokens": "raw", "tasks": ["sequential"], "epochs": 1, "eval_step": 0}
    given |= {"cf_model": name, "cf_guidance": 0.0, "cf_model.epochs": 1, "cf_model.eval_step": 0}
    result = run("AlignTokenRec", "small", config_dict=given)
    assert result["test"] == result["parts"]["cf_model"]["test"]
    assert min(result["consistency"]["cf_model"].values()) == pytest.approx(1)


def test_what_counts_as_one_item_does_in_other_numbers_too() -> None:
    numbered = _Numbered(np.array([0, 3, 1, 2]))
    # Items 1 and 3 count as 1; they are 2 and 1 there.
    assert numbered.counting(np.array([0, 1, 2, 1])).tolist() == [0, 2, 2, 3]  # type: ignore[union-attr]
    assert numbered.ranked(np.array([[2, 3, -1]])).tolist() == [[1, 2, -1]]
    assert numbered.counting(None) is None


def test_items_that_it_numbers_otherwise_are_found_by_name(
    settings_of: Callable[..., dict[str, Any]], data: Path
) -> None:
    config = with_graph(settings_of, data)
    dataset = prepared(config)[1]._dataset
    made = fit(config.part("cf_model"), store_of(config))
    theirs, ours = (one.field2id_token["item_id"] for one in (made.train_data._dataset, dataset))
    assert not np.array_equal(theirs, ours) and set(theirs) == set(ours)
    moments = torch.arange(0, len(dataset.train_histories.items), 97)
    found = Teacher(made, dataset).logits(moments)
    users = torch.from_numpy(np.searchsorted(dataset.train_histories.offsets, moments.numpy(), side="right") - 1)
    plain = made.model.full_sort_predict(Interaction({"user_id": users})).view(len(users), -1).detach()
    place = {name: number for number, name in enumerate(theirs)}
    for number, name in enumerate(ours[1:], 1):
        torch.testing.assert_close(found[:, number], plain[:, place[name]])
    guided = Guidance(made, dataset)
    guided.rank_as(made.test_data)
    asked = torch.from_numpy(made.test_data.users[:5])
    raw = made.model.full_sort_predict(Interaction({"user_id": asked})).view(5, -1).detach()
    said = guided.scores(asked)
    assert all(torch.allclose(said[:, number], raw[:, place[name]]) for number, name in enumerate(ours[1:], 1))


def test_one_whose_graph_has_other_items_is_refused_before_any_work(
    settings_of: Callable[..., dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / "small", tmp_path / "data" / "small")
    links = tmp_path / "data" / "small" / "small.link"
    links.write_text("".join(links.read_text(encoding="utf-8").splitlines(keepends=True)[:-20]), encoding="utf-8")
    config = with_graph(settings_of, tmp_path / "data", output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match="the items linked to CKE's knowledge graph are not those of 'small'"):
        run("TCA4Rec", "small", config_dict=config.external_config_dict)
    assert not list((tmp_path / "out").glob("cache/*"))
    # Columns that are not loaded are no graph.
    config = with_graph(settings_of, data, load_col=ROWS)
    train_data = prepared(config)[1]
    with pytest.raises(UserError, match="add kg to load_col"):
        check_graphs(config, train_data._dataset)
    check_graphs(taught_by(settings_of(), "EASE"), train_data._dataset)
