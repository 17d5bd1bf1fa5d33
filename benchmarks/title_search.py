"""Titles found by a beam search, 10 beams, relative to legal tokens (MSL): against reading every beam to the last end.

A Qwen2 of 4 layers, 256 wide, in float32, with 8,192 tokens; 4,000 titles of families that begin alike, of 36 tokens on
average and of which 10 tell an item, as in an online shop; prompts of 60 to 180 tokens. Reference: the same search
without what it leaves out: titles are read to their ends, all beams and all users of a batch until the longest title
has ended. ``unique`` is against one that reads no more of a title than tells it. One thread; seconds are of processors.
"""

from __future__ import annotations

from statistics import median

import numpy as np
import torch
from _harness import measure_pairs, of_processors, parser, ratios_of, report, tell
from beam_search import language_model
from free_search import prompts_of

from recbole_llm.decoding.beam_search import BeamSearch, _Beams
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.itemid.item_tokens import ItemTokens

WORDS, BEAMS, ITEMS, AT_ONCE, END = 8192, 10, 4000, 64, 2


def titles(items: int) -> ItemTokens:
    """Families of Zipf's sizes; a title is its family's first words, and words of its own."""
    rng = np.random.default_rng(2)
    words = rng.permutation(np.arange(3, WORDS))
    of_zipf = np.minimum(rng.zipf(1.6, items), 40)
    sequences: list[list[int]] = [[]]
    for size in of_zipf:
        common = words[rng.zipf(1.3, 1 + rng.geometric(0.12)) % len(words)].tolist()
        for _ in range(size):
            own = words[rng.zipf(1.2, 4 + rng.geometric(0.04)) % len(words)].tolist()
            sequences.append((common + own)[:64])
    return ItemTokens.from_sequences(sequences[: items + 1], END)


class ToTheEnd(BeamSearch):
    """The search that leaves nothing out before a whole batch is decided; its trie may be that of whole titles."""

    def _can_win(self, beams: _Beams, ended: _Beams, k: int) -> torch.Tensor:
        return super()._can_win(beams, ended, k).any().expand(beams.scores.shape)


class WholeTitles(ItemTokens):
    """Titles that are told by their last tokens only."""

    def unique_prefixes(self) -> ItemTokens:
        """Themselves."""
        return self


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    users, pairs, items = (16, 1, 400) if arguments.quick else (192, 3, ITEMS)
    model = language_model(WORDS)
    # Logits that vary as a trained model's do.
    model.get_output_embeddings().weight.mul_(4)
    item_tokens, prompts = titles(items), prompts_of(users)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    whole = WholeTitles(**vars(item_tokens))
    options = {"beams": BEAMS, "normaliser": "legal"}
    ours, told, ends = (
        kind(decoder_of(model), Head.of(model), tokens, **options)
        for kind, tokens in ((BeamSearch, item_tokens), (ToTheEnd, item_tokens), (ToTheEnd, whole))
    )

    def found(search: BeamSearch) -> tuple[torch.Tensor, torch.Tensor]:
        made = torch.zeros(users, BEAMS, dtype=torch.int64), torch.zeros(users, BEAMS)
        for part in batches_of(lengths, search.behind, budget_of(lengths, search.behind, AT_ONCE)):
            made[0][part], made[1][part] = search([prompts[row] for row in part.tolist()])[:2]
        return made

    (our_items, scores), (_, whole_scores), (told_items, _) = map(found, (ours, ends, told))
    same = (our_items == told_items).float().mean().item()
    gained = scores - whole_scores
    times = measure_pairs(lambda: found(ours), lambda: found(ends), pairs, seconds=of_processors)
    other = measure_pairs(lambda: found(ours), lambda: found(told), pairs, seconds=of_processors)
    unique = item_tokens.unique_prefixes()
    detail = {
        "users": users, "unique": round(median(ratios_of(*other)), 2), "alike_unique": round(same, 4),
        "scores_above": round((gained > 1e-3).float().mean().item(), 4),
        "scores_below": round((gained < -1e-3).float().mean().item(), 4),
        "tokens_a_title": round(item_tokens.lengths[1:].float().mean().item(), 1),
        "tokens_that_tell": round(unique.lengths[1:].float().mean().item(), 1), "longest_that_tell": unique.longest,
        "milliseconds_a_user": round(1e3 * median(times[0]) / users, 2),
    }  # fmt: skip
    tell(detail)
    report("title_search", *times, equal=same > 0.99, max_error=1 - same, detail=detail)


if __name__ == "__main__":
    main()
