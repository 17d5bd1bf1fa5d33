"""What this machine can do at most, measured in the same run as what is compared with it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Rows, inputs and outputs of multiplications that the hot paths are made of: a decoder 256 wide reading 8 prompts of
# 128 tokens, a step of 8 x 20 beams, a piece of the vocabulary for these.
SHAPES = {
    "prompts, 1024 x 256 x 1024": (1024, 256, 1024),
    "beam step, 160 x 256 x 1024": (160, 256, 1024),
    "vocabulary, 160 x 256 x 2048": (160, 256, 2048),
}


@dataclass(frozen=True)
class Ceilings:
    """Of one number of threads.

    Attributes:
        threads: of torch.
        gemm: FLOPs a second of large square multiplications, by ``float32`` and ``bfloat16``, the better of torch's two
            libraries, and by ``float32 as it is``, the one that torch takes by itself.
        shapes: the same at other shapes, by name.
        memory: bytes a second beyond the caches by ``copy``, ``a = b``, and ``triad``, ``a = b + s * c`` (McCalpin
            1995, STREAM, which does not count that a line is read before it is written), by ``update``, ``a += b``,
            and by ``read``, the dot product of two vectors.
        call: seconds that an operation of torch takes that has next to nothing to do.
    """

    threads: int
    gemm: dict[str, float]
    shapes: dict[str, float]
    memory: dict[str, float]
    call: float

    @property
    def bandwidth(self) -> float:
        """Bytes a second, the best."""
        return max(self.memory.values())


def seconds_of(
    call: Callable[..., Any], budget: float, prepare: Callable[[], Any] | None = None, least: int = 3, most: int = 50,
    of: Callable[[list[float]], float] = median,
) -> float:  # fmt: skip
    """The time of a call, the median of as many as a budget allows.

    On one thread it is the processor's time, which other processes move less than the clock's; on more, the clock's.

    Args:
        call: what is timed; given what ``prepare`` returns, if there is one.
        budget: seconds of the clock for all of them, preparations apart.
        prepare: done before each call, untimed.
        least, most: how many calls.
        of: what is made of their times.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

    def once(inner: int) -> float:
        given = () if prepare is None else (prepare(),)
        start = clock()
        for _ in range(inner):
            call(*given)
        return (clock() - start) / inner

    once(1)
    # What is short is timed several times in a row.
    inner = 1 if prepare is not None else max(1, int(2e-3 / max(once(1), 1e-7)))
    gc.collect()
    gc.disable()
    try:
        times, spent = [], 0.0
        while len(times) < least or (spent < budget and len(times) < most):
            start = time.perf_counter()
            times.append(once(inner))
            spent += time.perf_counter() - start
    finally:
        gc.enable()
    return of(times)


@torch.no_grad()
def ceilings(threads: int, quick: bool = False) -> Ceilings:
    """Measure them, and leave torch at so many threads."""
    torch.set_num_threads(threads)
    budget = 0.1 if quick else 1.0
    side, words = (1024, 2**24) if quick else (2048, 2**26)
    gemm: dict[str, float] = {}
    for size in (side // 2, side):
        for kind, rate in _rates(size, size, size, budget).items():
            gemm[kind] = max(gemm.get(kind, 0.0), rate)
    shapes = {
        f"{name}, {kind}": rate for name, shape in SHAPES.items() for kind, rate in _rates(*shape, budget / 2).items()
    }
    a, b, c = torch.zeros(words), torch.ones(words), torch.ones(words)
    passes: dict[str, tuple[int, Callable[[], Any]]] = {
        "copy": (8, lambda: a.copy_(b)), "triad": (12, lambda: torch.add(b, c, alpha=2.0, out=a)),
        "update": (12, lambda: a.add_(b)), "read": (8, lambda: torch.dot(b, c)),
    }  # fmt: skip
    memory = {name: width * words / seconds_of(call, budget, of=min) for name, (width, call) in passes.items()}
    one = torch.zeros(1)
    return Ceilings(threads, gemm, shapes, memory, seconds_of(lambda: one.add_(1.0), budget, of=min))


def _rates(rows: int, inputs: int, outputs: int, budget: float) -> dict[str, float]:
    """FLOPs a second of a product, by kind as :class:`Ceilings` has them.

    The least of the times: what is asked is what the machine can do.
    """
    left, right = torch.randn(rows, inputs), torch.randn(outputs, inputs)

    def rate(*given: Tensor) -> float:
        return 2 * rows * inputs * outputs / seconds_of(lambda: functional.linear(*given), budget, of=min)

    plain = rate(left, right)
    found = {"float32": plain, "float32 as it is": plain, "bfloat16": rate(left.bfloat16(), right.bfloat16())}
    if torch.backends.mkldnn.is_available():
        # What torch takes by itself, MKL, holds back on processors that are not Intel's.
        found["float32"] = max(plain, rate(left.to_mkldnn(), right.to_mkldnn()))
    return found


def table(measured: list[Ceilings]) -> list[str]:
    """Rows of Markdown, a column for each number of threads."""
    threads = " | ".join(f"{one.threads} thread{'s' * (one.threads > 1)}" for one in measured)
    lines = [f"| ceiling | {threads} |", "|---|" + "---:|" * len(measured)]

    def row(name: str, cells: list[str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for kind in measured[0].gemm:
        row(f"multiplication of large squares, {kind}, GFLOP/s", [f"{one.gemm[kind] / 1e9:.0f}" for one in measured])
    for name in measured[0].shapes:
        row(f"{name}, GFLOP/s", [f"{one.shapes[name] / 1e9:.0f}" for one in measured])
    for name in measured[0].memory:
        row(f"memory, {name}, GB/s", [f"{one.memory[name] / 1e9:.1f}" for one in measured])
    row("an operation with nothing to do, µs", [f"{one.call * 1e6:.2f}" for one in measured])
    return lines
