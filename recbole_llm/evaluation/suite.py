"""A study as one file: rows (models with their settings) by columns (what is varied), over seeds, data sets, protocols.

Every cell is an ordinary run, so cells share stages through the cache. A finished cell is kept under a mark of all that
it depends on and not run again; one that fails is shown with its reason and tried again the next time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recbole_llm.config import NEUTRAL_KEYS, Config
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.evaluation.suite_tables import markdown, pictures, tables
from recbole_llm.progress import clock
from recbole_llm.schema import parse_value, properties_dir, read_yaml
from recbole_llm.training.store import fingerprint_of

# What a cell has unless the file or the command line says otherwise.
QUIET = {"state": "WARNING", "show_progress": False, "tensorboard": False, "evaluate_parts": False}

# What a suite sets itself, and what to say instead.
OWN_PER_CELL = {
    "seed": "say --seeds=[1, 2, 3]",
    "dataset": "say --datasets=[tiny]",
    "model": "rows name models, in the file",
    "result_file": "results are in the cells folder of --output",
}

# They move no stage (their effect is in the texts and rows a stage reads) but they do move a cell.
MOVING = ("train_share", "text_drop", "text_shuffle", "text_noise_seed", "item_text", "item_text_fallback",
          "item_text_max_words", "refit_on_valid", "metrics", "topk", "metric_decimal_place")  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """A study.

    Attributes:
        title: of its table and picture.
        datasets: names.
        rows: row name to settings, ``model`` among them.
        columns: column name to settings; one without any settings when the file varies nothing.
        protocols: name to settings, e.g. ``{ratio: {eval_args: {...}}}``.
        seeds: one run each.
        metric: what the table shows, e.g. ``NDCG@10``.
        baseline: the row that the others are set against, column by column.
        settings: of every cell. Above them stand the protocol's, the column's, the row's, and the command line's.
    """

    title: str
    datasets: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Mapping[str, Any]]
    protocols: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    metric: str
    baseline: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        dataset, protocol, column, row, seed: where it stands.
        settings: what it is run with, ``model`` among them.
        mark: hash of all that its result depends on.
    """

    dataset: str
    protocol: str
    column: str
    row: str
    seed: int
    settings: Mapping[str, Any] = field(hash=False)
    mark: str = ""

    def __str__(self) -> str:
        where = (self.dataset, self.protocol, self.column, self.row, f"seed {self.seed}")
        return ", ".join(part for part in where if part)

    @property
    def file(self) -> str:
        """The name of its result."""
        words = "-".join(filter(None, (self.dataset, self.protocol, self.column, self.row, str(self.seed))))
        plain = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in words)
        return f"{plain}-{self.mark[:8]}.json"


def run_suite(arguments: Sequence[str], say: Callable[[str], None] | None = None) -> tuple[str, int]:
    """What ``recbole-llm suite`` does: run what is missing, and write ``suite.md``, ``suite.json`` and the pictures.

    The tables are written after every cell, so that a study that is cut off leaves what it has.

    Args:
        arguments: the file (or the name of a shipped one), ``--output=DIR``, the suite's own keys (``--seeds=[1]``),
            and settings of every cell.
        say: takes a line a cell; by default they go to stderr.

    Returns:
        The tables as Markdown with the paths, and how many cells failed.

    Raises:
        UserError: a file that cannot be read, or a setting that a cell's model does not take; before any work.
    """
    suite, folder, command_line = _read_arguments(arguments)
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    cells = marked(suite, folder, command_line)
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    errors: dict[Cell, str] = {}
    for number, cell in enumerate(cells, start=1):
        start, file = time.monotonic(), folder / "cells" / cell.file
        found = file.is_file()
        if not found:
            errors |= _run_cell(cell, file, command_line)
        spent = "found" if found else clock(time.monotonic() - start)
        say(f"[{number}/{len(cells)}] {cell}: {errors.get(cell) or _value(file, suite.metric)} ({spent})")
        if not found:
            write(suite, cells, errors, folder)
    text = write(suite, cells, errors, folder)
    lines = [text, "", f"tables      {folder / 'suite.md'}", f"json        {folder / 'suite.json'}"]
    lines += pictures(suite.metric, suite.baseline, _tables(suite, cells, errors, folder), folder)
    return "\n".join(lines), len(errors)


def _read_arguments(arguments: Sequence[str]) -> tuple[Suite, Path, list[str]]:
    files = [argument for argument in arguments if not argument.startswith("--")]
    if len(files) != 1:
        raise UserError("suite takes one file: recbole-llm suite FILE --output=DIR [--key=value ...]")
    own: dict[str, Any] = {}
    rest = []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument in files:
            continue
        if not equals:
            raise UserError(f"{argument!r} is not understood; settings read --key=value")
        if key in OWN_PER_CELL:
            raise UserError(f"--{key} is each cell's own in a suite; {OWN_PER_CELL[key]}")
        if key == "output":
            own[key] = value
        elif key in Suite.__dataclass_fields__:
            own[key] = parse_value(value, None)
        else:
            rest.append(argument)
    if "output" not in own:
        raise UserError("suite needs --output=DIR, the folder that its results go to")
    folder = Path(own.pop("output"))
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={folder} is no folder")
    return read_suite(files[0], own), folder, rest


def read_suite(name: str | Path, own: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite's file.

    Args:
        name: the file, or the name of a shipped one (``size-by-sparsity``).
        own: keys that replace the file's.

    Raises:
        UserError: it is missing or broken, a key is unknown or of the wrong kind, or the baseline is no row.
    """
    shipped = properties_dir() / "suite" / f"{name}.yaml"
    path = shipped if not Path(name).suffix and not Path(name).is_file() else Path(name)
    content = read_yaml(path) | dict(own or {})
    for key in content:
        if key not in Suite.__dataclass_fields__:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, Suite.__dataclass_fields__)}")
    for key in ("datasets", "rows", "baseline"):
        if not content.get(key):
            raise UserError(f"{path}: a suite needs {key}")
    rows = _mappings(path, "rows", content["rows"])
    for row, settings in rows.items():
        if "model" not in settings:
            raise UserError(f"{path}: row '{row}' names no model")
    if content["baseline"] not in rows:
        near = did_you_mean(str(content["baseline"]), rows)
        raise UserError(f"{path}: baseline '{content['baseline']}' is no row{near}")
    seeds = content.get("seeds", [2020])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds should be a list of whole numbers, but is {seeds!r}")
    datasets = content["datasets"]
    return Suite(
        title=str(content.get("title", path.stem)),
        datasets=tuple([datasets] if isinstance(datasets, str) else map(str, datasets)),
        rows=rows,
        columns=_mappings(path, "columns", content.get("columns") or {"": {}}),
        protocols=_mappings(path, "protocols", content.get("protocols") or {"": {}}),
        seeds=tuple(dict.fromkeys(seeds)),
        metric=str(content.get("metric", "NDCG@10")),
        baseline=content["baseline"],
        settings=_mappings(path, "settings", {"": content.get("settings") or {}})[""],
    )


def _mappings(path: Path, key: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(inner, dict | None) for inner in value.values()):
        raise UserError(f"{path}: {key} should read `name: {{key: value}}`, but is {value!r}")
    return {str(name): dict(inner or {}) for name, inner in value.items()}


# --- cells -----------------------------------------------------------------------------------------------------------
def cells_of(suite: Suite) -> Iterator[Cell]:
    """The cells in the order they run: a whole table with the first seed, then the next seed; baselines first."""
    rows = sorted(suite.rows, key=lambda row: row != suite.baseline)
    for seed in suite.seeds:
        for dataset in suite.datasets:
            for protocol, shared in suite.protocols.items():
                for column, varied in suite.columns.items():
                    for row in rows:
                        settings = {**QUIET, **suite.settings, **shared, **varied, **suite.rows[row], "seed": seed}
                        yield Cell(dataset, protocol, column, row, seed, settings)


def marked(suite: Suite, folder: Path, command_line: Sequence[str]) -> list[Cell]:
    """The cells, every one's settings checked, with the marks that their results are found by.

    A mark is of the settings as they finally stand, the data set's files and this package's code. Where one changes,
    the cell is measured anew; stages that do not depend on the change still come from the cache.

    Raises:
        UserError: a cell's model does not take a setting, or does not measure the suite's metric; the cell is named.
    """
    code = _bytes_of(Path(__file__).parent.parent, "**/*.py")
    data: dict[Path, str] = {}
    cells = []
    for cell in cells_of(suite):
        settings = {"output_dir": str(folder / "saved"), **cell.settings}
        model = settings.pop("model")
        try:
            config = Config(model, cell.dataset, config_dict=settings, command_line=command_line)
        except UserError as error:
            raise UserError(f"{cell}: {error}") from None
        name, _, k = suite.metric.partition("@")
        measured = [f"{metric}@{cut}".lower() for metric in config["metrics"] for cut in config["topk"]]
        if f"{name}@{k}".lower() not in measured:
            raise UserError(f"{cell}: metric {suite.metric} is not among {config['metrics']} at {config['topk']}")
        source = Path(config["data_path"])
        if source not in data:
            data[source] = _bytes_of(source, "*")
        final = {key: value for key, value in config.as_dict().items() if key not in NEUTRAL_KEYS or key in MOVING}
        mark = fingerprint_of([model, cell.dataset, final, data[source], code])
        cells.append(replace(cell, settings={**settings, "model": model}, mark=mark))
    return cells


def _bytes_of(folder: Path, pattern: str) -> str:
    """SHA-256 of a folder's files."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob(pattern)):
        if file.is_file():
            with file.open("rb") as stream:
                digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _run_cell(cell: Cell, file: Path, command_line: Sequence[str]) -> dict[Cell, str]:
    """Run a cell; its result is at ``file`` afterwards, or its reason is returned."""
    from recbole_llm.training.runs import run

    settings = dict(cell.settings)
    try:
        run(
            settings.pop("model"), cell.dataset, config_dict=settings | {"result_file": str(file)},
            command_line=list(command_line),
        )  # fmt: skip
    except UserError as error:
        return {cell: str(error)}
    except Exception as error:
        # A full disk fails every cell after this one; anything else may be this cell's own.
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        file.with_suffix(".error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return {cell: f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    file.with_suffix(".error.txt").unlink(missing_ok=True)
    return {}


def _value(file: Path, metric: str) -> str:
    return f"{json.loads(file.read_text(encoding='utf-8'))['test'][metric.lower()]:.4f}"


def write(suite: Suite, cells: Sequence[Cell], errors: Mapping[Cell, str], folder: Path) -> str:
    """Write ``suite.md`` and ``suite.json`` of what there is so far; returns the Markdown."""
    made = _tables(suite, cells, errors, folder)
    text = markdown(suite.title, suite.metric, suite.baseline, suite.seeds, made)
    content = {
        "schema": 1,
        "suite": {key: getattr(suite, key) for key in Suite.__dataclass_fields__},
        "tables": made,
        "cells": [
            {**{key: getattr(cell, key) for key in Cell.__dataclass_fields__}, "file": f"cells/{cell.file}",
             "done": (folder / "cells" / cell.file).is_file(), "error": errors.get(cell)}
            for cell in cells
        ],
    }  # fmt: skip
    for name, body in (("suite.md", text), ("suite.json", json.dumps(content, indent=1))):
        part = folder / f"{name}.part"
        part.write_text(body + "\n", encoding="utf-8")
        part.replace(folder / name)
    return text


def _tables(suite: Suite, cells: Sequence[Cell], errors: Mapping[Cell, str], folder: Path) -> list[dict[str, Any]]:
    places: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for cell in cells:
        table = places.setdefault((cell.dataset, cell.protocol), {})
        place = table.setdefault((cell.row, cell.column), {"files": [], "errors": {}})
        if (folder / "cells" / cell.file).is_file():
            place["files"].append(folder / "cells" / cell.file)
        if cell in errors:
            place["errors"].setdefault(errors[cell], []).append(cell.seed)
    return tables(list(suite.rows), list(suite.columns), suite.baseline, suite.metric, places)
