"""Reading large files of lines: gzip or plain, with progress, and an account of the lines that are broken."""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_llm.errors import UserError, nearest
from recbole_llm.progress import Steps
from recbole_llm.sources.base import BrokenLineError, Described, Interaction, RawFile, Review
from recbole_llm.sources.text import is_id

MEBIBYTE = 2**20
# Years 1 to 9999: milliseconds taken for seconds lie far behind them.
_DATES = range(-62135596800, 253402300800)
# A file whose first lines are all broken is another file than it was taken for: it is not read to its end.
ALL_BROKEN = 1000


@dataclass
class Tally:
    """The broken lines of a file.

    Attributes:
        name: of the file.
        lines: read so far, empty ones and the header left out.
        reasons: reason to the number of lines and the first of them, from 1.
    """

    name: str
    lines: int = 0
    reasons: dict[str, list[int]] = field(default_factory=dict)

    @property
    def broken(self) -> int:
        """Lines that could not be read."""
        return sum(count for count, _ in self.reasons.values())

    def add(self, reason: str, line: int) -> None:
        """Count a broken line."""
        self.reasons.setdefault(reason, [0, line])[0] += 1

    def told(self) -> str:
        """In one line."""
        parts = (
            f"{count} {reason} (line {first}{' first' if count > 1 else ''})"
            for reason, (count, first) in self.reasons.items()
        )
        return f"{self.name}: {self.broken} of {self.lines} lines are broken: {', '.join(parts)}"

    def check(self, most: float) -> None:
        """Refuse a file of which too much is broken.

        Args:
            most: share of the lines.

        Raises:
            UserError: more than that share is broken.
        """
        if self.broken > most * self.lines:
            raise UserError(f"{self.told()}; more than broken_share ({most:g}) of them")

    def as_dict(self) -> dict[str, Any]:
        """As it stands in the card."""
        reasons = {reason: {"lines": count, "first": first} for reason, (count, first) in self.reasons.items()}
        return {"lines": self.lines, "broken": self.broken, **({"reasons": reasons} if reasons else {})}


def numbered_lines(file: RawFile, what: str, show: bool = True) -> Iterator[tuple[int, bytes]]:
    """Every line of a file with its number from 1, without its end; the header is left out.

    Args:
        file: plain or gzip, told by its name.
        what: what it is read for, for the progress.
        show: whether to show progress.

    Yields:
        Number and bytes.

    Raises:
        UserError: a gzip file that is none, or that ends too early.
    """
    size = file.path.stat().st_size
    steps = Steps(f"{file.path.name}, {what}, MiB", max(size // MEBIBYTE, 1), show)
    number = 0
    try:
        with open(file.path, "rb") as raw:
            stream: Any = gzip.GzipFile(fileobj=raw) if file.path.suffix == ".gz" else raw
            while lines := stream.readlines(MEBIBYTE):
                for line in lines:
                    number += 1
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")
                    if number > 1 or not file.header:
                        yield number, line.rstrip(b"\r\n")
                for _ in range(os.lseek(raw.fileno(), 0, os.SEEK_CUR) // MEBIBYTE - steps.done):
                    steps.advance()
    except EOFError:
        raise UserError(f"{file.path} ends in the middle, after line {number}; it was not downloaded whole") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file.path}, after line {number}: no gzip file, or a damaged one ({error})") from None
    finally:
        steps.close()


def parsed_lines(
    file: RawFile, tally: Tally, what: str, show: bool = True, only: np.ndarray | None = None
) -> Iterator[tuple[int, Any]]:
    """What the lines of a file say; broken ones are counted.

    Args:
        file: the file.
        tally: counts the lines.
        what: what it is read for, for the progress.
        show: whether to show progress.
        only: numbers of lines, ascending, int64: the others are not parsed.

    Yields:
        The line's number and what ``file.parse`` made of it.

    Raises:
        UserError: as in :func:`numbered_lines`, or the first ``ALL_BROKEN`` lines are all broken.
    """
    wanted = iter(()) if only is None else iter(only.tolist())
    following = next(wanted, 0)
    for number, line in numbered_lines(file, what, show):
        if only is not None:
            if number != following:
                continue
            following = next(wanted, 0)
        if not line.strip():
            continue
        tally.lines += 1
        made, reason = _parsed(file, line)
        if reason:
            tally.add(reason, number)
            if tally.broken == tally.lines == ALL_BROKEN:
                raise UserError(f"{file.path} is no such file: {tally.told()}")
            continue
        yield number, made


def _parsed(file: RawFile, line: bytes) -> tuple[Any, str]:
    """What a line says and an empty reason, or the reason why it cannot be read."""
    try:
        made = file.parse(line.decode(file.encoding))
    except UnicodeDecodeError:
        return None, f"are no {file.encoding} text"
    except json.JSONDecodeError:
        return None, "are no JSON"
    except BrokenLineError as error:
        return None, str(error)
    except LookupError:
        return None, "lack a field"
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return None, "have a value that cannot be read"
    return made, _wrong_with(made)


def _wrong_with(made: Any) -> str:
    """Why what a line says cannot be used; empty where it can."""
    if isinstance(made, Described):
        ids: tuple[Any, ...] = (made.raw_id,)
    elif isinstance(made, Interaction | Review):
        ids = (made.user, made.item)
    else:
        raise TypeError(f"a parse should return Interaction, Described or Review, not {type(made).__name__}")
    if not all(map(is_id, ids)):
        return "have an id that is empty, no text, or has a tab in it or a space at an end"
    if isinstance(made, Interaction):
        if not math.isfinite(made.time) or math.isinf(made.rating):
            return "have a time or rating that is no number"
        if not _DATES.start <= made.time < _DATES.stop:
            return "have a time that is in no year (are these seconds since 1970?)"
    return ""


def json_object(line: str) -> dict[str, Any]:
    """A line of JSON that should be an object.

    Raises:
        BrokenLineError: it is another value, or two values; or what Python prints of a dictionary, as older files have.
        json.JSONDecodeError: it is no JSON.
    """
    if line.startswith("{'"):
        raise BrokenLineError("are no JSON but Python's dictionaries, as Amazon's editions before 2018 have")
    made = json.loads(line)
    if not isinstance(made, dict):
        raise BrokenLineError("are no JSON object")
    return made


def required(made: dict[str, Any], name: str) -> Any:
    """A field that must be there.

    Raises:
        BrokenLineError: it is missing, or null; where another field is spelled much like it, that is told.
    """
    value = made.get(name)
    if value is None:
        near = nearest(name, made, 1)
        raise BrokenLineError(f"have no {name!r}" + (f" (but {near[0]!r})" if near and near[0] != name else ""))
    return value
