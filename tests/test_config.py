"""Settings: precedence, types from comments, parts, and what every shipped file must say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.schema import Spec, load_yaml, parse_value, read_specs, read_yaml
from recbole_llm.training.runs import run

# properties/accelerate is in accelerate's own format.
SHIPPED = sorted(file for file in (ROOT / "properties").rglob("*.yaml") if file.parent.name != "accelerate")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_shipped_key_is_commented_and_fits_its_own_type(file: Path) -> None:
    specs = read_specs(file)
    for key, value in read_yaml(file).items():
        assert key in specs, f"{key} has no comment with a type"
        assert specs[key].help, f"{key} is not explained"
        assert specs[key].allows(value), f"{key}: {value!r} is no {specs[key].text}"


def test_precedence_is_shipped_then_files_then_dict_then_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("epochs: 11\nseed: 12\nsplit_seed: 13\n", encoding="utf-8")
    config = Config("BPR", "ml-100k", [file], {"seed": 22, "split_seed": 23}, ["--split_seed=33"])
    assert (config["epochs"], config["seed"], config["split_seed"], config["train_batch_size"]) == (11, 22, 33, 2048)
    named = Config("BPR", "ml-100k", command_line=[f"--config_files={file}", "--seed=5"])
    assert (named["epochs"], named["seed"]) == (11, 5)


@pytest.mark.parametrize(
    ("spec", "good", "bad"),
    [
        ("int >= 1", [1, 7], [0, 1.5, True, "1", None]),
        ("float > 0", [0.1, 3], [0, -1.0, "x"]),
        ("float 0..1", [0, 0.5, 1], [-0.1, 1.1]),
        ("str: a | b c | d", ["a", "b c", "d"], ["b", "e", 1]),
        ("int >= 1 or None", [1, None], [0, "none"]),
        ("bool or str: recbole", [True, False, "recbole"], ["yes", 1]),
        ("list or str", [[1], "x"], [1, {}]),
        ("dict or None", [{}, None], [[]]),
    ],
)
def test_types_allow_what_they_say(spec: str, good: list[object], bad: list[object]) -> None:
    assert all(Spec(spec).allows(value) for value in good)
    assert not any(Spec(spec).allows(value) for value in bad)


@pytest.mark.parametrize(
    ("text", "spec", "value"),
    [
        ("1e-3", "float > 0", 0.001), ("[1, 2]", "list", [1, 2]), ("{a: 1}", "dict", {"a": 1}), ("true", "bool", True),
        ("None", "dict or None", None), ("~", "int or None", None), ("'quoted'", "str", "'quoted'"),
        ("007", "str", "007"),
        ("sys.argv", "str", "sys.argv"), ("{'RS': [0.8, 0.1, 0.1]}", "dict", {"RS": [0.8, 0.1, 0.1]}),
    ],
)  # fmt: skip
def test_values_of_the_command_line(text: str, spec: str, value: object) -> None:
    assert parse_value(text, Spec(spec)) == value


def test_a_settings_files_path_may_hold_blanks(tmp_path: Path) -> None:
    first, second = tmp_path / "a file.yaml", tmp_path / "b.yaml"
    first.write_text("epochs: 3", encoding="utf-8")
    second.write_text("seed: 7", encoding="utf-8")
    for files in (f"'{first}' {second}", f"['{first}', '{second}']"):
        config = Config("BPR", "ml-100k", command_line=[f"--config_files={files}"])
        assert (config["epochs"], config["seed"]) == (3, 7)
    assert Config("BPR", "ml-100k", command_line=[f"--config_files={first}"])["epochs"] == 3


def test_settings_files_may_be_many_and_their_names_may_hold_quotes(tmp_path: Path) -> None:
    files = [tmp_path / f"o'neil-{number:02}.yaml" for number in range(40)]
    for number, file in enumerate(files):
        file.write_text(f"epochs: {number}", encoding="utf-8")
    named = " ".join(map(str, files))
    assert Config("BPR", "ml-100k", command_line=[f"--config_files={named}"])["epochs"] == 39


def test_positions_inside_a_user_may_order_him_as_recbole_fills_it_in() -> None:
    split = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO"}
    config = Config("BPR", "tiny", config_dict={"policy": "recbole", "time_scope": "user", "eval_args": split})
    assert config["eval_args"]["group_by"] == "user"


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 1\nseed: 2\nepochs: 2\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"mine\.yaml, line 3: .*'epochs' stands twice"):
        Config("BPR", "ml-100k", config_dict={"config_files": [str(file)]})
    merged = "a: &a {x: 1}\nb: &b {<<: *a, x: 2, y: 1}\nc: {<<: [*a, *b], y: 3}\n"
    file.write_text(merged, encoding="utf-8")
    assert load_yaml(file)["c"] == {"x": 1, "y": 3}


def test_a_broken_settings_file_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("epochs: 3\nseed: [1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"bad.yaml, line \d"):
        Config("BPR", "ml-100k", [file])
    file.write_text("!!python/object/apply:os.system ['true']\n", encoding="utf-8")
    with pytest.raises(UserError, match="not YAML"):
        Config("BPR", "ml-100k", [file])


def test_a_part_has_its_own_defaults_and_its_prefixed_keys() -> None:
    config = Config("GLTA", "ml-100k", config_dict={"epochs": 3, "graph_model.epochs": 7, "seed": 4, "topk": [10]})
    part, alone = (
        config.part("graph_model"),
        Config("LightGCN", "ml-100k", config_dict={"epochs": 7, "seed": 4, "topk": [10]}),
    )
    assert part["model"] == "LightGCN" and part["epochs"] == 7 and config["epochs"] == 3
    assert part.stage_keys() == alone.stage_keys()


@pytest.mark.parametrize("model", ["LightGCN", "SASRec", "GLTA"])
def test_the_parts_and_models_share_one_protocol(model: str) -> None:
    base = Config("BPR", "ml-100k").split_protocol()
    assert Config(model, "ml-100k").split_protocol() == base


def test_settings_that_change_no_number_are_in_no_fingerprint() -> None:
    one = Config("BPR", "ml-100k", config_dict={"output_dir": "a/", "topk": [10], "show_progress": False})
    two = Config("BPR", "ml-100k", config_dict={"output_dir": "b/", "topk": [10, 20], "show_progress": True})
    assert one.stage_keys() == two.stage_keys()
    assert one.stage_keys() != Config("BPR", "ml-100k", config_dict={"learning_rate": 0.1}).stage_keys()
    # Less memory for ranking is no reason to train again.
    asked = {"ranking": "pruned", "epochs": 1}
    small, large = (
        Config("AlignTokenRec", "ml-100k", config_dict=asked | {"inference_batch_size": size, "tree_nodes": 4 * size})
        for size in (1, 64)
    )
    assert small.stage_keys() == large.stage_keys()


def test_what_counts_items_picks_epochs_at_a_k_too(settings_of: Callable[..., dict[str, Any]]) -> None:
    settings = settings_of(metrics=["NDCG", "ItemCoverage"], topk=[5, 10], valid_metric="ItemCoverage@10")
    assert "itemcoverage@10" in run("BPR", "small", config_dict=settings)["valid"]
    with pytest.raises(UserError, match="valid_metric 'ItemCoverage' is not among the metrics"):
        Config("BPR", "small", config_dict=settings | {"valid_metric": "ItemCoverage"})


@pytest.mark.parametrize(("metric", "rounded"), [("NDCG@10", False), ("ItemCoverage@10", True), ("GAUC", True)])
def test_rounding_is_part_of_a_stage_where_it_picks_the_epoch(metric: str, rounded: bool) -> None:
    asked = {"valid_metric": metric, "metrics": ["NDCG", "ItemCoverage", "GAUC"], "topk": [10]}
    one, two = (
        Config("BPR", "ml-100k", config_dict=asked | {"metric_decimal_place": places}).stage_keys()
        for places in (2, 12)
    )
    assert (one != two) == rounded


def test_recboles_shared_key_list_does_not_grow() -> None:
    from recbole.utils.argument_list import dataset_arguments

    Config("BPR", "tiny")
    before = len(dataset_arguments)
    Config("BPR", "tiny")
    assert len(dataset_arguments) == before


def test_a_split_at_one_time_is_refused_where_times_are_positions() -> None:
    with pytest.raises(UserError, match="positions"):
        Config("BPR", "ml-1m", config_dict={"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}})


def test_our_files_are_plain_yaml_too() -> None:
    for file in SHIPPED:
        assert yaml.safe_load(file.read_text(encoding="utf-8"))


def test_policy_recbole_keeps_recboles_defaults() -> None:
    import recbole

    stock = read_yaml(Path(recbole.__file__).parent / "properties" / "overall.yaml")
    config = Config("LightGCN", "ml-100k", config_dict={"policy": "recbole"})
    for key in ("topk", "valid_metric", "metrics", "learning_rate", "stopping_step", "epochs", "train_batch_size"):
        assert config[key] == stock[key], key
    assert config["normalize_all"] is True and config["metric_decimal_place"] == 12
    assert config["fast_baselines"] is False
