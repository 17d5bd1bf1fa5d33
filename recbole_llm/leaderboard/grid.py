"""One metric by row and column: what a suite that varies something shows at one look."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from recbole_llm.errors import UserError
from recbole_llm.evaluation.comparison import paired_test, row_of
from recbole_llm.evaluation.pictures import MISSING_PLOTS, can_draw, draw_heat


def tables(
    rows: Sequence[str],
    columns: Sequence[str],
    baseline: str,
    metric: str,
    places: Mapping[tuple[str, str], Mapping[tuple[str, str], Mapping[str, Any]]],
) -> list[dict[str, Any]]:
    """A table a data set and protocol, as plain data.

    Args:
        rows, columns: their names, in order.
        baseline: the row the others are set against.
        metric: e.g. ``NDCG@10``.
        places: by data set and protocol, then by row and column: ``files`` (results, one a seed) and ``errors``
            (reason to seeds).

    Returns:
        Tables with ``dataset``, ``protocol``, ``splits`` by column, and ``rows``: name to cells by column, each with
        ``seeds``, ``mean``, ``std``, ``seconds`` (to train, mean), and against the baseline of its column
        ``difference``, ``gain`` (relative) and ``p`` (paired t-test over users, seeds averaged first); ``errors`` where
        runs failed.
    """
    made = []
    for (dataset, protocol), table in places.items():
        lines: dict[str, dict[str, Any]] = {row: {} for row in rows}
        splits: dict[str, Any] = {}
        for column in columns:
            base = table[baseline, column]["files"]
            for row in rows:
                place = table[row, column]
                lines[row][column] = _cell(row, place, base if row != baseline else [], metric)
                if place["files"] and column not in splits:
                    split = json.loads(place["files"][0].read_text(encoding="utf-8"))["split"]
                    splits[column] = {key: split[key] for key in ("fingerprint", "train", "valid", "test")}
        made.append({"dataset": dataset, "protocol": protocol, "splits": splits, "rows": lines})
    return made


def _cell(row: str, place: Mapping[str, Any], base: Sequence[Path], metric: str) -> dict[str, Any]:
    results = [json.loads(file.read_text(encoding="utf-8")) for file in place["files"]]
    errors = {reason: list(seeds) for reason, seeds in place["errors"].items()}
    cell: dict[str, Any] = {"seeds": [result["seed"] for result in results], "errors": errors}
    if not results:
        return cell
    values = [result["test"][metric.lower()] for result in results]
    cell |= {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "seconds": mean(sum(stage["seconds"] for stage in result["stages"]) for result in results),
    }
    if base:
        try:
            own, other = (row_of(name, files, like=base[0]) for name, files in ((row, place["files"]), ("base", base)))
            difference, p = paired_test(own, other, metric.lower())
            level = float(other.values[metric.lower()].mean())
            cell |= {"difference": difference, "gain": difference / level if level else None, "p": p}
        except UserError as error:
            errors[str(error)] = cell["seeds"]
    return cell


def markdown(title: str, metric: str, baseline: str, seeds: Sequence[int], made: Sequence[Mapping[str, Any]]) -> str:
    """The tables as Markdown; a cell reads mean ± deviation over seeds (gain over the baseline, p)."""
    lines = [
        f"# {title}",
        "",
        f"{metric} on test, mean ± standard deviation over {len(seeds)} seed{'s' * (len(seeds) > 1)}. In brackets: "
        f"relative to {baseline} in the same column, and p of a paired t-test over users, seeds averaged first "
        "(no correction).",
    ]
    for table in made:
        columns = list(next(iter(table["rows"].values())))
        lines += ["", f"## {' '.join(filter(None, (table['dataset'], table['protocol'])))}", ""]
        lines += [f"| row | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row, cells in table["rows"].items():
            lines.append(f"| {row} | {' | '.join(_shown(cells[column], len(seeds)) for column in columns)} |")
        lines.append("")
        for column, split in table["splits"].items():
            counts = ", ".join(f"{split[phase]} {phase}" for phase in ("train", "valid", "test") if phase in split)
            lines.append(f"- {column or 'all columns'}: split `{str(split['fingerprint'])[:16]}`, {counts}")
        for row, cells in table["rows"].items():
            for column, cell in cells.items():
                for reason, failed in cell["errors"].items():
                    where = f"{row}, {column}" if column else row
                    lines.append(f"- **failed**: {where}, seed {', '.join(map(str, failed))}: {reason}")
    return "\n".join(lines)


def _shown(cell: Mapping[str, Any], seeds: int) -> str:
    if "mean" not in cell:
        return "failed" if cell["errors"] else "…"
    spread = f" ± {cell['std']:.4f}" if cell["std"] else ""
    against = ""
    if cell.get("gain") is not None:
        against = f" ({cell['gain']:+.1%}, p {cell['p']:.2g})"
    some = f", {len(cell['seeds'])} of {seeds} seeds" if len(cell["seeds"]) < seeds else ""
    return f"{cell['mean']:.4f}{spread}{against}{some}"


def pictures(metric: str, baseline: str, made: Sequence[Mapping[str, Any]], folder: Path) -> list[str]:
    """Draw a heat map a table: each row's gain over the baseline at the same column.

    Returns:
        Lines that say where they are, or why there are none.
    """
    if not can_draw():
        return [f"picture     none: {MISSING_PLOTS}"]
    lines = []
    for table in made:
        rows = [row for row in table["rows"] if row != baseline]
        columns = list(next(iter(table["rows"].values())))
        gains = [[table["rows"][row][column].get("gain") for column in columns] for row in rows]
        if not rows or not any(gain is not None for line in gains for gain in line):
            continue
        values = np.array([[np.nan if gain is None else gain for gain in line] for line in gains])
        name = "-".join(filter(None, (table["dataset"], table["protocol"])))
        title = f"{metric} relative to {baseline} in the same column, {name}"
        draw_heat(values, rows, columns, title, f"{metric}, {baseline} = 0", folder / f"{name}.png")
        lines.append(f"picture     {folder / f'{name}.png'}")
    return lines
