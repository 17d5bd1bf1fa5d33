"""Fine-tuning a language model to generate items: first their tokens, then the model itself."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from recbole.utils import init_seed
from torch import Tensor

from recbole_llm.backbone.adapter import check_targets
from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.backbone.embedded_t5 import NAME as EMBEDDED_T5
from recbole_llm.data.phases import TRAIN, VALID, WITHHELD
from recbole_llm.data.task_loader import TaskLoader
from recbole_llm.data.ties import tie_order
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import mean_of
from recbole_llm.model.guided import is_guided
from recbole_llm.training.codebooks import Quantiser
from recbole_llm.training.collaborative_vectors import CollaborativeVectors, check_vectors
from recbole_llm.training.continuation import Continued
from recbole_llm.training.guidance import Guidance
from recbole_llm.training.item_tokens import Tokenized, has_codebook
from recbole_llm.training.language import named_backbone, read_item_text, take_backbone
from recbole_llm.training.loop import check_settings
from recbole_llm.training.pipeline import code_mark
from recbole_llm.training.sharding import sharding
from recbole_llm.training.staged import StagedTrainer
from recbole_llm.training.store import StageStore, fingerprint_of
from recbole_llm.training.task_texts import read_task_texts
from recbole_llm.training.teacher import FoldedTeacher, Teacher, check_folds, check_graphs
from recbole_llm.training.teacher_labels import cached_labels
from recbole_llm.training.text_tables import text_tables
from recbole_llm.training.tokenized import TokenizedMixin
from recbole_llm.training.trained_rows import trained_rows

logger = logging.getLogger("recbole_llm")


class FineTuningTrainer(TokenizedMixin, StagedTrainer):
    """Trains a recommender that generates items: the tokens' stages, then its last one by RecBole's ``fit``.

    Attributes:
        continued_from: the run that the weights began as, for ``result.json``; ``None`` where they began fresh.
        trained_rows: hashes of the rows that the weights learn from, kept with them.
    """

    continued_from: dict[str, Any] | None = None
    trained_rows: np.ndarray | None = None

    first_epochs, first_rate = "text_epochs", "adapter_learning_rate"

    # Whether an evaluation asks with every prompt of inference that the model has.
    _every_prompt = True
    # By its place upstream, what stands there where the search does not count; None, nothing.
    _unsearched: dict[int, str | None]

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """One pass over the weights a step: tables of a whole vocabulary train here.

        ``adafactor`` is T5's optimizer (Shazeer & Stern, ICML 2018, arXiv 1804.04235): step sizes are relative to a
        weight's own, and fall as 1 / sqrt(step) once that is below the learning rate.
        """
        if self.config["learner"] == "adafactor" and "params" in kwargs:
            return torch.optim.Adafactor(
                kwargs["params"], lr=self.config["learning_rate"], weight_decay=self.config["weight_decay"]
            )
        made = super()._build_optimizer(**kwargs)
        if isinstance(made, torch.optim.Adam):
            for group in (made.defaults, *made.param_groups):
                group["fused"] = True
        return made

    def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """As other staged recommenders do; the log says which prompts were too long."""
        loss = super()._train_epoch(*args, **kwargs)
        self.model.tell_long_prompts()
        return loss

    def prepare(self, train_data: Any, store: StageStore, fit_part: Callable[..., Any]) -> list[str]:
        """Run (or find) every stage but the last and hand the model what they made.

        Args:
            train_data: the training loader.
            store: the stage cache.
            fit_part: trains the recommender that a config key names and returns its fit.

        Returns:
            Fingerprints of what the last stage builds on.

        Raises:
            UserError: settings that cannot be, before anything is trained; see the stages.
        """
        config, dataset = self.config, train_data._dataset
        check_settings(config)
        if sharding():
            raise UserError(f"{config['model']} cannot shard its language model; train whole copies")
        if self.model.ranking != "full":
            _check_beams(config, dataset)
        _check_code_embedding(config)
        check_folds(config, dataset)
        check_graphs(config, dataset)
        text = read_item_text(config, dataset)
        source = read_task_texts(config, dataset, text)
        for task in train_data.tasks:
            source.texts |= task.own_texts()
        train_data.texts = source
        _check_samples(config, train_data)
        named = named_backbone(config)
        check_targets(config, named.decoder if named else None)
        self.model.check_language_model(named.encodes if named else config["llm"] == EMBEDDED_T5)
        before = Continued.read(config, dataset)
        if before is None:
            made = self._tokenize(dataset, store, fit_part, named)
        else:
            made = self._noted(before.tokenize(config, dataset, store, list(text.texts), named))
        self.item_text = text
        backbone, mark = made.sources.backbone, made.sources.backbone_mark
        if backbone is None:
            backbone, mark, lines = take_backbone(config, dataset, text, store, named)
            self.stages = [*self.stages[:-1], *lines, self.stages[-1]]
        # Before tokens join it.
        head = backbone.head_fingerprint()
        teachers = [*self._vectors(dataset, fit_part), *self._teachers(dataset, fit_part)]
        guides = self._guides(dataset, fit_part)
        if config["gradient_checkpointing"]:
            checkpoint_layers(backbone.decoder)
        tables, texts_made = text_tables(source.texts, backbone, config["text_tokens"], store)
        self.stages += [stage.as_dict() for stage in texts_made]
        init_seed(config["seed"], config["reproducibility"])
        self.model.prepare(
            item_tokens=made.tokens,
            backbone=backbone,
            head_model=backbone.causal,
            tie_order=tie_order(dataset.field2id_token[dataset.iid_field]),
            texts=tables,
            codebook=_codebook(config, made),
        )
        labels = [cached_labels(config, dataset, self.model, store)] if config["teacher_cache_mib"] else []
        self.stages += labels
        train_data.length_of = self.model.sample_lengths
        marks = {place: stage.fingerprint for place, stage in zip(tables, texts_made, strict=True)}
        self._upstream = [made.stage.fingerprint, mark, fingerprint_of([self.model.wording(), marks])]
        self._unsearched = {2: fingerprint_of([self.model.wording(searched=False), marks])}
        self._upstream += [] if head is None else [head]
        # A task of the user's own may be edited between runs.
        self._upstream += [own for task in train_data.tasks if (own := code_mark(type(task))) is not None]
        self._upstream += teachers
        self._unsearched |= dict.fromkeys(range(len(self._upstream), len(self._upstream) + len(guides)))
        self._upstream += [*guides, *(line["fingerprint"] for line in labels)]
        self.trained_rows = trained_rows(dataset, before.trained if before else None)
        if before is not None:
            before.load_into(self.model, self.device)
            self.continued_from = before.as_dict(dataset)
            self._upstream.append(before.fingerprint)
        self._first_data = train_data
        for stage in self.model.stages[:-1]:
            trained = self._alignment(stage, store, self._upstream)
            self.stages.append(trained.as_dict())
            self._upstream = [*self._upstream, trained.fingerprint]
        return self._upstream

    def _vectors(self, dataset: Any, fit_part: Callable[..., Any]) -> list[str]:
        """Train (or find) the recommender whose vectors stand in prompts; its fingerprint."""
        part = getattr(self.model, "vectors_of", None)
        if part is None:
            return []
        look = partial(check_vectors, name=self.config[part], part=part, users=self.model.tells_user)
        fit = self._part(part, fit_part, look)
        self.model.take_vectors(CollaborativeVectors(fit, dataset, part))
        return [fit.fingerprint]

    # --- stages before the last, of models that have some ------------------------------------------------------------
    def _first_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return self._build_optimizer(params=parameters)

    def _first_batches(self, stage: str, generator: torch.Generator) -> _TaskBatches:
        """An epoch of samples as the last stage has them, from a loader of their own."""
        last = self._first_data
        loader = TaskLoader(self.config, last._dataset)
        loader.texts, loader.length_of, loader.generator = last.texts, last.length_of, generator
        return _TaskBatches(loader, self.model)

    @staticmethod
    def _shapes_first(key: str) -> bool:
        last = ("epochs", "learning_rate", "eval_step", "stopping_step", "valid_metric", "schedule_epochs")
        return key not in last

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """As of other staged recommenders; the model is told how many batches there will be."""
        self.model.batches_planned = len(train_data) * (self.config["schedule_epochs"] or self.epochs)
        return super().fit(train_data, *args, **kwargs)

    def _teachers(self, dataset: Any, fit_part: Callable[..., Any]) -> list[str]:
        """Train (or find) the recommenders that the model learns from; their fingerprints.

        Under ``cf_folds`` these teach, and the one of all train rows is what rankings are compared with.
        """
        marks = []
        for part in getattr(self.model, "teachers", ()):
            fit = self._part(part, fit_part)
            count = self.config["cf_folds"]
            if count == 1:
                teacher: Teacher | FoldedTeacher = Teacher(fit, dataset, part)
            else:
                folds = [self._fold(part, fold, count, fit_part) for fold in range(count)]
                teacher = FoldedTeacher(folds, dataset, part)
                logger.info("%s: %d of them teach, each what it was trained without (cf_folds)", part, count)
            self.model.take_teacher(teacher)
            marks.append(teacher.fingerprint)
        return marks

    def _guides(self, dataset: Any, fit_part: Callable[..., Any]) -> list[str]:
        """Train (or find) the recommenders that have a say in the search; their fingerprints."""
        if not is_guided(self.config):
            return []
        fits = [self._part(part, fit_part) for part in self.model.guides]
        for part, fit in zip(self.model.guides, fits, strict=True):
            self.model.take_guidance(Guidance(fit, dataset, part))
        return [fit.fingerprint for fit in fits]

    def without_search(self, upstream: list[str]) -> tuple[frozenset[str], list[str]]:
        """See the base class: how the items that the model generates are searched for, and who has a say in it."""
        marks = [self._unsearched.get(place, mark) for place, mark in enumerate(upstream)]
        return self.model.search_settings(), [mark for mark in marks if mark is not None]

    def _part(self, part: str, fit_part: Callable[..., Any], look: Callable[[Any], None] | None = None) -> Any:
        """Train (or find) a recommender of the run, once."""
        if part not in self.part_fits:
            fit = self.part_fits[part] = fit_part(part, look=look)
            self.stages += fit.stages_as(part)
        return self.part_fits[part]

    def _fold(self, part: str, fold: int, count: int, fit_part: Callable[..., Any]) -> Any:
        fit = fit_part(part, (fold, count))
        self.stages += fit.stages_as(f"{part} fold {fold + 1} of {count}")
        return fit

    def _valid_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces trainer.py:257: training looks at one prompt, whatever ``inference_prompts`` says."""
        with self._one_prompt():
            return super()._valid_epoch(*args, **kwargs)

    def rank_valid(self, valid_data: Any) -> Mapping[str, float]:
        """See the base class."""
        with self._one_prompt():
            return super().rank_valid(valid_data)

    @contextmanager
    def _one_prompt(self) -> Iterator[None]:
        self._every_prompt = False
        try:
            yield
        finally:
            self._every_prompt = True

    def valid_of_training(self, valid_data: Any) -> Mapping[str, float]:
        """See the base class; training looks at one prompt."""
        return super().valid_of_training(valid_data) if self.model.prompts_asked == 1 else {}

    def evaluate(
        self, eval_data: Any, load_best_model: bool = True, model_file: str | None = None, show_progress: bool = False
    ) -> Any:
        """As other trainers do; with ``inference_prompts: all`` the mean of what each prompt gives.

        The ranked items that are kept are those of the first.
        """
        guidance = getattr(self.model, "guidance", None)
        if guidance is not None:
            guidance.rank_as(eval_data)
        first = super().evaluate(eval_data, load_best_model, model_file, show_progress)
        self._tell_invalid()
        self.model.tell_long_prompts()
        if first is None or not self._every_prompt or self.model.prompts_asked == 1:
            return first
        found = [self.measured]
        try:
            for which in range(1, self.model.prompts_asked):
                self.model.asked_with = which
                super().evaluate(eval_data, False, show_progress=show_progress)
                found.append(self.measured)
        finally:
            self.model.asked_with = 0
        for name in first:
            values = [one.metrics[name] for one in found]
            logger.info("%s over %d prompts: %.4f to %.4f", name, len(found), min(values), max(values))
        self.measured = mean_of(found)
        return self.measured.metrics

    def _tell_invalid(self) -> None:
        share = self.model.invalid_share
        if share is not None:
            logger.info("level-wise search: %.4f of the sequences are no item", share)


class _TaskBatches:
    """The batches of a loader as a model writes them."""

    def __init__(self, loader: TaskLoader, model: Any) -> None:
        self._loader, self._model = loader, model

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return (self._model.training_batch(samples) for samples in self._loader)


def staged_trainer(model_class: type) -> type[StagedTrainer]:
    """The trainer of a staged recommender: one that generates items needs their tokens first."""
    return FineTuningTrainer if hasattr(model_class, "take_item_tokens") else StagedTrainer


def _check_beams(config: Any, dataset: Any) -> None:
    """See before any work that a search can find as many items as it has beams, for every user."""
    split = getattr(dataset, "split", None)
    if split is None:
        return
    left, what = int(split.candidates.sum()), "that can be recommended"
    # RecBole's own way, `recbole`, leaves out nothing for models that read histories.
    if config["exclude_history"] is True:
        left -= int(split.histories(TRAIN, VALID, WITHHELD).distinct(split.n_items).max())
        what = "that are left for the user who has had most"
    if config["beams"] > left:
        raise UserError(f"beams {config['beams']} is above the {left} items {what}")


def _check_samples(config: Any, train_data: Any) -> None:
    """See before any work that the tasks have something to train on, once their texts are read."""
    if not train_data.samples():
        raise UserError(
            f"tasks: {', '.join(task.name for task in train_data.tasks)} have no sample on '{config['dataset']}': no "
            "texts that they read, negative_ratio: 0, or no user with two train items; name another, such as sequential"
        )


def _check_code_embedding(config: Any) -> None:
    """See before any work that the tokens will have a codebook where their rows are to be made of one."""
    kind = config["code_embedding"] or "none"
    if kind != "none" and not has_codebook(config):
        raise UserError(
            f"code_embedding: {kind} makes the tokens' rows of a codebook, and there is none behind raw ids or tokens "
            "that were given (code_tokens); set code_embedding: none"
        )


def _codebook(config: Any, made: Tokenized) -> Tensor | None:
    """The codes' vectors, float32 ``[N, C, d]``, where the tokens' rows are made of them."""
    if config["code_embedding"] in (None, "none"):
        return None
    return Quantiser.load(made.stage.folder).codebook.levels
