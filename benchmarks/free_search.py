"""What a language model writes behind prompts, 4 beams: ours against ``transformers`` ``generate``, as BIGRec asks it.

A Qwen2 of 4 layers, 256 wide, in float32, with 8,192 tokens; prompts of 60 to 180 tokens of which the first 48 are
alike; up to 24 tokens are written, the end token among them now and then. Reference: ``generate`` with SDPA attention
and a cache, as many users at once as ours, in the users' own order and filled up on the left; ``like_length`` is
against the same in batches of like length. One thread; seconds are of processors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import measure_pairs, of_processors, parser, ratios_of, report, tell
from beam_search import language_model

from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.free_search import FreeSearch
from recbole_llm.decoding.head import Head, decoder_of

WORDS, OPENING, BEAMS, LONGEST, AT_ONCE, END = 8192, 48, 4, 24, 64, 2


def prompts_of(users: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    opening = rng.integers(3, WORDS, OPENING).tolist()
    return [opening + rng.integers(3, WORDS, length).tolist() for length in rng.integers(12, 133, users)]


def generated(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[END] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = model.generate(
        input_ids=ids, attention_mask=seen, num_beams=BEAMS, do_sample=False, min_new_tokens=1, max_new_tokens=LONGEST,
        eos_token_id=END, pad_token_id=END,
    )[:, width:].tolist()  # fmt: skip
    return [text[: text.index(END)] if END in text else text for text in made]


def batched(prompts: list[list[int]], parts: Sequence[torch.Tensor], ask: Callable[[Any], Any]) -> list[list[int]]:
    found: list[list[int]] = [[]] * len(prompts)
    for part in parts:
        for row, text in zip(part.tolist(), ask([prompts[row] for row in part.tolist()]), strict=True):
            found[row] = text
    return found


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(1)
    users, pairs = (16, 1) if arguments.quick else (256, 5)
    model = language_model(WORDS)
    # Logits that vary as a trained model's do, the end token's the most.
    model.get_output_embeddings().weight.mul_(4)
    model.get_output_embeddings().weight[END] *= 6
    prompts = prompts_of(users)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    in_order = torch.arange(users).split(AT_ONCE)

    def ours() -> list[list[int]]:
        search = FreeSearch(
            decoder_of(model), Head.of(model), beams=BEAMS, longest=LONGEST, eos_id=END, opening=prompts[0][:OPENING]
        )
        tokens = budget_of(lengths, search.behind, AT_ONCE)

        def ask(some: list[list[int]]) -> list[list[int]]:
            texts = search(Ragged.from_lists(some))
            return [values.tolist() for values in texts.values.split(texts.lengths.tolist())]

        return batched(prompts, batches_of(lengths, search.behind, tokens), ask)

    def theirs(parts: Sequence[torch.Tensor] = in_order) -> list[list[int]]:
        return batched(prompts, parts, lambda some: generated(model, some))

    found, wanted = ours(), theirs()
    # Texts whose scores differ by rounding alone may change places.
    alike = float(np.mean([one == other for one, other in zip(found, wanted, strict=True)]))
    times = measure_pairs(ours, theirs, pairs, seconds=of_processors)
    sorted_parts = batches_of(lengths, 0, budget_of(lengths, 0, AT_ONCE))
    other = measure_pairs(ours, lambda: theirs(sorted_parts), pairs, seconds=of_processors)
    detail = {
        "users": users, "alike": round(alike, 4), "like_length": round(median(ratios_of(*other)), 2),
        "milliseconds_a_user": round(1e3 * median(times[0]) / users, 2),
        "tokens_written": round(float(np.mean([len(text) for text in found])), 1),
    }  # fmt: skip
    tell(detail)
    report("free_search", *times, equal=alike > 0.97, max_error=1 - alike, detail=detail)


if __name__ == "__main__":
    main()
