"""Runs that start at once: one process imports what every run does, and forks another for each of them.

Of a run of a small model on small data the imports are most. ``python -m recbole_llm.leaderboard.warm`` reads a JSON
line a wish, ``{"run": SPEC, "log": FILE}`` or ``{"kill": PID}``, and writes a line a happening, ``warm: {"pid": PID}``
(-1 where there is no room for a process) or ``warm: {"ended": PID, "status": STATUS}``. It ends with its input, and its
runs with it.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recbole_llm.leaderboard import cell
from recbole_llm.leaderboard.schedule import Job, OwnProcess, Process, thread_limits

# What every run imports, the last when it makes its optimizer. What few need, models too, they import themselves.
COMMON = ("torch", "recbole_llm.training.runs", "torch._dynamo")
# A thread of pyarrow's allocator, which knows of forks. Of others nobody can tell what they hold.
HARMLESS = frozenset({"jemalloc_bg_thd"})
# What a line to the board begins with.
OURS = "warm: "
# Seconds for it to end by itself.
PATIENCE = 2.0
# In place of a process's number, where there is no room for one.
NONE = -1


class Warm:
    """Starts runs in forks of a process that has their imports behind it.

    Args:
        threads: of each run.

    Attributes:
        works: whether it does; not where a fork is no safe start of a run: beside threads, with a GPU, off Linux.
    """

    def __init__(self, threads: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=os.environ | thread_limits(threads), text=True,
        )  # fmt: skip
        assert self._process.stdin is not None and self._process.stdout is not None
        self._wishes, self._told = self._process.stdin, self._process.stdout
        self._started: queue.SimpleQueue[Forked | None] = queue.SimpleQueue()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self.works = self._started.get() is not None
        except BaseException:
            # Interrupted; nobody else has it to close.
            self.close()
            raise

    def _read(self) -> None:
        runs: dict[int, Forked] = {}
        for line in self._told:
            # An interpreter's own start may print.
            if not line.startswith(OURS):
                continue
            told = json.loads(line.removeprefix(OURS))
            if "ended" in told:
                runs.pop(told["ended"]).end(told["status"])
            elif told["pid"] > 0:
                run = Forked(told["pid"], self)
                runs[run.pid] = run
                self._started.put(run)
            else:
                self._started.put(None)
        # Whoever forks them is gone, and they with it.
        for run in runs.values():
            run.end(-signal.SIGKILL)
        self._over = True
        self._started.put(None)

    def start(self, spec: Path, log: Path) -> Forked | None:
        """Start a run.

        Args:
            spec: see :func:`~recbole_llm.leaderboard.cell.main`.
            log: where its output goes.

        Returns:
            Its process; ``None`` where none can be forked.
        """
        self.wish({"run": str(spec), "log": str(log)})
        run = self._started.get()
        if run is None and self._over:
            # It stays so.
            self._started.put(None)
        return run

    def wish(self, line: dict[str, Any]) -> None:
        """Say something to the process that forks, if it is there."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(line), file=self._wishes, flush=True)

    def close(self) -> None:
        """End it, and the runs that are left."""
        with contextlib.suppress(BrokenPipeError):
            self._wishes.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            # Another process has the other end of its input. Its runs end when it does, in any way.
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._told.close()


@contextlib.contextmanager
def starter(runs: int, threads: int) -> Iterator[Callable[[Job, int], Process]]:
    """What starts the processes of runs: warm, where there are several, of a thread each, and that works.

    Args:
        runs: how many there are to start.
        threads: of each.

    Yields:
        For :func:`~recbole_llm.leaderboard.schedule.run_jobs`, with jobs whose command ends with the file that says
        what to run.
    """
    # NumPy has its own threads from the start, beside which nothing can be forked.
    if runs < 2 or threads > 1:
        yield OwnProcess
        return
    warm = Warm(threads)

    def start(job: Job, threads: int) -> Process:
        return warm.start(Path(job.command[-1]), job.log) or OwnProcess(job, threads)

    try:
        yield start if warm.works else OwnProcess
    finally:
        warm.close()


class Forked:
    """A run's process, no child of this one.

    Args:
        pid: its.
        by: what has started it.
    """

    def __init__(self, pid: int, by: Warm) -> None:
        self.pid, self._by, self._over, self._status = pid, by, threading.Event(), 0

    def end(self, status: int) -> None:
        """Note how it ended: its exit status, negative for a signal."""
        self._status = status
        self._over.set()

    def wait(self) -> int:
        """Sit with it to its end, and tell its exit status, negative for a signal."""
        self._over.wait()
        return self._status

    def kill(self) -> None:
        """Take it away, if it is there: who forked it knows."""
        self._by.wish({"kill": self.pid})


# --- the process that forks ------------------------------------------------------------------------------------------
def main() -> int:
    """Import, then fork; in a forked process, its run.

    Returns:
        Of a run, what it returns; of the process that forks, 0.
    """
    # Of an interrupted board; it closes the input.
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What imports print is no line of ours.
    output = os.dup(1)
    os.dup2(2, 1)
    for name in COMMON:
        importlib.import_module(name)
        # A GPU is seen at once, and the rest need not be read.
        if not _may_fork():
            return 0
    # So that collecting garbage writes to no page that is shared.
    gc.freeze()
    _tell(output, {"pid": os.getpid()})
    spec = _serve(output)
    # A run takes an interrupt as the board does, which in the background of a script takes none.
    signal.signal(signal.SIGINT, interrupted)
    return 0 if spec is None else cell.main(spec)


def _may_fork() -> bool:
    tasks = Path("/proc/self/task")
    if not tasks.is_dir():
        return False
    others = {(task / "comm").read_text().strip() for task in tasks.iterdir() if task.name != str(os.getpid())}
    import torch

    # A GPU that was asked for anything, its number too on some systems, cannot be used in a fork.
    return others <= HARMLESS and threading.active_count() == 1 and not torch.cuda.device_count()


def _serve(output: int) -> str | None:
    """Fork as wished until the input ends: ``None``; in a forked process, the file that describes its run."""
    # A run reads the end of this as the end of whoever forked it.
    alive, end_of_alive = os.pipe()
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    running, rest = set[int](), b""
    while True:
        ready, _, _ = select.select([0, woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _tell_of_ended(output, running)
        if 0 not in ready:
            continue
        read = os.read(0, 65536)
        if not read:
            return None
        *lines, rest = (rest + read).split(b"\n")
        for wish in map(json.loads, lines):
            if "kill" in wish:
                _kill(wish["kill"], running)
            elif pid := _fork():
                running |= {pid} - {NONE}
                _tell(output, {"pid": pid})
            else:
                _begin(alive, Path(wish["log"]))
                for unused in (alive, end_of_alive, woken, wake, output):
                    os.close(unused)
                return str(wish["run"])


def _fork() -> int:
    try:
        return os.fork()
    except OSError:
        return NONE


def _kill(pid: int, running: set[int]) -> None:
    # One that has ended may have left its number to another process.
    if pid in running:
        os.kill(pid, signal.SIGKILL)


def _begin(alive: int, log: Path) -> None:
    """Make a forked process what a started one is."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(alive, 0)
    written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.close(written)


def _tell_of_ended(output: int, running: set[int]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        running.discard(pid)
        _tell(output, {"ended": pid, "status": os.waitstatus_to_exitcode(status)})


def _tell(output: int, line: dict[str, int]) -> None:
    os.write(output, f"{OURS}{json.dumps(line)}\n".encode())


if __name__ == "__main__":
    sys.exit(main())
