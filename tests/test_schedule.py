"""Runs side by side: within their budget, one by one where they must, gone when their parent is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from survival import gone, until

from recbole_llm.leaderboard.schedule import Budget, Ended, Job, run_jobs

SPAN = "import sys, time; a = time.time(); {work}; open(sys.argv[1], 'w').write(f'{{a}} {{time.time()}}')"


def job(tmp_path: Path, name: str, work: str, memory: float = 0.1, after: frozenset[str] = frozenset()) -> Job:
    command = [sys.executable, "-c", SPAN.format(work=work), str(tmp_path / name)]
    return Job(name, command, memory, tmp_path / f"{name}.log", after)


def run(jobs: list[Job], budget: Budget) -> tuple[dict[str, Ended], list[str]]:
    ends: dict[str, Ended] = {}
    said: list[str] = []
    run_jobs(jobs, budget, lambda job, end: ends.update({job.name: end}), said.append)
    return ends, said


def most_at_once(tmp_path: Path, names: list[str]) -> int:
    spans = [tuple(map(float, (tmp_path / name).read_text().split())) for name in names]
    return max(sum(start <= moment < end for start, end in spans) for moment, _ in spans)


@pytest.mark.parametrize(
    ("budget", "most"), [(Budget(2, 8), 2), (Budget(1, 8), 1), (Budget(4, 8, threads=2), 2), (Budget(4, 0.25), 2)]
)
def test_no_more_run_at_once_than_fit(tmp_path: Path, budget: Budget, most: int) -> None:
    names = list("abcd")
    ends, _ = run([job(tmp_path, name, "time.sleep(0.8)") for name in names], budget)
    assert [ends[name].status for name in names] == [0] * 4 and most_at_once(tmp_path, names) == most


def test_a_job_waits_for_the_one_it_needs_while_others_go_on(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "whole", "time.sleep(0.1)", after=frozenset({"part", "of no run"})),
        job(tmp_path, "part", "time.sleep(1.0)"),
        job(tmp_path, "other", "time.sleep(0.1)"),
    ]
    run(jobs, Budget(2, 8))
    times = {name: tuple(map(float, (tmp_path / name).read_text().split())) for name in ("whole", "part", "other")}
    assert times["whole"][0] >= times["part"][1] and times["other"][0] < times["part"][1]


def test_one_that_outgrows_the_budget_runs_alone_and_ends_if_it_still_does(tmp_path: Path) -> None:
    grow = "b = bytearray({} * 2**20); time.sleep({})"
    budget = Budget(2, 0.4)
    jobs = [
        job(tmp_path, "small", "time.sleep(3)"),
        job(tmp_path, "large", grow.format(300, 1.5)),
        job(tmp_path, "huge", grow.format(900, 30)),
    ]
    held = psutil.Process().memory_info().rss
    ends, said = run(jobs, budget)
    assert ends["small"].status == 0 and ends["huge"].status is None and ends["huge"].peak > budget.memory
    assert ends["large"].status == 0, "by itself it fits"
    assert any("huge" in line and "to run alone" in line for line in said)
    assert psutil.Process().memory_info().rss - held < 200 * 2**20


def test_how_jobs_end_is_told_one_by_one(tmp_path: Path) -> None:
    ends, _ = run(
        [
            job(tmp_path, "bad", "sys.exit(3)"),
            job(tmp_path, "shot", "import os; os.kill(os.getpid(), 9)"),
            job(tmp_path, "good", "0"),
        ],
        Budget(2, 8),
    )
    assert (ends["bad"].status, ends["shot"].status, ends["good"].status) == (3, -9, 0)


def test_what_a_callback_raises_stops_the_rest(tmp_path: Path) -> None:
    def full(job: Job, end: Ended) -> None:
        raise OSError("no room")

    start = time.monotonic()
    with pytest.raises(OSError, match="no room"):
        run_jobs([job(tmp_path, "a", "0"), job(tmp_path, "b", "time.sleep(60)")], Budget(2, 8), full)
    assert time.monotonic() - start < 30 and not (tmp_path / "b").exists()


def test_an_interrupt_while_a_run_is_being_started_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = ThreadPoolExecutor.submit

    def interrupted(pool: ThreadPoolExecutor, *given: Any) -> Any:
        submit(pool, *given)
        raise KeyboardInterrupt

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run([job(tmp_path, "long", "time.sleep(20)")], Budget(1, 8))
    assert time.monotonic() - began < 15


def test_a_run_of_a_suite_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """``kill -9`` of a leaderboard leaves nothing behind that goes on computing."""
    spec = tmp_path / "spec.json"
    os.mkfifo(spec)  # a run that never gets to read what it should do
    code = (
        "import sys, pathlib; from recbole_llm.leaderboard.schedule import *; "
        "run_jobs([Job('x', [sys.executable, '-m', 'recbole_llm.leaderboard.cell', sys.argv[1]], 1.0,"
        " pathlib.Path(sys.argv[2]))], Budget(1, 8.0), print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(spec), str(tmp_path / "log")])
    try:
        child = until(lambda: next(iter(psutil.Process(parent.pid).children()), None))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        until(lambda: gone(child))
    finally:
        parent.kill()
