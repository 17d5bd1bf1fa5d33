"""What a search for settings is asked to do, read from the command line and checked before any work."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm.config import INPUT_KEYS, PROTOCOL_KEYS, Config
from recbole_llm.errors import UserError
from recbole_llm.leaderboard.marks import beneath_settings
from recbole_llm.leaderboard.space import Space, find_space, read_space
from recbole_llm.leaderboard.tuned_file import describe_range
from recbole_llm.training.pipeline import TRAIN_VERSION, data_mark, prepared, versions_of
from recbole_llm.training.runs import writable
from recbole_llm.training.store import fingerprint_of

OWN = ("space", "trials", "seconds", "output", "write")
# What rows trials learn from and are judged on; values of these are better or worse for that alone.
JUDGES = frozenset(PROTOCOL_KEYS) | {
    "dataset", "data_path", "benchmark_filename", "load_col", "unload_col", "unused_col", "rm_dup_inter", "merge_valid",
    "filter_inter_by_user_or_item", "user_inter_num_interval", "item_inter_num_interval", "val_interval",
}  # fmt: skip
QUIET = {"state": "WARNING", "show_progress": False, "tensorboard": False}


@dataclass(frozen=True)
class Search:
    """What is searched, and where it is kept.

    Attributes:
        space: what moves.
        base: the settings as they are without a search.
        start: their values of what moves, by key.
        command_line: settings that every trial has.
        trials, seconds: the budget; ``None`` seconds are no limit.
        folder: holds study, log and the best settings.
        write: a second place for the best settings.
        split: the split's fingerprint; ``None`` under RecBole's own protocol.
        mark: hash of all that the worth of a trial depends on.
        command: as the user typed it.
        widened: what the space was given beside what its file says, a line a setting.
    """

    space: Space
    base: Config
    start: Mapping[str, Any] = field(hash=False)
    command_line: tuple[str, ...]
    trials: int
    seconds: float | None
    folder: Path
    write: Path | None
    split: str | None
    mark: str
    command: str
    widened: tuple[str, ...]

    @property
    def metric(self) -> str:
        """What trials are judged by, lower case."""
        return str(self.base["valid_metric"]).lower()

    def config(self, values: Mapping[str, Any]) -> Config:
        """The Config of a trial."""
        config = Config(config_dict={**QUIET, **self.space.settings, **values}, command_line=self.command_line)
        # Only the settings are looked for here; test rows are none of a search's business.
        config["refit_on_valid"] = False
        return config


def read_arguments(arguments: Sequence[str]) -> Search:
    """What the command line asks for, checked.

    Raises:
        UserError: see :func:`tune`.
    """
    own: dict[str, str] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if key in OWN and equals and argument.startswith("--"):
            own[key] = value
        else:
            rest.append(argument)
    # The model's name decides on the space, and the space on the settings.
    plain = Config(config_dict=QUIET, command_line=rest)
    path = find_space(plain["model"], plain["loss_type"], own.get("space"))
    given = {argument.removeprefix("--").partition("=")[0] for argument in rest}
    space = read_space(path)
    if space.metric is not None:
        space = Space(**{**vars(space), "settings": {**space.settings, "valid_metric": space.metric}})
    for dimension in space.dimensions:
        if dimension.key.rpartition(".")[2] in JUDGES:
            raise UserError(
                f"{path}, space: {dimension.key} decides on what trials are judged on, or how, and cannot be searched; "
                f"give it to the whole search: --{dimension.key}=..."
            )
    space = space.without(given, settings=given | plain.file_config_dict.keys())
    base = _checked(space, rest)
    start = {dimension.key: _value(base, dimension.key) for dimension in space.dimensions}
    asked, space = space, space.holding(start.__getitem__)
    if not base["eval_step"]:
        raise UserError("tune judges by validation: eval_step should be 1 or more, not 0")
    if base["merge_valid"]:
        raise UserError("tune judges by validation, and merge_valid leaves no valid rows; leave it out")
    _, train_data, valid_data, _ = prepared(base)
    if not len(valid_data):
        raise UserError("the split leaves no valid interaction to judge by; look at eval_args")
    split = getattr(train_data._dataset, "split", None)
    split_mark = split.fingerprint if split else None
    mark, protocol = _mark(space, base, start, split_mark)
    name = f"{base['model']}-{base['dataset']}-{protocol[:8]}"
    write = Path(own["write"]) if "write" in own else None
    if write is not None:
        writable(write, "write")
    folder = Path(own["output"]) if "output" in own else Path(base["output_dir"]) / "tune" / name
    writable(folder / "search.db", "output")
    return Search(
        space=space, base=base, start=start, command_line=tuple(rest),
        trials=_number(own, "trials", int) or space.trials, seconds=_number(own, "seconds", float),
        folder=folder, write=write, split=split_mark, mark=mark,
        command=f"recbole-llm tune {shlex.join(arguments)}",
        widened=tuple(_widened(path, asked, space, start)),
    )  # fmt: skip


def _widened(path: Path, asked: Space, space: Space, start: Mapping[str, Any]) -> Iterator[str]:
    for dimension, wide in zip(asked.dimensions, space.dimensions, strict=True):
        said, searched = (describe_range(one.as_plain()) for one in (dimension, wide))
        if said != searched:
            yield (
                f"{path}, space: {wide.key} is {start[wide.key]!r} without a search, which {said} does not hold; "
                f"{searched} is searched"
            )


def _number(own: Mapping[str, str], key: str, kind: type) -> Any:
    if key not in own:
        return None
    try:
        value = kind(own[key])
    except ValueError:
        value = 0
    if not 0 < value < math.inf:
        raise UserError(f"--{key} should be {kind.__name__} > 0, but is {own[key]!r}")
    return value


def _checked(space: Space, command_line: Sequence[str]) -> Config:
    """The Config without a search, after every value that the space names has been held against its type."""

    def config(values: Mapping[str, Any]) -> Config:
        try:
            return Config(config_dict={**QUIET, **space.settings, **values}, command_line=command_line)
        except UserError as error:
            raise UserError(f"{space.path}: {error}") from None

    for number in range(max(len(dimension.ends()) for dimension in space.dimensions)):
        config({dimension.key: dimension.ends()[number % len(dimension.ends())] for dimension in space.dimensions})
    return config({})


def _value(config: Config, key: str) -> Any:
    """A setting as it is now, also one of a part (``graph_model.epochs``)."""
    part, dot, rest = key.partition(".")
    return config.part(part)[rest] if dot else config[key]


def _versions(config: Config) -> dict[str, Any]:
    """What :func:`versions_of` has of a model and of all that it is made of."""
    parts = {part: found for part in config.parts() if (found := _versions(config.part(part)))}
    return versions_of(config.model_class) | ({"parts": parts} if parts else {})


def _mark(space: Space, base: Config, start: Mapping[str, Any], split: str | None) -> tuple[str, str]:
    """Hashes of all that a trial's worth depends on, and of the protocol alone."""
    protocol = {
        "split": split or base["eval_args"],
        **{key: base[key] for key in ("policy", "exclude_history", "eval_unit")},
    }
    keys = {key: value for key, value in base.stage_keys().items() if key not in start}
    named = {*base.parts(), *(key.partition(".")[0] for key in start if "." in key)}
    parts = {part: base.part(part).stage_keys() for part in named}
    for key in start:
        part, dot, rest = key.partition(".")
        if dot:
            parts[part].pop(rest)
    inputs = {
        "space": space.as_plain(), "start": dict(start), "settings": keys, "parts": parts, "protocol": protocol,
        "moving": {key: base[key] for key in INPUT_KEYS}, "files": data_mark(base), "version": TRAIN_VERSION,
        **_versions(base),
        "beneath": [beneath_settings(one) for one in (base, *(base.part(part) for part in sorted(named)))],
    }  # fmt: skip
    return fingerprint_of(inputs), fingerprint_of(protocol)
