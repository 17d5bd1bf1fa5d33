"""How cost grows with the number of items, of users, with the length of histories and the size of the model.

Each table ends with the exponent of its columns: the slope of the logarithm of the cost over that of what grows, fitted
to all rows by least squares; 1 is linear. Searches are for 20 beams among 12,000 items by the level's rows. Training is
the passes forward and backward, without the optimizer. Items have 4 codes of 256, drawn unevenly; models are random
Llamas in float32 with a vocabulary of 32,000 and 1,024 codes, 4 layers and 256 wide where that does not grow.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import _counts as counts
import numpy as np
import torch
from _ceilings import seconds_of
from _counts import Cost, Sizes
from _harness import machine, parser
from _other_paths import evaluator
from _page import add_page, figure, machine_line, markdown, show
from _paths import LLAMA_WORDS, FineTuning, fine_tuning_batch, llama
from beam_search import BEAMS, CODES, LEVELS, catalogue

from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.trie import Trie
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer

SIZE = LLAMA_WORDS + LEVELS * CODES
ITEMS = 3_707  # ml-1m's, with the padding
OPENING = 60  # tokens of a prompt beside the history


def exponent(grows: Sequence[float], costs: Sequence[float]) -> float:
    """The slope on a log-log scale."""
    return float(np.polyfit(np.log(grows), np.log(costs), 1)[0])


def search_of(model: Any, items: ItemTokens, normaliser: str = "level") -> BeamSearch:
    """Among such items."""
    return BeamSearch(
        decoder_of(model), Head.of(model), items, beams=BEAMS,
        lm_ids=LLAMA_WORDS + torch.arange(LEVELS * CODES), normaliser=normaliser,
    )  # fmt: skip


def prompts_of(users: int, length: int) -> list[list[int]]:
    return torch.randint(3, LLAMA_WORDS, (users, length), generator=torch.Generator().manual_seed(0)).tolist()


def by_items(sizes: Sequence[int], budget: float, users: int) -> list[dict[str, float]]:
    """Of the catalogue: what is made of it, and what a search and labels take."""
    model, prompts, rows = llama(4, 256, SIZE), prompts_of(users, 16), []
    for items in sizes:
        made = catalogue(items)
        trie = Trie(made)
        draw = torch.Generator().manual_seed(0)
        tokens = made.padded(torch.randint(1, items + 1, (160,), generator=draw))[0]
        first, second = (trie.walk(tokens[:, :depth])[:, -1] for depth in (1, 2))
        search = search_of(model, made)
        tokenizer = CollaborativeTokenizer(made)
        logits = torch.randn(16, items + 1, generator=draw)
        targets = torch.randint(1, items + 1, (16,), generator=draw)
        rows.append({
            "items": items,
            "trie built, ms": 1e3 * seconds_of(lambda made=made: Trie(made), budget),
            "trie, bytes an item": trie.nbytes / items,
            "mask after 1 token, µs": 1e6 * seconds_of(lambda t=trie, n=first: t.mask(n, depth=1), budget),
            "after 2, µs": 1e6 * seconds_of(lambda t=trie, n=second: t.mask(n, depth=2), budget),
            "search, ms a user": 1e3 / users * seconds_of(lambda s=search: s(prompts), budget),
            "nodes of a full ranking": FullRanking(search, 1024).reads,
            "soft labels, ms a sample": 1e3 / 16 * seconds_of(lambda t=tokenizer, x=logits, y=targets: t(x, y), budget),
        })  # fmt: skip
    return rows


def by_users(sizes: Sequence[int], budget: float, _: int) -> list[dict[str, float]]:
    """Of the evaluation."""
    return [
        {"users": users, "evaluation, ms": 1e3 * seconds_of(evaluator(users, ITEMS).call, budget)} for users in sizes
    ]


def counted(sizes: Sizes, prompt: int, attends: bool = True) -> Cost:
    """Of a search for one user, by the level's rows."""
    found = counts.beam_search(sizes, 1, prompt, BEAMS, LEVELS, CODES)
    if attends:
        return found
    tokens = prompt + (LEVELS - 1) * BEAMS
    rows = 1 + (LEVELS - 1) * BEAMS
    return counts.decoder(sizes, tokens, Cost()) + counts.normaliser(sizes, rows, CODES)


def by_users_at_once(sizes: Sequence[int], budget: float, _: int) -> list[dict[str, float]]:
    """Of a search: what a user costs beside others."""
    search = search_of(llama(4, 256, SIZE), catalogue(12_000))
    rows = []
    for users in sizes:
        taken = seconds_of(partial(search, prompts_of(users, 128)), budget)
        rows.append({"users at once": users, "search, ms a user": 1e3 / users * taken})
    return rows


def by_history(sizes: Sequence[int], budget: float, users: int) -> list[dict[str, float]]:
    """Items shown of a history, 4 tokens each."""
    model, rows = llama(4, 256, SIZE), []
    search = search_of(model, catalogue(12_000))
    for shown in sizes:
        length = OPENING + LEVELS * shown
        prompts = prompts_of(users, length)
        step = FineTuning(llama(4, 256), fine_tuning_batch(users, shown))
        rows.append({
            "tokens of a prompt": length, "items shown": shown,
            "search, GFLOP a user": counted(step.sizes, length).flops / 1e9,
            "of it attention, %": 100 * (1 - counted(step.sizes, length, attends=False).flops
                                         / counted(step.sizes, length).flops),
            "search, ms a user": 1e3 / users * seconds_of(lambda p=prompts: search(p), budget),
            "training, ms a sample": 1e3 / users * seconds_of(lambda s=step: s.loss().backward(), budget),
        })  # fmt: skip
    return rows


def by_model(shapes: Sequence[tuple[int, int]], budget: float, users: int) -> list[dict[str, float]]:
    """Layers and width."""
    rows, prompts, items = [], prompts_of(users, 128), catalogue(12_000)
    for layers, width in shapes:
        model = llama(layers, width, SIZE)
        step = FineTuning(llama(layers, width), fine_tuning_batch(users))
        level, vocabulary = (search_of(model, items, kind) for kind in ("level", "vocabulary"))
        rows.append({
            "weights of the layers": step.sizes.weights, "layers": layers, "width": width,
            "search, GFLOP a user": counted(step.sizes, 128).flops / 1e9,
            "search, ms a user": 1e3 / users * seconds_of(lambda s=level: s(prompts), budget),
            "by vocabulary": 1e3 / users * seconds_of(lambda s=vocabulary: s(prompts), budget),
            "training, ms a sample": 1e3 / users * seconds_of(lambda s=step: s.loss().backward(), budget),
        })  # fmt: skip
    return rows


def lines(rows: list[dict[str, float]], plain: Sequence[str] = ()) -> tuple[list[str], dict[str, float]]:
    """A table with the exponents below it, and these.

    Args:
        rows: of which the first column is what grows.
        plain: further columns that are no cost.
    """
    heads = list(rows[0])
    grows = [row[heads[0]] for row in rows]
    slopes = {
        name: exponent(grows, [row[name] for row in rows]) for name in heads[1:] if name not in plain and len(rows) > 1
    }
    body = [[f"{row[heads[0]]:,}", *(figure(row[name]) for name in heads[1:])] for row in rows]
    body.append(
        [
            "exponent",
            *(f"{slopes[name] + 0.0:.2f}".replace("-0.00", "0.00") if name in slopes else "" for name in heads[1:]),
        ]
    )
    return markdown(heads, body), slopes


class Growth(NamedTuple):
    """A table.

    Attributes:
        measure: makes its rows, of what grows, of seconds for each figure, and of users or samples at once.
        sizes: of what grows.
        small: the same for a quick run.
        plain: columns beside the first that are no cost.
    """

    measure: Callable[[Any, float, int], list[dict[str, float]]]
    sizes: list[Any]
    small: list[Any]
    plain: tuple[str, ...] = ()


TABLES = {
    "items": Growth(by_items, [1_000, 10_000, 100_000, 1_000_000], [1_000, 4_000]),
    "users": Growth(by_users, [1_000, 2_000, 4_000, 8_000, 16_000], [250, 500]),
    "users at once": Growth(by_users_at_once, [1, 2, 4, 8, 16, 32], [1, 2]),
    "history": Growth(by_history, [5, 10, 20, 50, 100], [5, 20], ("items shown", "of it attention, %")),
    "width": Growth(by_model, [(4, 128), (4, 256), (4, 512), (4, 1024)], [(2, 64), (2, 128)], ("layers", "width")),
    "layers": Growth(by_model, [(2, 256), (4, 256), (8, 256), (16, 256)], [(1, 64), (2, 64)], ("layers", "width")),
}


def main() -> None:
    made = parser(str(__doc__))
    made.set_defaults(threads=1)
    add_page(made)
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    # What is loaded stays: collecting garbage before each timing need not look at it.
    gc.freeze()
    show("machine of growth", [machine_line()], options.page)
    found: dict[str, Any] = {"name": "scaling"}
    for name, table in TABLES.items():
        rows = table.measure(*((table.small, 0.02, 2) if options.quick else (table.sizes, 1.0, 8)))
        text, slopes = lines(rows, table.plain)
        show(f"growth with {name}", text, options.page)
        found[name] = {"rows": rows, "exponents": slopes}
    print(json.dumps({**found, "machine": machine()}))


if __name__ == "__main__":
    main()
