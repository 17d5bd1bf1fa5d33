"""A teacher's soft labels for all training samples, kept on the disk within a budget.

What is kept of a sample is the probability of the children of its label positions, and so a few thousand numbers where
the logits over items would be as many as there are items, and the dense labels as many as tokens in the vocabulary a
position. A forced token has probability 1 and needs none. Where even that is more than the budget, each position keeps
its likeliest children and the label's, as many at every position, scaled to sum to 1; what was dropped is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.objectives.soft_labels import Children, CollaborativeTokenizer, Positions, SoftLabels

SCHEMA = 1
ENTRY = np.dtype([("child", "<i4"), ("prob", "<f4")])
# Samples numbered within all, int64 [b]; their logits [b, n_items]; items without mass, int64 [b, H], or None.
Batch = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class CacheCard:
    """What stands in a cache.

    Attributes:
        schema: of the files.
        mark: SHA-256 of all that the entries depend on.
        samples: N.
        keep: children kept at a position at most.
        entries: in the file.
        exact: whether every child of every position is kept.
        decisions: positions with more than one child.
        dropped_mean, dropped_max: probability that was dropped at such a position.
    """

    schema: int
    mark: str
    samples: int
    keep: int
    entries: int
    exact: bool
    decisions: int
    dropped_mean: float
    dropped_max: float

    @property
    def nbytes(self) -> int:
        """Of the entries."""
        return self.entries * ENTRY.itemsize


class TeacherCache:
    """Soft labels by sample, read from a memory-mapped file. Made by :meth:`find_or_make`.

    Args:
        tokenizer: that made them.
        targets: of all samples, internal ids, int64 [N].
        card: of the file.
        entries: the file, of :data:`ENTRY`, [card.entries].
    """

    def __init__(
        self, tokenizer: CollaborativeTokenizer, targets: Tensor, card: CacheCard, entries: np.ndarray
    ) -> None:
        self.tokenizer, self.targets, self.card = tokenizer, targets, card
        self._entries = entries
        self._layout = _Layout(tokenizer, targets, card.keep)

    @classmethod
    def find_or_make(
        cls, folder: Path, key: str, tokenizer: CollaborativeTokenizer, targets: Tensor,
        batches: Callable[[], Iterable[Batch]], budget: int,
    ) -> TeacherCache:  # fmt: skip
        """Open the cache of a key, or make it.

        Args:
            folder: where; made if need be. The files' names begin with the mark of what they hold.
            key: fingerprint of what else the logits depend on: the teacher's weights, the split, histories.
            tokenizer: its settings are part of the mark.
            targets: of all samples, internal ids, int64 [N].
            batches: gives all samples in any order, each once; called only where there is no cache yet.
            budget: bytes that the entries may take.

        Raises:
            UserError: the budget is not enough for one child a position, or the teacher's logits are no numbers.
            ValueError: the batches are not the samples.
        """
        folder.mkdir(parents=True, exist_ok=True)
        targets = targets.to(tokenizer.lm_ids.device)
        layout = _Layout(tokenizer, targets, keep_within(tokenizer, targets, budget))
        mark = mark_of(key, tokenizer, targets, layout.keep)
        entries_file, card_file = folder / f"{mark[:16]}.npy", folder / f"{mark[:16]}.json"
        card = _read_card(card_file, mark)
        if card is None or not entries_file.is_file():
            dropped = _Dropped()
            write_whole(entries_file, lambda path: _write(path, layout, batches(), dropped))
            card = CacheCard(
                SCHEMA, mark, len(targets), layout.keep, layout.entries, layout.exact, dropped.count, dropped.mean,
                dropped.most,
            )  # fmt: skip
            write_whole(card_file, lambda path: path.write_text(json.dumps(asdict(card), indent=1) + "\n", "utf-8"))
        return cls(tokenizer, targets, card, np.load(entries_file, mmap_mode="r"))

    def labels(self, samples: Tensor) -> SoftLabels:
        """Soft labels of some samples.

        Args:
            samples: numbers of samples, int64 [B].

        Returns:
            Of their positions, sample after sample, on the tokenizer's device; children that were dropped have
            probability 0.
        """
        samples = samples.to(self.targets.device)
        positions = self.tokenizer.positions(self.targets[samples])
        children = self.tokenizer.children(positions.nodes)
        counts = children.offsets.diff()
        probs = (counts == 1).to(torch.float32).index_select(0, children.positions)
        places, owner = self._layout.places(samples, positions, counts)
        found = self._entries[places.cpu().numpy()]
        child, prob = (
            torch.from_numpy(np.ascontiguousarray(found[name])).to(probs.device) for name in ("child", "prob")
        )
        probs[children.offsets[owner] + child] = prob
        return self.tokenizer.labels(positions, children, probs)


def mark_of(key: str, tokenizer: CollaborativeTokenizer, targets: Tensor, keep: int) -> str:
    """SHA-256 of what a cache's entries depend on; arguments as for :meth:`TeacherCache.find_or_make`."""
    told = json.dumps([SCHEMA, key, tokenizer.fingerprint(), keep])
    return hashlib.sha256(told.encode() + targets.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def keep_within(tokenizer: CollaborativeTokenizer, targets: Tensor, budget: int) -> int:
    """How many children a position may keep.

    Args:
        tokenizer: knows the positions.
        targets: of all samples, int64 [N].
        budget: in bytes.

    Returns:
        The largest number whose entries fit, at most the most children that a position has; at least 1.

    Raises:
        UserError: not even one fits.
    """
    items, samples = targets.unique(return_counts=True)
    positions = tokenizer.positions(items)
    children = tokenizer.children_count(positions.nodes)
    decides = children > 1
    # Samples' positions by their number of children.
    by_count = torch.zeros(int(children.max()) + 1 if len(children) else 2, dtype=torch.int64, device=children.device)
    by_count.index_add_(0, children[decides], samples[positions.samples][decides])
    # One child more costs an entry at every position with more children than so many.
    more = by_count.flip(0).cumsum(0).flip(0)[1:]
    size = more.cumsum(0) * ENTRY.itemsize
    fitting = int((size <= budget).sum())
    if not fitting:
        raise UserError(
            f"a teacher cache of {len(targets)} samples takes {size[0] / 2**20:.1f} MiB at the least and "
            f"{size[-1] / 2**20:.1f} MiB whole, and its budget is {budget / 2**20:.1f} MiB"
        )
    return fitting


class _Layout:
    """Where each sample's entries stand: sample after sample, position after position, children ascending."""

    def __init__(self, tokenizer: CollaborativeTokenizer, targets: Tensor, keep: int) -> None:
        self.tokenizer, self.targets, self.keep = tokenizer, targets, keep
        # By item and not by sample, so that what is held does not grow with all samples' positions.
        every = torch.arange(tokenizer.item_tokens.n_items, device=targets.device)
        positions = tokenizer.positions(every)
        children = tokenizer.children_count(positions.nodes)
        of_item = torch.zeros_like(every).index_add_(0, positions.samples, self.stored(children))
        self.starts = functional.pad(of_item[targets].cumsum(0), (1, 0))
        self.entries = int(self.starts[-1])
        self.exact = bool((children[torch.isin(positions.samples, targets)] <= keep).all())

    def stored(self, counts: Tensor) -> Tensor:
        """Entries of positions with so many children."""
        return counts.clamp(max=self.keep) * (counts > 1)

    def places(self, samples: Tensor, positions: Positions, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Where the entries of some samples stand, int64 [e], and the position that each is of, int64 [e].

        Args:
            samples: int64 [B].
            positions: of these samples, M.
            counts: children of each position, int64 [M].
        """
        stored = self.stored(counts)
        ends = stored.cumsum(0)
        owner = torch.arange(len(stored), device=stored.device).repeat_interleave(stored)
        # Of one sample all entries are neighbours: only where it begins differs between here and the file.
        sizes = self.starts[samples + 1] - self.starts[samples]
        shift = self.starts[samples] - (sizes.cumsum(0) - sizes)
        total = int(ends[-1]) if len(ends) else 0
        return torch.arange(total, device=stored.device) + shift[positions.samples[owner]], owner


class _Dropped:
    """The probability that was dropped, over positions."""

    def __init__(self) -> None:
        self.count, self.total, self.most = 0, 0.0, 0.0

    def add(self, dropped: Tensor) -> None:
        if len(dropped):
            self.count += len(dropped)
            self.total += float(dropped.sum())
            self.most = max(self.most, float(dropped.max()))

    @property
    def mean(self) -> float:
        return self.total / max(self.count, 1)


def _write(path: Path, layout: _Layout, batches: Iterable[Batch], dropped: _Dropped) -> None:
    made = np.lib.format.open_memmap(path, mode="w+", dtype=ENTRY, shape=(layout.entries,))
    seen = torch.zeros(len(layout.targets), dtype=torch.int64)
    for samples, logits, history in batches:
        if logits.isnan().any():
            raise UserError("the collaborative model's scores are no numbers (NaN); train it again")
        seen.index_add_(0, samples.cpu(), torch.ones_like(samples.cpu()))
        _write_batch(made, layout, samples.to(layout.targets.device), logits, history, dropped)
    if not (seen == 1).all():
        sample = int((seen != 1).nonzero()[0])
        raise ValueError(f"sample {sample} of {len(seen)} came {int(seen[sample])} times")
    made.flush()


def _write_batch(
    made: np.ndarray, layout: _Layout, samples: Tensor, logits: Tensor, history: Tensor | None, dropped: _Dropped
) -> None:
    tokenizer, targets = layout.tokenizer, layout.targets[samples]
    positions = tokenizer.positions(targets)
    children = tokenizer.children(positions.nodes)
    probs = tokenizer.probs(logits, targets, positions, children, history)
    counts = children.offsets.diff()
    if layout.exact:
        kept = torch.ones_like(children.nodes, dtype=torch.bool)
    else:
        kept = _likeliest(tokenizer, positions, children, probs, layout.keep)
    kept &= (counts > 1).index_select(0, children.positions)
    owner = children.positions[kept]
    mass = probs.new_zeros(len(positions)).index_add_(0, owner, probs[kept])
    dropped.add((1 - mass[counts > 1]).clamp(min=0))
    places, _ = layout.places(samples, positions, counts)
    entries = np.empty(len(places), dtype=ENTRY)
    entries["child"] = (kept.nonzero().squeeze(1) - children.offsets[owner]).cpu().numpy()
    # Where the teacher gives nothing to what is kept, the label has all of it.
    label = tokenizer.trie.tokens[children.nodes[kept]] == positions.labels[owner]
    shares = torch.where(mass[owner] > 0, probs[kept] / mass[owner], label.double())
    entries["prob"] = shares.cpu().numpy()
    made[places.cpu().numpy()] = entries


def _likeliest(
    tokenizer: CollaborativeTokenizer, positions: Positions, children: Children, probs: Tensor, keep: int
) -> Tensor:
    """Whether a child is among its position's first ``keep`` by probability, the label before all: bool [E]."""
    is_label = tokenizer.trie.tokens[children.nodes] == positions.labels[children.positions]
    by_prob = probs.masked_fill(is_label, 2.0).argsort(descending=True, stable=True)
    order = by_prob[children.positions[by_prob].argsort(stable=True)]
    # Sorted by position first, so that positions are where they were.
    rank = torch.arange(len(order), device=order.device) - children.offsets[children.positions]
    return torch.empty_like(is_label).scatter_(0, order, rank < keep)


def _read_card(path: Path, mark: str) -> CacheCard | None:
    try:
        told: dict[str, Any] = json.loads(path.read_text("utf-8"))
        card = CacheCard(**told)
    except (OSError, ValueError, TypeError):
        return None
    return card if card.mark == mark else None
