"""Runs side by side in processes of their own, within a budget of cores and memory."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

# How often memory is looked at, and how often a line says what is running.
LOOK_SECONDS = 0.5
LINE_SECONDS = 30.0


@dataclass(frozen=True)
class Budget:
    """What runs may take together.

    Attributes:
        cores: how many run at once, each with ``threads`` of them.
        memory: GiB of resident memory.
        threads: cores of one run.
    """

    cores: int
    memory: float
    threads: int = 1


@dataclass(frozen=True)
class Job:
    """One process to run.

    Attributes:
        name: for the person who waits.
        command: its words.
        memory: GiB that it is expected to need.
        log: where its output goes.
        after: names of jobs that it would only wait for if they ran at the same time.
    """

    name: str
    command: Sequence[str]
    memory: float
    log: Path
    after: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        status: its exit status, negative for a signal; ``None`` when it was stopped for the memory it took.
        seconds: how long it ran.
        peak: GiB that it was seen to hold.
    """

    status: int | None
    seconds: float
    peak: float


class Process(Protocol):
    """A job's process."""

    pid: int

    def wait(self) -> int:
        """Sit with it to its end, and tell its exit status, negative for a signal."""

    def kill(self) -> None:
        """Take it away, if it is there."""


class OwnProcess:
    """A process that runs a job's command.

    Args:
        job: to run.
        threads: that it may compute with.
    """

    def __init__(self, job: Job, threads: int) -> None:
        with job.log.open("ab") as log:
            # The open input is what tells the process that this one lives.
            self._process = subprocess.Popen(
                job.command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | thread_limits(threads),
            )  # fmt: skip
        self.pid = self._process.pid

    def wait(self) -> int:
        """See :class:`Process`."""
        status = self._process.wait()
        if self._process.stdin:
            self._process.stdin.close()
        return status

    def kill(self) -> None:
        """See :class:`Process`."""
        self._process.kill()


def thread_limits(threads: int) -> dict[str, str]:
    """Environment of a process that computes with so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict.fromkeys(names, str(threads)) | {"TOKENIZERS_PARALLELISM": "false"}


class _Running:
    """A job's process, watched."""

    # Of whoever sits with it.
    ended: Future[Ended]

    def __init__(self, job: Job, process: Process) -> None:
        self.job, self.process, self.peak, self.stopped = job, process, 0.0, False
        self.start = time.monotonic()

    def look(self) -> float:
        """GiB that it holds now, its children included."""
        try:
            own = psutil.Process(self.process.pid)
            held = sum(process.memory_info().rss for process in (own, *own.children(recursive=True))) / 2**30
        except psutil.Error:
            held = 0.0
        self.peak = max(self.peak, held)
        return held

    def stop(self) -> None:
        """Take it away; its stage goes on from where it last saved."""
        self.stopped = True
        self.process.kill()

    def wait(self) -> Ended:
        """Sit with it to its end."""
        status = self.process.wait()
        # It may have been done by then.
        return Ended(None if self.stopped and status else status, time.monotonic() - self.start, self.peak)


def run_jobs(
    jobs: Iterable[Job],
    budget: Budget,
    ended: Callable[[Job, Ended], None],
    say: Callable[[str], None] = lambda line: None,
    start: Callable[[Job, int], Process] = OwnProcess,
) -> None:
    """Run jobs, as many at once as fit.

    A job starts when a core is free and what it is expected to need fits beside what the running ones are expected to
    need, or hold if that is more. Where those that run outgrow the budget the youngest is stopped, to be run by itself
    later; one that outgrows it by itself ends with status ``None``.

    Args:
        jobs: in the order they are wanted.
        budget: what they may take.
        ended: called, in this thread, as each ends for good; what it raises stops the rest.
        say: takes a line now and then about what is running.
        start: starts a job that may compute with so many threads; its log is there, and empty.
    """
    waiting, running = list(jobs), list[_Running]()
    alone: set[str] = set()
    told = time.monotonic()
    with ThreadPoolExecutor(max_workers=max(1, budget.cores // budget.threads)) as pool:
        try:
            while waiting or running:
                while (job := _next(waiting, running, budget, alone)) is not None:
                    waiting.remove(job)
                    job.log.parent.mkdir(parents=True, exist_ok=True)
                    job.log.write_bytes(b"")
                    process = _Running(job, start(job, budget.threads))
                    # Noted before anybody sits with it: an interrupt in between must not leave the pool to its end.
                    running.append(process)
                    process.ended = pool.submit(process.wait)
                wait([process.ended for process in running], timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                for process in [process for process in running if process.ended.done()]:
                    running.remove(process)
                    end = process.ended.result()
                    if end.status is None and process.job.name not in alone:
                        alone.add(process.job.name)
                        waiting.append(process.job)
                        say(f"{process.job.name}: the runs outgrew {budget.memory:g} GiB; stopped, to run alone later")
                    else:
                        ended(process.job, end)
                _keep_within(running, budget)
                if running and time.monotonic() - told >= LINE_SECONDS:
                    told = time.monotonic()
                    say(f"running: {', '.join(map(_line, running))}; {len(waiting)} waiting")
        finally:
            for process in running:
                process.stop()


def _next(waiting: Sequence[Job], running: Sequence[_Running], budget: Budget, alone: set[str]) -> Job | None:
    """The first job that may start now."""
    if (len(running) + 1) * budget.threads > max(budget.cores, budget.threads):
        return None
    if any(process.job.name in alone for process in running):
        return None
    taken = sum(max(process.job.memory, process.peak) for process in running)
    unfinished = {job.name for job in waiting} | {process.job.name for process in running}
    for job in waiting:
        fits = taken + job.memory <= budget.memory and job.name not in alone
        if (fits or not running) and not job.after & unfinished:
            return job
    return None


def _keep_within(running: Sequence[_Running], budget: Budget) -> None:
    held = {process: process.look() for process in running}
    if sum(held.values()) > budget.memory:
        max(running, key=lambda process: process.start).stop()


def _line(process: _Running) -> str:
    return f"{process.job.name} ({time.monotonic() - process.start:.0f} s)"
