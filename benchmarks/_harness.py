"""What every benchmark shares: the command line, timing in pairs, and the report whose last line is JSON."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout runs without being installed


def parser(description: str) -> argparse.ArgumentParser:
    """The command line of a benchmark: ``--quick`` and ``--threads``."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="the same in small: ends within 60 s on 2 cores")
    made.add_argument("--threads", type=int, default=2, help="threads of torch (default: 2)")
    return made


def once(call: Callable[[], Any]) -> float:
    """Seconds that one call takes, without the garbage collector."""
    return _timed(call, time.perf_counter)


def of_processors(call: Callable[[], Any]) -> float:
    """As :func:`once`, in seconds of the processors: what else the machine does moves them less than the clock's."""
    return _timed(call, time.process_time)


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()
    try:
        start = clock()
        call()
        return clock() - start
    finally:
        gc.enable()


def measure_pairs(
    ours: Callable[[], Any],
    reference: Callable[[], Any],
    pairs: int,
    warmup: int = 1,
    seconds: Callable[[Callable[[], Any]], float] = once,
) -> tuple[list[float], list[float]]:
    """Time both sides in turn, so that what else the machine does meets both alike.

    Args:
        ours: one run of ours.
        reference: one run of what a user would otherwise have.
        pairs: how often each is timed; which goes first alternates.
        warmup: untimed runs of each beforehand.
        seconds: how a call is timed.

    Returns:
        Seconds of ours and of the reference, ``pairs`` each; equal places belong together.
    """
    for _ in range(warmup):
        reference()
        ours()
    times: tuple[list[float], list[float]] = ([], [])
    sides = (ours, reference)
    for pair in range(pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            times[side].append(seconds(sides[side]))
    return times


def machine() -> dict[str, Any]:
    """The facts that a timing means little without."""
    facts: dict[str, Any] = {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
    if "torch" in sys.modules:
        import torch

        facts |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return facts


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def ratios_of(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Reference over ours, pair by pair: above 1 ours is faster."""
    return [theirs / mine for mine, theirs in zip(ours, reference, strict=True)]


def report(
    name: str,
    ours: Sequence[float],
    reference: Sequence[float],
    *,
    equal: bool,
    max_error: float,
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Print a small table and, as the last line, the result as one JSON object.

    Args:
        name: the benchmark's name, that of its file.
        ours: seconds of each run of ours.
        reference: seconds of each run of the reference, in the same order.
        equal: whether both sides were seen to compute the same thing.
        max_error: the largest difference seen on the way.
        detail: anything else worth keeping; the machine's facts are added.

    Returns:
        What was printed as JSON.
    """
    ratios = ratios_of(ours, reference)
    rows = [("", "median s", "min s", "max s")]
    for label, times in (("ours", ours), ("reference", reference)):
        rows.append((label, *(f"{value:.4f}" for value in (median(times), min(times), max(times)))))
    print(f"\n{name}: {median(ratios):.2f}x ({'equal' if equal else 'NOT EQUAL'}, largest difference {max_error:.2g})")
    for row in rows:
        print(f"  {row[0]:<10}" + "".join(f"{cell:>12}" for cell in row[1:]))
    result = {
        "name": name,
        "ratio": round(median(ratios), 4),
        "ratios": [round(ratio, 4) for ratio in ratios],
        "equal": equal,
        "max_error": max_error,
        "detail": {**(detail or {}), "fastest": [min(ours), min(reference)], "machine": machine()},
    }
    print(json.dumps(result), flush=True)
    return result


def tell(detail: Mapping[str, Any]) -> None:
    """Print measurements under each other."""
    width = max(map(len, detail))
    for name, value in detail.items():
        print(f"{name:>{width}}  {value}")


@contextmanager
def timed_parts(places: Sequence[tuple[Any, str, str]], seconds: dict[str, float]) -> Iterator[None]:
    """Add up where the processors' time goes: what else the machine does moves it less than the clock's.

    Args:
        places: an object, module or class, the name of a function of its own, and of the part that it belongs to.
        seconds: gets the seconds of each part, and of ``all``.
    """
    kept = [(owner, name, vars(owner).get(name)) for owner, name, _ in places]

    def timing(call: Callable[..., Any], part: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                seconds[part] = seconds.get(part, 0.0) + time.process_time() - start

        return run

    for owner, name, part in places:
        setattr(owner, name, timing(getattr(owner, name), part))
    try:
        start = time.process_time()
        yield
        seconds["all"] = time.process_time() - start
    finally:
        for owner, name, own in kept:
            if own is None:
                # A method of the object's class.
                delattr(owner, name)
            else:
                setattr(owner, name, own)
