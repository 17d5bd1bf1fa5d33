"""Training of recommenders that take in what a language model makes of the items' texts, otherwise as any model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from recbole.utils import init_seed

from recbole_llm.data.item_text import ItemText
from recbole_llm.training.item_tokens import Sources, read_texts
from recbole_llm.training.language import named_backbone, read_item_text
from recbole_llm.training.state import rng_state, set_rng_state
from recbole_llm.training.store import StageStore
from recbole_llm.training.trainer import TrainerMixin


class DescribedMixin(TrainerMixin):
    """Makes (or finds) the vectors of the items' texts before RecBole's ``fit``.

    The model says what it is by ``take_item_texts``, and by ``stages`` as a staged recommender does.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        self.stages: list[dict[str, Any]] = []
        self.artefacts: dict[str, Path] = {}
        self.item_text: ItemText | None = None
        self._upstream: list[str] | None = None

    def prepare(self, train_data: Any, store: StageStore, fit_part: Callable[[str], Any]) -> list[str]:
        """Run (or find) every stage but the last and hand the model its texts.

        The random streams are left as they were found: without the texts' term the model is its base, to the last bit.

        Args:
            train_data: the training loader.
            store: the stage cache.
            fit_part: trains the recommender that a config key names; none is named here.

        Returns:
            Fingerprints of what the last stage builds on.
        """
        config, dataset, before = self.config, train_data._dataset, rng_state()
        seen = dataset.train_histories.seen(dataset.item_num)
        sources = Sources(seen, item_text=read_item_text(config, dataset))
        hand_over = self._read(dataset, store, sources)
        init_seed(config["seed"], config["reproducibility"])
        hand_over()
        self.optimizer = self._build_optimizer()  # type: ignore[attr-defined]
        set_rng_state(before)
        self.stages, self.item_text, self._upstream = sources.lines, sources.item_text, sources.marks
        return self._upstream

    def _read(self, dataset: Any, store: StageStore, sources: Sources) -> Callable[[], None]:
        """Run (or find) the stages; what is returned hands the model what they made."""
        read_texts(self.config, dataset, store, sources, named_backbone(self.config))
        assert sources.item_text is not None and sources.texts is not None
        texts, named = torch.from_numpy(sources.texts), torch.tensor(sources.item_text.named)
        return lambda: self.model.take_item_texts(texts, named)
