"""The search for a model's settings: Optuna's TPE over a space file, judged on the valid rows only.

A trial is an ordinary training stage, so that ``run`` with the written YAML finds it in the cache. The first trial has
the settings as they are without a search: what comes out is never worse than they are on valid. Each trial's sampler is
seeded by how many trials stand before it, and what was cut off counts for nothing: a search that was killed goes on as
if it had not been.
"""

from __future__ import annotations

import errno
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import optuna
import torch
from filelock import FileLock, Timeout
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import URL
from sqlalchemy.exc import DatabaseError

from recbole_llm import processes
from recbole_llm.disk import full_disk_told
from recbole_llm.errors import DiskFullError, UserError
from recbole_llm.leaderboard.search import Search, read_arguments
from recbole_llm.leaderboard.tuned_file import Outcome, describe, summary, write_settings
from recbole_llm.progress import clock
from recbole_llm.training.logs import run_logging
from recbole_llm.training.pipeline import Fit, PrunedError, fit, store_of
from recbole_llm.training.store import StageStore

# Trials drawn at random before TPE has enough to go by.
TPE_STARTUP = 8
# A trial is pruned where its best score so far is below the median of the others at the same validation, once so many
# trials have ended and it has had the space's `warmup`: the first epochs tell of the step size more than of the end.
PRUNER_STARTUP = 4


class _BudgetSpentError(Exception):
    """The seconds are spent in the middle of a trial, which a larger budget goes on with."""


def tune(arguments: Sequence[str], say: Callable[[str], None] | None = None) -> str:
    """What ``recbole-llm tune`` does.

    Args:
        arguments: ``--model``, ``--dataset``, ``--space=FILE|NAME``, ``--trials=N``, ``--seconds=N``, ``--output=DIR``,
            ``--write=FILE`` and settings of every trial; a setting given so is fixed, also where the space has it.
        say: takes a line a trial; by default they go to stderr.

    Returns:
        The best setting beside the one without a search, and the path of its YAML.

    Raises:
        UserError: what was asked for cannot be done, told before any work; or no trial came to an end.
    """
    if processes.count() > 1:
        raise UserError("tune runs in one process; leave accelerate launch out")
    say = say or (lambda line: print(line, file=sys.stderr, flush=True))
    search = read_arguments(arguments)
    for line in search.widened:
        say(line)
    search.folder.mkdir(parents=True, exist_ok=True)
    log = search.folder / f"tune-{time.strftime('%Y%m%d-%H%M%S')}.log"
    with (
        _alone(search),
        full_disk_told(search.folder),
        run_logging(log, search.base["state"]),
        _storage_told(_file(search)),
    ):
        study = _study(search)
        outcome = _go_on(search, study, say)
    if outcome is None:
        reasons = [trial.user_attrs["reason"] for trial in _finished(study)]
        raise UserError(f"no trial came to an end; the first: {reasons[0] if reasons else 'cut off'}")
    return summary(search.base, outcome, _best_file(search) if search.write is None else search.write)


@contextmanager
def _alone(search: Search) -> Iterator[None]:
    """The only search of a study."""
    lock = FileLock(str(search.folder / f"{search.mark[:12]}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"another process is at this very search (in {search.folder})") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage_told(file: Path) -> Iterator[None]:
    """Say in the words of the rest of the house what SQLite says of a full disk or a broken file."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, DatabaseError) as error:
        said = str(error.__cause__ or error)
        if "disk is full" in said or "disk I/O" in said:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file)) from None
        if "malformed" in said or "not a database" in said:
            raise UserError(
                f"{file} is damaged; move it away and search again: trials that came to an end are still in the cache"
            ) from None
        raise


def _file(search: Search) -> Path:
    return search.folder / f"search-{search.mark[:12]}.db"


def _address(file: Path) -> str:
    """A file as Optuna is told of it, which fills in what stands in braces."""
    address = URL.create("sqlite", database=str(file.resolve())).render_as_string()
    return address.replace("{", "%7B").replace("}", "%7D")


def _study(search: Search) -> optuna.Study:
    """The study as the last process left it, or a new one whose first trial is the settings without a search."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name=search.mark,
        storage=_address(_file(search)),
        direction="maximize" if search.base["valid_metric_bigger"] else "minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=PRUNER_STARTUP, n_warmup_steps=search.space.warmup),
        load_if_exists=True,
    )
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        # Its process was killed. Without a reason it counts for nothing, and the sampler comes to the same setting.
        study.tell(trial.number, state=TrialState.FAIL)
    first = [trial for trial in study.get_trials() if trial.user_attrs.get("first")]
    if not any(trial.state == TrialState.WAITING or trial in _finished(study) for trial in first):
        study.enqueue_trial(dict(search.start), user_attrs={"first": True})
    return study


def _finished(study: optuna.Study) -> list[FrozenTrial]:
    """Trials that count: those that ended, were pruned, or failed with a reason."""
    return [
        trial
        for trial in study.get_trials(deepcopy=False)
        if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)
        or (trial.state == TrialState.FAIL and "reason" in trial.user_attrs)
    ]


def _spent(study: optuna.Study) -> float:
    """Seconds that all processes of the search have taken, as far as their trials have told."""
    return sum(trial.user_attrs.get("seconds", 0.0) for trial in study.get_trials(deepcopy=False))


def _sampler(seed: int, number: int) -> optuna.samplers.BaseSampler:
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(n_startup_trials=TPE_STARTUP, multivariate=True, seed=state)


def _go_on(search: Search, study: optuna.Study, say: Callable[[str], None]) -> Outcome | None:
    """Run trials until the budget is spent; the best settings are written after every one."""
    store = store_of(search.base, search.folder)
    outcome = _outcome(search, study)
    while True:
        finished = _finished(study)
        if len(finished) >= search.trials or (
            outcome is not None and search.seconds is not None and _spent(study) >= search.seconds
        ):
            break
        study.sampler = _sampler(search.base["seed"], len(finished))
        trial = study.ask()
        try:
            said = _run_trial(search, study, trial, store)
        except _BudgetSpentError:
            study.tell(trial, state=TrialState.FAIL)
            say(f"[{len(finished) + 1}/{search.trials}] left unfinished: the {search.seconds:g} seconds are spent")
            break
        outcome = _outcome(search, study)
        best = f"; best {outcome.value:.4f}" if outcome else ""
        say(f"[{len(finished) + 1}/{search.trials}] {said}{best} ({clock(_spent(study))} in all)")
        _write(search, outcome)
    _write(search, outcome)
    return outcome


def _run_trial(search: Search, study: optuna.Study, trial: optuna.Trial, store: StageStore) -> str:
    """Train with a trial's settings and tell the study; returns what to say of it."""
    watch = _Watch(search, trial, _spent(study))
    suggested = {dimension.key: dimension.suggest(trial) for dimension in search.space.dimensions}
    values = dict(search.start) if trial.user_attrs.get("first") else suggested
    trial.set_user_attr("values", values)
    shown = describe(values)
    try:
        fitted = fit(search.config(values), store, watch)
        value = _worth(search, fitted)
    except PrunedError:
        watch.note()
        study.tell(trial, state=TrialState.PRUNED)
        return f"{shown}: pruned after {watch.looks} validations at {watch.best:.4f}, {clock(watch.seconds())}"
    except (UserError, MemoryError, RuntimeError) as error:
        reason = _reason(error)
        watch.note()
        trial.set_user_attr("reason", reason)
        study.tell(trial, state=TrialState.FAIL)
        return f"{shown}: failed, {reason}"
    watch.note()
    trial.set_user_attr("stage", fitted.fingerprint)
    study.tell(trial, value)
    cached = ", found" if fitted.stages[-1]["cached"] else ""
    best_epoch = f"epoch {fitted.facts['best_epoch'] + 1}"
    return f"{shown}: {search.metric} {value:.4f} ({best_epoch}{cached}), {clock(watch.seconds())}"


def _worth(search: Search, fitted: Fit) -> float:
    # Weights that were trained under another search have not been ranked by this one.
    valid = fitted.facts["valid"] or fitted.trainer.rank_valid(fitted.valid_data)
    value = valid.get(search.metric)
    if value is None or not math.isfinite(value):
        raise UserError(f"{search.metric} on valid is {value}")
    return float(value)


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line; what is no failure of the settings goes on up."""
    memory = isinstance(error, MemoryError | torch.OutOfMemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    )
    if isinstance(error, DiskFullError) or not (memory or isinstance(error, UserError)):
        raise error
    if memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return "out of memory" if memory else " ".join(str(error).split())


class _Watch:
    """Looks on at a trial's validations: reports them, and ends it where the pruner or the budget says so."""

    def __init__(self, search: Search, trial: optuna.Trial, spent: float) -> None:
        self.search, self.trial, self.spent = search, trial, spent
        self.start = time.monotonic()
        self.scores: list[float] = []

    @property
    def looks(self) -> int:
        return len(self.scores)

    @property
    def best(self) -> float:
        return max(self.scores) if self.search.base["valid_metric_bigger"] else min(self.scores)

    def seconds(self) -> float:
        return time.monotonic() - self.start

    def note(self) -> None:
        """Keep what the trial has cost so far, in case its process is killed."""
        self.trial.set_user_attr("seconds", round(self.seconds(), 3))

    def __call__(self, epoch: int, score: float) -> None:
        self.note()
        self.trial.report(score, len(self.scores))
        self.scores.append(score)
        if self.trial.should_prune():
            raise PrunedError
        # The first trial is what the others are held against; it always comes to its end.
        limit = None if self.trial.user_attrs.get("first") else self.search.seconds
        if limit is not None and self.spent + self.seconds() >= limit:
            raise _BudgetSpentError


def _outcome(search: Search, study: optuna.Study) -> Outcome | None:
    """Where the search stands; ``None`` before any trial came to an end."""
    finished = _finished(study)
    ended = [trial for trial in finished if trial.state == TrialState.COMPLETE]
    if not ended:
        return None
    sign = 1 if search.base["valid_metric_bigger"] else -1
    # Of equals the earliest: the settings without a search, where nothing beats them.
    best = max(ended, key=lambda trial: (sign * float(trial.value or 0.0), -trial.number))
    first = next((trial for trial in ended if trial.user_attrs.get("first")), None)
    states = [trial.state for trial in finished]
    return Outcome(
        values=dict(best.user_attrs["values"]),
        value=float(best.value or 0.0),
        start=dict(search.start),
        start_value=float(first.value or 0.0) if first else None,
        metric=search.metric,
        space=search.space,
        split=search.split,
        trials=len(finished),
        pruned=states.count(TrialState.PRUNED),
        failed=states.count(TrialState.FAIL),
        seconds=_spent(study),
        command=search.command,
        study=search.mark,
    )


def _best_file(search: Search) -> Path:
    return search.folder / f"best-{search.mark[:12]}.yaml"


def _write(search: Search, outcome: Outcome | None) -> None:
    if outcome is None:
        return
    config = search.config(outcome.values)
    for path in (_best_file(search), search.write):
        if path is not None:
            write_settings(path, config, outcome)
