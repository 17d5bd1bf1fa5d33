"""Beam search for items, 20 beams a user: ours against ``transformers`` ``generate`` with a prefix function.

A Qwen2 of 4 layers, 256 wide, in float32, with 152,960 tokens of which the last 1,024 are codes; 12,000 items of 4
codes each; prompts of 128 tokens. Reference: ``generate`` with SDPA attention, a cache, as many users at once as it
does best with, and a prefix function that looks up a ready tensor in one dictionary. ``ratio`` is that of the
vocabulary normaliser in float32; ``detail`` has that of a bfloat16 normaliser and of the level's rows only, what leaks
there, and where the time goes. The two whose scores are over the vocabulary must find what ``generate`` finds; the
level's are compared with ``generate`` under a processor that does the same to its logits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import once, parser, ratios_of, report, timed_parts
from torch.nn import functional
from transformers import LogitsProcessor, Qwen2Config, Qwen2ForCausalLM

from recbole_llm.decoding import beam_search as module
from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.shared_cache import SharedPrompts
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.trie import Trie

LEVELS, CODES, BEAMS, PROMPT, ITEMS = 4, 256, 20, 128, 12_000
WORDS = 151_936  # Qwen's
SIZE = WORDS + LEVELS * CODES
LAYERS, WIDTH, INNER, HEADS, KEY_HEADS = 4, 256, 1024, 4, 2
HISTORY = 50
GAP = 1e-3  # scores nearer than that may change places


def language_model(size: int = SIZE) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


def catalogue(items: int = ITEMS) -> ItemTokens:
    """Items of skewed codes, as clusters of items are."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(CODES, 0.5), LEVELS)
    codes = np.stack([rng.choice(CODES, items + 1, p=row) for row in weights], axis=1)
    codes[0] = -1
    return ItemTokens.from_codes(codes, [CODES] * LEVELS)


class OfLevel(LogitsProcessor):
    """Makes log-probabilities relative to the tokens of the level, then does what the prefix function does."""

    def __init__(self, prefix: Callable[[int, torch.Tensor], torch.Tensor]) -> None:
        self.prefix = prefix

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        low = WORDS + (input_ids.shape[1] - PROMPT) * CODES
        made = torch.full_like(scores, -torch.inf)
        made[:, low : low + CODES] = scores[:, low : low + CODES].log_softmax(1)
        mask = torch.full_like(scores, -torch.inf)
        for row, sentence in enumerate(input_ids):
            mask[row, self.prefix(0, sentence)] = 0
        return made + mask


class Reference:
    """What people write around ``generate``."""

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        self.model, self.item_tokens = model, item_tokens
        legal: dict[tuple[int, ...], set[int]] = {}
        for row in (item_tokens.tokens.view(-1, LEVELS) + WORDS).tolist():
            for depth, token in enumerate(row):
                legal.setdefault(tuple(row[:depth]), set()).add(token)
        self.legal = {prefix: torch.tensor(sorted(tokens)) for prefix, tokens in legal.items()}

    def allowed(self, _: int, sentence: torch.Tensor) -> torch.Tensor:
        return self.legal[tuple(sentence[PROMPT:].tolist())]

    @torch.no_grad()
    def run(self, prompts: torch.Tensor, by_level: bool = False) -> Any:
        how: dict[str, Any] = (
            {"logits_processor": [OfLevel(self.allowed)]} if by_level else {"prefix_allowed_tokens_fn": self.allowed}
        )
        return self.model.generate(
            input_ids=prompts, attention_mask=torch.ones_like(prompts), num_beams=BEAMS, num_return_sequences=BEAMS,
            do_sample=False, max_new_tokens=LEVELS, length_penalty=0.0, use_cache=True, return_dict_in_generate=True,
            output_scores=False, **how,
        )  # fmt: skip

    def found(self, prompts: torch.Tensor, by_level: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that it finds, [B, BEAMS, LEVELS], and their scores, added up anew: it returns none."""
        tokens = self.run(prompts, by_level).sequences[:, PROMPT:].view(len(prompts), BEAMS, LEVELS)
        scores = torch.zeros(len(prompts), BEAMS)
        for user, prompt in enumerate(prompts):
            texts = torch.cat((prompt.expand(BEAMS, -1), tokens[user]), dim=1)
            with torch.no_grad():
                states = decoder_of(self.model)(input_ids=texts).last_hidden_state[:, PROMPT - 1 : -1]
                for level in range(LEVELS):
                    logits = states[:, level] @ self.model.lm_head.weight.T
                    low = WORDS + level * CODES
                    base = logits[:, low : low + CODES] if by_level else logits
                    scores[user] += logits.gather(1, tokens[user, :, level : level + 1])[:, 0] - base.logsumexp(1)
        return tokens - WORDS, scores


def compare(item_tokens: ItemTokens, found: Found, tokens: torch.Tensor, scores: torch.Tensor) -> tuple[bool, float]:
    """Whether the same items come in the same order wherever scores differ by more than the gap, and by how much."""
    error = (found.scores - scores).abs().max().item()
    own = item_tokens.padded(found.items.flatten(), LEVELS)[0].view_as(tokens)
    same = error <= GAP
    for user in range(len(tokens)):
        # Items of equal tokens come out one by one, and generate's beams are sequences.
        theirs = {tuple(row): score for row, score in zip(tokens[user].tolist(), scores[user].tolist())}
        ours = [tuple(row) for row in own[user].tolist()]
        last = scores[user].min().item()
        same &= all(row in ours for row, score in theirs.items() if score > last + GAP)
        told = [theirs[row] for row in ours if row in theirs]
        same &= all(later <= earlier + GAP for earlier, later in pairwise(told))
    return bool(same), error


PARTS: list[tuple[Any, str, str]] = [
    (SharedPrompts, "__init__", "prompts"), (SharedPrompts, "step", "beams' tokens"),
    (Head, "log_sum_of_rest", "vocabulary"), (Head, "logits", "level's rows"),
    (Trie, "legal_padded", "constraint"), (Exclusion, "left", "constraint"), (Trie, "is_leaf", "constraint"),
    (module, "best", "choice"),
]  # fmt: skip


def parts_of(call: Callable[[], Any], runs: int) -> dict[str, float]:
    """Milliseconds of processors by part, of the fastest of some runs."""
    tables: list[dict[str, float]] = []
    for _ in range(runs):
        seconds: dict[str, float] = {}
        with timed_parts(PARTS, seconds):
            call()
        tables.append(seconds)
    found = {part: 1e3 * value for part, value in min(tables, key=lambda table: table["all"]).items()}
    found["rest"] = found["all"] - sum(value for part, value in found.items() if part != "all")
    return {part: round(value, 2) for part, value in found.items()}


def flops() -> dict[str, float]:
    """GFLOP a user, of multiplications by weights."""
    layer = WIDTH * WIDTH * 2 + WIDTH * WIDTH * 2 * KEY_HEADS // HEADS + 3 * WIDTH * INNER
    token, rows = 2e-9 * LAYERS * layer, 1 + (LEVELS - 1) * BEAMS
    return {
        "prompt": round(PROMPT * token, 3), "beams' tokens": round((rows - 1) * token, 3),
        "vocabulary": round(2e-9 * rows * SIZE * WIDTH, 3),
        "reference's prompts": round(BEAMS * PROMPT * token, 3),
        "reference's vocabulary": round(2e-9 * LEVELS * BEAMS * SIZE * WIDTH, 3),
    }  # fmt: skip


def rates(users: int) -> dict[str, float]:
    """GFLOP/s of torch's own multiplication, at the decoder's and the head's shapes."""
    found = {}
    for name, rows, columns, dtype in (
        ("decoder", users * PROMPT, INNER, torch.float32), ("vocabulary", users * BEAMS, 2048, torch.float32),
        ("vocabulary in bfloat16", users * BEAMS, 2048, torch.bfloat16),
    ):  # fmt: skip
        left, right = torch.randn(rows, WIDTH).to(dtype), torch.randn(columns, WIDTH).to(dtype)
        fastest = min(once(lambda a=left, b=right: [functional.linear(a, b) for _ in range(10)]) for _ in range(5))
        found[name] = round(2e-9 * 10 * rows * columns * WIDTH / fastest, 1)
    return found


def ways_to_share(users: int) -> dict[str, float]:
    """Milliseconds that attention takes for a layer's third step: prompts shared under a mask, or expanded to beams."""
    size, own = WIDTH // HEADS, (LEVELS - 1) * BEAMS
    prompt = torch.randn(2, users, HEADS, PROMPT, size)
    asked = torch.randn(users, HEADS, BEAMS, size)
    beams = torch.randn(2, users, HEADS, own, size)
    mask = torch.zeros(users, 1, BEAMS, PROMPT + own)
    tree = torch.cat((prompt, beams), dim=3)
    rows = prompt.repeat_interleave(BEAMS, dim=1)
    each = torch.randn(2, users * BEAMS, HEADS, LEVELS - 1, size)
    parents = torch.randperm(users * BEAMS)
    attend = functional.scaled_dot_product_attention

    def expanded() -> None:
        keys, values = torch.cat((rows, each), dim=3)
        attend(asked.transpose(1, 2).reshape(-1, HEADS, 1, size), keys, values)

    def viewed() -> None:
        shared = prompt.unsqueeze(2).expand(-1, -1, BEAMS, -1, -1, -1)
        keys, values = torch.cat((shared, each.view(2, users, BEAMS, *each.shape[2:])), dim=4).flatten(1, 2)
        attend(asked.transpose(1, 2).reshape(-1, HEADS, 1, size), keys, values)

    calls: dict[str, Callable[[], Any]] = {
        "one sequence under a mask": lambda: attend(asked, tree[0], tree[1], attn_mask=mask),
        "expanded by view": viewed,
        "expanded": expanded,
        "expanded and gathered by parent": lambda: (rows[:, parents], expanded()),
    }
    for call in calls.values():
        call()
    return {name: round(1e3 * min(once(call) for _ in range(5)), 3) for name, call in calls.items()}


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of the clock and of the processors that a call takes."""
    of_processors: list[float] = []

    def run() -> None:
        start = time.process_time()
        call()
        of_processors.append(time.process_time() - start)

    return once(run), of_processors[0]


def best_batch(
    run: Callable[[torch.Tensor], Any], prompts: torch.Tensor, sizes: list[int]
) -> tuple[int, dict[str, float]]:
    """The number of users at once that takes least time a user, and the milliseconds of each."""
    if len(sizes) == 1:
        return sizes[0], {}
    run(prompts[: sizes[0]])
    times = {size: 1e3 * min(once(lambda n=size: run(prompts[:n])) for _ in range(2)) / size for size in sizes}
    return min(times, key=times.__getitem__), {str(size): round(value, 1) for size, value in times.items()}


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    quick = arguments.quick
    model, item_tokens = language_model(), catalogue()
    lm_ids = WORDS + torch.arange(item_tokens.size)
    decoder = decoder_of(model)
    exact = Head.of(model)
    ways: dict[str, BeamSearch] = {
        "vocabulary": BeamSearch(decoder, exact, item_tokens, beams=BEAMS, lm_ids=lm_ids),
        "bfloat16": BeamSearch(decoder, Head.of(model, torch.bfloat16), item_tokens, beams=BEAMS, lm_ids=lm_ids),
        "level": BeamSearch(decoder, exact, item_tokens, beams=BEAMS, lm_ids=lm_ids, normaliser="level"),
    }  # fmt: skip
    reference = Reference(model, item_tokens)
    sizes = [2] if quick else [1, 2, 4, 8]
    most = 2 if quick else 16
    prompts = torch.randint(3, WORDS, (most, PROMPT), generator=torch.Generator().manual_seed(0))
    lists = prompts.tolist()

    checked = 1 if quick else 4
    tokens, scores = reference.found(prompts[:checked])
    checks = {
        name: compare(item_tokens, ways[name](lists[:checked]), tokens, scores) for name in ("vocabulary", "bfloat16")
    }
    checks["level"] = compare(item_tokens, ways["level"](lists[:checked]), *reference.found(prompts[:checked], True))
    leaked = ways["level"](lists[:checked], leaked=True).leaked

    users, table = best_batch(reference.run, prompts, sizes)
    ours_users, ours_table = best_batch(
        lambda rows: ways["vocabulary"](rows.tolist()), prompts, [2] if quick else [*sizes, most]
    )
    print(f"users at once and milliseconds a user: generate {table}, ours {ours_table}")
    times: dict[str, list[float]] = {name: [] for name in ("reference", *ways)}
    processors: dict[str, list[float]] = {name: [] for name in times}
    for turn in range(-1, 3 if quick else 7):
        for name in list(times) if turn % 2 else list(times)[::-1]:
            count = users if name == "reference" else ours_users
            seconds, of_processors = timed(
                lambda n=name: reference.run(prompts[:users]) if n == "reference" else ways[n](lists[:ours_users])
            )
            if turn >= 0:
                times[name].append(seconds / count)
                processors[name].append(of_processors / count)
    ratios = {name: ratios_of(times[name], times["reference"]) for name in ways}
    processor_ratios = {name: ratios_of(processors[name], processors["reference"]) for name in ways}

    parts = {name: parts_of(lambda n=name: ways[n](lists[:ours_users]), 3 if quick else 7) for name in ways}
    rng = np.random.default_rng(1)
    histories = torch.from_numpy(rng.integers(1, ITEMS + 1, (ours_users, HISTORY)))
    search = ways["vocabulary"]
    excluding = parts_of(
        lambda: search(lists[:ours_users], exclude=Exclusion(search.trie, histories)), 3 if quick else 7
    )
    parts["vocabulary, histories excluded"] = excluding
    columns = ["prompts", "beams' tokens", "vocabulary", "level's rows", "constraint", "choice", "rest", "all"]
    print("milliseconds of processors by part\n" + " " * 32 + "".join(f"{column:>15}" for column in columns))
    for name, row in parts.items():
        print(f"{name:<32}" + "".join(f"{row.get(column, 0.0):>15.2f}" for column in columns))
    # Of a step: what comes after the prompts have been read.
    shares = {name: round(row["constraint"] / (row["all"] - row["prompts"]), 5) for name, row in parts.items()}
    for name in ways:
        print(f"{name:<12}{median(ratios[name]):>8.1f}x, of processors' time {median(processor_ratios[name]):.1f}x")
    report(
        "beam_search", times["vocabulary"], times["reference"],
        equal=all(same for same, _ in checks.values()), max_error=max(error for _, error in checks.values()),
        detail={
            "ratio_by_normaliser": {name: round(median(found), 2) for name, found in ratios.items()},
            "processor_ratio_by_normaliser": {
                name: round(median(found), 2) for name, found in processor_ratios.items()
            },
            "ratios_by_normaliser": {name: [round(ratio, 2) for ratio in found] for name, found in ratios.items()},
            "equal_by_normaliser": {name: same for name, (same, _) in checks.items()},
            "max_error_by_normaliser": {name: error for name, (_, error) in checks.items()},
            "level_leaked_mass": round(float(leaked.mean()), 4),
            "milliseconds_a_user": {name: round(1e3 * median(found), 2) for name, found in times.items()},
            "users_at_once": {"reference": users, "ours": ours_users},
            "milliseconds_a_user_by_users_at_once": {"reference": table, "ours": ours_table},
            "processor_milliseconds_by_part": parts, "constraint_share_of_a_step": shares,
            "gflop_a_user": flops(), "gflops_of_torch": rates(ours_users),
            "attention_milliseconds": ways_to_share(ours_users),
            "items": ITEMS, "beams": BEAMS, "prompt": PROMPT, "vocabulary": SIZE,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
