"""Every item of a catalogue scored exactly for a user: ours against reading the prompt again for each item.

A Qwen2 of 4 layers, 256 wide, in float32, with 4,096 tokens of which the last 1,024 are codes; 3,706 items (ml-1m's
number) of 4 codes each; prompts of 128 tokens; probabilities over the vocabulary. Reference: prompt and tokens of each
item as one row, as many rows at once as it does best with, no cache. ``detail`` has a second reference that reads the
prompt once and every item's tokens behind it, in pieces as large as ours, each item a chain of its own; the pruned
ranking of the 20 best; how time goes with the nodes read at once; and beam search at as many beams as there are items.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import measure_pairs, once, parser, ratios_of, report
from beam_search import CODES, LEVELS, PROMPT, catalogue, language_model

from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.pruned_ranking import PrunedRanking
from recbole_llm.decoding.tree_reader import SharedTree
from recbole_llm.itemid.item_tokens import ItemTokens

ITEMS, WORDS, NODES = 3_706, 3_072, 256


class Reference:
    """What people write who want every item's score."""

    def __init__(self, model: Any, item_tokens: ItemTokens) -> None:
        self.model = model
        self.told = item_tokens.tokens.view(-1, LEVELS) + WORDS
        self.rows = 32

    @torch.no_grad()
    def reread(self, prompt: torch.Tensor) -> torch.Tensor:
        """Scores [items] of a prompt, read again for each item."""
        scores = []
        for told in self.told.split(self.rows):
            ids = torch.cat((prompt.expand(len(told), -1), told[:, :-1]), dim=1)
            states = decoder_of(self.model)(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT - 1 :]
            scores.append(self._sums(states, told))
        return torch.cat(scores)

    @torch.no_grad()
    def shared(self, prompt: torch.Tensor) -> torch.Tensor:
        """Scores [items] of a prompt that is read once, with each item's tokens behind it as a chain of its own."""
        chain = LEVELS - 1
        reader = SharedTree(decoder_of(self.model), prompt.unsqueeze(0), torch.tensor([PROMPT]), NODES)
        scores = []
        for told in self.told.split(NODES // chain):
            item = torch.arange(len(told)).repeat_interleave(chain)
            depths = torch.arange(1, LEVELS).repeat(len(told))
            above = (item.unsqueeze(1) == item) & (depths.unsqueeze(1) >= depths)
            states = reader.read(told[:, :-1].flatten(), depths, above)[0].view(len(told), chain, -1)
            reader.keep(item[:0])
            scores.append(self._sums(torch.cat((reader.state.unsqueeze(1).expand(len(told), 1, -1), states), 1), told))
        return torch.cat(scores)

    def _sums(self, states: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        logits = self.model.lm_head(states)
        return (logits.gather(2, told.unsqueeze(-1))[..., 0] - logits.logsumexp(-1)).sum(1)


def quickest_rows(reference: Reference, prompt: torch.Tensor) -> int:
    """How many rows at once the reference does best with."""
    whole, seconds = reference.told, {}
    reference.told = whole[:128]
    for rows in (8, 32, 128):
        reference.rows = rows
        reference.reread(prompt)
        seconds[rows] = once(lambda: reference.reread(prompt))
    reference.told = whole
    return min(seconds, key=lambda rows: seconds[rows])


def main() -> None:
    options = parser(str(__doc__)).parse_args()
    torch.set_num_threads(options.threads)
    items, pairs = (400, 2) if options.quick else (ITEMS, 3)
    model, item_tokens = language_model(WORDS + LEVELS * CODES), catalogue(items)
    prompts = torch.from_numpy(np.random.default_rng(1).integers(0, WORDS, (4, PROMPT)))
    search = BeamSearch(
        decoder_of(model), Head.of(model), item_tokens, beams=20, lm_ids=WORDS + torch.arange(LEVELS * CODES)
    )
    ranking, reference = FullRanking(search, NODES), Reference(model, item_tokens)
    reference.rows = quickest_rows(reference, prompts[0])
    prompt = prompts[0]
    found = ranking([prompt.tolist()])[0, 1:]
    error = max((found - other).abs().max().item() for other in (reference.reread(prompt), reference.shared(prompt)))

    ours, theirs = measure_pairs(lambda: ranking([prompt.tolist()]), lambda: reference.reread(prompt), pairs, warmup=0)
    own, shared = measure_pairs(lambda: ranking([prompt.tolist()]), lambda: reference.shared(prompt), 2 * pairs)
    by_nodes = {}
    for nodes in (64, 256, 1024):
        made = FullRanking(search, nodes)
        by_nodes[nodes] = round(median(once(lambda m=made: m([prompt.tolist()])) for _ in range(3)), 3)
    batch = [row.tolist() for row in prompts]
    pruned = PrunedRanking(search, NODES)
    best = pruned(batch)
    whole = ranking(batch)
    top = whole.topk(search.beams, dim=1).values
    same = bool((best.scores - top).abs().max() < 1e-4)
    detail: dict[str, Any] = {
        "items": items,
        "tokens a user": {
            "ours": ranking.reads + PROMPT, "reference": items * (PROMPT + LEVELS - 1),
            "shared prompt": items * (LEVELS - 1) + PROMPT,
        },
        "reference's rows at once": reference.rows,
        "against a shared prompt": {
            "ratio": round(median(ratios_of(own, shared)), 3), "seconds": round(median(shared), 3),
        },
        "seconds by nodes at once": by_nodes,
        "seconds a user, 4 users at once": round(once(lambda: ranking(batch)) / 4, 3),
        "20 best, pruned": {
            "equal": same, "seconds a user": round(once(lambda: pruned(batch)) / 4, 3),
            "share of nodes": round(pruned.visited_share, 4),
        },
    }  # fmt: skip
    report("exact_ranking", ours, theirs, equal=error < 1e-4 and same, max_error=error, detail=detail)


if __name__ == "__main__":
    main()
