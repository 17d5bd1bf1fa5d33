"""Training of recommenders that need more than one stage before they can be trained, such as GLTA.

What a staged recommender says of itself: ``parts`` (config keys that name a recommender trained first), ``stages`` (its
own stages, the last of which is trained like any RecBole model), ``prepare`` (takes what the earlier stages made),
``begin_stage``, ``stage_batches``, ``training_batch`` (the last stage's batches) and ``stage_loss``. Batches tell
what :class:`~recbole_llm.training.loop.Batch` asks for.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer
from recbole.utils import init_seed
from torch import nn

from recbole_llm import processes
from recbole_llm.backbone.adapter import check_targets
from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.backbone.load import load_with_head
from recbole_llm.backbone.text_projector import cold_item_embeddings, text_features
from recbole_llm.data.item_text import ItemText
from recbole_llm.errors import TrainingStoppedError
from recbole_llm.progress import Steps
from recbole_llm.training.embeddings import graph_embeddings
from recbole_llm.training.language import backbone_options, named_backbone, read_item_text, take_backbone
from recbole_llm.training.loop import TrainingLoop, check_settings
from recbole_llm.training.pipeline import code_mark
from recbole_llm.training.sharding import check_sharding, shard, sharding
from recbole_llm.training.state import (
    RESUME_FILE,
    WEIGHTS,
    ResumeFile,
    load_state,
    rng_state,
    save_state,
    set_rng_state,
)
from recbole_llm.training.store import Stage, StageStore, fingerprint_of
from recbole_llm.training.trainer import RESUME_SECONDS, TrainerMixin, _Watched
from recbole_llm.training.user_text import Texts, generated_texts, keyword_texts, text_source

logger = logging.getLogger("recbole_llm")

# Raised when the code of a stage changes what it makes.
ALIGNMENT_VERSION = 1


class StagedTrainer(TrainerMixin, Trainer):
    """Trains a staged recommender: :meth:`prepare` runs the stages before the last, ``fit`` the last one."""

    together = True
    shares_ranking = True
    # Settings of the stages before the last: passes, and the optimizer's step size.
    first_epochs, first_rate = "alignment_epochs", "alignment_learning_rate"

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.stages: list[dict[str, Any]] = []
        self.item_text: ItemText | None = None
        self._upstream: list[str] | None = None
        self._loop: TrainingLoop | None = None

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """The layers that train exist only once the earlier stages have run."""
        return super()._build_optimizer(**kwargs) if "params" in kwargs else None

    def valid_of_training(self, valid_data: Any) -> Mapping[str, float]:
        """See the base class; candidates may be drawn, and what was resumed may have been ranked by another search."""
        alike = isinstance(valid_data, FullSortEvalDataLoader) and self.start_epoch == 0
        return self.best_valid_result or {} if alike else {}

    # --- the stages before the last ----------------------------------------------------------------------------------
    def prepare(self, train_data: Any, store: StageStore, fit_part: Callable[..., Any]) -> list[str]:
        """Run (or find) every stage but the last and hand the model what they made.

        Args:
            train_data: the training loader.
            store: the stage cache.
            fit_part: trains the recommender that a config key names and returns its fit.

        Returns:
            Fingerprints of what the last stage builds on.
        """
        config, dataset = self.config, train_data._dataset
        # What the user may have got wrong comes first: a graph model is minutes of training.
        check_settings(config)
        check_sharding(config)
        self.item_text = read_item_text(config, dataset)
        named = named_backbone(config)
        check_targets(config, named.decoder if named else None)
        user_embeddings, item_embeddings = self._graph(fit_part)
        backbone, backbone_mark, lines = take_backbone(config, dataset, self.item_text, store, named)
        self.stages.extend(lines)
        if config["cold_items"] == "text":
            item_embeddings = self._cold_items(dataset, backbone, item_embeddings)
        profiles, predictions = self._user_texts(
            dataset, backbone, backbone_mark, store, user_embeddings, item_embeddings
        )
        if config["gradient_checkpointing"]:
            checkpoint_layers(backbone.decoder)
        init_seed(config["seed"], config["reproducibility"])
        self.model.prepare(
            user_embeddings=torch.as_tensor(user_embeddings),
            item_embeddings=torch.as_tensor(item_embeddings),
            backbone=backbone,
            item_texts=self.item_text.texts,
            profiles=profiles,
            predictions=predictions,
        )
        shard(config, backbone.decoder)
        # Gathering weights is done together: every process ranks everything, the same number of passes.
        self.shares_ranking = sharding() is None
        upstream = [self.part_fits[part].fingerprint for part in self.model.parts]
        upstream.append(backbone_mark)
        upstream.append(fingerprint_of([self.item_text.texts, profiles, predictions]))
        for stage in self.model.stages[:-1]:
            made = self._alignment(stage, store, upstream)
            self.stages.append(made.as_dict(stage))
            upstream = [*upstream, made.fingerprint]
        self._upstream = upstream
        return upstream

    def _show(self) -> bool:
        return bool(self.config["show_progress"])

    def _graph(self, fit_part: Callable[..., Any]) -> tuple[np.ndarray, np.ndarray]:
        tables = partial(graph_embeddings, name=self.config["graph_model"])
        for part in self.model.parts:
            fit = fit_part(part, look=tables if part == "graph_model" else None)
            self.part_fits[part] = fit
            self.stages.extend(fit.stages_as(part))
        return tables(self.part_fits["graph_model"].model)

    def _cold_items(self, dataset: Any, backbone: Backbone, item_embeddings: np.ndarray) -> np.ndarray:
        assert self.item_text is not None
        seen = dataset.train_histories.seen(len(item_embeddings))
        features = text_features(backbone, self.item_text.texts, self.config["alignment_description_tokens"])
        logger.info("cold items: %d of %d get an embedding from their text", (~seen[1:]).sum(), len(seen) - 1)
        return cold_item_embeddings(item_embeddings, features, seen, self.config["cold_items_penalty"])

    def _user_texts(
        self,
        dataset: Any,
        backbone: Backbone,
        mark: str,
        store: StageStore,
        user_embeddings: np.ndarray,
        item_embeddings: np.ndarray,
    ) -> Texts:
        assert self.item_text is not None
        config, texts = self.config, self.item_text.texts
        source = text_source(config)
        if source == "none" or not (config["profile_words"] or config["prediction_words"]):
            return None, None
        if source == "keywords":
            return keyword_texts(config, dataset, texts, user_embeddings, item_embeddings)
        made, stage = generated_texts(
            config, dataset, texts, backbone, mark,
            lambda: load_with_head(backbone.name, **backbone_options(config)), store,
        )  # fmt: skip
        self.stages.append(stage.as_dict())
        return made

    def _alignment(self, stage: str, store: StageStore, upstream: list[str]) -> Stage:
        config = self.config
        formerly: dict[str, Any] = {
            "config": {key: value for key, value in config.stage_keys().items() if self._shapes_first(key)},
            "upstream": upstream,
        }
        code = code_mark(type(self.model))
        if code is not None:
            formerly["code"] = code
        keys, before_search = self.without_search(upstream)
        inputs = formerly | {
            "config": {key: value for key, value in formerly["config"].items() if key not in keys},
            "upstream": before_search,
        }
        made = store.run(
            stage, ALIGNMENT_VERSION, inputs, lambda folder: self._align(stage, folder), together=True,
            formerly=formerly if keys else None,
        )  # fmt: skip
        self.model.load_state_dict(load_state(made.folder / WEIGHTS, self.device))
        return made

    def _align(self, stage: str, folder: Path) -> dict[str, Any]:
        """One alignment stage: its batches for a fixed number of epochs."""
        config, model = self.config, self.model
        init_seed(config["seed"], config["reproducibility"])
        generator = torch.Generator().manual_seed(config["seed"])
        optimizer = self._first_optimizer(model.begin_stage(stage))
        epochs, batches = config[self.first_epochs], len(self._first_batches(stage, generator))
        loop = TrainingLoop(config, model, stage, optimizer, batches, epochs)
        losses: list[float] = []
        resume = folder / RESUME_FILE
        if resume.is_file():
            losses = _resume_alignment(resume, model, optimizer, loop, generator)
        last = time.monotonic()
        steps = Steps(stage, (epochs - len(losses)) * batches, self._show())
        for epoch in range(len(losses), epochs):
            losses.append(self._align_epoch(loop, epoch, generator, steps))
            if processes.is_main() and time.monotonic() - last > RESUME_SECONDS:
                state = {
                    "model": dict(model.state_dict()),
                    "optimizer": optimizer.state_dict(),
                    "losses": losses,
                    "loop": loop.state_dict(),
                    "rng": rng_state(generator),
                }
                save_state(resume, state)
                last = time.monotonic()
        steps.close()
        if processes.is_main():
            save_state(folder / WEIGHTS, dict(model.state_dict()))
        return {"losses": losses, "tokens": loop.tokens()}

    def _first_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config[self.first_rate])

    def _first_batches(self, stage: str, generator: torch.Generator) -> Any:
        """An epoch of a stage before the last."""
        return self.model.stage_batches(stage, generator)

    @staticmethod
    def _shapes_first(key: str) -> bool:
        """Whether a setting is of the stages before the last: the flat training keys belong to the last one only."""
        last_stage = {
            "epochs", "train_batch_size", "learning_rate", "weight_decay", "learner", "eval_step", "stopping_step",
            "valid_metric", "inference", "shuffle", "samples_per_user", "targets", "target_window", "target_fill",
            "history_dropout", "history_length", "history_input", "history_order", "user_dropout", "loss_positions",
            "train_item_projector", "text_tokens", "inference_batch_size", "valid_metric_bigger", "eval_unit",
            "exclude_history", "schedule_epochs",
        }  # fmt: skip
        return key not in last_stage

    def _align_epoch(self, loop: TrainingLoop, epoch: int, generator: torch.Generator, steps: Steps) -> float:
        total, count = 0.0, 0

        def check(loss: torch.Tensor) -> None:
            if not torch.isfinite(loss):
                raise TrainingStoppedError(
                    f"{self.config['model']}: the loss of {loop.stage} became {loss.item()} in epoch {epoch + 1}, "
                    f"batch {steps.done - before + 1}; try a lower {self.first_rate} "
                    f"(now {self.config[self.first_rate]})"
                )

        batches, before = self._first_batches(loop.stage, generator), steps.done
        for loss in loop.epoch(batches, check):
            total, count = total + loss, count + 1
            for _ in range(min(loop.accumulation, before + len(batches) - steps.done)):
                steps.advance()
        return total / max(count, 1)

    def tokens(self) -> int:
        """Positions that the language model read while the last stage trained."""
        return self._loop.tokens() if self._loop else 0

    # --- the last stage ----------------------------------------------------------------------------------------------
    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """RecBole's ``fit`` of the last stage; :meth:`prepare` has run."""
        config, model, stage = self.config, self.model, self.model.stages[-1]
        init_seed(config["seed"], config["reproducibility"])
        self.optimizer = self._build_optimizer(params=model.begin_stage(stage))
        epochs = config["schedule_epochs"] or self.epochs
        self._loop = TrainingLoop(config, model, stage, self.optimizer, len(train_data), epochs)
        return super().fit(train_data, *args, **kwargs)

    def _train_epoch(self, train_data: Any, epoch_idx: int, loss_func: Any = None, show_progress: bool = False) -> Any:
        """Replaces trainer.py:208; the sum of the steps' losses."""
        assert self._loop is not None
        if self._begin_epoch(epoch_idx):
            return self.train_loss_dict[epoch_idx]
        batches = (self.model.training_batch(interaction) for interaction in _Watched(train_data, self._tick))
        return sum(self._loop.epoch(batches, self._check_nan), 0.0)

    def _own_state(self) -> dict[str, Any]:
        return {"loop": self._loop.state_dict()} if self._loop else {}

    def _take_state(self, state: dict[str, Any]) -> None:
        if self._loop:
            self._loop.load_state_dict(state["loop"])


def _resume_alignment(
    file: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loop: TrainingLoop, generator: torch.Generator
) -> list[float]:
    state = ResumeFile(file).take_up()
    if state is None:
        return []
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    loop.load_state_dict(state["loop"])
    set_rng_state(state["rng"], generator)
    return list(state["losses"])
