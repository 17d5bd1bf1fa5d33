"""Item text: exact reading of atomic files, the template, and the texts of real data sets."""

from __future__ import annotations

from pathlib import Path

import pytest
import recbole
from hypothesis import example, given
from hypothesis import strategies as st

from recbole_llm.data.item_text import first_words, load_item_text, parse_template, read_columns
from recbole_llm.errors import UserError

ML_100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k" / "ml-100k.item"
DATA = Path(__file__).parents[1].parent / "shared" / "data"
ML_TEMPLATE = "{movie_title}[ ({release_year})][. Genres: {class}]"

# What a field can hold: any character but the two that delimit fields and the null character, which is refused
# (tests/test_errors.py). Surrogates are no text.
FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\n\0"))


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def one_item(
    tmp_path: Path, template: str, fallback: str = "Item {item_id}", max_words: int | None = None, **columns: str
) -> str:
    header = "\t".join(["item_id:token", *(f"{name}:token_seq" for name in columns)])
    path = write(tmp_path / "x.item", f"{header}\n" + "\t".join(["7", *columns.values()]) + "\n")
    return load_item_text(path, "item_id", template, fallback, ["[PAD]", "7"], max_words).texts[1]


@given(rows=st.lists(st.tuples(FIELDS, FIELDS), max_size=6), final_newline=st.booleans())
@example(
    rows=[('"Great Performances" Cats', '"'), ("NA", "null"), ("nan", "a  b "), ("\x85\u2028\x0b", "\r")],
    final_newline=True,
)
def test_any_text_survives_exactly(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], final_newline: bool
) -> None:
    lines = ["title:token_seq\titem_id:token\tabout:token_seq"]
    lines += [f"{title}\t{number}\t{about}" for number, (title, about) in enumerate(rows)]
    path = write(tmp_path_factory.mktemp("exact") / "x.item", "\n".join(lines) + "\n" * final_newline)
    found = read_columns(path, "item_id", ["about", "title"])
    assert found == {str(number): (about, title) for number, (title, about) in enumerate(rows)}


def test_line_ends_of_dos_are_no_text(tmp_path: Path) -> None:
    path = write(tmp_path / "x.item", "\ufeffitem_id:token\ttitle:token_seq\r\n1\tHeat\r\n\r\n2\tNA\r\n")
    assert read_columns(path, "item_id", ["title"]) == {"1": ("Heat",), "2": ("NA",)}


def test_first_row_of_an_id_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "x.item", "item_id:token\ttitle:token_seq\n1\tfirst\n1\tsecond\n")
    assert read_columns(path, "item_id", ["title"]) == {"1": ("first",)}


def test_other_encoding_and_separator(tmp_path: Path) -> None:
    path = tmp_path / "x.item"
    path.write_bytes("item_id:token,title:token_seq\n1,Amélie\n".encode("latin-1"))
    assert read_columns(path, "item_id", ["title"], separator=",", encoding="latin-1") == {"1": ("Amélie",)}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"item_id:token\ttitle:token_seq\n1\tHeat\n2\tToy\tStory\n", ["line 3", "3 fields", "2"]),
        (b"item_id:token\ttitle:token_seq\n1\n", ["line 2", "1 field"]),
        (b"item_id:token\ttitle:token_seq\n\tHeat\n", ["line 2", "item_id"]),
        (b"item_id:token\ttitle\n1\tHeat\n", ["line 1", "title"]),
        (b"item_id:token\ttitle:text\n1\tHeat\n", ["line 1", "title:text"]),
        (b"item_id:token\ttitle:token_seq\ttitle:token_seq\n", ["line 1", "title"]),
        (b"item_id:token\ttitle:token_seq\n1\tHeat\n2\t\xff\n", ["line 3", "0xff"]),
        (b"item_id:token\ttitle_of_it:token_seq\n1\tHeat\n", ["'title'", "title_of_it"]),
        (b"movie_id:token\ttitle:token_seq\n1\tHeat\n", ["'item_id'", "movie_id"]),
        (b"", ["line 1"]),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, content: bytes, says: list[str]) -> None:
    path = tmp_path / "broken.item"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_columns(path, "item_id", ["title"])
    for part in ["broken.item", *says]:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_nearest_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'movie_title'"):
        load_item_text(ML_100K, "item_id", "{movie_titel}", "Item {item_id}", ["[PAD]", "1"])


def test_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_item_text(tmp_path / "books.item", "item_id", "{title}", "Item {item_id}", ["[PAD]", "1"])
    for part in ("'books'", "books.item", "item_id:token", "title", "in item_text"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("template", "columns", "text"),
    [
        ("{a}", {"a": "x"}, "x"),
        ("{a}[ ({b})]", {"a": "x", "b": "y"}, "x (y)"),
        ("{a}[ ({b})]", {"a": "x", "b": " "}, "x"),
        ("{a}[ {b}, {c}]", {"a": "x", "b": "y", "c": ""}, "x"),
        ("[[{a}]][ {{{b}}}]", {"a": "x", "b": "y"}, "[x] {y}"),
        ("{a}[ [[{b}]] ]", {"a": "x", "b": "y"}, "x [y] "),
        ("[{a}][{b}]", {"a": "x", "b": "y"}, "xy"),
        ("{a}{a}", {"a": "x "}, "x x "),
        # What stands in a column is data.
        ("{a}[ ({b})]", {"a": "[REC] {b} [[", "b": "{a}"}, "[REC] {b} [[ ({a})"),
        ("{a b:c}", {"a b:c": "x"}, "x"),
    ],
)
def test_template(tmp_path: Path, template: str, columns: dict[str, str], text: str) -> None:
    assert one_item(tmp_path, template, **columns) == text


@pytest.mark.parametrize(
    "template", ["{a", "a}", "[{a}", "{a}]", "[{a}[{b}]]", "[x]", "{}", "{a[b]}", "{a{b}}", "x", "", "[]"]
)
def test_bad_template_is_one_line(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match=r"^item_text ") as error:
        one_item(tmp_path, template, a="x", b="y")
    assert "\n" not in str(error.value)


@given(text=FIELDS)
def test_doubled_characters_spell_any_literal(text: str) -> None:
    for character in "[]{}":
        text = text.replace(character, character * 2)
    plain = text
    for character in "[]{}":
        plain = plain.replace(character * 2, character)
    assert parse_template(text).render({}) == plain


def test_fallback(tmp_path: Path) -> None:
    path = write(tmp_path / "x.item", "item_id:token\ta:token_seq\tb:token\n10\tx\t\n20\t \t\u3000\n30\t\ty\n")
    found = load_item_text(path, "item_id", "T: {a}[ {b}]", "Nr. {item_id}!", ["[PAD]", "40", "10", "20", "30"])
    assert found.texts == ["", "Nr. 40!", "T: x", "Nr. 20!", "T:  y"]
    assert (found.missing, found.template, found.fallback) == (2, "T: {a}[ {b}]", "Nr. {item_id}!")
    # Nothing is left of item 10: its only part is left out.
    assert load_item_text(path, "item_id", "[{a} {b}]", "{item_id}", ["[PAD]", "10"]).texts == ["", "10"]
    with pytest.raises(UserError, match="item_text_fallback"):
        load_item_text(path, "item_id", "{a}", "{a}", ["[PAD]", "10"])


def test_max_words_keeps_the_spacing(tmp_path: Path) -> None:
    assert one_item(tmp_path, "{a}[. {b}]", max_words=3, a=" one  two", b="three four") == " one  two. three"
    assert one_item(tmp_path, "{a}", max_words=3, a=" one  two ") == " one  two "


@given(text=st.text(), count=st.integers(1, 6))
def test_first_words(text: str, count: int) -> None:
    cut = first_words(text, count)
    assert text.startswith(cut)
    assert cut.split() == text.split()[:count]
    assert cut == text or cut == cut.rstrip()


def test_ml_100k() -> None:
    with ML_100K.open(encoding="utf-8") as lines:
        rows = [line.rstrip("\n").split("\t") for line in lines][1:]
    ids = [row[0] for row in rows]
    found = load_item_text(ML_100K, "item_id", ML_TEMPLATE, "Item {item_id}", ["[PAD]", *reversed(ids)])
    assert len(found.texts) == 1683
    assert found.missing == 0
    assert found.texts[1682] == "Toy Story (1995). Genres: Animation Children's Comedy"
    assert [text.split(" (")[0] for text in found.texts[:0:-1]] == [row[1].split(" (")[0] for row in rows]
    # Item 267, its spelling kept.
    assert found.texts[1683 - 267] == "unkonwn (unkonwn). Genres: unknown"


@pytest.mark.parametrize(
    ("name", "template", "items", "first"),
    [
        ("ml-1m", "{movie_title}[ ({release_year})]", 3883, "Toy Story (1995)"),
        ("ml-latest-small-2016", "{title}", 9125, "Toy Story"),
        ("amazon-games-lcrec", "{title}", 16859, "Nintendo 3DS Compatible with 3DS / 3DS XL / 2DS AC Adapter"),
        (
            "amazon-beauty-tiger",
            "{title}[. {attributes}]",
            12101,
            "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce. OPI, Make",
        ),
        ("amazon-scientific", "{title}[ {description}]", 4344, "SUPCO SPP6 Relay/Capacitor"),
        ("steam-llara-reviews", "{title}", 3581, "Ironbound"),
    ],
)
def test_real_data(name: str, template: str, items: int, first: str) -> None:
    path = DATA / name / f"{name}.item"
    if not path.is_file():
        pytest.skip(f"SKIPPED, NOT TESTED: no real data at {path}")
    # Each line cut by hand: neither the reader under test nor pandas.
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")[1:]
    ids = ["[PAD]", *(line.split(b"\t")[0].decode() for line in lines)]
    found = load_item_text(path, "item_id", template, "Item {item_id}", ids)
    assert len(lines) == items
    assert found.texts[1].startswith(first)
    for text, line in zip(found.texts[1:], lines, strict=True):
        title = max(line.split(b"\t"), key=lambda field: text.startswith(field.decode()) * len(field)).decode()
        assert title
        assert text.startswith(title)
