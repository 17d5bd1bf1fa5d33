"""A training step and a search, their products of matrices by torch's own library and by numpy's OpenBLAS.

``cpu_products: openblas`` against ``cpu_products: torch``, MKL in the wheels of PyPI, in one process, of one model and
one batch: the passes of a training step, of everything and of LoRA, on 128 samples, and of 64 packed prefixes of a
user; and a beam search of 20 beams for 32 users. All of the embedded language model's size and of 4 layers, 256 wide.
Losses, gradients and scores are compared. Times are the processor's, on one thread whatever ``--threads``, as ``auto``
has it. ``ratio`` is that of training everything at 4 layers. Where the processor is not AMD's of family 26 or later, or
``OPENBLAS_CORETYPE`` keeps OpenBLAS from its kernels for AVX-512, nothing is to be gained: ``detail`` has the kernels,
and whether ``auto`` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import _paths as paths
import torch
from _harness import measure_pairs, of_processors, parser, ratios_of, report
from beam_search import CODES, LEVELS, catalogue

from recbole_llm import products
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.head import Head, decoder_of

TOLERANCE = 1e-5
# Layers, width and vocabulary of the models.
SIZES = {"embedded": (2, 128, 2_000), "4 layers": (4, 256, 32_000)}
MAIN = "4 layers, full"


def trained(step: paths.FineTuning) -> Callable[[], list[torch.Tensor]]:
    """A step's passes, without the optimizer, which multiplies no matrices and would move the weights."""

    def run() -> list[torch.Tensor]:
        step.optimizer.zero_grad()
        loss = step.loss()
        loss.backward()
        grads = [weight.grad for weight in step.weights if weight.grad is not None]
        return [loss.detach().clone(), *(grad.clone() for grad in grads)]

    return run


def searched(layers: int, width: int, words: int, users: int) -> Callable[[], list[torch.Tensor]]:
    """A search of 20 beams over prompts of 128 tokens, its normaliser the level."""
    model = paths.llama(layers, width, words + LEVELS * CODES)
    search = BeamSearch(
        decoder_of(model), Head.of(model), catalogue(2_000), beams=20, normaliser="level",
        lm_ids=words + torch.arange(LEVELS * CODES),
    )  # fmt: skip
    prompts = torch.randint(3, words, (users, 128), generator=torch.Generator().manual_seed(0)).tolist()
    return lambda: [search(prompts).scores]


def cases(quick: bool) -> Iterator[tuple[str, Callable[[], list[torch.Tensor]]]]:
    """Name, and what is timed; it returns what is compared."""
    samples, prefixes, users = (32, 16, 8) if quick else (128, 64, 32)
    for name, (layers, width, words) in SIZES.items():
        batch, packed = paths.fine_tuning_batch(samples, words=words), paths.packed_batch(prefixes, words)
        for kind, adapter, given in (("full", "full", batch), ("lora", "lora", batch), ("packed user", "full", packed)):
            yield f"{name}, {kind}", trained(paths.FineTuning(paths.llama(layers, width, words), given, adapter))
        yield f"{name}, search", searched(layers, width, words, users)


def error_of(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    pairs = zip(found, wanted, strict=True)
    return max(float((one - two).abs().max() / two.abs().max().clamp(min=1e-12)) for one, two in pairs)


def measured(call: Callable[[], Any], pairs: int) -> tuple[list[float], list[float], float]:
    """Seconds of the processor by each library in turn, and how far their results are apart."""
    results = {}

    def by(kind: str) -> None:
        products.use(kind)
        results[kind] = call()

    ours, reference = measure_pairs(lambda: by("openblas"), lambda: by("torch"), pairs, seconds=of_processors)
    return ours, reference, error_of(results["openblas"], results["torch"])


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    products.use("auto")
    gains = products.in_use() == "openblas"
    pairs = 3 if arguments.quick else 5
    ratios, errors, main_times = {}, {}, ([0.0], [0.0])
    for name, call in cases(arguments.quick):
        ours, reference, errors[name] = measured(call, pairs)
        ratios[name] = round(median(ratios_of(ours, reference)), 3)
        print(f"  {name:<24} {ratios[name]:.2f}x  {1e3 * median(reference):8.1f} -> {1e3 * median(ours):8.1f} ms")
        if name == MAIN:
            main_times = (ours, reference)
    products.use("torch")
    error = max(errors.values())
    report(
        "cpu_products", *main_times, equal=error < TOLERANCE, max_error=error,
        detail={"ratios": ratios, "errors": errors, "auto_takes_it": gains, "kernels": products.kernels()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
