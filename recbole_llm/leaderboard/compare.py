"""``recbole-llm compare``: runs that are already there beside each other."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config import NEUTRAL_KEYS
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.evaluation.consistency import arrays_of
from recbole_llm.evaluation.results import read_run
from recbole_llm.leaderboard.assemble import ALPHA, board_of, table_of
from recbole_llm.leaderboard.curve import curve_of, picture_lines, write_curves
from recbole_llm.leaderboard.details import with_details
from recbole_llm.leaderboard.marks import MOVING
from recbole_llm.leaderboard.report import write_page
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.suite import check_larger_is_better
from recbole_llm.leaderboard.tables import terminal, write
from recbole_llm.training.runs import writable

USAGE = "recbole-llm compare RUN RUN [...] [--reference=NAME] [--metric=NDCG@10] [--curve=SETTING] [--output=DIR]"
OPTIONS = ("reference", "metric", "curve", "output")
# Settings by which two rows of one model are told apart; with more, the run's folder says more.
TOLD_APART = 3
# What a wrapper's settings call the model that it wraps.
_BASE = "base_model"


def compare(arguments: Sequence[str]) -> str:
    """The table behind ``recbole-llm compare``.

    Args:
        arguments: run folders or ``result.json`` files (runs of one model and settings are seeds of one row), and
            ``--reference=NAME`` (by default the first row), ``--metric=NDCG@10``, ``--output=DIR`` (write
            ``leaderboard.html``, ``.md``, ``.csv`` and ``.json`` there), ``--curve=alpha`` (with ``--output``: draw
            the metric, and the agreement with a teacher where there is one, over a setting).

    Raises:
        UserError: fewer than two runs; one that cannot be read or is not judged like the first, which is named.
    """
    paths = [argument for argument in arguments if not argument.startswith("--")]
    options = _options([argument for argument in arguments if argument.startswith("--")])
    if len(paths) < 2:
        raise UserError(f"compare takes two runs or more: {USAGE}")
    results = [read_run(path)[0] for path in paths]
    rows = rows_of(paths)
    metrics = [name for name in results[0]["test"] if all(name in result["test"] for result in results)]
    agreements = list(dict.fromkeys(name for result in results for name in arrays_of(result)))
    if not metrics:
        raise UserError(f"the runs {', '.join(paths)} have no metric in common")
    metric = options.get("metric", "ndcg@10" if "ndcg@10" in metrics else metrics[0]).lower()
    if metric not in metrics:
        near = did_you_mean(metric, metrics) or f"; they have {', '.join(metrics)}"
        raise UserError(f"--metric={options['metric']} is not among the runs' metrics{near}")
    check_larger_is_better(metric)
    reference = options.get("reference", rows[0].name)
    dataset = str(results[0].get("dataset", ""))
    shown = [*metrics, *agreements]
    table = table_of(rows, dataset, "", "", metric, shown, reference, None, ALPHA, like=paths[0])
    for row in table["rows"]:
        for refused in row["refused"]:
            raise UserError(f"{refused['run']} ({row['name']}) cannot be compared with {paths[0]}: {refused['reason']}")
    if "curve" in options:
        _add_curve(table, options, metric, agreements)
    if "output" in options:
        writable(Path(options["output"]) / "leaderboard.html", "--output")
        write_curves([table], Path(options["output"]))
        with_details(table, metric)
    command = shlex.join(["recbole-llm", "compare", *arguments])
    board = board_of([table], "Comparison of runs", command, shown, metric, ALPHA)
    lines = [terminal(board, sys.stdout.isatty())]
    if "output" in options:
        folder = Path(options["output"])
        page = folder / "leaderboard.html"
        write_page(board, page)
        lines += ["", *(f"{path.suffix[1:]:12}{path}" for path in (page, *write(board, folder)))]
        if "curve" in options:
            lines += picture_lines([table], options["curve"], folder)
    return "\n".join(lines)


def _add_curve(table: dict[str, Any], options: dict[str, str], metric: str, agreements: Sequence[str]) -> None:
    """Fill in the table's curve."""
    setting = options["curve"]
    if "output" not in options:
        raise UserError(f"--curve={setting} draws a picture; say with --output=DIR where it goes")
    cut = metric.partition("@")[2]
    beside = [name for name in agreements if name.partition(" ")[0].endswith(f"@{cut}")]
    table["curve"] = curve_of(table, setting, [metric, *beside], metric)
    if table["curve"] is None:
        raise UserError(f"--curve={setting}: no two rows differ in {setting} alone, or it is no number")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    options = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if key not in OPTIONS or not equals or not value:
            raise UserError(f"{argument!r} is not understood here{did_you_mean(key, OPTIONS)}; {USAGE}")
        options[key] = value
    return options


def rows_of(paths: Sequence[str]) -> list[RowRuns]:
    """Group runs into rows: those of one model and settings are its seeds.

    Raises:
        UserError: a run cannot be read, or has no figures on test.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        result = read_run(path)[0]
        if "test" not in result:
            raise UserError(f"{path} has no figures on test; is it the result of a finished run?")
        grouped.setdefault((result["model"], json.dumps(_settings(result), sort_keys=True)), []).append(path)
    rows = []
    for (model, settings), members in grouped.items():
        own = json.loads(settings)
        parts = _parts(model, own)
        rivals = [json.loads(other) for name, other in grouped if name == model]
        # Around another base a wrapper has other settings altogether, which the base's name stands for.
        kin = [rival for rival in rivals if rival.get(_BASE) == own.get(_BASE)]
        apart = {key: own.get(key) for key in sorted(set().union(*kin) - {*parts}) if _differs(key, kin)}
        told = {key: value for key, value in parts.items() if _differs(key, rivals)} | apart
        rows.append(RowRuns(_name(model, [*parts.values()], apart, members[0]), members, settings=told))
    return rows


def _parts(model: str, settings: dict[str, Any]) -> dict[str, str]:
    """Of a model that wraps another: what it wraps and what teaches it, without which its name says little."""
    if settings.get(_BASE) is None or model not in registry.entries():
        return {}
    try:
        keys = (_BASE, *getattr(registry.class_of(model, settings), "teachers", ()))
    except UserError:
        return {}  # The base is of a package that is not installed here.
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def _settings(result: dict[str, Any]) -> dict[str, Any]:
    """The settings that make two runs of a model seeds of one row rather than two rows."""
    config = result.get("config", {})
    without = {*NEUTRAL_KEYS, "seed"}
    settings = {key: value for key, value in config.items() if key not in without and value is not None}
    # A run of before a setting existed is a run without it. Searched settings of parts stand in no run's config.
    return settings | {key: config[key] for key in (*MOVING, "tuned") if config.get(key)}


def _differs(key: str, rivals: Sequence[dict[str, Any]]) -> bool:
    return len({json.dumps(rival.get(key), sort_keys=True) for rival in rivals}) > 1


def _name(model: str, parts: Sequence[str], apart: dict[str, Any], path: str) -> str:
    told = [path] if len(apart) > TOLD_APART else [f"{key} {json.dumps(value)}" for key, value in apart.items()]
    words = ", ".join([*parts, *told])
    return f"{model} ({words})" if words else model
