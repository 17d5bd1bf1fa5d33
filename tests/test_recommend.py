"""``recbole-llm recommend``: what it says is what evaluation ranks, from a store as live, and to strangers."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from small_models import SMALL
from test_prepare import write_new

from recbole_llm.cli import main
from recbole_llm.data.ties import tie_order
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.serving.build import build_store
from recbole_llm.serving.recommend import parse, plain_line, recommend
from recbole_llm.serving.recommender import COMPARED, Recommender, unknown
from recbole_llm.serving.store import TopKStore
from recbole_llm.training.prepare import prepare
from recbole_llm.training.run_files import cache_of, read_result
from recbole_llm.training.runs import run
from recbole_llm.training.store import StageStore

MODELS = (
    "BPR", "LightGCN", "Pop", "EASE", "ItemKNN", "DCCF", "FM", "SASRec", "FPMC", "BERT4Rec", "SASRecAllPositions",
    "SASRecCodes", "GLTA", "HCCFPlus", "AlignTokenRec", "TIGER", "MSL", "BIGRec",
)  # fmt: skip
# Without scores over the whole catalogue: what a search does not find has none of its own; FM scores pairs.
SEARCHES, PAIRS = ("AlignTokenRec", "TIGER", "MSL"), ("FM",)
STRANGERS = (
    "EASE",
    "ItemKNN",
    "SASRec",
    "BERT4Rec",
    "SASRecAllPositions",
    "SASRecCodes",
    "AlignTokenRec",
    "MSL",
    "BIGRec",
)
SHOWN = 5


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the runs of this file are, with their cache."""
    return tmp_path_factory.mktemp("saved")


def settings_of(model: str, output: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(output), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
        "eval_step": 0, "eval_batch_size": 32,
    }  # fmt: skip
    return common | SMALL.get(model, {}) | more


@pytest.fixture(scope="module")
def run_of(output: Path) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def folder(model: str) -> Path:
        if model not in made:
            result = run(model, "tiny", config_dict=settings_of(model, output))
            made[model] = Path(result["result_file"]).parent
        return made[model]

    return folder


@pytest.fixture(scope="module")
def loaded(run_of: Callable[..., Path]) -> Callable[..., Recommender]:
    made: dict[str, Recommender] = {}

    def recommender(model: str) -> Recommender:
        if model not in made:
            made[model] = Recommender.of_run(run_of(model))
        return made[model]

    return recommender


def answers(arguments: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recommend([*arguments, "--format=json"]).splitlines()]


# --- live is what evaluation ranks -----------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
def test_with_the_histories_of_the_test_it_gives_the_rankings_of_the_test(
    model: str, run_of: Callable[..., Path]
) -> None:
    rankings = Rankings.read(run_of(model) / "rankings.npz")
    recommender = Recommender.of_run(run_of(model), phases=("train", "valid"))
    given = recommender.recommend(rankings.user_id.tolist(), rankings.top.shape[1])
    assert [[item for item, _, _ in one] for one in given] == rankings.item_id[rankings.top].tolist()


@pytest.mark.parametrize("model", [model for model in MODELS if model not in (*SEARCHES, *PAIRS)])
def test_the_best_are_those_of_a_plain_sort_of_the_models_scores(
    model: str, loaded: Callable[..., Recommender]
) -> None:
    recommender = loaded(model)
    fit, split = recommender.fit, recommender.fit.test_data.split
    known = split.histories(0, 1, 2)
    order = tie_order(recommender.pool.raw_ids).tolist()
    names = fit.dataset.field2id_token["user_id"]
    for number in (0, 1, 3):
        interaction, excluded = recommender.loader.batch(number)
        with torch.no_grad():
            if hasattr(fit.model, "full_sort_predict_excluding"):
                scores = fit.model.full_sort_predict_excluding(interaction, *excluded, recommender.pool.candidates)
            else:
                scores = fit.model.full_sort_predict(interaction).view(len(interaction), -1)
        for row, user in enumerate(interaction["user_id"].tolist()):
            if model == "BIGRec" and row % 4:
                # It writes a text for each user.
                continue
            free = [item for item in order if item and item not in set(known.of(user).tolist())]
            best = sorted(free, key=lambda item, own=scores[row]: -float(own[item]))[:SHOWN]
            given = recommender.recommend([str(names[user])], SHOWN)[0]
            assert [recommender.pool.number[item] for item, _, _ in given] == best
            assert [score for _, _, score in given] == [float(scores[row, item].float()) for item in best]


# --- a store is live -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", MODELS)
def test_a_store_gives_what_live_gives(model: str, loaded: Callable[..., Recommender], tmp_path: Path) -> None:
    recommender = loaded(model)
    assert len(recommender.users) == 120 and 1 < recommender.batch <= 64
    store = build_store(recommender, tmp_path / "store", k=SHOWN)
    opened = TopKStore.open(tmp_path / "store", recommender.built_for, SHOWN)
    # Where a user takes a search of his own, some of every batch.
    for user in recommender.users[:: 4 if model in (*SEARCHES, "BIGRec") else 1]:
        live, stored = recommender.recommend([user], SHOWN)[0], opened.look_up(user, SHOWN)
        assert stored is not None and len(live) == SHOWN
        if model in SEARCHES:
            # Searched alone, so that the last bits differ.
            assert [score for *_, score in stored] == pytest.approx([score for *_, score in live], abs=1e-5)
            stored = [(*named, score) for (*named, _), (*_, score) in zip(stored, live)]
        assert stored == live
    assert recommender.recommend(recommender.users[7:9], 2) == [
        opened.look_up(user, 2) for user in recommender.users[7:9]
    ]
    # In another process's memory, too: a run that is loaded again gives the same bits.
    again = Recommender.of_run(Path(read_again(recommender)))
    build_store(again, tmp_path / "again", k=SHOWN)
    for block in range(store.n_blocks):
        name = f"blocks/{block:06d}.npy"
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "store" / name).read_bytes()


def test_asked_for_throughput_a_search_gives_the_stores_own_bits(
    loaded: Callable[..., Recommender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = loaded("AlignTokenRec")
    build_store(recommender, tmp_path / "store", k=SHOWN)
    opened = TopKStore.open(tmp_path / "store", recommender.built_for, SHOWN)
    monkeypatch.setitem(recommender.model.config.final_config_dict, "search_mode", "throughput")
    for user in recommender.users[::7]:
        assert recommender.recommend([user], SHOWN)[0] == opened.look_up(user, SHOWN)


def test_a_search_ranks_one_who_is_asked_about_alone_by_himself(
    loaded: Callable[..., Recommender], monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = loaded("AlignTokenRec")
    ranked: list[int] = []
    own = recommender.model.full_sort_predict_excluding

    def counted(interaction: Any, *more: Any) -> Any:
        ranked.append(len(interaction))
        return own(interaction, *more)

    monkeypatch.setattr(recommender.model, "full_sort_predict_excluding", counted)
    recommender.recommend(recommender.users[:1])
    recommender.recommend(recommender.users[:2])
    monkeypatch.setitem(recommender.model.config.final_config_dict, "search_mode", "latency")
    recommender.recommend(recommender.users[:2])
    assert ranked == [1, recommender.batch, 1, 1]


def read_again(recommender: Recommender) -> Path:
    """The folder of the run that a recommender is of."""
    saved = Path(recommender.config["output_dir"])
    name = recommender.config["model"]
    return next(path for path in sorted(saved.glob(f"{name}-tiny-*")))


@pytest.mark.parametrize("model", ["BPR", "AlignTokenRec"])
def test_shards_equal_one_piece(
    model: str, loaded: Callable[..., Recommender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.serving.build.BLOCK_USERS", 32)
    recommender = loaded(model)
    whole = build_store(recommender, tmp_path / "whole", k=SHOWN)
    assert whole.n_blocks > 1
    for shard in (1, 2, 0):
        parts = build_store(recommender, tmp_path / "parts", k=SHOWN, shard=(shard, 3))
        assert (tmp_path / "parts" / "complete.json").exists() == (not parts.missing())
    assert not parts.missing()
    for user in recommender.users:
        assert parts.look_up(user, SHOWN) == whole.look_up(user, SHOWN)


def test_what_is_there_is_not_ranked_again(
    loaded: Callable[..., Recommender], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("recbole_llm.serving.build.BLOCK_USERS", 32)
    recommender = loaded("BPR")
    store = build_store(recommender, tmp_path / "store", k=SHOWN)
    before = (tmp_path / "store" / "blocks" / "000002.npy").read_bytes()
    (tmp_path / "store" / "blocks" / "000002.npy").write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    ranked: list[int] = []
    monkeypatch.setattr(
        Recommender,
        "rank_batch",
        lambda self, number, k, own=Recommender.rank_batch: ranked.append(number) or own(self, number, k),
    )
    build_store(recommender, tmp_path / "store", k=SHOWN)
    assert ranked == [2] and store.is_whole(2)
    assert (tmp_path / "store" / "blocks" / "000002.npy").read_bytes() == before


def test_a_build_killed_at_any_moment_goes_on(
    run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real processes, each killed at some moment of its own between the blocks that are missing, until one ends."""
    monkeypatch.setattr("recbole_llm.serving.build.BLOCK_USERS", 1)
    recommender = Recommender.of_run(run_of("SASRec"), eval_batch_size=2)
    blocks, draw = tmp_path / "store" / "blocks", random.Random(time.time_ns())

    def there() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in blocks.glob("*.npy")}

    def write(*given: Any, own: Callable[..., None] = TopKStore.write) -> None:
        time.sleep(60 if len(there()) > 55 else 0)
        own(*given)

    killed = 0
    for _ in range(4):
        child = os.fork()
        if not child:
            # It waits to be killed before the end, however slowly the other process looks.
            monkeypatch.setattr(TopKStore, "write", write)
            try:
                build_store(recommender, tmp_path / "store", k=SHOWN)
            finally:
                os._exit(70)
        before, aim = there(), draw.randrange(8)
        while len(there()) < min(len(before) + aim, 50):
            time.sleep(draw.random() / 1000)
        os.kill(child, signal.SIGKILL)
        killed += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert before.items() <= there().items()
    before = there()
    assert killed == 4 and 0 <= len(before) < 60
    if before:
        with pytest.raises(UserError, match="of 60 blocks"):
            TopKStore.open(tmp_path / "store", recommender.built_for, SHOWN)
    store = build_store(recommender, tmp_path / "store", k=SHOWN)
    assert before.items() <= there().items()
    assert not list((tmp_path / "store").rglob("*.part"))
    opened = TopKStore.open(tmp_path / "store", recommender.built_for, SHOWN)
    assert store.n_blocks == 60
    assert [opened.look_up(user, SHOWN) for user in recommender.users] == recommender.recommend(
        recommender.users, SHOWN
    )


# --- what is stale ---------------------------------------------------------------------------------------------------
@pytest.fixture
def copied(run_of: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A run with its stage and its store, free to be spoilt."""

    def copy(model: str) -> Path:
        source = run_of(model)
        shutil.copytree(source, tmp_path / "saved" / source.name)
        for line in read_result(source)["stages"]:
            name = f"{line['name']}-{line['fingerprint'][:16]}"
            for stage in (source.parent / "cache").glob(f"*{name[-16:]}"):
                shutil.copytree(stage, tmp_path / "saved" / "cache" / stage.name, dirs_exist_ok=True)
        target = tmp_path / "saved" / source.name
        result = json.loads((target / "result.json").read_text())
        result["config"]["output_dir"] = str(tmp_path / "saved")
        (target / "result.json").write_text(json.dumps(result))
        return target

    return copy


def change(run_folder: Path, **values: Any) -> None:
    result = json.loads((run_folder / "result.json").read_text())
    for place, value in values.items():
        *path, last = place.split("__")
        part = result
        for key in path:
            part = part[int(key) if key.lstrip("-").isdecimal() else key]
        part[last] = value
    (run_folder / "result.json").write_text(json.dumps(result))


def test_a_stale_store_is_refused_by_name(
    copied: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = copied("BPR")
    arguments = ["recommend", f"--run={folder}", "--user=u3", "--k=5"]
    assert main(["recommend", f"--run={folder}", "--build=true", "--k=5", "--show_progress=false"]) == 0
    assert main(arguments) == 0
    live, stored = (answers([*arguments[1:], *more])[0] for more in (["--store=off"], []))
    assert (live.pop("source"), stored.pop("source")) == ("live", "store") and live == stored
    capsys.readouterr()

    def refused(says: str) -> None:
        assert main(arguments) == 2
        told = capsys.readouterr()
        assert says in told.err and told.err.count("\n") == 1 and not told.out
        assert "--build=anew" in told.err and "--store=off" in told.err

    weights = next((tmp_path / "saved" / "cache").glob("train-BPR-*/weights.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("of other weights than this run has now")
    # The same bytes at another time are the same weights.
    weights.write_bytes(whole)
    assert main(arguments) == 0
    capsys.readouterr()
    shutil.rmtree(weights.parent)
    # Without weights nothing can be ranked live, but what was ranked is still true.
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--store=off"]) == 2
    assert "train-BPR of this run is not in the cache" in capsys.readouterr().err
    change(folder, split__fingerprint="0" * 64)
    refused("of another split")


def test_the_store_of_another_run_is_refused(
    run_of: Callable[..., Path], loaded: Callable[..., Recommender], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build_store(loaded("Pop"), tmp_path / "store", k=SHOWN)
    named, other = f"--store={tmp_path / 'store'}", f"--run={run_of('BPR')}"
    # What the runs said, where no earlier test has made them.
    capsys.readouterr()
    for arguments in (["--user=u3"], ["--build=true"]):
        assert main(["recommend", other, named, *arguments, "--k=5"]) == 2
        told = capsys.readouterr().err
        assert f"the store in {tmp_path / 'store'} is of a Pop run, and this one is of BPR" in told
        assert told.count("\n") == 1
    for k, more, says in (
        (5, ["--history_phases=train"], "of history_phases train,valid,test, and what is asked for is train"),
        (6, [], "holds the best 5 items of each user, and --k is 6"),
    ):
        assert main(["recommend", f"--run={run_of('Pop')}", named, "--user=u3", f"--k={k}", *more]) == 2
        assert says in capsys.readouterr().err


# --- somebody the data set does not know -----------------------------------------------------------------------------
@pytest.mark.parametrize("model", STRANGERS)
def test_a_history_alone_gives_what_its_owner_gets(model: str, run_of: Callable[..., Path]) -> None:
    """A stranger with a user's history is recommended what the user is."""
    phases = ("train",) if model in ("EASE", "ItemKNN") else ("train", "valid", "test")
    recommender = Recommender.of_run(run_of(model), phases=phases)
    known = recommender.fit.test_data.split.histories(*range(len(phases)))
    raw_ids = recommender.pool.raw_ids
    for row in (0, 50, 119):
        items = [raw_ids[item] for item in known.of(recommender.loader.users[row]).tolist()]
        own = recommender.recommend([recommender.users[row]], SHOWN)[0]
        given = recommender.recommend_history(items, SHOWN)
        assert [item for item, _, _ in given] == [item for item, _, _ in own]
        assert [score for _, _, score in given] == pytest.approx([score for _, _, score in own], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "DCCF", "GLTA", "Pop", "FM", "FPMC"])
def test_who_knows_users_by_name_takes_no_history(model: str, loaded: Callable[..., Recommender]) -> None:
    with pytest.raises(UserError, match=f"{model} knows users by what it has learned.*SASRec") as caught:
        loaded(model).recommend_history(["i1", "i2"], SHOWN)
    assert "\n" not in str(caught.value)


def test_the_order_of_a_history_counts_and_its_items_are_left_out(loaded: Callable[..., Recommender]) -> None:
    recommender = loaded("SASRec")
    there, back = (recommender.recommend_history(items, 80 - 3) for items in (["i1", "i2", "i3"], ["i3", "i2", "i1"]))
    assert there != back
    for given in (there, back):
        assert {item for item, _, _ in given} == set(recommender.pool.raw_ids[1:]) - {"i1", "i2", "i3"}
    # A longer one than the model reads is cut to its latest.
    long = [f"i{number}" for number in range(1, 31)]
    shown = recommender.config["MAX_ITEM_LIST_LENGTH"]
    by_long = {item: score for item, _, score in recommender.recommend_history(long, 50)}
    by_end = {item: score for item, _, score in recommender.recommend_history(long[-shown:], 70)}
    assert all(by_end[item] == pytest.approx(score) for item, score in by_long.items())


def test_a_store_that_cannot_be_read_is_built_anew(
    run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").touch()
    words = ["recommend", f"--run={run_of('BPR')}", f"--store={tmp_path / 'store'}", "--show_progress=false"]
    for more in ("--build=true", "--user=u3"):
        assert main([*words, more]) == 2
        assert "store.json cannot be read; --build=anew" in capsys.readouterr().err
    assert main([*words, "--build=anew"]) == 0
    assert main([*words, "--user=u3"]) == 0


# --- items that come later -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["SASRecCodes", "AlignTokenRec"])
def test_new_items_are_recommended_without_training(
    model: str, output: Path, run_of: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_of(model)
    items, had = write_new(tmp_path / "new")
    index = tmp_path / "all.json"
    more = {"index_file": index, "new_items": items, "new_interactions": had}
    settings = settings_of(model, output) | {"model": model, "dataset": "tiny"} | more
    prepare([f"--{key}={value}" for key, value in settings.items()])
    before = sorted(path.name for path in (output / "cache").iterdir())
    let_in = [f"--index_file={index}", f"--new_items={items}"]

    built = [f"--run={folder}", f"--store={tmp_path / 'store'}", "--k=20", "--show_progress=false"]
    assert main(["recommend", *built, "--build=true"]) == 0
    assert main(["recommend", *built, "--user=u3", *let_in]) == 2
    told = capsys.readouterr().err
    assert "is of another item pool: it was built without new items, and what is asked for is with new items" in told
    assert main(["recommend", *built, "--build=anew", *let_in]) == 0
    assert main(["recommend", *built, "--user=u3"]) == 2
    assert "it was built with new items" in capsys.readouterr().err

    recommender = Recommender.of_run(folder, index_file=index, new_items=items)
    live = recommender.recommend(recommender.users, 20)
    store = TopKStore.open(tmp_path / "store", recommender.built_for, 20)
    assert [store.look_up(user, 20) for user in recommender.users] == live
    entered = {item: title for one in live for item, title, _ in one if item.startswith("n")}
    assert entered and entered.items() <= {"n1": "Copper Lantern 9", "n2": "Copper Lantern 10",
                                           "n3": "Iron Orchard 12", "n4": "Iron Orchard 13"}.items()  # fmt: skip
    # What is old keeps its scores: nothing was trained, and a search normalises over all tokens.
    old = Recommender.of_run(folder)
    for user, one in zip(old.users[:10], live):
        scores = {item: score for item, _, score in old.recommend([user], 20)[0]}
        shared = [(scores[item], score) for item, _, score in one if item in scores]
        assert len(shared) >= 10 and all(mine == pytest.approx(theirs, abs=1e-4) for mine, theirs in shared)
    # It can stand in a history as well.
    assert "n1" not in {item for item, _, _ in recommender.recommend_history(["i1", "n1"], 20)}
    assert sorted(path.name for path in (output / "cache").iterdir()) == before


def test_new_items_that_cannot_enter_are_refused(
    run_of: Callable[..., Path], loaded: Callable[..., Recommender], tmp_path: Path
) -> None:
    codes = json.loads((run_of("AlignTokenRec") / "items.index.json").read_text())
    index = tmp_path / "all.json"

    def refused(model: str, says: str, entries: dict[str, Any], **more: Any) -> None:
        index.write_text(json.dumps(entries))
        with pytest.raises(UserError, match=says) as caught:
            Recommender.of_run(run_of(model), index_file=index, **more)
        assert "\n" not in str(caught.value)

    new = {"new": codes["i1"]}
    refused("BPR", "BPR does not read items as codes", codes | new)
    refused("AlignTokenRec", "has no item that 'tiny' does not have", codes)
    refused(
        "AlignTokenRec", "item 'i1' has other codes than the run was trained with", codes | new | {"i1": codes["i2"]}
    )
    refused("AlignTokenRec", "level 1 has 8 codes", codes | {"new": ["<a_8>", *codes["i1"][1:]]})
    refused(
        "AlignTokenRec",
        "has no codes for 1 of the data set's",
        {key: value for key, value in (codes | new).items() if key != "i2"},
    )
    refused("AlignTokenRec", "none.item does not exist", codes | new, new_items=tmp_path / "none.item")
    with pytest.raises(UserError, match="there is no index file"):
        Recommender.of_run(run_of("AlignTokenRec"), index_file=tmp_path / "gone.json")


# --- found again, not trained again ----------------------------------------------------------------------------------
def test_nothing_is_trained_and_nothing_is_written(
    run_of: Callable[..., Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_of("AlignTokenRec")
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    monkeypatch.setattr(StageStore, "_fill", lambda *_: pytest.fail("a stage was made"))
    assert recommend([f"--run={folder}", "--user=u3"]).startswith("user u3 (live)")
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


@pytest.mark.parametrize(
    ("gone", "says"),
    [("fine_tuning", "fine_tuning of this run is not in the cache"), ("train-DCCF", "train-DCCF of this run is not")],
)
def test_a_stage_that_is_gone_is_told(copied: Callable[..., Path], gone: str, says: str) -> None:
    folder = copied("AlignTokenRec")
    for stage in (folder.parent / "cache").glob(f"{gone}-*"):
        shutil.rmtree(stage)
    with pytest.raises(UserError, match=says) as caught:
        Recommender.of_run(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_stage_is_told_and_left(copied: Callable[..., Path]) -> None:
    folder = copied("BPR")
    weights = next((folder.parent / "cache").glob("train-BPR-*/weights.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged in the cache"):
        Recommender.of_run(folder)
    assert weights.exists()


@pytest.mark.parametrize("model", ["AlignTokenRec", "LCRec", "LETTER"])
def test_new_items_enter_a_run_that_went_on_from_another(
    model: str, run_of: Callable[..., Path], output: Path, tmp_path: Path
) -> None:
    """By the codebook that its items have tokens of, which is not what its own settings would make."""
    settings = settings_of(model, output, continue_from=str(run_of(model)), seed=7)
    folder = Path(run(model, "tiny", config_dict=settings)["result_file"]).parent
    index, items = tmp_path / "all.json", write_new(tmp_path)[0]
    asked = settings | {"model": model, "dataset": "tiny", "index_file": index, "new_items": items}
    prepare([f"--{key}={value}" for key, value in asked.items()])
    known = Recommender.of_run(folder).pool.candidates
    recommender = Recommender.of_run(folder, index_file=index, new_items=items)
    assert int(recommender.pool.candidates.sum()) == int(known.sum()) + 4
    assert len(recommender.recommend_history(["n1", "i3"], 10)) == 10


@pytest.mark.parametrize(
    "more",
    [
        {"model": "SASRecCodes", "item_tokens": "lcrec", "code_levels": 4, "code_kmeans_points": 0},
        {"model": "BPR", "embedding_size": 8, "train_neg_sample_args": "{sample_num: 2}", "exclude_history": False},
        {"model": "SASRec", "eval_args": "{split: {RS: [0.8, 0.1, 0.1]}, order: TO}", "refit_on_valid": True},
        {"model": "AlignTokenRec", "refit_on_valid": True, "eval_step": 1, "epochs": 2, "lr_schedule": "linear"},
        {"model": "LightGCN", "cache": "off", "train_share": 0.5, "tuned": False},
    ],
    ids=lambda more: more["model"],
)
def test_any_settings_are_found_again(more: dict[str, Any], output: Path) -> None:
    """Settings that move other settings' defaults, keep stages elsewhere or train twice."""
    model = more["model"]
    settings = settings_of(model, output) | {"dataset": "tiny"} | more
    result = run(command_line=[f"--{key}={value}" for key, value in settings.items()])
    folder = Path(result["result_file"]).parent
    rankings = Rankings.read(folder / "rankings.npz")
    given = Recommender.of_run(folder, phases=("train", "valid")).recommend(rankings.user_id.tolist(), 10)
    assert [[item for item, _, _ in one] for one in given] == rankings.item_id[rankings.top[:, :10]].tolist()


@pytest.mark.parametrize("more", [{"user": ","}, {"history": ""}, {"history": ","}, {"user": ",,"}], ids=str)
def test_nobody_and_nothing_are_refused_before_the_run_is_read(more: dict[str, str]) -> None:
    ((key, value),) = more.items()
    with pytest.raises(UserError, match=f"--{key} names no"):
        parse(["--run=nowhere", f"--{key}={value}"])


def test_histories_that_are_not_excluded_come_again(loaded: Callable[..., Recommender], output: Path) -> None:
    result = run("Pop", "tiny", config_dict=settings_of("Pop", output, exclude_history=False))
    recommender = Recommender.of_run(Path(result["result_file"]).parent)
    every = recommender.recommend(recommender.users[:5], 80)
    assert all({item for item, _, _ in one} == set(recommender.pool.raw_ids[1:]) for one in every)
    left = loaded("Pop").recommend(recommender.users[:5], 80)
    known = recommender.fit.test_data.split.histories(0, 1, 2).lengths[recommender.loader.users[:5]]
    assert [len(one) for one in left] == (80 - known).tolist()


# --- names and titles ------------------------------------------------------------------------------------------------
def test_nasty_names_and_titles_come_back_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids with commas, blanks and quotes, titles with escapes and tokens: JSON has them whole, a table in one line."""
    titles = [
        "\x1b[31mred",
        "</s><a_1>",
        'say "hi", x',
        " padded ",
        "ünïcode ☃🂡",
        "[INST] {title}",
        "NA",
        "a\u2028b\rc",
    ]
    folder = tmp_path / "data" / "nasty"
    folder.mkdir(parents=True)
    users = [f"u,{n} \"é'" for n in range(30)]
    items = [f"i {n},'x" for n in range(12)]
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    lines += [
        f"{user}\t{items[(n * 5 + step * (1 + n % 3)) % 12]}\t{step}"
        for n, user in enumerate(users)
        for step in range(6)
    ]
    (folder / "nasty.inter").write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
    rows = [f"{item}\t{titles[n % len(titles)]}" for n, item in enumerate(items)]
    (folder / "nasty.item").write_text("\n".join(["item_id:token\tname:token_seq", *rows]) + "\n", encoding="utf-8")
    settings = settings_of(
        "SASRec", tmp_path / "saved", data_path=str(tmp_path / "data"), item_text="{name}", topk=[3],
        valid_metric="NDCG@3", load_col={"inter": ["user_id", "item_id", "timestamp"]}, TIME_FIELD="timestamp",
    )  # fmt: skip
    result = run("SASRec", "nasty", config_dict=settings)
    folder = Path(result["result_file"]).parent
    own = dict(zip(items, (titles[n % len(titles)] for n in range(12))))
    live = answers([f"--run={folder}", "--user=" + json.dumps(users[:3]), "--k=3"])
    assert main(["recommend", f"--run={folder}", "--build=true", "--k=3", "--show_progress=false"]) == 0
    file = tmp_path / "users.txt"
    file.write_text("\n".join(users[:3]) + "\n", encoding="utf-8")
    stored = answers([f"--run={folder}", f"--users={file}", "--k=3"])
    assert [one["user"] for one in stored] == users[:3] and [one["items"] for one in stored] == [
        one["items"] for one in live
    ]
    for one in stored:
        assert [row["rank"] for row in one["items"]] == [1, 2, 3]
        assert all(row["title"] == own[row["item"]] for row in one["items"])
    capsys.readouterr()
    assert main(["recommend", f"--run={folder}", f"--users={file}", "--k=3"]) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table and "\u2028" not in table and "\r" not in table
    assert len(table.splitlines()) == 3 * 6 + 2
    given = answers([f"--run={folder}", "--history=" + json.dumps(items[:2]), "--k=3"])[0]
    assert given["user"] is None and not {row["item"] for row in given["items"]} & set(items[:2])


def test_a_table_is_one_line_an_item() -> None:
    assert plain_line("a\nb\x1b[2Jc\u202ed  e") == "a b [2Jc d e"


def test_without_titles_ids_stand_alone(output: Path) -> None:
    result = run("Pop", "tiny", config_dict=settings_of("Pop", output, item_text=""))
    told = recommend([f"--run={Path(result['result_file']).parent}", "--user=u3"])
    assert told.splitlines()[1].split() == ["rank", "item", "score"] and len(told.splitlines()) == 13


def test_titles_that_cannot_be_read_leave_ids(output: Path, caplog: pytest.LogCaptureFixture) -> None:
    result = run("Pop", "tiny", config_dict=settings_of("Pop", output, item_text="{nowhere}"))
    told = recommend([f"--run={Path(result['result_file']).parent}", "--user=u3"])
    assert told.splitlines()[1].split() == ["rank", "item", "score"] and "shown by their ids" in caplog.text


def test_a_file_of_users_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "users.txt").write_text("\ufeffu1\r\nu2\r\n", encoding="utf-8")
    assert parse(["--run=x", f"--users={tmp_path / 'users.txt'}"]).users == ["u1", "u2"]


def test_the_cache_is_the_one_beside_the_run_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another project's saved/cache is none of its."""
    run_folder = tmp_path / "saved" / "BPR-tiny"
    for folder in (run_folder, tmp_path / "saved" / "cache", tmp_path / "other" / "saved" / "cache"):
        folder.mkdir(parents=True)
    settings = {"cache": "use", "output_dir": "saved"}
    monkeypatch.chdir(tmp_path / "other")
    assert cache_of(settings, run_folder) == tmp_path / "saved" / "cache"
    assert cache_of(settings, run_folder, str(tmp_path / "other" / "saved")) == tmp_path / "other" / "saved" / "cache"
    # A run that was copied away alone has its cache where it was.
    (tmp_path / "alone" / "BPR-tiny").mkdir(parents=True)
    assert cache_of(settings, tmp_path / "alone" / "BPR-tiny") == Path("saved/cache")


def test_items_of_one_title_are_recommended_as_they_were_measured(tmp_path: Path) -> None:
    result = run("MSL", "tiny", config_dict=settings_of("MSL", tmp_path, title_match=True, title_tokens=2))
    folder = Path(result["result_file"]).parent
    rankings = Rankings.read(folder / "rankings.npz")
    assert result["evaluation"]["title_match"]
    served = Recommender.of_run(folder, phases=("train", "valid"))
    given = served.recommend(rankings.user_id.tolist(), 3)
    titles = dict(zip(served.pool.raw_ids, served.model.counts_as.tolist(), strict=True))
    assert len(set(titles.values())) < 0.8 * len(titles), "no titles are shared; the test would pass blindly"
    wanted = rankings.item_id[rankings.top[:, :3]].tolist()
    assert [[titles[item] for item, _, _ in one] for one in given] == [[titles[item] for item in one] for one in wanted]
    # A title that he may be shown for a copy of it is shown as that copy.
    rows = (
        line.split("\t") for line in (ROOT / "dataset/tiny/tiny.inter").read_text(encoding="utf-8").splitlines()[1:]
    )
    had: dict[str, set[str]] = {}
    for user, item, *_ in rows:
        had.setdefault(user, set()).add(item)
    every = Recommender.of_run(folder).recommend(rankings.user_id.tolist(), 3)
    assert not [item for user, one in zip(rankings.user_id.tolist(), every) for item, _, _ in one if item in had[user]]


def test_an_item_that_a_user_had_often_is_left_out_once(tmp_path: Path) -> None:
    source = ROOT / "dataset" / "tiny"
    (tmp_path / "data" / "often").mkdir(parents=True)
    head, *rows = (source / "tiny.inter").read_text(encoding="utf-8").splitlines()
    own = [row.split("\t") for row in rows if row.startswith("u31\t")]
    first = min(own, key=lambda row: float(row[3]))
    rows += ["\t".join(first)] * 60
    (tmp_path / "data/often/often.inter").write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    shutil.copy(source / "tiny.item", tmp_path / "data/often/often.item")
    more = {"data_path": str(tmp_path / "data"), "item_text": "{title}", "load_col": {"inter": "*"}}
    result = run("MSL", "often", config_dict=settings_of("MSL", tmp_path, **more))
    served = Recommender.of_run(Path(result["result_file"]).parent)
    assert all(len(items) == 3 for items in served.recommend(["u31", "u2"], 3))


@pytest.mark.parametrize("content", ["{}", '{"model": "BPR", "dataset": "tiny", "config": {}}'])
def test_a_result_that_is_no_runs_is_told(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "result.json").write_text(content, encoding="utf-8")
    for whom in ("--user=u1", "--history=i1"):
        assert main(["recommend", f"--run={tmp_path}", whom]) == 2
        told = capsys.readouterr()
        assert told.err.count("\n") == 1 and "no run's" in told.err


# --- wrong input -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--user=u3"], "--run=DIR is missing"),
        (["--run=RUN"], "whom to recommend to is said by one of --user"),
        (["--run=RUN", "--user=u3", "--history=i1"], "whom to recommend to is said by one of --user"),
        (["--run=RUN", "--usr=u3"], "recommend knows no --usr; did you mean 'user' or 'users'"),
        (["--run=RUN", "u3"], "'u3' is not understood"),
        (["--run=RUN", "--user=u3", "--user=u4"], "--user is given twice"),
        (["--run=RUN", "--user=u3", "--k=0"], "--k should be a whole number above 0, but is '0'"),
        (["--run=RUN", "--user=u3", "--k=ten"], "--k should be a whole number above 0, but is 'ten'"),
        (["--run=RUN", "--user=u3", "--k=81"], "k should be 1 to 80, the items there are, but is 81"),
        (["--run=RUN", "--user=u3", "--format=jsn"], "--format should be one of table, json, but is 'jsn'; did you"),
        (["--run=RUN", "--user=u3", "--history_phases=train,tst"], "history_phases should name some of train, valid"),
        (["--run=RUN", "--user=u3", "--shard=0/2"], "--shard divides a build"),
        (["--run=RUN", "--build=true", "--shard=2/2"], "--shard should be i/n with i from 0 to n - 1, such as 0/4"),
        (["--run=RUN", "--build=true", "--shard=1"], "--shard should be i/n"),
        (["--run=RUN", "--build=yes"], "--build should be one of false, true, anew"),
        (["--run=RUN", "--build=true", "--user=u3"], "--build ranks all users; leave --user out"),
        (["--run=RUN", "--build=true", "--store=off"], "--build needs a store"),
        (["--run=RUN", "--user=u3", "--store=none"], "there is no store in none; build it"),
        (["--run=RUN", "--history=i1", "--store=none"], "--history is answered live"),
        (["--run=RUN", "--user=u333"], "there is no user 'u333' among the 120 of the data set; did you mean 'u33'"),
        (["--run=RUN", "--user=zebra"], "there is no user 'zebra' among the 120 of the data set; --history=ITEM,ITEM"),
        (["--run=RUN", "--history=i1,i777"], "there is no item 'i777' among the 80 of the data set; did you mean"),
        (["--run=RUN", "--history="], "--history names no item"),
        (["--run=RUN", "--users=none.txt"], "--users: none.txt cannot be read"),
        (["--run=RUN", "--user=u3", "--new_items=x.item"], "--new_items gives the titles"),
        (["--run=RUN", "--user=u3", "--index_file=none.json"], "there is no index file none.json"),
        (["--run=nowhere", "--user=u3"], "no result.json in nowhere"),
    ],
    ids=str,
)  # fmt: skip
def test_mistakes_are_told_in_one_line(
    arguments: list[str], says: str, run_of: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [argument.replace("RUN", str(run_of("SASRec"))) for argument in arguments]
    capsys.readouterr()  # the run may have been made just now
    assert main(["recommend", *given]) == 2
    told = capsys.readouterr()
    assert says in told.err and told.err.count("\n") == 1 and not told.out


def test_more_than_the_beams_is_refused(loaded: Callable[..., Recommender], output: Path) -> None:
    with pytest.raises(UserError, match="k 21 is above the 20 beams of the run's search"):
        loaded("AlignTokenRec").recommend(["u3"], 21)


def test_runs_under_recboles_own_policy_are_not_served(output: Path) -> None:
    result = run("BPR", "tiny", config_dict=settings_of("BPR", output, policy="recbole"))
    with pytest.raises(UserError, match=r"was made with policy: recbole; recommend serves runs of policy: unified"):
        recommend([f"--run={Path(result['result_file']).parent}", "--user=u3"])


def test_a_wrong_id_among_very_many_is_compared_with_its_like() -> None:
    known = [f"user{number:07d}" for number in range(3 * COMPARED)]
    start = time.process_time()
    assert "did you mean" in unknown("user", "user0001x34", known)
    assert time.process_time() - start < 60


def test_help_names_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "recbole-llm recommend --run=DIR --user=ID" in capsys.readouterr().out


def test_a_look_up_imports_no_torch(
    run_of: Callable[..., Path], loaded: Callable[..., Recommender], tmp_path: Path
) -> None:
    build_store(loaded("Pop"), tmp_path / "store", k=SHOWN)
    code = (
        "import sys; from recbole_llm.cli import main\n"
        f"words = ['recommend', '--run={run_of('Pop')}', '--store={tmp_path / 'store'}', '--user=u3', '--k=2']\n"
        "assert main(words) == 0\n"
        "assert not {'torch', 'recbole', 'pandas', 'scipy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False
    )
    assert done.returncode == 0


def test_what_is_parsed() -> None:
    asked = parse(["--run=saved/one/result.json", "--user=a", "--history_phases=valid,train"])
    assert asked.store == Path("saved/one/topk") and asked.phases == ("train", "valid") and not asked.named
    assert parse(["--run=x", "--user=a,b"]).users == ["a", "b"]
    assert parse(["--run=x", '--user=["a,b"]']).users == ["a,b"]
    assert parse(["--run=x", '--user=["a"]']).users == ["a"]
    assert parse(["--run=x", "--history=[b,c]"]).history == ["[b", "c]"]
    assert parse(["--run=x", "--build=true", "--shard=1/4"]).shard == (1, 4)
