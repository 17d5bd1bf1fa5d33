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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x' or 'y'?"``, or an empty string when nothing known is close to ``name``."""
    close = nearest(name, known)
    return f"; did you mean {' or '.join(repr(match) for match in close)}?" if close else ""
