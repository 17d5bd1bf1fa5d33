"""The tables of docs/results/glta.md from the runs of glta.sh: mean over seeds, and paired tests over users.

Usage: .venv/bin/python docs/results/tabulate.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from recbole_llm.evaluation.comparison import Row, paired_test, row_of

METRICS = ("ndcg@5", "ndcg@10", "precision@5", "precision@10", "recall@10")


def rows_in(folder: Path) -> dict[str, Row]:
    """Each row's runs, averaged over seeds; every file is checked for the same split and policy."""
    files = {sub.name: sorted(sub.glob("?.json")) for sub in sorted(folder.iterdir()) if any(sub.glob("?.json"))}
    like = next(iter(files.values()))[0]
    return {name: row_of(name, paths, like) for name, paths in files.items()}


def main() -> None:
    """Print the tables."""
    folder = Path(sys.argv[1])
    for protocol in ("time", "ratio"):
        if not (folder / protocol).is_dir():
            continue
        rows = rows_in(folder / protocol)
        print(
            f"\n## {protocol}\n\n| row | "
            + " | ".join(METRICS)
            + " | seeds | seconds to train |\n"
            + "|---" * (len(METRICS) + 3)
            + "|"
        )
        for name, row in sorted(rows.items(), key=lambda pair: -pair[1].values["ndcg@10"].mean()):
            results = [
                json.loads(path.read_text(encoding="utf-8"))
                for path in sorted((folder / protocol / name).glob("?.json"))
            ]
            cells = []
            for metric in METRICS:
                values = [result["test"][metric] for result in results]
                spread = f" ± {stdev(values):.4f}" if len(values) > 1 and stdev(values) > 0 else ""
                cells.append(f"{mean(values):.4f}{spread}")
            seconds = mean(sum(stage["seconds"] for stage in result["stages"]) for result in results)
            print(f"| {name} | " + " | ".join(cells) + f" | {row.seeds} | {seconds:.0f} |")
        if "LightGCN" in rows:
            print("\n| row against LightGCN | ndcg@10 | p | precision@5 | p |\n|---|---|---|---|---|")
            for name, row in rows.items():
                if name != "LightGCN":
                    parts = [paired_test(row, rows["LightGCN"], metric) for metric in ("ndcg@10", "precision@5")]
                    print(f"| {name} | " + " | ".join(f"{gain:+.4f} | {p:.2g}" for gain, p in parts) + " |")


if __name__ == "__main__":
    main()
