"""Staged recommenders through RecBole's own calls."""

from __future__ import annotations

from typing import Any

from recbole_llm.training.pipeline import fit_parts_of, store_of


class _Standalone:
    """Adds the stages before the last to ``fit``, through the cache."""

    config: Any
    _upstream: list[str] | None
    prepare: Any

    def fit(self, train_data: Any, *args: Any, **kwargs: Any) -> Any:
        """RecBole's ``fit``."""
        if self._upstream is None:
            self.prepare(train_data, store_of(self.config), fit_parts_of(self.config))
        return super().fit(train_data, *args, **kwargs)  # type: ignore[misc]


def standalone_trainer(base: type) -> type:
    """A trainer for RecBole's own calls: ``fit`` runs every stage.

    Args:
        base: the trainer class of a recommender with stages.
    """
    return type(f"Standalone{base.__name__}", (_Standalone, base), {})
