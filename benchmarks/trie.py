"""The trie of 100,000 items: building it, what it takes, and masks of legal tokens for 160 rows (8 users x 20 beams).

The reference is the nested dictionaries that people write for transformers' ``prefix_allowed_tokens_fn``, built from
Python lists of tokens, ours from :class:`ItemTokens`; ``ratio`` is that of building 4 levels of codes.

A mask is measured after every number of tokens. ``processor`` is transformers' own ``PrefixConstrainedLogitsProcessor``
with a function that walks the dictionaries from the root, over a language model's vocabulary; ``token by token`` and
``row by row`` are plain loops that walk likewise and fill a mask over the codes' 1,024 tokens, the latter with one
assignment a row into a NumPy array, the fastest loop that we know. Ours, ``mask``, is over the codes' tokens too, from
nodes that a search carries along; in ``with step`` it first goes down from the nodes before, and ``on logits`` sets a
language model's whole logits in place, as the processor does, and so writes as many numbers as that.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import of_processors, once, parser, report

from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.trie import Trie

LEVELS, CODES = 4, 256
USERS, BEAMS, PROMPT = 8, 20, 160
LM_SIZE = 32_000  # Llama's, to which the codes' tokens are added
END = 2


def random_codes(items: int) -> np.ndarray:
    codes = np.random.default_rng(0).integers(0, CODES, (items + 1, LEVELS))
    codes[0] = -1
    return codes


def random_titles(items: int) -> list[list[int]]:
    """Of 2 to 20 tokens, some common and many rare; one in three begins as another does, as series do."""
    rng = np.random.default_rng(0)
    words = 3 + (rng.zipf(1.4, size=(items, 20)) % 20_000)
    series = rng.integers(0, items, items)
    shared = np.where(rng.random(items) < 1 / 3, rng.integers(1, 6, items), 0)
    column = np.arange(20)
    words = np.where(column < shared[:, None], words[series], words)
    lengths = np.maximum(rng.integers(2, 21, items), shared + 1)
    return [[], *(row[:length] for row, length in zip(words.tolist(), lengths.tolist()))]


def dictionary_trie(sequences: list[list[int]]) -> dict[int, Any]:
    root: dict[int, Any] = {}
    for sequence in sequences:
        node = root
        for token in sequence:
            child = node.get(token)
            if child is None:
                child = node[token] = {}
            node = child
    return root


def edges_of(root: dict[int, Any]) -> int:
    stack, count = [root], 0
    while stack:
        children = stack.pop().values()
        count += len(children)
        stack.extend(children)
    return count


def same_trie(trie: Trie, root: dict[int, Any]) -> bool:
    """Whether every node's tokens are those of the dictionaries."""
    nodes, children = [root], []
    for _ in range(len(trie.level_bounds) - 1):
        for node in nodes:
            children += sorted(node)
        nodes = [node[token] for node in nodes for token in sorted(node)]
    return torch.equal(torch.tensor(children), trie.tokens[1:])


def walk(root: dict[int, Any], tokens: list[int]) -> dict[int, Any]:
    for token in tokens:
        root = root[token]
    return root


def build_pairs(ours: Callable[[], Any], reference: Callable[[], Any], pairs: int) -> tuple[list[float], list[float]]:
    """As ``measure_pairs``, but what was built is thrown away outside the time: dictionaries take long to."""
    held: list[Any] = []
    times: tuple[list[float], list[float]] = ([], [])
    for pair in range(-1, pairs):
        for side in (0, 1) if pair % 2 else (1, 0):
            seconds = of_processors(lambda call=(ours, reference)[side]: held.append(call()))
            held.clear()
            if pair >= 0:
                times[side].append(seconds)
    return times


def building(items: int, titled_items: int, pairs: int) -> tuple[list[float], list[float], bool, dict[str, Any]]:
    codes, titles = random_codes(items), random_titles(titled_items)
    item_tokens = ItemTokens.from_codes(codes, [CODES] * LEVELS)
    rows = item_tokens.tokens.view(-1, LEVELS).tolist()
    ended = [[*title, END] for title in titles if title]
    titled = ItemTokens.from_sequences(titles, END)
    equal = same_trie(Trie(item_tokens), dictionary_trie(rows))
    equal &= len(Trie(titled)) - 1 == edges_of(dictionary_trie(ended))
    ours, reference = build_pairs(lambda: Trie(item_tokens), lambda: dictionary_trie(rows), pairs)
    title_times = build_pairs(lambda: Trie(titled), lambda: dictionary_trie(ended), 3)
    whole = build_pairs(lambda: Trie(ItemTokens.from_sequences(titles, END)), lambda: dictionary_trie(ended), 3)
    detail = {
        "from_codes_seconds": round(min(once(lambda: ItemTokens.from_codes(codes, [CODES] * LEVELS)) for _ in "12"), 4),
        "titles": titled_items,
        "titles_ratio": round(median(title_times[1]) / median(title_times[0]), 2),
        "titles_seconds": round(median(title_times[0]), 4),
        "titles_from_lists_ratio": round(median(whole[1]) / median(whole[0]), 2),
    }
    return ours, reference, equal, detail


def memory(sizes: list[int], dictionaries_up_to: int) -> list[dict[str, Any]]:
    """Bytes an item: kept, at most while building, and of the dictionaries."""
    table = []
    for items in sizes:
        item_tokens = ItemTokens.from_codes(random_codes(items), [CODES] * LEVELS)
        gc.collect()
        tracemalloc.start()
        trie = Trie(item_tokens)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row = {
            "items": items, "nodes": len(trie), "bytes_an_item": round(trie.nbytes / items, 1),
            "bytes_a_node": round(trie.nbytes / len(trie), 1), "peak_bytes_an_item": round(peak / items, 1),
            "seconds": round(min(once(lambda made=item_tokens: Trie(made)) for _ in range(2)), 4),
        }  # fmt: skip
        if items <= dictionaries_up_to:
            rows = item_tokens.tokens.view(-1, LEVELS).tolist()
            gc.collect()
            tracemalloc.start()
            kept = dictionary_trie(rows)
            row["dictionary_bytes_an_item"] = round(tracemalloc.get_traced_memory()[0] / items, 1)
            tracemalloc.stop()
            del kept
        table.append(row)
    return table


def per_call(call: Callable[[], Any], seconds: float) -> float:
    """Median seconds of a call, over as many as fit."""
    call()
    first = once(call)
    inner = max(1, min(200, int(0.02 / max(first, 1e-7))))

    def several() -> None:
        for _ in range(inner):
            call()

    rounds = max(3, min(30, int(seconds / max(first * inner, 1e-4))))
    return median(once(several) / inner for _ in range(rounds))


def masks(items: int, seconds: float) -> tuple[list[dict[str, Any]], bool]:
    from transformers import PrefixConstrainedLogitsProcessor

    item_tokens = ItemTokens.from_codes(random_codes(items), [CODES] * LEVELS)
    trie = Trie(item_tokens)
    # The codes' tokens follow the language model's own ones, in its dictionaries too.
    lm_ids = LM_SIZE + torch.arange(trie.size)
    own_root = dictionary_trie(item_tokens.tokens.view(-1, LEVELS).tolist())
    lm_root = dictionary_trie(lm_ids[item_tokens.tokens].view(-1, LEVELS).tolist())
    rng = np.random.default_rng(1)
    rows = USERS * BEAMS
    chosen = item_tokens.padded(torch.from_numpy(rng.integers(1, items + 1, rows)))[0]
    prompts = torch.from_numpy(rng.integers(3, LM_SIZE, (rows, PROMPT)))
    logits = torch.randn(rows, LM_SIZE + trie.size)
    processor = PrefixConstrainedLogitsProcessor(
        lambda _, sentence: list(walk(lm_root, sentence[PROMPT:].tolist())), BEAMS
    )

    def token_by_token(prefixes: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(rows, trie.size, dtype=torch.bool)
        for row, prefix in enumerate(prefixes.tolist()):
            for token in walk(own_root, prefix):
                mask[row, token] = True
        return mask

    def row_by_row(prefixes: torch.Tensor) -> torch.Tensor:
        mask = np.zeros((rows, trie.size), dtype=bool)
        for row, prefix in enumerate(prefixes.tolist()):
            mask[row, list(walk(own_root, prefix))] = True
        return torch.from_numpy(mask)

    # The dictionaries are here to stay: collecting garbage before each timing need not look at them.
    gc.freeze()
    table, equal = [], True
    for depth in range(LEVELS):
        prefixes = chosen[:, :depth].contiguous()
        nodes = trie.walk(prefixes)[:, -1]
        sentences = torch.cat((prompts, lm_ids[prefixes]), dim=1)
        buffer = logits.clone()
        mask = trie.mask(nodes, depth=depth)
        processed = processor(sentences, logits)
        equal &= torch.equal(token_by_token(prefixes), mask) and torch.equal(row_by_row(prefixes), mask)
        equal &= torch.equal(trie.mask(nodes, lm_ids=lm_ids, size=logits.size(1))[:, LM_SIZE:], mask)
        equal &= torch.equal(processed[:, LM_SIZE:].isfinite(), mask) and not processed[:, :LM_SIZE].isfinite().any()
        equal &= torch.equal(processed, trie.mask_logits_(logits.clone(), nodes, lm_ids=lm_ids, depth=depth))
        calls: dict[str, Callable[[], Any]] = {
            "mask": lambda n=nodes, d=depth: trie.mask(n, depth=d),
            "on logits": lambda n=nodes, d=depth, b=buffer: trie.mask_logits_(b, n, lm_ids=lm_ids, depth=d),
            "processor": lambda s=sentences: processor(s, logits),
            "token by token": lambda p=prefixes: token_by_token(p),
            "row by row": lambda p=prefixes: row_by_row(p),
        }
        if depth:
            before, last = trie.walk(prefixes)[:, -2], prefixes[:, -1].contiguous()
            calls["with step"] = lambda n=before, t=last, d=depth: trie.mask(trie.step(n, t), depth=d)
        micro = {name: round(1e6 * per_call(call, seconds), 1) for name, call in calls.items()}
        table.append({"tokens_before": depth, "legal_a_row": round(mask.sum().item() / rows, 1), "microseconds": micro})
    return table, equal


def show(table: list[dict[str, Any]]) -> None:
    names = ["mask", "with step", "on logits", "row by row", "token by token", "processor"]
    print("microseconds for 160 rows\n" + f"{'tokens':>8}{'legal':>8}" + "".join(f"{name:>16}" for name in names))
    for row in table:
        cells = "".join(f"{row['microseconds'].get(name, '-'):>16}" for name in names)
        print(f"{row['tokens_before']:>8}{row['legal_a_row']:>8}{cells}")


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    items = 30_000 if quick else 100_000
    # Memory first: once a process has given large arrays back, as one that trains has, its allocator keeps what follows
    # instead of asking the system for every array's pages anew, which would be half of our time.
    sizes = memory([10_000, 100_000] if quick else [10_000, 100_000, 1_000_000], 10_000 if quick else 1_000_000)
    ours, reference, equal, detail = building(items, 10_000 if quick else items, 3 if quick else 9)
    print("\n".join(f"{row}" for row in sizes))
    table, masks_equal = masks(items, 0.2 if quick else 2.0)
    show(table)
    widest = table[1]["microseconds"]
    loops = ("row by row", "token by token", "processor")
    steps = {name: sum(row["microseconds"].get(name, 0) for row in table) for name in ("mask", *loops)}
    report(
        "trie", ours, reference, equal=equal and masks_equal, max_error=0.0,
        detail={
            "items": items, **detail, "memory": sizes, "masks": table,
            "mask_ratio_after_one_token": {name: round(widest[name] / widest["mask"], 1) for name in loops},
            "mask_ratio_over_all_tokens": {name: round(steps[name] / steps["mask"], 1) for name in loops},
            "on_logits_ratio_after_one_token": round(widest["processor"] / widest["on logits"], 1),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
