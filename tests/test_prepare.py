"""``recbole-llm prepare``: tokens without training a model, and tokens for items that come later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from test_item_token_stage import quick, raw_ids_of, stages_in

from recbole_llm.cli import main
from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.inspection import inspect
from recbole_llm.itemid.index_file import read_index
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.dccf import DCCF
from recbole_llm.training.item_tokens import CARD, INDEX
from recbole_llm.training.prepare import prepare
from recbole_llm.training.runs import run

HEAD = (ROOT / "dataset/tiny/tiny.item").read_text().splitlines()[0]
NEW = {
    "n1": "Copper Lantern 9\tMystery\tPart 9 of the Copper Lantern series, with a detective and a bitter rival.",
    "n2": "Copper Lantern 10\tMystery\tPart 10 of the Copper Lantern series, with a detective and a guest.",
    "n3": "Iron Orchard 12\tSpace\tA tale of engines.",
    "n4": "Iron Orchard 13\tSpace\tA tale of engines.",
}
HAD = [("u1", "n1"), ("u2", "n1"), ("u1", "n1"), ("u3", "n2"), ("u4", "n2"), ("u5", "n2"), ("stranger", "n3")]
# n1 and n2 have users that are known; n3 and n4 have a text only.
BY_INTERACTIONS, BY_TEXT = ("n1", "n2"), ("n3", "n4")


def write_new(folder: Path, backwards: bool = False) -> tuple[Path, Path]:
    """Files of new items and of their interactions, with items of the data set among them."""
    folder.mkdir(parents=True, exist_ok=True)
    items = [f"{raw}\t{text}" for raw, text in NEW.items()] + ["i1\tan old one\tMystery\tnothing new"]
    had = [f"{user}\t{item}" for user, item in [*HAD, ("u6", "i1")]]
    step = -1 if backwards else 1
    files = folder / "new.item", folder / "new.inter"
    for file, head, rows in zip(files, (HEAD, "user_id:token\titem_id:token"), (items, had), strict=True):
        file.write_text("\n".join([head, *rows[::step]]) + "\n", encoding="utf-8")
    return files


def arguments(output: Path, **more: Any) -> list[str]:
    """Of the verb; ``None`` leaves a setting out."""
    settings = quick(output, model="SASRecCodes", dataset="tiny") | more
    return [f"--{key}={value}" for key, value in settings.items() if value is not None]


def folder_of(told: str) -> Path:
    return Path(told.splitlines()[-1].removeprefix("tokens").strip())


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder whose cache the tests share."""
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_new(tmp_path_factory.mktemp("new"))


# --- the data set's own items ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("levels", [4, 1])
def test_what_it_leaves_can_be_given_to_a_run(output: Path, tmp_path: Path, levels: int) -> None:
    told = prepare(arguments(output, code_levels=levels))
    folder = folder_of(told)
    made = ItemTokens.load(folder, raw_ids_of())
    assert f"80 items, {made.size} tokens; 0.0000 collide" in told
    lines = told.splitlines()
    assert any(line.startswith("item_tokens ") and " made " in line for line in lines)
    assert ("embedding_model" in told) == ("backbone" in told) == (levels > 1)
    again = prepare(arguments(output, code_levels=levels))
    assert any(line.startswith("item_tokens ") and " found " in line for line in again.splitlines())

    result = run("SASRecCodes", "tiny", config_dict=quick(tmp_path, code_tokens=str(folder)))
    kept = ItemTokens.load(Path(result["result_file"]).parent)
    assert kept.fingerprint() == made.fingerprint()
    if levels > 1:
        assert {path.name for path in folder.iterdir()} > {CARD, INDEX, "run.log"}
        assert inspect(["codebook", str(folder)]).startswith("80 items with tokens; levels: 4 of 8 codes each")
    else:
        with pytest.raises(UserError, match="has no codebook: its tokens are ids, titles, or were given"):
            inspect(["codebook", str(folder)])


def test_an_index_file_is_written_and_read(output: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = tmp_path / "deep" / "tiny.index.json"
    assert main(["prepare", *arguments(output, index_file=index)]) == 0
    told = capsys.readouterr().out
    assert f"index       {index}" in told
    assert index.read_bytes() == (folder_of(told.strip()) / INDEX).read_bytes()
    given = folder_of(prepare(arguments(tmp_path / "saved", code_tokens=index, index_file=tmp_path / "again.json")))
    assert (tmp_path / "again.json").read_bytes() == index.read_bytes() and not (given / CARD).exists()


def test_without_a_cache_everything_stays_in_its_folder(tmp_path: Path) -> None:
    folder = folder_of(prepare(arguments(tmp_path, cache="off", code_text_weight=0)))
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert {name.rpartition("-")[0] for name in stages_in(folder / "stages")} == {"train-DCCF", "item_tokens"}


def test_after_a_collapse_the_log_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def alike(self: DCCF, layer: str = "final") -> tuple[torch.Tensor, torch.Tensor]:
        users, items = self.forward()
        return users, torch.ones_like(items)

    monkeypatch.setattr(DCCF, "graph_embeddings", alike)
    with pytest.raises(TrainingStoppedError, match="collapsed"):
        prepare(arguments(tmp_path, code_text_weight=0, code_least_usage=1.0))
    left = [folder for folder in tmp_path.iterdir() if folder.name != "cache"]
    assert [[file.name for file in folder.iterdir()] for folder in left] == [["run.log"]]


# --- items that come later -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", ["nearest", "extra_token", "keep"])
def test_new_items_get_tokens_and_old_ones_keep_theirs(
    output: Path, files: tuple[Path, Path], tmp_path: Path, policy: str
) -> None:
    index = tmp_path / "all.json"
    more = {"index_file": index, "new_items": files[0], "new_interactions": files[1], "code_collisions": policy}
    told = prepare(arguments(output, **more))
    assert "4 new items: 2 placed by their interactions, 2 by their text" in told
    entries = json.loads(index.read_text())
    old = json.loads((folder_of(told) / INDEX).read_text())
    assert list(entries) == [*raw_ids_of()[1:], *NEW] and {raw: entries[raw] for raw in old} == old
    for raw in NEW:
        assert f"  {raw}  {''.join(entries[raw])}  " in told
    levels = 5 if policy == "extra_token" else 4
    everything = read_index(index, ["[PAD]", *entries])
    assert len(everything.level_sizes) == levels
    # n3 and n4 read alike but for a number; a policy keeps them apart all the same.
    assert everything.collision_rate() == 0 or policy == "keep"
    # A model that was trained with the old tokens has all that the new ones are made of.
    assert all(have <= size for have, size in zip(everything.level_sizes, trained_sizes(told), strict=True))


def trained_sizes(told: str) -> tuple[int, ...]:
    return ItemTokens.load(folder_of(told)).level_sizes


def test_no_order_of_rows_and_no_repetition_moves_a_code(
    output: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    made = []
    for number, (items, had) in enumerate([files, files, write_new(tmp_path / "backwards", backwards=True)]):
        index = tmp_path / f"{number}.json"
        prepare(arguments(output, index_file=index, new_items=items, new_interactions=had))
        made.append(index.read_bytes())
    assert made[0] == made[1] == made[2]
    elsewhere = tmp_path / "elsewhere.json"
    prepare(arguments(tmp_path / "saved", index_file=elsewhere, new_items=files[0], new_interactions=files[1]))
    assert elsewhere.read_bytes() == made[0]


def test_interactions_move_the_items_that_have_them_and_no_other(
    output: Path, files: tuple[Path, Path], tmp_path: Path
) -> None:
    entries = []
    for had in (files[1], None):
        index = tmp_path / "all.json"
        told = prepare(
            arguments(output, index_file=index, new_items=files[0], new_interactions=had, code_collisions="keep")
        )
        entries.append(json.loads(index.read_text()))
    assert "4 new items: 0 placed by their interactions, 4 by their text" in told
    assert all(entries[0][raw] == entries[1][raw] for raw in BY_TEXT)
    assert any(entries[0][raw] != entries[1][raw] for raw in BY_INTERACTIONS)
    # Where all is read from text, equal texts have equal codes.
    assert entries[1]["n3"][:1] == entries[1]["n4"][:1]


def test_codes_of_text_place_all_by_text(files: tuple[Path, Path], tmp_path: Path) -> None:
    index = tmp_path / "all.json"
    more = {"index_file": index, "new_items": files[0], "new_interactions": files[1], "item_tokens": "lcrec"}
    told = prepare(arguments(tmp_path / "saved", **more, code_kmeans_points=0))
    assert "4 new items: 0 placed by their interactions, 4 by their text" in told
    assert set(NEW) < set(json.loads(index.read_text()))


def test_no_text_is_read_where_all_have_interactions(files: tuple[Path, Path], tmp_path: Path) -> None:
    had = tmp_path / "all.inter"
    had.write_text("user_id:token\titem_id:token\n" + "".join(f"u{n}\tn{n}\n" for n in range(1, 5)))
    more = {"index_file": tmp_path / "all.json", "new_items": files[0], "new_interactions": had, "item_text": ""}
    told = prepare(arguments(tmp_path / "saved", **more, code_text_weight=0.0))
    assert "4 new items: 4 placed by their interactions, 0 by their text" in told and "backbone" not in told


# --- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"new_items": "old.item"}, "old.item has no item that 'tiny' does not have"),
        ({"new_items": "gone.item"}, r"--new_items: .*gone.item does not exist"),
        ({"new_interactions": "gone.inter"}, r"--new_interactions: .*gone.inter does not exist"),
        ({"new_items": "no_id.item"}, "no_id.item has no column 'item_id'"),
        ({"new_items": "no_text.item"}, "no_text.item has no column 'title'"),
        ({"new_items": "short.item"}, "short.item, line 2: 2 fields where the header has 4"),
        ({"new_interactions": "no_user.inter"}, r"no_user.inter has no column 'user_id' \(it has item_id\)"),
        ({"index_file": "file/x.json"}, r"index_file: .*file/x.json cannot be written"),
        ({"index_file": "."}, "index_file: .* cannot be written"),
        ({"index_file": None}, "--new_items needs --index_file=PATH"),
        ({"new_items": None}, "--new_interactions needs --new_items=FILE.item"),
        ({"item_tokens": "raw"}, "a new item has no token among raw ids"),
        ({"code_size": 3}, r"84 items cannot have codes of their own: 4 level\(s\) of 3 codes make 81"),
        ({"item_text": "", "code_text_weight": 0.0}, "has no template; set item_text"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_in_one_line_before_anything_trains(tmp_path: Path, more: dict[str, Any], says: str) -> None:
    items, had = write_new(tmp_path)
    for name, text in {
        "old.item": f"{HEAD}\ni1\ta\tb\tc\n", "no_id.item": "id:token\ttitle:token_seq\nn1\ta\n",
        "no_text.item": "item_id:token\tname:token_seq\nn9\ta\n", "short.item": f"{HEAD}\nn1\ta\n",
        "no_user.inter": "item_id:token\nn1\n", "file": "",
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    given = {"index_file": tmp_path / "all.json", "new_items": items, "new_interactions": had}
    own = {key: tmp_path / value if key in given and value else value for key, value in more.items()}
    with pytest.raises(UserError, match=says) as caught:
        prepare(arguments(tmp_path / "saved", **given | own))
    assert "\n" not in str(caught.value)
    assert not stages_in(tmp_path) and not (tmp_path / "all.json").exists()
    left = list((tmp_path / "saved").iterdir()) if (tmp_path / "saved").exists() else []
    assert {path.name for path in left} <= {"cache"}


def test_other_models_have_nothing_to_prepare() -> None:
    with pytest.raises(UserError, match=r"BPR reads no item tokens.*SASRecCodes does"):
        prepare(["--model=BPR", "--dataset=tiny"])


def test_an_extra_token_without_a_number_left(tmp_path: Path) -> None:
    """Four sequences of codes, among which one gets more new items than the extra token has numbers."""
    items = tmp_path / "many.item"
    items.write_text("\n".join([HEAD, *(f"n{number}\t{NEW['n3']}" for number in range(80))]) + "\n")
    more = {"code_collisions": "extra_token", "code_size": 2, "code_levels": 2, "index_file": tmp_path / "all.json"}
    with pytest.raises(UserError, match="the extra token has no number left for a new item") as caught:
        prepare(arguments(tmp_path / "saved", **more, new_items=items))
    assert "\n" not in str(caught.value) and not (tmp_path / "all.json").exists()
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["cache"]


def test_a_file_of_codes_holds_no_raw_ids(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--index_file has codes, and these tokens are raw"):
        prepare(arguments(tmp_path, code_levels=1, index_file=tmp_path / "all.json"))
    assert not (tmp_path / "all.json").exists()


# --- behind an encoder -----------------------------------------------------------------------------------------------
def test_new_items_are_read_by_the_trained_encoder(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Behind an encoder too, and for a text that is an old item's the codes are that item's (nothing moves them)."""
    old = (ROOT / "dataset/tiny/tiny.item").read_text().splitlines()[5]
    copy = tmp_path / "copy.item"
    copy.write_text(f"{HEAD}\nnew\t{old.partition(chr(9))[2]}\n")
    more = {"item_tokens": "tiger", "code_collisions": "keep", "code_epochs": 20, "code_kmeans_points": 0}
    prepare(arguments(tmp_path / "saved", **more, index_file=tmp_path / "all.json", new_items=copy))
    entries = json.loads((tmp_path / "all.json").read_text())
    assert entries["new"] == entries[old.partition("\t")[0]]
    codes = read_index(tmp_path / "all.json", ["[PAD]", *entries]).codes
    assert len(torch.unique(codes[1:], dim=0)) > 1
