"""GLTA's training samples: which of a user's train items the prompt shows and which the slots must name.

All of it is array operations over a batch of users, with an explicit generator, so that an epoch can be drawn again.
A target never stands among the items shown: histories hold each item once (:func:`unique_histories`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Generator, Tensor

from recbole_llm.data.prompts import Ragged

# torch.nn.functional.cross_entropy's own default: a slot without a target adds nothing to the loss.
IGNORE = -100


@dataclass(frozen=True)
class Sample:
    """What some users' prompts show and ask for, one row a prompt.

    Attributes:
        shown: the items in the prompt, in time order.
        targets: the items that the slots must name, in random order.
        following: for each shown item the one that the user had next, in the layout of ``shown``; ``None`` where the
            order of a user's items is not to be learned.
    """

    shown: Ragged
    targets: Ragged
    following: Ragged | None = None

    def drop(self, share: float, generator: Generator) -> Sample:
        """Each shown item taken out with probability ``share``; what follows the others stays what it was."""
        if not share:
            return self
        kept = torch.rand(len(self.shown.values), generator=generator) >= share
        following = None if self.following is None else self.following.keep(kept)
        return Sample(self.shown.keep(kept), self.targets, following)


def unique_histories(offsets: np.ndarray, items: np.ndarray) -> Ragged:
    """Each user's items in time order, a repeated item only where it came first.

    A repeat would be shown and asked for at once; the candidate policy drops such rows from valid and test too.

    Args:
        offsets: int64 ``[n_users + 1]``.
        items: int64 ``[n_interactions]``.

    Returns:
        One row a user.
    """
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    pairs = users * (int(items.max(initial=0)) + 1) + items
    first = np.sort(np.unique(pairs, return_index=True)[1])
    lengths = np.bincount(users[first], minlength=len(offsets) - 1)
    return Ragged.from_lengths(torch.from_numpy(items[first]).long(), torch.from_numpy(lengths).long())


def shuffled_ranks(rows: Tensor, offsets: Tensor, generator: Generator) -> Tensor:
    """A random permutation within each row: int64 ``[N]``, each value's rank ``0 .. len(row) - 1``."""
    keys = rows.double() + torch.rand(len(rows), generator=generator, dtype=torch.double)
    order = keys.argsort()
    ranks = torch.empty_like(rows)
    ranks[order] = torch.arange(len(rows)) - offsets[rows[order]]
    return ranks


def random_sample(histories: Ragged, slots: int, history_length: int, generator: Generator) -> Sample:
    """Targets at random, and others of the user's items to show (GLTA, section 3.3: "randomly shuffled").

    At most half of a user's items, and at most ``slots``, become targets, so that something is left to show.

    Args:
        histories: the batch's users, one row each, in time order.
        slots: response slots.
        history_length: items shown at most, drawn at random and shown in time order.
        generator: the source of all randomness.

    Returns:
        One row a user.
    """
    rows = histories.rows
    ranks = shuffled_ranks(rows, histories.offsets, generator)
    wanted = (histories.lengths // 2).clamp(min=1, max=slots)[rows]
    shown = (ranks >= wanted) & (ranks < wanted + history_length)
    return Sample(histories.keep(shown), shuffle(histories.keep(ranks < wanted), generator))


def next_sample(histories: Ragged, window: int, history_length: int, generator: Generator) -> Sample:
    """A random moment in each user's time: the items before it are shown, those after it are the targets.

    Args:
        histories: the batch's users, one row each, in time order.
        window: how many items after the moment are targets.
        history_length: how many items before it are shown.
        generator: the source of all randomness.

    Returns:
        One row a user.
    """
    lengths, rows, positions = histories.lengths, histories.rows, histories.positions
    draw = torch.rand(len(histories), generator=generator, dtype=torch.double)
    # One item at least lies on each side; a user with a single item is shown nothing.
    cuts = ((draw * (lengths - 1)).long() + 1).minimum((lengths - 1).clamp_min(0))[rows]
    shown = (positions < cuts) & (positions >= cuts - history_length)
    targets = (positions >= cuts) & (positions < cuts + window)
    # A shown item lies before the moment, so that its row goes on behind it.
    following = Ragged(histories.values[shown.nonzero().squeeze(1) + 1], histories.keep(shown).offsets)
    return Sample(histories.keep(shown), shuffle(histories.keep(targets), generator), following)


def shuffle(ragged: Ragged, generator: Generator) -> Ragged:
    """Each row in random order."""
    rows = ragged.rows
    ranks = shuffled_ranks(rows, ragged.offsets, generator)
    values = torch.empty_like(ragged.values)
    values[ragged.offsets[rows] + ranks] = ragged.values
    return Ragged(values, ragged.offsets)


def scatter(histories: Ragged, users: Tensor) -> Ragged:
    """Each row in an order that depends on its user and items alone: the control that takes time out of a history.

    Args:
        histories: one row a prompt.
        users: int64 ``[B]``, whose row it is.
    """
    # Multiplicative hashing; an order that a generator drew would differ between two rankings of one user.
    rows = histories.rows
    mixed = (histories.values * 2654435761) ^ (users[rows] * 1540483477)
    keys = (mixed % (1 << 31)) * 2246822519 % (1 << 31)
    order = (rows.double() + keys.double() / (1 << 31)).argsort()
    return Ragged(histories.values[order], histories.offsets)


def slot_targets(targets: Ragged, slots: int, repeat: bool) -> Tensor:
    """The targets laid out over the response slots.

    Args:
        targets: one row a prompt, in the order of the slots.
        slots: response slots.
        repeat: slots beyond the last target take the targets again in turn; otherwise they count for nothing.

    Returns:
        int64 ``[B, slots]``, :data:`IGNORE` where a slot has no target.
    """
    places = torch.arange(slots).expand(len(targets), -1)
    lengths = targets.lengths.unsqueeze(1)
    filled = (lengths > 0) & ((places < lengths) | repeat)
    index = targets.offsets[:-1].unsqueeze(1) + places % lengths.clamp_min(1)
    table = torch.full_like(places, IGNORE)
    table[filled] = targets.values[index[filled]]
    return table
