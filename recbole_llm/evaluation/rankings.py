"""What a run recommended at test and to whom: the file that breakdowns, curves over K and example users are read from.

It holds whatever these need of the split, so that a run can be looked into where its data set is not at hand.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.data.phases import TRAIN, VALID
from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import Measured

# Items of a user's history that are kept, for whoever reads them beside his recommendations.
RECENT = 20

# What NumPy raises, depending on where a file is cut or altered; a file with a lone array is no archive (TypeError).
DAMAGED = (
    OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, SyntaxError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True)
class Rankings:
    """The test rankings of one run, in the order of its ``per_user.npz``.

    Attributes:
        user_id: str [U], raw ids.
        item_id: str [I], raw ids; the arrays below hold places in it.
        top: int32 [U, K], the items recommended, best first; the padding item's place, 0, where a user has fewer left.
        targets: int32 [T], every user's test items; of items that count as one (``title_match``) that one, once.
        target_offsets: int64 [U + 1]; user ``u`` should have got ``targets[target_offsets[u]:target_offsets[u + 1]]``.
        item_count: int64 [I], train interactions of each item; 0 for one that training never saw.
        user_count: int64 [U], train interactions of each user.
        history_length: int64 [U], items that a sequential input at test is cut from: train and valid ones; under
            ``eval_unit: row`` a sequential model's are all before the row, but for those of a later phase.
        recent: int32 [U, RECENT], the last of them, newest last, -1 in front where there are fewer.
    """

    user_id: np.ndarray
    item_id: np.ndarray
    top: np.ndarray
    targets: np.ndarray
    target_offsets: np.ndarray
    item_count: np.ndarray
    user_count: np.ndarray
    history_length: np.ndarray
    recent: np.ndarray

    @classmethod
    def of(cls, measured: Measured, loader: Any, dataset: Any) -> Rankings:
        """Gather them after a ranking.

        Args:
            measured: of the test phase.
            loader: the :class:`~recbole_llm.data.loaders.RankingLoader` it came from.
            dataset: translates ids.
        """
        tokens = dataset.field2id_token
        if loader.by_row:
            shown, starts, ends = loader.source[loader.iid_field].numpy(), loader.starts, loader.ends
        else:
            histories = loader.split.histories(TRAIN, VALID)
            shown, bounds = histories.items, histories.offsets
            starts, ends = bounds[measured.users], bounds[measured.users + 1]
        back = ends[:, None] - np.arange(RECENT, 0, -1)[None, :]
        inside = back >= starts[:, None]
        recent = np.full(back.shape, -1, dtype=np.int32)
        recent[inside] = shown[back[inside]]
        targets, offsets = loader.targets, np.asarray(loader.target_offsets, dtype=np.int64)
        if measured.counts_as is not None:
            targets, offsets = _counted(measured.counts_as[targets], offsets)
        return cls(
            user_id=tokens[dataset.uid_field][measured.users].astype(str),
            item_id=tokens[dataset.iid_field].astype(str),
            top=measured.items.astype(np.int32),
            targets=targets.astype(np.int32),
            target_offsets=offsets,
            item_count=np.bincount(loader.graph_history.items, minlength=dataset.item_num),
            user_count=loader.graph_history.lengths[measured.users],
            history_length=ends - starts,
            recent=recent,
        )

    def hits(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether the item at each rank is a target, bool [U, K], and how many targets there are, int64 [U]."""
        counts = np.diff(self.target_offsets)
        width = len(self.item_id)
        wanted = np.repeat(np.arange(len(counts)), counts) * width + self.targets
        given = np.arange(len(self.top))[:, None] * width + self.top.astype(np.int64)
        return np.isin(given, wanted), counts

    def save(self, path: Path) -> None:
        """Write them whole or not at all."""
        packed = io.BytesIO()
        np.savez_compressed(packed, **vars(self))
        write_whole(path, lambda part: part.write_bytes(packed.getvalue()))

    @classmethod
    def read(cls, path: Path) -> Rankings:
        """Read what :meth:`save` wrote.

        Raises:
            UserError: it is missing or cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in cls.__dataclass_fields__})
        except DAMAGED as error:
            raise UserError(f"{path} cannot be read ({error})") from None


def _counted(targets: np.ndarray, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every user's targets, int64 [T], each once: int64 [T'], and their offsets, int64 [U + 1]."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    pairs = np.unique(np.stack([users, targets]), axis=1)
    return pairs[1], np.searchsorted(pairs[0], np.arange(len(offsets)))
