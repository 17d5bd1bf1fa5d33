"""What a trained stage depends on: anything that can move its numbers makes it another stage."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import small_ml100k
from small_models import SMALL

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.training import trainer as trainer_module
from recbole_llm.training.language import named_backbone, take_backbone
from recbole_llm.training.pipeline import code_mark, data_mark
from recbole_llm.training.runs import run

Settings = Callable[..., dict[str, Any]]


def trained(result: dict[str, Any]) -> bool:
    return not result["stages"][-1]["cached"]


def test_another_order_of_rows_is_another_stage_on_the_same_split(settings_of: Settings, tmp_path: Path) -> None:
    """Internal ids follow the rows' order, and so do the rows of every weight."""
    folder = small_ml100k(tmp_path / "data")
    settings = settings_of(data_path=str(folder), epochs=6)
    first = run("BPR", "small", config_dict=settings)
    file = folder / "small" / "small.inter"
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    # Stable within a user and a second, so that ties keep their order and the split stays the same.
    rows.sort(key=lambda row: -int(row.split("\t")[0]))
    file.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
    second = run("BPR", "small", config_dict=settings)
    assert second["split"]["fingerprint"] == first["split"]["fingerprint"]
    assert trained(second)


@pytest.mark.parametrize("policy", ["unified", "recbole"])
def test_changed_data_is_another_stage_and_unchanged_data_is_not(
    settings_of: Settings, tmp_path: Path, policy: str
) -> None:
    folder = small_ml100k(tmp_path / "data")
    settings = settings_of(data_path=str(folder), policy=policy, epochs=1, tensorboard=True)
    assert trained(run("BPR", "small", config_dict=settings))
    assert not trained(run("BPR", "small", config_dict=settings))
    file = folder / "small" / "small.inter"
    lines = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert trained(run("BPR", "small", config_dict=settings))


def test_weights_to_begin_with_are_told_by_their_content(settings_of: Settings, tmp_path: Path) -> None:
    def mark() -> str:
        config = Config("NAIS", "small", config_dict=settings_of(pretrain_path=str(tmp_path / "begin.pth")))
        return data_mark(config)

    (tmp_path / "begin.pth").write_bytes(b"one")
    first = mark()
    assert mark() == first
    (tmp_path / "begin.pth").write_bytes(b"two")
    assert mark() != first != data_mark(Config("NAIS", "small", config_dict=settings_of()))


def test_data_of_any_name_are_told_by_their_content(settings_of: Settings, tmp_path: Path) -> None:
    folder = small_ml100k(tmp_path / "data") / "small"
    folder.rename(folder.with_name("a[1]"))
    file = folder.with_name("a[1]") / "small.inter"
    file = file.rename(file.with_name("a[1].inter"))
    config = Config("BPR", "a[1]", config_dict=settings_of(data_path=str(tmp_path / "data")))
    first = data_mark(config)
    head, *rows = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join([head, *rows[::-1]]) + "\n", encoding="utf-8")
    assert data_mark(config) != first


@pytest.mark.parametrize("edited", ["base", "beside"])
def test_a_model_of_ones_own_is_all_that_its_files_hold(
    edited: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "base": "from recbole.model.general_recommender.bpr import BPR\nclass Base(BPR):\n    factor = 1\n",
        "beside": "from base_of_mine import Base\nFACTOR = 1\nclass Mine(Base):\n    pass\n",
    }
    names = {"base": "base_of_mine", "beside": "all_of_mine"}
    for name, text in files.items():
        (tmp_path / f"{names[name]}.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = importlib.import_module("all_of_mine").Mine
    first = code_mark(mine)
    assert first is not None and code_mark(mine) == first
    (tmp_path / f"{names[edited]}.py").write_text(files[edited].replace("= 1", "= 2"), encoding="utf-8")
    assert code_mark(mine) != first
    for name in names.values():
        del sys.modules[name]


def test_an_edited_model_of_ones_own_is_another_stage(
    settings_of: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "mine.py"
    text = "from recbole.model.general_recommender.bpr import BPR\nclass Mine(BPR):\n    sign = {sign}\n"
    monkeypatch.syspath_prepend(str(tmp_path))
    module.write_text(text.format(sign=1), encoding="utf-8")
    mine = importlib.import_module("mine")
    assert trained(run(mine.Mine, "small", config_dict=settings_of()))
    assert not trained(run(mine.Mine, "small", config_dict=settings_of()))
    module.write_text(text.format(sign=-1), encoding="utf-8")
    assert trained(run(importlib.reload(mine).Mine, "small", config_dict=settings_of()))


def test_an_edited_stage_of_ones_own_model_is_another_stage_from_the_first_on(
    settings_of: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "staged_mine.py"
    text = (
        "from recbole_llm.model.glta import GLTA\nclass Mine(GLTA):\n    def stage_loss(self, stage, batch):\n"
        "        return {scale} * super().stage_loss(stage, batch)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    module.write_text(text.format(scale=1), encoding="utf-8")
    mine = importlib.import_module("staged_mine")
    settings = settings_of(**SMALL["GLTA"], item_text="{movie_title}") | {"epochs": 1, "alignment_epochs": 1}
    first = run(mine.Mine, "small", config_dict=settings)
    module.write_text(text.format(scale=50), encoding="utf-8")
    second = run(importlib.reload(mine).Mine, "small", config_dict=settings)
    made = {line["name"] for line in second["stages"] if not line["cached"]}
    assert {"item_text_alignment", "user_item_alignment"} <= made <= {line["name"] for line in first["stages"]}
    assert "backbone" not in made


@pytest.mark.parametrize(("key", "value", "marks"), [("device", "cuda:0", 1), ("llm_dtype", "bfloat16", 2)])
def test_a_language_model_is_what_it_reads_as_wherever_it_stands(
    settings_of: Settings, folders: Callable[[str], Path], key: str, value: str, marks: int
) -> None:
    found = set()
    for changed in ({}, {key: value}):
        config = Config("LightGCNPlus", "small", config_dict=settings_of(llm=str(folders("llama"))))
        named = named_backbone(config)
        config.final_config_dict.update(changed)
        found.add(take_backbone(config, None, None, None, named)[1])
    assert len(found) == marks


def test_a_changed_card_is_seen(settings_of: Settings) -> None:
    run("BPR", "small", config_dict=settings_of())
    card = next(Path(settings_of()["output_dir"]).rglob("stage.json"))
    content = json.loads(card.read_text(encoding="utf-8"))
    content["facts"]["best_epoch"] += 1
    card.write_text(json.dumps(content), encoding="utf-8")
    assert trained(run("BPR", "small", config_dict=settings_of()))


def test_a_run_cut_off_after_its_last_epoch_keeps_its_best_weights(
    settings_of: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer_module, "RESUME_SECONDS", 0.0)
    settings = settings_of(epochs=6, learning_rate=0.05)
    whole = run("BPR", "small", config_dict=settings | {"output_dir": settings["output_dir"] + "2"})
    fit = trainer_module.TrainerMixin.fit

    def cut_off(self: Any, *args: Any, **kwargs: Any) -> Any:
        fit(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer_module.TrainerMixin, "fit", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("BPR", "small", config_dict=settings)
    monkeypatch.setattr(trainer_module.TrainerMixin, "fit", fit)
    again = run("BPR", "small", config_dict=settings)
    assert (again["best_epoch"], again["test"]) == (whole["best_epoch"], whole["test"])


def test_recboles_habit_of_exclusion_spares_a_repeated_target(settings_of: Settings, tmp_path: Path) -> None:
    folder = small_ml100k(tmp_path / "data", users=30)
    file = folder / "small" / "small.inter"
    lines = file.read_text(encoding="utf-8").splitlines()
    first = {}
    for line in lines[1:]:
        first.setdefault(line.split("\t")[0], line.split("\t")[1])
    repeats = [f"{user}\t{item}\t3\t999999999" for user, item in first.items()]
    file.write_text("\n".join([*lines, *repeats]) + "\n", encoding="utf-8")
    settings = settings_of(data_path=str(folder), epochs=30, eval_step=0, exclude_history="recbole")
    assert run("BPR", "small", config_dict=settings)["test"]["ndcg@20"] > 0
    # Under our own policy such rows are dropped, and here nothing else was to be tested.
    with pytest.raises(UserError, match="no test interaction"):
        run("BPR", "small", config_dict=settings | {"exclude_history": True})


def test_runs_with_other_settings_are_other_rows(settings_of: Settings) -> None:
    from recbole_llm.leaderboard.compare import compare, rows_of

    one, two = (run("BPR", "small", config_dict=settings_of(epochs=epochs)) for epochs in (1, 2))
    folders = [str(Path(result["result_file"]).parent) for result in (one, two)]
    assert [row.name for row in rows_of(folders)] == ["BPR (epochs 1)", "BPR (epochs 2)"]
    with pytest.raises(UserError, match="seed 2020 stands twice"):
        compare([folders[0], folders[0]])


def test_refit_reports_the_metrics_asked_for(settings_of: Settings) -> None:
    run("BPR", "small", config_dict=settings_of(refit_on_valid=True))
    other = run("BPR", "small", config_dict=settings_of(refit_on_valid=True, topk=[10, 15], metrics=["NDCG", "MAP"]))
    assert set(other["valid"]) == set(other["test"]) == {"ndcg@10", "ndcg@15", "map@10", "map@15"}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"valid_metric": "NDCG"}, "not among the metrics"),
        ({"metrics": ["NDCG", "GAUC"], "valid_metric": "GAUC@10"}, "not among the metrics"),
        ({"policy": "recbole", "refit_on_valid": True}, "refit_on_valid"),
        ({"embedding_size": -1}, "embedding_size should be int >= 1"),
        ({"train_neg_sample_args": {"distribution": "foo"}}, "foo"),
        ({"result_file": "/"}, "result_file"),
        ({"output_dir": "/dev/null"}, "output_dir"),
        (
            {"eval_args": {"split": {"LS": "test_only"}}, "user_inter_num_interval": "[900,inf)"},
            "no interaction is left",
        ),
    ],
)
def test_more_mistakes_that_are_refused_before_any_work(
    settings_of: Settings, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run("BPR", "small", config_dict=settings_of(**more))
    assert not list(Path(settings_of()["output_dir"]).rglob("stage.json"))


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        ("GLTA", {"policy": "recbole"}, "no model of RecBole's"),
        ("GLTA", {"graph_model": "SASRec"}, "graph_model should be a general recommender"),
        ("S3Rec", {}, "S3Rec does not run"),
    ],
)
def test_models_that_cannot_be_run_so_are_refused(
    settings_of: Settings, model: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        run(model, "small", config_dict=settings_of(**more))


@pytest.mark.parametrize("split", [{"RS": [0.8, 0.1, 0.1]}, {"LS": "valid_and_test"}])
def test_by_row_nothing_of_a_later_phase_is_looked_at(settings_of: Settings, split: dict[str, Any]) -> None:
    import numpy as np

    from recbole_llm.config import Config
    from recbole_llm.data import create_dataset, data_preparation
    from recbole_llm.data.phases import TEST, TRAIN, VALID

    shuffled = {"split": split, "order": "RO", "group_by": "user", "mode": "full"}
    config = Config("SASRec", "small", config_dict=settings_of(eval_args=shuffled, eval_unit="row"))
    loaders = data_preparation(config, create_dataset(config))[1:]
    for loader, phases in zip(loaders, ((TRAIN, VALID), (TRAIN, VALID, TEST)), strict=True):
        rows, known = loader.split, np.isin(loader.split.phases, phases)
        expected = []
        for row in np.flatnonzero(rows.phases == phases[-1]):
            before = np.flatnonzero(known[:row] & (rows.users[:row] == rows.users[row]))[-50:]
            if len(before):
                expected.append((rows.users[row], rows.items[row], rows.items[before].tolist()))
        found = []
        for interaction, _, _, targets in loader:
            given = (interaction[name].tolist() for name in ("user_id", "item_id_list", "item_length"))
            for user, items, length, target in zip(*given, targets.tolist(), strict=True):
                found.append((user, target, items[:length]))
        assert found == expected


def test_rows_without_a_history_are_no_rankings_by_row(settings_of: Settings) -> None:
    shuffled = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
    sizes = {"embedding_size": 8, "hidden_size": 8, "MAX_ITEM_LIST_LENGTH": 5}
    result = run("GRU4Rec", "small", config_dict=settings_of(eval_args=shuffled, eval_unit="row", epochs=1, **sizes))
    assert result["evaluation"]["eval_unit"] == "row" and result["evaluation"]["test_users"] > 60


def test_every_train_share_is_judged_on_the_same_rows_and_candidates(settings_of: Settings) -> None:
    import numpy as np

    from recbole_llm.config import Config
    from recbole_llm.data import create_dataset, data_preparation

    for model in ("LightGCN", "SASRec"):
        seen = []
        for share in (1.0, 0.25):
            config = Config(model, "small", config_dict=settings_of(train_share=share))
            train, valid, test = data_preparation(config, create_dataset(config))
            seen.append((train, [list(loader) for loader in (valid, test)]))
        (whole, all_judged), (part, judged) = seen
        assert part._dataset.split.count(0) < whole._dataset.split.count(0) / 3
        assert (part._dataset.train_histories.lengths > 0).sum() == (whole._dataset.train_histories.lengths > 0).sum()
        for one, other in zip(chain(*all_judged), chain(*judged), strict=True):
            pairs = [np.unique(np.stack([np.asarray(side) for side in tuple_[1]]), axis=1) for tuple_ in (one, other)]
            assert np.array_equal(*pairs), "what is excluded"
            assert all(np.array_equal(one[place], other[place]) for place in (2, 3)), "what is wanted"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"train_share": 0.5, "policy": "recbole"}, "train_share"),
        ({"train_share": 0.5, "eval_unit": "row"}, "train_share"),
        ({"train_share": 1.5}, "train_share should be float 0..1"),
        ({"text_drop": -0.1}, "text_drop should be float 0..1"),
    ],
)
def test_shares_that_cannot_be_are_refused(settings_of: Settings, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run("BPR", "small", config_dict=settings_of(**more))
