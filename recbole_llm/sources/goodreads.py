"""Goodreads (UCSD Book Graph) by genre: one JSON object a line."""

from __future__ import annotations

import re
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from recbole_llm.sources.base import (
    BrokenLineError,
    Columns,
    Described,
    Interaction,
    RawFile,
    RawFiles,
    Review,
    Source,
    categories_in,
    find_file,
    refuse_category,
)
from recbole_llm.sources.lines import json_object, required
from recbole_llm.sources.text import flat

_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
# "Wed Mar 22 11:37:04 -0700 2017"; strptime would read the names of days and months in the user's language.
_DATE = re.compile(r"\w{3} (\w{3}) (\d\d) (\d\d):(\d\d):(\d\d) ([+-])(\d\d)(\d\d) (\d{1,4})")
# Shelves that say what a reader does with a book, and nothing of the book.
_READING = re.compile(r"read|\bown|wish|favou?rite|library|\bbook|kindle|default|audio|shel|finish|abandon|dnf")
SHELVES = 5


class Goodreads(Source):
    """Files ``goodreads_interactions_GENRE.json.gz``, and ``goodreads_books_``, ``goodreads_reviews_`` likewise.

    The time is ``date_added``, when the user put the book on a shelf: the other dates are mostly empty. A rating of 0
    says that there is none, so ``min_rating: 1`` leaves out what was shelved only. Without the file of reviews the
    beginnings that the interactions have are taken. ``categories`` are the most frequent shelves that are no list of
    what to read.
    """

    title = "Goodreads (UCSD Book Graph)"
    licence = (
        'academic use, no redistribution. Cite M. Wan and J. McAuley, "Item Recommendation on Monotonic Behavior '
        'Chains", RecSys 2018, and M. Wan, R. Misra, N. Nakashole and J. McAuley, "Fine-Grained Spoiler Detection from '
        'Large-Scale Review Corpora", ACL 2019'
    )
    download = "https://cseweb.ucsd.edu/~jmcauley/datasets/goodreads.html"
    columns = Columns(
        item={
            "title": "token_seq", "publication_year": "token", "categories": "token_seq", "description": "token_seq",
            "publisher": "token_seq", "language": "token",
        },
        title="title", description="description", categories="categories",
        item_text="{title}[ ({publication_year})][ categories: {categories};][ {description}]",
        fallback="an untitled book",
    )  # fmt: skip

    def files(self, folder: Path, category: str) -> RawFiles:
        """See :meth:`Source.files`."""
        found = find_file(folder, (f"goodreads_interactions_{category}.json",)) if category else None
        if found is None:
            known = categories_in([folder], (r"goodreads_interactions_(.+)\.json",))
            wanted = f"goodreads_interactions_{category or 'history_biography'}.json.gz"
            raise refuse_category(folder, category, known, wanted, self)
        books = find_file(folder, (f"goodreads_books_{category}.json",))
        reviews = find_file(folder, (f"goodreads_reviews_{category}.json",))
        return RawFiles(
            RawFile(found, self._interaction),
            items=RawFile(books, self._item) if books else None,
            reviews=RawFile(reviews or found, self._review),
        )

    @staticmethod
    def _interaction(line: str) -> Interaction:
        made = json_object(line)
        rating = float(required(made, "rating"))
        return Interaction(
            str(required(made, "user_id")),
            str(required(made, "book_id")),
            rating,
            seconds(required(made, "date_added")),
        )

    @staticmethod
    def _review(line: str) -> Review:
        made = json_object(line)
        text = made.get("review_text", made.get("review_text_incomplete"))
        return Review(str(required(made, "user_id")), str(required(made, "book_id")), flat(text))

    @staticmethod
    def _item(line: str) -> Described:
        made = json_object(line)
        return Described(
            str(required(made, "book_id")),
            {
                "title": flat(made.get("title")),
                "publication_year": flat(made.get("publication_year")),
                "categories": ", ".join(_shelves(made.get("popular_shelves"))),
                "description": flat(made.get("description")),
                "publisher": flat(made.get("publisher")),
                "language": flat(made.get("language_code")),
            },
        )


def _shelves(listed: Any) -> list[str]:
    """The most frequent shelves that say what a book is; the file has them by frequency."""
    names = [flat(shelf.get("name")) for shelf in listed if isinstance(shelf, dict)] if isinstance(listed, list) else []
    return [name for name in names if name and not _READING.search(name)][:SHELVES]


def seconds(date: str) -> float:
    """A date such as ``Wed Mar 22 11:37:04 -0700 2017`` in seconds since 1970.

    Raises:
        BrokenLineError: it is no such date.
    """
    match = _DATE.fullmatch(date)
    if match is None or match[1] not in _MONTHS:
        raise BrokenLineError("have a date that cannot be read")
    day, hour, minute, second = (int(match[place]) for place in (2, 3, 4, 5))
    offset = timedelta(hours=int(match[7]), minutes=int(match[8])) * (-1 if match[6] == "-" else 1)
    zone = timezone(offset)
    return datetime(int(match[9]), _MONTHS.index(match[1]) + 1, day, hour, minute, second, tzinfo=zone).timestamp()
