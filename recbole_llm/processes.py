"""The processes of one run: one, or several that ``accelerate launch`` or ``torchrun`` started.

The main process makes files, prints and logs. What it alone does the others wait for, and they end when it fails; what
they do together they do in the same order. With one process nothing here does anything, or imports anything heavy.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from recbole_llm.errors import UserError

if TYPE_CHECKING:
    import torch

Result = TypeVar("Result")

# How long one process may wait for another: the others wait while the main process trains a whole graph model. A dead
# process ends the wait at once, as its connection closes.
PATIENCE = timedelta(days=7)
# How long the main process, at its end, waits for processes that it started.
GRACE_SECONDS = 30.0


def count() -> int:
    """How many processes there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which one this is, from 0, the main process."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Whether this process makes files and prints."""
    return rank() == 0


def speaks() -> bool:
    """Whether this process tells of errors: the first one of each machine."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"


def start_missing() -> None:
    """Start the processes that ``accelerate launch --num_processes N`` asks for and, without GPUs, does not start.

    Its launcher for CPUs starts one process, whatever N, unless there is MPI: without a word the run would be one of
    one process. It leaves ``MASTER_ADDR`` but no ``WORLD_SIZE`` behind, and N on its own command line.

    Raises:
        UserError: several processes were asked for, and how many cannot be told.
    """
    started = "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" not in os.environ
    if started or os.environ.get("MASTER_ADDR") != "127.0.0.1" or "OMPI_COMM_WORLD_SIZE" in os.environ:
        return
    wanted = _asked_for()
    if wanted < 2:
        raise UserError("accelerate launch started one process of several; add --multi_gpu, which works on CPUs too")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(wanted), "LOCAL_WORLD_SIZE": str(wanted)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    others = [
        subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], env=os.environ | {"RANK": str(own), "LOCAL_RANK": str(own)}
        )
        for own in range(1, wanted)
    ]
    atexit.register(_wait_for, others)


def _asked_for() -> int:
    """``--num_processes`` of the launcher that is this process's parent; 0 where it does not say."""
    import psutil

    words = psutil.Process(os.getppid()).cmdline()
    for number, word in enumerate(words):
        key, _, value = word.partition("=")
        if key.replace("-", "_") == "__num_processes":
            return int(value or words[number + 1])
    return 0


def _wait_for(others: list[subprocess.Popen[bytes]]) -> None:
    for other in others:
        try:
            other.wait(timeout=GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            other.kill()


def join(cpu: bool) -> torch.device:
    """Meet the other processes (once), and say which device is this process's own.

    Args:
        cpu: use no GPU; without one it is the CPU anyway.
    """
    import torch
    from accelerate import PartialState
    from accelerate.utils import patch_environment

    # DeepSpeed is for the language model's weights; its own way of meeting is not needed.
    with patch_environment(ACCELERATE_USE_DEEPSPEED="false"):
        device = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=PATIENCE).device
    # accelerate says "cpu:0", which safetensors does not know.
    return torch.device("cpu") if device.type == "cpu" else device


def leave() -> None:
    """Part from the others, so that no connection is left open at the end."""
    if count() > 1:
        import torch

        torch.distributed.destroy_process_group()


def from_main(value: Any) -> Any:
    """The main process's value, in every process; the others' is not looked at."""
    if count() == 1:
        return value
    from accelerate.utils import broadcast_object_list

    box = [value]
    broadcast_object_list(box, from_process=0)
    return box[0]


def gathered(value: Any) -> list[Any]:
    """Every process's value, in order of rank."""
    if count() == 1:
        return [value]
    from accelerate.utils import gather_object

    return list(gather_object([value]))


def on_main(work: Callable[[], Result]) -> Result:
    """Let the main process do something while the others wait.

    Args:
        work: what it does.

    Returns:
        What came of it, in every process.

    Raises:
        SystemExit: in the others where it failed, with the status that the main process will end with; it tells why.
    """
    if count() == 1:
        return work()
    if not is_main():
        status, result = from_main(None)
        if status:
            raise SystemExit(status)
        return result
    try:
        result = work()
    except BaseException as error:
        # The others may be gone already; what matters is the error.
        with contextlib.suppress(RuntimeError):
            from_main((2 if isinstance(error, UserError) else 1, None))
        raise
    from_main((0, result))
    return result
