"""Tasks about what users had: the next item, an item of theirs, and one that they would not want."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.data.phases import TRAIN
from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.errors import UserError
from recbole_llm.tasks.base import HISTORY, USER, Samples, Task, register

SEQUENTIAL, STRAIGHTFORWARD, NEGATIVE = "sequential", "straightforward", "negative"


@register
class Sequential(Task):
    """A prefix of a user's train items and the item after it; LC-Rec's seqrec."""

    name = SEQUENTIAL
    places = (HISTORY, USER)

    def __len__(self) -> int:
        return self.loader.prefixes

    def draw(self, chosen: Tensor) -> Samples:
        """Every chosen prefix."""
        starts, stops = self.loader.starts[chosen], self.loader.stops[chosen]
        return Samples(starts, stops, torch.zeros_like(stops), self.loader.items[stops])


@register
class Straightforward(Task):
    """A user and one of his train items, the one that the chosen prefix goes on with; P5's direct recommendation."""

    name = STRAIGHTFORWARD
    places = (USER,)

    def __len__(self) -> int:
        return self.loader.prefixes

    def draw(self, chosen: Tensor) -> Samples:
        """Every chosen prefix's next item; the history that is shown is empty."""
        stops = self.loader.stops[chosen]
        return Samples(stops, stops, torch.zeros_like(stops), self.loader.items[stops])


@register
class Negative(Task):
    """An item that a user will hate; arXiv 2412.13771's task D.

    The chosen prefixes, each ``negative_ratio`` times, and an item that the user has no train row of; or, where he has
    one to come, a train item that he rated below ``dislike_below``.

    Raises:
        UserError: ``dislike_below`` is given and the data has no ratings.
    """

    name = NEGATIVE

    def __init__(self, loader: Any) -> None:
        super().__init__(loader)
        config, dataset = loader.config, loader.dataset
        self._ratio: int = config["negative_ratio"]
        self._disliked = torch.empty(0, dtype=torch.long)
        if self._ratio and config["dislike_below"] is not None:
            self._disliked = _disliked(config, dataset)
        if self._ratio:
            self.sampler = NegativeSampler(
                dataset.train_histories, dataset.item_num, dataset.split.candidates, seed=config["seed"]
            )  # fmt: skip

    def __len__(self) -> int:
        return self.loader.prefixes * self._ratio

    def draw(self, chosen: Tensor) -> Samples:
        """``negative_ratio`` samples of every chosen prefix."""
        loader = self.loader
        if not self._ratio:
            return Samples.of_items(chosen[:0])
        users, starts, stops = loader.users[chosen], loader.starts[chosen], loader.stops[chosen]
        negatives = torch.from_numpy(self.sampler.sample(users.numpy(), self._ratio))
        negatives = self._true_negatives(negatives, stops, loader.offsets[users + 1])
        starts, stops = starts.repeat(self._ratio), stops.repeat(self._ratio)
        return Samples(starts, stops, torch.zeros_like(negatives), negatives)

    def _true_negatives(self, negatives: Tensor, stops: Tensor, ends: Tensor) -> Tensor:
        """The sampled negatives, replaced where the user dislikes something from the end of the prefix on."""
        if not len(self._disliked):
            return negatives
        first = torch.searchsorted(self._disliked, stops).repeat(self._ratio)
        count = torch.searchsorted(self._disliked, ends).repeat(self._ratio) - first
        draw = torch.rand(len(negatives), generator=self.loader.generator, dtype=torch.double)
        chosen = (first + (draw * count).long()).clamp(max=len(self._disliked) - 1)
        return torch.where(count > 0, self.loader.items[self._disliked[chosen]], negatives)


def _disliked(config: Any, dataset: Any) -> Tensor:
    """Places among the train histories' items of those that were rated below ``dislike_below``, int64, ascending."""
    name, split = config["RATING_FIELD"], dataset.split
    if name not in dataset.rows.interaction:
        raise UserError(f"dislike_below needs ratings, but no column '{name}' is loaded (RATING_FIELD, load_col)")
    train = split.phases == TRAIN
    ratings = np.asarray(dataset.rows[name])[split.rows[train]]
    # The order of the histories: by user, and as they are within.
    by_user = np.argsort(split.users[train], kind="stable")
    return torch.from_numpy(np.flatnonzero(ratings[by_user] < config["dislike_below"]))
