"""RecBole's atomic files as users have them: encodings, line ends, rows without ids, features of some items only."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import small_ml100k

from recbole_llm.atomic import open_atomic
from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.item_text import read_rows
from recbole_llm.errors import UserError


def test_a_row_too_long_is_named_in_utf_16_too(tmp_path: Path) -> None:
    file = tmp_path / "x.inter"
    lines = ["user_id:token\titem_id:token", "u\ta", "\u0a0a\tb", "u\tc\td"]
    file.write_bytes("\n".join(lines).encode("utf-16"))
    with pytest.raises(UserError, match=r"line 4: 3 fields"):
        open_atomic(file, encoding="utf-16")
    file.write_bytes("\n".join(lines[:3]).encode("utf-16"))
    frame = open_atomic(file, encoding="utf-16").frame(["user_id", "item_id"])
    assert frame.to_numpy().tolist() == [["u", "a"], ["\u0a0a", "b"]]


def test_a_carriage_return_in_a_text_of_a_dos_file_stays_in_that_text(tmp_path: Path) -> None:
    file = tmp_path / "x.item"
    file.write_bytes(b"title:token_seq\titem_id:token\r\na\rb\tc0\r\n\r\nd\tc1\r")
    rows = [["a\rb", "c0"], ["d", "c1"]]
    assert open_atomic(file).frame(["title", "item_id"]).to_numpy().tolist() == rows
    assert [texts for _, texts in read_rows(file, ["title", "item_id"])] == rows


def test_rows_without_an_id_are_left_out_and_no_others(tmp_path: Path) -> None:
    rows = [(who, item, time) for who in "uv" for time, item in enumerate("abcd")]
    gaps = [("", "a", 0), *rows[:3], ("u", "", 9), *rows[3:], ("v", "", 9), ("", "", 3)]
    splits = []
    for name, kept in (("whole", rows), ("gaps", gaps)):
        folder = tmp_path / name
        folder.mkdir()
        lines = ["user_id:token\titem_id:token\ttimestamp:float", *("\t".join(map(str, row)) for row in kept)]
        (folder / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
        settings = {"data_path": str(tmp_path), "load_col": {"inter": "*"}, "state": "ERROR"}
        config = Config("BPR", name, config_dict=settings)
        split = create_dataset(config).make_split(config.split_protocol())
        splits.append(split)
        assert not split.candidates[0] and 0 not in split.items
    assert splits[0].fingerprint == splits[1].fingerprint


def test_a_users_own_copy_of_ml_100k_is_read(tmp_path: Path) -> None:
    small_ml100k(tmp_path, users=8, name="ml-100k")
    config = Config("BPR", "ml-100k", config_dict={"data_path": str(tmp_path)})
    assert Path(config["data_path"]) == tmp_path / "ml-100k"
    assert create_dataset(config).user_num == 9
    assert create_dataset(Config("BPR", "ml-100k")).user_num == 944


def test_a_model_that_reads_features_has_the_interactions_of_those_that_read_none(tmp_path: Path) -> None:
    """RecBole drops the interactions of items that .item has no row of, from then on another split."""
    small_ml100k(tmp_path, users=20)
    file = tmp_path / "small/small.item"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([lines[0], *lines[40:]]) + "\n", encoding="utf-8")
    prints = set()
    inter = {"inter": ["user_id", "item_id", "timestamp"]}
    for model, more in (
        ("SASRec", {"load_col": inter}),
        ("SASRecF", {"load_col": inter | {"item": ["item_id", "class"]}, "selected_features": ["class"]}),
    ):
        config = Config(model, "small", config_dict={"data_path": str(tmp_path), "state": "ERROR", **more})
        prints.add(create_dataset(config).make_split(config.split_protocol()).fingerprint)
    assert len(prints) == 1
    stock = Config("SASRecF", "small", config_dict={"data_path": str(tmp_path), "policy": "recbole"})
    assert stock["filter_inter_by_user_or_item"] is True


@pytest.mark.parametrize(("field", "kept"), [("gender", ["F"]), ("age", [41, 45])])
def test_interactions_are_of_users_whose_value_is_asked_for(field: str, kept: list[object]) -> None:
    columns = {"inter": ["user_id", "item_id", "timestamp"], "user": "*"}
    config = Config("BPR", "tiny", config_dict={"load_col": columns, "val_interval": {field: kept}, "state": "ERROR"})
    dataset = create_dataset(config)
    folder = Path(config["data_path"])
    users = open_atomic(folder / "tiny.user").frame(["user_id", field])
    inter = open_atomic(folder / "tiny.inter").frame(["user_id"])
    wanted = set(users["user_id"][users[field].isin(list(map(str, kept)))])
    assert 0 < len(wanted) < len(users)
    assert len(dataset.inter_feat) == inter["user_id"].isin(wanted).sum()
    found = dataset.field2id_token["user_id"][dataset.inter_feat["user_id"].unique()]
    assert set(found) == wanted & set(inter["user_id"])


def test_files_split_before_without_histories_are_refused_for_sequential_models(tmp_path: Path) -> None:
    small_ml100k(tmp_path, users=8)
    rows = (tmp_path / "small/small.inter").read_text(encoding="utf-8").splitlines()
    for phase, part in (("train", rows[1:300]), ("valid", rows[300:350]), ("test", rows[350:400])):
        (tmp_path / f"small/small.{phase}.inter").write_text("\n".join([rows[0], *part]) + "\n", encoding="utf-8")
    settings = {"data_path": str(tmp_path), "policy": "recbole", "benchmark_filename": ["train", "valid", "test"]}
    with pytest.raises(UserError, match="read histories from a column 'item_id_list'"):
        create_dataset(Config("SASRec", "small", config_dict=settings))
    assert create_dataset(Config("BPR", "small", config_dict=settings)).inter_num == len(rows[1:400])
    (tmp_path / "small/small.valid.inter").write_text(rows[0] + "\n", encoding="utf-8")
    assert create_dataset(Config("BPR", "small", config_dict=settings)).inter_num == len(rows[1:300]) + len(
        rows[350:400]
    )
    (tmp_path / "small/small.train.inter").write_text(rows[0] + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"small\.train\.inter has a header and no interaction"):
        create_dataset(Config("BPR", "small", config_dict=settings))


def test_an_error_shows_no_more_than_the_beginning_of_a_column(tmp_path: Path) -> None:
    file = tmp_path / "x.inter"
    file.write_bytes(b"user_id:token\titem_id:token\n" + b"u1\ta\n" * 5000)
    with pytest.raises(UserError) as refused:
        open_atomic(file, encoding="utf-16")
    assert len(str(refused.value)) < 400
