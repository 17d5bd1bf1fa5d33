"""Settings that a search has found, as a YAML file that ``run`` takes and a person can read."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from recbole.utils.argument_list import dataset_arguments

from recbole_llm import __version__
from recbole_llm.config import NEUTRAL_KEYS, PROTOCOL_KEYS, Config
from recbole_llm.disk import write_whole
from recbole_llm.keys import base_specs, model_specs
from recbole_llm.leaderboard.space import Space
from recbole_llm.schema import Spec

WIDTH = 118


@dataclass(frozen=True)
class Outcome:
    """What a search has found so far.

    Attributes:
        values: the best settings of what moved, by key.
        value: their score on valid.
        start: the settings without a search.
        start_value: their score; ``None`` where they failed.
        metric: lower case.
        space: what moved.
        split: the split's fingerprint.
        trials, pruned, failed: how many of them, the latter two among the first.
        seconds: what all took.
        command: that searched.
        study: the search's own mark.
    """

    values: Mapping[str, Any]
    value: float
    start: Mapping[str, Any]
    start_value: float | None
    metric: str
    space: Space
    split: str | None
    trials: int
    pruned: int
    failed: int
    seconds: float
    command: str
    study: str


def describe(values: Mapping[str, Any]) -> str:
    """Settings in one line."""
    return ", ".join(f"{key}={_scalar(value)}" for key, value in values.items())


def summary(config: Config, outcome: Outcome, path: Path) -> str:
    """The end of a search, for the terminal.

    Args:
        config: without a search.
        outcome: what it found.
        path: where it is written.
    """
    rows = [["", _begun(outcome), "best"]]
    rows += [[key, _scalar(outcome.start[key]), _scalar(value)] for key, value in outcome.values.items()]
    start = "failed" if outcome.start_value is None else f"{outcome.start_value:.4f}"
    rows.append([f"{outcome.metric} (valid)", start, f"{outcome.value:.4f}{_gain(outcome)}"])
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([
        f"{config['model']} on {config['dataset']}: {_budget(outcome)}",
        *lines, "", f"settings    {path}", f"run         {_run_command(config, path)}",
    ])  # fmt: skip


def write_settings(path: Path, config: Config, outcome: Outcome) -> None:
    """Write the best settings, with where they come from.

    Args:
        path: the file.
        config: with the best settings.
        outcome: of the search.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join([*(f"# {line}".rstrip() for line in _header(path, config, outcome)), "", *_lines(config, outcome)])
    write_whole(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))


def _header(path: Path, config: Config, outcome: Outcome) -> list[str]:
    protocol = config.split_protocol().as_dict() if config["policy"] == "unified" else config["eval_args"]
    versions = {"recbole_llm": __version__} | {name: version(name) for name in ("recbole", "torch", "optuna")}
    start = "failed" if outcome.start_value is None else f"{outcome.start_value:.6f}"
    start += f" {_begun(outcome)}: {describe(outcome.start)}"
    moved = outcome.space.as_plain()["space"]
    return [
        f"{config['model']} on {config['dataset']}: the best settings on valid that a search of the space below found.",
        f"split     {outcome.split or 'RecBole'}",
        f"protocol  policy {config['policy']}, exclude_history {str(config['exclude_history']).lower()}, {protocol}",
        f"{outcome.metric:9} {outcome.value:.6f} on valid{_gain(outcome)}; {start}",
        f"budget    {_budget(outcome)}",
        f"space     {outcome.space.name}: " + "; ".join(f"{key} {describe_range(moved[key])}" for key in moved),
        f"seed      {config['seed']}, of the search and of every trial",
        "versions  " + ", ".join(f"{name} {number}" for name, number in versions.items()),
        f"command   {outcome.command}",
        f"run       {_run_command(config, path)}",
    ]


def _budget(outcome: Outcome) -> str:
    return f"{outcome.trials} trials ({outcome.pruned} pruned, {outcome.failed} failed), {outcome.seconds:.0f} seconds"


def _begun(outcome: Outcome) -> str:
    """Whose settings the first trial has."""
    return "as in --config_files" if "--config_files" in outcome.command else "as shipped"


def _gain(outcome: Outcome) -> str:
    if not outcome.start_value:
        return ""
    return f" ({outcome.value / outcome.start_value - 1:+.1%})"


def describe_range(plain: Any) -> str:
    """What :meth:`~recbole_llm.leaderboard.space.Dimension.as_plain` gives, for a person."""
    if isinstance(plain, list):
        return " | ".join(map(_scalar, plain))
    return f"{_scalar(plain['low'])}..{_scalar(plain['high'])}{' log' if plain['log'] else ''}"


def _run_command(config: Config, path: Path) -> str:
    protocol = [
        f"--{key}={_scalar(config.external_config_dict[key])}"
        for key in sorted(config.external_config_dict)
        if _is_protocol(key) and key not in ("model", "dataset", "tensorboard", "show_progress", "state")
    ]
    words = ["recbole-llm", "run", f"--model={config['model']}", f"--dataset={config['dataset']}"]
    return shlex.join([*words, f"--config_files={path}", *protocol])


def _is_protocol(key: str) -> bool:
    """Whether a setting belongs to a run and not to a model."""
    own = {"model", "dataset", "data_path", "encoding"}
    return key in own or key in PROTOCOL_KEYS or key in NEUTRAL_KEYS or key in dataset_arguments


def _lines(config: Config, outcome: Outcome) -> list[str]:
    """The settings: what was searched, what the space fixes, and what else was given for the model."""
    values = {**config.external_config_dict}
    named = {**outcome.values, **outcome.space.settings}
    kept = [*named, *(key for key in values if key not in named and not _is_protocol(key))]
    specs = {key: _spec(config, key) for key in kept}
    pairs = [f"{key}: {_scalar(values.get(key, named.get(key)))}" for key in kept]
    width = max(map(len, pairs))
    return [
        f"{pair.ljust(width)}  # ({specs[key].text}) {specs[key].help}" for pair, key in zip(pairs, kept, strict=True)
    ]


def _spec(config: Config, key: str) -> Spec:
    part, dot, rest = key.partition(".")
    specs = base_specs() | model_specs(config[part]) if dot else config.specs
    spec = specs.get(rest if dot else key)
    if spec is not None and spec.help:
        return spec
    value = config[key] if not dot else None
    kind = type(value).__name__ if isinstance(value, bool | int | float | str | list | dict) else "None"
    return Spec(spec.text if spec else kind, f"see recbole-llm inspect settings {config['model']}")


def _scalar(value: Any) -> str:
    """A value as YAML, in one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("\n").removesuffix("\n...").strip()
