"""What a recommender is told of a user at the moment of each of his train interactions: of all that came before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.dataset import take
from recbole_llm.data.loaders import RankingLoader
from recbole_llm.data.phases import TRAIN


class PrefixLoader(RankingLoader):
    """Train interactions by number, in the order of ``train_histories``; a row is a user right before one of his.

    A sequential model finds the user's train items before it, as many of the latest as it reads; a general one the
    user alone, of whom it has seen all train rows.

    Args:
        config: of the recommender that is asked.
        dataset: its train data set.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset, TRAIN)

    def _index_rows(self) -> None:
        self.by_row = False
        shown = self.split.histories(TRAIN)
        self.users = np.repeat(np.arange(len(shown.lengths)), shown.lengths)
        self.targets = shown.items
        self.target_offsets = np.arange(len(self.users) + 1)
        self.history = shown
        self._first = shown.offsets[:-1][self.users]

    def _index_histories(self, dataset: Any) -> None:
        self.width = dataset.max_item_list_len
        self.starts, self.ends = self._first, np.arange(len(self.users))
        self.lengths = np.minimum(self.ends - self.starts, self.width)
        rows, users = (of[self.split.phases == TRAIN] for of in (self.split.rows, self.split.users))
        # As the histories are: user by user, and within a user as the split has them.
        self.source = take(dataset.rows, rows[np.argsort(users, kind="stable")])

    def before(self, moments: Tensor) -> Interaction:
        """What the recommender is told.

        Args:
            moments: numbers of train interactions, int64 ``[S]``.
        """
        rows = moments.cpu().numpy()
        return self._interaction(rows, self.users[rows])
