"""Writing so that neither a kill nor a full disk leaves half a file, and telling of a full disk in one line."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from recbole_llm.errors import DiskFullError

# No space, no quota left, or a limit on the size of a file.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What is being written carries this suffix until it is whole.
PART = ".part"
# safetensors and tokenizers raise errors of their own that only spell the system's number.
_SPELLED = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make what fails inside the block an ``OSError`` that names a file.

    The system names the file when opening fails and not when writing does, and the writers of safetensors and
    tokenizers raise no ``OSError`` at all.
    """
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        found = _SPELLED.search(str(error))
        if found is None:
            raise
        number = int(found.group(1))
        raise OSError(number, os.strerror(number), str(path)) from None


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file whole or not at all, also when the power fails.

    It is made in a folder beside its place: safetensors leaves a file of a random name where it is killed, and so the
    next attempt can clear away all that this one left.

    Args:
        path: the file; its folder exists.
        write: fills the file it is given, which has the same name.

    Raises:
        OSError: it could not be written; what was there before is still there.
    """
    scratch = path.with_name(path.name + PART)
    with naming(path), _alone_in(path.parent) as folder:
        remove(scratch)
        try:
            scratch.mkdir()
            write(scratch / path.name)
            # safetensors makes a file that nobody else may read; the folder is as the user's umask has it.
            # Some mounted file systems know no modes and refuse.
            with contextlib.suppress(PermissionError):
                os.chmod(scratch / path.name, scratch.stat().st_mode & 0o666)
            sync(scratch / path.name)
            os.replace(scratch / path.name, path)
        finally:
            remove(scratch)
        os.fsync(folder)


def clear_parts(folder: Path) -> None:
    """Take away what writers that were killed have left in a folder, beside files that are whole.

    Args:
        folder: where :func:`write_whole` wrote; a writer that is at work there is waited for.
    """
    with _alone_in(folder):
        for left in folder.glob(f"*{PART}"):
            remove(left)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[int]:
    """The only writer of a folder: two runs may be asked to write the same result file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        # Some network file systems lock no folders; there two runs had better not share a result file.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Take away a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def full_disk_told(folder: Path) -> Iterator[None]:
    """Turn a full disk into one line for the person at the keyboard.

    Args:
        folder: whose disk to look at where the system does not name the file.

    Raises:
        DiskFullError: something inside the block could not be written for want of space.
    """
    hook = threading.excepthook

    def quiet(raised: Any) -> None:
        # tensorboard writes in a thread, and hands the error on to the next call as well.
        if not (isinstance(raised.exc_value, OSError) and raised.exc_value.errno in FULL):
            hook(raised)

    threading.excepthook = quiet
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path = Path(os.fsdecode(error.filename)) if error.filename else folder
        raise DiskFullError(
            f"{path} cannot be written: {os.strerror(error.errno).lower()} ({_free(path)}); make room or set "
            "--output_dir to another disk; with room, the same command goes on where this one stopped"
        ) from None
    finally:
        threading.excepthook = hook


def _free(path: Path) -> str:
    while not path.exists():
        path = path.parent
    return f"{shutil.disk_usage(path).free / 2**20:.1f} MiB are free there"
