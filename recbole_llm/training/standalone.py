"""Staged recommenders through RecBole's own calls."""

from __future__ import annotations

from typing import Any

from recbole_llm.training.pipeline import fit_parts_of, store_of
from recbole_llm.training.staged import StagedTrainer


class StandaloneTrainer(StagedTrainer):
    """A staged trainer for RecBole's own calls: ``fit`` runs every stage, the earlier ones through the cache."""

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """RecBole's ``fit``."""
        if self._upstream is None:
            self.prepare(train_data, store_of(self.config), fit_parts_of(self.config))
        return super().fit(train_data, *args, **kwargs)
