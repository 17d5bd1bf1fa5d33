"""Runs in forked processes that are killed, or find the disk full, at a chosen moment."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from recbole_llm import cli
from recbole_llm.training import staged, state, store, trainer
from recbole_llm.training.state import load_state

TINY = {
    "dataset": "tiny", "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 2, "eval_step": 1,
    "stopping_step": 99, "train_batch_size": 512,
}  # fmt: skip
SMALL = {
    "LightGCN": {"embedding_size": 8, "n_layers": 1},
    "SASRec": {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "MAX_ITEM_LIST_LENGTH": 5},
    "GLTA": {
        "train_batch_size": 64, "llm_train_steps": 4, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1,
        "llm_vocab_size": 300, "alignment_epochs": 2, "alignment_items_per_prompt": 3, "history_input": "none",
        "graph_model.epochs": 2, "graph_model.eval_step": 1, "graph_model.embedding_size": 8,
        "graph_model.n_layers": 1,
    },
}  # fmt: skip
SMALL["GLTA with history"] = SMALL["GLTA"] | {"history_input": "history", "history_length": 5}


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (a signal's number below zero) and what it wrote to stderr."""

    status: int
    said: str


def words(model: str, root: Path, **more: Any) -> list[str]:
    """The command line of a small run under ``root``."""
    settings = TINY | SMALL[model] | {"output_dir": root, "result_file": root / "result.json"} | more
    return ["run", f"--model={model.split()[0]}", *(f"--{key}={value}" for key, value in settings.items())]


def start(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> int:
    """Fork a process that saves its state whenever it can and runs the command line; returns its id."""
    root.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        with (root / f"stderr.{os.getpid()}").open("w", buffering=1, encoding="utf-8") as sys.stderr:
            sys.stdout = open(os.devnull, "w")
            signal.alarm(120)
            torch.set_num_threads(1)
            store.LOCK_NOTE_SECONDS = 0.1
            for module in (state, trainer, staged):
                module.RESUME_SECONDS = 0.0
            before()
            try:
                status = cli.main(arguments)
            except BaseException:
                traceback.print_exc()
                status = 1
        os._exit(status)
    finally:
        os._exit(70)


def wait(child: int, root: Path) -> Ended:
    """Wait for a process of :func:`start`."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    file = root / f"stderr.{child}"
    said = file.read_text(encoding="utf-8") if file.exists() else ""
    file.unlink(missing_ok=True)
    return Ended(status, said)


def run(arguments: list[str], root: Path, before: Callable[[], None] = lambda: None) -> Ended:
    """:func:`start` and :func:`wait`."""
    return wait(start(arguments, root, before), root)


def finish(arguments: list[str], root: Path) -> Ended:
    """A run that must end well."""
    ended = run(arguments, root)
    assert ended.status == 0, ended.said
    return ended


CLONE_NEWNS, CLONE_NEWUSER, MS_REMOUNT = 0x00020000, 0x10000000, 32


# --- moments ---------------------------------------------------------------------------------------------------------
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")


def at_changes(root: Path, act: Callable[[int, str, str], None]) -> None:
    """Call ``act(number, event, path)`` right before this process changes a file system entry under a folder."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in CHANGES or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path = os.fsdecode(arguments[0])
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        # A tree is removed through descriptors, with names relative to them.
        relative = event in ("os.remove", "os.rmdir") and arguments[-1] != -1
        if not (relative or path.startswith(str(root))) or (event == "os.mkdir" and Path(path).is_dir()):
            return
        if "stderr." in path:
            return
        count += 1
        act(count, event, path)

    sys.addaudithook(hook)


def killed_at(root: Path, number: int) -> Callable[[], None]:
    """Kill this process right before its so-manieth change."""

    def act(count: int, event: str, path: str) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return lambda: at_changes(root, act)


def full_from(root: Path, number: int) -> Callable[[], None]:
    """From its so-manieth change on, this process can make no new file or folder."""

    def act(count: int, event: str, path: str) -> None:
        if count >= number and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    return lambda: at_changes(root, act)


def torn_at(size: int, deadly: bool) -> Callable[[], None]:
    """No file can grow beyond ``size``: the process is killed in the middle of writing, or is told so."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def changes(arguments: list[str], root: Path) -> list[tuple[str, str]]:
    """What an undisturbed run changes under a folder, in order."""
    file = root.parent / f"{root.name}.changes"

    def record() -> None:
        with_ = file.open("w", encoding="utf-8", buffering=1)
        at_changes(root, lambda count, event, path: with_.write(json.dumps([event, path]) + "\n") and None)

    assert run(arguments, root, record).status == 0
    return [tuple(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


# --- what is left ----------------------------------------------------------------------------------------------------
def outcome(root: Path) -> dict[str, Any]:
    """Everything that may not depend on how often a run was cut off: metrics, losses, every weight."""
    result = json.loads((root / "result.json").read_text(encoding="utf-8"))
    found = {
        key: result[key] for key in ("test", "valid", "best_epoch", "split", "evaluation", "parameters", "item_text")
        if key in result
    }  # fmt: skip
    found["stages"] = [(stage["name"], stage["fingerprint"]) for stage in result["stages"]]
    cards = sorted((root / "cache").glob("*/stage.json"))
    found["facts"] = {}
    for card in cards:
        facts = json.loads(card.read_text(encoding="utf-8"))["facts"]
        found["facts"][card.parent.name] = {key: value for key, value in facts.items() if key != "seconds"}
    weights = sorted((root / "cache").glob("*/weights.safetensors"))
    found["weights"] = {file.parent.name: _plain(load_state(file)) for file in weights}
    found["lm"] = [file.read_bytes() for file in sorted((root / "cache").glob("*/model/*")) if file.is_file()]
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return str(value)


def assert_clean(root: Path, whole: Path) -> None:
    """Nothing half-made is left in a cache, and nothing that the undisturbed run's does not hold."""

    def names(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

    assert names(root / "cache") == names(whole / "cache")
    assert not list((root / "cache" / ".work").iterdir())


def flip(file: Path, place: float = 0.5) -> None:
    """Flip one bit of the byte at a share of a file."""
    data = bytearray(file.read_bytes())
    data[int((len(data) - 1) * place)] ^= 1
    file.write_bytes(data)


def until(happens: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Wait for something that another process does, and return it."""
    deadline = time.monotonic() + seconds
    while not (found := happens()):
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.01)
    return found


def gone(process: psutil.Process) -> bool:
    """Whether a process has ended."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


# --- a disk of one's own ---------------------------------------------------------------------------------------------
def apart(body: Callable[[], int]) -> int:
    """Run a function in a forked process; returns its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 70
    try:
        status = body()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def small_disk(folder: Path, kilobytes: int) -> bool:
    """Mount an empty file system of that size where only this process and its children see it, if a user may."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return False
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    return not libc.mount(b"none", bytes(folder), b"tmpfs", 0, f"size={kilobytes}k".encode())


def grow_disk(folder: Path, kilobytes: int) -> None:
    """Give the file system of :func:`small_disk` another size."""
    assert not ctypes.CDLL(None).mount(b"none", bytes(folder), b"tmpfs", MS_REMOUNT, f"size={kilobytes}k".encode())
