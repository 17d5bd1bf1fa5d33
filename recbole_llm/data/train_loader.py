"""RecBole's train loader without its Python lists: the same batches, several times sooner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from recbole.data.dataloader.general_dataloader import TrainDataLoader
from recbole.data.interaction import Interaction
from recbole.utils import InputType

from recbole_llm.data.sampler import NegativeSampler

# Rows gathered, and negatives drawn, in one go: enough to hide the cost of a call, few enough to stay in cache.
CHUNK_ROWS = 1 << 15


def _rows(feature: Interaction, rows: torch.Tensor) -> Interaction:
    """The given rows of every field; RecBole's own indexing turns ``rows`` into a Python list for each field."""
    return Interaction({field: values.index_select(0, rows) for field, values in feature.interaction.items()})


class FastTrainLoader(TrainDataLoader):
    """Stands in for RecBole's ``TrainDataLoader``: pairwise or pointwise with negatives, or without any.

    Rows come in the order that RecBole's loader would give with the same seed. With a sampler of RecBole's, each batch
    is drawn by itself and so equals RecBole's; a :class:`~recbole_llm.data.sampler.NegativeSampler` draws for many
    batches at once. Dynamic negatives need the model for each batch and are left to RecBole's way. Batches are always
    made in this process (``worker`` is not used): slicing a tensor takes less time than sending one.

    Args:
        config: RecBole's ``Config``.
        dataset: the train data set, whose ``inter_feat`` is an ``Interaction`` of tensors.
        sampler: the train sampler, or ``None`` without negatives.
        shuffle: whether the rows are permuted anew for each epoch.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self._negatives = 0 if self.neg_sample_args["distribution"] == "none" else self.neg_sample_num

    def __iter__(self) -> Iterator[Interaction]:
        """One epoch of batches."""
        if self._negatives and self.neg_sample_args.get("dynamic", False):
            yield from super().__iter__()
            return
        order = self._order()
        drawn_ahead = self._negatives > 0 and isinstance(self._sampler, NegativeSampler)
        chunk = max(CHUNK_ROWS // self.step, 1) * self.step
        features = self._dataset.inter_feat
        for start in range(0, len(order), chunk):
            rows = _rows(features, order[start : start + chunk])
            negatives = None
            if drawn_ahead:
                drawn = self._sampler.sample(rows[self.uid_field].numpy(), self._negatives)
                negatives = torch.from_numpy(drawn).view(self._negatives, -1)
            for first in range(0, len(rows), self.step):
                part = slice(first, first + self.step)
                yield self._batch(rows[part], None if negatives is None else negatives[:, part])

    def _order(self) -> torch.Tensor:
        """This epoch's row numbers; consumes the generator just as torch's ``DataLoader`` does."""
        if not self.config["single_spec"]:
            return torch.tensor(list(self.sampler), dtype=torch.long)
        torch.empty((), dtype=torch.int64).random_(generator=self.generator)  # the seed that workers would be given
        if not self.shuffle:
            return torch.arange(self.sample_size)
        order = torch.randperm(self.sample_size, generator=self.generator)
        torch.randperm(self.sample_size, generator=self.generator)  # torch's sampler draws one more at an epoch's end
        return order

    def _batch(self, rows: Interaction, negatives: torch.Tensor | None) -> Interaction:
        batch = self.transform(self._dataset, self._join(rows))
        if not self._negatives:
            return batch
        if negatives is None:
            drawn = self._sampler.sample_by_user_ids(
                batch[self.uid_field].numpy(), batch[self.iid_field].numpy(), self._negatives
            )
        else:
            drawn = negatives.reshape(-1)
        if self.dl_format == InputType.PAIRWISE:
            return self._pairs(batch, drawn)
        return self._points(batch, drawn)

    def _pairs(self, batch: Interaction, drawn: torch.Tensor) -> Interaction:
        batch = batch.repeat(self.times) if self.times > 1 else batch
        negative = self._join(Interaction({self.iid_field: drawn}))
        negative.add_prefix(self.neg_prefix)
        batch.update(negative)
        return batch

    def _points(self, batch: Interaction, drawn: torch.Tensor) -> Interaction:
        positives = len(batch)
        batch = batch.repeat(self.times)
        batch[self.iid_field][positives:] = drawn
        batch = self._join(batch)
        labels = torch.zeros(len(batch))
        labels[:positives] = 1.0
        batch.update(Interaction({self.label_field: labels}))
        return batch

    def _join(self, rows: Interaction) -> Interaction:
        """Adds the users' and items' own fields, as the data set's ``join`` does, but by whole tensors."""
        for field, feature in (
            (self._dataset.uid_field, self._dataset.user_feat),
            (self._dataset.iid_field, self._dataset.item_feat),
        ):
            if feature is not None and field in rows:
                rows.update(_rows(feature, rows[field]))
        return rows
