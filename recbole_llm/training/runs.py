"""One run: train or find, rank valid and test, write ``result.json`` and what goes with it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.utils import ModelType

from recbole_llm import __version__, processes, products
from recbole_llm.config import Config
from recbole_llm.disk import full_disk_told, write_whole
from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.evaluation.consistency import consistency
from recbole_llm.evaluation.ranking import Measured
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.training.identifiers import LEAKING, leaks
from recbole_llm.training.logs import run_logging
from recbole_llm.training.pipeline import Fit, fit, store_of
from recbole_llm.training.teacher import item_order

SCHEMA = 1
PACKAGES = ("recbole", "torch", "numpy", "scipy", "pandas", "transformers", "peft", "accelerate", "tokenizers")

logger = logging.getLogger("recbole_llm")


def run(
    model: str | type | None = None,
    dataset: str | None = None,
    config_file_list: Sequence[str | Path] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    command_line: Sequence[str] | None = (),
) -> dict[str, Any]:
    """Train a recommender and measure it; the arguments are those of RecBole's ``run_recbole``.

    Args:
        model: name or class.
        dataset: name of the data set.
        config_file_list: YAML files.
        config_dict: settings.
        command_line: ``--key=value`` arguments; ``None`` takes the process's own.

    Returns:
        The content of ``result.json``, with the paths ``result_file``, ``log_file`` and ``checkpoint`` and, where parts
        were ranked too, their results under ``parts``.

    Raises:
        UserError: what the user asked for cannot be done; nothing half-written is left.
        DiskFullError: the disk is full; the same call goes on once there is room.
    """
    config = Config(model, dataset, config_file_list, config_dict, command_line)
    folder = processes.on_main(lambda: _begin(config))
    if not processes.is_main():
        return _run(config, folder)
    config["tensorboard_dir"] = str(folder / "tensorboard") if config["tensorboard"] else None
    try:
        with full_disk_told(folder.parent), run_logging(folder / "run.log", config["state"]):
            return _run(config, folder)
    except BaseException as error:
        tidy(folder, keep_log=isinstance(error, TrainingStoppedError) or not isinstance(error, UserError))
        raise


def _begin(config: Config) -> Path:
    if config["result_file"]:
        writable(Path(config["result_file"]))
    return new_run_folder(config)


def new_run_folder(config: Config) -> Path:
    """A folder that no other run has, under ``output_dir``."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(config["output_dir"]) / f"{config['model']}-{config['dataset']}-{stamp}-{uuid.uuid4().hex[:6]}"
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder.parent} cannot be written to ({error.strerror})") from None
    return folder


def writable(path: Path, key: str = "result_file") -> None:
    """See before any work that a file can be written.

    Args:
        path: the file.
        key: what the user gave it as.

    Raises:
        UserError: it is a folder, or its folder cannot be made or written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise IsADirectoryError(0, "it is a folder" if path.is_dir() else "no permission")
    except OSError as error:
        raise UserError(f"{key}: {path} cannot be written ({error.strerror})") from None


def tidy(folder: Path, keep_log: bool) -> None:
    """A run that failed leaves nothing that looks like a result, and its log only where there is something to read."""
    for path in sorted(folder.iterdir()):
        if path.name == "stages" and keep_log:
            # cache: off keeps its stages here, with the weights that the error names.
            continue
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.log":
            path.unlink()
    if not keep_log:
        shutil.rmtree(folder)


def _run(config: Config, folder: Path) -> dict[str, Any]:
    logging.getLogger().info("settings: %s", json.dumps(config.as_dict(), sort_keys=True))
    fitted = fit(config, store_of(config, folder))
    parts = {}
    if config["evaluate_parts"]:
        for name, part in fitted.parts.items():
            parts[name] = report(part, folder / "parts" / name)
    result = report(fitted, folder, config["result_file"])
    return result | {
        "parts": parts,
        "log_file": str(folder / "run.log"),
        "checkpoint": str(fitted.folder),
    }


def report(fitted: Fit, folder: Path, result_file: str | None = None) -> dict[str, Any]:
    """Rank test, and valid where training has not just done so, and write ``result.json`` and ``per_user.npz``.

    Args:
        fitted: the trained recommender.
        folder: where they go.
        result_file: write the result there too.

    Returns:
        The content of ``result.json``, plus ``result_file``.
    """
    config, trainer = fitted.config, fitted.trainer
    start = time.monotonic()
    # First, as RecBole has it: candidates may be drawn, and so may scores.
    test = trainer.evaluate(fitted.test_data, load_best_model=False, show_progress=config["show_progress"]) or {}
    seconds = time.monotonic() - start
    measured: Measured = trainer.measured if test else Measured()
    searched = _searched(fitted.model)
    valid: Mapping[str, float] = {}
    if fitted.valid_data is not None and len(fitted.valid_data) and not config["refit_on_valid"]:
        valid = (
            trainer.valid_of_training(fitted.valid_data)
            or trainer.evaluate(fitted.valid_data, load_best_model=False, show_progress=config["show_progress"])
            or {}
        )
    valid = valid or fitted.valid
    split = getattr(fitted.train_data._dataset, "split", None)
    test_users = len(measured.users)
    result = {
        "schema": SCHEMA,
        "model": config["model"],
        "dataset": config["dataset"],
        "seed": config["seed"],
        "split": split.as_dict() if split else _recboles_split(fitted),
        "evaluation": _evaluation(config, measured, fitted) | searched,
        "valid": dict(valid),
        "test": dict(test),
        "per_user": "per_user.npz" if measured.per_user else None,
        "rankings": None,
        "best_epoch": fitted.facts["best_epoch"] + 1,
        "curves": _curves(config, fitted.facts),
        "stages": fitted.stages,
        "parameters": _parameters(fitted, counted=config["MODEL_TYPE"] != ModelType.TRADITIONAL),
        "throughput": {
            "test_users_per_second": round(test_users / seconds, 2) if test_users else None,
            "test_seconds": round(seconds, 3),
        },
        "device": _device(config),
        "versions": {"recbole_llm": __version__} | {name: _version(name) for name in PACKAGES},
        "config": config.as_dict(),
    }
    keys, _ = trainer.without_search([])
    if keys:
        # How items were searched for: runs of the same weights may differ in that alone.
        result["search"] = {key: value for key, value in config.stage_keys().items() if key in keys}
    continued = getattr(trainer, "continued_from", None)
    if continued is not None:
        result["continued_from"] = continued
    text = getattr(trainer, "item_text", None)
    if text is not None:
        result["item_text"] = {"template": text.template, "fallback": text.fallback, "missing": text.missing}
        result["item_text"] |= {"dropped": text.dropped, "shuffled": text.shuffled}
    agreement = _consistency(fitted, measured)
    if agreement:
        result["consistency"] = {
            part: {name: float(values.mean()) for name, values in found.items()} for part, found in agreement.items()
        }
    arrays: dict[str, Any] = dict(measured.per_user)
    if arrays:
        arrays |= {f"{part}.{name}": values for part, found in agreement.items() for name, values in found.items()}
        arrays["user_id"] = fitted.dataset.field2id_token[fitted.dataset.uid_field][measured.users]
    rankings = Rankings.of(measured, fitted.test_data, fitted.dataset) if split and test_users else None
    if processes.is_main():
        for name, made in getattr(trainer, "artefacts", {}).items():
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / name, partial(shutil.copyfile, made))
        _write_result(folder / "result.json", "", result, arrays, rankings)
    if result_file and processes.is_main():
        copy = Path(result_file)
        _write_result(copy, f"{copy.stem}.", result, arrays, rankings)
    return result | {"result_file": str(folder / "result.json")}


def _consistency(fitted: Fit, measured: Measured) -> dict[str, dict[str, np.ndarray]]:
    """How far a run's test rankings agree with those of what it learned from or was guided by, by their config keys.

    Each measure is float64 [U].
    """
    found = {}
    for part in fitted.parts:
        if part not in (*getattr(fitted.model, "teachers", ()), *getattr(fitted.model, "guides", ())):
            continue
        teacher = fitted.parts[part]
        if not len(measured.users):
            continue
        numbered = _Numbered.of(teacher.train_data._dataset, fitted.train_data._dataset)
        with _counting(teacher.model, numbered.counting(measured.counts_as)):
            ranked = teacher.trainer.evaluate(teacher.test_data, load_best_model=False)
        if not ranked:
            continue
        theirs: Measured = teacher.trainer.measured
        # Under eval_unit: row only a sequential recommender ranks rows; a part may have a topk of its own.
        if np.array_equal(theirs.users, measured.users) and theirs.items.shape == measured.items.shape:
            ours = np.where(measured.items > 0, measured.items, -1)
            found[part] = consistency(ours, numbered.ranked(theirs.items), fitted.config["topk"])
            told = ", ".join(f"{name} {values.mean():.4f}" for name, values in found[part].items())
            logger.info("agreement with %s (%s): %s", fitted.config[part], part, told)
    return found


class _Numbered(NamedTuple):
    """How a part numbers items, where it does so in a way of its own.

    Attributes:
        ours: the other model's numbers by the part's, int64 [n_items]; ``None`` where they are the same.
    """

    ours: np.ndarray | None

    @classmethod
    def of(cls, part: Any, whole: Any) -> _Numbered:
        """Of two train data sets with the same items."""
        order = item_order(whole, part)
        return cls(None if order is None else order.numpy())

    def ranked(self, items: np.ndarray) -> np.ndarray:
        """The part's ranked items, int64 [U, K], with the other's numbers; -1 stays."""
        return items if self.ours is None else np.where(items >= 0, self.ours[items], -1)

    def counting(self, counts_as: np.ndarray | None) -> np.ndarray | None:
        """Which item each one counts as, int64 [n_items], with the part's numbers."""
        if counts_as is None or self.ours is None:
            return counts_as
        return np.argsort(self.ours)[counts_as[self.ours]]


@contextlib.contextmanager
def _counting(model: Any, counts_as: np.ndarray | None) -> Iterator[None]:
    """Have a recommender's ranking be of items as another one counts them, so that the two can be compared."""
    if counts_as is None:
        yield
        return
    model.counts_as = torch.from_numpy(counts_as)
    try:
        yield
    finally:
        del model.counts_as


def _write_result(
    path: Path, prefix: str, result: Mapping[str, Any], arrays: dict[str, Any], rankings: Rankings | None
) -> None:
    """A result with its users' values and rankings beside it; each copy names its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = {
        "per_user": f"{prefix}per_user.npz" if arrays else None,
        "rankings": f"{prefix}rankings.npz" if rankings else None,
    }
    if arrays:
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        write_whole(path.with_name(f"{prefix}per_user.npz"), lambda part: part.write_bytes(packed.getvalue()))
    if rankings:
        rankings.save(path.with_name(f"{prefix}rankings.npz"))
    content = json.dumps({**result, **beside}, indent=1).encode()
    write_whole(path, lambda part: part.write_bytes(content))


def _curves(config: Config, facts: Mapping[str, Any]) -> dict[str, Any]:
    """How training went: the loss of every epoch, and ``[epoch, value]`` of ``valid_metric`` where it was looked at."""
    return {
        "loss": facts.get("losses"),
        "valid_metric": str(config["valid_metric"]).lower(),
        "valid": [[epoch + 1, value] for epoch, value in facts.get("valid_curve", ())],
    }


def _recboles_split(fitted: Fit) -> dict[str, Any]:
    """The ``split`` block under ``policy: recbole``: a sequential model's rows are its samples, one for each target."""
    phases = {"train": fitted.train_data, "valid": fitted.valid_data, "test": fitted.test_data}
    return {
        "fingerprint": None,
        "protocol": {"policy": "recbole", **fitted.config["eval_args"]},
        "users": fitted.dataset.user_num - 1,
        "items": fitted.dataset.item_num - 1,
        **{phase: 0 if data is None else len(data._dataset) for phase, data in phases.items()},
    }


def _searched(model: Any) -> dict[str, float]:
    """How much of the last search was no item, and how much of all items' prefixes it read, where a model tells."""
    told = {name: getattr(model, name, None) for name in ("invalid_share", "visited_share")}
    return {name: share for name, share in told.items() if share is not None}


def _evaluation(config: Config, measured: Measured, fitted: Fit) -> dict[str, Any]:
    counts_as = measured.counts_as
    recbole, sequential = config["policy"] == "recbole", fitted.test_data.is_sequential
    mode = config["eval_args"]["mode"]["test"]
    return {
        "policy": config["policy"],
        "exclude_history": "recbole" if recbole else config["exclude_history"],
        "eval_unit": "row" if sequential and (recbole or config["eval_unit"] == "row") else "user",
        # A search finds the best of the whole catalogue, and nothing of the order below them.
        "ranking": getattr(fitted.model, "ranking", "full") if mode == "full" else mode,
        "topk": config["topk"],
        # Items of equal titles are one, and which these are depends on what is taken for a title.
        **({} if counts_as is None else {"title_match": True, "counted": _counted(counts_as, fitted.dataset)}),
        # The figures are the mean over so many prompts, the rankings that are kept the first one's.
        **({} if measured.prompts == 1 else {"prompts": measured.prompts}),
        # Items are named by ids that tell of test rows, as was asked for.
        **({LEAKING: True} if _leaks(fitted) else {}),
        "test_users": len(measured.users),
        # Of equal scores the model does not say which comes first.
        "tied_targets": measured.tied_targets,
        # Sequential and language models see the valid rows as input at test, graphs never do: refit_on_valid evens it.
        "valid_rows_in_test_input": sequential,
        "refit_on_valid": bool(config["refit_on_valid"]),
        "merge_valid": bool(config["merge_valid"]),
    }


def _counted(counts_as: np.ndarray, dataset: Any) -> str:
    """A hash of which items count as which other one, by their raw ids, whatever numbers they have here."""
    tokens = dataset.field2id_token[dataset.iid_field].astype(str)
    moved = np.flatnonzero(counts_as != np.arange(len(counts_as)))
    pairs = sorted(f"{tokens[item]}\t{tokens[counts_as[item]]}" for item in moved)
    # Rows of before a search found titles are not to stand beside those of since.
    return hashlib.sha256("\n".join(["found as one", *pairs]).encode()).hexdigest()[:16]


def _leaks(fitted: Fit) -> bool:
    """Whether a run, or a recommender that it was made with, reads ids that leak."""
    return leaks(fitted.config) or any(_leaks(part) for part in fitted.parts.values())


def _parameters(fitted: Fit, counted: bool) -> dict[str, int]:
    # RecBole's models in closed form carry one weight that nothing reads, for its trainer's sake.
    parameters = list(fitted.model.parameters()) if counted else []
    backbone = getattr(fitted.model, "backbone", None)
    own = {id(weight) for weight in parameters}  # an adapter's stand in the backbone as well
    rest = backbone.decoder.parameters() if backbone is not None else ()
    # A weight that DeepSpeed shards is empty between two calls.
    frozen = sum(getattr(weight, "ds_numel", weight.numel()) for weight in rest if id(weight) not in own)
    return {
        "total": sum(weight.numel() for weight in parameters) + frozen,
        "trainable": fitted.trainable if counted else 0,
    }


def _device(config: Config) -> str:
    if config["device"].type == "cuda":
        return torch.cuda.get_device_name()
    return f"cpu ({platform.machine()}, {torch.get_num_threads()} threads, products by {products.in_use()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """A plain table of test metrics: a line a metric, a column a result.

    Args:
        results: from :func:`run` or ``result.json``; their metrics need not be the same.
    """
    names = list(dict.fromkeys(name for result in results for name in result["test"]))
    rows = [["", *(result["model"] for result in results)]]
    rows += [
        [name, *(f"{result['test'][name]:.4f}" if name in result["test"] else "-" for result in results)]
        for name in names
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
