"""Progress of long steps where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from recbole_llm import progress as module
from recbole_llm.progress import Steps, progress


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be moved by hand."""
    time = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: time[0])
    monkeypatch.setattr(module.sys.stderr, "isatty", lambda: False, raising=False)
    return time


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_first_line_comes_after_two_seconds_the_others_every_ten(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recbole_llm")
    for _ in progress(range(25), "reading"):
        now[0] += 1.0
    assert lines(caplog) == [
        "reading: 2 of 25, about 0:23 left", "reading: 12 of 25, about 0:13 left", "reading: 22 of 25, about 0:03 left",
    ]  # fmt: skip


def test_training_tells_alike(now: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "recbole_llm")
    steps = Steps("training", 20)
    for step in range(15):
        now[0] += 1.0
        steps.advance()
        if step == 5:
            steps.note("epoch 1")
    steps.close()
    assert lines(caplog) == [
        "training: step 2 of 20, at most 0:18 left", "training: step 12 of 20, epoch 1, at most 0:08 left",
    ]  # fmt: skip


def test_a_short_step_says_nothing_nor_does_one_that_is_not_to_show(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "recbole_llm")
    for _ in progress(range(19), "short"):
        now[0] += 0.1
    silent = Steps("silent", 9, show=False)
    for _ in progress(range(9), "silent", show=False):
        now[0] += 9.0
        silent.advance()
    assert lines(caplog) == []
