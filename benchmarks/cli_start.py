"""The start of the command line: ``recbole-llm --help`` against importing what a RecBole script imports first.

Whole processes, timed from outside.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from _harness import measure_pairs, parser, report

ROOT = Path(__file__).resolve().parent.parent

# RecBole cannot be imported on NumPy 2 without aliases for what it removed; they cost nothing.
STOCK = """
import numpy as np
for name in ("float", "int", "object", "str", "unicode", "complex"):
    np.__dict__.get(name) or setattr(np, name, {"unicode": str}.get(name, getattr(np, name + "_", float)))
import recbole.data, recbole.trainer
"""


def main() -> None:
    arguments = parser(__doc__).parse_args()

    def ours() -> None:
        subprocess.run([sys.executable, "-m", "recbole_llm", "--help"], cwd=ROOT, check=True, capture_output=True)

    def reference() -> None:
        subprocess.run([sys.executable, "-c", STOCK], check=True, capture_output=True)

    said = subprocess.run(
        [sys.executable, "-m", "recbole_llm", "--help"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    mine, theirs = measure_pairs(ours, reference, pairs=3 if arguments.quick else 9)
    report("cli_start", mine, theirs, equal="usage: recbole-llm" in said.stdout, max_error=0.0)


if __name__ == "__main__":
    main()
