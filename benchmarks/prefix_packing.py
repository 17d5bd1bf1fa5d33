"""All prefixes of a user in one sequence (``packing: user``) against samples drawn at random over users, as by default.

The model and prompts of ``fine_tuning.py``: a Llama of 4 layers, 256 wide, in float32, all of which trains, and
AlignTokenRec's sequential task, answers alone, every prefix. Two shapes: ``history 20`` has users with as many items as
amazon-scientific's and batches of 128 samples; ``uncapped`` has ml-100k's users, whose histories are shown whole, and
batches of 32. Each side's loader makes an epoch of all users; of the batches some are trained on, one optimizer step
each, at equal shares of the epoch in the order of length. Time is processors', by token that the samples have one by
one, as the two sides' batches are not the same. Reference: ``packing: none``, which reads what the prompts of a batch
open with once as well. ``ratio`` is that of ``history 20``. ``detail`` has for each shape the tokens read, the share of
their ratio that the time's is; the same against the very same samples without any sharing, and row by row with filling;
and where the time goes.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import recbole
import torch
from _harness import measure_pairs, parser, report
from fine_tuning import Ours, dataset, item_tokens, settings, without, write_language_model

from recbole_llm.backbone import packed, tree_attention
from recbole_llm.model.aligntokenrec import FINE_TUNING
from recbole_llm.tasks.behaviour import SEQUENTIAL

TOLERANCE = 1e-5
# Train items of amazon-scientific's users: how many users have 3, 4, ...; of 8,317, and those with more as if with 25.
SCIENTIFIC = [392, 225, 129, 77, 45, 35, 24, 16, 13, 8, 7, 6, 5, 3, 3, 3, 2, 1, 1, 5]


class Shape(NamedTuple):
    """What is trained on.

    Attributes:
        lengths: train items of each user.
        shown: items of a history that a prompt shows.
        batch_size: samples a step.
        steps: batches of each side that are timed.
        pairs: how often.
    """

    lengths: np.ndarray
    shown: int
    batch_size: int
    steps: int
    pairs: int


def shapes(quick: bool) -> dict[str, Shape]:
    rng = np.random.default_rng(0)
    weights = np.asarray(SCIENTIFIC, dtype=float)
    scientific = 3 + rng.choice(len(weights), 500 if quick else 8317, p=weights / weights.sum())
    folder = Path(os.path.dirname(recbole.__file__)) / "dataset_example" / "ml-100k"
    lines = (folder / "ml-100k.inter").read_text(encoding="utf-8").splitlines()[1:]
    films = np.unique([line.split("\t")[0] for line in lines], return_counts=True)[1] - 2
    if quick:
        films = np.sort(films)[: len(films) // 4]
    return {
        "history 20": Shape(scientific, 20, 16 if quick else 128, 3 if quick else 4, 1 if quick else 3),
        "uncapped": Shape(films, int(films.max()), 8 if quick else 32, 2 if quick else 3, 1),
    }


class Side(Ours):
    """The package's way with one of the packings.

    Args:
        folder: the language model.
        shape: of the data.
        packing: ``none`` or ``user``.
    """

    def __init__(self, folder: Path, shape: Shape, packing: str) -> None:
        config = settings("full", shape.batch_size)
        config |= {
            "tasks": [SEQUENTIAL], "prefixes_per_user": None, "packing": packing, "history_length": shape.shown,
            "MAX_ITEM_LIST_LENGTH": shape.shown,
        }  # fmt: skip
        super().__init__(folder, config, dataset(shape.lengths), item_tokens())

    def chosen(self, count: int) -> list[Any]:
        """Batches at equal shares of an epoch in the order of their lengths."""
        self.loader.length_of = self.model.sample_lengths
        self.loader.generator.manual_seed(0)
        batches = sorted(self.loader, key=lambda rows: float(self.model.sample_lengths(rows).sum()))
        return [batches[int((place + 0.5) / count * len(batches))] for place in range(count)]

    def tokens(self, rows: Sequence[Any]) -> tuple[int, int, int]:
        """Tokens of samples: with filling, one by one, and as they are read."""
        found = np.zeros(3, dtype=int)
        for batch in self.batches(rows):
            lengths = packed.lengths_of(batch.ids, batch.rows, batch.places)
            nodes = len(packed.Tree.of(batch.ids, lengths).places)
            found += batch.ids.numel(), int(lengths.sum()), nodes
        return tuple(found.tolist())


def error_of(ours: Side, rows: Any) -> float:
    """How far a batch's loss and (relative, by norm) its gradient are from those of its samples read row by row."""
    found = []
    for packing in (True, False):
        with without(ours, packing=packing):
            loss = ours.model.stage_loss(FINE_TUNING, next(iter(ours.batches([rows]))))
            weights = [weight for weight in ours.model.parameters() if weight.requires_grad]
            gradients = torch.autograd.grad(loss, weights)
            found.append((float(loss), torch.cat([gradient.flatten() for gradient in gradients])))
    (loss, gradient), (expected, wanted) = found
    return max(abs(loss - expected), float((gradient - wanted).norm() / wanted.norm()))


def share(time_ratio: float, token_ratio: float) -> dict[str, float]:
    return {
        "time": round(time_ratio, 2), "tokens": round(token_ratio, 2), "share": round(time_ratio / token_ratio, 3),
    }  # fmt: skip


def compare(folder: Path, shape: Shape) -> dict[str, Any]:
    """One shape of data, both sides."""
    ours, reference = Side(folder, shape, "user"), Side(folder, shape, "none")
    rows, theirs = ours.chosen(shape.steps), reference.chosen(shape.steps)
    filled, alone, read = ours.tokens(rows)
    _, their_alone, their_read = reference.tokens(theirs)
    shortest = min(rows, key=lambda batch: float(ours.model.sample_lengths(batch).sum()))
    error = error_of(ours, shortest)
    ours.seconds(rows[:1])
    reference.seconds(theirs[:1])
    # Steps that call the clock themselves, which begins behind the optimizer that each makes.
    seconds = measure_pairs(
        lambda: ours.seconds(rows) / alone, lambda: reference.seconds(theirs) / their_alone, shape.pairs, warmup=0,
        seconds=lambda call: call(),
    )  # fmt: skip
    # The least: what else the machine does makes processors' time longer too.
    mine, theirs_least = (min(times) * alone for times in seconds)
    times = -(-shape.pairs // 2)
    with without(ours, sharing=False):
        apart = min(ours.seconds(rows) for _ in range(times))
    with without(ours, packing=False):
        by_row = min(ours.seconds(rows) for _ in range(times))
    pair_cost, tree_attention.MASKED = tree_attention.MASKED, float("inf")
    try:
        unfolded = min(ours.seconds(rows) for _ in range(times))
    finally:
        tree_attention.MASKED = pair_cost
    return {
        "seconds": seconds, "error": error,
        "detail": {
            "against packing: none": share(theirs_least / mine, (their_read / their_alone) / (read / alone)),
            "against the same samples apart": share(apart / mine, alone / read),
            "against the same samples row by row": share(by_row / mine, filled / read),
            "against attention by rows": round(unfolded / mine, 2),
            "tokens a sample": {
                name: round(count / shape.batch_size / shape.steps, 1)
                for name, count in (("alone", alone), ("read", read), ("of packing: none, alone", their_alone),
                                    ("of packing: none, read", their_read))
            },
            "processor_milliseconds_a_step": {"ours": ours.parts(rows), "reference": reference.parts(theirs)},
        },
    }  # fmt: skip


def main() -> None:
    made = parser(str(__doc__))
    made.set_defaults(threads=1)
    made.add_argument("--shape", choices=["history 20", "uncapped"], help="one shape alone")
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_language_model(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
        for shape, given in shapes(arguments.quick).items():
            if arguments.shape in (None, shape):
                found[shape] = compare(folder, given)
                print(f"{shape}: {json.dumps(found[shape]['detail'], indent=1)}", flush=True)
    error = max(result["error"] for result in found.values())
    report(
        "prefix_packing", *next(iter(found.values()))["seconds"], equal=error <= TOLERANCE, max_error=error,
        detail={shape: result["detail"] for shape, result in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
