"""Raw files as they are published, made up: the same interactions in every format."""

from __future__ import annotations

import csv
import gzip
import json
import random
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from recbole_llm.data.item_text import read_rows

NEW_YEAR = int(datetime(2015, 1, 1, tzinfo=UTC).timestamp())
DAY = 86400

Row = tuple[str, str, float, int]


def some_rows(users: int = 14, items: int = 12, each: int = 8) -> list[Row]:
    """Interactions in an order of their own: user, item, rating, time."""
    draw = random.Random(5)
    rows = [
        (f"u{user}", f"b{item}", float(draw.randint(1, 5)), NEW_YEAR + draw.randint(0, 900) * DAY)
        for user in range(users)
        for item in draw.sample(range(items), each)
    ]
    draw.shuffle(rows)
    return rows


ROWS = some_rows()
ITEMS = sorted({item for _, item, _, _ in ROWS})
TITLES = {item: f'Lamp {item}, "The" 5\' one' for item in ITEMS}


def write_lines(path: Path, lines: list[str], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(f"{line}\n" for line in lines).encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def amazon2018(folder: Path, rows: list[Row] = ROWS, suffix: str = ".gz", core: str = "") -> str:
    reviews = [
        {"reviewerID": user, "asin": item, "overall": rating, "unixReviewTime": time, "verified": True,
         "summary": "Bright", "reviewText": f"{user} says\n{item} &amp; <b>more</b>"}
        for user, item, rating, time in rows
    ]  # fmt: skip
    items = [
        {"asin": item, "title": TITLES[item], "brand": "by\n    Lumo", "price": "$5.99",
         "category": ["Home", "Lamps, Bulbs"], "description": ["First &lt; part.", "Second"], "also_buy": ["x"]}
        for item in ITEMS
    ]  # fmt: skip
    write_lines(folder / f"Lamps{core}.json{suffix}", [json.dumps(row) for row in reviews])
    write_lines(folder / f"meta_Lamps.json{suffix}", [json.dumps(row) for row in items])
    return "Lamps"


def amazon2023(folder: Path) -> str:
    reviews = [
        {"rating": rating, "title": "Bright", "text": f"{user} says\n{item} &amp; <b>more</b>",
         "asin": f"variant of {item}", "parent_asin": item, "user_id": user,
         "timestamp": time * 1000, "verified_purchase": True}
        for user, item, rating, time in ROWS
    ]  # fmt: skip
    items = [
        {"parent_asin": item, "title": TITLES[item], "store": "Lumo", "price": 5.99, "features": ["warm", "small"],
         "categories": ["Home", "Lamps, Bulbs"], "description": ["First &lt; part.", "Second"], "details": {"a": "b"}}
        for item in ITEMS
    ]  # fmt: skip
    write_lines(folder / "Lamps.jsonl.gz", [json.dumps(row) for row in reviews])
    write_lines(folder / "meta_Lamps.jsonl.gz", [json.dumps(row) for row in items])
    return "Lamps"


def goodreads_date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%a %b %d %H:%M:%S +0000 %Y")


def goodreads(folder: Path, with_reviews: bool = True, raw: list[Row] = ROWS) -> str:
    rows = [
        {"user_id": user, "book_id": item, "review_id": f"r{number}", "is_read": True, "rating": int(rating),
         "review_text_incomplete": "", "date_added": goodreads_date(time), "read_at": ""}
        for number, (user, item, rating, time) in enumerate(raw)
    ]  # fmt: skip
    reviews = [
        {"user_id": user, "book_id": item, "rating": int(rating), "date_added": goodreads_date(time),
         "review_text": f"Bright. {user} says\n{item} &amp; <b>more</b>"}
        for user, item, rating, time in reversed(raw)
    ]  # fmt: skip
    shelves = [{"count": "9", "name": "to-read"}, {"count": "5", "name": "history"}, {"count": "2", "name": "france"}]
    books = [
        {"book_id": item, "title": TITLES[item], "description": "First &lt; part. Second", "popular_shelves": shelves,
         "publication_year": "1999", "publisher": "Knopf", "language_code": "eng"}
        for item in ITEMS
    ]  # fmt: skip
    write_lines(folder / "goodreads_interactions_history.json.gz", [json.dumps(row) for row in rows])
    write_lines(folder / "goodreads_books_history.json.gz", [json.dumps(row) for row in books])
    if with_reviews:
        write_lines(folder / "goodreads_reviews_history.json.gz", [json.dumps(row) for row in reviews])
    return "history"


def film_of(item: str) -> str:
    """Latin-1 has the accent."""
    return f'{TITLES[item]} café, "x" (1995)'


def movielens_1m(folder: Path) -> str:
    folder = folder / "ml-1m"
    ratings = [f"{user}::{item}::{rating:g}::{time}" for user, item, rating, time in ROWS]
    users = sorted({user for user, *_ in ROWS})
    write_lines(folder / "ratings.dat", ratings)
    write_lines(folder / "movies.dat", [f"{item}::{film_of(item)}::Action|Sci-Fi" for item in ITEMS], "latin-1")
    write_lines(folder / "users.dat", [f"{user}::F::25::4::10023" for user in users], "latin-1")
    return "ml-1m"


def movielens_100k(folder: Path) -> str:
    flags = "|".join(["0", "1", *["0"] * 13, "1", *["0"] * 3])
    users = sorted({user for user, *_ in ROWS})
    write_lines(folder / "u.data", [f"{user}\t{item}\t{rating:g}\t{time}" for user, item, rating, time in ROWS])
    films = [f"{item}|{film_of(item)}|01-Jan-1995||http://x|{flags}" for item in ITEMS]
    write_lines(folder / "u.item", films, "latin-1")
    write_lines(folder / "u.user", [f"{user}|25|F|writer|10023" for user in users])
    return "ml-100k"


def movielens_csv(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    ratings = [f"{user},{item},{rating},{time}" for user, item, rating, time in ROWS]
    write_lines(folder / "ratings.csv", ["userId,movieId,rating,timestamp", *ratings])
    with open(folder / "movies.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["movieId", "title", "genres"])
        writer.writerows([item, film_of(item), "Action|Sci-Fi"] for item in ITEMS)
    return "ml-latest-small"


FORMATS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "amazon2018": ("amazon2018", amazon2018),
    "amazon2018, plain 5-core": ("amazon2018", lambda folder: amazon2018(folder, suffix="", core="_5")),
    "amazon2023": ("amazon2023", amazon2023),
    "goodreads": ("goodreads", goodreads),
    "ml-1m": ("movielens", movielens_1m),
    "ml-100k": ("movielens", movielens_100k),
    "ml-latest": ("movielens", movielens_csv),
}


def words(source: str, category: str, folder: Path, output: Path, **more: Any) -> list[str]:
    """The command line."""
    settings = {"source": source, "category": category, "input": folder, "output": output, "name": "made", **more}
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def inter_of(folder: Path, *columns: str) -> list[tuple[str, ...]]:
    rows = read_rows(folder / "made.inter", columns or ("user_id", "item_id", "rating", "timestamp"))
    return [tuple(texts) for _, texts in rows]


def told(row: Row) -> tuple[str, str, str, str]:
    return row[0], row[1], f"{row[2]:g}", str(row[3])


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
