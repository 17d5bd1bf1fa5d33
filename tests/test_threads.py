"""How the threads of a command wait for each other, asked of OpenMP itself."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from recbole_llm.threads import SPINS

SAID = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


COMMAND = "from recbole_llm.cli import main; main(['--version']); import torch"


def spins(**environment: str) -> set[str]:
    """What OpenMP spins once a command has begun and torch is loaded."""
    if sys.platform != "linux":
        pytest.skip("torch has libgomp on Linux alone")
    said = {key: value for key, value in os.environ.items() if key not in SAID}
    said |= {"OMP_DISPLAY_ENV": "VERBOSE"} | environment
    done = subprocess.run([sys.executable, "-c", COMMAND], env=said, capture_output=True, text=True, check=True)
    return {line.partition("=")[2].strip(" '") for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}


def test_a_commands_threads_give_their_core_away() -> None:
    assert spins() == {str(SPINS)}


@pytest.mark.parametrize(
    ("said", "expected"), [({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "PASSIVE"}, "0")]
)
def test_what_the_environment_says_holds(said: dict[str, str], expected: str) -> None:
    assert spins(**said) == {expected}
