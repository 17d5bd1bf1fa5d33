"""Runs that are forked from a process with their imports behind it: the same runs, and ended as any process is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from survival import gone, until

from recbole_llm.leaderboard.schedule import Job, OwnProcess, thread_limits
from recbole_llm.leaderboard.warm import Forked, Warm, starter


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    made = Warm(1)
    if not made.works:
        made.close()
        pytest.skip("nothing can be forked here: a GPU, threads, or no Linux")
    yield made
    made.close()


def spec_of(folder: Path, **settings: Any) -> Path:
    """The file of a run of BPR on the data set that is shipped, and its folder."""
    folder.mkdir()
    own = {"seed": 3, "epochs": 1, "gpu_id": "", "data_path": "dataset", "output_dir": str(folder / "saved")}
    spec = {
        "model": "BPR", "dataset": "tiny", "settings": own | settings, "command_line": [],
        "result": str(folder / "result.json"), "reason": str(folder / "reason.txt"),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


def job_of(spec: Path) -> Job:
    command = [sys.executable, "-m", "recbole_llm.leaderboard.cell", str(spec)]
    return Job(spec.parent.name, command, 1.0, spec.parent / "log")


def lasting(folder: Path) -> Path:
    """The file of a run that never gets to read what it should do."""
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "spec.json")
    return folder / "spec.json"


def test_a_forked_run_is_the_run_that_a_process_of_its_own_makes(tmp_path: Path, warm: Warm) -> None:
    forked, own = spec_of(tmp_path / "forked"), spec_of(tmp_path / "own")
    first = warm.start(forked, tmp_path / "forked" / "log")
    second = OwnProcess(job_of(own), 1)
    assert first is not None and (first.wait(), second.wait()) == (0, 0)
    one, two = (json.loads((spec.parent / "result.json").read_text(encoding="utf-8")) for spec in (forked, own))
    for key in ("split", "valid", "test", "curves"):
        assert one[key] == two[key]
    same = [
        (tmp_path / name / "log").read_text(encoding="utf-8").split("done in")[0].replace(name, "")
        for name in ("forked", "own")
    ]
    assert same[0] == same[1] and "train-BPR: starting" in same[0]


def test_a_mistake_has_its_reason_and_status(tmp_path: Path, warm: Warm) -> None:
    spec = spec_of(tmp_path / "run", epochs="many")
    run = warm.start(spec, tmp_path / "run" / "log")
    assert run is not None and run.wait() == 1
    assert "epochs" in (tmp_path / "run" / "reason.txt").read_text(encoding="utf-8")


def test_one_is_killed_and_the_others_go_on(tmp_path: Path, warm: Warm) -> None:
    first, second = (warm.start(lasting(tmp_path / name), tmp_path / name / "log") for name in "ab")
    assert first is not None and second is not None
    first.kill()
    assert first.wait() == -signal.SIGKILL
    # Its number may be another process's by now.
    first.kill()
    assert psutil.pid_exists(second.pid)
    second.kill()
    assert second.wait() == -signal.SIGKILL


def test_runs_end_with_the_process_that_forked_them_and_later_ones_are_started(warm: Warm, tmp_path: Path) -> None:
    with starter(2, 1) as start:
        forked = start(job_of(lasting(tmp_path / "a")), 1)
        assert isinstance(forked, Forked)
        process = psutil.Process(forked.pid)
        process.parent().kill()  # type: ignore[union-attr]
        assert forked.wait() < 0
        until(lambda: gone(process))
        own = start(Job("b", [sys.executable, "-c", "print('here')"], 1.0, tmp_path / "log"), 1)
        assert isinstance(own, OwnProcess) and own.wait() == 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == "here\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_runs_end_with_the_board(warm: Warm, tmp_path: Path, how: int) -> None:
    # Where these tests run in the background of a script, what they start would never see an interrupt.
    code = (
        "import pathlib, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from recbole_llm.leaderboard.schedule import *\nfrom recbole_llm.leaderboard.warm import *\n"
        "job = Job('x', [sys.argv[1]], 1.0, pathlib.Path(sys.argv[2]))\n"
        "with starter(2, 1) as start: run_jobs([job], Budget(1, 8.0), print, start=start)"
    )
    words = [sys.executable, "-c", code, str(lasting(tmp_path)), str(tmp_path / "log")]
    # In a group of its own, which a terminal interrupts as a whole.
    board = subprocess.Popen(words, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        run = until(lambda: _of_generation(board.pid, 2))
        forks = run.parent()
        os.killpg(board.pid, how) if how == signal.SIGINT else board.kill()
        board.wait(60)
        for process in (run, forks):
            until(lambda process=process: gone(process))
    finally:
        board.kill()


@pytest.mark.parametrize("handler", [signal.SIG_IGN, signal.default_int_handler])
def test_a_run_takes_an_interrupt_as_the_board_does(warm: Warm, tmp_path: Path, handler: Any) -> None:
    before = signal.signal(signal.SIGINT, handler)
    try:
        made = Warm(1)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        run = made.start(lasting(tmp_path), tmp_path / "log")
        assert run is not None
        with os.fdopen(until(lambda: _writable(tmp_path / "spec.json")), "w"):
            ignored, caught = _mask(run.pid, "SigIgn") >> 1 & 1, _mask(run.pid, "SigCgt") >> 1 & 1
    finally:
        made.close()
    assert (ignored, caught) == ((1, 0) if handler == signal.SIG_IGN else (0, 1))


def _writable(pipe: Path) -> int | None:
    """The pipe, once somebody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def _mask(pid: int, name: str) -> int:
    """Signals that a process catches or ignores, a bit each, the first signal's the lowest."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")), 16)


def _of_generation(pid: int, generation: int) -> psutil.Process | None:
    try:
        own = psutil.Process(pid).children()
    except psutil.Error:
        return None
    if generation == 1 or not own:
        return next(iter(own), None)
    return _of_generation(own[0].pid, generation - 1)


def test_nothing_is_forked_beside_threads_or_with_a_gpu() -> None:
    code = (
        "import threading, time, torch\nfrom recbole_llm.leaderboard.warm import _may_fork\n"
        "torch.cuda.device_count = lambda: 0\nfound = [_may_fork()]\n"
        "torch.cuda.device_count = lambda: 1\nfound += [_may_fork()]\n"
        "torch.cuda.device_count = lambda: 0\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print(*found, _may_fork())"
    )
    environment = os.environ | thread_limits(1)
    assert subprocess.check_output([sys.executable, "-c", code], env=environment, text=True).split() == [
        "True", "False", "False",
    ]  # fmt: skip


def test_where_it_does_not_work_each_run_starts_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recbole_llm.leaderboard.warm.sys.executable", "/bin/true")
    with starter(2, 1) as start:
        assert start is OwnProcess
    for runs, threads in ((1, 1), (2, 2)):
        with starter(runs, threads) as start:
            assert start is OwnProcess


def test_what_holds_on_to_its_input_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = tmp_path / "deaf"
    deaf.write_text("#!/bin/sh\necho 'warm: {\"pid\": 1}'\nexec sleep 60\n")
    deaf.chmod(0o755)
    monkeypatch.setattr("recbole_llm.leaderboard.warm.sys.executable", str(deaf))
    begin = time.monotonic()
    with starter(2, 1):
        pass
    assert time.monotonic() - begin < 30


def test_interrupted_before_it_is_ready_it_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("recbole_llm.leaderboard.warm.sys.executable", str(slow))
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), starter(2, 1):
            pass
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not [one for one in psutil.Process().children() if one.name() in ("sleep", "slow")]


def test_where_there_is_no_room_for_a_fork_a_run_starts_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = tmp_path / "full"
    full.write_text(
        "#!/bin/sh\necho what a start may print\necho 'warm: {\"pid\": 1}'\n"
        "while read wish; do echo 'warm: {\"pid\": -1}'; done\n"
    )
    full.chmod(0o755)
    monkeypatch.setattr("recbole_llm.leaderboard.warm.sys.executable", str(full))
    with starter(2, 1) as start:
        for _ in range(2):
            own = start(Job("b", ["/bin/true"], 1.0, tmp_path / "log"), 1)
            assert isinstance(own, OwnProcess) and own.wait() == 0
