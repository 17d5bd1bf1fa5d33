"""One training epoch of LightGCN: ours against stock RecBole, on ml-100k and at the size of ml-1m.

Reference: RecBole's model, loader and sampler under the step loop of its trainer. Ours: CSR graph with its symmetric
gradient, the loader and sampler without Python lists. Both draw their own negatives while timed; that both have the
same losses is checked first, on equal batches. ``ratio`` is that at ml-1m's size.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import _harness
import numpy as np
import torch
from _stock import SHARED, seeded, stock_class, stock_config, stock_loaders, train_batches

from recbole_llm.data.histories import Histories
from recbole_llm.data.sampler import NegativeSampler

TOLERANCE = 1e-5  # of losses about 0.7
SETTINGS = {"load_col": {"inter": ["user_id", "item_id"]}, "threshold": None}


def synthetic(folder: Path) -> None:
    """An .inter of ml-1m's size: 6,040 users with 20 to 2,314 of 3,706 items of uneven popularity, 1,000,209 rows."""
    rng = np.random.default_rng(0)
    counts = np.clip(rng.lognormal(4.6, 1.0, 6040), 20, 2314)
    weights = (np.arange(3706) + 20.0) ** -0.8
    rows = [
        f"{user}\t{item}"
        for user, count in enumerate((counts * 1_000_209 / counts.sum()).astype(int))
        for item in rng.choice(3706, min(count, 3000), replace=False, p=weights / weights.sum())
    ]
    folder.mkdir(parents=True)
    (folder / f"{folder.name}.inter").write_text("user_id:token\titem_id:token\n" + "\n".join(rows) + "\n")


def compare(dataset: str, pairs: int, batches: int | None, **settings: Any) -> dict[str, Any]:
    """Both sides on one data set.

    Args:
        dataset: its name.
        pairs: timed runs of each.
        batches: how many of the epoch's batches are run; ``None`` for all.
        settings: further settings of RecBole's.

    Returns:
        Seconds of both, the largest difference of a loss, and what else was seen.
    """
    from recbole_llm.data.train_loader import FastTrainLoader
    from recbole_llm.model.lightgcn import LightGCN

    config = stock_config("LightGCN", dataset, **SETTINGS, **settings)
    train, _, _ = stock_loaders(config)
    data = train._dataset
    pairs_of = data.inter_feat
    histories = Histories.from_rows(pairs_of["user_id"].numpy(), pairs_of["item_id"].numpy(), data.user_num)
    sampler = NegativeSampler(histories, data.item_num, seed=config["seed"])
    loader = FastTrainLoader(config, data, sampler, shuffle=True)

    start = time.perf_counter()
    stock = seeded(lambda: stock_class("general_recommender", "LightGCN")(config, data))
    built = time.perf_counter()
    fast = seeded(lambda: LightGCN(config, data))
    init = (time.perf_counter() - built, built - start)
    optimizers = (torch.optim.Adam(fast.parameters()), torch.optim.Adam(stock.parameters()))

    equal_batches = list(itertools.islice(train, 8))
    losses = np.array([train_batches(*side, equal_batches) for side in zip((fast, stock), optimizers, strict=True)])
    error = float(np.abs(losses[0] - losses[1]).max())

    ours, reference = _harness.measure_pairs(
        lambda: train_batches(fast, optimizers[0], itertools.islice(loader, batches)),
        lambda: train_batches(stock, optimizers[1], itertools.islice(train, batches)),
        pairs,
        warmup=0,
    )
    ratios = _harness.ratios_of(ours, reference)
    steps = batches or len(train)
    print(
        f"{dataset}: {len(data):,} train rows, {steps} of {len(train)} batches; ours {median(ours):.3f} s, "
        f"RecBole {median(reference):.3f} s, {median(ratios):.2f}x; model and graph built in "
        f"{init[0]:.2f} s, RecBole {init[1]:.2f} s"
    )
    return {
        "dataset": dataset, "train_rows": len(data), "batches": steps, "batches_in_epoch": len(train),
        "ours": ours, "reference": reference, "ratio": median(ratios), "max_error": error,
        "init_seconds": {"ours": init[0], "reference": init[1]},
    }  # fmt: skip


def main() -> None:
    """Run it."""
    parser = _harness.parser(__doc__)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    small = compare("ml-100k", 3 if args.quick else 5, 20 if args.quick else None)
    with tempfile.TemporaryDirectory() as folder:
        if (SHARED / "ml-1m" / "ml-1m.inter").is_file():
            name, path, source = "ml-1m", SHARED, "ml-1m"
        else:
            name, path, source = "ml-1m-size", Path(folder), "synthetic, of ml-1m's size (ml-1m itself is not here)"
            synthetic(path / name)
        print(f"at ml-1m's size: {source}")
        large = compare(name, 3, 16 if args.quick else 128, data_path=str(path))
    error = max(small["max_error"], large["max_error"])
    detail = {"data": source, "wanted": {"ml-100k": 4, "ml-1m": 10}, "ml-100k": small, "ml-1m": large}
    _harness.report(
        "lightgcn_epoch", large["ours"], large["reference"], equal=error < TOLERANCE, max_error=error, detail=detail
    )


if __name__ == "__main__":
    main()
