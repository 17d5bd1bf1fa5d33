"""The runs that a table counts, and those it refuses, each with its reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.evaluation.consistency import arrays_of, figures_of
from recbole_llm.evaluation.metrics import USER_METRICS
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.evaluation.results import read_run, result_file

# What, beside the split, must be the same for two rows to mean the same thing.
JUDGED_BY = ("policy", "exclude_history", "eval_unit", "ranking", "title_match", "counted", "leaking_ids")
NEEDED = ("model", "seed", "split", "evaluation", "valid", "test", "stages", "parameters", "throughput")
# A file's own rounding; more than that between the users' values and the metrics means that one was altered.
AGREE = 1e-9


@dataclass(frozen=True)
class RowRuns:
    """What stands behind a row of a table.

    Attributes:
        name: of the row.
        files: its runs' results (or their folders), one a seed.
        failed: runs that ended without a result: ``{"seed": int | None, "reason": str}``.
        settings: what was given for this row, the model aside.
        model: its model's name, for a row of which no run ended; else the runs say it.
        against: a row that this one is tested against in the family of such tests; empty for none.
        choice: how some of the settings were chosen, see :func:`recbole_llm.leaderboard.choice.decide`.
    """

    name: str
    files: Sequence[str | Path] = ()
    failed: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    model: str = ""
    against: str = ""
    choice: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """One run as a table needs it.

    Attributes:
        path: where it was read.
        result: ``result.json``.
        users: str [U], raw ids, sorted; under ``eval_unit: row`` a user stands there once a ranking.
        test: metric to its mean, overlaps with teachers among them.
        values: the same metrics to float64, a value for every distinct user in their order, those that are means over
            users; their mean is the metric's.
        at_k: metric to float64 [K], its mean over users at k = 1 to K; empty without rankings.
    """

    path: Path
    result: dict[str, Any]
    users: np.ndarray
    test: dict[str, float]
    values: dict[str, np.ndarray]
    at_k: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: str | Path) -> Run:
        """Read a run.

        Raises:
            UserError: a file is missing or damaged, or its users' values do not agree with its metrics.
        """
        file = result_file(path)
        result, arrays = read_run(path)
        for key in NEEDED:
            if key not in result:
                raise UserError(f"{file} says nothing of {key}; it is damaged, or no run of this package wrote it")
        if not arrays:
            raise UserError(f"{path} has no values of users to compare: its test rows were sampled, or there are none")
        order = np.argsort(arrays["user_id"], kind="stable")
        told = result["test"] | {
            f"{part}.{name}": value
            for part, found in result.get("consistency", {}).items()
            for name, value in found.items()
        }
        for name, array in arrays.items():
            if name != "user_id" and not abs(array.mean() - told.get(name, np.nan)) <= AGREE:
                raise UserError(
                    f"{result['per_user']} of {path} does not agree with its result: {name} is {array.mean():.6f} over "
                    f"its users and {told.get(name)} in the result; one of the files was altered or damaged"
                )
        shown = {name: name for name in result["test"]} | arrays_of(result)
        users = arrays["user_id"][order]
        first = np.flatnonzero(np.concatenate(([True], users[1:] != users[:-1])))
        values = {name: _by_user(arrays[own][order], first) for name, own in shown.items() if own in arrays}
        at_k = _at_k(file, result, arrays["user_id"])
        return cls(Path(path), result, users, figures_of(result), values, at_k)

    @property
    def seed(self) -> int:
        """Of the run."""
        return int(self.result["seed"])

    def judged(self) -> dict[str, Any]:
        """What its figures depend on beside the model: the split's fingerprint and the policy."""
        evaluation = self.result["evaluation"]
        judged = {"split": self.result["split"].get("fingerprint"), **{key: evaluation.get(key) for key in JUDGED_BY}}
        # A beam search chooses among the whole catalogue too; what it misses is its own loss.
        ranking = "full" if judged["ranking"] in ("beam", "pruned") else judged["ranking"]
        # What a run says nothing of it is without.
        return judged | {"ranking": ranking} | {key: bool(judged[key]) for key in ("title_match", "leaking_ids")}


def _by_user(values: np.ndarray, first: np.ndarray) -> np.ndarray:
    """One value for every user where some have several rankings.

    Rankings of one user are alike, so a test that took them for independent would find significance in their number.
    A user's value is the sum over his rankings times users over rankings, which leaves the mean as it is.

    Args:
        values: float64 [R], user by user.
        first: int64 [U], the place of each user's first ranking.

    Returns:
        float64 [U].
    """
    if len(first) == len(values):
        return values
    return np.asarray(np.add.reduceat(values, first) * (len(first) / len(values)))


def rankings_of(file: Path, result: Mapping[str, Any]) -> Rankings | None:
    """The rankings that a run's metrics were taken from.

    Args:
        file: the run's ``result.json``.
        result: its content.

    Returns:
        ``None`` where none were kept, the file is not there any more, or the metrics are the mean over several prompts,
        of which one prompt's rankings are kept.

    Raises:
        UserError: the file cannot be read.
    """
    name = result.get("rankings")
    if not name or result["evaluation"].get("prompts", 1) > 1 or not (file.parent / name).is_file():
        return None
    return Rankings.read(file.parent / name)


def _at_k(file: Path, result: Mapping[str, Any], users: np.ndarray) -> dict[str, np.ndarray]:
    rankings = rankings_of(file, result)
    if rankings is None:
        return {}
    if not np.array_equal(rankings.user_id, users):
        raise UserError(f"{result['rankings']} and {result['per_user']} of {file.parent} are of different users")
    hits, targets = rankings.hits()
    means = {name: metric(hits, targets).mean(axis=0) for name, metric in USER_METRICS.items()}
    for name, value in result["test"].items():
        metric, _, k = name.partition("@")
        if metric in means and k.isdigit() and int(k) <= hits.shape[1]:
            found = means[metric][int(k) - 1]
            if not abs(found - value) <= AGREE:
                raise UserError(
                    f"{result['rankings']} of {file.parent} does not agree with its result: {name} is {found:.6f} by "
                    f"its rankings and {value} in the result; one of the files was altered or damaged"
                )
    return means


@dataclass
class Line:
    """A row's runs, divided into those that count and those refused.

    Attributes:
        row: what was asked for.
        runs: the runs that count, in the order given.
        refused: ``{"seed": int | None, "reason": str, "run": path}`` of the others.
    """

    row: RowRuns
    runs: list[Run] = field(default_factory=list)
    refused: list[dict[str, Any]] = field(default_factory=list)

    def by_seed(self, metric: str) -> dict[int, float]:
        """Seed to the run's mean on test."""
        return {run.seed: run.test[metric] for run in self.runs}

    def values(self, metric: str) -> np.ndarray | None:
        """Each user's value, float64 [U], the mean over seeds; ``None`` unless every run has it."""
        if not self.runs or not all(metric in run.values for run in self.runs):
            return None
        return np.asarray(np.mean([run.values[metric] for run in self.runs], axis=0))


def admit(rows: Sequence[RowRuns], like: str | Path | None = None) -> tuple[list[Line], Run | None]:
    """Read every row's runs and refuse those whose figures do not mean what the others' do.

    The table is for the split and policy of the most runs (of equally many, the first row's); a run judged otherwise,
    on other users, from altered files or with a seed that the row already has is refused.

    Args:
        rows: what to read.
        like: a run that names the split and policy instead.

    Returns:
        A line a row, and a run that all counted runs are judged like (``None`` where none counts).

    Raises:
        UserError: ``like`` cannot be read.
    """
    lines = [Line(row) for row in rows]
    for line in lines:
        for file in line.row.files:
            try:
                line.runs.append(Run.read(file))
            except UserError as error:
                line.refused.append({"seed": _seed(file), "reason": str(error), "run": str(file)})
    standard = Run.read(like) if like is not None else _standard([run for line in lines for run in line.runs])
    for line in lines:
        read, line.runs = line.runs, []
        for run in read:
            reason = _unlike(run, standard) or _repeated(run, line.runs)
            if reason:
                line.refused.append({"seed": run.seed, "reason": reason, "run": str(run.path)})
            else:
                line.runs.append(run)
    return lines, standard


def _seed(path: str | Path) -> int | None:
    """The seed of a run that was not admitted, where its result can be read at all."""
    try:
        return int(json.loads(result_file(path).read_text(encoding="utf-8"))["seed"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _standard(runs: Sequence[Run]) -> Run | None:
    """A run of the split, policy and users that the most runs have; the first such."""
    known = [run for run in runs if run.result["split"].get("fingerprint") is not None]
    for mark in (lambda run: json.dumps(run.judged()), lambda run: run.users.tobytes()):
        marks = [mark(run) for run in known]
        ((most, _),) = Counter(marks).most_common(1) or ((None, 0),)
        known = [run for run, own in zip(known, marks, strict=True) if own == most]
    return known[0] if known else None


def _unlike(run: Run, standard: Run | None) -> str:
    """Why a run is not comparable; empty where it is."""
    if run.result["split"].get("fingerprint") is None:
        return (
            f"its split has no fingerprint (policy {run.result['evaluation'].get('policy')}), so nothing shows that it "
            "was judged on the same one"
        )
    assert standard is not None
    own, wanted = run.judged(), standard.judged()
    if own["split"] != wanted["split"]:
        return f"judged on another split: {own['split'][:16]}, and this table is of {str(wanted['split'])[:16]}"
    differing = [f"{key} {own[key]} (this table's is {wanted[key]})" for key in JUDGED_BY if own[key] != wanted[key]]
    if differing:
        return f"judged under another policy: {', '.join(differing)}"
    if not np.array_equal(run.users, standard.users):
        shared = len(np.intersect1d(run.users, standard.users))
        return (
            f"judged on other users: it has {len(run.users)}, this table {len(standard.users)}, and both have {shared}"
        )
    return ""


def _repeated(run: Run, counted: Sequence[Run]) -> str:
    for other in counted:
        if other.seed == run.seed:
            return f"seed {run.seed} stands twice in this row and would count as two; {other.path} counts"
    return ""
