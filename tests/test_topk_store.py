"""The top-K store: what is written is found, by name and at once, or told to be missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.serving import store as store_module
from recbole_llm.serving.identity import TOLD
from recbole_llm.serving.store import Catalogue, Plan, TopKStore
from recbole_llm.serving.texts import NameIndex, TextTable

NASTY = ["", "a\tb", "new\nline", "\x1b[2Jclear", "naïve ☃", "NUL\0inside", "  spaces ", '"quoted"', "🂡", "</s>", "a,b"]
WANTED: dict[str, Any] = {
    "model": "BPR", "dataset": "tiny", "split": "s" * 64, "stages": "x", "search": "y", "item_tokens": None,
    "weights": "w", "new_items": "without new items", "history_phases": "train,valid,test",
}  # fmt: skip


def catalogue(users: int = 23, items: int = 12) -> Catalogue:
    return Catalogue(
        [f"u{n}" for n in range(users - len(NASTY))] + [f"u{text}" for text in NASTY],
        ["[PAD]", *(f"i{n}" for n in range(1, items))],
        ["", *(NASTY[n % len(NASTY)] for n in range(1, items))],
    )


def block_of(store: TopKStore, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Made-up rankings that say whose they are."""
    rows = np.array(store.rows(block))
    items = (rows[:, None] + np.arange(store.k)) % 11 + 1
    items[rows % 5 == 0, store.k - 1 :] = -1
    return items, (rows[:, None] - np.arange(store.k) / 7).astype(np.float32)


def begun(folder: Path, **plan: int) -> TopKStore:
    shape = {"k": 4, "batch": 2, "block": 6} | plan
    return TopKStore.begin(folder, WANTED, Plan(**shape), catalogue())


def filled(folder: Path) -> TopKStore:
    store = begun(folder)
    for block in range(store.n_blocks):
        store.write(block, *block_of(store, block))
    assert store.finish()
    return store


# --- texts and names -------------------------------------------------------------------------------------------------
@given(st.lists(st.text(), max_size=30))
def test_texts_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("texts")
    TextTable.save(folder, "any", texts)
    table = TextTable(folder, "any")
    assert [table[number] for number in range(len(table))] == texts


@given(st.sets(st.text(), max_size=40), st.text())
def test_every_name_is_found_and_no_other(
    tmp_path_factory: pytest.TempPathFactory, names: set[str], other: str
) -> None:
    folder, known = tmp_path_factory.mktemp("names"), sorted(names)
    NameIndex.save(folder, "any", known)
    index = NameIndex(folder, "any")
    assert [index.find(name) for name in known] == list(range(len(known)))
    assert other in names or index.find(other) is None


def test_finding_a_name_reads_as_few_places_among_many(tmp_path: Path) -> None:
    """Constant time by construction: places of the hash table that are read do not grow with it."""
    read = {}
    for count in (100, 20_000):
        (tmp_path / str(count)).mkdir()
        NameIndex.save(tmp_path / str(count), "any", [f"user-{number}" for number in range(count)])
        index = NameIndex(tmp_path / str(count), "any")
        looked = []
        for number in range(0, 2 * count, max(1, count // 100)):
            assert index.find(f"user-{number}") == (number if number < count else None)
            looked.append(index.looked_at)
        read[count] = np.mean(looked)
    # Half of the places are empty, so linear probing expects 2.5 of a name that is not there (Knuth, vol. 3, 6.4).
    assert max(read.values()) < 2.5


@pytest.mark.parametrize("name", ["any.bytes.npy", "any.places.npy", "any.slots.npy"])
def test_a_damaged_table_is_told(tmp_path: Path, name: str) -> None:
    NameIndex.save(tmp_path, "any", ["one", "two"])
    (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00nothing")
    with pytest.raises(UserError, match=r"cannot be read .*--build=true"):
        NameIndex(tmp_path, "any")


def test_another_byte_in_a_name_is_noticed(tmp_path: Path) -> None:
    TextTable.save(tmp_path, "any", ["one", "two"])
    file = tmp_path / "any.bytes.npy"
    file.write_bytes(file.read_bytes().replace(b"two", b"tvo"))
    table = TextTable(tmp_path, "any")
    assert table[0] == "one"
    with pytest.raises(UserError, match="is damaged"):
        table[1]


# --- the store -------------------------------------------------------------------------------------------------------
def test_what_is_written_is_found(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    own, store = catalogue(), TopKStore.open(tmp_path / "store", WANTED, 4)
    for number, user in enumerate(own.users):
        items, scores = block_of(store, number // store.block)
        row = number % store.block
        expected = [
            (own.items[item], own.titles[item], float(score))
            for item, score in zip(items[row], scores[row])
            if item > 0
        ]
        assert store.look_up(user, 4) == expected
        assert store.look_up(user, 2) == expected[:2]
    assert store.look_up("nobody", 4) is None


def test_a_look_up_opens_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path / "store")
    store = TopKStore.open(tmp_path / "store", WANTED, 4)
    opened: list[Path] = []
    mapped = store_module.map_array
    monkeypatch.setattr(store_module, "map_array", lambda path: opened.append(path) or mapped(path))
    store.look_up("u7", 4)
    assert [path.name for path in opened] == ["000001.npy"]
    assert isinstance(mapped(opened[0]).base, np.memmap)
    store.look_up("u8", 4)
    assert len(opened) == 1
    monkeypatch.setattr(store_module, "OPEN", 1)
    store.look_up("u0", 4)
    store.look_up("u7", 4)
    assert [path.name for path in opened] == ["000001.npy", "000000.npy", "000001.npy"]


def test_blocks_in_any_order_by_several_builders_make_the_same_store(tmp_path: Path) -> None:
    filled(tmp_path / "whole")
    for block in (3, 1, 0, 2):
        again = begun(tmp_path / "parts")
        again.write(block, *block_of(again, block))
        assert again.finish() == (block == 2)
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_a_builder_of_the_store_before_leaves_nothing_in_the_new_one(tmp_path: Path) -> None:
    before = begun(tmp_path / "store")
    shape = Plan(k=4, batch=2, block=6)
    now = TopKStore.begin(tmp_path / "store", WANTED | {"split": "another"}, shape, catalogue(), anew=True)
    with pytest.raises(UserError, match="was begun anew by another command"):
        before.write(1, *block_of(before, 1))
    assert now.missing() == [0, 1, 2, 3]
    # One that looked just before: its rows are known for what they are.
    before.card = now.card | {"build": before.card["build"]}
    file = now._file(1)
    now.write(1, *block_of(now, 1))
    whole = file.read_bytes()
    before.folder = tmp_path / "other"
    (before.folder / "blocks").mkdir(parents=True)
    (before.folder / "store.json").write_text(json.dumps(before.card), encoding="utf-8")
    before.write(1, *block_of(before, 1))
    file.write_bytes((before.folder / "blocks" / file.name).read_bytes())
    assert file.read_bytes() != whole and not now.is_whole(1)


def test_what_is_not_complete_is_not_read(tmp_path: Path) -> None:
    store = begun(tmp_path / "store")
    store.write(2, *block_of(store, 2))
    assert not store.finish()
    with pytest.raises(UserError, match=r"has 1 of 4 blocks; .*--build=true.*--store=off") as caught:
        TopKStore.open(tmp_path / "store", WANTED, 4)
    assert "\n" not in str(caught.value)


def test_what_a_writer_left_behind_its_whole_block_goes(tmp_path: Path) -> None:
    store = begun(tmp_path / "store")
    for block in range(store.n_blocks):
        store.write(block, *block_of(store, block))
    left = tmp_path / "store" / "blocks" / "000001.npy.part"
    left.mkdir()
    assert store.finish()
    assert not left.exists() and store.is_whole(1)


@pytest.mark.parametrize("name", list(TOLD))
def test_a_store_of_something_else_is_refused_by_name(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "store")
    other = {**WANTED, name: "of another kind"}
    for refused in (
        lambda: TopKStore.open(tmp_path / "store", other, 4),
        lambda: TopKStore.refuse_other(tmp_path / "store", other, 4),
        lambda: TopKStore.begin(tmp_path / "store", other, Plan(4, 2, 6), catalogue()),
    ):
        said = f"the store in {tmp_path}/store is {TOLD[name].partition('{')[0]}"
        with pytest.raises(UserError, match=re.escape(said)) as caught:
            refused()
        assert "\n" not in str(caught.value) and "--build=anew" in str(caught.value)
    assert TopKStore.open(tmp_path / "store", WANTED, 4).look_up("u1", 4)
    anew = TopKStore.begin(tmp_path / "store", other, Plan(4, 2, 6), catalogue(), anew=True)
    assert len(anew.missing()) == 4 and not (tmp_path / "store" / "complete.json").exists()


@pytest.mark.parametrize("name", ["weights", "search"])
def test_a_store_serves_where_one_of_both_is_not_known(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "store")
    assert TopKStore.open(tmp_path / "store", {**WANTED, name: None}, 4).look_up("u1", 4)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"k": 5}, "holds the best 4 items of each user, and --k is 5"),
        ({"batch": 3}, "was begun with 2 users at once, and now it is 3"),
    ],
)
def test_another_shape_is_refused(tmp_path: Path, plan: dict[str, int], says: str) -> None:
    filled(tmp_path / "store")
    with pytest.raises(UserError, match=says):
        begun(tmp_path / "store", **plan)


def test_more_items_than_it_holds_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    with pytest.raises(UserError, match=r"holds the best 4 items of each user, and --k is 5; .*--store=off"):
        TopKStore.open(tmp_path / "store", WANTED, 5)


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no store"):
        begun(tmp_path)
    with pytest.raises(UserError, match="holds something that is no store"):
        TopKStore.begin(tmp_path, WANTED, Plan(4, 2, 6), catalogue(), anew=True)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"there is no store in .*--build=true"):
        TopKStore.open(tmp_path, WANTED, 4)
    with pytest.raises(UserError, match="cannot be made"):
        begun(tmp_path / "notes.txt")


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 2, "k": 4}'])
def test_a_card_that_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    filled(tmp_path / "store")
    (tmp_path / "store" / "store.json").write_text(content)
    with pytest.raises(UserError, match=r"store.json cannot be read; --build=anew"):
        TopKStore.open(tmp_path / "store", WANTED, 4)


def test_a_store_whose_card_is_broken_is_told_and_built_anew(tmp_path: Path) -> None:
    TopKStore.begin(tmp_path / "store", WANTED, Plan(4, 2, 6), catalogue())
    (tmp_path / "store" / "store.json").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"cannot be read.*--build=anew"):
        TopKStore.begin(tmp_path / "store", WANTED, Plan(4, 2, 6), catalogue())
    (tmp_path / "store" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something that is no store"):
        TopKStore.begin(tmp_path / "store", WANTED, Plan(4, 2, 6), catalogue(), anew=True)
    (tmp_path / "store" / "notes.txt").unlink()
    anew = TopKStore.begin(tmp_path / "store", WANTED, Plan(4, 2, 6), catalogue(), anew=True)
    assert len(anew.missing()) == anew.n_blocks


def test_the_store_of_another_version_is_told_and_built_anew(tmp_path: Path) -> None:
    filled(tmp_path / "store")
    card = tmp_path / "store" / "store.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"schema": 1}))
    with pytest.raises(UserError, match=r"written by another version of this package; build it anew \(--build=anew\)"):
        TopKStore.open(tmp_path / "store", WANTED, 4)
    with pytest.raises(UserError, match="written by another version"):
        begun(tmp_path / "store")
    anew = TopKStore.begin(tmp_path / "store", WANTED, Plan(4, 2, 6), catalogue(), anew=True)
    assert len(anew.missing()) == anew.n_blocks and len(anew.users.texts) == anew.n_users


# --- damage and kills ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("place", [0.4, 0.7, 0.99])
def test_a_flipped_bit_is_noticed_by_who_reads_it_and_mended_by_a_build(tmp_path: Path, place: float) -> None:
    store = filled(tmp_path / "store")
    file = tmp_path / "store" / "blocks" / "000001.npy"
    data = bytearray(file.read_bytes())
    head = data.index(b"\n") + 1
    data[head + int((len(data) - head) * place)] ^= 1
    file.write_bytes(data)
    told = 0
    for row in store.rows(1):
        try:
            store.look_up(f"u{row}" if row < 12 else "x", 4)
        except UserError as error:
            told += "is damaged" in str(error)
    assert told == 1
    assert [store.is_whole(block) for block in range(4)] == [True, False, True, True]
    store.write(1, *block_of(store, 1))
    assert store.is_whole(1)


def test_a_damaged_head_is_told_and_mended_by_a_build(tmp_path: Path) -> None:
    """NumPy parses the head as Python, which gives errors of a tokenizer's."""
    filled(tmp_path / "store")
    file = tmp_path / "store" / "blocks" / "000001.npy"
    whole = file.read_bytes()
    for place in range(10, whole.index(b"\n"), 3):
        data = bytearray(whole)
        data[place] ^= 2
        file.write_bytes(data)
        # The store is open for nobody: each look opens the file anew.
        store = begun(tmp_path / "store")
        store.is_whole(1)
        try:
            store.look_up("u7", 4)
        except UserError as error:
            assert "\n" not in str(error)
    store.write(1, *block_of(store, 1))
    assert file.read_bytes() == whole


@pytest.mark.parametrize("written", [-1, 0, 3])
def test_another_number_in_the_table_of_names_loses_no_name_in_silence(tmp_path: Path, written: int) -> None:
    names = [f"user-{number}" for number in range(30)]
    NameIndex.save(tmp_path, "any", names)
    file = tmp_path / "any.slots.npy"
    slots, told = np.load(file), 0
    for slot in np.flatnonzero((slots[:, 0] >= 0) & (slots[:, 0] != written)):
        damaged = slots.copy()
        damaged[slot, 0] = written
        np.save(file, damaged)
        index = NameIndex(tmp_path, "any")
        for number, name in enumerate(names):
            try:
                assert index.find(name) == number
            except UserError as error:
                told += "is damaged" in str(error)
    assert told >= len(names) - 1


@pytest.mark.parametrize("name", ["users.slots", "users.places", "users.bytes", "items.bytes", "titles.places"])
def test_a_damaged_table_is_mended_by_a_build(tmp_path: Path, name: str) -> None:
    filled(tmp_path / "store")
    file = tmp_path / "store" / f"{name}.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:150] + bytes(len(whole) - 150))
    assert begun(tmp_path / "store").missing() == []
    assert file.read_bytes() == whole


def test_a_block_in_the_place_of_another_is_noticed(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    blocks = tmp_path / "store" / "blocks"
    shutil.copy(blocks / "000000.npy", blocks / "000001.npy")
    assert not store.is_whole(1)
    with pytest.raises(UserError, match="is damaged"):
        store.look_up("u7", 4)


def changes_of(act: Callable[[], Any], kill_at: int | None) -> tuple[int, int]:
    """Run something in a forked process, killed right before its so-manieth change on the disk: status and count."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        count = 0

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if writes or event in ("os.rename", "os.mkdir", "os.remove"):
                count += 1
                os.write(writing, b".")
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        status = 70
        try:
            sys.addaudithook(hook)
            act()
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reading, "rb") as pipe:
        return status, len(pipe.read())


def build(folder: Path) -> None:
    store = begun(folder)
    for block in store.missing():
        store.write(block, *block_of(store, block))
    store.finish()


def test_a_build_that_is_killed_anywhere_goes_on(tmp_path: Path) -> None:
    status, count = changes_of(lambda: build(tmp_path / "whole"), None)
    assert status == 0 and count > 30
    names = sorted(str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*"))
    for number in range(1, count + 1, 3):
        folder = tmp_path / str(number)
        status, _ = changes_of(lambda where=folder: build(where), number)
        assert status == -signal.SIGKILL
        if TopKStore.exists(folder) and not (folder / "complete.json").exists():
            with pytest.raises(UserError, match="of 4 blocks"):
                TopKStore.open(folder, WANTED, 4)
        build(folder)
        assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == names
        for name in names:
            if (folder / name).is_file():
                assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (number, name)
        assert json.loads((folder / "store.json").read_text())["k"] == 4
