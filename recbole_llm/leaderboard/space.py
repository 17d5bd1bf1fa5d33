"""Search spaces: which settings of a model a search may move, and how far; one YAML file each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.schema import load_yaml, properties_dir

KEYS = ("trials", "warmup", "metric", "settings", "space")
# Key, value where a file is silent, least value.
COUNTS = (("trials", 20, 1), ("warmup", 10, 0))
RANGE_KEYS = ("low", "high", "log", "type")
# Suggested numbers are trained with so many significant digits, so that a written file holds the very setting.
DIGITS = 4


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched.

    Attributes:
        key: the setting; that of a part is prefixed, e.g. ``graph_model.learning_rate``.
        choices: the values it may take; empty for a range.
        low, high: the range's ends, both in it.
        log: draw evenly in the logarithm.
        whole: draw whole numbers.
        said: that this was said, not taken from the range's ends.
    """

    key: str
    choices: tuple[Any, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False
    said: bool = False

    def holding(self, value: Any) -> Dimension:
        """The dimension, widened where it does not hold a value."""
        if self.choices:
            found = any(type(choice) is type(value) and choice == value for choice in self.choices)
            return self if found else replace(self, choices=(value, *self.choices))
        # A setting that is no whole number now, in a range whose ends were written as such.
        whole = self.whole and (self.said or not isinstance(value, float))
        return replace(self, low=min(self.low, value), high=max(self.high, value), whole=whole)

    def ends(self) -> tuple[Any, ...]:
        """The values that a check of the whole dimension looks at."""
        return self.choices or (self.low, self.high)

    def suggest(self, trial: Any) -> Any:
        """A value from an Optuna trial, as it is trained with."""
        if self.choices:
            return trial.suggest_categorical(self.key, self.choices)
        if self.whole:
            return trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log)
        value = trial.suggest_float(self.key, self.low, self.high, log=self.log)
        return float(f"{value:.{DIGITS}g}")

    def as_plain(self) -> Any:
        """The dimension as a file has it."""
        if self.choices:
            return list(self.choices)
        return {"low": self.low, "high": self.high, "log": self.log, "type": "int" if self.whole else "float"}


@dataclass(frozen=True)
class Space:
    """What a search moves.

    Attributes:
        name: e.g. ``LightGCN``.
        path: its file.
        trials: settings that are tried unless the command line says otherwise.
        warmup: validations that a trial has before it may be pruned.
        metric: ``valid_metric`` of the search; ``None`` leaves the run's own.
        settings: what every trial has; they end in the written file.
        dimensions: what moves.
    """

    name: str
    path: Path
    trials: int
    warmup: int
    metric: str | None
    settings: Mapping[str, Any]
    dimensions: tuple[Dimension, ...]

    def without(self, keys: Set[str], settings: Set[str]) -> Space:
        """The space with some settings left to whoever fixed them.

        Args:
            keys: that do not move.
            settings: of which the space's own values do not hold.

        Raises:
            UserError: nothing is left to search.
        """
        kept = tuple(dimension for dimension in self.dimensions if dimension.key not in keys)
        if not kept:
            raise UserError(f"{self.path}: the command line fixes every setting of the space; none is left to search")
        own = {key: value for key, value in self.settings.items() if key not in settings}
        return replace(self, dimensions=kept, settings=own)

    def holding(self, value_of: Callable[[str], Any]) -> Space:
        """The space, widened where it does not hold what a model has now (its first trial).

        Raises:
            UserError: that value is no number where the space has a range, or no whole one where it says so.
        """
        widened = []
        for dimension in self.dimensions:
            value = value_of(dimension.key)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not dimension.choices and (not number or (dimension.log and value <= 0)):
                raise UserError(
                    f"{self.path}, space: {dimension.key} is {value!r} now, which no range"
                    f"{' in the logarithm' if dimension.log else ''} can hold; list choices: [{value!r}, ...]"
                )
            if dimension.said and dimension.whole and value != int(value):
                raise UserError(
                    f"{self.path}, space: {dimension.key} is {value!r} now, which no range of type int can hold; leave "
                    "the type out"
                )
            widened.append(dimension.holding(value))
        return replace(self, dimensions=tuple(widened))

    def as_plain(self) -> dict[str, Any]:
        """What a study's identity depends on."""
        return {
            "warmup": self.warmup,
            "settings": dict(self.settings),
            "space": {dimension.key: dimension.as_plain() for dimension in self.dimensions},
        }


def find_space(model: str, loss_type: str | None, named: str | None) -> Path:
    """The file of a space.

    Args:
        model: whose own space is taken where none is named.
        loss_type: with a space of its own (``SASRecAllPositions-BCE``) that one.
        named: a file, or the name of a shipped space.

    Raises:
        UserError: there is none (with the nearest).
    """
    folder = properties_dir() / "space"
    if named and (named.endswith((".yaml", ".yml")) or Path(named).is_file()):
        return Path(named)
    own = model if not (folder / f"{model}-{loss_type}.yaml").is_file() else f"{model}-{loss_type}"
    path = folder / f"{named or own}.yaml"
    if path.is_file():
        return path
    known = sorted(file.stem for file in folder.glob("*.yaml"))
    if named:
        raise UserError(f"no search space '{named}' is shipped{did_you_mean(named, known) or '; ' + ', '.join(known)}")
    raise UserError(f"no search space for {model} is shipped; --space=FILE names one like {folder / 'LightGCN.yaml'}")


def read_space(path: Path) -> Space:
    """A space file.

    Raises:
        UserError: it is missing or broken, or says something that is no space; with the place.
    """
    # Not through the cache of shipped files: a user edits his between two searches of one process.
    content = load_yaml(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, KEYS) or '; keys: ' + ', '.join(KEYS)}")
    settings, moved = content.get("settings") or {}, content.get("space")
    metric = content.get("metric")
    trials, warmup = (_whole(path, key, content.get(key, default), low) for key, default, low in COUNTS)
    if metric is not None and not isinstance(metric, str):
        raise UserError(f"{path}: metric should be a metric's name, e.g. NDCG@10, but is {metric!r}")
    if not isinstance(settings, dict):
        raise UserError(f"{path}: settings should be a mapping of settings to values, but is {settings!r}")
    if not isinstance(moved, dict) or not moved:
        raise UserError(f"{path}: space should be a mapping of settings to ranges or lists, but is {moved!r}")
    both = sorted(set(settings) & set(moved))
    if both:
        raise UserError(f"{path}: '{both[0]}' stands in settings and in space")
    dimensions = tuple(_dimension(path, str(key), value) for key, value in moved.items())
    return Space(path.stem, path, trials, warmup, metric, settings, dimensions)


def _whole(path: Path, key: str, value: Any, low: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise UserError(f"{path}: {key} should be int >= {low}, but is {value!r}")
    return value


def _dimension(path: Path, key: str, value: Any) -> Dimension:
    where = f"{path}, space: {key}"
    if isinstance(value, list):
        plain = [choice for choice in value if choice is None or isinstance(choice, bool | int | float | str)]
        if len(value) < 2 or len(plain) < len(value):
            raise UserError(f"{where} should list two or more numbers or words, but is {value!r}")
        return Dimension(key, choices=tuple(value))
    if not isinstance(value, dict):
        raise UserError(f"{where} should be a list of choices or {{low: ..., high: ...}}, but is {value!r}")
    for name in value:
        if name not in RANGE_KEYS:
            raise UserError(f"{where}: unknown key '{name}'{did_you_mean(str(name), RANGE_KEYS)}")
    low, high, log = value.get("low"), value.get("high"), value.get("log", False)
    for end in (low, high):
        if not isinstance(end, int | float) or isinstance(end, bool):
            raise UserError(f"{where} should have numbers as low and high, but has {end!r}")
    assert low is not None and high is not None
    if low >= high or (log and low <= 0):
        raise UserError(f"{where}: low should be below high{' and above 0' if log else ''}, but they are {low}, {high}")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = value.get("type", "int" if whole else "float")
    if kind not in ("int", "float") or not isinstance(log, bool) or (kind == "int" and not whole):
        raise UserError(f"{where}: type is int (with whole ends) or float, log is true or false")
    return Dimension(key, low=low, high=high, log=log, whole=kind == "int", said="type" in value)
