"""The tokens of 200,000 reviews: what the table on disk takes to make and to read from, and what it holds of memory.

The reference is what fine-tuning recipes do: the texts stand in memory and every batch tokenises its own again, in
every epoch. ``ratio`` is that of reading a batch of 128 reviews at random. ``lists`` is the other plain way, all token
ids as Python lists made once beforehand. Each way runs in a process of its own, so that the memory is its alone:
``reviews_mb`` is what the texts and the tokenizer take, ``peak_mb`` and ``kept_mb`` what is on top of that, at most and
once everything is made. Of the table kept memory is mostly pages that reading 20,000 rows brings in, which the system
may take back.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from _harness import measure_pairs, parser, report
from transformers import PreTrainedTokenizerFast

from recbole_llm.backbone.embedded import SPECIAL_TOKENS, byte_tokenizer
from recbole_llm.data.token_table import TokenTable
from recbole_llm.training.store import peak_memory_mb, reset_peak_memory

WORDS, BATCH, LIMIT = 20_000, 128, 512
WAYS = ("table", "lists")


def reviews_of(count: int) -> list[str]:
    """Of 5 to 400 words, half of them below 60; words are spelled at random and as frequent as Zipf's law has it."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgk"))
    words = np.array(["".join(rng.choice(letters, size)) for size in rng.integers(2, 10, WORDS)])
    lengths = np.clip(rng.lognormal(np.log(60), 0.9, count), 5, 400).astype(int)
    return [" ".join(words[(rng.zipf(1.3, length) - 1) % WORDS]) for length in lengths]


def tokenizer_of(reviews: list[str]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(reviews[:2_000], 8_000, SPECIAL_TOKENS))


def encoder_of(tokenizer: PreTrainedTokenizerFast) -> Callable[[Any], list[list[int]]]:
    return lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def held_mb() -> float:
    """Resident memory of this process, in MiB."""
    gc.collect()
    return psutil.Process().memory_info().rss / 2**20


def memory_of(way: str, count: int) -> dict[str, float]:
    """Memory and time of one way, in a process that does nothing else."""
    bare = held_mb()
    reviews = reviews_of(count)
    encode = encoder_of(tokenizer_of(reviews))
    encode(reviews[:1_000])
    before = held_mb()
    reset_peak_memory()
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        if way == "table":
            kept: Any = TokenTable.write(Path(folder), reviews, encode, LIMIT)
        else:
            kept = [row[:LIMIT] for row in encode(reviews)]
        seconds, highest = time.process_time() - start, peak_memory_mb() - before
        if way == "table":
            for rows in torch.randint(count, (20_000,)).split(BATCH):
                kept.take(rows)
        after = held_mb() - before
        disk = sum(path.stat().st_size for path in Path(folder).iterdir()) / 2**20
    return {
        "seconds": round(seconds, 2), "reviews_mb": round(before - bare, 1), "peak_mb": round(highest, 1),
        "kept_mb": round(after, 1), "disk_mb": round(disk, 1),
    }  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--way", choices=WAYS, help=f"print one way's memory alone ({' | '.join(WAYS)})")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    count = 10_000 if arguments.quick else 200_000
    if arguments.way:
        print(json.dumps(memory_of(arguments.way, count)))
        return
    memory: dict[str, dict[str, float]] = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--threads", str(arguments.threads)]
        run = subprocess.run(
            [*command, *(["--quick"] if arguments.quick else [])], capture_output=True, text=True, check=True
        )
        memory[way] = json.loads(run.stdout.splitlines()[-1])
        print(f"{way}: {memory[way]}")
    reviews = reviews_of(count)
    encode = encoder_of(tokenizer_of(reviews))
    batches = torch.randint(count, (20, BATCH), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        table = TokenTable.write(Path(folder), reviews, encode, LIMIT)
        error = 0
        for rows in batches:
            told = [row[:LIMIT] for row in encode([reviews[row] for row in rows.tolist()])]
            error += table.take(rows).values.tolist() != [token for row in told for token in row]
        ours, reference = measure_pairs(
            lambda: [table.take(rows) for rows in batches],
            lambda: [encode([reviews[row] for row in rows.tolist()]) for rows in batches],
            3 if arguments.quick else 9,
        )
        tokens = int(table.offsets[-1])
    report(
        "token_table", ours, reference, equal=not error, max_error=float(error),
        detail={
            "reviews": count, "tokens": tokens, "tokens_a_review": round(tokens / count, 1), "batch": BATCH,
            "milliseconds_a_batch": round(1e3 * sorted(ours)[len(ours) // 2] / len(batches), 3), "memory": memory,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
