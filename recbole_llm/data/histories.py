"""Items by user, oldest first."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Histories:
    """Item ids a user, as one flat array (CSR).

    Attributes:
        offsets: int64 [n_users + 1]; user ``u``'s run is ``items[offsets[u]:offsets[u + 1]]``. The padding
            user 0 counts.
        items: int64 [n_interactions], internal item ids, oldest first within a user.
    """

    offsets: np.ndarray
    items: np.ndarray

    @classmethod
    def from_rows(cls, users: np.ndarray, items: np.ndarray, n_users: int) -> Histories:
        """Build from rows already in time order within each user.

        Args:
            users: int64 [n], internal user ids in any arrangement.
            items: int64 [n].
            n_users: number of internal user ids, the padding one included.
        """
        order = np.argsort(users, kind="stable")
        offsets = np.zeros(n_users + 1, dtype=np.int64)
        np.cumsum(np.bincount(users, minlength=n_users), out=offsets[1:])
        return cls(offsets, np.ascontiguousarray(items[order]))

    def seen(self, n_items: int) -> np.ndarray:
        """Items that somebody has, bool [n_items]."""
        found = np.zeros(n_items, dtype=bool)
        found[self.items] = True
        return found

    def distinct(self, n_items: int) -> np.ndarray:
        """How many items each user has, one that he had twice counted once, int64 [n_users]."""
        users = np.repeat(np.arange(len(self.lengths)), self.lengths)
        return np.bincount(np.unique(users * n_items + self.items) // n_items, minlength=len(self.lengths))

    def owners(self, moments: np.ndarray) -> np.ndarray:
        """Whose some of the interactions are.

        Args:
            moments: places among :attr:`items`, int64 [n].

        Returns:
            Internal user ids, int64 [n].
        """
        return np.searchsorted(self.offsets, moments, side="right") - 1

    def begins(self, moments: np.ndarray) -> np.ndarray:
        """Where the histories begin that interactions are of: places among :attr:`items`, int64 [n], as ``moments``."""
        return self.offsets[self.owners(moments)]

    @property
    def lengths(self) -> np.ndarray:
        """int64 [n_users]: how many items each user has."""
        return np.diff(self.offsets)

    def of(self, user: int) -> np.ndarray:
        """The items of one user, oldest first."""
        return self.items[self.offsets[user] : self.offsets[user + 1]]


def runs(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For rows sorted by user: the rank of each row in its user's run, and the length of that run."""
    first = np.flatnonzero(np.diff(users, prepend=-1))
    counts = np.diff(np.append(first, len(users)))
    ranks = np.arange(len(users)) - np.repeat(first, counts)
    return ranks, np.repeat(counts, counts)
