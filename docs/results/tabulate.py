"""The tables of docs/results/glta.md from suites: mean over seeds, cost, and paired tests over users.

Usage: .venv/bin/python docs/results/tabulate.py SUITE_OUTPUT [SUITE_OUTPUT ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import mean, stdev

from recbole_llm.evaluation.comparison import Row, paired_test, row_of

METRICS = ("ndcg@5", "ndcg@10", "precision@5", "precision@10")
BASES = ("LightGCN", "EASE", "GLTA")


def cells_of(folders: list[Path]) -> dict[str, dict[str, dict[int, Path]]]:
    """Result files by table (data set and protocol), row and seed; a row of two suites stands once."""
    tables: dict[str, dict[str, dict[int, Path]]] = {}
    for folder in folders:
        suite = json.loads((folder / "suite.json").read_text(encoding="utf-8"))
        for cell in suite["cells"]:
            if cell["done"]:
                name = " ".join(part for part in (cell["dataset"], cell["protocol"], cell["column"]) if part)
                row = tables.setdefault(name, {}).setdefault(cell["row"], {})
                row.setdefault(cell["seed"], folder / cell["file"])
    return tables


def line_of(name: str, row: Row, files: list[Path], bases: dict[str, Row]) -> str:
    """One line of a table."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    cells = [name]
    for metric in METRICS:
        values = [result["test"][metric] for result in results]
        spread = f" ± {stdev(values):.4f}" if len(values) > 1 and stdev(values) > 0 else ""
        cells.append(f"{mean(values):.4f}{spread}")
    cells += [str(row.seeds), f"{mean(sum(stage['seconds'] for stage in result['stages']) for result in results):.0f}"]
    for base, other in bases.items():
        if base == name:
            cells.append("")
        else:
            gain, p = paired_test(row, other, "ndcg@10")
            share = gain / other.values["ndcg@10"].mean()
            cells.append(f"{share:+.1%}, p {p:.2g}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    for table, members in cells_of([Path(folder) for folder in sys.argv[1:]]).items():
        files = {name: [seeds[seed] for seed in sorted(seeds)] for name, seeds in members.items()}
        like = next(iter(files.values()))[0]
        rows = {name: row_of(name, paths, like) for name, paths in files.items()}
        bases = {name: rows[name] for name in BASES if name in rows}
        split = json.loads(like.read_text(encoding="utf-8"))["split"]
        heads = ["row", *METRICS, "seeds", "seconds", *(f"NDCG@10 against {base}" for base in bases)]
        print(f"\n## {table}\n\nSplit `{split['fingerprint'][:16]}`.\n")
        print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
        for name, row in sorted(rows.items(), key=lambda pair: -pair[1].values["ndcg@10"].mean()):
            print(line_of(name, row, files[name], bases))


if __name__ == "__main__":
    main()
