"""Beam search for one user who waits and for many who do not: each mode against the plain search, at 20 to 256 beams.

The model of ``exact_ranking.py``: a Qwen2 of 4 layers, 256 wide, in float32, with 4,096 tokens of which the last 1,024
are codes; 12,000 items of 4 codes each; probabilities over the vocabulary. Prompts open with 48 tokens that all have in
common and show histories of 2 to 20 items, so that they have 60 to 132 tokens. ``ratio`` is that of a live answer:
reference is the batch of 64 users that the user's batch-mates make, ours the user alone in kept memory. ``detail`` has,
by beams, the milliseconds a user of the plain search for one user and of the kept memory, the part of each that reading
the prompt takes, and the most bytes that tensors of a search had at a time; and for 256 users the seconds of fixed
batches in the users' own order, of batches of like length filled to as many tokens, and of these behind an opening that
is read once. Times are of processors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch
from _harness import measure_pairs, of_processors, parser, report, timed_parts
from beam_search import CODES, LEVELS, catalogue, language_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.one_user import OneUser
from recbole_llm.decoding.shared_cache import SharedPrompts

ITEMS, WORDS, OPENING, CLOSING, AT_ONCE = 12_000, 3_072, 48, 4, 64
BEAMS = (20, 50, 100, 256)


def storages(tree: Any) -> list[Any]:
    """Where tensors are; oneDNN's, with which the head multiplies, do not say."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if torch.is_tensor(leaf) and not leaf.is_mkldnn]


class Held(TorchDispatchMode):
    """Adds up the bytes of tensors made while it lasts, less those that are gone, and notes the most."""

    now, most = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {storage._cdata for storage in storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in storages(made):
            if storage._cdata not in known:
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.gone, storage.nbytes())
        return made

    def gone(self, size: int) -> None:
        """Take off what a tensor had."""
        self.now -= size


def prompts_of(users: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    opening = rng.integers(3, WORDS, OPENING).tolist()
    shown = np.clip(rng.geometric(0.12, users) + 1, 2, 20)
    return [opening + rng.integers(3, WORDS, LEVELS * int(items) + CLOSING).tolist() for items in shown]


def error_of(found: Sequence[Found], wanted: Sequence[Found]) -> tuple[bool, float]:
    """Whether the same items were found, but for those whose scores differ by rounding alone, and the largest error."""
    error = max((one.scores - other.scores).abs().max().item() for one, other in zip(found, wanted, strict=True))
    items = all(
        bool(((one.items == other.items) | ((one.scores - other.scores).abs() < 1e-5)).all())
        for one, other in zip(found, wanted, strict=True)
    )
    return items and error < 1e-4, error


def held(call: Callable[[], Any]) -> float:
    """The most MiB that tensors made by a call had at a time."""
    with Held() as noted:
        call()
    return noted.most / 2**20


def in_table(milliseconds: Sequence[float]) -> dict[str, float]:
    return {"median": round(median(milliseconds), 2), "p95": round(quantiles(milliseconds, n=20)[-1], 2)}


def one_user(search: BeamSearch, kept: BeamSearch, prompts: list[list[int]]) -> dict[str, Any]:
    """Milliseconds a user, one after the other, in turn with and without kept memory."""
    ways = {"plain": search, "kept": kept}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, list[Found]] = {name: [] for name in ways}
    for way in ways.values():
        way([prompts[0]])
    for number, prompt in enumerate(prompts):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            times[name].append(1e3 * of_processors(lambda n=name, p=prompt: found[n].append(ways[n]([p]))))
    parts: dict[str, dict[str, float]] = {}
    for name, way, owner, begin in (("plain", search, SharedPrompts, "__init__"), ("kept", kept, OneUser, "begin")):
        told: dict[str, float] = {}
        places = [
            (owner, begin, "prompt"), (owner, "step", "beams' tokens"), (Head, "log_sum_of_rest", "vocabulary"),
            (Head, "logits", "level's rows"),
        ]  # fmt: skip
        with timed_parts(places, told):
            for prompt in prompts:
                way([prompt])
        told["rest"] = told["all"] - sum(value for part, value in told.items() if part != "all")
        parts[name] = {part: round(1e3 * value / len(prompts), 2) for part, value in told.items()}
    same, error = error_of(found["kept"], found["plain"])
    longest = max(prompts, key=len)
    return {
        "milliseconds": {name: in_table(values) for name, values in times.items()},
        "ratio": round(median(t / k for t, k in zip(times["plain"], times["kept"])), 3),
        "by part": parts,
        "MiB of a search": {name: round(held(lambda w=way: w([longest])), 2) for name, way in ways.items()},
        "MiB kept between users": round(
            sum(one.untyped_storage().nbytes() for one in kept.one_user.buffers().values()) / 2**20, 2
        ),
        "equal": same, "max_error": error,
    }  # fmt: skip


def many_users(search: BeamSearch, opened: BeamSearch, prompts: list[list[int]], runs: int) -> dict[str, Any]:
    """Users a second: fixed batches in the users' order, batches of like length, and these behind an opening."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    table: dict[str, Any] = {}
    for at_once in (16, AT_ONCE):
        filled = batches_of(lengths, search.behind, budget_of(lengths, search.behind, at_once))
        ways = {
            "fixed": (search, list(torch.arange(len(prompts)).split(at_once))), "filled": (search, filled),
            "opened": (opened, filled),
        }  # fmt: skip
        found = {
            name: {int(row): one for part in parts for row, one in zip(part, rows(way, prompts, part), strict=True)}
            for name, (way, parts) in ways.items()
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(runs):
            for name in list(ways)[:: 1 if turn % 2 else -1]:
                way, parts = ways[name]
                times[name].append(of_processors(lambda w=way, p=parts: [rows(w, prompts, part) for part in p]))
        in_order = [[found[name][row] for row in range(len(prompts))] for name in ways]
        table[f"{at_once} at once"] = {
            "batches": {name: len(parts) for name, (_, parts) in ways.items()},
            "filling": {
                name: round(1 - int(lengths.sum()) / sum(len(p) * int(lengths[p].max()) for p in parts), 3)
                for name, (_, parts) in ways.items()
            },
            "users a second": {name: round(len(prompts) / median(values), 1) for name, values in times.items()},
            "ratio": {
                name: round(median(f / s for f, s in zip(times["fixed"], values)), 3) for name, values in times.items()
            },
            "MiB": {
                name: round(max(held(lambda w=way, p=p: rows(w, prompts, p)) for p in parts[:2]), 1)
                for name, (way, parts) in ways.items()
            },
            "equal": all(error_of(one, in_order[0])[0] for one in in_order[1:]),
        }  # fmt: skip
    return table


def rows(search: BeamSearch, prompts: list[list[int]], part: torch.Tensor) -> list[Found]:
    found = search([prompts[row] for row in part.tolist()])
    return [Found(items, scores, None) for items, scores in zip(found.items, found.scores, strict=True)]


def main() -> None:
    options = parser(str(__doc__)).parse_args()
    torch.set_num_threads(options.threads)
    quick = options.quick
    model, item_tokens = language_model(WORDS + LEVELS * CODES), catalogue(ITEMS)
    lm_ids, head = WORDS + torch.arange(LEVELS * CODES), Head.of(model)

    def search(beams: int) -> BeamSearch:
        return BeamSearch(decoder_of(model), head, item_tokens, beams=beams, lm_ids=lm_ids)

    def with_memory(beams: int) -> BeamSearch:
        made = search(beams)
        made.open_with(prompts[0][:OPENING])
        made.one_user = OneUser(made.decoder, made.opening, max(map(len, prompts)), made.steps)
        return made

    prompts = prompts_of(AT_ONCE if quick else 256)
    asked = prompts[: 6 if quick else 40]
    alone = {}
    for beams in (20, 50) if quick else BEAMS:
        alone[beams] = one_user(search(beams), with_memory(beams), asked)
        print(f"{beams} beams, one user: {alone[beams]}", flush=True)
    opened = search(20)
    opened.open_with(prompts[0][:OPENING])
    many = many_users(search(20), opened, prompts, 1 if quick else 3)
    print(f"{len(prompts)} users: {many}", flush=True)
    plain, kept = search(20), with_memory(20)
    kept([prompts[0]])
    turn = iter(prompts)
    ours, reference = measure_pairs(
        lambda: kept([next(turn)]), lambda: plain(prompts[:AT_ONCE]), 2 if quick else 5, warmup=0, seconds=of_processors
    )
    report(
        "search_modes", ours, reference,
        equal=all(one["equal"] for one in (*alone.values(), *many.values())),
        max_error=max(one["max_error"] for one in alone.values()),
        detail={
            "one user, by beams": alone, "many users, 20 beams": many, "items": ITEMS, "opening": OPENING,
            "prompts": sorted({len(prompt) for prompt in prompts}),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
