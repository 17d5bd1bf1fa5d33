"""Who is to be recommended something, batch by batch, in the form that evaluation ranks: all users of a split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from recbole_llm.data.loaders import RankingLoader
from recbole_llm.data.phases import TEST, TRAIN, VALID, WITHHELD

if TYPE_CHECKING:
    from recbole_llm.training.pipeline import Fit

_PHASES = {"train": TRAIN, "valid": VALID, "test": TEST}


class RequestLoader(RankingLoader):
    """A ranking a user, of all users with a history; nothing is held back as a target.

    With ``phases`` train and valid it asks what the test of the run asked.

    Args:
        config: see :class:`~recbole_llm.data.loaders.RankingLoader`.
        dataset: a phase's dataset of the run's split.
        phases: names of the phases whose rows are a user's history: what sequential and language models read, and
            (with ``exclude_history``) what is not recommended. Withheld rows are never recommended either.
    """

    def __init__(self, config: Any, dataset: Any, phases: Sequence[str]) -> None:
        self._known = tuple(_PHASES[phase] for phase in phases)
        super().__init__(config, dataset, TEST)

    @classmethod
    def of(cls, fit: Fit, phases: Sequence[str]) -> RequestLoader:
        """Requests to a trained recommender; ``phases`` as above."""
        return cls(fit.config, fit.test_data._dataset, phases)

    def _index_rows(self) -> None:
        # A user has one list here, whatever a ranking was in the run's evaluation.
        self.by_row, self.shown = False, self._known
        shown = self.split.histories(*self.shown)
        self.users = np.flatnonzero(shown.lengths > 0)
        self.targets = np.zeros(0, dtype=np.int64)
        self.target_offsets = np.zeros(len(self.users) + 1, dtype=np.int64)
        self.history = self.split.histories(*self.shown, WITHHELD)

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        # A live ranking takes a whole batch, so it is no larger than what the model reads at once.
        at_once = self.config["inference_batch_size"]
        if at_once:
            self.step = min(self.step, at_once)
            self.set_batch_size(self.step)

    def batch(self, number: int) -> tuple[Interaction, tuple[torch.Tensor, torch.Tensor] | None]:
        """What the model is told of the users of a batch, and what they may not be recommended.

        Args:
            number: of the batch, from 0; it has the rows from ``number * step`` on.
        """
        return self.some(self.order[number * self.step : (number + 1) * self.step])

    def some(self, rows: Sequence[int] | np.ndarray) -> tuple[Interaction, tuple[torch.Tensor, torch.Tensor] | None]:
        """The same of some rows."""
        interaction, excluded, _, _ = self.collate_fn(rows)
        return interaction, excluded

    def stranger(self, items: Sequence[int]) -> Interaction:
        """What a sequential model is told of a user that the data set does not know: a batch of one, without a user id.

        Of the other columns of a history (times, ratings) nothing is known: they are 0.

        Args:
            items: internal ids of his items, oldest first; the latest that fit are shown.
        """
        shown = list(items)[-self.width :]
        suffix, fields = self._dataset.config["LIST_SUFFIX"], {}
        for name in self.source:
            if name != self.uid_field:
                column = self.source[name]
                fields[name + suffix] = torch.zeros(1, self.width, *column.shape[1:], dtype=column.dtype)
        fields[self.iid_field + suffix][0, : len(shown)] = torch.tensor(shown)
        fields[self._dataset.item_list_length_field] = torch.tensor([len(shown)])
        return Interaction(fields)
