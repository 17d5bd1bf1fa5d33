"""MovieLens, every release: ``::`` files (1m, 10m), tab files (100k) and CSV (20m, 25m, 32m, latest)."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.sources.base import (
    BrokenLineError,
    Columns,
    Described,
    Interaction,
    RawFile,
    RawFiles,
    Source,
    find_file,
)

_RELEASES = {
    "ml-100k": "u.data", "ml-1m": "ratings.dat", "ml-10m": "ratings.dat", "ml-20m": "ratings.csv",
    "ml-25m": "ratings.csv", "ml-32m": "ratings.csv", "ml-latest": "ratings.csv", "ml-latest-small": "ratings.csv",
}  # fmt: skip
# In the order of the flags in u.item.
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
# What a release's archive calls its folder where it is not the release's name.
_FOLDERS = {"ml-10m": "ml-10M100K"}
_NO_GENRES = "(no genres listed)"
_YEAR = re.compile(r"(?P<title>.*?)\s*\((?P<year>\d{4})(?:[-–]\d{0,4})?\)\s*")


class MovieLens(Source):
    """The files of one release, in the input folder or in a folder there that has its name or its archive's.

    Columns have the names of RecBole's own copies; the year is taken out of the title. There are no descriptions and no
    reviews: genres stand in for the former, as in GLTA.
    """

    title = "MovieLens"
    licence = (
        'GroupLens (research use; no redistribution without permission). Cite F. M. Harper and J. A. Konstan, "The '
        'MovieLens Datasets: History and Context", ACM TiiS 5(4), 2015'
    )
    download = "https://grouplens.org/datasets/movielens/"
    columns = Columns(
        item={"movie_title": "token_seq", "release_year": "token", "genre": "token_seq"},
        user={"age": "token", "gender": "token", "occupation": "token", "zip_code": "token"},
        title="movie_title", item_text="{movie_title}[ ({release_year})][, {genre}]", fallback="an untitled film",
        categories="genre", category_separator=" ",
    )  # fmt: skip

    def files(self, folder: Path, category: str) -> RawFiles:
        """See :meth:`Source.files`."""
        if category not in _RELEASES:
            raise UserError(
                f"MovieLens has no release '{category}'{did_you_mean(category, _RELEASES) or ''} "
                f"({', '.join(_RELEASES)}): --category=..."
            )
        inside = (folder / category, folder / _FOLDERS.get(category, category))
        folder = next((place for place in inside if place.is_dir()), folder)
        name = _RELEASES[category]
        ratings = find_file(folder, (name,))
        if ratings is None:
            raise UserError(f"{folder} has no {name} of {category}; it is at {self.download}")
        if name == "u.data":
            return self._tabs(folder, ratings)
        # GroupLens: releases before 10m are latin-1, all others UTF-8.
        return self._csv(folder, ratings) if name.endswith(".csv") else self._colons(folder, ratings, category)

    @staticmethod
    def _tabs(folder: Path, ratings: Path) -> RawFiles:
        items, users = find_file(folder, ("u.item",)), find_file(folder, ("u.user",))
        return RawFiles(
            RawFile(ratings, _ratings(lambda line: line.split("\t"))),
            items=RawFile(items, _flagged_film, "latin-1") if items else None,
            users=RawFile(users, _user("|", ("age", "gender", "occupation", "zip_code")), "latin-1") if users else None,
        )

    @staticmethod
    def _colons(folder: Path, ratings: Path, category: str) -> RawFiles:
        encoding = "latin-1" if category == "ml-1m" else "utf-8"
        items, users = find_file(folder, ("movies.dat",)), find_file(folder, ("users.dat",))
        user = _user("::", ("gender", "age", "occupation", "zip_code"))
        return RawFiles(
            RawFile(ratings, _ratings(lambda line: line.split("::")), encoding),
            items=RawFile(items, _film(lambda line: line.split("::")), encoding) if items else None,
            users=RawFile(users, user, encoding) if users else None,
        )

    @staticmethod
    def _csv(folder: Path, ratings: Path) -> RawFiles:
        items = find_file(folder, ("movies.csv",))
        return RawFiles(
            RawFile(ratings, _ratings(lambda line: line.split(",")), header=True),
            items=RawFile(items, _film(lambda line: next(csv.reader([line], strict=True))), header=True)
            if items
            else None,
        )


def _fields(fields: list[str], count: int) -> list[str]:
    if len(fields) != count:
        raise BrokenLineError(f"have not {count} fields")
    return fields


def _ratings(split: Callable[[str], list[str]]) -> Callable[[str], Interaction]:
    def parse(line: str) -> Interaction:
        user, item, rating, time = _fields(split(line), 4)
        return Interaction(user, item, float(rating), float(int(time)))

    return parse


def _film(split: Callable[[str], list[str]]) -> Callable[[str], Described]:
    def parse(line: str) -> Described:
        try:
            raw_id, title, genres = _fields(split(line), 3)
        except csv.Error:
            raise BrokenLineError("are no CSV") from None
        listed = "" if genres.strip() == _NO_GENRES else genres.replace("|", " ")
        return Described(raw_id, {**_dated(title), "genre": listed})

    return parse


def _flagged_film(line: str) -> Described:
    fields = _fields(line.split("|"), 5 + len(_GENRES))
    genres = " ".join(genre for genre, flag in zip(_GENRES, fields[5:]) if flag == "1" and genre != "unknown")
    return Described(fields[0], {**_dated(fields[1]), "genre": genres})


def _user(separator: str, names: tuple[str, ...]) -> Callable[[str], Described]:
    def parse(line: str) -> Described:
        raw_id, *values = _fields(line.split(separator), 1 + len(names))
        return Described(raw_id, dict(zip(names, values)))

    return parse


def _dated(title: str) -> dict[str, str]:
    """``Toy Story (1995)`` as title and year; a title without a year stays whole."""
    match = _YEAR.fullmatch(title)
    if match is None or not match["title"]:
        return {"movie_title": title, "release_year": ""}
    return {"movie_title": match["title"], "release_year": match["year"]}
