"""Logging of one run: a file with everything, a terminal with what a person wants to read."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_COLOUR = re.compile(r"\x1B(?:[@-Z\\-_]|\[[0-?]*[ -/]*[@-~])")


class _Plain(logging.Formatter):
    """Takes RecBole's colours out."""

    def format(self, record: logging.LogRecord) -> str:
        return _COLOUR.sub("", super().format(record))


class _RunLog(logging.FileHandler):
    """A log file that a full disk ends: the run's own files decide whether the run can go on, not its log."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802, logging's own name
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)
            return
        self.close()
        logging.getLogger("recbole_llm").warning("%s cannot be written any more; the run goes on", self.baseFilename)

    def close(self) -> None:
        # What is still in memory cannot be written either.
        with contextlib.suppress(OSError):
            super().close()


def _ours(record: logging.LogRecord) -> bool:
    """RecBole logs three lines an epoch through the root logger: the file has them, the terminal our lines only."""
    return record.name.startswith("recbole_llm") or record.levelno >= logging.WARNING


@contextlib.contextmanager
def run_logging(file: Path, level: str) -> Iterator[None]:
    """Log into a run's own file and to stderr while the block runs.

    RecBole's ``init_logger`` calls ``logging.basicConfig``, which does nothing the second time: two runs in one process
    would share the first one's file (logger.py:118). Handlers put here are taken away again.

    Args:
        file: the log file.
        level: what the terminal shows, e.g. ``INFO``; ``DEBUG`` shows RecBole's lines too.
    """
    root = logging.getLogger()
    before = root.level
    to_file = _RunLog(file, mode="w", encoding="utf-8")
    to_file.setFormatter(_Plain("%(asctime)s %(levelname)s %(message)s"))
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(_Plain("%(message)s"))
    to_terminal.setLevel(getattr(logging, level.upper()))
    if level.upper() != "DEBUG":
        to_terminal.addFilter(_ours)
    root.setLevel(logging.DEBUG if level.upper() == "DEBUG" else logging.INFO)
    root.addHandler(to_file)
    root.addHandler(to_terminal)
    try:
        yield
    finally:
        root.removeHandler(to_file)
        root.removeHandler(to_terminal)
        to_file.close()
        root.setLevel(before)
