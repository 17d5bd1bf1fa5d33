"""Samples of several tasks over the same interactions, drawn anew for each epoch, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.instructions import NEGATIVE, QUERY, SEQUENTIAL, TASKS, TEXT
from recbole_llm.data.loaders import _IndexLoader
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.data.split import TRAIN
from recbole_llm.errors import UserError

# Batches whose samples are sorted by length together: enough to leave little filling, few enough to stay random.
SORTED_TOGETHER = 50


class TaskLoader(_IndexLoader):
    """One row a sample: its task, whose history up to where, what its text is, which item it asks for.

    - ``sequential``: a prefix of a user's train items and the item after it;
    - ``negative``: the same prefixes, each ``negative_ratio`` times, and an item that the user has no train row of; or,
      where the user has one to come, a train item that he rated below ``dislike_below``;
    - ``text``: an item and itself (:attr:`text_items`);
    - ``query``: a text of a user's and its item (:attr:`query_items`).

    Args:
        config: ``history_length``, ``prefixes_per_user``, ``negative_ratio``, ``dislike_below``, ``train_batch_size``,
            ``shuffle`` and ``seed``.
        dataset: the train data set.

    Attributes:
        text_items: items that have a text, int64; whoever reads texts sets it.
        query_items: the items of the queries, int64, by number of the query; likewise.
        length_of: from a batch to its samples' lengths in tokens; without one batches are of any lengths.

    Raises:
        UserError: ``dislike_below`` is given and the data has no ratings.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        histories = dataset.train_histories
        self.items = torch.from_numpy(histories.items).long()
        offsets = torch.from_numpy(histories.offsets).long()
        users = torch.repeat_interleave(offsets.diff())
        places = torch.arange(len(users))
        after_another = places > offsets[users]
        self._users, self._stops = users[after_another], places[after_another]
        self._ends = offsets[self._users + 1]
        self._starts = torch.maximum(offsets[self._users], self._stops - config["history_length"])
        self._each = config["prefixes_per_user"]
        self._ratio: int = config["negative_ratio"]
        counts = torch.bincount(self._users)
        self._prefixes = int((counts if self._each is None else counts.clamp(max=self._each)).sum())
        self.text_items = self.query_items = torch.empty(0, dtype=torch.long)
        self.length_of: Callable[[Any], Tensor] | None = None
        super().__init__(config, dataset, self._prefixes, config["train_batch_size"], config["shuffle"])
        self._disliked = torch.empty(0, dtype=torch.long)
        if self._ratio and config["dislike_below"] is not None:
            self._disliked = _disliked(config, dataset)
        if self._ratio:
            self._sampler = NegativeSampler(
                histories, dataset.item_num, dataset.split.candidates, seed=config["seed"]
            )  # fmt: skip

    def samples(self) -> int:
        """Samples of an epoch."""
        return self._prefixes * (1 + self._ratio) + len(self.text_items) + len(self.query_items)

    def __len__(self) -> int:
        return -(-self.samples() // self.step)

    def __iter__(self) -> Iterator[Interaction]:
        drawn = self._drawn()
        for rows in self._batches(drawn):
            yield Interaction({name: values[rows] for name, values in drawn.items()})

    def _chosen(self) -> Tensor:
        """The prefixes of this epoch: all, or some of each user's at random."""
        if self._each is None:
            return torch.arange(len(self._users))
        keys = self._users + torch.rand(len(self._users), generator=self.generator, dtype=torch.double)
        order = keys.argsort()
        places = Ragged.from_lengths(order, torch.bincount(self._users)).positions
        return order[places < self._each]

    def _drawn(self) -> dict[str, Tensor]:
        chosen = self._chosen()
        users, starts, stops = self._users[chosen], self._starts[chosen], self._stops[chosen]
        parts = [(SEQUENTIAL, starts, stops, torch.zeros_like(users), self.items[stops])]
        if self._ratio:
            negatives = torch.from_numpy(self._sampler.sample(users.numpy(), self._ratio))
            negatives = self._true_negatives(negatives, stops, self._ends[chosen])
            starts, stops = starts.repeat(self._ratio), stops.repeat(self._ratio)
            parts.append((NEGATIVE, starts, stops, torch.zeros_like(negatives), negatives))
        for task, sources, targets in (
            (TEXT, self.text_items, self.text_items),
            (QUERY, torch.arange(len(self.query_items)), self.query_items),
        ):
            none = torch.zeros_like(targets)
            parts.append((task, none, none, sources, targets))
        tasks = torch.cat([torch.full_like(targets, TASKS.index(task)) for task, *_, targets in parts])
        starts, stops, sources, targets = (torch.cat([part[column] for part in parts]) for column in (1, 2, 3, 4))  # type: ignore[misc]
        return {"task": tasks, "start": starts, "stop": stops, "source": sources, "target": targets}

    def _true_negatives(self, negatives: Tensor, stops: Tensor, ends: Tensor) -> Tensor:
        """The sampled negatives, replaced where the user dislikes something from the end of the prefix on."""
        if not len(self._disliked):
            return negatives
        first = torch.searchsorted(self._disliked, stops).repeat(self._ratio)
        count = torch.searchsorted(self._disliked, ends).repeat(self._ratio) - first
        draw = torch.rand(len(negatives), generator=self.generator, dtype=torch.double)
        chosen = (first + (draw * count).long()).clamp(max=len(self._disliked) - 1)
        return torch.where(count > 0, self.items[self._disliked[chosen]], negatives)

    def _batches(self, drawn: dict[str, Tensor]) -> list[Tensor]:
        count = len(drawn["task"])
        if not self.shuffle:
            return list(torch.arange(count).split(self.step))
        order = torch.randperm(count, generator=self.generator)
        if self.length_of is not None:
            lengths = self.length_of(drawn)[order]
            together = torch.arange(count) // (self.step * SORTED_TOGETHER)
            order = order[(together * (int(lengths.max()) + 1) + lengths).argsort(stable=True)]
        batches = order.split(self.step)
        return [batches[place] for place in torch.randperm(len(batches), generator=self.generator).tolist()]


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
