"""Negative items for training, drawn for whole batches at once and never from a user's own train history."""

from __future__ import annotations

import copy
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from recbole_llm.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from recbole_llm.data.histories import Histories

# After this many rejected draws a row is drawn from the list of its user's allowed items instead: a user who has had
# 99.9 % of the catalogue would otherwise need thousands of rounds. Both ways draw from the same distribution.
REJECTION_ROUNDS = 16
DISTRIBUTIONS = ("uniform", "popularity")


class _Membership(Protocol):
    """Which (user, item) pairs are taken."""

    def __call__(self, users: np.ndarray, items: np.ndarray) -> np.ndarray: ...


class _Bitmap:
    """One bit for each user and item: a look-up is one byte gathered, whatever the length of the history."""

    def __init__(self, keys: np.ndarray, n_users: int, n_items: int) -> None:
        self.n_items = n_items
        self.bits = np.zeros((n_users * n_items + 7) // 8, dtype=np.uint8)
        if len(keys):
            # Distinct sorted keys put the bits of one byte next to each other, and distinct bits add without a carry.
            byte = keys >> 3
            first = np.flatnonzero(np.concatenate(([True], byte[1:] != byte[:-1])))
            self.bits[byte[first]] = np.add.reduceat(np.left_shift(1, keys & 7), first).astype(np.uint8)

    def __call__(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self.n_items + items
        return (self.bits[keys >> 3] >> (keys & 7).astype(np.uint8)) & 1 != 0


class _SortedKeys:
    """The taken pairs as sorted keys: memory for the pairs that exist only, a binary search for each look-up."""

    def __init__(self, keys: np.ndarray, n_items: int) -> None:
        self.n_items = n_items
        self.keys = np.append(keys, np.iinfo(np.int64).max)

    def __call__(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self.n_items + items
        return self.keys[np.searchsorted(self.keys, keys)] == keys


class NegativeSampler:
    """Draws items that a user has no train interaction with.

    Only train rows are known to it, so nothing of the valid or test rows can reach a model through its negatives.
    It answers to the calls of RecBole's ``Sampler`` (``sample_by_user_ids``, ``set_phase``, ``phase``, ``used_ids``)
    and can stand in its place in RecBole's loaders; its histories are those of train in every phase.

    Args:
        histories: the train items of each user.
        n_items: number of internal item ids, the padding item 0 included.
        candidates: bool ``[n_items]``, the items that may be drawn; ``None`` stands for all but the padding item.
        seed: seeds the sampler's own generator, so that no other use of random numbers moves the negatives.
        distribution: ``uniform`` over the allowed items, or ``popularity``: by ``count ** alpha`` over train rows.
        alpha: the power of the popularity.
        max_cells: up to this many users x items the taken pairs are a bitmap (an eighth of a byte each).

    Raises:
        UserError: the distribution is unknown, or some user has no item left to draw.
    """

    def __init__(
        self,
        histories: Histories,
        n_items: int,
        candidates: np.ndarray | None = None,
        seed: int = 0,
        distribution: str = "uniform",
        alpha: float = 1.0,
        max_cells: int = 2_000_000_000,
    ) -> None:
        if distribution not in DISTRIBUTIONS:
            known = " or ".join(DISTRIBUTIONS)
            raise UserError(f"the negative sampling distribution '{distribution}' is unknown; it can be {known}")
        self.phase = "train"
        self.histories = histories
        self.n_items = n_items
        self.n_users = len(histories.offsets) - 1
        self.generator = np.random.default_rng(seed)

        allowed = np.ones(n_items, dtype=bool) if candidates is None else np.array(candidates, dtype=bool)
        allowed[0] = False
        self._weights: np.ndarray | None = None
        if distribution == "popularity":
            counts = np.bincount(histories.items, minlength=n_items)
            with np.errstate(divide="ignore"):
                self._weights = np.where(allowed & (counts > 0), np.power(counts, float(alpha)), 0.0)
            allowed = self._weights > 0
        self._drawable = np.flatnonzero(allowed)
        # An item id is its own place in the list when no id is left out, which spares a gather at each draw.
        self._contiguous = len(self._drawable) == n_items - 1
        if self._weights is not None:
            self._cumulative = np.cumsum(self._weights[self._drawable])

        owners = np.repeat(np.arange(self.n_users, dtype=np.int64), np.diff(histories.offsets))
        keys = np.unique(owners * n_items + histories.items)
        self._refuse_full_users(keys, allowed)
        self._taken: _Membership
        if self.n_users * n_items <= max_cells:
            self._taken = _Bitmap(keys, self.n_users, n_items)
        else:
            self._taken = _SortedKeys(keys, n_items)

    def _refuse_full_users(self, keys: np.ndarray, allowed: np.ndarray) -> None:
        had = np.bincount((keys // self.n_items)[allowed[keys % self.n_items]], minlength=self.n_users)
        full = np.flatnonzero(had[1:] >= len(self._drawable)) + 1
        if len(full):
            raise UserError(
                f"{len(full)} user(s) have had every item that could be drawn as a negative (the first has internal id "
                f"{full[0]}); filter them out with user_inter_num_interval"
            )

    def _draw(self, count: int) -> np.ndarray:
        if self._weights is not None:
            marks = self.generator.random(count) * self._cumulative[-1]
            places = np.searchsorted(self._cumulative, marks, side="right")
            # A product rounded up to the total would fall behind the last item.
            return self._drawable[np.minimum(places, len(self._drawable) - 1)]
        if self._contiguous:
            return self.generator.integers(1, self.n_items, count)
        return self._drawable[self.generator.integers(0, len(self._drawable), count)]

    def _draw_from_list(self, user: int, count: int) -> np.ndarray:
        left = self._drawable[~self._taken(np.full(len(self._drawable), user), self._drawable)]
        if self._weights is None:
            return self.generator.choice(left, count)
        return self.generator.choice(left, count, p=self._weights[left] / self._weights[left].sum())

    def sample(self, users: np.ndarray | torch.Tensor | Sequence[int], num: int = 1) -> np.ndarray:
        """Draw ``num`` negatives for each entry of ``users``.

        Args:
            users: ``[n]`` internal user ids; repeats are drawn for separately.
            num: negatives for each entry.

        Returns:
            int64 ``[n * num]``: the first negatives of all entries, then all second ones, and so on. Given its user,
            each is an independent draw from the distribution restricted to the items not in his train history.

        Raises:
            ValueError: an id is not a user's.
        """
        owners = np.asarray(users, dtype=np.int64)
        if len(owners) and not 0 <= int(owners.min()) <= int(owners.max()) < self.n_users:
            raise ValueError(f"a user id is not in 0..{self.n_users - 1}")
        owners = np.tile(owners, num) if num != 1 else owners
        items = self._draw(len(owners))
        wrong = np.flatnonzero(self._taken(owners, items))
        for _ in range(REJECTION_ROUNDS):
            if not len(wrong):
                return items
            redrawn = self._draw(len(wrong))
            items[wrong] = redrawn
            wrong = wrong[self._taken(owners[wrong], redrawn)]
        for user in np.unique(owners[wrong]):
            rows = wrong[owners[wrong] == user]
            items[rows] = self._draw_from_list(int(user), len(rows))
        return items

    def sample_by_user_ids(self, user_ids: Any, item_ids: Any, num: int) -> torch.Tensor:
        """RecBole's name for :meth:`sample`; ``item_ids`` is not looked at. Returns a LongTensor ``[n * num]``."""
        return torch.from_numpy(self.sample(user_ids, num))

    @cached_property
    def used_ids(self) -> np.ndarray:
        """The train items of each user as RecBole keeps them: an object array of sets; made when first asked for."""
        used = np.empty(self.n_users, dtype=object)
        bounds = self.histories.offsets
        used[:] = [set(self.histories.items[a:b].tolist()) for a, b in pairwise(bounds)]
        return used

    def set_phase(self, phase: str) -> NegativeSampler:
        """A copy that carries ``phase``; it shares the generator and excludes the same train histories."""
        other = copy.copy(self)
        other.phase = phase
        return other
