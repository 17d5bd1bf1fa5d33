"""Loaders: training batches by view, and ranking batches that are the same for every model."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from logging import getLogger
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, KnowledgeBasedDataLoader, TrainDataLoader, UserDataLoader
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from recbole.data.utils import get_dataloader
from recbole.sampler import KGSampler, Sampler
from recbole.utils import ModelType

from recbole_llm.data.dataset import take, windows, with_lists
from recbole_llm.data.phases import TEST, TRAIN, VALID, WITHHELD
from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.data.split import Split
from recbole_llm.data.ties import tie_order
from recbole_llm.data.train_loader import FastTrainLoader
from recbole_llm.errors import UserError

_NOTHING = "no training interaction is left after the split; check eval_args and short_users"


def make_loaders(config: Any, built: list[Any]) -> tuple[Any, Any, Any]:
    """Loaders of the three phase datasets of one split.

    Args:
        config: the model's Config.
        built: train, valid and test datasets from ``build`` or ``cut``.
    """
    train, valid, test = built
    return (
        make_train_loader(config, train),
        RankingLoader(config, valid, VALID),
        RankingLoader(config, test, TEST),
    )


def make_train_loader(config: Any, train: Any) -> Any:
    """The training loader of a model: RecBole's, ours with the same batches, or the view that the model asks for."""
    if not len(train.inter_feat):
        raise UserError(_NOTHING)
    view = getattr(config.model_class, "train_view", "")
    if view == "tasks":
        # Not at the top: it builds on this module.
        from recbole_llm.data.task_loader import TaskLoader

        return TaskLoader(config, train)
    if view:
        loader = {"users": UserLoader, "windows": WindowLoader}[view](config, train)
        if not loader.sample_size:
            raise UserError(_NOTHING)
        return loader
    negatives = config["train_neg_sample_args"]
    sampler = None
    if negatives["distribution"] != "none":
        sampler = train_sampler(config, train)
    stock = get_dataloader(config, "train")
    if stock is KnowledgeBasedDataLoader:
        knowledge = KGSampler(train, negatives["distribution"], negatives["alpha"])
        return stock(config, train, sampler, knowledge, shuffle=True)
    if stock is TrainDataLoader and config["fast_baselines"]:
        return FastTrainLoader(config, train, sampler, shuffle=config["shuffle"])
    if stock is UserDataLoader and sampler is None:
        sampler = Sampler(["train"], [train])
    return stock(config, train, sampler, shuffle=config["shuffle"])


def train_sampler(config: Any, train: Any) -> Any:
    """Negatives that have seen train rows only; RecBole's samplers are built over every phase (data/utils.py:333)."""
    negatives = config["train_neg_sample_args"]
    if config["fast_baselines"] and not negatives["dynamic"]:
        return NegativeSampler(
            train.train_histories,
            train.item_num,
            train.split.candidates,
            seed=config["seed"],
            distribution=negatives["distribution"],
            alpha=negatives["alpha"],
        )
    return Sampler(["train"], [train], negatives["distribution"], negatives["alpha"]).set_phase("train")


class _IndexLoader(AbstractDataLoader):
    """Batches of row numbers; ``collate_fn`` makes tensors of them."""

    def __init__(self, config: Any, dataset: Any, rows: int, batch_size: int, shuffle: bool) -> None:
        self.sample_size, self._rows_a_batch = rows, batch_size
        self.logger = getLogger()
        # torch's sampler refuses to shuffle nothing, before anybody can say what there is nothing of.
        super().__init__(config, dataset, None, shuffle=shuffle and rows > 0)

    def _init_batch_size_and_step(self) -> None:
        self.step = self._rows_a_batch
        self.set_batch_size(self._rows_a_batch)


class UserLoader(_IndexLoader):
    """A row a sample of a user with train items: his id alone; the model draws from ``dataset.train_histories``.

    Args:
        config: ``train_batch_size``, ``shuffle`` and, where the model has it, ``samples_per_user``.
        dataset: the train dataset.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        users = torch.from_numpy(np.flatnonzero(dataset.train_histories.lengths > 0))
        self.users = users.repeat(config["samples_per_user"] or 1)
        self.uid_field = dataset.uid_field
        super().__init__(config, dataset, len(self.users), config["train_batch_size"], config["shuffle"])

    def collate_fn(self, index: list[int]) -> Interaction:
        """Users of a batch, int64 [B]."""
        return Interaction({self.uid_field: self.users[torch.tensor(index)]})


class WindowLoader(_IndexLoader):
    """One row a window of a user's train items: inputs and, one step on, targets.

    Users with at most ``MAX_ITEM_LIST_LENGTH`` + 1 train items have one row; longer ones are cut from the end, so that
    every item but a user's first is a target exactly once.

    Args:
        config: ``MAX_ITEM_LIST_LENGTH``, ``train_batch_size`` and ``shuffle``.
        dataset: the train dataset.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        histories = dataset.train_histories
        width = config["MAX_ITEM_LIST_LENGTH"]
        steps = np.maximum(histories.lengths - 1, 0)
        counts = -(-steps // width)
        self.users = np.repeat(np.arange(len(counts)), counts)
        within = np.arange(len(self.users)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Window j from the end: its last input stands j * width items before the user's last input.
        self.ends = histories.offsets[1:][self.users] - 1 - within * width
        self.lengths = np.minimum(self.ends - histories.offsets[:-1][self.users], width)
        self.items = torch.from_numpy(histories.items)
        self.width = width
        self.fields = (dataset.uid_field, dataset.iid_field + config["LIST_SUFFIX"], dataset.item_list_length_field)
        super().__init__(config, dataset, len(self.users), config["train_batch_size"], config["shuffle"])

    def collate_fn(self, index: list[int]) -> Interaction:
        """User id [B], inputs [B, L], ``target_list`` [B, L] (0 where padded), length [B]; all int64."""
        rows = np.asarray(index)
        table, real = windows(self.ends[rows], self.lengths[rows], self.width)
        user, inputs, length = self.fields
        return Interaction({
            user: torch.from_numpy(self.users[rows]),
            inputs: torch.where(real, self.items[table], 0),
            "target_list": torch.where(real, self.items[torch.where(real, table + 1, 0)], 0),
            length: torch.from_numpy(self.lengths[rows]),
        })  # fmt: skip


class RankingLoader(FullSortEvalDataLoader):
    """Rankings of one phase, the same for every model: whom to rank, what he may not get, what he should have got.

    It yields RecBole's full-sort tuple ``(interaction, (rows, items) to exclude, rows, items of the targets)``.
    Sequential models find the user's history in the interaction: his train items, at test his valid items too.

    Args:
        config: ``eval_unit``, ``exclude_history``, ``eval_max_cells`` and ``eval_batch_size``.
        dataset: the phase's dataset; its split has everything.
        phase: ``VALID`` or ``TEST``.
    """

    def __init__(self, config: Any, dataset: Any, phase: int) -> None:
        self.logger = getLogger()
        self.phase = phase
        self.split: Split = dataset.split
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        self.is_sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.candidates = torch.from_numpy(self.split.candidates)
        self.tie_order = tie_order(dataset.field2id_token[dataset.iid_field])
        self.by_row = config["eval_unit"] == "row" and self.is_sequential
        exclude = config["exclude_history"]
        self.excludes = exclude is True or (exclude == "recbole" and not self.is_sequential)
        # The phases whose rows are a user's history.
        self.shown: tuple[int, ...] = (TRAIN,) if phase == VALID else (TRAIN, VALID)
        self._index_rows()
        self.sample_size = len(self.users)
        self.order = np.arange(self.sample_size)
        if self.is_sequential:
            self._index_histories(dataset)
        AbstractDataLoader.__init__(self, config, dataset, None, shuffle=False)

    def _index_rows(self) -> None:
        split = self.split
        chosen = np.flatnonzero(split.phases == self.phase)
        users, items = split.users[chosen], split.items[chosen]
        if self.by_row:
            # RecBole's unit: everything the user did before the row. Under order RO that may be of a later phase, which
            # no ranking may look at.
            self.usable = np.isin(split.phases, (*self.shown, self.phase))
            place = np.cumsum(self.usable) - 1
            first = np.searchsorted(split.users[self.usable], users, side="left")
            # As after RecBole's augmentation, a row with nothing before it is no ranking.
            chosen = chosen[place[chosen] > first]
            users, items = split.users[chosen], split.items[chosen]
            self.users, self.target_offsets = users, np.arange(len(users) + 1)
            self.last: np.ndarray = chosen
        else:
            order = np.lexsort((items, users))
            unique = np.ones(len(order), dtype=bool)
            unique[1:] = (np.diff(users[order]) != 0) | (np.diff(items[order]) != 0)
            users, items = users[order][unique], items[order][unique]
            self.users, counts = np.unique(users, return_counts=True)
            self.target_offsets = np.concatenate(([0], np.cumsum(counts)))
        self.targets = items
        # Withheld rows are not recommended either, so that every train_share is judged on the same candidates.
        self.history = split.histories(*self.shown, WITHHELD)
        self.graph_history = split.histories(TRAIN)

    def _index_histories(self, dataset: Any) -> None:
        """Rows that sequential inputs are cut from, and where each ranking's input ends and how long it is."""
        split, width = self.split, dataset.max_item_list_len
        if self.by_row:
            usable = self.usable
            starts = np.searchsorted(split.users[usable], self.users, side="left")
            ends = np.cumsum(usable)[self.last] - 1
        else:
            usable = np.isin(split.phases, self.shown)
            starts = np.searchsorted(split.users[usable], self.users, side="left")
            ends = np.searchsorted(split.users[usable], self.users, side="right")
        self.starts, self.ends, self.lengths = starts, ends, np.minimum(ends - starts, width)
        self.source = take(dataset.rows, split.rows[usable])
        self.width = width

    def __len__(self) -> int:
        return -(-self.sample_size // self.step)

    def share(self, rank: int, count: int) -> RankingLoader:
        """Every ``count``-th ranking from the ``rank``-th on, as a loader."""
        part = copy.copy(self)
        part.order = self.order[rank::count]
        part.sample_size = len(part.order)
        return part

    def _init_batch_size_and_step(self) -> None:
        budget = max(1, self.config["eval_max_cells"] // max(1, self.split.n_items))
        self.step = max(1, min(budget, self.config["eval_batch_size"]))
        self.set_batch_size(self.step)

    def __iter__(
        self,
    ) -> Iterator[tuple[Interaction, tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor, torch.Tensor]]:
        for start in range(0, self.sample_size, self.step):
            yield self.collate_fn(self.order[start : start + self.step])

    def collate_fn(
        self, index: Any
    ) -> tuple[Interaction, tuple[torch.Tensor, torch.Tensor] | None, torch.Tensor, torch.Tensor]:
        """The ranking tuple of some rows; every tensor int64."""
        rows = np.asarray(index)
        users = self.users[rows]
        interaction = self._interaction(rows, users)
        positive_rows, positive_items = _flatten(self.target_offsets, self.targets, rows)
        excluded = None
        if self.excludes:
            history_rows, history_items = _flatten(self.history.offsets, self.history.items, users)
            excluded = (torch.from_numpy(history_rows), torch.from_numpy(history_items))
            if self.by_row or self.config["exclude_history"] == "recbole":
                excluded = self._spare_targets(excluded, positive_rows, positive_items)
        return interaction, excluded, torch.from_numpy(positive_rows), torch.from_numpy(positive_items)

    def _spare_targets(
        self, excluded: tuple[torch.Tensor, torch.Tensor], rows: np.ndarray, items: np.ndarray
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys = excluded[0].numpy() * self.split.n_items + excluded[1].numpy()
        keep = torch.from_numpy(~np.isin(keys, rows * self.split.n_items + items))
        return excluded[0][keep], excluded[1][keep]

    def _interaction(self, rows: np.ndarray, users: np.ndarray) -> Interaction:
        fields = {self.uid_field: torch.from_numpy(users)}
        if self.is_sequential:
            table, real = windows(self.ends[rows], self.lengths[rows], self.width)
            lists = with_lists(self._dataset, self.source, None, table, real, self.lengths[rows])
            fields |= lists.interaction
        return self._dataset.join(Interaction(fields))


def _flatten(offsets: np.ndarray, values: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Runs of a CSR array for some rows, as (position of the row in ``rows``, value) pairs."""
    starts, counts = offsets[rows], offsets[rows + 1] - offsets[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return owner, values[np.repeat(starts, counts) + within]


__all__ = ["RankingLoader", "UserLoader", "WindowLoader", "make_loaders", "make_train_loader"]
