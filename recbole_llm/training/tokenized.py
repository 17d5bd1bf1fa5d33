"""Training of recommenders that read items as tokens and are otherwise any RecBole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from recbole.utils import init_seed

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.item_text import ItemText
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.training.item_tokens import KEPT, Tokenized
from recbole_llm.training.store import StageStore
from recbole_llm.training.titles import tokenize
from recbole_llm.training.trainer import TrainerMixin


class TokenizedMixin(TrainerMixin):
    """Makes (or finds) the items' tokens before RecBole's ``fit``.

    The model says what it is by ``take_item_tokens``, and by ``stages`` and ``parts`` as a staged recommender does.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.stages: list[dict[str, Any]] = []
        self.artefacts: dict[str, Path] = {}
        self.item_text: ItemText | None = None
        self.item_tokens: ItemTokens | None = None
        self._upstream: list[str] | None = None

    def prepare(self, train_data: Any, store: StageStore, fit_part: Callable[..., Any]) -> list[str]:
        """Run (or find) every stage but the last and hand the model its tokens.

        Args:
            train_data: the training loader.
            store: the stage cache.
            fit_part: trains the recommender that a config key names and returns its fit.

        Returns:
            Fingerprints of what the last stage builds on.
        """
        made = self._tokenize(train_data._dataset, store, fit_part)
        init_seed(self.config["seed"], self.config["reproducibility"])
        self.model.take_item_tokens(made.tokens)
        self.optimizer = self._build_optimizer()  # type: ignore[attr-defined]
        self._upstream = [made.stage.fingerprint]
        return self._upstream

    def _tokenize(
        self, dataset: Any, store: StageStore, fit_part: Callable[..., Any], named: Backbone | None = None
    ) -> Tokenized:
        """Run (or find) the stages up to the tokens, and note what a run reports of them."""
        return self._noted(tokenize(self.config, dataset, store, fit_part, named))

    def _noted(self, made: Tokenized) -> Tokenized:
        self.part_fits, self.item_text = made.sources.parts, made.sources.item_text
        self.item_tokens = made.tokens
        self.stages = [*made.sources.lines, made.stage.as_dict()]
        files = {name: made.stage.folder / name for name in KEPT}
        self.artefacts = {name: file for name, file in files.items() if file.is_file()}
        return made
