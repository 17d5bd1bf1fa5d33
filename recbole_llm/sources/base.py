"""What a source of raw data is: where its files are, and how a line of each one reads."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from recbole_llm.errors import UserError, did_you_mean


class BrokenLineError(Exception):
    """A line that cannot be read; the message says why, the same for all lines that are broken in the same way."""


class Interaction(NamedTuple):
    """One row of an interactions file.

    Attributes:
        user: raw id.
        item: raw id.
        rating: NaN where the source has none.
        time: seconds since 1970, UTC.
    """

    user: str
    item: str
    rating: float
    time: float


class Described(NamedTuple):
    """What a file says of an item or a user.

    Attributes:
        raw_id: of the item or user.
        values: raw texts by column; columns that are not there are empty.
    """

    raw_id: str
    values: dict[str, str]


class Review(NamedTuple):
    """The text of a review.

    Attributes:
        user: raw id.
        item: raw id.
        text: as the file has it; empty where there is none.
    """

    user: str
    item: str
    text: str


@dataclass(frozen=True)
class RawFile:
    """A file of lines.

    Attributes:
        path: the file, plain or ``.gz``.
        parse: makes an :class:`Interaction`, :class:`Described` or :class:`Review` of a line without its end; a line
            that it cannot read raises ``BrokenLineError``, ``ValueError``, ``TypeError`` or ``LookupError``.
        encoding: of the text.
        header: whether the first line names the columns.
    """

    path: Path
    parse: Callable[[str], Any]
    encoding: str = "utf-8"
    header: bool = False


@dataclass(frozen=True)
class RawFiles:
    """The files of one category.

    Attributes:
        interactions: of :class:`Interaction`.
        items: of :class:`Described`, or ``None``.
        users: of :class:`Described`, or ``None``.
        reviews: of :class:`Review`, or ``None``. It may be the file of the interactions with another ``parse``.
    """

    interactions: RawFile
    items: RawFile | None = None
    users: RawFile | None = None
    reviews: RawFile | None = None


@dataclass(frozen=True)
class Columns:
    """How a source's texts stand in the atomic files.

    Attributes:
        item: column of the ``.item`` file to its RecBole type.
        user: column of the ``.user`` file to its RecBole type.
        title: the item column that is cut, and required under ``item_metadata: title``.
        description: the item column that describes, if there is one.
        categories: the item column of categories, the widest first, if there is one.
        category_separator: what stands between two of them, and in none of them.
        item_text: template of an item's text.
        fallback: the text of an item that has none.
    """

    item: dict[str, str]
    title: str
    item_text: str
    fallback: str
    description: str = ""
    categories: str = ""
    category_separator: str = ","
    user: dict[str, str] = field(default_factory=dict)


class Source(ABC):
    """A kind of raw files. A subclass that is registered is all that a source of one's own needs.

    Attributes:
        title: what the data is, for people.
        licence: its terms, and whom to cite.
        download: where the files are published.
        columns: see :class:`Columns`.
    """

    title: ClassVar[str]
    licence: ClassVar[str]
    download: ClassVar[str]
    columns: ClassVar[Columns]

    @abstractmethod
    def files(self, folder: Path, category: str) -> RawFiles:
        """Find the files of a category.

        Args:
            folder: where they are; it exists.
            category: as the user wrote it; may be empty.

        Raises:
            UserError: there is no such category (with the nearest), or a file is missing.
        """


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of some files that is there, each plain or as ``.gz``."""
    return find_in([folder], names)


def find_in(folders: Iterable[Path], names: Sequence[str]) -> Path | None:
    """The first of some files that is in one of some folders, each plain or as ``.gz``."""
    places = (folder / each for folder in folders for name in names for each in (f"{name}.gz", name))
    return next((path for path in places if path.is_file()), None)


def categories_in(folders: Sequence[Path], patterns: Iterable[str]) -> list[str]:
    """The categories that folders have files of.

    Args:
        folders: with raw files.
        patterns: regular expressions of file names, without ``.gz``, whose first group is the category.
    """
    names = {path.name.removesuffix(".gz") for folder in folders for path in folder.iterdir() if path.is_file()}
    matches = (re.fullmatch(pattern, name) for pattern in patterns for name in names)
    return sorted({match[1] for match in matches if match})


def refuse_category(folder: Path, category: str, known: Sequence[str], wanted: str, source: Source) -> UserError:
    """The error of a category that is not there.

    Args:
        folder: where it was looked for.
        category: as the user wrote it; may be empty.
        known: categories that are there.
        wanted: the file that is missing.
        source: for the place of the download.
    """
    if not known:
        return UserError(f"{folder} has no file of {source.title} (e.g. {wanted}); they are at {source.download}")
    there = f"{folder} has {', '.join(known)}"
    if not category:
        return UserError(f"--category=... says which of the raw files to read; {there}")
    return UserError(f"{folder} has no {wanted}{did_you_mean(category, known) or '; ' + there}")
