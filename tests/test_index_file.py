"""LC-Rec's index file: exact there and back, and one plain line for what is wrong with one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from catalogues import codes
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.itemid.index_file import read_index, write_index
from recbole_llm.itemid.item_tokens import ItemTokens

RAW = ["[PAD]", "B01", "B02", 'Ü "3"']
GOOD = {"B02": ["<a_1>", "<b_0>"], "B01": ["<a_0>", "<b_12>"], RAW[3]: ["<a_0>", "<b_3>"]}


def write(folder: Path, content: object) -> Path:
    path = folder / "games.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


@given(item_tokens=codes(), data=st.data())
@settings(max_examples=20)
def test_there_and_back(item_tokens: ItemTokens, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("index")
    names = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
    count = item_tokens.n_items - 1
    raw_ids = ["[PAD]", *data.draw(st.lists(names, min_size=count, max_size=count, unique=True))]
    for name in ("one", "two"):
        write_index(folder / name, item_tokens, raw_ids)
    assert (folder / "one").read_bytes() == (folder / "two").read_bytes()
    if not len(item_tokens.tokens):
        return
    found = read_index(folder / "one", raw_ids, item_tokens.level_sizes, allow_missing=True)
    assert found.fingerprint() == item_tokens.fingerprint()
    write_index(folder / "again", found, raw_ids)
    assert (folder / "again").read_bytes() == (folder / "one").read_bytes()


def test_a_file_of_lc_recs(tmp_path: Path) -> None:
    found = read_index(write(tmp_path, GOOD), RAW)
    assert found.codes.tolist() == [[-1, -1], [0, 12], [1, 0], [0, 3]] and found.level_sizes == (2, 13)
    write_index(tmp_path / "out.index.json", found, RAW)
    assert json.loads((tmp_path / "out.index.json").read_text("utf-8")) == GOOD
    assert read_index(write(tmp_path, GOOD), RAW, [256, 256]).level_sizes == (256, 256)


def test_items_without_codes(tmp_path: Path) -> None:
    path = write(tmp_path, {"B02": ["<a_1>"]})
    with pytest.raises(UserError, match="no codes for 2 of the data set's 3 items, the first being 'B01'"):
        read_index(path, RAW)
    assert read_index(path, RAW, allow_missing=True).codes.tolist() == [[-1], [-1], [1], [-1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD | {"B03": ["<a_0>", "<b_0>"]}, r"item 'B03', entry 4 of 4, is not in the data set; did you mean 'B0"),
        (GOOD | {"x": ["<a_0>"], "y": []}, r"item 'x', entry 4 of 5, .* \(nor are 1 others\)"),
        (GOOD | {"[PAD]": ["<a_0>", "<b_0>"]}, r"item '\[PAD\]', entry 4"),
        (GOOD | {"B01": ["<a_0>"]}, "item 'B01' has 1 tokens, but item 'B02' has 2"),
        (GOOD | {"B01": ["<a_0>", "<a_1>"]}, "token 2 of item 'B01' is '<a_1>'; it should be '<b_'"),
        (GOOD | {"B01": ["<a_0>", "<b_01>"]}, "token 2 of item 'B01' is '<b_01>'"),
        (GOOD | {"B01": ["<a_0>", "<b_-1>"]}, "token 2 of item 'B01'"),
        (GOOD | {"B01": ["<a_0>", "<b_9999999999999999999>"]}, "token 2 of item 'B01'"),
        (GOOD | {"B01": ["<a_0>", 7]}, "token 2 of item 'B01' is 7"),
        (GOOD | {"B01": []}, "item 'B01' should have a list of tokens"),
        (GOOD | {"B01": "<a_0>"}, "item 'B01' should have a list of tokens"),
        ([["<a_0>"]], "should be one JSON object"),
        ("{}", "should be one JSON object"),
        ("{\"B01\": [", "is not JSON: .* at line 1, column"),
        ("", "is not JSON"),
        ('{"B01": ["<a_0>"], "B01": ["<a_1>"]}', "item 'B01' stands there twice"),
    ],
)  # fmt: skip
def test_one_plain_line(content: object, message: str, tmp_path: Path) -> None:
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=message) as error:
        read_index(path, RAW)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_no_such_file_and_other_bytes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no index file"):
        read_index(tmp_path / "none.index.json", RAW)
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not JSON in UTF-8"):
        read_index(tmp_path / "x", RAW)


def test_codes_beyond_their_level(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    with pytest.raises(UserError, match="item 'B01' has <b_12>, but level 2 has 12 codes"):
        read_index(path, RAW, [2, 12])
    with pytest.raises(UserError, match="has 2 codes an item, not 3"):
        read_index(path, RAW, [2, 13, 4])


def test_only_codes_of_these_items_are_written(tmp_path: Path) -> None:
    for item_tokens in (ItemTokens.raw(4), ItemTokens.from_codes(torch.zeros(2, 1).long() - 1, [1])):
        with pytest.raises(ValueError, match="cannot be written"):
            write_index(tmp_path / "x", item_tokens, RAW)
