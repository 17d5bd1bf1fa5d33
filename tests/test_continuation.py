"""``continue_from``: a run's weights and tokens are taken over, new items get tokens, nothing tested was learned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT
from small_models import SMALL
from tiny_folders import KINDS, write

from recbole_llm.config import Config
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING
from recbole_llm.training.codebooks import Quantiser
from recbole_llm.training.continuation import Continued
from recbole_llm.training.item_tokens import INDEX, POINTS, load_points
from recbole_llm.training.language import named_backbone, read_item_text
from recbole_llm.training.new_items import read_new_items, tokenize_new_items
from recbole_llm.training.pipeline import Fit, fit, prepared, store_of
from recbole_llm.training.runs import run
from recbole_llm.training.trained_rows import read_trained_rows

# The items of this many newest first interactions are those that come later.
NEW_ITEMS = 4


def table(name: str) -> tuple[str, list[list[str]]]:
    head, *lines = (ROOT / "dataset" / "tiny" / f"tiny.{name}").read_text(encoding="utf-8").splitlines()
    return head, [line.split("\t") for line in lines]


def write_data(folder: Path, rows: list[list[str]], items: set[str] | None = None) -> Path:
    """The data set ``grown`` with some interactions, and the items that stand in them (or those given)."""
    (folder / "grown").mkdir(parents=True)
    for name, kept in (("inter", rows), ("item", table("item")[1])):
        known = items or {row[1] for row in rows}
        lines = [table(name)[0], *("\t".join(row) for row in kept if name == "inter" or row[0] in known)]
        (folder / "grown" / f"grown.{name}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny without each user's two latest interactions and without some items; the same with them all."""
    rows = table("inter")[1]
    items = sorted({row[1] for row in rows}, key=lambda item: int(item[1:]))
    late = set(items[-NEW_ITEMS:])
    by_user: dict[str, list[list[str]]] = {}
    for row in rows:
        by_user.setdefault(row[0], []).append(row)
    before, after = [], []
    for own in by_user.values():
        own = sorted(own, key=lambda row: float(row[3]))
        old = [row for row in own if row[1] not in late]
        if len(old) < 6:
            continue
        first, then = old[:-2], old[-2:] + [row for row in own if row[1] in late]
        start = float(first[-1][3])
        before += first
        after += first + [[*row[:3], str(start + place)] for place, row in enumerate(then, 1)]
    folders = {name: tmp_path_factory.mktemp(name) for name in ("before", "after")}
    # Interactions alone have come, at the end of the file, so that items are numbered as they were.
    kept, there = {row[1] for row in before}, {tuple(row) for row in before}
    folders["same"] = tmp_path_factory.mktemp("same")
    write_data(folders["before"], before)
    write_data(folders["after"], after)
    write_data(folders["same"], before + [row for row in after if row[1] in kept and tuple(row) not in there])
    return folders


@pytest.fixture(scope="module")
def first(worlds: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a run on ``before``."""
    made: dict[str, Path] = {}
    output = tmp_path_factory.mktemp("first")

    def folder(**more: Any) -> Path:
        key = json.dumps(more, sort_keys=True)
        if key not in made:
            result = run("AlignTokenRec", "grown", config_dict=settings(worlds["before"], output, epochs=3, **more))
            made[key] = Path(result["result_file"]).parent
        return made[key]

    return folder


def settings(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    return SMALL["AlignTokenRec"] | {
        "data_path": str(data), "output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "",
        "epochs": 0, "evaluate_parts": False, "eval_step": 0, "learning_rate": 0.02,
        "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
        "item_text": "{title}[ ({genre})][: {description}]",
    } | more  # fmt: skip


def go_on(before: Path, data: Path, output: Path, **more: Any) -> Fit:
    config = Config("AlignTokenRec", "grown", config_dict=settings(data, output, continue_from=str(before), **more))
    return fit(config, store_of(config))


def old(before: Path, data: Path, **more: Any) -> Fit:
    """The run itself, from its cache."""
    config = Config("AlignTokenRec", "grown", config_dict=settings(data, before.parent, epochs=3, **more))
    made = fit(config, store_of(config))
    assert all(line["cached"] for line in made.stages)
    return made


def by_raw_id(made: Fit) -> dict[str, list[str]]:
    names = made.dataset.field2id_token["item_id"]
    return {str(names[item]): made.model.item_tokens.strings(item) for item in range(1, len(names))}


@pytest.mark.parametrize(
    "more",
    [{}, {"adapter": "lora"}, {"adapter": "none"}, {"code_embedding": "mlp2"}, {"item_tokens": "ed"}],
    ids=["full", "lora", "none", "mlp2", "ed"],
)
def test_it_begins_with_the_weights_and_tokens_of_the_run(
    more: dict[str, Any], first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    before = first(**more)
    run_before, going_on = old(before, worlds["before"], **more), go_on(before, worlds["after"], tmp_path, **more)
    state, expected = going_on.model.state_dict(), run_before.model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    frozen = going_on.model.backbone.decoder.state_dict()
    assert all(
        torch.equal(frozen[name], value) for name, value in run_before.model.backbone.decoder.state_dict().items()
    )
    kept, now = by_raw_id(run_before), by_raw_id(going_on)
    assert len(now) == len(kept) + NEW_ITEMS and all(now[raw] == codes for raw, codes in kept.items())
    assert len({tuple(codes) for codes in now.values()}) == len(now), "new items have tokens of their own"


def test_it_begins_better_than_from_scratch_and_learns_on(first: Any, worlds: dict[str, Path], tmp_path: Path) -> None:
    going_on = go_on(first(), worlds["after"], tmp_path)
    config = Config("AlignTokenRec", "grown", config_dict=settings(worlds["after"], tmp_path))
    fresh = fit(config, store_of(config))
    marks = {line["fingerprint"] for line in fresh.stages} & {line["fingerprint"] for line in going_on.stages}
    assert not marks, "nothing of a fresh run is taken for the one that goes on"

    def loss(made: Fit) -> float:
        torch.manual_seed(0)
        total = 0.0
        with torch.no_grad():
            for rows in made.train_data:
                total += float(made.model.eval().stage_loss(FINE_TUNING, made.model.training_batch(rows)))
        return total / len(made.train_data)

    begun = loss(going_on)
    assert begun < 0.9 * loss(fresh)
    assert loss(go_on(first(), worlds["after"], tmp_path, epochs=3)) < begun


def test_the_result_says_what_it_goes_on_from(first: Any, worlds: dict[str, Path], tmp_path: Path) -> None:
    before = first()
    own = settings(worlds["after"], tmp_path, continue_from=str(before), epochs=1)
    result = run("AlignTokenRec", "grown", config_dict=own)
    then = json.loads((before / "result.json").read_text(encoding="utf-8"))
    said = result["continued_from"]
    assert said["run"] == str(before) and said["fingerprint"] == then["stages"][-1]["fingerprint"]
    assert said["new_items"] == NEW_ITEMS and said["split"] == then["split"]["fingerprint"]
    assert "continued_from" not in then
    # A run that went on can be gone on from.
    folder = Path(result["result_file"]).parent
    again = go_on(folder, worlds["after"], tmp_path)
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert by_raw_id(again) == index
    config = Config("AlignTokenRec", "grown", config_dict=own)
    found = fit(config, store_of(config))
    state = again.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in found.model.state_dict().items())
    assert all(line["cached"] for line in found.stages), "the same call finds what it has made"


def test_a_new_item_gets_the_codes_of_where_its_users_put_it(
    first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    before = first()
    made = go_on(before, worlds["after"], tmp_path)
    stages = [line for line in made.stages if line["name"] == "item_tokens"]
    (folder,) = tmp_path.rglob(f"item_tokens-{stages[0]['fingerprint'][:16]}")
    points, names = load_points(folder), made.dataset.field2id_token["item_id"]
    quantiser = Quantiser.load(folder)
    codes = quantiser.codebook.encode(quantiser.latent(points[1:]))[0]
    known = set(json.loads((before / INDEX).read_text(encoding="utf-8")))
    new = [item for item in range(1, len(names)) if names[item] not in known]
    assert len(new) == NEW_ITEMS and np.abs(points[new]).sum(1).all()
    taken = {tuple(made.model.item_tokens.codes[item].tolist()) for item in range(1, len(names)) if item not in new}
    free = [item for item in new if tuple(codes[item - 1].tolist()) not in taken]
    assert free, "the case of interest"
    for item in free:
        assert torch.equal(made.model.item_tokens.codes[item], codes[item - 1])
    # What is tested was not learned from, here or there.
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    then = prepared(Config("BPR", "grown", config_dict={"data_path": str(worlds["before"]), **columns}))[1]._dataset
    pairs = []
    for data, phases in ((made.train_data._dataset, (VALID, TEST)), (then, (TRAIN,))):
        split = data.split
        rows = np.isin(split.phases, phases)
        tokens = data.field2id_token
        owners = tokens["user_id"][split.users[rows]].tolist()
        pairs.append(set(zip(owners, tokens["item_id"][split.items[rows]].tolist(), strict=True)))
    assert pairs[0] and pairs[1] and not pairs[0] & pairs[1]


def test_without_new_items_given_tokens_and_raw_ids_go_on_too(
    first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    for more in ({"item_tokens": "raw"}, {"code_shuffle": True}):
        kept = by_raw_id(old(first(**more), worlds["before"], **more))
        for data in ("before", "same"):
            made = go_on(first(**more), worlds[data], tmp_path, **more)
            assert by_raw_id(made) == kept
    rows = [old(first(), worlds["before"]).train_data, made.train_data]
    assert len(rows[0]._dataset.split.users) < len(rows[1]._dataset.split.users)
    with pytest.raises(UserError, match="with code_shuffle no codebook gives them any"):
        go_on(first(code_shuffle=True), worlds["after"], tmp_path, code_shuffle=True)
    with pytest.raises(UserError, match="a new item has no token there"):
        go_on(first(item_tokens="raw"), worlds["after"], tmp_path, item_tokens="raw")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"adapter": "lora"}, 'has adapter: "full", and this run "lora"'),
        ({"llm_hidden_size": 32}, "has llm_hidden_size: 16, and this run 32"),
        ({"code_levels": 3}, "has code_levels: 4, and this run 3"),
        ({"embedding_model": "BPR"}, 'has embedding_model: "DCCF"'),
        ({"code_embedding": "mlp3"}, "has code_embedding"),
        ({"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}, "was split otherwise"),
        ({"train_share": 0.5}, "was split otherwise"),
        ({"continue_from": "nowhere"}, "no result.json in nowhere"),
    ],
)
def test_a_run_of_another_kind_is_refused_naming_what_differs(
    more: dict[str, Any], words: str, first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    config = Config(
        "AlignTokenRec", "grown",
        config_dict=settings(worlds["after"], tmp_path) | {"continue_from": str(first())} | more,
    )  # fmt: skip
    with pytest.raises(UserError, match=words) as error:
        fit(config, store_of(config))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.rglob("stage.json"))


def test_what_was_trained_on_valid_rows_goes_on_with_them_only(
    first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    before = first(merge_valid=True)
    with pytest.raises(UserError, match="was trained on its valid rows"):
        go_on(before, worlds["after"], tmp_path)
    going_on = go_on(before, worlds["after"], tmp_path, merge_valid=True)
    assert going_on.train_data._dataset.split.count(VALID) == 0


def test_rows_that_a_run_was_trained_on_are_no_test_rows(
    first: Any, worlds: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter, or a data set without its latest rows, makes earlier ones a user's last, under one protocol."""
    before = first()
    trained = r"was trained on \d+ of the \d+ valid and test rows here"
    with pytest.raises(UserError, match=trained):
        go_on(before, worlds["before"], tmp_path / "filter", val_interval={"rating": "[4,inf)"})
    file = worlds["before"] / "grown" / "grown.inter"
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    latest = {row[0]: row for row in rows}
    fewer = write_data(tmp_path / "data", [row for row in rows if row is not latest[row[0]]], {row[1] for row in rows})
    with pytest.raises(UserError, match=trained):
        go_on(before, fewer, tmp_path / "fewer")
    # Of three runs the third one is held against the first as well.
    own = read_trained_rows(old(before, worlds["before"]).folder)
    both = read_trained_rows(go_on(before, worlds["same"], tmp_path / "second").folder)
    assert own is not None and both is not None and set(own) < set(both)
    monkeypatch.setattr("recbole_llm.training.continuation.read_trained_rows", lambda folder: None)
    with pytest.raises(UserError, match="keeps no list of those that it was trained on"):
        go_on(before, worlds["same"], tmp_path / "none")


def test_other_runs_and_gone_stages_are_refused(first: Any, worlds: dict[str, Path], tmp_path: Path) -> None:
    other = run("BPR", "grown", config_dict={
        "data_path": str(worlds["before"]), "output_dir": str(tmp_path / "bpr"), "epochs": 1, "tensorboard": False,
        "show_progress": False, "gpu_id": "", "load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]},
    })  # fmt: skip
    with pytest.raises(UserError, match="is a run of BPR, and this one is of AlignTokenRec"):
        go_on(Path(other["result_file"]).parent, worlds["after"], tmp_path)
    before = first()
    copied = tmp_path / "copied"
    shutil.copytree(before.parent, copied)
    folder = copied / before.name
    text = (folder / "result.json").read_text(encoding="utf-8")
    (folder / "result.json").write_text(text.replace(str(before.parent), str(copied)), encoding="utf-8")
    (points,) = (file for file in copied.rglob(POINTS) if file.parent.name in _stages(folder))
    points.unlink()
    with pytest.raises(UserError, match="keeps no item embeddings to place them by"):
        go_on(folder, worlds["after"], tmp_path)
    shutil.rmtree(next(copied.rglob("fine_tuning-*")).parent)
    with pytest.raises(UserError, match="is no more in the cache"):
        go_on(folder, worlds["after"], tmp_path)


def _stages(folder: Path) -> set[str]:
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return {f"{line['name']}-{line['fingerprint'][:16]}" for line in result["stages"]}


def test_a_named_language_model_has_to_be_the_same(worlds: dict[str, Path], tmp_path: Path) -> None:
    folder = write(KINDS["qwen3"], tmp_path / "lm")
    more = {"llm": str(folder), "adapter": "lora"}
    result = run("AlignTokenRec", "grown", config_dict=settings(worlds["before"], tmp_path / "a", epochs=1, **more))
    before = Path(result["result_file"]).parent
    made = go_on(before, worlds["after"], tmp_path / "b", **more)
    assert isinstance(made.model.item_tokens, ItemTokens)
    write(KINDS["qwen3"], folder, seed=5)
    with pytest.raises(UserError, match="is not the language model that"):
        go_on(before, worlds["after"], tmp_path / "c", **more)


OF_TEXT: dict[str, Any] = {
    "item_tokens": "tiger", "code_layers": [16], "code_dim": 8, "code_epochs": 20, "code_kmeans_points": 0,
    "code_collisions": "keep",
}  # fmt: skip


def test_items_that_come_later_are_read_by_the_runs_own_language_model(
    first: Any, worlds: dict[str, Path], tmp_path: Path
) -> None:
    """A text that is an old item's has that item's codes, as nothing moves them apart."""
    before = first(**OF_TEXT)
    head, old_items = table("item")
    known = json.loads((before / INDEX).read_text(encoding="utf-8"))
    copied = [row for row in old_items if row[0] in known][:8]
    file = tmp_path / "new.item"
    file.write_text("\n".join([head, *("\t".join(["new_" + row[0], *row[1:]]) for row in copied)]) + "\n", "utf-8")
    own = settings(worlds["after"], tmp_path / "saved", continue_from=str(before), **OF_TEXT)
    config = Config("AlignTokenRec", "grown", config_dict=own)
    _, train_data, _, _ = prepared(config)
    dataset, store = train_data._dataset, store_of(config)
    arrivals = read_new_items(config, dataset, file, None)
    texts = list(read_item_text(config, dataset).texts)
    made = Continued.read(config, dataset).tokenize(config, dataset, store, texts, named_backbone(config))
    new = tokenize_new_items(config, dataset, store, made, arrivals)
    place = {raw: item for item, raw in enumerate(new.raw_ids)}
    for row in copied:
        assert new.tokens.strings(place["new_" + row[0]]) == known[row[0]]
    assert len({tuple(known[row[0]]) for row in copied}) > 1
    assert made.sources.reader is made.sources.backbone
    assert len(list((tmp_path / "saved").rglob("backbone-*/stage.json"))) == 1, "no fresh one was made"
    config["text_llm"] = "embedded"
    with pytest.raises(UserError, match=r"8 new items of .* text_llm: embedded, which read.* is not kept by") as told:
        read_new_items(config, dataset, file, None)
    assert "\n" not in str(told.value)
