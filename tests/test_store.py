"""The stage cache: made once, whole or not at all, checked when read."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.training.state import load_state, rng_state, save_state, set_rng_state
from recbole_llm.training.store import StageStore


def make_file(folder: Path) -> dict[str, Any]:
    (folder / "data.txt").write_text("content", encoding="utf-8")
    return {"lines": 1}


def test_a_stage_is_made_once(tmp_path: Path) -> None:
    store = StageStore(tmp_path)
    first = store.run("step", 1, {"a": 1}, make_file)
    second = store.run("step", 1, {"a": 1}, lambda folder: pytest.fail("made twice"))
    assert (first.cached, second.cached) == (False, True)
    assert second.facts == {"lines": 1} and second.seconds == first.seconds
    assert (second.folder / "data.txt").read_text(encoding="utf-8") == "content"


@pytest.mark.parametrize(
    ("name", "version", "inputs"), [("other", 1, {"a": 1}), ("step", 2, {"a": 1}), ("step", 1, {"a": 2})]
)
def test_another_name_version_or_input_is_another_stage(
    tmp_path: Path, name: str, version: int, inputs: dict[str, int]
) -> None:
    store = StageStore(tmp_path)
    store.run("step", 1, {"a": 1}, make_file)
    assert not store.run(name, version, inputs, make_file).cached


def test_a_flipped_byte_is_seen_said_and_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = StageStore(tmp_path)
    folder = store.run("step", 1, {}, make_file).folder
    (folder / "data.txt").write_bytes(b"contenu")
    again = store.run("step", 1, {}, make_file)
    assert not again.cached and "data.txt has changed" in caplog.text
    assert (again.folder / "data.txt").read_bytes() == b"content"
    (folder / "stage.json").write_text("{", encoding="utf-8")
    assert not store.run("step", 1, {}, make_file).cached


def test_what_failed_is_not_taken_for_finished_and_goes_on(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def stops(folder: Path) -> dict[str, Any]:
        (folder / "half.txt").write_text("half", encoding="utf-8")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.run("step", 1, {}, stops)
    found = []
    stage = store.run("step", 1, {}, lambda folder: found.append((folder / "half.txt").exists()) or make_file(folder))
    assert not stage.cached and found == [True]


def _slow(root: str, mark: str) -> None:
    def make(folder: Path) -> dict[str, Any]:
        with (Path(root) / "made").open("a", encoding="utf-8") as file:
            file.write(mark)
        time.sleep(0.5)
        return make_file(folder)

    StageStore(Path(root) / "cache").run("step", 1, {}, make)


def test_two_runs_that_share_a_cache_make_a_stage_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_slow, args=(str(tmp_path), mark)) for mark in "ab"]
    for process in runs:
        process.start()
    for process in runs:
        process.join(30)
        assert process.exitcode == 0
    assert len((tmp_path / "made").read_text(encoding="utf-8")) == 1


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner),
    max_leaves=8,
)


@given(plain)
def test_state_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "state.safetensors"
    state = {"value": value, "tensor": torch.arange(3), "array": np.eye(2), 5: torch.tensor(1.5, dtype=torch.float64)}
    save_state(path, state)
    back = load_state(path)
    assert back["value"] == value
    assert torch.equal(back["tensor"], state["tensor"]) and back[5].dtype == torch.float64
    assert np.array_equal(back["array"], np.eye(2))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged"):
        load_state(path)
    with pytest.raises(UserError, match="does not exist"):
        load_state(tmp_path / "nothing.safetensors")


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    state = {"weights": torch.tensor([1.5, -2.0], dtype=torch.bfloat16), "epoch": 3, "name": "x"}
    save_state(path, state)
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            load_state(path)


def test_a_checkpoint_of_the_first_release_has_no_checksum_and_is_read(tmp_path: Path) -> None:
    path = tmp_path / "old.safetensors"
    tree = {"kind": "dict", "value": [["weights", {"kind": "tensor", "name": "0"}]]}
    save_file({"0": torch.ones(2)}, str(path), metadata={"tree": json.dumps(tree)})
    assert torch.equal(load_state(path)["weights"], torch.ones(2))


def test_who_may_read_a_file_is_the_umasks_affair(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.touch()
    # safetensors lets nobody else read what it writes.
    write_whole(tmp_path / "weights", lambda part: save_file({"a": torch.zeros(1)}, part))
    assert (tmp_path / "weights").stat().st_mode == plain.stat().st_mode


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, lambda part: part.write_text("first", encoding="utf-8"))

    def fails(part: Path) -> None:
        part.write_text("half", encoding="utf-8")
        (part.parent / ".tmpXyz").write_text("what a library leaves", encoding="utf-8")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with pytest.raises(OSError, match="No space left on device") as caught:
        write_whole(path, fails)
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == str(path)
    assert path.read_text(encoding="utf-8") == "first" and list(tmp_path.iterdir()) == [path]


def _writes(path: str, mark: str) -> None:
    for _ in range(20):
        write_whole(Path(path), lambda part: part.write_text(mark * 100_000, encoding="utf-8"))


def test_two_processes_may_write_the_same_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_writes, args=(str(tmp_path / "file"), mark)) for mark in "ab"]
    for process in writers:
        process.start()
    for process in writers:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "file").read_text(encoding="utf-8") in ("a" * 100_000, "b" * 100_000)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_a_kill_left_beside_a_stage_is_no_part_of_it(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def cut_off(folder: Path) -> dict[str, Any]:
        (folder / "resume.safetensors").write_bytes(b"state")
        (folder / "data.txt.part").mkdir()
        (folder / "data.txt.part" / ".tmpXyz").write_bytes(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        store.run("step", 1, {}, cut_off)
    stage = store.run("step", 1, {}, make_file)
    assert sorted(path.name for path in stage.folder.rglob("*")) == ["data.txt", "stage.json"]


def test_what_a_killed_attempt_took_is_counted_up_to_its_last_file(tmp_path: Path) -> None:
    store = StageStore(tmp_path)

    def killed(folder: Path) -> dict[str, Any]:
        (folder / "resume.safetensors").write_bytes(b"state")
        began = (folder / ".seconds").stat().st_mtime
        os.utime(folder / "resume.safetensors", (began, began + 1000))
        os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=store.run, args=("step", 1, {}, killed))
    process.start()
    process.join(30)
    assert process.exitcode == 9
    assert 1000 <= store.run("step", 1, {}, make_file).seconds < 1060


def test_nothing_but_plain_data_is_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot be saved"):
        save_state(tmp_path / "state.safetensors", {"code": print})


def test_random_streams_go_on(tmp_path: Path) -> None:
    mine, theirs = torch.Generator().manual_seed(1), np.random.default_rng(1)
    save_state(tmp_path / "rng.safetensors", rng_state(mine, theirs, None))
    first = (torch.rand(2), np.random.random(), torch.rand(2, generator=mine), theirs.random())
    set_rng_state(load_state(tmp_path / "rng.safetensors"), mine, theirs, None)
    second = (torch.rand(2), np.random.random(), torch.rand(2, generator=mine), theirs.random())
    assert torch.equal(first[0], second[0]) and first[1] == second[1]
    assert torch.equal(first[2], second[2]) and first[3] == second[3]


def test_a_stage_card_is_readable_json(tmp_path: Path) -> None:
    stage = StageStore(tmp_path).run("step", 3, {"x": [1, 2]}, make_file)
    card = json.loads((stage.folder / "stage.json").read_text(encoding="utf-8"))
    assert card["version"] == 3 and card["inputs"] == {"x": [1, 2]} and set(card["files"]) == {"data.txt"}
