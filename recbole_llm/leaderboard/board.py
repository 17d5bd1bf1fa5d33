"""What ``recbole-llm leaderboard`` does: run what is missing of a suite, and write its tables and its page."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from recbole_llm import registry
from recbole_llm.errors import DiskFullError, UserError, did_you_mean
from recbole_llm.evaluation.consistency import figures_of
from recbole_llm.leaderboard import cell as cell_process
from recbole_llm.leaderboard import tables
from recbole_llm.leaderboard.assemble import ALPHA, board_of, table_of
from recbole_llm.leaderboard.choice import label
from recbole_llm.leaderboard.curve import curve_of, picture_lines, write_curves
from recbole_llm.leaderboard.details import with_details
from recbole_llm.leaderboard.grid import write_grid
from recbole_llm.leaderboard.paper import beside_paper
from recbole_llm.leaderboard.report import write_page
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.schedule import Budget, Ended, Job, run_jobs
from recbole_llm.leaderboard.study import REASON, Study
from recbole_llm.leaderboard.suite import (
    Cell,
    Suite,
    arguments_of,
    marked,
    positive,
    read_suite,
    settings_of,
    suite_of,
)
from recbole_llm.leaderboard.warm import starter
from recbole_llm.progress import clock
from recbole_llm.schema import parse_value
from recbole_llm.training.runs import writable

# What a suite sets itself, and what to say instead.
OWN_PER_CELL = {
    "seed": "say --seeds=1,2,3",
    "model": "say --models=BPR,EASE, or name a --suite whose rows name models",
    "result_file": "results are in the cells folder of --output",
}
USAGE = "recbole-llm leaderboard --suite=FILE | --models=BPR,EASE --datasets=ml-100k [--output=DIR] [--key=value ...]"


@dataclass
class Asked:
    """What the command line asked for.

    Attributes:
        suite: the study.
        folder: where its results go.
        budget: for its runs.
        command_line: settings of every cell.
        of_row: settings of one row, by row.
        command: the words, for whoever wants the same.
        only: the rows to run now; ``None``, all.
    """

    suite: Suite
    folder: Path
    budget: Budget
    command_line: list[str]
    of_row: dict[str, list[str]]
    command: str
    only: frozenset[str] | None = None


def leaderboard(arguments: Sequence[str], say: Callable[[str], None] | None = None) -> tuple[str, int]:
    """Run what is missing, and write ``leaderboard.{md,csv,json,html}``.

    Tables are written after every run, so that a study that is cut off leaves what it has; the same command goes on
    where it stood.

    Args:
        arguments: ``--suite=FILE`` (or the name of a shipped one), or ``--models`` and ``--datasets``;
            ``--output=DIR``; the suite's own keys (``--seeds=1,2``); ``--only='SASRec*'``, the rows to run now;
            ``--cores``, ``--threads`` and ``--memory`` (GiB); settings of every run (``--epochs=5``) and of one row
            (``--BPR.epochs=5``).
        say: takes a line a run; by default they go to stderr.

    Returns:
        The tables for the terminal with the files' paths, and how many runs failed.

    Raises:
        UserError: a file that cannot be read, or a setting that a run's model does not take; before any work.
        DiskFullError: a run found the disk full.
    """
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    asked = asked_for(arguments)
    cells = marked(asked.suite, asked.folder, asked.command_line, asked.of_row, fetch=True)
    study = Study(cells, asked.folder, asked.suite.metric, asked.only)
    writable(asked.folder / "cells" / "any", "--output")
    _run_missing(study, asked, say)
    board = write(study, asked, whole=True)
    lines = [tables.terminal(board, sys.stdout.isatty()), ""]
    lines += [f"{suffix:11} {asked.folder / f'leaderboard.{suffix}'}" for suffix in ("html", "md", "csv", "json")]
    if asked.suite.curve:
        lines += picture_lines(board["tables"], asked.suite.curve["setting"], asked.folder)
    lines += write_grid(board, list(asked.suite.rows), asked.suite.reference, asked.folder)
    return "\n".join(lines), len(study.reasons)


# --- what was asked for ----------------------------------------------------------------------------------------------
def asked_for(arguments: Sequence[str]) -> Asked:
    """Read the command line; see :func:`leaderboard`."""
    words, own, of_row = _sorted_words(arguments)
    rest = [f"--{key}={value}" for key, value in words.items() if key not in _HOW]
    if "suite" in words:
        for key in ("models", "dataset"):
            if key in words:
                instead = "; --datasets replaces the suite's" if key == "dataset" else ""
                raise UserError(f"--{key} and --suite say the same thing twice; take one of them{instead}")
        suite = read_suite(words["suite"], own)
        name = Path(words["suite"]).stem
    else:
        suite = _plain_suite(words, own)
        name = "+".join([*suite.rows, *suite.datasets])
    for row, given in of_row.items():
        if row not in suite.rows:
            near = did_you_mean(row, suite.rows)
            raise UserError(
                f"--{row}.{given[0].removeprefix('--')}: '{row}' is neither a row nor a part of a model{near}"
            )
    folder = Path(words.get("output") or Path("saved") / "leaderboards" / re.sub(r"[^\w.+-]", "_", name)[:80])
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is no folder")
    command = shlex.join(["recbole-llm", "leaderboard", *arguments])
    return Asked(suite, folder, _budget(words), rest, of_row, command, _only(words, suite))


def _only(words: Mapping[str, str], suite: Suite) -> frozenset[str] | None:
    """The rows that patterns name: one pattern, whose commas are a name's own, or a YAML list of some."""
    if "only" not in words:
        return None
    text = words["only"]
    patterns = [str(pattern) for pattern in (parse_value(text, None) if text.startswith("[") else [text])]
    found = {
        pattern: [row for row in suite.rows if row == pattern or fnmatch.fnmatchcase(row, pattern)]
        for pattern in patterns
    }
    for pattern, rows in found.items():
        if not rows:
            raise UserError(f"--only: no row is called '{pattern}'{did_you_mean(pattern, suite.rows)}")
    return frozenset(row for rows in found.values() for row in rows)


_LISTS = ("datasets", "seeds", "baselines")
_HOW = ("suite", "models", "dataset", "only", "output", "cores", "threads", "memory")


def _sorted_words(arguments: Sequence[str]) -> tuple[dict[str, str], dict[str, Any], dict[str, list[str]]]:
    """The words by key; the suite's own keys among them as values; those of one row by row."""
    words: dict[str, str] = {}
    own: dict[str, Any] = {}
    of_row: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    parts = {part for entry in registry.entries().values() for part in entry.stages}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals or not argument.startswith("--"):
            raise UserError(f"{argument!r} is not understood; {USAGE}")
        row, dot, rest = _row_and_key(key, parts)
        if rest in OWN_PER_CELL or (dot and rest == "dataset"):
            raise UserError(f"--{key} is each run's own in a leaderboard; {OWN_PER_CELL.get(rest, 'say --datasets')}")
        if key in given and given[key] != value:
            raise UserError(f"--{key} is given twice, as {given[key]!r} and {value!r}")
        given[key] = value
        if dot:
            of_row.setdefault(row, []).append(f"--{rest}={value}")
        elif key in Suite.__dataclass_fields__ and key != "rows":
            own[key] = _listed(value) if key in _LISTS else parse_value(value, None)
        else:
            words[key] = value
    return words, own, of_row


def _row_and_key(key: str, parts: Collection[str]) -> tuple[str, bool, str]:
    """``GLTA 1.5.graph_model.epochs`` as row, that there is one, and the row's setting; a row's name may hold dots."""
    head, dot, last = key.rpartition(".")
    row, _, part = head.rpartition(".")
    if head in parts or not dot:
        return "", False, key
    return (row, True, f"{part}.{last}") if part in parts and row else (head, True, last)


def _plain_suite(words: Mapping[str, str], own: Mapping[str, Any]) -> Suite:
    """The suite of ``--models`` and ``--datasets``: a row a model, as shipped."""
    models = _names(words.get("models", ""))
    datasets = own.get("datasets") or _names(words.get("dataset", ""))
    if not models or not datasets:
        raise UserError(f"a leaderboard needs a --suite, or --models and --datasets: {USAGE}")
    twice = [model for model in dict.fromkeys(models) if models.count(model) > 1]
    if twice:
        raise UserError(f"--models names {twice[0]} twice; rows of one model with other settings need a --suite")
    rows = {model: {"model": model} for model in models}
    for model in models:
        registry.get_model(model)
    return suite_of({"title": ", ".join(datasets), "datasets": datasets, "rows": rows, **own}, "--models")


def _listed(text: str) -> list[Any]:
    """``1,2`` as well as ``[1, 2]``, whose brackets and blanks mean something to a shell."""
    value = parse_value(text, None)
    return value if isinstance(value, list) else [parse_value(part.strip(), None) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [str(name) for name in _listed(text)] if text else []


def _budget(words: Mapping[str, str]) -> Budget:
    numbers = {"cores": float(os.cpu_count() or 1), "threads": 1.0}
    # What is free now is what there is to give, less a share for whoever else works here.
    numbers["memory"] = 0.8 * psutil.virtual_memory().available / 2**30
    for key in numbers:
        if key in words:
            numbers[key] = positive("the command line", f"--{key}", parse_value(words[key], None))
    return Budget(max(1, int(numbers["cores"])), numbers["memory"], max(1, int(numbers["threads"])))


# --- running ---------------------------------------------------------------------------------------------------------
def _run_missing(study: Study, asked: Asked, say: Callable[[str], None]) -> None:
    """Run the cells that have no result yet."""
    wanted = study.wanted()
    missing = [cell for cell in wanted if not study.done(cell)]
    found, whole = len(wanted) - len(missing), study.expected()
    for cell in study.cells:
        if study.done(cell):
            # It may have ended after whoever started it was killed.
            _tidy(study.file(cell))
    if missing:
        # It would stand beside newer tables until the last run has ended.
        for stale in ("leaderboard.html", "grid.md"):
            (study.folder / stale).unlink(missing_ok=True)
    if found:
        say(f"{found} of {whole} runs are found in {study.folder / 'cells'}")
    by_name = {str(cell): cell for cell in study.cells}
    start, count = time.monotonic(), 0

    def ended(job: Job, end: Ended) -> None:
        nonlocal count
        cell, count = by_name[job.name], count + 1
        reason = _reason(cell, study, end, asked)
        if reason:
            study.reasons[cell] = reason
            study.file(cell).with_suffix(REASON).write_text(reason, encoding="utf-8")
        left = (time.monotonic() - start) / count * (whole - found - count)
        rest = f", about {clock(left)} left" if found + count < whole else ""
        outcome = f"failed: {reason}" if reason else _value(study.file(cell), asked.suite.metric)
        say(f"[{found + count}/{whole}] {cell}: {outcome} ({clock(end.seconds)}{rest})")
        write(study, asked, whole=False)

    with starter(len(missing), asked.budget.threads) as started:
        # Anew after each turn: what is chosen on valid has further seeds to run.
        while missing:
            run_jobs([_job(cell, study, asked, missing) for cell in missing], asked.budget, ended, say, started)
            missing = [cell for cell in study.wanted() if not study.done(cell) and cell not in study.reasons]


def _job(cell: Cell, study: Study, asked: Asked, missing: Sequence[Cell]) -> Job:
    settings = dict(cell.settings)
    file = study.file(cell)
    spec = {
        "model": settings.pop("model"), "dataset": cell.dataset, "settings": settings,
        "command_line": arguments_of(cell, asked.command_line, asked.of_row),
        "result": str(file), "reason": str(file.with_suffix(REASON)),
    }  # fmt: skip
    spec_file = file.with_suffix(".spec.json")
    spec_file.write_text(json.dumps(spec, indent=1), encoding="utf-8")
    # A run whose part is a row of its own would sit and wait for that row's training to end,
    after = {
        str(other)
        for other in study.cells
        if other.place == cell.place and other.seed == cell.seed and other.settings["model"] in cell.parts
    }
    # and one that only searches otherwise for that of the first which trains so.
    alike = [one for one in study.cells if cell.training and (one.place, one.training) == (cell.place, cell.training)]
    if alike and not any(map(study.done, alike)):
        first = next(one for one in missing if one in alike)
        after |= {str(first)} - {str(cell)}
    return Job(
        name=str(cell),
        command=[sys.executable, "-m", cell_process.__name__, str(spec_file)],
        memory=_memory(cell, study, asked),
        log=file.with_suffix(".log"),
        after=frozenset(after),
    )


def _memory(cell: Cell, study: Study, asked: Asked) -> float:
    """GiB to expect: the most that another seed of the row has needed, or what the suite says."""
    seen = [
        stage["peak_memory_mb"] / 1024
        for other in study.cells
        if (other.place, other.row) == (cell.place, cell.row) and study.done(other)
        for stage in json.loads(study.file(other).read_text(encoding="utf-8"))["stages"]
    ]
    return max(seen) if seen else float(asked.suite.rows[cell.row].get("run_memory", asked.suite.run_memory))


def _tidy(file: Path) -> None:
    """Take away what only an unfinished run needs."""
    for suffix in (".spec.json", REASON, ".log"):
        file.with_suffix(suffix).unlink(missing_ok=True)


def _reason(cell: Cell, study: Study, end: Ended, asked: Asked) -> str:
    """Why a run has no result; empty when it has."""
    file = study.file(cell)
    log = file.with_suffix(".log")
    if study.done(cell):
        _tidy(file)
        return ""
    if end.status == cell_process.FULL_DISK:
        said = log.read_text(encoding="utf-8").split("\n") if log.is_file() else []
        # The log lies on that disk as well.
        told = next(filter(None, reversed(said)), f"{cell}: no space is left on the disk")
        raise DiskFullError(told)
    if end.status is None:
        return f"it took {end.peak:.1f} GiB, more than the budget of {asked.budget.memory:g}; raise --memory"
    if file.with_suffix(REASON).is_file():
        return file.with_suffix(REASON).read_text(encoding="utf-8")
    if end.status < 0:
        return f"it was stopped by signal {-end.status} (its log: {log})"
    return f"it ended with status {end.status} (its log: {log})"


def _value(file: Path, metric: str) -> str:
    return f"{json.loads(file.read_text(encoding='utf-8'))['test'][metric.lower()]:.4f}"


# --- writing ---------------------------------------------------------------------------------------------------------
def write(study: Study, asked: Asked, whole: bool) -> dict[str, Any]:
    """Write the tables of what there is so far.

    Args:
        study: the cells.
        asked: what they are for.
        whole: with breakdowns, example users and the page.

    Returns:
        The board, see ``docs/leaderboards.md``.
    """
    suite = asked.suite
    metrics = _metrics(study, suite)
    made = []
    for dataset in suite.datasets:
        for protocol in suite.protocols:
            for column in suite.columns:
                members = [cell for cell in study.cells if cell.place == (dataset, protocol, column)]
                made.append(_table(members, study, suite, metrics, whole))
    if whole:
        write_curves(made, asked.folder)
    board = board_of(made, suite.title, asked.command, metrics, suite.metric, ALPHA)
    tables.write(board, asked.folder)
    if whole:
        write_page(board, asked.folder / "leaderboard.html")
    return board


def _table(members: Sequence[Cell], study: Study, suite: Suite, metrics: Sequence[str], whole: bool) -> dict[str, Any]:
    rows = []
    place = dataset, protocol, column = members[0].place
    for row, given in suite.rows.items():
        cells = [cell for cell in members if cell.row == row]
        # Rows that are not run now have what they had: a value that failed in an earlier call has failed.
        choice = study.choice(place, row, final=False)
        taken = (choice or {}).get("values") or {}
        settings = settings_of(given) | taken
        del settings["model"]
        rows.append(RowRuns(
            name=row,
            files=[study.file(cell) for cell in cells if cell.choice == taken and study.done(cell)],
            failed=[
                {"seed": cell.seed, "reason": ": ".join(filter(None, (label(cell.choice), study.reason(cell))))}
                for cell in cells
                if study.reason(cell)
            ],
            settings=settings,
            model=str(given["model"]),
            against=str(given.get("against") or ""),
            choice=choice,
        ))  # fmt: skip
    table = table_of(
        rows,
        dataset=dataset,
        protocol=protocol if len(suite.protocols) > 1 else "",
        column=column if len(suite.columns) > 1 else "",
        metric=suite.metric,
        metrics=metrics,
        reference=suite.reference,
        baselines=suite.baselines,
        alpha=ALPHA,
    )
    beside = [beside_paper(paper, dataset, table) for paper in suite.paper]
    table["papers"] = [paper for paper in beside if paper is not None]
    if whole and suite.curve:
        table["curve"] = curve_of(table, suite.curve["setting"], suite.curve["metrics"], suite.metric)
    return with_details(table, suite.metric) if whole else table


def _metrics(study: Study, suite: Suite) -> list[str]:
    """What the runs have measured, in their order, the suite's metric first."""
    found = [suite.metric.lower()]
    for cell in study.cells:
        if study.done(cell):
            found += figures_of(json.loads(study.file(cell).read_text(encoding="utf-8")))
    return list(dict.fromkeys(found))
