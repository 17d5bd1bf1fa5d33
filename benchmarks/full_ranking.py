"""Ranking and measuring every user of ml-1m: ours against RecBole's trainer at its best ``eval_batch_size``.

Both rank the same users with the same BPR weights, exclude the same history and compute every ranking metric that
stock RecBole can (its coverage metrics crash); ours also keeps each user's value.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import measure_pairs, once, parser, report
from _stock import SHARED, seeded, stock_class, stock_config, stock_loaders

METRICS = ["NDCG", "Recall", "Hit", "Precision", "MRR", "MAP", "GAUC"]
EVAL = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


def write_data(folder: Path, users: int, items: int, mean: int) -> None:
    """A data set of ml-1m's shape, for a machine without the real one."""
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    popularity = rng.zipf(1.3, size=items).astype(float)
    popularity /= popularity.sum()
    for user in range(1, users + 1):
        count = min(items // 2, max(20, int(rng.exponential(mean))))
        chosen = rng.choice(items, size=count, replace=False, p=popularity)
        lines += [f"{user}\t{item + 1}\t{place}" for place, item in enumerate(chosen)]
    (folder / "ml-1m-like").mkdir(parents=True)
    (folder / "ml-1m-like" / "ml-1m-like.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")


def few_users(source: Path, folder: Path, users: int) -> None:
    """The first users of ml-1m under a name of their own."""
    lines = (source / "ml-1m" / "ml-1m.inter").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines[1:] if int(line.partition("\t")[0]) <= users]
    (folder / "ml-1m-like").mkdir(parents=True)
    (folder / "ml-1m-like" / "ml-1m-like.inter").write_text("\n".join([lines[0], *kept]) + "\n", encoding="utf-8")


def main() -> None:
    arguments = parser(__doc__).parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(tempfile.mkdtemp())
    real = (SHARED / "ml-1m").is_dir()
    try:
        if real and not arguments.quick:
            shutil.copytree(SHARED / "ml-1m", folder / "ml-1m-like")
            for file in (folder / "ml-1m-like").glob("ml-1m.*"):
                file.rename(file.with_name(file.name.replace("ml-1m", "ml-1m-like", 1)))
        elif real:
            few_users(SHARED, folder, 1500)
        else:
            write_data(folder, *((1500, 3416, 120) if arguments.quick else (6040, 3706, 165)))
        run(folder, arguments.quick, real)
    finally:
        shutil.rmtree(folder)


def run(folder: Path, quick: bool, real: bool) -> None:
    shared: dict[str, Any] = {
        "data_path": str(folder), "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "eval_args": EVAL,
        "metrics": METRICS, "topk": [5, 10, 20, 50], "valid_metric": "NDCG@10", "metric_decimal_place": 12,
    }  # fmt: skip
    config = stock_config("BPR", "ml-1m-like", checkpoint_dir=str(folder / "stock"), **shared)
    stock_train, _, stock_test = stock_loaders(config)
    model = seeded(lambda: stock_class("general_recommender", "BPR")(config, stock_train._dataset))
    from recbole.trainer import Trainer

    trainer = Trainer(config, model)
    trainer.eval_collector.data_collect(stock_train)

    from recbole_llm import Config
    from recbole_llm.data import create_dataset, data_preparation
    from recbole_llm.evaluation.ranking import measure

    logging.disable(logging.WARNING)
    settings = shared | {"output_dir": str(folder / "ours"), "tensorboard": False, "gpu_id": ""}
    ours_config = Config("BPR", "ml-1m-like", config_dict=settings, command_line=[])
    train, _, test = data_preparation(ours_config, create_dataset(ours_config))

    def theirs() -> dict[str, float]:
        return trainer.evaluate(stock_test, load_best_model=False)

    def batch_of(cells: int) -> None:
        config["eval_batch_size"] = cells
        stock_test.batch_sampler.batch_size = max(cells // stock_test._dataset.item_num, 1)

    sizes = [4096, 409_600, 4_096_000] if quick else [4096, 409_600, 4_096_000, 20_480_000]
    seconds = {}
    for cells in sizes:
        batch_of(cells)
        seconds[cells] = min(once(theirs) for _ in range(2))
    best = min(seconds, key=lambda cells: seconds[cells])
    batch_of(best)

    stock_result = theirs()
    found = measure(model, test, ours_config, train)
    errors = [abs(float(stock_result[name]) - found.metrics[name]) for name in stock_result]
    ours, reference = measure_pairs(lambda: measure(model, test, ours_config, train), theirs, pairs=3 if quick else 7)
    report(
        "full_ranking", ours, reference, equal=max(errors) < 1e-6, max_error=max(errors),
        detail={
            "data": "ml-1m" if real else "synthetic of ml-1m's shape", "users": len(found.users),
            "items": int(test.split.n_items) - 1, "metrics": METRICS, "topk": shared["topk"],
            "stock_seconds_by_eval_batch_size": {str(cells): round(value, 4) for cells, value in seconds.items()},
            "users_per_second": round(len(found.users) / median(ours)),
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
