"""How torch's threads wait for each other, which OpenMP reads once: when torch is loaded."""

from __future__ import annotations

import os

# Rounds that a waiting thread of libgomp's spins before it sleeps; by itself it takes 300,000, some milliseconds, and
# 1,000 where there are more threads than cores. It counts its own process's threads alone, so that beside another
# process the threads of a small product burn the time that the last of them, which has no core, is waiting for.
SPINS = 1000


def share_cores() -> None:
    """Let threads that wait for each other give their core away at once, for this process and those that it starts.

    Has to be called before torch is imported. What the environment says already (``OMP_WAIT_POLICY``,
    ``GOMP_SPINCOUNT``) holds; OpenMP libraries other than libgomp, torch's on Linux, do not look at it. No result
    depends on it. Measured by ``benchmarks/shared_cores.py``.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))
