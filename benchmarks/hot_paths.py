"""Every hot path against what this machine can do: time, counted FLOPs and bytes, and the share of the roofline.

The ceilings are measured first, in the same run (``_ceilings.py``); the counts are formulas (``_counts.py``; of SASRec
they are torch's own, taken while it runs). ``bound`` is the longer of what the FLOPs take at the measured peak of large
multiplications and the bytes at the measured bandwidth, ``share`` that over the time; ``of torch's own`` is the same at
the peak of the library that torch multiplies float32 with by itself, where nothing else does. What fits into the caches
may move faster than the bandwidth. ``calls`` is the share of the time that torch's operations take before they do
anything.
Models are random and small: the decoder of ``beam_search.py`` (a Qwen2 of 4 layers, 256 wide, a vocabulary of 152,960)
and the Llama of ``fine_tuning.py`` (4 layers, 256 wide, a vocabulary of 32,000 and 1,024 codes), in float32.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from typing import Any

import torch
from _ceilings import Ceilings, ceilings, seconds_of, table
from _counts import Counted
from _harness import machine, parser
from _other_paths import evaluator, glta, lightgcn, mask, sasrec, soft_labels
from _page import add_page, figure, machine_line, markdown, show
from _paths import Path, decoding, training

HEADS = ["path", "of", "ms", "GFLOP", "MB", "GFLOP/s", "GB/s", "bound, ms", "share, %", "of torch's own, %", "calls, %"]


def paths(quick: bool) -> Iterator[Path]:
    """All of them, each made when its turn comes."""
    if quick:
        yield from decoding(2, 64, 100, 64, words=8_000)
        yield from training(4, 5, 8)
    else:
        yield from decoding(8, 128, 3_706, 1024)
        yield from training(8, 8, 64)
    yield glta(2 if quick else 32)
    yield sasrec(16 if quick else 128, 3_707)
    yield lightgcn(944, 1_683, 80_000) if quick else lightgcn(6_041, 3_707, 1_000_000)
    yield evaluator(*((500, 1_683) if quick else (6_040, 3_707)))
    items = 10_000 if quick else 100_000
    for depth in (1, 2):
        yield mask(items, depth=depth)
    yield soft_labels(items // 5)


def measured(path: Path, top: Ceilings, budget: float) -> dict[str, Any]:
    """One path's figures."""
    taken = seconds_of(path.call, budget, path.prepare, least=3)
    bound, own = (path.cost.seconds(top.gemm[kind], top.bandwidth) for kind in (path.kind.partition(" ")[0], path.kind))
    found = {
        "path": path.name, "of": path.each, "seconds": taken, "flops": path.cost.flops, "bytes": path.cost.moved,
        "bound": bound, "share": bound / taken,
    }  # fmt: skip
    if path.kind not in ("float32", "bfloat16"):
        found["share_of_own"] = own / taken
    if path.countable:
        given = () if path.prepare is None else (path.prepare(),)
        with Counted() as counted:
            path.call(*given)
        found["calls"] = counted.calls * top.call / taken
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    count, of = row["of"]
    taken = row["seconds"]
    return [
        row["path"], f"{count:,} {of}{'s' * (count > 1)}", figure(1e3 * taken), figure(row["flops"] / 1e9),
        figure(row["bytes"] / 1e6), figure(row["flops"] / taken / 1e9), figure(row["bytes"] / taken / 1e9),
        figure(1e3 * row["bound"]),
        *(f"{100 * row[name]:.0f}" if name in row else "" for name in ("share", "share_of_own", "calls")),
    ]  # fmt: skip


def main() -> None:
    made = parser(str(__doc__))
    made.set_defaults(threads=1)
    add_page(made)
    options = made.parse_args()
    # What is loaded stays: collecting garbage before each timing need not look at it.
    gc.freeze()
    torch.set_num_threads(options.threads)
    show("machine of hot paths", [machine_line()], options.page)
    others = [] if options.quick else [ceilings(threads) for threads in (1, 2) if threads != options.threads]
    top = ceilings(options.threads, options.quick)
    tops = sorted([*others, top], key=lambda one: one.threads)
    show("ceilings", table(tops), options.page)
    torch.manual_seed(0)
    rows = [measured(path, top, 0.05 if options.quick else 3.0) for path in paths(options.quick)]
    show("hot paths", markdown(HEADS, [cells(row) for row in rows]), options.page)
    print(
        json.dumps({"name": "hot_paths", "ceilings": [vars(one) for one in tops], "paths": rows, "machine": machine()})
    )


if __name__ == "__main__":
    main()
