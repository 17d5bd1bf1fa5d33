"""Metrics over one numeric setting, a line for rows that differ in nothing else: what a sweep shows at one look."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config import Config
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.evaluation.consistency import NAME, figures_of
from recbole_llm.evaluation.pictures import MISSING_PLOTS, can_draw, draw_curves
from recbole_llm.leaderboard.words import title_of
from recbole_llm.training.run_files import read_result

_KEYS = ("setting", "metrics")
# Values further apart than this have a scale that grows like a logarithm: the least would lie on zero.
FAR = 10.0


def check_curve(path: str, curve: Any) -> dict[str, Any]:
    """See that a suite's ``curve`` can be read.

    Args:
        path: of the suite, for errors.
        curve: ``setting``, and ``metrics``, those to draw, a panel each; or ``None``.

    Raises:
        UserError: a key is unknown, missing or of the wrong kind.
    """
    if curve is None:
        return {}
    if not isinstance(curve, Mapping):
        raise UserError(f"{path}: curve should read `{{setting: alpha, metrics: [NDCG@10]}}`, but is {curve!r}")
    for key in curve:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key 'curve.{key}'{did_you_mean(str(key), _KEYS)}")
    metrics = curve.get("metrics")
    if not isinstance(curve.get("setting"), str):
        raise UserError(f"{path}: curve.setting should be the name of a setting, but is {curve.get('setting')!r}")
    if not isinstance(metrics, list) or not metrics or not all(isinstance(name, str) for name in metrics):
        raise UserError(f"{path}: curve.metrics should be a list of metrics, but is {metrics!r}")
    return dict(curve)


def check_curve_of(curve: Mapping[str, Any], configs: Sequence[Config]) -> None:
    """See that runs have what a suite's ``curve`` asks for.

    Args:
        curve: from :func:`check_curve`.
        configs: of all runs.

    Raises:
        UserError: no run has the setting as a number, all have the same, or none measures one of the metrics.
    """
    setting = curve["setting"]
    known = {key for config in configs for key in config.final_config_dict}
    if setting not in known:
        raise UserError(f"curve.setting: no row has '{setting}'{did_you_mean(setting, known)}")
    values = {value for config in configs if _is_number(value := config.final_config_dict.get(setting))}
    if len(values) < 2:
        raise UserError(f"curve.setting: no two rows have different numbers for {setting}")
    cuts = sorted({cut for config in configs for cut in config["topk"]})
    measured = {f"{name}@{cut}".lower() for config in configs for name in config["metrics"] for cut in config["topk"]}
    if any({*config.parts()} & {*_compared(config.model_class)} for config in configs):
        measured |= {f"{NAME}@{cut}" for cut in cuts}
    for metric in curve["metrics"]:
        # Of several teachers each has its own: consistency@10 (cf_model).
        if metric.lower().partition(" ")[0] not in measured:
            raise UserError(f"curve.metrics: no row measures '{metric}'{did_you_mean(metric.lower(), measured)}")


def _compared(model: Any) -> tuple[str, ...]:
    """The parts whose rankings a model's are compared with."""
    return (*getattr(model, "teachers", ()), *getattr(model, "guides", ()))


def curve_of(table: Mapping[str, Any], setting: str, metrics: Sequence[str], metric: str) -> dict[str, Any] | None:
    """The lines of one table.

    Rows are on one line if they have one model and their own settings differ in ``setting`` alone. A row whose settings
    were chosen on valid is on none: it would stand where the one that it chose stands.

    Args:
        table: from :func:`recbole_llm.leaderboard.assemble.table_of`.
        setting: a number in the rows' runs.
        metrics: those to show.
        metric: by which a line's best point on valid is marked.

    Returns:
        ``setting``, ``metrics``, ``lines`` (``name`` and ``points``: ``value``, ``at``, ``row``, ``best``, and by
        metric ``mean``, ``low``, ``high`` and ``seeds``, each seed's own mean), ``ticks`` (``value`` and where it
        stands, ``at``) and ``scaled`` (whether the places are the inverse hyperbolic sine of the values); ``picture``
        is for :func:`write_curves`. ``None`` where no two rows differ in the setting.
    """
    metrics = [name.lower() for name in metrics]
    grouped: dict[str, list[dict[str, Any]]] = {}
    for row in table["rows"]:
        point = _point(row, setting, metrics)
        if point is not None and not row.get("choice"):
            rest = {key: value for key, value in row["settings"].items() if key != setting}
            grouped.setdefault(json.dumps([row["model"], rest], sort_keys=True), []).append(point)
    lines = [sorted(points, key=lambda point: point["value"]) for points in grouped.values()]
    lines = [points for points in lines if len({point["value"] for point in points}) > 1]
    if not lines:
        return None
    values = sorted({point["value"] for points in lines for point in points})
    places, scaled = _places(values)
    valid = {row["name"]: row["metrics"].get(metric.lower(), {}).get("valid") for row in table["rows"]}
    for points in lines:
        known = [point for point in points if valid[point["row"]] is not None]
        best = max(known, key=lambda point: valid[point["row"]], default=None)
        for point in points:
            point |= {"at": places[point["value"]], "best": point is best}
    return {
        "setting": setting,
        "metrics": [name for name in metrics if any(name in point["metrics"] for line in lines for point in line)],
        "metric": metric.lower(),
        "lines": [{"name": name, "points": points} for name, points in zip(_names(lines, setting), lines, strict=True)],
        "ticks": [{"value": value, "at": places[value]} for value in values],
        "scaled": scaled,
        "picture": None,
    }


def _point(row: Mapping[str, Any], setting: str, metrics: Sequence[str]) -> dict[str, Any] | None:
    results = [read_result(run) for run in row["runs"]]
    values = {json.dumps(result.get("config", {}).get(setting)) for result in results}
    value = json.loads(values.pop()) if len(values) == 1 else None
    if not _is_number(value):
        return None
    found = {}
    for name in metrics:
        if name in row["metrics"]:
            seeds = [figures_of(result)[name] for result in results]
            found[name] = {key: row["metrics"][name][key] for key in ("mean", "low", "high")} | {"seeds": seeds}
    return {"value": value, "row": row["name"], "metrics": found} if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _places(values: Sequence[float]) -> tuple[dict[float, float], bool]:
    """Where values stand on an axis: as they are, or, where they are far apart, closer the larger they are."""
    sizes = [abs(value) for value in values if value]
    if max(sizes) <= FAR * min(sizes):
        return {value: float(value) for value in values}, False
    # Zero has its place, which a logarithm would not give it.
    return {value: math.asinh(value / min(sizes)) for value in values}, True


def _names(lines: Sequence[Sequence[Mapping[str, Any]]], setting: str) -> list[str]:
    """A name for each line: its rows' own without the setting and its value, or what these have in common."""
    names = []
    for points in lines:
        rows = [point["row"] for point in points]
        bare = {_without(point["row"], setting, point["value"]) for point in points}
        alike = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*rows, strict=False))
        shared = "".join(letters[0] for letters in alike).rstrip(" ,.:;=([")
        names.append(bare.pop() if len(bare) == 1 else shared or rows[0])
    return [name if names.count(name) == 1 else points[0]["row"] for name, points in zip(names, lines, strict=True)]


def _without(row: str, setting: str, value: float) -> str:
    """A row's name without a setting's value, and without the setting's name before it."""
    written = "|".join(re.escape(form) for form in sorted({json.dumps(value), f"{value:g}"}, key=len, reverse=True))
    for named in (rf"\b{re.escape(setting)}[\s=:]*", ""):
        found = list(re.finditer(rf"{named}(?<![\w.])(?:{written})(?![\w.])", row))
        if found:
            # The value stands behind what the row is called otherwise.
            before, behind = row[: found[-1].start()].rstrip(" ,;"), row[found[-1].end() :]
            behind = behind.lstrip(" ,;") if before.endswith(("(", "[")) else behind
            return re.sub(r"\s*(\(\)|\[\])", "", before + behind).strip(" ,;:=")
    return row


def write_curves(tables: Sequence[dict[str, Any]], folder: Path) -> None:
    """Draw the tables' curves, a PNG each, and note the files' names in them; see :func:`picture_lines`.

    Args:
        tables: those with ``curve``.
        folder: where they go; made if need be.
    """
    for table in tables:
        curve = table["curve"]
        if curve is None or not can_draw():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        plain = re.sub(r"[^\w.+-]", "-", f"{curve['setting']} {title_of(table)}")
        path = folder / f"curve-{plain}.png"
        draw_curves(curve, f"{', '.join(curve['metrics'])} over {curve['setting']}, {title_of(table)}", path)
        curve["picture"] = path.name


def picture_lines(tables: Sequence[Mapping[str, Any]], setting: str, folder: Path) -> list[str]:
    """Where the tables' curves over a setting are, or why there are none.

    Args:
        tables: after :func:`write_curves`.
        setting: that was asked for.
        folder: where the pictures went.
    """
    curves = [table["curve"] for table in tables if table["curve"]]
    if not curves:
        return [f"picture     none: no two rows differ in {setting} alone"]
    if not can_draw():
        return [f"picture     none: {MISSING_PLOTS}"]
    return [f"picture     {folder / curve['picture']}" for curve in curves]
