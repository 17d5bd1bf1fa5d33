"""One run of a suite, in a process of its own: ``python -m recbole_llm.leaderboard.cell SPEC``.

A process a run makes its peak memory its own, and lets the others go on when it is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from recbole_llm.errors import DiskFullError, UserError

FAILED, FULL_DISK = 1, 28


def main(spec_file: str) -> int:
    """Run what a file describes.

    Args:
        spec_file: JSON with ``model``, ``dataset``, ``settings``, ``command_line``, ``result`` (the file to write) and
            ``reason`` (the file that says why there is none).

    Returns:
        0 done, :data:`FULL_DISK`, or :data:`FAILED`; in the last two the reason's file is written.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    spec: dict[str, Any] = json.loads(Path(spec_file).read_text(encoding="utf-8"))
    reason = Path(spec["reason"])
    reason.unlink(missing_ok=True)
    try:
        from recbole_llm.training.runs import run

        run(
            spec["model"], spec["dataset"], config_dict=spec["settings"] | {"result_file": spec["result"]},
            command_line=spec["command_line"],
        )  # fmt: skip
    except DiskFullError as error:
        # It fails every run after this one; anything else may be this one's own.
        with contextlib.suppress(OSError):
            print(error, file=sys.stderr, flush=True)
        return FULL_DISK
    except UserError as error:
        reason.write_text(str(error), encoding="utf-8")
        return FAILED
    except Exception as error:
        traceback.print_exc()
        reason.write_text(f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}", encoding="utf-8")
        return FAILED
    return 0


def _end_with_parent() -> None:
    """Whoever started this run holds its input open; a parent that is killed cannot stop it in any other way."""
    # Not through sys.stdin, whose lock this thread would still hold when the interpreter ends.
    while os.read(0, 1):
        pass
    os._exit(FAILED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
