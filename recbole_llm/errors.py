"""Errors meant for the person at the keyboard.

A :class:`UserError` is a mistake in what the user asked for, never a bug of ours: the command line prints its message
(one or two plain lines) on stderr and exits with status 2, without a traceback. Anything else is our bug and exits 1.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can mend; the message says what is wrong, where, and the nearest right thing."""


class TrainingStoppedError(UserError):
    """Training cannot go on, e.g. the loss is no number; the log and the last good weights stay for a look."""


class DiskFullError(UserError):
    """A file could not be written for want of space; what was finished before stays and is found again."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names most like ``name``, best first.

    Args:
        name: what the user wrote.
        known: the names that would have been right.
        count: how many to return at most.

    Returns:
        At most ``count`` names; empty when nothing is close.
    """
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=0.6)
    return [by_lower[match] for match in close]


# What other programs call a setting; no spelling is near.
_CALLED = {
    "lr": "learning_rate", "wd": "weight_decay", "l2": "reg_weight", "bs": "train_batch_size",
    "patience": "stopping_step", "early_stopping": "stopping_step", "device_id": "gpu_id", "cuda": "gpu_id",
    "max_len": "MAX_ITEM_LIST_LENGTH", "max_epochs": "epochs", "k": "topk", "random_seed": "seed",
}  # fmt: skip


def nearest_setting(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for a key, whatever it is: by meaning, else by spelling, else the least far.

    Args:
        name: what the user wrote.
        known: the keys that would have been right.
    """
    names = set(known)
    meant = _CALLED.get(name.lower())
    if meant in names:
        return f"; did you mean {meant!r}?"
    close = did_you_mean(name, names)
    if close or not names:
        return close
    least = difflib.get_close_matches(name.lower(), sorted(names), n=1, cutoff=0.0)
    return f"; the nearest of all is {least[0]!r}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x' or 'y'?"``, or an empty string when nothing known is close to ``name``."""
    close = nearest(name, known)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
