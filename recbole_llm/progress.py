"""Progress of long steps: a bar with the time left on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

# A step shorter than the first shows nothing; without a terminal a line is logged then, and later every so often.
QUIET_SECONDS = 2.0
LINE_SECONDS = 10.0

logger = logging.getLogger("recbole_llm")


def clock(seconds: float) -> str:
    """``75.2`` as ``1:15``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def progress(items: Iterable[Item], what: str, total: int | None = None, show: bool = True) -> Iterator[Item]:
    """Yield ``items`` while telling how far along they are.

    Args:
        items: what to go through.
        what: the step's name, as the user should read it.
        total: how many items there are; ``len(items)`` when it has one.
        show: ``False`` yields silently.

    Yields:
        The items, unchanged.
    """
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    if not show:
        yield from items
        return
    if sys.stderr.isatty():
        yield from tqdm(items, desc=what, total=total, delay=QUIET_SECONDS, leave=False, dynamic_ncols=True)
        return
    start = time.monotonic()
    due = start + QUIET_SECONDS
    for done, item in enumerate(items):
        now = time.monotonic()
        if now >= due and total and done:
            left = (now - start) / done * (total - done)
            logger.info("%s: %d of %d, about %s left", what, done, total, clock(left))
            due = now + LINE_SECONDS
        yield item


class Steps:
    """Progress of training, whose end early stopping may bring forward.

    Args:
        what: the stage's name, as the user should read it.
        total: most steps there can be.
        show: ``False`` stays silent.
    """

    def __init__(self, what: str, total: int, show: bool = True) -> None:
        self.what, self.total, self.show = what, total, show
        self.done, self.text = 0, ""
        self.start = time.monotonic()
        self._due = self.start + QUIET_SECONDS
        terminal = show and sys.stderr.isatty()
        self.bar = (
            tqdm(total=total, desc=what, delay=QUIET_SECONDS, leave=False, dynamic_ncols=True) if terminal else None
        )

    def note(self, text: str) -> None:
        """What to say beside the count, e.g. the last validation."""
        self.text = text
        if self.bar is not None:
            self.bar.set_postfix_str(text)

    def advance(self) -> None:
        """One step is done."""
        self.done += 1
        if self.bar is not None:
            self.bar.update()
            return
        now = time.monotonic()
        if self.show and now >= self._due:
            left = (now - self.start) / self.done * max(self.total - self.done, 0)
            text = f", {self.text}" if self.text else ""
            logger.info("%s: step %d of %d%s, at most %s left", self.what, self.done, self.total, text, clock(left))
            self._due = now + LINE_SECONDS

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
