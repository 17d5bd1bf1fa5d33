"""The processes of one run: one, or several that ``accelerate launch`` or ``torchrun`` started.

The main process makes files, prints and logs. What it alone does the others wait for, and they end when it fails; what
they do together they do in the same order. With one process nothing here does anything, or imports anything heavy.
"""

from __future__ import annotations

import contextlib
import os
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


def join(cpu: bool) -> torch.device:
    """Meet the other processes (once), and say which device is this process's own.

    Args:
        cpu: use no GPU; without one it is the CPU anyway.
    """
    import torch
    from accelerate import PartialState

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
