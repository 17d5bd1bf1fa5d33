"""What tests of searches share: tiny language models, items' tokens, and every item's score from plain readings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from tiny_folders import KINDS, WINDOW
from transformers import AutoModelForCausalLM

from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens

LM_SIZE = 97
SIZES = (4, 3, 5)
END = 2
NORMALISERS = ("vocabulary", "level", "legal")
# One prompt is longer than the windows of those models that have one, and it is not the longest's neighbour.
PROMPTS = [[5, 9, 3], list(range(3, 3 + WINDOW + 5)), [7], [11, 12, 13, 14, 15, 16, 17]]


def language_model(kind: str, size: int = LM_SIZE + sum(SIZES)) -> Any:
    ids = {"bos_token_id": None, "eos_token_id": END, "pad_token_id": None}
    config = KINDS[kind].config(vocab_size=size, tie_word_embeddings=KINDS[kind].tied, **ids)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def random_codes(items: int, seed: int = 0, distinct: bool = True) -> ItemTokens:
    rng = np.random.default_rng(seed)
    every = np.stack(np.meshgrid(*(np.arange(size) for size in SIZES), indexing="ij"), axis=-1).reshape(-1, len(SIZES))
    chosen = every[rng.permutation(len(every))[:items] if distinct else rng.integers(0, len(every), items)]
    return ItemTokens.from_codes(np.concatenate((np.full((1, len(SIZES)), -1), chosen)), SIZES)


TITLES = ItemTokens.from_sequences(
    [[], [5], [5, 6], [5, 6, 7, 8], [9], [5, 7], [9, 10, 11], [5, 6, 7], [12], [9, 10], [5, 6]], END
)
# The codes' rows do not lie in the order of the codes, so that a map that is not read shows.
CODE_IDS = LM_SIZE + torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(0))


def searcher(model: Any, item_tokens: ItemTokens, dtype: torch.dtype | None = None, **options: Any) -> BeamSearch:
    lm_ids = CODE_IDS if item_tokens.kind == "codes" else None
    return BeamSearch(decoder_of(model), Head.of(model, dtype), item_tokens, lm_ids=lm_ids, **options)


def rivals(item_tokens: ItemTokens, begun: list[int], normaliser: str, words: int) -> list[int]:
    """The language model's ids that a token's probability is relative to, behind what an item has begun with.

    Args:
        item_tokens: of all items.
        begun: an item's first tokens.
        normaliser: ``vocabulary``, ``level`` or ``legal``.
        words: of the language model.
    """
    if normaliser == "vocabulary":
        return list(range(words))
    lm_ids = CODE_IDS if item_tokens.lm_ids is None else item_tokens.lm_ids
    depth = len(begun)
    if normaliser == "level" and item_tokens.kind == "codes":
        low, high = item_tokens.level_offsets[depth : depth + 2]
        return [int(token) for token in lm_ids[low:high]]
    longer = [tokens for item in range(item_tokens.n_items) if len(tokens := item_tokens.of(item)) > depth]
    if normaliser == "legal":
        longer = [tokens for tokens in longer if tokens[:depth] == begun]
    return [int(token) for token in lm_ids[sorted({tokens[depth] for tokens in longer})]]


@torch.no_grad()
def exhaustive(model: Any, item_tokens: ItemTokens, prompt: list[int], normaliser: str) -> torch.Tensor:
    """Every item's score, float64 [n_items], from a plain reading of prompt and tokens, filled up on the right."""
    lm_ids = CODE_IDS if item_tokens.lm_ids is None else item_tokens.lm_ids
    sequences = [item_tokens.of(item) for item in range(item_tokens.n_items)]
    longest = max(map(len, sequences))
    texts = [[*prompt, *lm_ids[tokens].tolist(), *[0] * (longest - len(tokens))] for tokens in sequences]
    logits = model(input_ids=torch.tensor(texts)).logits[:, len(prompt) - 1 : -1].double()
    scores = torch.full((item_tokens.n_items,), -torch.inf, dtype=torch.float64)
    for item, tokens in enumerate(sequences):
        total = 0.0 if tokens else -torch.inf
        for depth, token in enumerate(tokens):
            among = rivals(item_tokens, tokens[:depth], normaliser, logits.shape[2])
            total += float(logits[item, depth, lm_ids[token]] - logits[item, depth, among].logsumexp(0))
        scores[item] = total
    return scores


def assert_same_ranking(items: list[int], scores: torch.Tensor, wanted: torch.Tensor) -> None:
    """The items are the best, and in order wherever that is not a matter of rounding."""
    expected = wanted.sort(descending=True).values[: len(items)]
    torch.testing.assert_close(scores.double(), expected, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(wanted[items], expected, atol=2e-4, rtol=1e-4)
    assert len(set(items)) == len(items)


def assert_best_where_rows_are_left_out(
    model: Any, make: Callable[..., BeamSearch], plain: Callable[..., torch.Tensor], normaliser: str
) -> None:
    """With as many beams as items the k best are those of plain readings, whatever rows were left out by then.

    Args:
        model: a language model, whose head is changed.
        make: a search from model and items.
        plain: every item's score.
        normaliser: of both.
    """
    # Logits that differ as a trained model's do, so that rows are decided at different depths.
    model.get_output_embeddings().weight.data.mul_(6)
    rng = np.random.default_rng(3)
    titles = {tuple(rng.integers(5, 12, length).tolist()) for length in (1, 1, 2, 2, 3, 4, 6, 9, 14, 14)}
    item_tokens = ItemTokens.from_sequences([[], *map(list, sorted(titles))], END)
    prompts = [rng.integers(3, 90, length).tolist() for length in (3, 9, 1, 4, 12, 2, 7, 5)]
    scores = [plain(model, item_tokens, prompt, normaliser) for prompt in prompts]
    barred = torch.tensor([[1 + row % 3] for row in range(len(prompts))])
    going_on: list[int] = []

    def watched(search: BeamSearch) -> BeamSearch:
        reads = search._reads

        def begin(*given: Any) -> Any:
            reader = reads(*given)
            keep = reader.keep_rows
            reader.keep_rows = lambda rows: (going_on.append(len(rows)), keep(rows))
            return reader

        search._reads = begin
        return search

    opinions = torch.from_numpy(rng.normal(0, 2, (len(prompts), item_tokens.n_items)))
    opinions[:, 0] = -torch.inf
    guided = [0.7 * scores[row] + 0.3 * opinions[row].log_softmax(0) for row in range(len(prompts))]
    for k, excluded, weight in ((1, False, None), (2, False, None), (3, True, None), (4, True, 0.7), (5, False, 0.7)):
        search = watched(make(model, item_tokens, beams=item_tokens.n_items - 2, normaliser=normaliser))
        guide = None if weight is None else Guide(search.trie, opinions, weight)
        found = search(prompts, k, Exclusion(search.trie, barred) if excluded else None, guide=guide)
        for row, wanted in enumerate(scores if guide is None else guided):
            allowed = wanted.index_fill(0, barred[row], -torch.inf) if excluded else wanted
            assert_same_ranking(found.items[row].tolist(), found.scores[row], allowed)
    assert going_on and max(going_on) < len(prompts), "none was left out, so this says nothing"
