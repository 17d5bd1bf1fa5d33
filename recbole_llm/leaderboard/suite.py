"""A study as data: rows (models with their settings) by columns (what is varied), over seeds, data sets and protocols.

Every cell is an ordinary run, so cells share stages through the cache. A finished cell is found by a mark of all that
its figures depend on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from recbole.evaluator import smaller_metrics

from recbole_llm.compat import download, known_datasets
from recbole_llm.config import Config
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.leaderboard.choice import choices_of, label
from recbole_llm.leaderboard.curve import check_curve, check_curve_of
from recbole_llm.leaderboard.marks import bytes_of, code_of_package, mark_of, training_of
from recbole_llm.leaderboard.paper import check_paper, limited_to
from recbole_llm.schema import load_yaml, properties_dir

# What a cell has unless the file or the command line says otherwise.
QUIET = {"state": "WARNING", "show_progress": False, "tensorboard": False, "evaluate_parts": False}

# Bytes of a cell's place in the names of its files.
LONGEST = 160

# What a row says of itself beside its model's settings.
ROW_WORDS = ("run_memory", "against", "choose")

# What the suite gives every cell.
PLACED = {
    "seed": "a suite has seeds",
    "dataset": "a suite has datasets",
    "result_file": "results are in the cells folder of --output",
}


@dataclass(frozen=True)
class Suite:
    """A study.

    Attributes:
        title: of its tables and page.
        datasets: names.
        rows: row name to settings, ``model`` among them. Not settings but the row's own are ``run_memory``, ``against``
            (a row that it is tested against, in a family of tests of its own) and ``choose`` (settings with the values
            among which the best on valid is taken, see :mod:`recbole_llm.leaderboard.choice`).
        columns: column name to settings; one without any settings when the file varies nothing.
        protocols: name to settings, e.g. ``{ratio: {eval_args: {...}}}``.
        seeds: one run each.
        metric: what rows are ranked by, e.g. ``NDCG@10``.
        reference: a row that every other one is tested against, besides the best baseline; ``None`` for none.
        baselines: rows among which the best is chosen on valid; ``None`` for every row that is no language model.
        settings: of every cell. Above them stand the protocol's, the column's, the row's, and the command line's.
        run_memory: GiB that a run is taken to need before one of its row has been measured.
        paper: figures of papers to set beside the rows, see :mod:`recbole_llm.leaderboard.paper`. A file has one
            paper's, or a list of shipped suites, whose papers stand beside the rows that have the same names here.
        curve: the setting over which metrics are drawn, see :mod:`recbole_llm.leaderboard.curve`.
    """

    title: str
    datasets: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Any]]
    columns: Mapping[str, Mapping[str, Any]]
    protocols: Mapping[str, Mapping[str, Any]]
    seeds: tuple[int, ...]
    metric: str
    reference: str | None
    baselines: tuple[str, ...] | None
    settings: Mapping[str, Any]
    run_memory: float
    paper: tuple[Mapping[str, Any], ...]
    curve: Mapping[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a suite.

    Attributes:
        dataset, protocol, column, row, seed: where it stands.
        settings: what it is run with, ``model`` among them.
        parts: models that it trains first, as rows of their own may.
        mark: hash of all that its figures depend on.
        training: hash of what its fine-tuning depends on, where runs that search its model otherwise find that in the
            cache; else empty.
        choice: of the settings, those that are chosen on valid; empty where the row leaves nothing open.
    """

    dataset: str
    protocol: str
    column: str
    row: str
    seed: int
    settings: Mapping[str, Any] = field(hash=False)
    parts: tuple[str, ...] = ()
    mark: str = ""
    training: str = ""
    choice: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        where = (self.dataset, self.protocol, self.column, self.row, label(self.choice), f"seed {self.seed}")
        return ", ".join(part for part in where if part)

    @property
    def place(self) -> tuple[str, str, str]:
        """The table it belongs to."""
        return self.dataset, self.protocol, self.column

    @property
    def file(self) -> str:
        """The name of its result."""
        words = "-".join(filter(None, (self.dataset, self.protocol, self.column, self.row, str(self.seed))))
        plain = "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in words)
        # With its mark, .rankings.npz and .part a file system's 255 bytes are not far.
        short = plain.encode()[:LONGEST].decode(errors="ignore")
        return f"{short}-{self.mark[:8]}.json"


def read_suite(name: str | Path, own: Mapping[str, Any] | None = None) -> Suite:
    """Read a suite's file.

    Args:
        name: the file, or the name of a shipped one (``size-by-sparsity``).
        own: keys that replace the file's.

    Raises:
        UserError: it is missing or broken, a key is unknown or of the wrong kind, or a row that it names is none.
    """
    content, path = _content(name)
    return suite_of(content | dict(own or {}), path)


def _content(name: str | Path) -> tuple[dict[str, Any], str]:
    """What a suite's file holds, and its path."""
    shipped = properties_dir() / "suite" / f"{name}.yaml"
    path = shipped if not Path(name).suffix and not Path(name).is_file() else Path(name)
    # Not through the cache of shipped files: a user edits his between two studies of one process.
    return load_yaml(path), str(path)


def suite_of(content: Mapping[str, Any], path: str) -> Suite:
    """A suite from plain data; see :func:`read_suite`.

    Args:
        content: what a suite's file holds.
        path: what to call it in errors.
    """
    for key in content:
        if key not in Suite.__dataclass_fields__:
            raise UserError(f"{path}: unknown key '{key}'{did_you_mean(key, Suite.__dataclass_fields__)}")
    for key in ("datasets", "rows"):
        if not content.get(key):
            raise UserError(f"{path}: a suite needs {key}")
    rows = _rows(path, content)
    seeds = content.get("seeds", [2020])
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int for seed in seeds):
        raise UserError(f"{path}: seeds should be a list of whole numbers, but is {seeds!r}")
    reference = _words(path, "reference", content.get("reference"))
    if len(reference) > 1:
        raise UserError(f"{path}: reference should be one row, but is {content['reference']!r}")
    return Suite(
        title=str(content.get("title") or Path(path).stem),
        datasets=_words(path, "datasets", content["datasets"]),
        rows=rows,
        columns=_varied(path, "columns", content.get("columns") or {"": {}}),
        protocols=_varied(path, "protocols", content.get("protocols") or {"": {}}),
        seeds=tuple(dict.fromkeys(seeds)),
        metric=str(content.get("metric", "NDCG@10")),
        reference=next(iter(reference), None),
        baselines=_words(path, "baselines", content.get("baselines")) or None,
        settings=_varied(path, "settings", {"": content.get("settings") or {}})[""],
        run_memory=positive(path, "run_memory", content.get("run_memory", 2.0)),
        paper=_papers(path, content.get("paper"), rows),
        curve=check_curve(path, content.get("curve")),
    )


def _rows(path: str, content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows, and that whatever names one names one of them."""
    rows = _mappings(path, "rows", content["rows"])
    for row, settings in rows.items():
        if "model" not in settings:
            raise UserError(f"{path}: row '{row}' names no model")
        if not isinstance(settings["model"], str):
            raise UserError(f"{path}: rows.{row}.model should be a name, but is {settings['model']!r}")
        positive(path, f"rows.{row}.run_memory", settings.get("run_memory", 1))
        _leave_to_suite(f"{path}: rows.{row}", settings)
        _check_words(path, row, rows)
    for key in ("reference", "baselines"):
        for row in _words(path, key, content.get(key)):
            if row not in rows:
                raise UserError(f"{path}: {key} '{row}' is no row{did_you_mean(row, rows)}")
    return rows


def _papers(path: str, value: Any, rows: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """A paper's figures, or those of the suites that are named."""
    if not value:
        return ()
    if not isinstance(value, list):
        check_paper(path, value, rows)
        return (value,)
    found: list[Mapping[str, Any]] = []
    for name in _words(path, "paper", value):
        content, its_path = _content(name)
        if isinstance(content.get("paper"), list):
            raise UserError(f"{path}: paper names the suite '{name}', which names others in its turn; name those")
        kept = [paper for whole in suite_of(content, its_path).paper if (paper := limited_to(whole, rows))["rows"]]
        if not kept:
            raise UserError(f"{path}: paper names the suite '{name}', which has no paper's figures of a row here")
        found += kept
    return tuple(found)


def _check_words(path: str, row: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """See that what a row says beside its settings can be done."""
    settings = rows[row]
    for choice in choices_of(f"{path}: rows.{row}.choose", settings.get("choose"))[:1]:
        _leave_to_suite(f"{path}: rows.{row}.choose", choice)
        for key in choice:
            if key in settings:
                raise UserError(f"{path}: rows.{row} has {key} and chooses it too; take one of them")
    base = settings.get("against")
    if base is not None and (str(base) not in rows or str(base) == row):
        near = did_you_mean(str(base), rows) if str(base) not in rows else ""
        raise UserError(f"{path}: rows.{row}.against should be another row, but is {base!r}{near}")


def _words(path: str, key: str, value: Any) -> tuple[str, ...]:
    """One name or several, each once."""
    named = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(name, str | int | float) for name in named):
        raise UserError(f"{path}: {key} should be a name or a list of names, but is {value!r}")
    return tuple(dict.fromkeys(map(str, named)))


def _varied(path: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    """Settings by name, of which none is the model."""
    named = _mappings(path, key, value)
    for name, settings in named.items():
        _leave_to_suite(".".join(filter(None, (f"{path}: {key}", name))), settings)
        if "model" in settings:
            raise UserError(f"{path}: {key} cannot name a model; only rows do")
    return named


def _leave_to_suite(where: str, settings: Mapping[str, Any]) -> None:
    """Refuse what every cell is given by its place, and what stands elsewhere would be passed over."""
    for key, instead in PLACED.items():
        if key in settings:
            raise UserError(f"{where}: {key} cannot be set here; {instead}")


def positive(path: str, key: str, value: Any) -> float:
    """A finite number above 0, or a plain word about it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        raise UserError(f"{path}: {key} should be a number above 0, but is {value!r}")
    return float(value)


def _mappings(path: str, key: str, value: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(value, dict) or not all(isinstance(inner, dict | None) for inner in value.values()):
        raise UserError(f"{path}: {key} should read `name: {{key: value}}`, but is {value!r}")
    return {str(name): dict(inner or {}) for name, inner in value.items()}


def cells_of(suite: Suite) -> Iterator[Cell]:
    """The cells in the order they should run: everything with the first seed, then with the next."""
    for seed in suite.seeds:
        for dataset in suite.datasets:
            for protocol, shared in suite.protocols.items():
                for column, varied in suite.columns.items():
                    for row, own in suite.rows.items():
                        settings = {**QUIET, **suite.settings, **shared, **varied, **settings_of(own), "seed": seed}
                        for choice in choices_of(row, own.get("choose")):
                            place = (dataset, protocol, column, row, seed)
                            yield Cell(*place, settings=settings | choice, choice=choice)


def settings_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of a suite gives its runs, ``model`` among it."""
    return {key: value for key, value in row.items() if key not in ROW_WORDS}


def arguments_of(cell: Cell, command_line: Sequence[str], of_row: Mapping[str, Sequence[str]]) -> list[str]:
    """What the command line says of a cell: a row's own word above that for all rows."""
    own = list(of_row.get(cell.row, ()))
    keys = {argument.partition("=")[0] for argument in own}
    return [argument for argument in command_line if argument.partition("=")[0] not in keys] + own


def marked(
    suite: Suite, folder: Path, command_line: Sequence[str], of_row: Mapping[str, Sequence[str]], fetch: bool = False
) -> list[Cell]:
    """The cells, every one's settings checked, with the marks that their results are found by.

    Where anything that a mark is of changes (see :func:`recbole_llm.leaderboard.marks.mark_of`), the cell is measured
    anew; stages that do not depend on the change still come from the cache.

    Args:
        suite: the study.
        folder: where its runs go.
        command_line: ``--key=value`` settings of every cell.
        of_row: more of them, by row.
        fetch: download data sets that are missing and that RecBole knows, once all cells are seen to be in order.

    Raises:
        UserError: a cell's model does not take a setting, or does not measure the suite's metric; the cell is named.
            Or no cell has the setting or a metric of the suite's ``curve``.
    """
    code = code_of_package()
    check_larger_is_better(suite.metric)
    sources: dict[Path, str] = {}
    cells: list[Cell] = []
    configs = []
    for cell in cells_of(suite):
        settings = {"output_dir": str(folder / "saved"), **cell.settings}
        model = settings.pop("model")
        try:
            given = arguments_of(cell, command_line, of_row)
            for key in {argument.partition("=")[0].removeprefix("--") for argument in given} & set(cell.choice):
                raise UserError(f"{key} is chosen on valid; leave --{key} out, or take it from the row's choose")
            config = Config(model, cell.dataset, config_dict=settings, command_line=given)
        except UserError as error:
            raise UserError(f"{cell}: {error}") from None
        _check_counts(cell, config)
        name, _, k = suite.metric.partition("@")
        measured = [f"{metric}@{cut}".lower() for metric in config["metrics"] for cut in config["topk"]]
        if f"{name}@{k}".lower() not in measured:
            raise UserError(f"{cell}: metric {suite.metric} is not among {config['metrics']} at {config['topk']}")
        source = Path(config["data_path"])
        if source not in sources and not source.is_dir() and cell.dataset not in known_datasets(source.parent):
            near = did_you_mean(cell.dataset, known_datasets(source.parent))
            raise UserError(f"{cell}: there is no data set {source}{near}")
        sources[source] = cell.dataset
        parts = tuple(config[part] for part in config.parts())
        cells.append(replace(cell, settings={**settings, "model": model}, parts=parts))
        configs.append(config)
    for source, name in sources.items():
        # Now, as marks are of the files, and runs side by side would each see that they are missing.
        if fetch and not source.is_dir():
            download(name, source)
    data = {source: bytes_of(source) for source in sources}
    cells = [
        replace(cell, mark=mark_of(config, data[Path(config["data_path"])], code), training=training_of(config))
        for cell, config in zip(cells, configs, strict=True)
    ]
    _check_apart(cells)
    if suite.curve:
        check_curve_of(suite.curve, configs)
    return cells


def _check_apart(cells: Sequence[Cell]) -> None:
    """Refuse names that differ too little: two runs would write one file, or could not be told apart."""
    for own in (str, lambda cell: cell.file):
        seen: dict[str, Cell] = {}
        for cell in cells:
            other = seen.setdefault(own(cell), cell)
            if other is not cell:
                names = (f"'{'/'.join((one.protocol, one.column, one.row)).strip('/')}'" for one in (other, cell))
                raise UserError(f"{' and '.join(names)} have equal settings and names too alike; rename one")


def check_larger_is_better(metric: str) -> None:
    """Refuse a metric by which the worst row would stand first and be the best baseline."""
    if metric.partition("@")[0].lower() in smaller_metrics:
        raise UserError(f"metric {metric} is better the smaller it is; rows are ranked by one that is not")


def _check_counts(cell: Cell, config: Config) -> None:
    """Refuse before any work a run that no table would count."""
    if config["policy"] == "recbole":
        raise UserError(
            f"{cell}: under policy: recbole nothing shows that two runs have one split, so no table counts them; "
            "see recbole-llm run"
        )
    if config["eval_args"]["split"].get("LS") == "valid_only":
        raise UserError(f"{cell}: a split without test rows (LS: valid_only) leaves a table nothing; hold one out")
