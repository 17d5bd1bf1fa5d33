"""Fine-tuning a language model to generate items: first their tokens, then the model itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from recbole.utils import init_seed

from recbole_llm.backbone.adapter import check_targets
from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.data.split import TRAIN, VALID, WITHHELD
from recbole_llm.data.ties import tie_order
from recbole_llm.errors import UserError
from recbole_llm.training.language import named_backbone, read_item_text, take_backbone
from recbole_llm.training.loop import check_settings
from recbole_llm.training.sharding import sharding
from recbole_llm.training.staged import StagedTrainer
from recbole_llm.training.store import StageStore, fingerprint_of
from recbole_llm.training.task_texts import TaskTexts
from recbole_llm.training.text_tables import text_tables
from recbole_llm.training.tokenized import TokenizedMixin


class FineTuningTrainer(TokenizedMixin, StagedTrainer):
    """Trains a recommender that generates items: the tokens' stages, then its last one by RecBole's ``fit``."""

    def _build_optimizer(self, **kwargs: Any) -> Any:
        """One pass over the weights a step: tables of a whole vocabulary train here."""
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

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As other trainers do; the log says how many histories were made shorter."""
        found = super().evaluate(*args, **kwargs)
        self.model.tell_long_prompts()
        return found

    def prepare(self, train_data: Any, store: StageStore, fit_part: Callable[[str], Any]) -> list[str]:
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
        _check_beams(config, dataset)
        text = read_item_text(config, dataset)
        source = TaskTexts.read(config, dataset, text)
        named = named_backbone(config)
        check_targets(config, named.decoder if named else None)
        made = self._tokenize(dataset, store, fit_part, named)
        self.item_text = text
        backbone, mark = made.sources.backbone, made.sources.backbone_mark
        if backbone is None:
            backbone, mark, lines = take_backbone(config, dataset, text, store, named)
            self.stages = [*self.stages[:-1], *lines, self.stages[-1]]
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
        )
        train_data.text_items, train_data.query_items = source.text_items, source.query_items
        train_data.length_of = self.model.sample_lengths
        marks = {place: stage.fingerprint for place, stage in zip(tables, texts_made, strict=True)}
        self._upstream = [made.stage.fingerprint, mark, fingerprint_of([self.model.wording(), marks])]
        return self._upstream


def staged_trainer(model_class: type) -> type[StagedTrainer]:
    """The trainer of a staged recommender: one that generates items needs their tokens first."""
    return FineTuningTrainer if hasattr(model_class, "take_item_tokens") else StagedTrainer


def _check_beams(config: Any, dataset: Any) -> None:
    """See before any work that a search can find as many items as it has beams, for every user."""
    split = getattr(dataset, "split", None)
    if split is None or not config["exclude_history"]:
        return
    known = split.histories(TRAIN, VALID, WITHHELD).lengths
    left = int(split.candidates.sum()) - int(known.max())
    if config["beams"] > left:
        raise UserError(
            f"beams {config['beams']} is above the {left} items that are left for the user with the longest history"
        )
