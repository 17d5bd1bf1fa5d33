"""What is counted without a clock: before and after at the benchmarks' sizes, and one H100 on paper.

``before and after`` has the FLOPs of what a user would otherwise run and of ours, at the sizes of the benchmark of that
name and at Llama-2-7B's with the same prompts. ``7B on paper`` has the FLOPs and bytes of the hot paths with
Llama-2-7B in bfloat16, and the time at the roofline of an H100 SXM and at 40 % of it. ``targets on paper`` has what
share of that GPU's peak some rates need with Qwen2.5-1.5B's sizes. Nothing is measured.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path

import _counts as counts
import torch
from _counts import LLAMA_2_7B, QWEN_2_5_1_5B, Cost, Read, Sizes
from _harness import parser
from _other_paths import glta_cost
from _page import add_page, figure, markdown, show
from _paths import Batch, fine_tuning_batch, packed_batch
from beam_search import BEAMS, CODES, HEADS, INNER, KEY_HEADS, LAYERS, LEVELS, SIZE, WIDTH, catalogue
from exact_ranking import ITEMS
from transformers import LlamaConfig

from recbole_llm.backbone.memory import activation_bytes, cache_bytes, count_weights
from recbole_llm.itemid.trie import Trie

PEAK, BANDWIDTH, SHARE = 989e12, 3.35e12, 0.4  # H100 SXM: bfloat16 without sparsity; NVIDIA's data sheet
SPEED = Path(__file__).resolve().parent.parent / "docs" / "results" / "speed.md"
SEARCHED = Sizes(LAYERS, WIDTH, INNER, HEADS, KEY_HEADS, WIDTH // HEADS, SIZE)
TRAINED = Sizes(4, 256, 688, 4, 4, 64, 32_000)
# Tokens of GLTA's prompts in ``glta_training.py``: shared, their own, and slots.
GLTA_PREFIX, GLTA_TOKENS, GLTA_SLOTS, GLTA_ROWS = 30, 124, 10, 32
PROMPT, USERS, RANK, CODED = 160, 64, 8, LEVELS * CODES
ML_1M_USERS, TARGET_USERS, TARGET_SHARE = 6_040, 500, 0.45


@cache
def inner_nodes(items: int = ITEMS) -> int:
    """Nodes of the benchmarks' catalogue that a full ranking reads."""
    trie = Trie(catalogue(items))
    return int((trie.child_offsets.diff() > 0).sum()) - 1


def plain_training(sizes: Sizes, batch: Batch, rank: int | None) -> Cost:
    """A row a sample, filled up to the longest, with the head at every position."""
    rows, length = batch.ids.shape
    read = Read(rows * length, rows, length, None, rows * length)
    return counts.training(replace(sizes, vocabulary=sizes.vocabulary + CODED), read, rank)


def plain_glta(sizes: Sizes) -> Cost:
    """Whole prompts, logits of the vocabulary and of the items at every position."""
    length = GLTA_PREFIX + GLTA_TOKENS
    whole = glta_cost(sizes, GLTA_ROWS, length, 0, length)
    return whole + counts.linear(GLTA_ROWS * length, sizes.width, sizes.vocabulary, sizes.number)


def pairs(searched: Sizes, trained: Sizes) -> dict[str, tuple[Cost, Cost]]:
    """The plain way and ours, by what they do."""
    nodes, one = inner_nodes(), 128
    batch, user = fine_tuning_batch(8), packed_batch(64)
    found = {
        f"`beam_search`, {BEAMS} beams, a user": (
            counts.generated(searched, 1, one, BEAMS, LEVELS),
            counts.beam_search(searched, 1, one, BEAMS, LEVELS, searched.vocabulary),
        ),
        f"`beam_search`, {BEAMS} beams, a user, by level": (
            counts.generated(searched, 1, one, BEAMS, LEVELS),
            counts.beam_search(searched, 1, one, BEAMS, LEVELS, CODES),
        ),
        f"`exact_ranking`, {ITEMS:,} items, a user": (
            counts.reread(replace(searched, vocabulary=4_096), one, ITEMS, LEVELS),
            counts.full_ranking(replace(searched, vocabulary=4_096), one, nodes, 1024, LEVELS, 4_096),
        ),
    }
    for name, rank in (("everything", None), ("LoRA", RANK)):
        found[f"`fine_tuning`, 8 samples, {name}"] = (
            plain_training(trained, batch, rank), counts.training(trained, batch.read(), rank, CODED),
        )  # fmt: skip
    lengths = user.lengths
    labels = float(len(user.labels))
    apart = Read(float(lengths.sum()), len(lengths), int(lengths.max()), labels, labels)
    found["`packing: user`, 64 prefixes, against the same apart"] = (
        counts.training(trained, apart, None, CODED), counts.training(trained, user.read(), None, CODED),
    )  # fmt: skip
    found[f"`glta_training`, {GLTA_ROWS} users"] = (
        plain_glta(trained), glta_cost(trained, GLTA_ROWS, GLTA_TOKENS, GLTA_PREFIX, GLTA_SLOTS),
    )  # fmt: skip
    return found


def measured_ratio(name: str) -> str:
    """What ``docs/results/speed.md`` has measured; the ratios of a benchmark stand there in the order of ours."""
    benchmark = name.partition("`")[2].partition("`")[0]
    cells = [line.split("|") for line in SPEED.read_text(encoding="utf-8").splitlines() if f"| `{benchmark}`" in line]
    ratios = re.findall(r"[\d.]+x", cells[0][3]) if cells else []
    place = {"level": -1, "LoRA": 1}.get(name.rpartition(" ")[2], 0)
    return ratios[place] if ratios else ""


def before_and_after() -> list[str]:
    """At the benchmarks' sizes, and the ratio at 7B's."""
    large = pairs(LLAMA_2_7B, LLAMA_2_7B)
    rows = []
    for name, (plain, ours) in pairs(SEARCHED, TRAINED).items():
        their, own = large[name]
        rows.append([
            name, figure(plain.flops / 1e9), figure(ours.flops / 1e9), f"{plain.flops / ours.flops:.1f}x",
            measured_ratio(name), figure(their.flops / 1e12), figure(own.flops / 1e12),
            f"{their.flops / own.flops:.1f}x",
        ])  # fmt: skip
    heads = ["", "plain, GFLOP", "ours, GFLOP", "ratio", "measured", "7B: plain, TFLOP", "ours, TFLOP", "ratio"]
    return markdown(heads, rows)


def seven_billion() -> list[str]:
    """The hot paths of Llama-2-7B on one H100."""
    sizes, nodes = LLAMA_2_7B, inner_nodes()
    batch = fine_tuning_batch(USERS)
    user = packed_batch(USERS)
    rows = batch.ids.shape
    alone = Read(rows[0] * rows[1], rows[0], rows[1], len(batch.labels), len(batch.labels))
    found: list[tuple[str, Cost, int, str]] = [
        (f"prompts, {USERS} x {PROMPT} tokens", counts.prompts(sizes, USERS, PROMPT), USERS, "users"),
        (f"beam step, {USERS} x {BEAMS}", counts.continued(sizes, USERS, BEAMS, PROMPT, LEVELS - 1), USERS, "users"),
        (f"beam step, 1 x {BEAMS}", counts.continued(sizes, 1, BEAMS, PROMPT, LEVELS - 1), 1, "users"),
        ("vocabulary of that of 64 users", counts.normaliser(sizes, USERS * BEAMS, sizes.vocabulary), USERS, "users"),
        (
            f"beam search, {USERS} users", counts.beam_search(sizes, USERS, PROMPT, BEAMS, LEVELS, sizes.vocabulary),
            USERS, "users",
        ),
        (
            "beam search, 1 user", counts.beam_search(sizes, 1, PROMPT, BEAMS, LEVELS, sizes.vocabulary), 1, "users",
        ),
        (
            f"full ranking, {ITEMS:,} items, a user",
            counts.full_ranking(sizes, PROMPT, nodes, 1024, LEVELS, sizes.vocabulary), 1, "users",
        ),
        (
            f"LoRA, {USERS} samples of {rows[1]} tokens, no sharing", counts.training(sizes, alone, RANK, CODED),
            USERS, "samples",
        ),
        ("the same, openings shared", counts.training(sizes, batch.read(), RANK, CODED), USERS, "samples"),
        (
            f"LoRA, {USERS} prefixes of a user, packed", counts.training(sizes, user.read(), RANK, CODED),
            USERS, "samples",
        ),
    ]  # fmt: skip
    lines = []
    for name, cost, number, of in found:
        least = cost.seconds(PEAK, BANDWIDTH)
        by = "FLOPs" if cost.flops / PEAK > cost.moved / BANDWIDTH else "bytes"
        lines.append([
            name, figure(cost.flops / 1e12), figure(cost.moved / 1e9), by, figure(1e3 * least),
            figure(1e3 * least / SHARE), f"{figure(number * SHARE / least)} {of}",
        ])  # fmt: skip
    heads = ["", "TFLOP", "GB", "bound by", "ms at the bound", f"ms at {SHARE:.0%}", f"a second at {SHARE:.0%}"]
    return markdown(heads, lines)


def shares() -> list[str]:
    """What parts of the work are, and where bytes and FLOPs change places."""
    large, small = LLAMA_2_7B, QWEN_2_5_1_5B
    batch = fine_tuning_batch(USERS).read()
    step = counts.training(large, batch, RANK, CODED)
    ranking = counts.full_ranking(small, PROMPT, inner_nodes(), 1024, LEVELS, small.vocabulary)
    sums = counts.normaliser(small, 1 + inner_nodes(), small.vocabulary)
    seen = counts.attention(large, USERS, PROMPT, PROMPT) * large.layers
    found = {
        "7B: attention of prompts": f"{seen.flops / counts.prompts(large, USERS, PROMPT).flops:.1%}",
        "7B: attention of a LoRA step, openings shared": (
            f"{batch.attention(large, counts.TO_INPUTS).flops * large.layers / step.flops:.1%}"
        ),
        "7B: LoRA's own matrices": f"{counts.lora(large, batch.tokens, RANK, batch.states).flops / step.flops:.1%}",
        "7B: users of 20 beams from which a step is bound by FLOPs": str(users_that_bind(large)),
        "1.5B: the same": str(users_that_bind(small)),
        "1.5B: vocabulary of a full ranking": f"{sums.flops / ranking.flops:.1%}",
        "1.5B: 4N FLOPs a token": f"{4 * small.weights / 1e9:.3f} GFLOP",
        "1.5B: a token of a LoRA step, as counted here": f"{lora_token(small).flops / 1e9:.3f} GFLOP",
    }
    return markdown(["", "on paper"], [[name, value] for name, value in found.items()])


def users_that_bind(sizes: Sizes) -> int:
    """From how many on a beam step is bound by FLOPs."""
    steps = ((users, counts.continued(sizes, users, BEAMS, PROMPT, LEVELS - 1)) for users in count(1))
    return next(users for users, cost in steps if cost.flops / PEAK > cost.moved / BANDWIDTH)


def lora_token(sizes: Sizes, tokens: int = 16_000) -> Cost:
    """A token of a step that many tokens are in, samples apart, an item's labels each."""
    samples = tokens // PROMPT
    labels = samples * LEVELS
    return counts.training(sizes, Read(tokens, samples, PROMPT, labels, labels), RANK, CODED) * (1 / tokens)


def memory() -> list[str]:
    """What of the GPU's 80 GB it takes, by ``recbole_llm.backbone.memory``."""
    sizes = LLAMA_2_7B
    config = LlamaConfig(
        vocab_size=sizes.vocabulary, hidden_size=sizes.width, intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers, num_attention_heads=sizes.heads,
    )  # fmt: skip
    read = fine_tuning_batch(USERS).read()
    weights = count_weights(config, "bfloat16").size + 2 * sizes.vocabulary * sizes.width
    found = {
        "weights and head, bfloat16": weights,
        f"keys and values of {USERS} prompts of {PROMPT} tokens and {LEVELS - 1} x {BEAMS} beams": cache_bytes(
            config, USERS, PROMPT + (LEVELS - 1) * BEAMS, "bfloat16"
        ),
        f"kept for the gradient, {USERS} samples with shared openings ({read.tokens:,.0f} tokens)": activation_bytes(
            config, 1, int(read.tokens), 0, "bfloat16"
        ),
    }
    return markdown(["", "GB"], [[name, figure(size / 1e9)] for name, size in found.items()])


def targets() -> list[str]:
    """What share of the peak the rates need that were asked for with a model of 1.5B."""
    sizes, nodes = QWEN_2_5_1_5B, inner_nodes()
    ranked = counts.full_ranking(sizes, PROMPT, nodes, 1024, LEVELS, sizes.vocabulary) * ML_1M_USERS
    search = counts.beam_search(sizes, USERS, PROMPT, BEAMS, LEVELS, sizes.vocabulary) * (1 / USERS)
    named = 4 * sizes.weights  # as the target counts: forward and backward to inputs
    rows = []
    for name, cost, wanted in (
        (f"ml-1m: {ML_1M_USERS:,} users, {ITEMS:,} items ranked, 10 minutes", ranked, 600.0),
        (f"beam search, {TARGET_USERS} users a second, a user", search, 1 / TARGET_USERS),
        (f"LoRA at {TARGET_SHARE:.0%} of 4N FLOPs a token, a token", lora_token(sizes), named / (TARGET_SHARE * PEAK)),
    ):
        least = cost.seconds(PEAK, BANDWIDTH)
        rows.append([
            name, figure(cost.flops / 1e12), _time(least), _time(least / SHARE), _time(wanted), f"{least / wanted:.0%}",
        ])  # fmt: skip
    heads = ["", "TFLOP", "at the bound", f"at {SHARE:.0%}", "asked for", "share that needs"]
    return markdown(heads, rows)


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{figure(seconds / size)} {unit}"
    return f"{seconds:.2g} s"


def main() -> None:
    made = parser(str(__doc__))
    add_page(made)
    options = made.parse_args()
    torch.manual_seed(0)
    show("before and after", before_and_after(), options.page)
    show("7B on paper", seven_billion(), options.page)
    show("7B memory", memory(), options.page)
    show("shares on paper", shares(), options.page)
    show("targets on paper", targets(), options.page)
    print(json.dumps({"name": "on_paper", "inner_nodes": inner_nodes(), "flops_a_byte": round(PEAK / BANDWIDTH)}))


if __name__ == "__main__":
    main()
