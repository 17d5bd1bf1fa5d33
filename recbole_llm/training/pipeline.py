"""From a Config to a trained recommender: data, stages through the cache, weights."""

from __future__ import annotations

import copy
import glob
import hashlib
import inspect
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.utils import ModelType, init_seed

from recbole_llm import compat, processes, registry
from recbole_llm.config import FOLD, Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.loaders import make_loaders
from recbole_llm.data.phases import TRAIN
from recbole_llm.disk import remove
from recbole_llm.errors import UserError
from recbole_llm.named_files import hash_of, weights_of
from recbole_llm.refusals import check_sizes
from recbole_llm.training.state import RESUME_FILE, WEIGHTS
from recbole_llm.training.store import Stage, StageStore, fingerprint_of
from recbole_llm.training.trained_rows import write_trained_rows
from recbole_llm.training.trainer import trainer_class

logger = logging.getLogger("recbole_llm")

# Raised when a change of ours moves what training a recommender makes; where it moves one model's alone, that class's
# `train_version` is.
TRAIN_VERSION = 1

# Told the epoch (from 0) and the score on valid after each validation.
Watch = Callable[[int, float], None]
# Shown a model before it trains; refuses one whose training would be for nothing.
Look = Callable[[Any], Any]


class PrunedError(Exception):
    """Raised by a watch: the training is given up, and nobody will go on from what it has left."""


@dataclass
class Fit:
    """A trained recommender.

    Attributes:
        config, dataset, train_data, valid_data, test_data, model, trainer: RecBole's objects.
        stages: lines for ``result.json``, in the order they ran; of a refit those of the fit before it as well.
        valid: metrics of the best epoch.
        facts: what the last stage remembers (best epoch, losses).
        folder: where the weights are.
        fingerprint: of the last stage.
        parts: fits of the recommenders trained first, by config key.
        trainable: weights that trained; a recommender that is frozen afterwards has none that do.
    """

    config: Config
    dataset: Any
    train_data: Any
    valid_data: Any
    test_data: Any
    model: Any
    trainer: Any
    stages: list[dict[str, Any]]
    valid: dict[str, float]
    facts: dict[str, Any]
    folder: Path
    fingerprint: str
    parts: dict[str, Fit] = field(default_factory=dict)
    trainable: int = 0

    def stages_as(self, part: str) -> list[dict[str, Any]]:
        """Its lines in the ``result.json`` of a model that it is a part of.

        Args:
            part: what it is there. A recommender of several stages keeps their names behind it.
        """
        several = len({line["name"] for line in self.stages}) > 1
        return [{**line, "name": f"{part} {line['name']}" if several else part} for line in self.stages]


def store_of(config: Config, run_folder: Path | None = None) -> StageStore:
    """The stage cache that a Config asks for."""
    if config["cache"] == "off" and run_folder is not None:
        return StageStore(run_folder / "stages")
    return StageStore(Path(config["output_dir"]) / "cache", refresh=config["cache"] == "refresh")


def fit_parts_of(config: Config, store: StageStore | None = None, merged: bool = False) -> Callable[..., Fit]:
    """How a staged recommender trains the parts it names.

    What is returned takes a part's name; where it is to be trained without a fold of the train rows, that fold's number
    and how many there are; and a look at the part before it trains.

    Args:
        config: of the whole.
        store: the stage cache.
        merged: train on train + valid rows (``refit_on_valid``), which ``merge_valid`` asks for as well.
    """
    merged = merged or config["merge_valid"]

    def fit_part(name: str, fold: tuple[int, int] | None = None, look: Look | None = None) -> Fit:
        part = config.part(name)
        part["refit_on_valid"] = merged
        # What a recommender without a fold is made from was not trained on that fold either.
        fold = fold or config.final_config_dict.get(FOLD)
        if fold is not None:
            part[FOLD] = fold
        return fit(part, store or store_of(config), look=look)

    return fit_part


def fit(config: Config, store: StageStore, watch: Watch | None = None, look: Look | None = None) -> Fit:
    """Train a recommender, stage by stage; every finished stage is kept and found again.

    Args:
        config: what to train, on what.
        store: the stage cache.
        watch: looks on at the last stage where that is trained rather than found, at the epochs that an attempt that
            was cut off has left first; what it raises ends the training.
        look: is shown the model before any of it is trained; what it raises ends the call. Nothing it asks of the model
            moves a number.

    Returns:
        The trained recommender with its best weights; after ``refit_on_valid`` the one trained on train + valid.

    Raises:
        UserError: see the stages.
        PrunedError: the watch gave the training up.
    """
    note = config.tuned_note()
    if note:
        logger.info("%s", note)
    first = _fit_once(config, store, None, watch, look)
    if not config["refit_on_valid"] or not len(first.valid_data):
        return first
    # Measured here, as the metrics asked for may differ from those that picked the epoch when it was trained.
    first.valid = dict(first.trainer.evaluate(first.valid_data, load_best_model=False) or {})
    return _fit_once(config, store, first)


def fit_found(config: Config, store: StageStore) -> Fit:
    """A recommender that was trained before, from a cache that has every stage of it; nothing is measured.

    Args:
        config: of its run; of one with ``refit_on_valid``, as its result has them, the settings of the second training.
        store: a :class:`~recbole_llm.training.found.FoundStages`.

    Raises:
        UserError: a stage is not there.
    """
    return _fit_once(config, store, None, refitted=config["refit_on_valid"])


def prepared(config: Config) -> tuple[Any, Any, Any, Any]:
    """The data set and its loaders of train, valid and test rows.

    Raises:
        UserError: there is no such data, or the split leaves nothing to test, or less to recommend than ``topk`` asks.
    """
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    split = getattr(train_data._dataset, "split", None)
    if split is not None and max(config["topk"]) > split.candidates.sum():
        raise UserError(
            f"topk asks for {max(config['topk'])} items, but only {split.candidates.sum()} can be recommended"
        )
    if not len(test_data) and config["eval_args"]["split"] != {"LS": "valid_only"}:
        raise UserError(
            "the split leaves no test interaction; look at recbole-llm inspect dataset, eval_args and short_users"
        )
    return dataset, train_data, valid_data, test_data


def _for_refit(config: Config, before: Fit) -> tuple[Config, Any]:
    """A Config of as many epochs as were best before, and a loader of train + valid rows."""
    config = copy.copy(config)
    config.final_config_dict = {
        **config.final_config_dict,
        "epochs": before.facts["best_epoch"] + 1,
        "eval_step": 0,
        # The learning rate is to be at each epoch what it was then.
        "schedule_epochs": config["schedule_epochs"] or config["epochs"],
    }
    return config, _with_valid(config, before.dataset, before.train_data)


def _with_valid(config: Config, dataset: Any, train_data: Any) -> Any:
    """A loader of train + valid rows."""
    return make_loaders(config, dataset.cut(train_data._dataset.split.with_valid_in_train()))[0]


def _fit_once(
    config: Config, store: StageStore, before: Fit | None, watch: Watch | None = None, look: Look | None = None,
    refitted: bool = False,
) -> Fit:  # fmt: skip
    """Train on the train rows, or (given the fit before) on train + valid for that fit's best number of epochs.

    With ``refitted`` the settings are those of the latter already, and the fit before is not asked for.
    """
    init_seed(config["seed"], config["reproducibility"])
    if before is None:
        dataset, train_data, valid_data, test_data = prepared(config)
        refitted = refitted and len(valid_data) > 0
        if refitted:
            train_data = _with_valid(config, dataset, train_data)
    else:
        config, train_data = _for_refit(config, before)
        dataset, valid_data, test_data = before.dataset, before.valid_data, before.test_data
    init_seed(config["seed"], config["reproducibility"])
    model = (
        registry.get_model(config["model"], fast=config["fast_baselines"])
        if config.model_class.__module__.startswith(("recbole.", "recbole_llm."))
        else config.model_class
    )
    with compat.recbole_says():
        start = time.monotonic()
        model = model(config, train_data._dataset).to(config["device"])
        # RecBole's models of a closed form are fitted when they are made; of the others that takes no time.
        fitting = time.monotonic() - start if config["MODEL_TYPE"] == ModelType.TRADITIONAL else 0.0
        check_sizes(model, config)
        if look is not None:
            _show(model, look, torch.device(config["device"]))
        trainer = make_trainer(config, model)
    upstream, stages = [], []
    staged = hasattr(model, "stages")
    if staged:
        merged = refitted or before is not None
        upstream = trainer.prepare(train_data, store, fit_parts_of(config, store, merged=merged))
        stages = list(trainer.stages)
        if hasattr(model, "begin_stage"):
            # What trains is reported, also where the stage is found rather than trained.
            model.begin_stage(model.stages[-1])
    name = model.stages[-1] if staged else f"train-{config['model']}"
    stage, facts = _train(
        name, config, trainer, train_data, None if before else valid_data, store, upstream, watch, fitting
    )
    trainer.load_best(stage.folder / WEIGHTS)
    # The fit that found the number of epochs belongs to what a refit cost; what both need was made once.
    lines = list(before.stages) if before else []
    marks = {line["fingerprint"] for line in lines}
    lines += [line for line in (*stages, stage.as_dict()) if line["fingerprint"] not in marks]
    return Fit(
        config=config, dataset=dataset, train_data=train_data, valid_data=valid_data, test_data=test_data, model=model,
        trainer=trainer, stages=lines, valid=before.valid if before else facts["valid"],
        facts=facts, folder=stage.folder, fingerprint=stage.fingerprint,
        parts=trainer.part_fits,
        trainable=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    )  # fmt: skip


def _show(model: Any, look: Look, device: torch.device) -> None:
    """Let somebody look at a model; dropout and the like draw from random numbers that are nobody's."""
    training, drawn = model.training, np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        look(model)
    np.random.set_state(drawn)
    model.train(training)


def _train(
    name: str, config: Config, trainer: Any, train_data: Any, valid_data: Any, store: StageStore, upstream: list[str],
    watch: Watch | None, fitting: float,
) -> tuple[Stage, dict[str, Any]]:  # fmt: skip
    """The last stage, and its facts but for rankings of valid that were not made as they now would be."""
    split = getattr(train_data._dataset, "split", None)
    inputs: dict[str, Any] = {
        "config": config.stage_keys(),
        "files": data_mark(config),
        "split": [split.fingerprint, split.count(TRAIN)] if split else None,
        "code": code_mark(type(trainer.model)),
        "upstream": upstream,
    }
    inputs |= versions_of(type(trainer.model))
    if getattr(valid_data, "by_row", False) and config["eval_args"]["order"] == "RO":
        # Rankings of rows looked at later phases once, and picked the best epoch by it.
        inputs["selection"] = 2
    ranked_by, formerly = "", None
    keys, before_search = trainer.without_search(upstream)
    looked = 0 if valid_data is None or not len(valid_data) else validations(config)
    if keys and looked < 2:
        # No epoch was picked by how it ranks, so the weights are those of any way to rank.
        formerly = inputs
        inputs = inputs | {
            "config": {key: value for key, value in inputs["config"].items() if key not in keys},
            "upstream": before_search,
        }
        ranked_by = fingerprint_of([{key: formerly["config"].get(key) for key in sorted(keys)}, upstream])
    trainer.ranked_by = ranked_by

    def make(folder: Path) -> dict[str, Any]:
        trainer.saved_model_file = str(folder / WEIGHTS)
        trainer.resume_file = folder / RESUME_FILE
        try:
            trainer.fit(
                train_data, valid_data, verbose=True, saved=True, show_progress=config["show_progress"],
                callback_fn=watch,
            )  # fmt: skip
        except PrunedError:
            remove(folder)
            raise
        if processes.is_main() and not (folder / WEIGHTS).is_file():
            raise UserError(f"{config['model']} trains in phases of its own and kept no weights; it does not run here")
        rows = getattr(trainer, "trained_rows", None)
        if rows is not None and processes.is_main():
            write_trained_rows(folder, rows)
        losses = [float(loss) for _, loss in sorted(trainer.train_loss_dict.items())]
        valid = {key: float(value) for key, value in (trainer.best_valid_result or {}).items()}
        return {
            "best_epoch": trainer.best_epoch,
            "losses": losses,
            "valid": valid,
            "valid_curve": trainer.valid_curve,
            "tokens": trainer.tokens(),
            "seconds_before": fitting,
        } | ({"ranked_by": ranked_by} if ranked_by else {})

    trainer._train_data = train_data
    stage = store.run(name, TRAIN_VERSION, inputs, make, together=trainer.together, formerly=formerly)
    if stage.facts.get("ranked_by", ranked_by) == ranked_by:
        return stage, stage.facts
    return stage, stage.facts | {"valid": {}, "valid_curve": []}


def validations(config: Config) -> int:
    """How often a training looks at valid rows, where there are some, at most."""
    return int(config["epochs"]) // int(config["eval_step"]) if config["eval_step"] else 0


def versions_of(model_class: type) -> dict[str, int]:
    """What a fingerprint has of changes of ours that moved one model's training alone; empty without."""
    own = getattr(model_class, "train_version", 1)
    return {"model": own} if own > 1 else {}


def data_mark(config: Config) -> str:
    """SHA-256 of the atomic files that a model reads, and of weights that it begins with.

    The split's fingerprint says who did what when, and nothing of ratings, features, or the order of the rows, which
    internal ids (and so the rows of every weight) follow.
    """
    loaded = config["load_col"]
    suffixes = ("inter", "user", "item", "kg", "link", "net") if loaded is None else tuple(loaded)
    digest = hashlib.sha256()
    for suffix in sorted({*suffixes, *(config["additional_feat_suffix"] or ())}):
        for file in sorted(Path(config["data_path"]).glob(f"{glob.escape(config['dataset'])}*.{suffix}")):
            digest.update(f"{suffix} {hash_of(file)}\n".encode())
    for key, file in weights_of(config.final_config_dict).items():
        digest.update(f"{key} {hash_of(file)}\n".encode())
    return digest.hexdigest()


# Whose versions do not change from run to run, or whose code has a version of its own in the fingerprints.
_INSTALLED = frozenset({"recbole", "recbole_llm", "torch", "builtins", "abc", "typing"})


def code_mark(model_class: type) -> str | None:
    """SHA-256 of the files of a user's own model, which may be edited between runs; ``None`` for RecBole's and ours.

    They are those of its class and of its bases, whole, as a class reads what stands beside it. Of a class that is made
    around another one it is the other's.
    """
    model_class = getattr(model_class, "wrapped", model_class)
    own = [kind for kind in model_class.__mro__ if kind.__module__.partition(".")[0] not in _INSTALLED]
    if not own:
        return None
    try:
        files = sorted({inspect.getfile(kind) for kind in own})
        return hashlib.sha256("".join(hash_of(Path(file)) for file in files).encode()).hexdigest()
    except (OSError, TypeError):
        # Typed into an interpreter: nothing tells whether it changed, so it is never found again.
        return uuid.uuid4().hex


def make_trainer(config: Config, model: Any) -> Any:
    """The trainer of a model; see :func:`trainer_of`."""
    return trainer_of(type(model), config["MODEL_TYPE"], config["model"])(config, model)


def trainer_of(model_class: type, model_type: Any, name: str) -> type:
    """The trainer class of a model: staged where the model has stages, RecBole's with our additions elsewhere.

    Args:
        model_class: the model's.
        model_type: RecBole's ModelType.
        name: of the model.
    """
    if hasattr(model_class, "stage_loss"):
        # It brings transformers, peft and accelerate, which take as long to import as all the rest.
        from recbole_llm.training.fine_tuning import staged_trainer

        return staged_trainer(model_class)
    if hasattr(model_class, "take_item_tokens"):
        from recbole_llm.training.tokenized import TokenizedMixin

        return trainer_class(model_type, name, TokenizedMixin)
    if hasattr(model_class, "take_item_texts"):
        from recbole_llm.training.described import DescribedMixin

        return trainer_class(model_type, name, DescribedMixin)
    if hasattr(model_class, "take_profiles"):
        from recbole_llm.training.profiled import ProfiledMixin

        return trainer_class(model_type, name, ProfiledMixin)
    return trainer_class(model_type, name)
