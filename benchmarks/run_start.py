"""A leaderboard's run, forked from a process that has its imports behind it, against a process of its own.

Whole runs of Pop on the shipped data set, from outside: what is left is the start. The process that forks is there.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from _harness import measure_pairs, parser, report

from recbole_llm.leaderboard.schedule import Job, OwnProcess
from recbole_llm.leaderboard.warm import Warm

DATA = Path(__file__).resolve().parent.parent / "dataset"
# A leaderboard's own default; beside threads of NumPy nothing is forked.
THREADS = 1


def spec_in(folder: Path) -> Path:
    """The file of a run that trains anew each time."""
    folder.mkdir()
    spec = {
        "model": "Pop", "dataset": "tiny", "command_line": [],
        "settings": {"data_path": str(DATA), "output_dir": str(folder / "saved"), "gpu_id": "", "cache": "refresh"},
        "result": str(folder / "result.json"), "reason": str(folder / "reason.txt"),
    }  # fmt: skip
    (folder / "spec.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder / "spec.json"


def result_of(spec: Path) -> Any:
    return json.loads((spec.parent / "result.json").read_text(encoding="utf-8"))["test"]


def main() -> None:
    """Run it."""
    arguments = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as place:
        forked, own = spec_in(Path(place) / "forked"), spec_in(Path(place) / "own")
        command = [sys.executable, "-m", "recbole_llm.leaderboard.cell", str(own)]
        job = Job("own", command, 1.0, own.parent / "log")
        warm = Warm(THREADS)
        if not warm.works:
            sys.exit("nothing can be forked here: threads, a GPU, or no Linux")

        def ours() -> None:
            process = warm.start(forked, forked.parent / "log")
            assert process is not None and not process.wait()

        def reference() -> None:
            assert not OwnProcess(job, THREADS).wait()

        mine, theirs = measure_pairs(ours, reference, pairs=2 if arguments.quick else 9)
        warm.close()
        report("run_start", mine, theirs, equal=result_of(forked) == result_of(own), max_error=0.0)


if __name__ == "__main__":
    main()
