"""One training step of SASRec: ours against stock RecBole, at RecBole's default sizes on ml-100k.

Reference: RecBole's model as its user has it, with the anomaly mode that importing any of its sequential models turns
on. Ours: anomaly mode off, fused GELU, cheaper dropout, the last layer computed at the one position that the loss
looks at, and rows sorted into a few lengths. That both have the same scores, losses and gradients is checked first,
without dropout. ``detail`` has what each part brings.
"""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import _harness
import torch
from _stock import seeded, stock_class, stock_config, stock_loaders
from torch import nn

TOLERANCE = 1e-5  # of scores and gradients below 1, and of a loss about 7


def stepper(model: nn.Module, batch: Any, anomaly: bool) -> Any:
    """A training step of the model under Adam, as a function of nothing."""
    optimizer = torch.optim.Adam(model.parameters())
    model.train()

    def step() -> None:
        with torch.autograd.set_detect_anomaly(anomaly, check_nan=True):
            optimizer.zero_grad()
            loss = model.calculate_loss(batch)
            loss.item()
            loss.backward()
            optimizer.step()

    return step


def undropped(model: nn.Module) -> nn.Module:
    """A copy in training mode without dropout."""
    made = copy.deepcopy(model).train()
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return made


def largest_difference(ours: Any, stock: Any, batch: Any) -> float:
    """Of scores, loss and every gradient."""
    errors = []
    with torch.no_grad():
        errors.append(ours.eval().full_sort_predict(batch) - stock.eval().full_sort_predict(batch))
    pair = undropped(ours), undropped(stock)
    losses = [model.calculate_loss(batch) for model in pair]
    errors.append(losses[0] - losses[1])
    for loss in losses:
        loss.backward()
    errors += [a.grad - b.grad for a, b in zip(pair[0].parameters(), pair[1].parameters(), strict=True)]
    return max(float(error.detach().abs().max()) for error in errors)


def main() -> None:
    """Run it."""
    args = _harness.parser(__doc__).parse_args()
    torch.set_num_threads(args.threads)
    rows = 256 if args.quick else 2048
    pairs = 3 if args.quick else 5
    config = stock_config("SASRec", "ml-100k", train_neg_sample_args=None)
    train, _, _ = stock_loaders(config)
    stock = seeded(lambda: stock_class("sequential_recommender", "SASRec")(config, train._dataset))
    left_on = torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(False)

    from recbole_llm.model.sasrec import SASRec
    from recbole_llm.model.transformer import accelerate

    ours = seeded(lambda: SASRec(config, train._dataset))
    batch = next(iter(train))[:rows]
    error = largest_difference(ours, stock, batch)

    sides = {
        "stock": stepper(copy.deepcopy(stock), batch, True),
        "anomaly_off": stepper(copy.deepcopy(stock), batch, False),
        "fused_layers": stepper(accelerate(copy.deepcopy(stock)), batch, False),
        "ours": stepper(ours, batch, False),
    }
    mine, reference = _harness.measure_pairs(sides["ours"], sides["stock"], pairs)
    parts = {}
    for label, before, after in (
        ("anomaly mode off", "stock", "anomaly_off"),
        ("then fused GELU, attention and dropout", "anomaly_off", "fused_layers"),
        ("then last layer at one position, rows by length", "fused_layers", "ours"),
    ):
        times = _harness.measure_pairs(sides[after], sides[before], pairs - 1)
        parts[label] = round(median(_harness.ratios_of(*times)), 3)
        print(f"{label}: {parts[label]:.2f}x")
    detail = {
        "wanted": 3, "rows": rows, "length": batch["item_id_list"].shape[1], "parts": parts,
        "mean_length": round(float(batch["item_length"].float().mean()), 1),
        "anomaly_mode_after_importing_recbole": left_on,
    }  # fmt: skip
    _harness.report("sasrec_step", mine, reference, equal=error < TOLERANCE, max_error=error, detail=detail)


if __name__ == "__main__":
    main()
