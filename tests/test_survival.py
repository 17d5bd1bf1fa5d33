"""Kill -9 at every moment, a full disk, a shared cache, flipped bytes: the next run ends with the same metrics."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import survival
import torch
from survival import (
    Ended,
    apart,
    assert_clean,
    finish,
    flip,
    full_from,
    grow_disk,
    killed_at,
    outcome,
    run,
    small_disk,
    start,
    torn_at,
    until,
    wait,
    words,
)

from recbole_llm.backbone.embedded import EmbeddedSettings, train_embedded
from recbole_llm.training import state
from recbole_llm.training.state import ResumeFile, load_state, save_state

MODELS = ("LightGCN", "SASRec", "GLTA", "GLTA with history")
STAGES = ("train-LightGCN", "item_text_alignment", "user_item_alignment")


@pytest.fixture(scope="session")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[tuple[str, str]]]]:
    """Undisturbed runs: where they are and what they changed on the disk, in order."""

    class Made(dict):  # type: ignore[type-arg]
        def __missing__(self, model: str) -> tuple[Path, list[tuple[str, str]]]:
            root = tmp_path_factory.mktemp("whole") / "run"
            self[model] = root, survival.changes(words(model, root), root)
            return self[model]

    return Made()


def same_as(model: str, wholes: Any, root: Path) -> None:
    whole, _ = wholes[model]
    assert outcome(root) == outcome(whole)
    assert_clean(root, whole)


# --- kill -9 ---------------------------------------------------------------------------------------------------------
def check_kill(model: str, number: int, wholes: Any, root: Path) -> None:
    assert run(words(model, root), root, killed_at(root, number)).status == -signal.SIGKILL
    finish(words(model, root), root)
    same_as(model, wholes, root)


@pytest.mark.parametrize("model", ["GLTA", pytest.param("GLTA with history", marks=pytest.mark.slow)])
def test_killed_right_before_and_after_each_stage_is_moved_into_place(model: str, wholes: Any, tmp_path: Path) -> None:
    changes = wholes[model][1]
    moves = [n for n, (event, path) in enumerate(changes, 1) if event == "os.rename" and "/.work/" in path]
    moves = [n for n in moves if Path(changes[n - 1][1]).parent.name == ".work"]
    assert len(moves) == 4
    for number in (moves[0], moves[0] + 1):
        check_kill(model, number, wholes, tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_killed_at_every_change_it_goes_on(model: str, wholes: Any, tmp_path: Path) -> None:
    for number in range(1, len(wholes[model][1]) + 1):
        check_kill(model, number, wholes, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 9))])
def test_killed_again_and_again_it_ends_the_same(seed: int, wholes: Any, tmp_path: Path) -> None:
    draw, kills, status = random.Random(seed), 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        # Far enough that every attempt gets something done; further and further, as its own results are written anew.
        number = draw.randint(20, 45 + 3 * kills)
        status = run(words("GLTA", tmp_path), tmp_path, killed_at(tmp_path, number)).status
        kills += status == -signal.SIGKILL
    assert status == 0 and kills >= 4
    same_as("GLTA", wholes, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_times_it_ends_the_same(model: str, seed: int, wholes: Any, tmp_path: Path) -> None:
    draw, ended = random.Random(seed), False
    for attempt in range(60):
        child = start(words(model, tmp_path), tmp_path)
        # Later and later, so that a busy machine gets there too.
        time.sleep(draw.uniform(0.1, 0.5 + attempt / 10))
        os.kill(child, signal.SIGKILL)
        ended = wait(child, tmp_path).status == 0
        if ended:
            break
    if not ended:
        finish(words(model, tmp_path), tmp_path)
    same_as(model, wholes, tmp_path)


def sizes(root: Path) -> list[int]:
    """A limit on every file that a run leaves, such that it ends in the middle of that one or an earlier one."""
    return sorted({file.stat().st_size * 2 // 3 for file in root.rglob("*") if file.is_file() and file.stat().st_size})


@pytest.mark.parametrize("share", [0.95, *(pytest.param(n / 12, marks=pytest.mark.slow) for n in range(11))])
def test_killed_in_the_middle_of_writing_a_file_it_goes_on(share: float, wholes: Any, tmp_path: Path) -> None:
    limits = sizes(wholes["GLTA"][0])
    limit = limits[int(share * len(limits))]
    assert run(words("GLTA", tmp_path), tmp_path, torn_at(limit, deadly=True)).status == -signal.SIGXFSZ
    finish(words("GLTA", tmp_path), tmp_path)
    same_as("GLTA", wholes, tmp_path)


class CutError(Exception):
    """Stands for a kill after a state was saved."""


class Cut(ResumeFile):
    """Ends the attempt once it has saved its so-manieth state."""

    saves = 0

    def save(self, state: Any) -> None:
        super().save(state)
        self.saves += 1
        if self.saves == 3:
            raise CutError


def test_the_embedded_lm_goes_on_from_its_step_with_equal_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state, "RESUME_SECONDS", 0.0)
    settings = EmbeddedSettings(1, 16, 2, 300, 16, train_steps=10)
    corpus = [f"a film about rain and {number}" for number in range(9)]
    steps = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: steps.append(1))
    train_embedded(corpus, settings, seed=1, folder=tmp_path / "whole")
    assert len(steps) == 10
    resume, kept = tmp_path / "resume.safetensors", []
    with pytest.raises(CutError):
        train_embedded(corpus, settings, seed=1, folder=tmp_path / "cut", resume=Cut(resume))
    kept.append(load_state(resume)["step"])
    with pytest.raises(CutError):
        train_embedded(corpus, settings, seed=1, folder=tmp_path / "cut", resume=Cut(resume))
    kept.append(load_state(resume)["step"])
    figures = train_embedded(corpus, settings, seed=1, folder=tmp_path / "cut", resume=ResumeFile(resume))
    assert kept == [3, 6] and len(steps) == 20, "no step is done twice"
    assert figures["steps"] == 10
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "cut" / file.name).read_bytes(), file.name
    # Other texts are another training.
    other = train_embedded(corpus[1:], settings, seed=1, folder=tmp_path / "other", resume=ResumeFile(resume))
    assert len(steps) == 30 and other["loss"] != figures["loss"]


# --- a full disk -----------------------------------------------------------------------------------------------------
def assert_told(ended: Ended, root: Path) -> None:
    assert ended.status == 2, ended.said
    assert "Traceback" not in ended.said and "Error" not in ended.said and "Exception" not in ended.said
    told = [line for line in ended.said.splitlines() if line.startswith("recbole-llm: ")]
    assert len(told) == 1 and ended.said.endswith(told[0] + "\n")
    assert str(root) in told[0] and "MiB are free" in told[0] and "--output_dir" in told[0]
    assert not list(root.glob("GLTA-*")), "what failed leaves no run behind"


@pytest.mark.parametrize("share", [0.6, *(pytest.param(n / 8, marks=pytest.mark.slow) for n in range(8))])
def test_a_file_that_cannot_grow_ends_the_run_in_one_line(share: float, wholes: Any, tmp_path: Path) -> None:
    # Enough for what it says, which goes to a file here.
    limits = [limit for limit in sizes(wholes["GLTA"][0]) if limit > 2048]
    ended = run(words("GLTA", tmp_path), tmp_path, torn_at(limits[int(share * len(limits))], deadly=False))
    assert_told(ended, tmp_path)
    finish(words("GLTA", tmp_path), tmp_path)
    same_as("GLTA", wholes, tmp_path)


def check_full(number: int, wholes: Any, root: Path) -> None:
    ended = run(words("GLTA", root), root, full_from(root, number))
    if number > 2:  # before there is a run, its folder is the only thing to speak of
        assert_told(ended, root)
    assert ended.status == 2 and "Traceback" not in ended.said
    finish(words("GLTA", root), root)
    same_as("GLTA", wholes, root)


def openings(changes: list[tuple[str, str]]) -> list[int]:
    return [number for number, (event, _) in enumerate(changes, 1) if event in ("open", "os.mkdir")]


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_full_disk_ends_the_run_in_one_line_and_with_room_it_goes_on(seed: int, wholes: Any, tmp_path: Path) -> None:
    check_full(random.Random(seed).choice(openings(wholes["GLTA"][1])), wholes, tmp_path)


@pytest.mark.slow
def test_a_disk_full_at_any_moment(wholes: Any, tmp_path: Path) -> None:
    for number in openings(wholes["GLTA"][1]):
        check_full(number, wholes, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))


def test_a_real_full_disk(wholes: Any, tmp_path: Path) -> None:
    root, told = tmp_path / "disk", tmp_path / "told"
    root.mkdir()
    told.mkdir()

    def on_small_disks() -> int:
        for number, kilobytes in enumerate((12, 60, 180, 250)):
            if not small_disk(root, kilobytes):
                return 77
            ended = run(words("GLTA", root, tensorboard=True), root)
            (told / f"{number}.txt").write_text(f"{ended.status}\n{ended.said}", encoding="utf-8")
            grow_disk(root, 64 * 1024)
            ended = run(words("GLTA", root), root)
            assert ended.status == 0, ended.said
            shutil.copytree(root, told / str(number))
        return 0

    status = apart(on_small_disks)
    if status == 77:
        pytest.skip("this system lets a user mount no file system of his own")
    assert status == 0
    for number in range(4):
        text = (told / f"{number}.txt").read_text(encoding="utf-8")
        status, _, said = text.partition("\n")
        assert_told(Ended(int(status), said), root)
        assert outcome(told / str(number)) == outcome(wholes["GLTA"][0])


# --- a shared cache --------------------------------------------------------------------------------------------------
def made_once(*files: Path) -> None:
    """Of all the stages that runs report, each was made by exactly one of them."""
    makers: dict[str, int] = {}
    for file in files:
        for stage in json.loads(file.read_text(encoding="utf-8"))["stages"]:
            makers[stage["fingerprint"]] = makers.get(stage["fingerprint"], 0) + (not stage["cached"])
    assert set(makers.values()) == {1}


@pytest.mark.parametrize("other", [{}, {"learning_rate": 0.002}])
def test_two_runs_at_once_share_a_cache(other: dict[str, Any], wholes: Any, tmp_path: Path) -> None:
    copies = [tmp_path / "a.json", tmp_path / "b.json"]
    runs = [
        start(words("GLTA", tmp_path, result_file=copy, **more), tmp_path)
        for copy, more in zip(copies, ({}, other), strict=True)
    ]
    for child in runs:
        ended = wait(child, tmp_path)
        assert ended.status == 0, ended.said
    made_once(*copies)
    first, second = (json.loads(copy.read_text(encoding="utf-8")) for copy in copies)
    whole = json.loads((wholes["GLTA"][0] / "result.json").read_text(encoding="utf-8"))
    assert first["test"] == whole["test"]
    if other:
        alone = tmp_path / "alone"
        finish(words("GLTA", alone, **other), alone)
        assert second["test"] == json.loads((alone / "result.json").read_text(encoding="utf-8"))["test"]
    else:
        assert second["test"] == whole["test"]


@pytest.mark.parametrize("stage", ["backbone", *(pytest.param(s, marks=pytest.mark.slow) for s in STAGES)])
def test_one_takes_over_from_another_that_is_killed_at_work(stage: str, wholes: Any, tmp_path: Path) -> None:
    def stops_at(count: int, event: str, path: str) -> None:
        # Once a state is saved, while the lock is held.
        if event == "os.rmdir" and f"/{stage}-" in path and path.endswith("resume.safetensors.part"):
            os.kill(os.getpid(), signal.SIGSTOP)

    first = start(words("GLTA", tmp_path), tmp_path, lambda: survival.at_changes(tmp_path, stops_at))
    os.waitpid(first, os.WUNTRACED)
    second = start(words("GLTA", tmp_path), tmp_path)
    said = tmp_path / f"stderr.{second}"
    until(lambda: said.is_file() and f"{stage}: another run is making it; waiting" in said.read_text(encoding="utf-8"))
    os.kill(first, signal.SIGKILL)
    assert wait(first, tmp_path).status == -signal.SIGKILL
    ended = wait(second, tmp_path)
    assert ended.status == 0 and f"{stage}: going on where it was cut off" in ended.said
    same_as("GLTA", wholes, tmp_path)


# --- flipped bits ----------------------------------------------------------------------------------------------------
def artefacts(root: Path) -> list[Path]:
    return sorted(file.relative_to(root) for file in (root / "cache").glob("[!.]*/**/*") if file.is_file())


def check_flip(names: list[Path], place: float, wholes: Any, root: Path) -> None:
    shutil.copytree(wholes["GLTA"][0], root)
    for name in names:
        flip(root / name, place)
        said = finish(words("GLTA", root), root).said
        assert said.count("is damaged") == 1 and name.name in said, name
    same_as("GLTA", wholes, root)


def test_a_flipped_bit_in_any_kind_of_artefact_is_told_and_mended(wholes: Any, tmp_path: Path) -> None:
    names = artefacts(wholes["GLTA"][0])
    kinds = {name.name: name for name in names}
    assert {"weights.safetensors", "stage.json", "model.safetensors", "tokenizer.json", "config.json"} <= set(kinds)
    check_flip([kinds["weights.safetensors"], kinds["tokenizer.json"]], 0.5, wholes, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.0, 0.1, 0.7, 1.0])
def test_a_flipped_bit_in_any_artefact(place: float, wholes: Any, tmp_path: Path) -> None:
    check_flip(artefacts(wholes["GLTA"][0]), place, wholes, tmp_path / "run")


def check_unfinished(name: str, moment: int, place: float, wholes: Any, root: Path) -> None:
    """Kill a stage that has saved a state, flip a bit of what it left, and go on."""
    assert run(words("GLTA", root), root, killed_at(root, moment)).status == -signal.SIGKILL
    left = next((root / "cache" / ".work").glob(f"*/{name}"))
    flip(left, place)
    said = finish(words("GLTA", root), root).said
    assert f"checkpoint {left} is damaged" in said and "this stage starts over" in said and "Traceback" not in said
    same_as("GLTA", wholes, root)


def resumes(changes: list[tuple[str, str]], last: bool = False) -> list[int]:
    """The first moments at which each stage has a saved state, or those at which it has its last."""
    found: dict[str, int] = {}
    for number, (event, path) in enumerate(changes, 1):
        if event == "os.rmdir" and path.endswith("resume.safetensors.part"):
            stage = Path(path).parent.name
            found[stage] = number if last else found.get(stage, number)
    assert len(found) == 4, "every long stage saves one"
    return list(found.values())


def test_a_flipped_bit_in_a_resume_file_starts_that_stage_over(wholes: Any, tmp_path: Path) -> None:
    moments = resumes(wholes["GLTA"][1])
    check_unfinished("resume.safetensors", moments[0], 0.9, wholes, tmp_path / "a")
    check_unfinished("resume.safetensors", moments[1], 0.4, wholes, tmp_path / "b")
    # Before the first validation there are no best weights beside it.
    latest = resumes(wholes["GLTA"][1], last=True)
    check_unfinished("weights.safetensors", latest[0], 0.9, wholes, tmp_path / "c")


def test_a_resume_file_that_does_not_fit_starts_the_stage_over(wholes: Any, tmp_path: Path) -> None:
    root, changes = tmp_path / "run", wholes["LightGCN"][1]
    saved = [number for number, (_, path) in enumerate(changes, 1) if path.endswith("resume.safetensors.part")]
    assert run(words("LightGCN", root), root, killed_at(root, saved[-1])).status == -signal.SIGKILL
    left = next(root.rglob("resume.safetensors"))
    kept = load_state(left)
    # The weights fit and are taken in before the optimizer turns out not to.
    kept["state_dict"] = {name: torch.ones_like(weight) for name, weight in kept["state_dict"].items()}
    kept["optimizer"]["param_groups"] = []
    save_state(left, kept)
    said = finish(words("LightGCN", root), root).said
    assert f"{left} does not fit LightGCN; this stage starts over" in said
    same_as("LightGCN", wholes, root)


@pytest.mark.slow
@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 1.0])
def test_a_flipped_bit_in_any_resume_file(place: float, wholes: Any, tmp_path: Path) -> None:
    for number, moment in enumerate(resumes(wholes["GLTA"][1])):
        check_unfinished("resume.safetensors", moment, place, wholes, tmp_path / str(number))
