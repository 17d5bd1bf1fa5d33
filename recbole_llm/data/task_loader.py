"""Samples of several tasks over the same interactions, drawn anew for each epoch, in batches of like length.

Samples of one history stand side by side: what their prompts open with is then read once
(``recbole_llm/backbone/packed.py``), so that a negative sample costs little beside its positive one. With ``packing:
user`` so do all samples of histories that begin at one place, as every prefix of a user's does that is not cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.data.loaders import _IndexLoader
from recbole_llm.data.prompts import Ragged
from recbole_llm.tasks.base import DRAW, TaskTexts, active_tasks, number

# Batches whose samples are sorted by length together: enough to leave little filling, few enough to stay random.
SORTED_TOGETHER = 50


class TaskLoader(_IndexLoader):
    """One row a sample: its task, whose history up to where, what its text is, which item it asks for.

    What samples there are, each task says itself (:mod:`recbole_llm.tasks`).

    Args:
        config: ``tasks`` and what these read of it, ``history_length``, ``prefixes_per_user``, ``packing``,
            ``train_batch_size``, ``shuffle`` and ``seed``.
        dataset: the train data set.

    Attributes:
        items: of all train histories one after the other, int64 ``[N]``.
        offsets: where a user's begin, int64 ``[n_users + 1]``.
        owners: the user of each, int64 ``[N]``.
        users, starts, stops: every prefix of a history that has an item before and an item after its end, int64: the
            items shown are ``items[start:stop]``, the next one is ``items[stop]``.
        prefixes: how many of them an epoch has.
        texts: what the tasks have to go by; whoever reads texts sets it.
        length_of: from a batch to its samples' lengths in tokens; without one batches are of any lengths.

    Raises:
        UserError: a task that there is not, or what a task refuses.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        histories = dataset.train_histories
        self.items = torch.from_numpy(histories.items).long()
        self.offsets = torch.from_numpy(histories.offsets).long()
        self.owners = torch.repeat_interleave(self.offsets.diff())
        places = torch.arange(len(self.owners))
        after_another = places > self.offsets[self.owners]
        self._shown: int = config["history_length"]
        self.users, self.stops = self.owners[after_another], places[after_another]
        self.starts = self.shown_before(self.users, self.stops)
        self._each = config["prefixes_per_user"]
        self._packs = packs(config)
        counts = torch.bincount(self.users)
        self.prefixes = int((counts if self._each is None else counts.clamp(max=self._each)).sum())
        self.texts = TaskTexts()
        self.length_of: Callable[[Any], Tensor] | None = None
        super().__init__(config, dataset, self.prefixes, config["train_batch_size"], config["shuffle"])
        self.tasks = [task(self) for task in active_tasks(config)]

    @property
    def samplers(self) -> list[Any]:
        """The tasks' own sources of randomness; the trainer keeps their states with a run's."""
        return [task.sampler for task in self.tasks if task.sampler is not None]

    def shown_before(self, users: Tensor, stops: Tensor) -> Tensor:
        """Where the history begins that a prompt shows of users (int64 ``[n]``) up to their items' ``stops``."""
        return torch.maximum(self.offsets[users], stops - self._shown)

    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(map(len, self.tasks))

    def __len__(self) -> int:
        return -(-self.samples() // self.step)

    def __iter__(self) -> Iterator[Interaction]:
        drawn, groups = self._drawn()
        for rows in self._batches(drawn, groups):
            yield Interaction({name: values[rows] for name, values in drawn.items()})

    def _chosen(self) -> Tensor:
        """The prefixes of this epoch: all, or some of each user's at random."""
        if self._each is None:
            return torch.arange(len(self.users))
        keys = self.users + torch.rand(len(self.users), generator=self.generator, dtype=torch.double)
        order = keys.argsort()
        places = Ragged.from_lengths(order, torch.bincount(self.users)).positions
        return order[places < self._each]

    def _drawn(self) -> tuple[dict[str, Tensor], Tensor]:
        """The samples of an epoch, and which of them stand side by side."""
        chosen = self._chosen()
        drawn = [(number(task.name), task.draw(chosen)) for task in self.tasks]
        samples = {
            "task": torch.cat([torch.full_like(samples.targets, task) for task, samples in drawn]),
            "start": torch.cat([samples.starts for _, samples in drawn]),
            "stop": torch.cat([samples.stops for _, samples in drawn]),
            "source": torch.cat([samples.sources for _, samples in drawn]),
            "target": torch.cat([samples.targets for _, samples in drawn]),
        }
        groups = groups_of(samples["start"], samples["stop"], self._packs)
        if self._packs:
            # Here, as a group that is longer than a batch is to draw alike in all.
            draws = torch.rand(int(groups.max()) + 1, generator=self.generator, dtype=torch.double)
            samples[DRAW] = draws[groups]
        return samples, groups

    def _batches(self, drawn: dict[str, Tensor], groups: Tensor) -> list[Tensor]:
        count = len(drawn["task"])
        if not self.shuffle:
            return list(torch.arange(count).split(self.step))
        places = torch.randperm(int(groups.max()) + 1, generator=self.generator)[groups]
        # The prefixes of a user from the shortest on, should a batch end among them.
        inner = drawn["stop"].argsort(stable=True) if self._packs else torch.arange(count)
        order = inner[places[inner].argsort(stable=True)]
        if self.length_of is not None:
            lengths = self.length_of(drawn)
            longest = torch.zeros_like(lengths).scatter_reduce(0, groups, lengths, "amax")[groups][order]
            together = torch.arange(count) // (self.step * SORTED_TOGETHER)
            # Within a length by group still, as two groups of one length would mix.
            ranks = (together * (int(longest.max()) + 1) + longest) * count + places[order]
            order = order[ranks.argsort(stable=True)]
        batches = order.split(self.step)
        return [batches[place] for place in torch.randperm(len(batches), generator=self.generator).tolist()]


def groups_of(starts: Tensor, stops: Tensor, packed: bool) -> Tensor:
    """:func:`window_groups` with ``packing: user``, else :func:`history_groups`."""
    return (window_groups if packed else history_groups)(starts, stops)


def history_groups(starts: Tensor, stops: Tensor) -> Tensor:
    """Which samples are of one history.

    Args:
        starts, stops: of the histories, int64 ``[n]``; equal where there is none.

    Returns:
        Numbers from 0, int64 ``[n]``: one for all samples of a history, one for each sample without any.
    """
    return _alike(stops, starts, stops)


def window_groups(starts: Tensor, stops: Tensor) -> Tensor:
    """Which samples show histories that begin at one place: with ``packing: user`` they stand in one sequence.

    All prefixes of a user that show his first item are a group. What ``history_length`` has cut at the front is alone
    with the other samples of its history.

    Args:
        starts, stops: of the histories, int64 ``[n]``; equal where there is none.

    Returns:
        Numbers from 0, int64 ``[n]``: one for all samples of a group, one for each sample without a history.
    """
    return _alike(starts, starts, stops)


def _alike(keys: Tensor, starts: Tensor, stops: Tensor) -> Tensor:
    """Numbers from 0: one for all samples of one key, one for each sample without a history."""
    own = torch.where(stops > starts, keys, int(stops.max()) + 1 + torch.arange(len(stops)))
    return own.unique(return_inverse=True)[1]


def packs(config: Any) -> bool:
    """Whether all prefixes of a user are to stand in one sequence."""
    return bool(config["packing"] == "user")
