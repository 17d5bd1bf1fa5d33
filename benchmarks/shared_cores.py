"""Training beside as many busy processes as cores: threads that give their core away against OpenMP's own.

Whole runs on ml-100k, of which the seconds of the training count. ``ratio`` is LightGCN's beside the other processes;
``detail`` has SASRec's and what it costs on a machine of one's own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from _harness import measure_pairs, parser, ratios_of, report

from recbole_llm.threads import SPINS

ROOT = Path(__file__).resolve().parent.parent
# libgomp's, where nobody says otherwise.
OWN_SPINS = 300_000


class Side:
    """Runs of a model whose waiting threads spin so many rounds.

    Args:
        folder: what a run writes goes there.
        model: its name.
        spins: see :data:`recbole_llm.threads.SPINS`.
        epochs: of training.
        threads: of torch.
    """

    def __init__(self, folder: Path, model: str, spins: int, epochs: int, threads: int) -> None:
        self.folder = folder / f"{model}-{spins}"
        self.command = [
            sys.executable, "-m", "recbole_llm", "run", f"--model={model}", "--dataset=ml-100k", f"--epochs={epochs}",
            f"--eval_step={epochs}", "--cache=refresh", "--gpu_id=", f"--output_dir={self.folder}",
        ]  # fmt: skip
        self.environment = os.environ | {"GOMP_SPINCOUNT": str(spins), "OMP_NUM_THREADS": str(threads)}
        self.found: dict[str, float] = {}

    def seconds(self) -> float:
        """Of one training."""
        subprocess.run(self.command, cwd=ROOT, env=self.environment, check=True, capture_output=True)
        latest = max(self.folder.rglob("result.json"), key=os.path.getmtime)
        result = json.loads(latest.read_text(encoding="utf-8"))
        self.found = result["test"]
        return float(sum(stage["seconds"] for stage in result["stages"]))


@contextmanager
def neighbours(processes: int) -> Iterator[None]:
    """So many other processes compute meanwhile."""
    # In sessions of their own, as another user's would be: schedulers share cores out by session.
    command = [sys.executable, "-c", "while True: pass"]
    busy = [subprocess.Popen(command, start_new_session=True) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def main() -> None:
    """Run it."""
    arguments = parser(__doc__).parse_args()
    # The last is the one reported.
    epochs_of = {"LightGCN": 1} if arguments.quick else {"SASRecAllPositions": 1, "LightGCN": 3}
    pairs = 1 if arguments.quick else 3
    detail: dict[str, Any] = {"neighbours": os.cpu_count() or 1}
    with tempfile.TemporaryDirectory() as place:
        for model, epochs in epochs_of.items():
            mine, theirs = (Side(Path(place), model, spins, epochs, arguments.threads) for spins in (SPINS, OWN_SPINS))

            def both(mine: Side = mine, theirs: Side = theirs) -> tuple[list[float], list[float]]:
                return measure_pairs(mine.seconds, theirs.seconds, pairs, warmup=0, seconds=lambda call: call())

            with neighbours(detail["neighbours"]):
                beside = both()
            alone = both()
            detail[model] = {
                "beside": median(ratios_of(*beside)), "alone": median(ratios_of(*alone)), "epochs": epochs,
                "seconds": {"beside": beside, "alone": alone},
            }  # fmt: skip
            print(f"{model}: {detail[model]['beside']:.1f}x beside others, {detail[model]['alone']:.2f}x alone")
    report("shared_cores", *beside, equal=mine.found == theirs.found, max_error=0.0, detail=detail)


if __name__ == "__main__":
    main()
