"""``recbole-llm prepare --source``: filters, presets and the card."""

from __future__ import annotations

import json
from collections import Counter
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from raw_files import (
    DAY,
    ITEMS,
    NEW_YEAR,
    amazon2018,
    goodreads,
    inter_of,
    told,
    words,
    write_lines,
)

from recbole_llm.cli import main
from recbole_llm.data.item_text import read_columns
from recbole_llm.schema import properties_dir, read_specs, read_yaml
from recbole_llm.sources import filters
from recbole_llm.sources.filters import Rows, k_core, one_of_each
from recbole_llm.sources.prepare import prepare_source
from recbole_llm.sources.registry import SOURCES
from recbole_llm.sources.settings import read_settings


# --- filters ---------------------------------------------------------------------------------------------------------
def rows_of(pairs: list[tuple[int, int, int]]) -> Rows:
    users, items, times = (
        (np.array(column, dtype=np.int32) for column in zip(*pairs)) if pairs else [np.zeros(0, int)] * 3
    )
    count = np.arange(len(pairs))
    return Rows(users, items, np.ones(len(pairs)), times.astype(np.float64), count, items)


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
    asked = partial(words, "amazon2018", "Lamps", tmp_path, tmp_path / "out", user_core=2, item_core=2)
    prepare_source(asked(min_rating=3, until="2015-12-31"))
    kept = [(user, item, f"{rating:g}", str(NEW_YEAR + day * DAY)) for user, item, rating, day in (*rows[1:5],)]
    assert inter_of(tmp_path / "out/made") == kept
    card = json.loads((tmp_path / "out/made/stats.json").read_text())
    assert [step["interactions"] for step in card["filters"]] == [11, 10, 9, 8, 7, 4]
    prepare_source(asked(repeats="last", overwrite="true"))
    assert told((*rows[0][:3], NEW_YEAR + 3 * DAY)) in inter_of(tmp_path / "out/made")
    prepare_source(asked(repeats="all", item_metadata="none", overwrite="true"))
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
    rows = [(user, item, 5.0, NEW_YEAR + place) for user in ("u1", "u3") for place, item in enumerate(ITEMS)]
    goodreads(tmp_path, raw=rows)
    books = [{"book_id": item, "title": "one and the same"} for item in ITEMS]
    write_lines(tmp_path / "goodreads_books_history.json.gz", [json.dumps(book) for book in books])
    reviews = [{"user_id": "u3", "book_id": item, "review_text": f"of {item}"} for item in ITEMS]
    write_lines(tmp_path / "goodreads_reviews_history.json.gz", [json.dumps(review) for review in reviews])
    prepare_source(
        words("goodreads", "history", tmp_path, tmp_path / "out", merge_titles="true", user_core=1, item_core=1)
    )
    said = dict(inter_of(tmp_path / "out/made", "user_id", "review"))
    assert {user: text for user, text in said.items() if text} == {"u3": f"of {ITEMS[0]}"}
    # Each row has what was said of its own edition, at its time.
    more = {"user_core": 1, "item_core": 1, "repeats": "all", "overwrite": "true"}
    prepare_source(words("goodreads", "history", tmp_path, tmp_path / "out", merge_titles="true", **more))
    texts = [text for (text,) in inter_of(tmp_path / "out/made", "review")]
    assert texts == ["" if user == "u1" else f"of {item}" for user, item, *_ in rows]


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
