"""``recbole-llm prepare --source``: raw files as they are published, filters, texts, broken lines, the card."""

from __future__ import annotations

import csv
import fcntl
import gzip
import json
import os
import random
import resource
import subprocess
import tracemalloc
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, SHARED
from hypothesis import example, given
from hypothesis import strategies as st

from recbole_llm.cli import main
from recbole_llm.config import Config
from recbole_llm.data.item_text import read_columns, read_rows
from recbole_llm.errors import DiskFullError, UserError
from recbole_llm.schema import properties_dir, read_specs, read_yaml
from recbole_llm.sources import base, filters
from recbole_llm.sources.amazon import Amazon2018
from recbole_llm.sources.filters import Rows, k_core, one_of_each
from recbole_llm.sources.goodreads import seconds
from recbole_llm.sources.prepare import prepare_source
from recbole_llm.sources.registry import SOURCES
from recbole_llm.sources.settings import read_settings
from recbole_llm.sources.text import clean
from recbole_llm.training.language import read_item_text
from recbole_llm.training.pipeline import prepared
from recbole_llm.training.task_texts import read_task_texts

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
        {"asin": item, "title": TITLES[item], "brand": "by\n    Lumo", "price": "$5.99", "category": ["Home", "Lamps"],
         "description": ["First &lt; part.", "Second"], "also_buy": ["x"]}
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
         "categories": ["Home", "Lamps"], "description": ["First &lt; part.", "Second"], "details": {"a": "b"}}
        for item in ITEMS
    ]  # fmt: skip
    write_lines(folder / "Lamps.jsonl.gz", [json.dumps(row) for row in reviews])
    write_lines(folder / "meta_Lamps.jsonl.gz", [json.dumps(row) for row in items])
    return "Lamps"


def goodreads_date(time: int) -> str:
    return datetime.fromtimestamp(time, UTC).strftime("%a %b %d %H:%M:%S +0000 %Y")


def goodreads(folder: Path, with_reviews: bool = True) -> str:
    rows = [
        {"user_id": user, "book_id": item, "review_id": f"r{number}", "is_read": True, "rating": int(rating),
         "review_text_incomplete": "", "date_added": goodreads_date(time), "read_at": ""}
        for number, (user, item, rating, time) in enumerate(ROWS)
    ]  # fmt: skip
    reviews = [
        {"user_id": user, "book_id": item, "rating": int(rating), "date_added": goodreads_date(time),
         "review_text": f"Bright. {user} says\n{item} &amp; <b>more</b>"}
        for user, item, rating, time in reversed(ROWS)
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


# --- formats ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_is_read_whole(form: str, tmp_path: Path) -> None:
    source, write = FORMATS[form]
    category = write(tmp_path / "raw")
    prepare_source(words(source, category, tmp_path / "raw", tmp_path / "out", user_core=1, item_core=1))
    made = tmp_path / "out" / "made"
    assert inter_of(made) == [told(row) for row in ROWS]
    card = json.loads((made / "stats.json").read_text())
    lengths = Counter(user for user, *_ in ROWS)
    assert (card["users"], card["items"], card["interactions"]) == (len(lengths), len(ITEMS), len(ROWS))
    assert card["mean_length"] == pytest.approx(len(ROWS) / len(lengths), abs=1e-3)
    assert card["density"] == pytest.approx(len(ROWS) / len(lengths) / len(ITEMS), rel=1e-3)
    assert {name for name in ("made.inter", "made.item", "made.yaml", "README.md")} <= set(os.listdir(made))
    assert all(lines["broken"] == 0 and lines["lines"] for lines in card["lines"].values())


@pytest.mark.parametrize("form", ["amazon2018", "amazon2023", "goodreads"])
def test_texts_of_shops(form: str, tmp_path: Path) -> None:
    source, write = FORMATS[form]
    prepare_source(words(source, write(tmp_path / "raw"), tmp_path / "raw", tmp_path / "out"))
    made = tmp_path / "out" / "made"
    expected = [f"Bright. {user} says {item} & more" for user, item, *_ in ROWS]
    assert inter_of(made, "review") == [(text,) for text in expected]
    shop = {item: (TITLES[item], "history, france" if source == "goodreads" else "Home, Lamps", "First < part. Second")
            for item in ITEMS}  # fmt: skip
    assert read_columns(made / "made.item", "item_id", ["title", "categories", "description"]) == shop
    if source != "goodreads":
        assert set(read_columns(made / "made.item", "item_id", ["brand", "price"]).values()) in (
            {("Lumo", "$5.99")},
            {("Lumo", "5.99")},
        )
    card = json.loads((made / "stats.json").read_text())
    assert card["texts"]["review"]["share"] == 1 and card["texts"]["description"]["mean_words"] == 4


@pytest.mark.parametrize("form", ["ml-1m", "ml-100k", "ml-latest"])
def test_texts_of_films(form: str, tmp_path: Path) -> None:
    source, write = FORMATS[form]
    prepare_source(words(source, write(tmp_path / "raw"), tmp_path / "raw", tmp_path / "out"))
    made = tmp_path / "out" / "made"
    films = {item: (film_of(item).removesuffix(" (1995)"), "1995", "Action Sci-Fi") for item in ITEMS}
    assert read_columns(made / "made.item", "item_id", ["movie_title", "release_year", "genre"]) == films
    if form == "ml-latest":
        assert not (made / "made.user").exists()
    else:
        users = read_columns(made / "made.user", "user_id", ["age", "gender", "occupation", "zip_code"])
        job = "4" if form == "ml-1m" else "writer"
        assert users == {user: ("25", "F", job, "10023") for user, *_ in ROWS}


def test_years_in_titles(tmp_path: Path) -> None:
    films = {
        "b1": ("M*A*S*H (a.k.a. MASH) (1970)", "M*A*S*H (a.k.a. MASH)", "1970"),
        "b2": ("Babylon 5", "Babylon 5", ""),
        "b3": ("(500) Days (2009–2010)", "(500) Days", "2009"),
        "b4": ("(1984)", "(1984)", ""),
    }
    write_lines(tmp_path / "ratings.csv", ["h", *(f"u,{item},1,{NEW_YEAR}" for item in films)])
    rows = [f"{item},{title},(no genres listed)" for item, (title, *_) in films.items()]
    write_lines(tmp_path / "movies.csv", ["h", *rows])
    prepare_source(words("movielens", "ml-20m", tmp_path, tmp_path / "out", user_core=1, item_core=1))
    found = read_columns(tmp_path / "out/made/made.item", "item_id", ["movie_title", "release_year", "genre"])
    assert found == {item: (title, year, "") for item, (_, title, year) in films.items()}


def test_goodreads_dates() -> None:
    # What `date -ud ... +%s` says.
    assert seconds("Wed Mar 22 11:37:04 -0700 2017") == 1490207824
    for wrong in ("", "Wed Mar 22 2017", "Wed Mrz 22 11:37:04 -0700 2017"):
        with pytest.raises(base.BrokenLineError):
            seconds(wrong)


def test_goodreads_without_the_file_of_reviews(tmp_path: Path) -> None:
    category = goodreads(tmp_path / "raw", with_reviews=False)
    prepare_source(words("goodreads", category, tmp_path / "raw", tmp_path / "out"))
    card = json.loads((tmp_path / "out/made/stats.json").read_text())
    assert card["texts"]["review"]["filled"] == 0 and card["texts"]["review"]["of"] == len(ROWS)


def test_all_reviews_go_before_the_published_core(tmp_path: Path) -> None:
    amazon2018(tmp_path, core="_5", rows=ROWS[:20])
    amazon2018(tmp_path)
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", user_core=1, item_core=1))
    assert len(inter_of(tmp_path / "out/made")) == len(ROWS)


def test_rows_of_amazon_that_are_pieces_of_pages(tmp_path: Path) -> None:
    items = [
        {"asin": "b0", "title": "var aPageStart = (new Date()).getTime();", "price": ".a-box-inner{color:red}"},
        {"asin": "b1", "title": "<span>Lamp</span>&nbsp;<script>var a=1</script>3&quot; <3", "description": {"x": 1}},
        {"asin": "b1", "title": "a second row"},
        {"asin": "b2", "title": None, "description": "text"},
    ]
    rows = [(f"u{number}", f"b{number % 3}", 5.0, NEW_YEAR) for number in range(6)]
    amazon2018(tmp_path, rows)
    write_lines(tmp_path / "meta_Lamps.json.gz", [json.dumps(item) for item in items])
    common = {"user_core": 1, "item_core": 1}
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", item_metadata="row", **common))
    found = read_columns(tmp_path / "out/made/made.item", "item_id", ["title", "description", "price"])
    assert found == {"b0": ("", "", ""), "b1": ('Lamp 3" <3', "", ""), "b2": ("", "text", "")}
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", overwrite="true", **common))
    assert {item for item, *_ in inter_of(tmp_path / "out/made", "item_id")} == {"b1"}


# --- filters ---------------------------------------------------------------------------------------------------------
def rows_of(pairs: list[tuple[int, int, int]]) -> Rows:
    users, items, times = (
        (np.array(column, dtype=np.int32) for column in zip(*pairs)) if pairs else [np.zeros(0, int)] * 3
    )
    count = np.arange(len(pairs))
    return Rows(users, items, np.ones(len(pairs)), times.astype(np.float64), count)


PAIRS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 5), st.integers(0, 3)), max_size=50)


@given(pairs=PAIRS, user_core=st.integers(1, 4), item_core=st.integers(1, 4))
def test_k_core_is_what_removing_one_at_a_time_leaves(
    pairs: list[tuple[int, int, int]], user_core: int, item_core: int
) -> None:
    rows = rows_of(pairs)
    left = set(range(len(pairs)))
    while True:
        users, items = (Counter(pairs[row][place] for row in left) for place in (0, 1))
        poor = [row for row in left if users[pairs[row][0]] < user_core or items[pairs[row][1]] < item_core]
        if not poor:
            break
        left.remove(max(poor))
    assert set(np.flatnonzero(k_core(rows.users, rows.items, user_core, item_core)).tolist()) == left


@given(pairs=PAIRS, which=st.sampled_from(["first", "last"]))
def test_one_row_of_each_pair_stays(pairs: list[tuple[int, int, int]], which: str) -> None:
    best: dict[tuple[int, int], int] = {}
    for row, (user, item, time) in enumerate(pairs):
        kept = best.get((user, item))
        if kept is None or (time < pairs[kept][2] if which == "first" else time >= pairs[kept][2]):
            best[user, item] = row
    assert set(np.flatnonzero(one_of_each(rows_of(pairs), which)).tolist()) == set(best.values())


def test_filters_in_their_order(tmp_path: Path) -> None:
    """A repeat does not count for the core, nor does an item without metadata; the window comes before both."""
    rows = [
        ("u1", "b0", 5.0, 3), ("u1", "b0", 5.0, 1), ("u1", "b1", 5.0, 2), ("u2", "b0", 4.0, 3), ("u2", "b1", 4.0, 3),
        ("u3", "b0", 4.0, 3), ("u3", "zz", 4.0, 3), ("u4", "b0", 2.0, 3), ("u4", "b1", 5.0, 3), ("u5", "b0", 5.0, 400),
        ("u5", "b1", 5.0, 3),
    ]  # fmt: skip
    amazon2018(tmp_path, [(user, item, rating, NEW_YEAR + day * DAY) for user, item, rating, day in rows])
    prepare_source(
        words(
            "amazon2018",
            "Lamps",
            tmp_path,
            tmp_path / "out",
            user_core=2,
            item_core=2,
            min_rating=3,
            until="2015-12-31",
        )
    )
    kept = [(user, item, f"{rating:g}", str(NEW_YEAR + day * DAY)) for user, item, rating, day in (*rows[1:5],)]
    assert inter_of(tmp_path / "out/made") == kept
    card = json.loads((tmp_path / "out/made/stats.json").read_text())
    assert [step["interactions"] for step in card["filters"]] == [11, 10, 9, 8, 7, 4]
    prepare_source(
        words(
            "amazon2018",
            "Lamps",
            tmp_path,
            tmp_path / "out",
            user_core=2,
            item_core=2,
            repeats="last",
            overwrite="true",
        )
    )
    assert told((*rows[0][:3], NEW_YEAR + 3 * DAY)) in inter_of(tmp_path / "out/made")
    everything = {"repeats": "all", "item_metadata": "none", "overwrite": "true", "user_core": 2, "item_core": 2}
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", **everything))
    # Without the filter of metadata the item is out as it has one row, and u3 with it.
    assert len(inter_of(tmp_path / "out/made")) == 9


@pytest.mark.parametrize(
    ("latest", "months", "first"),
    [("2018-10-02", 48, "2014-10-02"), ("2017-03-31", 1, "2017-02-28"), ("2016-02-29", 12, "2015-02-28")],
)
def test_the_window_of_months(latest: str, months: int, first: str) -> None:
    last, low = (datetime.fromisoformat(f"{day}T00:00:00+00:00").timestamp() for day in (latest, first))
    rows = rows_of([(0, 0, 0), (0, 1, 0), (0, 2, 0)])
    rows.times[:] = [low - 1, low, last]
    settings = {"min_rating": None, "since": None, "until": None, "months": months, "repeats": "all",
                "item_metadata": "none", "user_core": 1, "item_core": 1}  # fmt: skip
    kept, _ = filters.filtered(rows, np.zeros(3), settings)
    assert kept.items.tolist() == [1, 2]


def test_equal_titles_become_one_item_where_asked_for(tmp_path: Path) -> None:
    rows = [(user, item, 5.0, NEW_YEAR) for user, item in (("u1", "b0"), ("u1", "b1"), ("u2", "b1"), ("u2", "b2"))]
    amazon2018(tmp_path, rows)
    titles = {"b0": "A long title, red", "b1": "A  long title,&nbsp;blue", "b2": "Another"}
    write_lines(tmp_path / "meta_Lamps.json.gz", [json.dumps({"asin": a, "title": t}) for a, t in titles.items()][::-1])
    common = {"user_core": 1, "item_core": 1, "title_length": 13}
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", **common))
    assert [item for (item,) in inter_of(tmp_path / "out/made", "item_id")] == ["b0", "b1", "b1", "b2"]
    assert read_columns(tmp_path / "out/made/made.item", "item_id", ["title"])["b1"] == ("A long title,",)
    prepare_source(
        words("amazon2018", "Lamps", tmp_path, tmp_path / "out", merge_titles="true", overwrite="true", **common)
    )
    # u1's two interactions are one now.
    assert inter_of(tmp_path / "out/made", "user_id", "item_id") == [("u1", "b0"), ("u2", "b0"), ("u2", "b2")]
    assert set(read_columns(tmp_path / "out/made/made.item", "item_id", ["title"])) == {"b0", "b2"}


def test_reviews_of_items_that_are_one(tmp_path: Path) -> None:
    goodreads(tmp_path)
    books = [{"book_id": item, "title": "one and the same"} for item in ITEMS]
    write_lines(tmp_path / "goodreads_books_history.json.gz", [json.dumps(book) for book in books])
    reviews = [{"user_id": "u3", "book_id": item, "review_text": f"of {item}"} for item in ITEMS]
    write_lines(tmp_path / "goodreads_reviews_history.json.gz", [json.dumps(review) for review in reviews])
    prepare_source(
        words("goodreads", "history", tmp_path, tmp_path / "out", merge_titles="true", user_core=1, item_core=1)
    )
    said = dict(inter_of(tmp_path / "out/made", "user_id", "review"))
    assert {user: text for user, text in said.items() if text} == {"u3": f"of {ITEMS[0]}"}


# --- texts -----------------------------------------------------------------------------------------------------------
ANY = st.text(st.characters(), max_size=40)


@given(texts=st.lists(st.tuples(ANY, ANY, ANY), min_size=1, max_size=4))
@example(
    texts=[
        ('"Great\tLanterns" Cats\r\n', "NA", "a &amp;amp; b &lt;i&gt; \x00\x85\u2028\ud800 I <3 x<y"),
        ("'", "\ufeff", "#"),
    ]
)
def test_what_is_read_back_is_the_cleaned_text(
    tmp_path_factory: pytest.TempPathFactory, texts: list[tuple[str, str, str]]
) -> None:
    folder = tmp_path_factory.mktemp("texts")
    reviews = [{"reviewerID": "u", "asin": f"b{place}", "overall": 1, "unixReviewTime": 1, "reviewText": review}
               for place, (_, _, review) in enumerate(texts)]  # fmt: skip
    items = [
        {"asin": f"b{place}", "title": title, "description": [about]} for place, (title, about, _) in enumerate(texts)
    ]
    write_lines(folder / "X.json", [json.dumps(row) for row in reviews])
    write_lines(folder / "meta_X.json", [json.dumps(row) for row in items])
    common = {"user_core": 1, "item_core": 1, "item_metadata": "none"}
    prepare_source(words("amazon2018", "X", folder, folder / "out", **common))
    made = folder / "out/made"
    found = read_columns(made / "made.item", "item_id", ["title", "description"])
    for place, (title, about, _) in enumerate(texts):
        assert found[f"b{place}"] == (clean(title) if "getTime" not in title else "", clean(about))
    assert [text for (text,) in inter_of(made, "review")] == [clean(review) for _, _, review in texts]


@given(text=ANY)
def test_a_cleaned_text_is_one_line_and_loses_nothing_but_space(text: str) -> None:
    made = clean(text)
    assert len(made.splitlines()) <= 1 and "\t" not in made and made == made.strip()
    made.encode()
    if not set(text) & set("&<"):
        assert clean(made) == made
        kept = [character for character in text if character.isprintable() and character != " "]
        assert [
            character for character in made if character.isprintable() and character not in " "
        ] == kept or "\ufffd" in made


@pytest.mark.parametrize(
    ("text", "made"),
    [
        ("<p class='x' id=7>Tom &amp; <BR/>Jerry</p >", "Tom & Jerry"),
        ("I <3 it: a <b and c> d, x<y", "I <3 it: a <b and c> d, x<y"),
        ('a<!-- b --> c<style>d</style> e<script type="x">f', "a c e"),
        ("Caf\u00e9\u00a0&quot;5&#39; 6&quot;", 'Caf\u00e9 "5\' 6"'),
        ("&lt;b&gt;bold&lt;/b&gt;", "bold"),
    ],
)
def test_html(text: str, made: str) -> None:
    assert clean(text) == made


# --- broken lines ----------------------------------------------------------------------------------------------------
def test_broken_lines_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amazon2018(tmp_path, suffix="")
    whole = (tmp_path / "Lamps.json").read_bytes().splitlines()
    good = json.loads(whole[0])
    broken = [
        whole[0][:40], b"[1, 2]", json.dumps({**good, "overall": None}).encode(), b'{"reviewerID": "\xff"}',
        json.dumps({**good, "reviewerID": "a b\tc"}).encode(), json.dumps({**good, "overall": "many"}).encode(),
        json.dumps({**good, "asin": 7}).encode(), b"", json.dumps({**good, "unixReviewTime": float("nan")}).encode(),
        json.dumps({"Overall": 5, **{k: v for k, v in good.items() if k != "overall"}}).encode(), whole[1][:-1],
    ]  # fmt: skip
    (tmp_path / "Lamps.json").write_bytes(b"\n".join([*whole[:3], *broken, *whole[3:]]))
    arguments = words("amazon2018", "Lamps", tmp_path, tmp_path / "out", broken_share=0.5, user_core=1, item_core=1)
    prepare_source(arguments)
    assert inter_of(tmp_path / "out/made") == [told(row) for row in ROWS]
    lines = json.loads((tmp_path / "out/made/stats.json").read_text())["lines"]["Lamps.json"]
    assert lines == {"lines": len(ROWS) + 10, "broken": 10, "reasons": {
        "are no JSON": {"lines": 2, "first": 4}, "are no JSON object": {"lines": 1, "first": 5},
        "have no 'overall'": {"lines": 1, "first": 6}, "are no utf-8 text": {"lines": 1, "first": 7},
        "have an id that is empty or holds white space": {"lines": 2, "first": 8},
        "have a value that cannot be read": {"lines": 1, "first": 9},
        "have a time or rating that is no number": {"lines": 1, "first": 12},
        "have no 'overall' (but 'Overall')": {"lines": 1, "first": 13},
    }}  # fmt: skip
    assert "Lamps.json: 10 of 122 lines are broken: 2 are no JSON (line 4 first), 1" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"more than broken_share \(0.01\)") as error:
        prepare_source([*arguments[:-3], "--overwrite=true"])
    assert "\n" not in str(error.value)
    # What was there before stays.
    assert inter_of(tmp_path / "out/made") == [told(row) for row in ROWS]
    assert os.listdir(tmp_path / "out") == ["made"]


def test_broken_metadata_and_users(tmp_path: Path) -> None:
    movielens_1m(tmp_path)
    for name in ("movies.dat", "users.dat"):
        with open(tmp_path / "ml-1m" / name, "ab") as file:
            file.write(b"5::too few\n")
    prepare_source(words("movielens", "ml-1m", tmp_path, tmp_path / "out", broken_share=0.2))
    lines = json.loads((tmp_path / "out/made/stats.json").read_text())["lines"]
    assert lines["movies.dat"]["reasons"] == {"have not 3 fields": {"lines": 1, "first": len(ITEMS) + 1}}
    assert lines["users.dat"]["broken"] == 1 and lines["ratings.dat"]["broken"] == 0


def test_another_kind_of_file_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recbole_llm.sources.lines.ALL_BROKEN", 5)
    amazon2018(tmp_path)
    # The edition of 2014 is Python, not JSON.
    write_lines(tmp_path / "Lamps.json.gz", ["{'reviewerID': 'u'}"] * 9)
    with pytest.raises(UserError, match=r"Lamps.json.gz is no such file: .* 5 of 5 lines .* no JSON \(line 1 first\)"):
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", broken_share=1))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-30], "ends in the middle"),
        (lambda data: b"plain text\n", "no gzip file"),
        (lambda data: data[:60] + bytes(40) + data[100:], "damaged|no gzip file|ends in the middle"),
        (lambda data: gzip.compress(b""), "no interaction"),
    ],
)
def test_a_damaged_download(tmp_path: Path, damage: Callable[[bytes], bytes], says: str) -> None:
    amazon2018(tmp_path)
    path = tmp_path / "Lamps.json.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=says) as error:
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out"))
    assert "Lamps.json.gz" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


# --- whole or not at all ---------------------------------------------------------------------------------------------
def test_a_second_call_writes_the_same_bytes(tmp_path: Path) -> None:
    goodreads(tmp_path / "a")
    goodreads(tmp_path / "b")
    for name in ("a", "b"):
        prepare_source(words("goodreads", "history", tmp_path / name, tmp_path / name / "out"))
    first = bytes_of(tmp_path / "a/out/made")
    assert first == bytes_of(tmp_path / "b/out/made")
    prepare_source(words("goodreads", "history", tmp_path / "a", tmp_path / "a/out", overwrite="true"))
    assert first == bytes_of(tmp_path / "a/out/made")
    assert set(first) == {"made.inter", "made.item", "made.yaml", "stats.json", "README.md"}


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    arguments = words("amazon2018", "Lamps", tmp_path, tmp_path / "out")
    prepare_source(arguments)
    before = bytes_of(tmp_path / "out/made")
    with pytest.raises(UserError, match="is there already; --overwrite=true"):
        prepare_source(arguments)
    (tmp_path / "out/made/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds notes\.txt"):
        prepare_source([*arguments, "--overwrite=true"])
    (tmp_path / "out/made/notes.txt").unlink()
    assert bytes_of(tmp_path / "out/made") == before


def test_a_failure_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    amazon2018(tmp_path)
    arguments = words("amazon2018", "Lamps", tmp_path, tmp_path / "out")
    prepare_source(arguments)
    before = bytes_of(tmp_path / "out/made")

    def fails(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("recbole_llm.sources.prepare.readme_text", fails)
    with pytest.raises(KeyboardInterrupt):
        prepare_source([*arguments, "--overwrite=true"])
    assert bytes_of(tmp_path / "out/made") == before
    assert os.listdir(tmp_path / "out") == ["made"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    (tmp_path / "out").mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        with pytest.raises(DiskFullError, match=r"out/made: file too large; make room or set --output") as error:
            prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(error.value)
    assert not os.listdir(tmp_path / "out")


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    with pytest.raises(UserError, match=r"Lamps\.json\.gz: (file exists|not a directory)$"):
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "Lamps.json.gz"))


def test_one_at_a_time(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    part = tmp_path / "out/.made.part"
    part.mkdir(parents=True)
    (part / "left").write_text("of a killed one")
    descriptor = os.open(part, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with pytest.raises(UserError, match="another prepare is writing"):
            prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out"))
        assert (part / "left").exists()
    finally:
        os.close(descriptor)
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out"))
    assert os.listdir(tmp_path / "out") == ["made"]
    assert "left" not in os.listdir(tmp_path / "out/made")


# --- mistakes --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"source": "amazon2081"}, "unknown source 'amazon2081'; did you mean 'amazon2018'"),
        ({"source": "nowhere:Mine"}, "no module 'nowhere'"),
        ({"source": "recbole_llm.errors:UserError"}, "no class UserError"),
        ({"source": ""}, "unknown source ''"),
        ({"category": "Lamp"}, "has no Lamp.json.gz; did you mean 'Lamps'?"),
        ({"category": None}, "--category=... says which of the raw files to read; "),
        ({"source": "amazon2023"}, "has no file of Amazon reviews 2023 (e.g. Lamps.jsonl.gz); they are at https://"),
        ({"source": "goodreads"}, "has no file of Goodreads"),
        ({"source": "movielens"}, "MovieLens has no release 'Lamps' (ml-100k, "),
        ({"source": "movielens", "category": "ml1m"}, "did you mean 'ml-1m'"),
        ({"source": "movielens", "category": "ml-1m"}, "has no ratings.dat of ml-1m"),
        ({"input": "no/such"}, "no/such is no folder"),
        ({"input": None}, "--input=DIR"),
        ({"preset": "lcrek"}, "unknown preset 'lcrek'; did you mean 'lcrec'"),
        ({"preset": "lcrec", "source": "movielens", "category": "ml-1m"}, "lcrec is of --source=amazon2018"),
        ({"user_kore": 5}, "unknown setting 'user_kore' of prepare --source; did you mean 'user_core'"),
        ({"user_core": 0}, "user_core should be int >= 1, but is 0"),
        ({"repeats": "some"}, "repeats should be str: first | last | all"),
        ({"since": "2015-13-01"}, "since should be a day, YYYY-MM-DD"),
        ({"broken_share": 2}, "broken_share should be float 0..1"),
        ({"user_core": 99}, "no interaction is left: user_core 99, item_core 5 takes the last 112 of 112"),
        ({"name": "../x"}, "name should be letters"),
        ({"name": "ml-100k"}, "RecBole reads its own copy"),
    ],
)
def test_a_mistake_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    amazon2018(tmp_path)
    settings = {
        "source": "amazon2018",
        "category": "Lamps",
        "input": tmp_path,
        "output": tmp_path / "out",
        "name": "made",
    }
    arguments = [f"--{key}={value}" for key, value in (settings | change).items() if value is not None]
    assert main(["prepare", *arguments]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and says in said[0]
    assert not (tmp_path / "out/made").exists()


def test_other_mistakes(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    for wrong, says in (("--user_core=5", "given twice"), ("user_core", "is not understood")):
        with pytest.raises(UserError, match=says):
            prepare_source([*words("amazon2018", "Lamps", tmp_path, tmp_path / "out", user_core=5), wrong])
    (tmp_path / "meta_Lamps.json.gz").unlink()
    with pytest.raises(UserError, match=r"no metadata of Lamps .* --item_metadata=none"):
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out"))
    prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", item_metadata="none"))
    assert not (tmp_path / "out/made/made.item").exists()
    (tmp_path / "out/file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", name="file", item_metadata="none"))


# --- presets and the card --------------------------------------------------------------------------------------------
PRESETS = [path.stem for path in (properties_dir() / "sources").glob("*.yaml") if path.stem != "overall"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_settings_that_fit(preset: str) -> None:
    folder = properties_dir() / "sources"
    values, specs = read_yaml(folder / f"{preset}.yaml"), read_specs(folder / "overall.yaml")
    assert set(values["sources"]) <= set(SOURCES)
    own = {key: value for key, value in values.items() if key not in ("sources", "published", "by_category")}
    for settings in (own, *values.get("by_category", {}).values()):
        assert all(key in specs and specs[key].allows(value) for key, value in settings.items())
    # density = interactions / (users * items), mean length = interactions / users: the paper's figures agree.
    for figures in values["published"].values():
        for key, per in (("density", figures["users"] * figures["items"]), ("mean_length", figures["users"])):
            if key in figures and "interactions" in figures:
                assert figures[key] == pytest.approx(figures["interactions"] / per, rel=2e-3)


def test_what_lies_under_the_command_line() -> None:
    def settings(*more: str) -> dict[str, Any]:
        return read_settings(["--source=amazon2018", *more]).values

    assert (settings()["user_core"], settings()["months"]) == (5, None)
    toys = settings("--preset=tca4rec", "--category=Toys_and_Games")
    assert (toys["user_core"], toys["months"], toys["title_length"], toys["repeats"]) == (10, 48, 50, "all")
    office = settings("--preset=tca4rec", "--category=Office_Products", "--user_core=3")
    assert (office["months"], office["user_core"]) == (None, 3)


def test_the_card_stands_beside_the_papers_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amazon2018(tmp_path)
    for name in ("Lamps.json.gz", "meta_Lamps.json.gz"):
        (tmp_path / name).rename(tmp_path / name.replace("Lamps", "Video_Games"))
    arguments = words("amazon2018", "Video_Games", tmp_path, tmp_path / "out", preset="lcrec", name=None)
    assert main(["prepare", *arguments]) == 0
    shown = capsys.readouterr().out
    made = tmp_path / "out/amazon2018-video-games-lcrec"
    card = json.loads((made / "stats.json").read_text())
    assert card["published"]["users"] == {"here": 14, "paper": 50546, "deviation": round(14 / 50546 - 1, 4)}
    assert "users                         14        50,546     -99.97%" in shown
    assert shown.splitlines()[2] in (made / "README.md").read_text()
    assert f"--dataset=amazon2018-video-games-lcrec --data_path={tmp_path / 'out'}" in shown


# --- a source of one's own -------------------------------------------------------------------------------------------
OWN = """
from recbole_llm.sources.base import Columns, Described, Interaction, RawFile, RawFiles, Review, Source

PARSED = []

def review(line):
    PARSED.append(line)
    return Review(*line.split("|")[:2], line)

class Mine(Source):
    title, licence, download = "Mine", "mine", "nowhere"
    columns = Columns(item={"title": "token_seq"}, title="title", item_text="{title}", fallback="nothing")

    def files(self, folder, category):
        def row(line):
            user, item, time = line.split("|")
            return Interaction(user, item, float("nan"), float(time))

        path = folder / f"{category}.txt"
        return RawFiles(RawFile(path, row), RawFile(folder / "t.txt", lambda line: Described(line, {"title": line})),
                        reviews=RawFile(path, review))
"""


def test_a_source_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_source.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    write_lines(tmp_path / "x.txt", [f"{user}|{item}|{time}" for user, item, _, time in ROWS] + ["u0|rare|1.25"])
    write_lines(tmp_path / "t.txt", [*ITEMS, "rare"])
    prepare_source(words("my_source:Mine", "x", tmp_path, tmp_path / "out"))
    # No ratings, so no such column; reviews are parsed for the rows that stay, no others.
    made = inter_of(tmp_path / "out/made", "user_id", "item_id", "timestamp", "review")
    assert made == [(user, item, str(time), f"{user}|{item}|{time}") for user, item, _, time in ROWS]
    import my_source

    assert len(my_source.PARSED) == len(ROWS)
    assert "rating" not in (tmp_path / "out/made/made.inter").read_text().splitlines()[0]
    assert "rating, timestamp" not in (tmp_path / "out/made/made.yaml").read_text()


def test_the_source_in_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    guide = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    (tmp_path / "guide_source.py").write_text(guide.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    write_lines(tmp_path / "x.txt", [f"{user};{item};{time}" for user, item, _, time in ROWS])
    write_lines(tmp_path / "songs.txt", [f"{item};Song; {item}" for item in ITEMS])
    prepare_source(words("guide_source:Plays", "x", tmp_path, tmp_path / "out"))
    assert len(inter_of(tmp_path / "out/made", "user_id")) == len(ROWS)
    titles = read_columns(tmp_path / "out/made/made.item", "item_id", ["title"])
    assert titles == {item: (f"Song; {item}",) for item in ITEMS}


def test_no_review_is_held(tmp_path: Path) -> None:
    """Neither of reviews in the interactions' own lines nor of those in a file of their own."""
    text = "word " * 2000
    rows = [(f"u{user}", f"b{item}") for user in range(120) for item in range(12)]
    plain = {"rating": 5, "date_added": "Wed Mar 22 11:37:04 -0700 2017"}
    lines = [json.dumps({"user_id": user, "book_id": item, "review_text": text, **plain}) for user, item in rows]
    write_lines(tmp_path / "goodreads_interactions_x.json", lines)
    for name in ("own", "other"):
        if name == "other":
            write_lines(tmp_path / "goodreads_reviews_x.json", lines[::-1])
        tracemalloc.start()
        try:
            prepare_source(words("goodreads", "x", tmp_path, tmp_path / "out", item_metadata="none", name=name))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        size = (tmp_path / f"out/{name}/{name}.inter").stat().st_size
        assert size > len(rows) * len(text) and peak < size / 2


# --- the whole thread ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data_path`` with a prepared data set ``made``."""
    folder = tmp_path_factory.mktemp("lamps")
    amazon2018(folder)
    prepare_source(words("amazon2018", "Lamps", folder, folder / "out"))
    return folder / "out"


def test_a_run_takes_it_as_it_is(lamps: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--dataset=made", f"--data_path={lamps}"]
    settings = ["--epochs=1", "--gpu_id=", f"--output_dir={tmp_path}", "--show_progress=False", "--topk=[5]",
                "--valid_metric=NDCG@5"]  # fmt: skip
    assert main(["inspect", "dataset", "made", f"--data_path={lamps}"]) == 0
    shown = capsys.readouterr().out
    assert f"{TITLES['b1']} Brand: Lumo; categories: Home, Lamps; First < part. Second" in shown
    assert "0 of 12 items have none" in shown
    assert main(["run", "--model=BPR", *common, *settings]) == 0
    assert "made: test, 14 rankings of the whole catalogue" in capsys.readouterr().out


def test_titles_descriptions_and_reviews_reach_the_tasks(lamps: Path) -> None:
    config = Config(
        "LCRec",
        "made",
        config_dict={"data_path": str(lamps), "gpu_id": "", "topk": [5], "valid_metric": "NDCG@5"},
        command_line=[],
    )
    assert (config["item_title"], config["item_description"]) == ("{title}", "{description}")
    dataset = prepared(config)[1]._dataset
    texts = read_task_texts(config, dataset, read_item_text(config, dataset))
    assert set(texts.texts["title"][1:]) == set(TITLES.values())
    assert set(texts.texts["description"][1:]) == {"First < part. Second"}
    assert all(text.startswith("Bright. u") for text in texts.texts["query"]) and texts.texts["query"]


def test_settings_beside_the_data_lie_under_files_and_the_command_line(lamps: Path) -> None:
    def config(**more: Any) -> Config:
        return Config("BPR", "made", config_dict={"data_path": str(lamps), **more}, command_line=[])

    assert config()["item_text_fallback"] == "an untitled product"
    assert config()["time_scope"] == "global" and config()["load_col"] == {
        "inter": ["user_id", "item_id", "rating", "timestamp"]
    }
    assert config(item_text_fallback="a lamp")["item_text_fallback"] == "a lamp"
    assert Config("BPR", "ml-100k", command_line=[])["item_text_fallback"] == "an untitled film"


@pytest.mark.slow
def test_lcrecs_games_come_out_as_published(tmp_path: Path) -> None:
    """The published rows, as raw reviews with repeats, rare items and items without metadata among them."""
    games = SHARED / "amazon-games-lcrec"
    if not games.is_dir():
        pytest.skip(f"NOT SHOWN: {games} is not here")
    rows = [texts for _, texts in read_rows(games / "amazon-games-lcrec.inter", ["user_id", "item_id", "timestamp"])]
    titles = read_columns(games / "amazon-games-lcrec.item", "item_id", ["title"])
    raw = [(user, item, 5.0, NEW_YEAR + int(float(time)) * DAY) for user, item, time in rows]
    raw += [(user, item, 1.0, time + DAY) for user, item, _, time in raw[::1000]]
    raw += [(user, f"unknown{number % 40}", 1.0, time) for number, (user, _, _, time) in enumerate(raw[::500])]
    raw += [(f"newcomer{number}", item, 1.0, time) for number, (_, item, _, time) in enumerate(raw[::700])]
    line = '{"reviewerID": "%s", "asin": "%s", "overall": %s, "unixReviewTime": %d}'
    write_lines(tmp_path / "Video_Games.json", [line % row for row in raw])
    lines = [json.dumps({"asin": item, "title": title}) for item, (title,) in titles.items()]
    write_lines(tmp_path / "meta_Video_Games.json", lines)
    prepare_source(words("amazon2018", "Video_Games", tmp_path, tmp_path / "out", preset="lcrec"))
    card = json.loads((tmp_path / "out/made/stats.json").read_text())
    assert {name: pair["deviation"] for name, pair in card["published"].items()} == dict.fromkeys(
        ("users", "items", "interactions", "mean_length", "long_share"), pytest.approx(0, abs=2e-3)
    )
    assert card["interactions"] == 452989
    assert Amazon2018.title in card["title"]
    head = subprocess.run(["head", "-c", "40", tmp_path / "out/made/made.inter"], capture_output=True, text=True)
    assert head.stdout.startswith("user_id:token\titem_id:token\trating:float")
