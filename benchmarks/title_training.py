"""Training on titles by a softmax over legal tokens (MSL): answers that end where they are told, against whole ones.

The Llama of ``fine_tuning.py`` (4 layers, 256 wide, float32, a vocabulary of 32,000), all of which trains; titles as in
``title_search.py`` (3,000, of 36 tokens on average, of which 10 tell an item); users with as many items as
amazon-scientific's, histories of 20, every prefix. Reference: the same model that reads titles to their ends, and has
logits of the whole vocabulary at all labels; those left out here have a loss of 0 and do not count. One optimizer step
a batch, both sides in turn, seconds of processors. ``ratio`` is that of ``packing: user``, batches of 64; ``detail``
has ``packing: none``, batches of 16, too, the ratios of tokens read, of labels and of logits, and where the time goes.
Losses of all steps are compared.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _harness import measure_pairs, parser, report
from fine_tuning import N_ITEMS, Ours, counts, dataset, settings, write_language_model
from prefix_packing import SCIENTIFIC
from title_search import titles

from recbole_llm.backbone.live_head import LiveHead
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.generative import FINE_TUNING, GenerativeRecommender
from recbole_llm.model.msl import MSL

TOLERANCE = 1e-4
SIZES = {"user": 64, "none": 16}


class WholeTitles(MSL):
    """The same loss, of titles that are read to their ends and logits of the whole vocabulary at every label."""

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Note what the tokens of every item are."""
        self.forced_in_mean = True
        super().take_item_tokens(tokens)
        self.forced_in_mean = False

    def _loss_of(self, states: torch.Tensor, which: torch.Tensor | None, batch: TokenBatch) -> torch.Tensor:
        return GenerativeRecommender._loss_of(self, states, which, batch)


def side(folder: Path, packing: str, data: Any, tokens: ItemTokens, model: type[MSL]) -> Ours:
    """A model with its loader."""
    config = settings("full", SIZES[packing], ("TALLRec", "MSL"))
    config |= {
        "packing": packing, "prefixes_per_user": None, "domain": "game", "gradient_accumulation_steps": 1,
        "MAX_ITEM_LIST_LENGTH": config["history_length"],
    }  # fmt: skip
    return Ours(folder, config, data, tokens, model)


def logits_of(ours: Ours, rows: Sequence[Any]) -> int:
    """How many logits the head makes in a pass over batches."""
    made: list[int] = []
    plain = LiveHead._capped

    def counted(head: LiveHead, logits: torch.Tensor) -> torch.Tensor:
        made.append(logits.numel())
        return plain(head, logits)

    with patch.object(LiveHead, "_capped", counted), torch.no_grad():
        for batch in ours.batches(rows):
            ours.model.stage_loss(FINE_TUNING, batch)
    return sum(made)


def compare(folder: Path, packing: str, data: Any, tokens: ItemTokens, steps: int, pairs: int) -> dict[str, Any]:
    """One packing, both sides: seconds, the largest difference of a loss, and the detail."""
    sides = [side(folder, packing, data, tokens, model) for model in (MSL, WholeTitles)]
    rows = sides[0].drawn(steps)
    losses = [ours.run(ours.loop(steps), rows) for ours in sides]

    # Steps that call the clock themselves.
    seconds = measure_pairs(
        *(partial(ours.seconds, rows) for ours in sides), pairs, warmup=0, seconds=lambda call: call()
    )
    ours_has, whole_has = (counts(ours, rows) for ours in sides)
    detail = {
        "time": round(min(seconds[1]) / min(seconds[0]), 2),
        "tokens_read": round(whole_has["in the tree"] / ours_has["in the tree"], 2),
        "labels": round(whole_has["labels"] / ours_has["labels"], 2),
        "logits": round(logits_of(sides[1], rows) / logits_of(sides[0], rows), 1),
        "processor_milliseconds_a_step": {
            name: ours.parts(rows) for name, ours in zip(("ours", "reference"), sides, strict=True)
        },
    }
    error = max(abs(one - other) for one, other in zip(*losses, strict=True))
    return {"seconds": seconds, "error": error, "detail": detail}


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    users, steps, pairs = (200, 2, 2) if arguments.quick else (4000, 4, 5)
    lengths = 3 + np.random.default_rng(0).choice(len(SCIENTIFIC), users, p=np.divide(SCIENTIFIC, sum(SCIENTIFIC)))
    data, tokens, found = dataset(lengths), titles(N_ITEMS - 1), {}
    with tempfile.TemporaryDirectory() as name:
        write_language_model(Path(name))
        for packing in SIZES:
            found[packing] = compare(Path(name), packing, data, tokens, steps, pairs)
            print(f"packing: {packing}: {json.dumps(found[packing]['detail'], indent=1)}", flush=True)
    error = max(one["error"] for one in found.values())
    report(
        "title_training", *found["user"]["seconds"], equal=error <= TOLERANCE, max_error=error,
        detail={f"packing: {packing}": one["detail"] for packing, one in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
