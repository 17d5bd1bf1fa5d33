"""``recbole-llm prepare --source``: broken lines, damaged files, mistakes, folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from raw_files import (
    ITEMS,
    ROWS,
    amazon2018,
    bytes_of,
    goodreads,
    inter_of,
    movielens_1m,
    told,
    words,
    write_lines,
)

from recbole_llm.cli import main
from recbole_llm.disk import remove
from recbole_llm.errors import DiskFullError, UserError
from recbole_llm.sources.prepare import prepare_source


# --- broken lines ----------------------------------------------------------------------------------------------------
def test_broken_lines_are_counted_by_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    amazon2018(tmp_path, suffix="")
    whole = (tmp_path / "Lamps.json").read_bytes().splitlines()
    good = json.loads(whole[0])
    broken = [
        whole[0][:40], b"[1, 2]", json.dumps({**good, "overall": None}).encode(), b'{"reviewerID": "\xff"}',
        json.dumps({**good, "reviewerID": "a b\tc"}).encode(), json.dumps({**good, "overall": "many"}).encode(),
        json.dumps({**good, "asin": 7}).encode(), b"", json.dumps({**good, "unixReviewTime": float("nan")}).encode(),
        str(good).encode(), json.dumps({"Overall": 5, **{k: v for k, v in good.items() if k != "overall"}}).encode(),
        whole[1][:-1],
    ]  # fmt: skip
    (tmp_path / "Lamps.json").write_bytes(b"\n".join([*whole[:3], *broken, *whole[3:]]))
    arguments = words("amazon2018", "Lamps", tmp_path, tmp_path / "out", broken_share=0.5, user_core=1, item_core=1)
    prepare_source(arguments)
    assert inter_of(tmp_path / "out/made") == [told(row) for row in ROWS]
    lines = json.loads((tmp_path / "out/made/stats.json").read_text())["lines"]["Lamps.json"]
    assert lines == {"lines": len(ROWS) + 11, "broken": 11, "reasons": {
        "are no JSON": {"lines": 2, "first": 4}, "are no JSON object": {"lines": 1, "first": 5},
        "have no 'overall'": {"lines": 1, "first": 6}, "are no utf-8 text": {"lines": 1, "first": 7},
        "have an id that is empty, no text, or has a tab in it or a space at an end": {"lines": 2, "first": 8},
        "have a value that cannot be read": {"lines": 1, "first": 9},
        "have a time or rating that is no number": {"lines": 1, "first": 12},
        "are no JSON but Python's dictionaries, as Amazon's editions before 2018 have": {"lines": 1, "first": 13},
        "have no 'overall' (but 'Overall')": {"lines": 1, "first": 14},
    }}  # fmt: skip
    assert "Lamps.json: 11 of 123 lines are broken: 2 are no JSON (line 4 first), 1" in capsys.readouterr().err
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
    with pytest.raises(UserError, match=r"Lamps.json.gz is no such file: .* 5 of 5 lines .* before 2018 have \(line 1"):
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


def test_a_link_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    amazon2018(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "disk").mkdir()
    for place in ("disk", "nowhere"):
        (tmp_path / "out/made").symlink_to(tmp_path / place)
        with pytest.raises(UserError, match="out/made is a link"):
            prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", overwrite="true"))
        assert os.listdir(tmp_path / "out") == ["made"]
        remove(tmp_path / "out/made")
    assert not os.listdir(tmp_path / "out") and (tmp_path / "disk").is_dir()


def test_milliseconds_are_not_taken_for_seconds(tmp_path: Path) -> None:
    amazon2018(tmp_path, [(user, item, rating, time * 1000) for user, item, rating, time in ROWS])
    with pytest.raises(UserError, match=r"112 have a time that is in no year \(are these seconds since 1970\?\)"):
        prepare_source(words("amazon2018", "Lamps", tmp_path, tmp_path / "out", months=3))


def test_lines_that_end_as_in_dos(tmp_path: Path) -> None:
    for form in (amazon2018, movielens_1m):
        category = form(tmp_path)
        for file in tmp_path.rglob("*.dat"):
            file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
        for file in tmp_path.glob("*.gz"):
            file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b"\n", b"\r\n")))
        source = "movielens" if category == "ml-1m" else "amazon2018"
        prepare_source(words(source, category, tmp_path, tmp_path / "out", user_core=1, item_core=1, name=category))
        made = bytes_of(tmp_path / "out" / category)
        assert not any(b"\r" in content for content in made.values())
        assert made[f"{category}.inter"].count(b"\n") == len(ROWS) + 1


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
        ({"source": ":Mine"}, "unknown source ':Mine'"),
        ({"source": ".mine:Mine"}, "unknown source '.mine:Mine'"),
        ({"source": "recbole_llm.sources.base:Source"}, "Source lacks columns, download, files, licence, title"),
        ({"category": "a" * 300}, "aaa.json.gz: file name too long"),
        ({"input": "a" * 300}, "aaa: file name too long"),
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
        ({"since": "9999-12-31", "until": "9999-12-31"}, "no interaction is left: since 9999-12-31, until 9999-12-31"),
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
