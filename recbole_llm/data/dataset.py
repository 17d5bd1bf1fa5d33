"""RecBole's datasets, divided by our one split.

RecBole loads, filters and remaps; :class:`SplitMixin` then replaces only its ``build``: the phases come from
:mod:`recbole_llm.data.split`, and the views (pairs, prefixes) are cut from them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.data.interaction import Interaction

from recbole_llm.atomic import open_atomic
from recbole_llm.compat import AtomicMixin
from recbole_llm.data.histories import Histories
from recbole_llm.data.phases import DROPPED, TEST, TRAIN, VALID
from recbole_llm.data.split import Split, SplitProtocol, make_split
from recbole_llm.errors import UserError


class SplitMixin(AtomicMixin):
    """A RecBole dataset whose phases are our split's."""

    split: Split
    uid_field: str
    iid_field: str
    time_field: str
    inter_feat: Any
    file_order: np.ndarray

    def _remove_duplication(self) -> None:
        if self.config["rm_dup_inter"] is not None and self.time_field in self.inter_feat:
            # RecBole sorts with an unstable sort; ties must stay in file order for "first" and "last" to mean anything.
            self.inter_feat = self.inter_feat.sort_values(by=[self.time_field], kind="stable")
            self.inter_feat.drop_duplicates(
                subset=[self.uid_field, self.iid_field], keep=self.config["rm_dup_inter"], inplace=True
            )
            return
        super()._remove_duplication()  # type: ignore[misc]

    def _data_filtering(self) -> None:
        super()._data_filtering()  # type: ignore[misc]
        # A knowledge graph drops the rows of items that it does not know after all others are numbered
        # (kg_dataset.py:172): what is numbered by row follows.
        kept = self.inter_feat.index.to_numpy()
        if not len(kept):
            raise UserError("no item with interactions is linked to an entity of the knowledge graph; look at .link")
        self.file_order = self.file_order[kept]
        self.inter_feat.reset_index(drop=True, inplace=True)

    def _reset_index(self) -> None:
        if self.inter_feat.empty:
            raise UserError(
                "no interaction is left after filtering; widen user_inter_num_interval, item_inter_num_interval "
                "or val_interval"
            )
        self.file_order = self.inter_feat.index.to_numpy()
        super()._reset_index()  # type: ignore[misc]

    def _fill_nan(self) -> None:
        # Before RecBole normalises the column or casts it to float32: 64 s steps at today's stamps reorder histories.
        self.exact_times = None
        if self.time_field in self.inter_feat:
            self.exact_times = self.inter_feat[self.time_field].to_numpy(dtype=np.float64).copy()
            missing = int(np.isnan(self.exact_times).sum())
            if missing:
                raise UserError(
                    f"{missing} interactions have no {self.time_field}; fill them in or leave the column out (load_col)"
                )
        super()._fill_nan()

    def make_split(self, protocol: SplitProtocol) -> Split:
        """Divide this dataset's filtered rows (before :meth:`build`).

        Args:
            protocol: how to divide.
        """
        if self.exact_times is None and (protocol.by_time or protocol.kind == "TS"):
            raise UserError(self._no_time())
        if self.config["benchmark_filename"] is not None:
            raise UserError("benchmark_filename (pre-split files) works under policy: recbole only")
        return make_split(
            self.inter_feat[self.uid_field].to_numpy(dtype=np.int64),
            self.inter_feat[self.iid_field].to_numpy(dtype=np.int64),
            self.exact_times,
            self.file_order,
            self.field2id_token[self.uid_field].tolist(),
            self.field2id_token[self.iid_field].tolist(),
            protocol,
        )

    def _no_time(self) -> str:
        """Why there is no time to split by, and what to do."""
        file = Path(self.config["data_path"]) / f"{self.config['dataset']}.inter"
        names = open_atomic(file, self.config["field_separator"], self.config["encoding"] or "utf-8").names
        if self.time_field in names:
            wanted = f"--load_col='{{inter: [{self.uid_field}, {self.iid_field}, {self.time_field}]}}'"
            return f"the split is by time and {file} has '{self.time_field}', but load_col leaves it out; add {wanted}"
        return (
            f"the split is by time, but {file} has no timestamp column '{self.time_field}' (TIME_FIELD); "
            f"its columns: {', '.join(names)}; set TIME_FIELD, or eval_args.order: RO"
        )

    @property
    def train_histories(self) -> Histories:
        """The train rows by user, oldest first."""
        return self.split.histories(TRAIN)

    def build(self) -> list[Any]:
        """Train, valid and test datasets of our split; replaces dataset.py:1806 (RecBole's own orders and splits).

        Raises:
            UserError: see :func:`recbole_llm.data.split.make_split`.
        """
        split = self.make_split(self.config.split_protocol())
        Dataset._change_feat_format(self)
        self._drop_unused_col()  # type: ignore[attr-defined]
        self.rows = self.inter_feat
        return self.cut(split)

    def cut(self, split: Split) -> list[Any]:
        """The three phase datasets of a split; :meth:`build` must have run."""
        return [self._phase_dataset(split, phase) for phase in (TRAIN, VALID, TEST)]

    def _phase_dataset(self, split: Split, phase: int) -> Any:
        nxt = copy.copy(self)
        nxt.split = split
        nxt.inter_feat = take(self.rows, split.rows[split.phases == phase])
        return nxt


class PairDataset(SplitMixin, Dataset):
    """View for general, context and knowledge models: one row an interaction."""


class PrefixDataset(SplitMixin, SequentialDataset):
    """View for sequential models: one train row a (history, next item) pair, as RecBole's augmentation makes them.

    Under an order by time a row's history is the user's earlier train rows; under a random order it is his other train
    rows. A user's first train row stands in histories only.
    """

    def _phase_dataset(self, split: Split, phase: int) -> Any:
        nxt = copy.copy(self)
        nxt.split = split
        nxt.field2type, nxt.field2source = dict(self.field2type), dict(self.field2source)
        nxt.field2seqlen = dict(self.field2seqlen)
        nxt.inter_feat = self.rows
        nxt._aug_presets()
        # Only a prefix view needs its rows made: users and windows are cut from histories, rankings by their loader.
        prefixes = phase == TRAIN and not getattr(self.config.model_class, "train_view", "")
        bare = split.rows[split.phases == phase]
        nxt.inter_feat = prefix_rows(nxt, split) if prefixes else take(self.rows, bare)
        return nxt

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> Any:
        """Replaces sequential_dataset.py:137, which looks for first items in rows of length one."""
        rows = take(self.rows, self.split.rows[self.split.phases == TRAIN])
        return self._create_sparse_matrix(rows, self.uid_field, self.iid_field, form, value_field)


def take(feat: Interaction, rows: np.ndarray) -> Interaction:
    """Rows of an Interaction without its detour over Python lists (interaction.py:133).

    Args:
        feat: tensors [n, ...].
        rows: int64 [m].

    Returns:
        Interaction of tensors [m, ...].
    """
    index = torch.from_numpy(np.ascontiguousarray(rows))
    return Interaction({name: feat[name].index_select(0, index) for name in feat})


def windows(ends: np.ndarray, lengths: np.ndarray, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index table of runs that end before given positions, oldest first and padded right.

    Args:
        ends: int64 [n], position after each run's last element.
        lengths: int64 [n], at most ``width``.
        width: columns.

    Returns:
        int64 [n, width] positions (0 where padded) and bool [n, width] that says which are real.
    """
    steps = torch.arange(width)
    sizes = torch.from_numpy(lengths)
    real = steps[None, :] < sizes[:, None]
    positions = torch.from_numpy(ends - lengths)[:, None] + steps[None, :]
    return torch.where(real, positions, torch.zeros_like(positions)), real


def prefix_rows(dataset: PrefixDataset, split: Split) -> Interaction:
    """The train rows of a sequential model, built by array operations.

    Args:
        dataset: holds the filtered rows (``rows``) and RecBole's field names.
        split: the phases.

    Returns:
        Interaction with RecBole's fields: every loaded column, ``<column>_list`` [n, L] and the list length [n].
    """
    train = np.flatnonzero(split.phases == TRAIN)
    rows = split.rows[train]
    users = split.users[train]
    first = np.concatenate(([True], users[1:] != users[:-1])) if len(users) else np.zeros(0, dtype=bool)
    starts = np.maximum.accumulate(np.where(first, np.arange(len(users)), 0))
    counts = np.bincount(users, minlength=split.n_users)[users]
    limit = dataset.max_item_list_len
    position = np.arange(len(users))
    if split.protocol.by_time or split.protocol.kind == "TS":
        chosen = ~first
        lengths = np.minimum(position - starts, limit)[chosen]
        table, real = windows(position[chosen], lengths, limit)
    else:
        chosen = counts > 1
        ends = (starts + counts)[chosen]
        # The last `limit` of the others: one more is taken, and the row itself is stepped over where it is among them.
        lengths = np.minimum(counts - 1, limit)[chosen]
        own = position[chosen]
        inside = own >= ends - lengths
        table, real = windows(ends, lengths, limit)
        shift = torch.from_numpy(inside)[:, None] & (table <= torch.from_numpy(own)[:, None]) & real
        table = table - shift.long()
    return with_lists(dataset, take(dataset.rows, rows), position[chosen], table, real, lengths)


def with_lists(
    dataset: PrefixDataset,
    source: Interaction,
    targets: np.ndarray | None,
    table: torch.Tensor,
    real: torch.Tensor,
    lengths: np.ndarray,
) -> Interaction:
    """Put history lists beside rows.

    Args:
        dataset: names of the list fields.
        source: rows in time order, [n].
        targets: int64 [m], the row of ``source`` that each sample predicts; ``None`` leaves the rows' own columns out.
        table, real: [m, L] positions in ``source`` and which are real.
        lengths: int64 [m].
    """
    fields = {} if targets is None else dict(take(source, targets).interaction)
    for name in source:
        if name == dataset.uid_field:
            continue
        column = source[name]
        values = column[table]
        mask = real.reshape(real.shape + (1,) * (values.dim() - 2))
        fields[name + dataset.config["LIST_SUFFIX"]] = torch.where(mask, values, torch.zeros((), dtype=values.dtype))
    fields[dataset.item_list_length_field] = torch.from_numpy(np.ascontiguousarray(lengths, dtype=np.int64))
    return Interaction(fields)


__all__ = ["DROPPED", "PairDataset", "PrefixDataset", "SplitMixin", "take", "windows", "with_lists"]
