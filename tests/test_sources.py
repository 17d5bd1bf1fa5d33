"""``recbole-llm prepare --source``: every published format, texts, sources of one's own, a run of what comes out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED
from hypothesis import example, given
from hypothesis import strategies as st
from raw_files import (
    DAY,
    FORMATS,
    ITEMS,
    NEW_YEAR,
    ROWS,
    TITLES,
    amazon2018,
    film_of,
    goodreads,
    inter_of,
    movielens_1m,
    told,
    words,
    write_lines,
)

from recbole_llm.cli import main
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.item_text import read_columns, read_rows
from recbole_llm.errors import UserError
from recbole_llm.sources import base
from recbole_llm.sources.amazon import Amazon2018, Amazon2023
from recbole_llm.sources.base import Source
from recbole_llm.sources.goodreads import seconds
from recbole_llm.sources.prepare import prepare_source
from recbole_llm.sources.text import clean
from recbole_llm.training.identifiers import make_ids
from recbole_llm.training.language import read_item_text
from recbole_llm.training.pipeline import prepared
from recbole_llm.training.task_texts import read_task_texts


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
    categories = "history, france" if source == "goodreads" else "Home | Lamps, Bulbs"
    shop = {item: (TITLES[item], categories, "First < part. Second") for item in ITEMS}
    assert read_columns(made / "made.item", "item_id", ["title", "categories", "description"]) == shop
    if source != "goodreads":
        assert set(read_columns(made / "made.item", "item_id", ["brand", "price"]).values()) in (
            {("Lumo", "$5.99")},
            {("Lumo", "5.99")},
        )
    card = json.loads((made / "stats.json").read_text())
    assert card["texts"]["review"]["share"] == 1 and card["texts"]["description"]["mean_words"] == 4


@pytest.mark.parametrize(
    ("form", "categories"),
    [("amazon2018", ["Home", "Lamps, Bulbs"]), ("amazon2023", ["Home", "Lamps, Bulbs"]),
     ("goodreads", ["history", "france"]), ("ml-1m", ["Action", "Sci-Fi"]), ("ml-latest", ["Action", "Sci-Fi"])],
)  # fmt: skip
def test_semantic_ids_are_made_of_whole_categories(form: str, categories: list[str], tmp_path: Path) -> None:
    source, write = FORMATS[form]
    prepare_source(words(source, write(tmp_path / "raw"), tmp_path / "raw", tmp_path / "out"))
    settings = {"data_path": str(tmp_path / "out"), "gpu_id": "", "item_tokens": "semantic"}
    config = Config("P5", "made", config_dict=settings, command_line=[])
    tokens = make_ids(config, create_dataset(config), ["[PAD]", *ITEMS])
    assert tokens.strings(1)[:-1] == [f"<{category}>" for category in categories]
    # A model without item tokens passes them over.
    assert "id_categories" not in Config(
        "BPR", "made", config_dict={"data_path": str(tmp_path / "out")}, command_line=[]
    )


@pytest.mark.parametrize("source", [Amazon2018(), Amazon2023()])
def test_a_bar_in_a_category_stays_in_it(source: Source) -> None:
    field = "category" if isinstance(source, Amazon2018) else "categories"
    line = {"asin": "a", "parent_asin": "a", field: ["Home", "Audio | Video", "A|B", "", "C\0D"]}
    made = source._item(json.dumps(line)).values["categories"]
    assert made.split(source.columns.category_separator) == ["Home", "Audio / Video", "A/B", "C\0D"]


def test_reviews_and_metadata_may_have_folders_of_their_own(tmp_path: Path) -> None:
    """As the repository of Amazon 2023's authors has them, asked for by any of its folders."""
    write = FORMATS["amazon2023"][1]
    category = write(tmp_path)
    for kind, name in (("review", f"{category}.jsonl.gz"), ("meta", f"meta_{category}.jsonl.gz")):
        (tmp_path / f"all/raw/{kind}_categories").mkdir(parents=True)
        (tmp_path / name).rename(tmp_path / f"all/raw/{kind}_categories" / name)
    for place in ("all", "all/raw", "all/raw/review_categories"):
        prepare_source(words("amazon2023", category, tmp_path / place, tmp_path / "out" / place.replace("/", "-")))
        made = tmp_path / "out" / place.replace("/", "-") / "made"
        assert set(read_columns(made / "made.item", "item_id", ["title"]).values()) == {(TITLES[i],) for i in ITEMS}


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


def test_the_folder_of_a_releases_archive_is_found(tmp_path: Path) -> None:
    movielens_1m(tmp_path)
    (tmp_path / "ml-1m").rename(tmp_path / "ml-10M100K")
    for file in (tmp_path / "ml-10M100K").iterdir():
        file.write_text(file.read_text(encoding="latin-1"), encoding="utf-8")
    prepare_source(words("movielens", "ml-10m", tmp_path, tmp_path / "out", user_core=1, item_core=1))
    assert inter_of(tmp_path / "out/made") == [told(row) for row in ROWS]


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


def test_white_space_and_control_characters_become_a_space() -> None:
    for character in map(chr, range(0x11000)):
        if character.isspace() or unicodedata.category(character) == "Cc" or character == "\ufeff":
            assert clean(f"{character}a{character}{character} b{character}") == "a b"


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
    text = f"{'w' * 99} " * 100
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
    assert f"{TITLES['b1']} Brand: Lumo; categories: Home | Lamps, Bulbs; First < part. Second" in shown
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("item_text_falback: x", "unknown setting 'item_text_falback'.*mean 'item_text_fallback'"),
        ("item_titel: x", "unknown setting 'item_titel'.*mean 'item_title'"),
        ("short_users: 3", "short_users should be str"),
        ("graf_model.epochs: 3", "unknown setting 'graf_model.epochs'"),
        ("graph_model.epochz: 3", "unknown setting 'graph_model.epochz'; did you mean 'graph_model.epochs'"),
    ],
)
@pytest.mark.parametrize("model", ["BPR", "GLTA"])
def test_settings_beside_the_data_are_as_strict_as_others(
    lamps: Path, tmp_path: Path, line: str, message: str, model: str
) -> None:
    shutil.copytree(lamps / "made", tmp_path / "made")
    beside = tmp_path / "made" / "made.yaml"
    beside.write_text(f"{beside.read_text()}\n{line}\n")
    with pytest.raises(UserError, match=f"made.yaml: {message}"):
        Config(model, "made", config_dict={"data_path": str(tmp_path)}, command_line=[])


def test_settings_beside_the_data_are_for_every_model(lamps: Path, tmp_path: Path) -> None:
    shutil.copytree(lamps / "made", tmp_path / "made")
    beside = tmp_path / "made" / "made.yaml"
    beside.write_text(f"{beside.read_text()}\nnegative_ratio: 2\ngraph_model.epochs: 3\ngraph_model.n_layers: 2\n")

    def settings(model: str, **more: Any) -> dict[str, Any]:
        given = {"data_path": str(tmp_path), **more}
        return Config(model, "made", config_dict=given, command_line=[]).final_config_dict

    bpr = settings("BPR")
    assert not {"negative_ratio", "graph_model.epochs", "item_title"} & set(bpr)
    assert settings("AlignTokenRec")["negative_ratio"] == 2 and settings("GLTA")["graph_model.epochs"] == 3
    assert settings("GLTA")["graph_model.n_layers"] == 2
    assert "graph_model.n_layers" not in settings("GLTA", graph_model="BPR"), "a part that has no layers"


def test_a_parts_settings_beside_the_data_have_the_parts_types(lamps: Path, tmp_path: Path) -> None:
    shutil.copytree(lamps / "made", tmp_path / "made")
    beside = tmp_path / "made" / "made.yaml"
    beside.write_text(f"{beside.read_text()}\ngraph_model.epochs: many\n")
    with pytest.raises(UserError, match=r"made\.yaml: graph_model\.epochs should be int"):
        Config("GLTA", "made", config_dict={"data_path": str(tmp_path)}, command_line=[])


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
