"""The search for settings: what it is given, what it may look at, and that a kill changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import survival
import torch
from conftest import ROOT
from filelock import FileLock
from optuna.trial import TrialState
from worlds import settings_of as leakage_settings
from worlds import write_by_phase

from recbole_llm.config import Config
from recbole_llm.data.loaders import RankingLoader
from recbole_llm.data.phases import TEST
from recbole_llm.errors import UserError
from recbole_llm.leaderboard import search as search_module
from recbole_llm.leaderboard import tuned_file, tuning
from recbole_llm.leaderboard.search import _mark, read_arguments
from recbole_llm.leaderboard.space import find_space, read_space
from recbole_llm.model.hccf import HCCF
from recbole_llm.schema import load_yaml, properties_dir
from recbole_llm.training import trainer
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.runs import run

SPACES = sorted(path.stem for path in (ROOT / "properties" / "space").glob("*.yaml"))
SPACE = """
trials: 4
warmup: 0
space:
  learning_rate: {low: 0.0005, high: 0.05, log: true}
  embedding_size: [64, 8, 16]
"""


@pytest.fixture
def words(small_data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a quick search on ``small``; keyword arguments are added."""
    space = tmp_path / "quick.yaml"
    space.write_text(SPACE, encoding="utf-8")

    def make(**more: Any) -> list[str]:
        settings = {
            "model": "BPR", "dataset": "small", "space": space, "output": tmp_path / "tune", "data_path": small_data,
            "output_dir": tmp_path / "saved", "epochs": 2, "gpu_id": "",
            "load_col": "{inter: [user_id, item_id, timestamp]}",
        } | more  # fmt: skip
        return [f"--{key}={value}" for key, value in settings.items() if value is not None]

    return make


def quiet(_line: str) -> None:
    pass


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials of the one study in a folder that count."""
    (file,) = folder.glob("search-*.db")
    storage = f"sqlite:///{file}"
    (name,) = optuna.get_all_study_names(storage)
    return tuning._finished(optuna.load_study(study_name=name, storage=storage))


def told(folder: Path) -> list[Any]:
    """What a study's trials were and came to."""
    return [(trial.user_attrs["values"], trial.state.name, trial.value) for trial in trials_of(folder)]


# --- spaces ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", SPACES)
def test_every_shipped_space_fits_its_model(name: str, tmp_path: Path) -> None:
    search = read_arguments([
        f"--model={name.partition('-')[0]}", "--dataset=tiny", f"--space={name}", f"--output_dir={tmp_path}"
    ])  # fmt: skip
    shipped = read_space(find_space("", None, name))
    # What a model has as shipped lies in its space: nothing was widened.
    assert search.space.dimensions == shipped.dimensions
    assert search.start == {dimension.key: search.base[dimension.key] for dimension in shipped.dimensions}
    assert search.trials == shipped.trials and search.seconds is None


def test_a_loss_with_a_space_of_its_own_has_it() -> None:
    assert find_space("SASRecAllPositions", "BCE", None).stem == "SASRecAllPositions-BCE"
    assert find_space("SASRecAllPositions", "CE", None).stem == "SASRecAllPositions"
    assert find_space("SASRecAllPositions", "BCE", "BPR").stem == "BPR"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("learning_rate", "learning_rat"),
            r"quick.yaml: unknown setting 'learning_rat' for BPR; did you mean 'learni",
        ),
        (("[64, 8, 16]", "[8, 0]"), "quick.yaml: embedding_size should be int >= 1, but is 0"),
        (("[64, 8, 16]", "[8]"), "embedding_size should list two or more"),
        (("[64, 8, 16]", "[8, [16]]"), "embedding_size should list two or more numbers or words"),
        (("[64, 8, 16]", "3"), "embedding_size should be a list of choices or"),
        (("log: true", "lag: true"), "learning_rate: unknown key 'lag'; did you mean 'log'"),
        (("low: 0.0005", "low: 0.1"), "low should be below high and above 0, but they are 0.1, 0.05"),
        (("low: 0.0005", "low: 0"), "low should be below high and above 0"),
        (("low: 0.0005", "low: few"), "learning_rate should have numbers as low and high, but has 'few'"),
        (("log: true", "type: int"), "type is int .with whole ends. or float"),
        (("trials: 4", "trials: 0"), "trials should be int >= 1, but is 0"),
        (("trials: 4", "trails: 4"), "unknown key 'trails'; did you mean 'trials'"),
        (("warmup: 0", "warmup: yes"), "warmup should be int >= 0"),
        (("warmup: 0", "metric: 5"), "metric should be a metric's name"),
        (("warmup: 0", "metric: nDGC@10"), "quick.yaml: unknown valid_metric 'nDGC@10'; did you mean 'ndcg'"),
        (("warmup: 0", "settings: {epoch: 3}"), "quick.yaml: unknown setting 'epoch' for BPR; did you mean 'epochs'"),
        (("warmup: 0", "settings: {embedding_size: 3}"), "'embedding_size' stands in settings and in space"),
        (("warmup: 0", "settings: [1]"), "settings should be a mapping"),
        (("space:", "spaces:"), "unknown key 'spaces'; did you mean 'space'"),
        (("embedding_size:", "seed:"), "seed decides on what trials are judged on, or how, .* search: --seed="),
        (
            ("embedding_size: [64, 8, 16]", "train_share: [0.5, 1.0]"),
            "train_share decides on what trials are judged on",
        ),
        (("embedding_size:", "graph_model.seed:"), "graph_model.seed decides on"),
    ],
)
def test_a_wrong_space_is_refused_before_any_work(
    change: tuple[str, str], message: str, words: Callable[..., list[str]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert change[0] in SPACE
    (tmp_path / "quick.yaml").write_text(SPACE.replace(*change), encoding="utf-8")
    monkeypatch.setattr(search_module, "prepared", lambda config: pytest.fail("work was begun"))
    with pytest.raises(UserError, match=message):
        tuning.tune(words())
    assert not (tmp_path / "tune").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"space": "LigthGCN"}, "no search space 'LigthGCN' is shipped; did you mean 'LightGCN'"),
        ({"space": None, "model": "NGCF"}, "no search space for NGCF is shipped; --space=FILE"),
        ({"space": "none.yaml"}, "none.yaml does not exist"),
        ({"trials": 0}, "--trials should be int > 0, but is '0'"),
        ({"trials": "many"}, "--trials should be int > 0"),
        ({"seconds": -1}, "--seconds should be float > 0"),
        ({"learning_rate": 0.1, "embedding_size": 8}, "the command line fixes every setting"),
        ({"eval_step": 0}, "eval_step should be 1 or more"),
        ({"eval_args": "{split: {LS: test_only}}"}, "no valid interaction"),
        ({"embedding_siez": 8}, "unknown setting 'embedding_siez' for BPR; did you mean 'embedding_size'"),
    ],
)
def test_a_wrong_command_is_refused(more: dict[str, Any], message: str, words: Callable[..., list[str]]) -> None:
    with pytest.raises(UserError, match=message):
        read_arguments(words(**more))


def test_what_the_command_line_gives_is_fixed_and_what_is_shipped_is_held(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    search = read_arguments(words(embedding_size=8))
    assert [dimension.key for dimension in search.space.dimensions] == ["learning_rate"]
    assert search.config({"learning_rate": 0.01})["embedding_size"] == 8
    # BPR's own 64 is none of the two widths; the first trial has it all the same.
    (tmp_path / "quick.yaml").write_text(SPACE.replace("64, ", ""), encoding="utf-8")
    sizes = read_arguments(words()).space.dimensions[1]
    assert sizes.choices == (64, 8, 16)


def test_what_a_space_is_given_beside_its_file_is_told(words: Callable[..., list[str]], tmp_path: Path) -> None:
    assert not read_arguments(words()).widened
    (tmp_path / "quick.yaml").write_text(SPACE.replace("64, ", ""), encoding="utf-8")
    width, *others = read_arguments(words(learning_rate=0.01)).widened
    assert "quick.yaml, space: embedding_size is 64 without a search, which 8 | 16 does not hold; 64 | 8 | 16" in width
    assert not others
    mine = tmp_path / "mine.yaml"
    mine.write_text("learning_rate: 0.1", encoding="utf-8")
    (rate,) = read_arguments(words(embedding_size=8, config_files=mine)).widened
    assert "learning_rate is 0.1 without a search, which 0.0005..0.05 log does not hold; 0.0005..0.1 log is" in rate
    told: list[str] = []
    tuning.tune(words(trials=1, learning_rate=0.01, epochs=1), told.append)
    assert told[0] == width


def test_files_on_the_command_line_go_before_what_a_space_sets(words: Callable[..., list[str]], tmp_path: Path) -> None:
    space, mine = tmp_path / "quick.yaml", tmp_path / "mine.yaml"
    space.write_text(
        f"{SPACE}metric: Recall@10\nsettings: {{train_batch_size: 64, weight_decay: 0.5}}", encoding="utf-8"
    )
    mine.write_text("{train_batch_size: 32, valid_metric: MRR@5, learning_rate: 0.002}", encoding="utf-8")
    search = read_arguments(words(config_files=mine))
    made = search.config({})
    assert (made["train_batch_size"], made["weight_decay"], search.metric) == (32, 0.5, "mrr@5")
    assert search.start["learning_rate"] == 0.002, "a file says where a search begins, not that it may not move"
    found = tuning.tune(words(config_files=mine, trials=1, epochs=1), lambda line: None)
    assert "as in --config_files" in found and "as shipped" not in found


@pytest.mark.parametrize("folder", ["a?b", "50%20", "{SCHEMA_DIRECTORY}", "a#b &c"])
def test_a_study_is_kept_wherever_it_is_told(folder: str, words: Callable[..., list[str]], tmp_path: Path) -> None:
    output = tmp_path / folder
    tuning.tune(words(output=output, trials=1, epochs=1), quiet)
    assert len([*output.glob("search-*.db")]) == 1


def test_whole_ends_hold_a_setting_that_is_no_whole_number(words: Callable[..., list[str]], tmp_path: Path) -> None:
    file = tmp_path / "quick.yaml"
    file.write_text("space: {learning_rate: {low: 1, high: 10, log: true}}", encoding="utf-8")
    (moved,) = read_arguments(words()).space.dimensions
    assert (moved.low, moved.high, moved.whole) == (Config("BPR", "tiny")["learning_rate"], 10, False)
    file.write_text("space: {learning_rate: {low: 1, high: 10, type: int}}", encoding="utf-8")
    with pytest.raises(
        UserError, match=r"learning_rate is 0.001 now, which no range of type int can hold; leave the type"
    ):
        read_arguments(words())


def test_settings_of_parts_can_be_searched(tmp_path: Path) -> None:
    space = tmp_path / "part.yaml"
    space.write_text("space: {graph_model.learning_rate: {low: 0.001, high: 0.01, log: true}}", encoding="utf-8")
    arguments = ["--model=GLTA", "--dataset=tiny", f"--space={space}", f"--output_dir={tmp_path}"]
    search = read_arguments(arguments)
    assert search.start == {"graph_model.learning_rate": Config("LightGCN", "tiny")["learning_rate"]}
    assert search.config({"graph_model.learning_rate": 0.002}).part("graph_model")["learning_rate"] == 0.002
    assert search.mark != read_arguments([*arguments, "--graph_model.n_layers=1"]).mark


def test_a_study_is_of_its_space_model_data_and_protocol(words: Callable[..., list[str]], tmp_path: Path) -> None:
    def mark(**more: Any) -> str:
        return read_arguments(words(**more)).mark

    plain = mark()
    assert plain == mark() == mark(trials=9, seconds=5, output_dir=tmp_path / "other", topk="[5, 10]")
    others = [
        mark(model="LightGCN"), mark(dataset="tiny", load_col=None), mark(seed=1), mark(epochs=3), mark(split_seed=9),
        mark(eval_args="{split: {RS: [0.8, 0.1, 0.1]}, order: RO}"), mark(exclude_history="false"),
        mark(valid_metric="Recall@10"), mark(embedding_size=8), mark(train_share=0.5),
    ]  # fmt: skip
    (tmp_path / "quick.yaml").write_text(SPACE.replace("0.05,", "0.06,"), encoding="utf-8")
    others.append(mark())
    assert len({plain, *others}) == len(others) + 1


@pytest.mark.parametrize(
    ("model", "given"),
    [
        ("HCCF", {}),
        ("GLTA", {"graph_model": "HCCF"}),
        ("TCA4Rec", {"cf_model": "GLTA", "cf_model.graph_model": "HCCF"}),
    ],
)
def test_a_study_is_of_its_models_versions(model: str, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def mark() -> str:
        base = Config(model, "tiny", config_dict=given, command_line=[])
        return _mark(read_space(find_space(model, base["loss_type"], None)), base, {}, None)[0]

    now = mark()
    monkeypatch.setattr(HCCF, "train_version", 99)
    assert mark() != now


def test_a_study_is_of_the_files_that_settings_name(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "space: {adapter_learning_rate: {low: 0.001, high: 0.01, log: true}}", encoding="utf-8"
    )
    shutil.copy(properties_dir() / "prompts" / "lcrec.yaml", tmp_path / "own.yaml")
    words = ["--model=LCRec", "--dataset=tiny", f"--space={tmp_path / 'space.yaml'}", f"--output_dir={tmp_path}"]
    words.append(f"--prompts={tmp_path / 'own.yaml'}")
    before = read_arguments(words).mark
    assert read_arguments(words).mark == before
    with (tmp_path / "own.yaml").open("a", encoding="utf-8") as file:
        file.write("# another\n")
    assert read_arguments(words).mark != before


# --- the search ------------------------------------------------------------------------------------------------------
def test_the_best_is_no_worse_than_shipped_and_run_finds_it(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    target = tmp_path / "out" / "best.yaml"
    text = tuning.tune(words(write=target, weight_decay=0.001), lines.append)
    trials = trials_of(tmp_path / "tune")
    assert len(lines) == len(trials) == 4
    shipped = Config("BPR", "small", config_dict={"data_path": str(tmp_path)})
    first, best = trials[0], max(trials, key=lambda trial: trial.value or 0.0)
    assert first.user_attrs["values"] == {key: shipped[key] for key in ("learning_rate", "embedding_size")}
    assert (best.value or 0) >= (first.value or 0)
    assert str(target) in text and f"{best.value:.4f}" in text and f"{first.value:.4f}" in text
    written = load_yaml(target)
    assert written == best.user_attrs["values"] | {"weight_decay": 0.001, "epochs": 2}
    header = target.read_text(encoding="utf-8")
    search = read_arguments(words(weight_decay=0.001))
    for part in (search.split, "4 trials", f"{best.value:.6f}", f"{first.value:.6f}", "optuna 5", "--weight_decay"):
        assert str(part) in header, part
    # An ordinary run with that file finds the trial's own stage, and says the same of valid.
    settings = {
        key: value for key, value in (word[2:].split("=", 1) for word in words())
        if key in ("data_path", "output_dir", "gpu_id", "load_col")
    }  # fmt: skip
    result = run("BPR", "small", [target], settings | {"show_progress": False, "tensorboard": False})
    assert result["stages"][-1]["cached"] and result["stages"][-1]["fingerprint"] == best.user_attrs["stage"]
    assert result["valid"]["ndcg@10"] == pytest.approx(best.value, abs=1e-12)


def test_trials_are_trained_with_what_the_file_says(words: Callable[..., list[str]]) -> None:
    space = read_arguments(words()).space
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(20):
        values = {dimension.key: dimension.suggest(study.ask()) for dimension in space.dimensions}
        assert all(float(tuned_file._scalar(value)) == value for value in values.values())


def test_it_goes_on_within_a_larger_budget_only(words: Callable[..., list[str]], tmp_path: Path) -> None:
    tuning.tune(words(trials=2), quiet)
    two = told(tmp_path / "tune")
    lines: list[str] = []
    assert "2 trials" in tuning.tune(words(trials=2), lines.append)
    assert not lines and told(tmp_path / "tune") == two
    tuning.tune(words(trials=3), lines.append)
    assert len(lines) == 1 and lines[0].startswith("[3/3]")
    assert told(tmp_path / "tune")[:2] == two


def test_seconds_end_it_in_the_middle_of_a_trial_but_not_of_the_first(
    words: Callable[..., list[str]], tmp_path: Path
) -> None:
    text = tuning.tune(words(seconds=0.001), quiet)
    assert "1 trials" in text and [state for _, state, _ in told(tmp_path / "tune")] == ["COMPLETE"]
    lines: list[str] = []
    search = read_arguments(words())
    spent = trials_of(tmp_path / "tune")[0].user_attrs["seconds"]
    tuning.tune(words(seconds=spent + 1e-6), lines.append)
    assert lines == [f"[2/4] left unfinished: the {spent + 1e-6:g} seconds are spent"]
    # What was left unfinished counts for nothing, and is the next one again.
    tuning.tune(words(), quiet)
    straight = words(output=tmp_path / "straight", output_dir=tmp_path / "elsewhere")
    tuning.tune(straight, quiet)
    assert told(tmp_path / "tune") == told(tmp_path / "straight") and len(told(tmp_path / "tune")) == search.trials


def test_a_pruned_trial_ends_early_and_leaves_nothing(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "PRUNER_STARTUP", 1)
    (tmp_path / "quick.yaml").write_text(SPACE.replace("0.0005", "1.0e-9"), encoding="utf-8")
    tuning.tune(words(epochs=6, trials=8), quiet)
    pruned = [trial for trial in trials_of(tmp_path / "tune") if trial.state == TrialState.PRUNED]
    ended = [trial for trial in trials_of(tmp_path / "tune") if trial.state == TrialState.COMPLETE]
    assert pruned and ended
    assert all(len(trial.intermediate_values) < 6 for trial in pruned)
    assert not list((tmp_path / "saved" / "cache" / ".work").iterdir())
    stages = {path.name.rpartition("-")[2] for path in (tmp_path / "saved" / "cache").glob("train-BPR-*")}
    assert stages == {trial.user_attrs["stage"][:16] for trial in ended}


def test_a_failed_trial_is_told_and_the_search_goes_on(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures = iter([
        None, UserError("the loss became nan"), MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), None
    ])  # fmt: skip

    def failing(*arguments: Any) -> Any:
        error = next(failures)
        if error is not None:
            raise error
        return fit(*arguments)

    monkeypatch.setattr(tuning, "fit", failing)
    lines: list[str] = []
    text = tuning.tune(words(trials=5), lines.append)
    assert [state for _, state, _ in told(tmp_path / "tune")] == ["COMPLETE", *["FAIL"] * 3, "COMPLETE"]
    reasons = [trial.user_attrs.get("reason") for trial in trials_of(tmp_path / "tune")]
    assert reasons == [None, "the loss became nan", *["out of memory"] * 2, None]
    assert "failed, the loss became nan" in lines[1] and "3 failed" in text
    # A bug of ours is no failure of a setting.
    monkeypatch.setattr(tuning, "fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuning.tune(words(trials=6), quiet)


def test_a_loss_that_is_no_number_fails_its_trial_only(words: Callable[..., list[str]], tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("space: {learning_rate: [0.001, 1000.0], learner: [adam, sgd]}")
    tuning.tune(words(trials=8, epochs=8, weight_decay=1000.0), quiet)
    failed = [trial for trial in trials_of(tmp_path / "tune") if trial.state == TrialState.FAIL]
    assert failed and all("the loss became" in trial.user_attrs["reason"] for trial in failed)


def test_where_every_trial_fails_the_reason_is_told(
    words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_arguments: Any) -> Any:
        raise UserError("no luck")

    monkeypatch.setattr(tuning, "fit", failing)
    with pytest.raises(UserError, match="no trial came to an end; the first: no luck"):
        tuning.tune(words(), quiet)


def test_two_searches_of_one_study_do_not_meet(words: Callable[..., list[str]], tmp_path: Path) -> None:
    search = read_arguments(words())
    with (
        FileLock(str(search.folder / f"{search.mark[:12]}.lock"), is_singleton=False),
        pytest.raises(UserError, match="another process"),
    ):
        tuning.tune(words(), quiet)


# --- valid only ------------------------------------------------------------------------------------------------------
def test_test_rows_are_never_ranked(words: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    ranked: list[int] = []
    collate = RankingLoader.collate_fn

    def watched(self: RankingLoader, index: Any) -> Any:
        ranked.append(self.phase)
        return collate(self, index)

    monkeypatch.setattr(RankingLoader, "collate_fn", watched)
    tuning.tune(words(refit_on_valid="true", trials=2), quiet)
    assert ranked and TEST not in ranked


@pytest.mark.parametrize("model", ["LightGCN", "SASRecAllPositions"])
def test_exchanged_test_items_move_no_trial(model: str, small_data: Path, tmp_path: Path) -> None:
    space = tmp_path / "quick.yaml"
    space.write_text("warmup: 0\nspace: {learning_rate: {low: 0.0005, high: 0.05, log: true}}", encoding="utf-8")
    seen, marks = [], []
    for swap in ((), (TEST,)):
        world = tmp_path / f"swapped-{len(swap)}"
        world.mkdir()
        write_by_phase(small_data, world, swap)
        settings = leakage_settings(world, world / "saved", epochs=2, eval_step=1)
        words = [f"--{key}={value}" for key, value in settings.items()]
        tuning.tune([
            f"--model={model}", "--dataset=small", f"--space={space}", f"--output={world / 'tune'}", "--trials=4",
            *words,
        ], quiet)  # fmt: skip
        seen.append(told(world / "tune"))
        marks.append(next((world / "tune").glob("search-*.db")).name)
    assert seen[0] == seen[1]
    assert marks[0] != marks[1], "the exchange changed nothing; the test would pass blindly"


# --- kills -----------------------------------------------------------------------------------------------------------
def killing(moment: int) -> Callable[[], None]:
    """Kill the process at the ``moment``-th time that a trial begins, reports, or ends (before or after)."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def ticking(function: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            tick()
            result = function(*arguments, **named)
            tick()
            return result

        return wrapped

    def before() -> None:
        for owner, name in ((optuna.Study, "ask"), (optuna.Study, "tell"), (optuna.Trial, "report")):
            setattr(owner, name, ticking(getattr(owner, name)))

    return before


def ended(arguments: list[str], root: Path, moment: int) -> int:
    child = survival.start(arguments, root, killing(moment))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(
    words: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "quick.yaml").write_text(SPACE.replace("0.0005", "1.0e-9"), encoding="utf-8")
    straight, killed = ({"output": tmp_path / name, "output_dir": tmp_path / f"{name}-saved"} for name in ("a", "b"))
    common = {"trials": 7, "epochs": 3}
    assert ended(["tune", *words(**straight, **common)], tmp_path / "log", 0) == 0
    statuses = [ended(["tune", *words(**killed, **common)], tmp_path / "log", moment) for moment in (1, 4, 9, 12, 17)]
    assert statuses == [-signal.SIGKILL] * 5, (tmp_path / "log").iterdir()
    assert ended(["tune", *words(**killed, **common)], tmp_path / "log", 0) == 0
    assert told(tmp_path / "a") == told(tmp_path / "b")
    best = [next((tmp_path / name).glob("best-*.yaml")) for name in ("a", "b")]
    assert load_yaml(best[0]) == load_yaml(best[1])


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_full_disk_is_told_in_one_line_and_nothing_is_lost(words: Callable[..., list[str]], tmp_path: Path) -> None:
    command = ["tune", *words(trials=2)]
    full = survival.run(command, tmp_path / "log", survival.torn_at(100_000, deadly=False))
    assert full.status == 2 and "cannot be written" in full.said and "Traceback" not in full.said, full.said
    survival.finish(command, tmp_path / "log")
    straight = words(trials=2, output=tmp_path / "straight", output_dir=tmp_path / "elsewhere")
    tuning.tune(straight, quiet)
    assert told(tmp_path / "tune") == told(tmp_path / "straight")


def test_a_broken_study_is_told(words: Callable[..., list[str]], tmp_path: Path) -> None:
    tuning.tune(words(trials=1), quiet)
    (file,) = (tmp_path / "tune").glob("search-*.db")
    whole = file.read_bytes()
    for broken in (b"nothing of SQLite's" * 400, whole[: len(whole) // 2]):
        file.write_bytes(broken)
        with pytest.raises(UserError, match=r"search-.*db is damaged; move it away"):
            tuning.tune(words(trials=1), quiet)


@pytest.mark.parametrize(("model", "more"), [("BPR", {}), ("SASRecAllPositions", {"loss_type": "BCE"})])
def test_a_watch_sees_the_epochs_of_the_attempt_before(
    model: str, more: dict[str, Any], settings_of: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setattr(trainer, "RESUME_SECONDS", 0.0)
    settings = settings_of(epochs=5, stopping_step=99) | more
    config = Config(model, "small", config_dict=settings)

    class CutError(Exception):
        pass

    first: list[tuple[int, float]] = []
    second: list[tuple[int, float]] = []

    def cut(epoch: int, score: float) -> None:
        first.append((epoch, score))
        if len(first) == 3:
            raise CutError

    with pytest.raises(CutError):
        fit(config, store_of(config), cut)
    fitted = fit(config, store_of(config), lambda epoch, score: second.append((epoch, score)))
    assert second[:3] == first and [epoch for epoch, _ in second] == list(range(5))
    straight = Config(model, "small", config_dict=settings | {"output_dir": str(tmp_path / "straight")})
    whole = fit(straight, store_of(straight))
    assert fitted.facts == whole.facts and second == [tuple(pair) for pair in whole.facts["valid_curve"]]
    weights = fitted.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in whole.model.state_dict().items())
