"""From runs to the plain data of a leaderboard: figures, tests against the best baseline and a named row, cost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.evaluation.consistency import is_consistency
from recbole_llm.evaluation.results import result_file
from recbole_llm.leaderboard.over_seeds import OverSeeds, over_seeds
from recbole_llm.leaderboard.rows import Line, RowRuns, Run, admit
from recbole_llm.leaderboard.statistics import PairedTest, holm, mean_interval, paired_test
from recbole_llm.registry import entries

SCHEMA = 1
# Of every test.
ALPHA = 0.05


def board_of(
    tables: Sequence[dict[str, Any]], title: str, command: str, metrics: Sequence[str], metric: str, alpha: float
) -> dict[str, Any]:
    """A leaderboard around its tables.

    Args:
        tables: from :func:`table_of`.
        title: of the leaderboard.
        command: what made it.
        metrics, metric, alpha: what the tables were made with.
    """
    return {
        "schema": SCHEMA,
        "title": title,
        "command": command,
        "commit": _commit(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": _versions(run for table in tables for row in table["rows"] for run in row["runs"]),
        "metrics": [name.lower() for name in metrics],
        "metric": metric.lower(),
        "alpha": alpha,
        "tables": list(tables),
    }


def _commit() -> str | None:
    """The commit of the checkout that this package is used from; ``None`` where it is installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], check=True, capture_output=True)
        said = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def _versions(runs: Iterable[str]) -> dict[str, str]:
    """The packages' versions that the runs were made with; several where runs differ."""
    found: dict[str, list[str]] = {}
    for run in runs:
        for package, version in json.loads(result_file(run).read_text(encoding="utf-8")).get("versions", {}).items():
            if version and version not in found.setdefault(package, []):
                found[package].append(version)
    return {package: " and ".join(versions) for package, versions in found.items() if versions}


def table_of(
    rows: Sequence[RowRuns],
    dataset: str,
    protocol: str,
    column: str,
    metric: str,
    metrics: Sequence[str],
    reference: str | None,
    baselines: Sequence[str] | None,
    alpha: float,
    like: str | Path | None = None,
) -> dict[str, Any]:
    """One table: rows on one split under one policy, with tests over users.

    Every other row is tested against the best baseline, which is chosen by its mean ``metric`` on valid, and against
    the reference. A row's value is each user's mean over seeds. Holm's correction takes all pairs of one metric
    together. Rows with a base of their own (``against``) are tested against it besides; these pairs are a family of
    their own, as their question was asked before any figure was seen. How far a row agrees with its teacher is shown
    and not tested. Breakdowns, example users, curves and what a paper says in words are left for others to fill in.

    Args:
        rows: what stands behind each row; names are unique.
        dataset, protocol, column: what the table is of.
        metric: what rows are ranked by and the best baseline is chosen by, e.g. ``ndcg@10``.
        metrics: all that are shown.
        reference: a row that every other one is tested against, or ``None``.
        baselines: names of the rows that count as baselines; by default those whose model is no language model.
        alpha: of the tests.
        like: a run whose split and policy the table is for; by default those of the most runs.

    Returns:
        The table as plain data. What the rows' evaluation blocks do not share (whether a model reads valid rows as
        input at test, ...) stands in each row's own. Runs that are not judged like the table stand in their row's
        ``refused`` and in no figure.

    Raises:
        UserError: ``reference``, ``baselines`` or a row's ``against`` names no row, or ``like`` cannot be read.
    """
    metric = metric.lower()
    metrics = list(dict.fromkeys([metric, *(name.lower() for name in metrics)]))
    names = [row.name for row in rows]
    bases = [row.against for row in rows if row.against]
    asked = (("reference", [reference] if reference else []), ("baselines", list(baselines or ())), ("against", bases))
    for key, named in asked:
        for name in named:
            if name not in names:
                raise UserError(
                    f"{key}: '{name}' is no row{did_you_mean(name, names) or '; rows: ' + ', '.join(names)}"
                )
    lines, standard = admit(rows, like)
    made = [_row(line, metrics, baselines) for line in lines]
    best = _best_baseline(made, metric)
    quality = [name for name in metrics if not is_consistency(name)]
    tests = _test(made, lines, best, reference, quality, alpha)
    pairs = _test_own(made, lines, quality, alpha)
    for name in quality:
        _embolden(made, best or reference, name)
    shared = _shared([run.result["evaluation"] for line in lines for run in line.runs])
    for row, line in zip(made, lines, strict=True):
        row["evaluation"] = _own([run.result["evaluation"] for run in line.runs], shared or {})
    made.sort(key=lambda row: -row["metrics"][metric]["mean"] if metric in row["metrics"] else np.inf)
    return {
        "dataset": dataset,
        "protocol": protocol,
        "column": column,
        "split": standard.result["split"] if standard else None,
        "evaluation": shared,
        "best_baseline": best,
        "reference": reference,
        "tests": tests[metric],
        "pairs": pairs[metric],
        "rows": made,
        "breakdowns": [],
        "users": [],
        "curve": None,
        "papers": [],
    }


def _row(line: Line, metrics: Sequence[str], baselines: Sequence[str] | None) -> dict[str, Any]:
    runs, row = line.runs, line.row
    model = runs[0].result["model"] if runs else row.model or str(row.settings.get("model", row.name))
    entry = entries().get(model)
    kind = entry.kind if entry else "external"
    return {
        "name": row.name,
        "model": model,
        "kind": kind,
        "baseline": kind != "language" if baselines is None else row.name in baselines,
        "seeds": [run.seed for run in runs],
        "failed": [dict(failed) for failed in row.failed],
        "refused": line.refused,
        "metrics": {name: _figure(line, name) for name in metrics if _measured(runs, name)},
        "at_k": _at_k(runs),
        "cost": _cost([run.result for run in runs]),
        "curves": [{"seed": run.seed, **run.result["curves"]} for run in runs if run.result.get("curves")],
        "settings": dict(row.settings),
        "against": row.against or None,
        "choice": row.choice,
        "runs": [str(run.path) for run in runs],
    }


def _measured(runs: Sequence[Run], metric: str) -> bool:
    return bool(runs) and all(metric in run.test for run in runs)


def _figure(line: Line, metric: str) -> dict[str, Any]:
    results = [run.result for run in line.runs]
    test = [run.test[metric] for run in line.runs]
    valid = [result["valid"][metric] for result in results if metric in result["valid"]]
    values = line.values(metric)
    # A metric that is no mean over users (coverage, Gini, ...) has no interval over them.
    interval = {"mean": fmean(test), "low": None, "high": None} if values is None else asdict(mean_interval(values))
    return {
        **interval,
        "std": stdev(test) if len(test) > 1 else None,
        "valid": fmean(valid) if len(valid) == len(results) else None,
        "bold": False,
        "against": {},
        "own": None,
    }


def _at_k(runs: Sequence[Run]) -> dict[str, list[float]]:
    if not all(run.at_k for run in runs):
        return {}
    curves: dict[str, list[float]] = {}
    for name in runs[0].at_k if runs else ():
        largest = min(len(run.at_k[name]) for run in runs)
        curves[name] = np.mean([run.at_k[name][:largest] for run in runs], axis=0).tolist()
    return curves


def _cost(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds of what a run took when its stages were made, wherever they came from this time."""

    def over_seeds(value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        found = [value(result) for result in results]
        known = [one for one in found if one is not None]
        return fmean(known) if known and len(known) == len(found) else None

    def whole(number: float | None) -> int | None:
        return None if number is None else round(number)

    def tokens(result: Mapping[str, Any]) -> float | None:
        counts = [stage.get("tokens") for stage in _stages(result)]
        return None if None in counts else float(sum(filter(None, counts)))

    return {
        "seconds": over_seeds(lambda result: sum(stage["seconds"] for stage in _stages(result))),
        "peak_memory_mb": over_seeds(
            lambda result: max((stage["peak_memory_mb"] for stage in _stages(result)), default=None)
        ),
        "parameters": whole(over_seeds(lambda result: result["parameters"]["total"])),
        "trainable": whole(over_seeds(lambda result: result["parameters"]["trainable"])),
        "tokens": whole(over_seeds(tokens)),
        "users_per_second": over_seeds(lambda result: result["throughput"]["test_users_per_second"]),
    }


def _stages(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """A run's stages; one that stands twice (a teacher of two parts) was made once."""
    return list({stage["fingerprint"]: stage for stage in result["stages"]}.values())


def _shared(blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What all runs' blocks say alike."""
    if not blocks:
        return None
    first = blocks[0]
    return {key: value for key, value in first.items() if all(block.get(key, ...) == value for block in blocks)}


def _own(blocks: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> dict[str, Any]:
    """What a row's blocks say beside what all rows' say alike; of numbers that its seeds do not share, their mean."""
    found = {}
    for key in (key for block in blocks[:1] for key in block if key not in shared):
        values = [block.get(key) for block in blocks]
        numbers = [value for value in values if isinstance(value, float | int) and not isinstance(value, bool)]
        same = all(value == values[0] for value in values)
        found[key] = fmean(numbers) if len(numbers) == len(values) and not same else values[0]
    return found


def _best_baseline(made: Sequence[Mapping[str, Any]], metric: str) -> str | None:
    """The baseline with the highest value on valid; test has no say, or the choice would flatter it."""
    known = [row for row in made if row["baseline"] and row["metrics"].get(metric, {}).get("valid") is not None]
    return max(known, key=lambda row: row["metrics"][metric]["valid"])["name"] if known else None


def _test(
    made: Sequence[dict[str, Any]],
    lines: Sequence[Line],
    best: str | None,
    reference: str | None,
    metrics: Sequence[str],
    alpha: float,
) -> dict[str, int]:
    """Fill in ``against``; returns how many tests each metric's correction took together."""
    counts = {}
    for metric in metrics:
        values = {line.row.name: found for line in lines if (found := line.values(metric)) is not None}
        others = [name for name in dict.fromkeys((best, reference)) if name in values]
        tests = {
            (name, other): paired_test(values[name], values[other])
            for name in values
            for other in others
            if other is not None and name != other
        }
        # Where the best baseline meets the reference, both rows show one and the same test.
        pairs = list(dict.fromkeys(tuple(sorted(pair)) for pair in tests))
        p_values = [(tests.get((one, two)) or tests[two, one]).p for one, two in pairs]
        adjusted = dict(zip(pairs, holm(p_values), strict=True))
        by_name = {row["name"]: row for row in made}
        seeds = {line.row.name: line.by_seed(metric) for line in lines if line.row.name in values}
        for (name, other), test in tests.items():
            shown = _shown(test, over_seeds(seeds[name], seeds[other]), adjusted[tuple(sorted((name, other)))], alpha)
            by_name[name]["metrics"][metric]["against"][other] = shown
        counts[metric] = len(pairs)
    return counts


def _test_own(
    made: Sequence[dict[str, Any]], lines: Sequence[Line], metrics: Sequence[str], alpha: float
) -> dict[str, int]:
    """Fill in ``own``: each row against its own base; returns how many such pairs each metric has."""
    counts = {}
    by_name = {row["name"]: row for row in made}
    for metric in metrics:
        values = {line.row.name: found for line in lines if (found := line.values(metric)) is not None}
        pairs = [
            (line.row.name, line.row.against)
            for line in lines
            if line.row.name in values and line.row.against in values
        ]
        tests = [paired_test(values[name], values[base]) for name, base in pairs]
        adjusted = holm([test.p for test in tests])
        seeds = {line.row.name: line.by_seed(metric) for line in lines if line.row.name in values}
        for (name, base), test, p in zip(pairs, tests, adjusted, strict=True):
            shown = _shown(test, over_seeds(seeds[name], seeds[base]), p, alpha)
            by_name[name]["metrics"][metric]["own"] = {"row": base, **shown}
        counts[metric] = len(pairs)
    return counts


def _shown(test: PairedTest, seeds: OverSeeds, adjusted: float, alpha: float) -> dict[str, Any]:
    mark = "" if adjusted >= alpha else "+" if test.difference > 0 else "-"
    return {
        "difference": test.difference,
        "low": test.low,
        "high": test.high,
        "gain": test.gain,
        "effect": test.effect,
        "p": test.p,
        "p_adjusted": adjusted,
        "wilcoxon_p": test.wilcoxon_p,
        "mark": mark,
        **seeds.shown(),
    }


def _embolden(made: Sequence[dict[str, Any]], best: str | None, metric: str) -> None:
    """Bold is what is significantly above the best baseline, or that itself where it is so above every other row."""
    shown = {row["name"]: row["metrics"][metric] for row in made if metric in row["metrics"]}
    if best not in shown:
        return
    others = [name for name in shown if name != best]
    marks = {name: shown[name]["against"].get(best, {}).get("mark", "") for name in others}
    for name in others:
        shown[name]["bold"] = marks[name] == "+"
    shown[best]["bold"] = bool(others) and all(mark == "-" for mark in marks.values())
