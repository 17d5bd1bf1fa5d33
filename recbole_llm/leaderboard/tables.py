"""A leaderboard's plain data as a terminal table, CSV and JSON, and all its files written."""

from __future__ import annotations

import csv
import io
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.disk import write_whole
from recbole_llm.evaluation.consistency import is_consistency
from recbole_llm.leaderboard.choice import label
from recbole_llm.leaderboard.markdown import markdown
from recbole_llm.leaderboard.words import (
    UNKNOWN,
    agreement,
    amount,
    chosen,
    comparators,
    judged,
    left_out,
    own_bases,
    pairs,
    reasons,
    seconds,
    settled,
    title_of,
    unlike_seeds,
    unshared,
    value,
)

WIDTH = 120
NAME_WIDTH = 30
STARRED = re.compile(r"(\d\.\d+)\*")
ANSI_BOLD, ANSI_END = "\x1b[1m", "\x1b[0m"
TESTED = (
    "difference",
    "low",
    "high",
    "gain",
    "effect",
    "p",
    "p_adjusted",
    "wilcoxon_p",
    "mark",
    "seeds_alike",
    "seeds_both",
    "seeds_p",
)
COSTS = ("seconds", "peak_memory_mb", "parameters", "trainable", "tokens", "users_per_second")
CSV_COLUMNS = (
    "dataset", "protocol", "column", "row", "model", "kind", "baseline", "seeds", "metric", "mean", "low", "high",
    "std", "valid", "bold", "best_baseline", *(f"best_baseline_{name}" for name in TESTED), "reference",
    *(f"reference_{name}" for name in TESTED), "tests", "own_base", *(f"own_base_{name}" for name in TESTED), "pairs",
    "choice", *COSTS, "failed", "refused", "split",
)  # fmt: skip


def write(board: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write ``leaderboard.md``, ``leaderboard.csv`` and ``leaderboard.json``.

    Args:
        board: the leaderboard's plain data.
        folder: where they go; made if need be.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"md": markdown(board), "csv": csv_text(board), "json": json_text(board)}
    paths = []
    for suffix, text in contents.items():
        path = folder / f"leaderboard.{suffix}"
        content = text.encode()
        write_whole(path, lambda part, content=content: part.write_bytes(content))  # type: ignore[misc]
        paths.append(path)
    return paths


def json_text(board: Mapping[str, Any]) -> str:
    """The plain data itself; standard JSON, which knows no NaN."""
    return json.dumps(board, indent=1, allow_nan=False) + "\n"


def csv_text(board: Mapping[str, Any]) -> str:
    """A line a row and metric, always with the columns of ``CSV_COLUMNS``; a row without figures has one line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for table in board["tables"]:
        for row in table["rows"]:
            shared = _csv_of_row(table, row)
            for metric in board["metrics"]:
                if metric in row["metrics"]:
                    writer.writerow(shared | {"metric": metric} | _csv_of_figure(table, row["metrics"][metric]))
            if not row["metrics"]:
                writer.writerow(shared)
    return text.getvalue()


def _csv_of_row(table: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **{
            key: table[key] for key in ("dataset", "protocol", "column", "best_baseline", "reference", "tests", "pairs")
        },
        **{key: row[key] for key in ("model", "kind", "baseline")},
        **row["cost"],
        "row": row["name"],
        "own_base": row["against"],
        "choice": label((row["choice"] or {}).get("values") or {}),
        "seeds": " ".join(map(str, row["seeds"])),
        "failed": "; ".join(reasons(row["failed"])),
        "refused": "; ".join(reasons(row["refused"])),
        "split": (table["split"] or {}).get("fingerprint"),
    }


def _csv_of_figure(table: Mapping[str, Any], figure: Mapping[str, Any]) -> dict[str, Any]:
    line = {key: figure[key] for key in ("mean", "low", "high", "std", "valid", "bold")}
    for other in ("best_baseline", "reference"):
        against = figure["against"].get(table[other])
        line |= {f"{other}_{name}": against[name] for name in TESTED if against}
    line |= {f"own_base_{name}": figure["own"][name] for name in TESTED if figure["own"]}
    return line


def terminal(board: Mapping[str, Any], tty: bool = False) -> str:
    """The tables for a terminal, at most 120 columns wide; metrics for which there is no room are left to the files.

    Args:
        board: the leaderboard's plain data.
        tty: show bold as a terminal does; else with a ``*``.
    """
    parts = [_terminal_table(board, table, tty) for table in board["tables"]]
    return "\n\n".join([board["title"], *parts])


def _terminal_table(board: Mapping[str, Any], table: Mapping[str, Any], tty: bool) -> str:
    metric, rows = board["metric"], table["rows"]
    first = [["", *_short_names([row["name"] for row in rows])], *_figures(board, table)]
    costs = [
        ["seconds", *(seconds(row["cost"]["seconds"]) for row in rows)],
        ["MB", *(amount(row["cost"]["peak_memory_mb"]) for row in rows)],
        ["trainable", *(amount(row["cost"]["trainable"]) for row in rows)],
        ["tokens", *(amount(row["cost"]["tokens"]) for row in rows)],
        ["users/s", *(amount(row["cost"]["users_per_second"]) for row in rows)],
    ]
    more: list[list[str]] = []
    unseen = []
    while costs and len(_aligned([*first, *costs])[0]) > WIDTH:
        unseen.append(costs.pop()[0])
    # Agreement at the same depth stands first: it is what the others leave unsaid.
    cut = metric.partition("@")[2]
    others = sorted(board["metrics"], key=lambda name: not (is_consistency(name) and name.endswith(f"@{cut}")))
    for other in (name for name in others if name != metric):
        column = [other, *(_starred(row["metrics"].get(other)) for row in rows)]
        if len(_aligned([*first, *more, column, *costs])[0]) > WIDTH:
            unseen.append(other)
        else:
            more.append(column)
    shown = _aligned([*first, *more, *costs])
    lines = [title_of(table), shown[0], "-" * len(shown[0]), *shown[1:]]
    if tty:
        lines = [STARRED.sub(f"{ANSI_BOLD}\\1{ANSI_END} ", line) for line in lines]
    legend = [part for line in _legend(board, table, unseen, tty) for part in textwrap.wrap(line, WIDTH)]
    return "\n".join([*(line.rstrip() for line in lines), "", *legend])


def _figures(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[list[str]]:
    """The columns of the metric that is ranked by."""
    figures = [row["metrics"].get(board["metric"]) for row in table["rows"]]
    columns = [
        [board["metric"], *map(_starred, figures)],
        ["95% CI", *map(_interval, figures)],
    ]
    for other, what in comparators(table).items():
        head = "vs base" if "baseline" in what else "vs ref"
        columns.append([head, *(_mark(figure, other) for figure in figures)])
    if pairs(table):
        own = [figure["own"] if figure else None for figure in figures]
        columns.append(["vs own", *((test["mark"] or "=") if test else "" for test in own)])
    return columns


def _legend(board: Mapping[str, Any], table: Mapping[str, Any], unseen: Sequence[str], tty: bool) -> list[str]:
    others = comparators(table)
    bold = "bold" if tty else "*"
    lines = [judged(table), *unshared(table), chosen(board, table), *own_bases(board, table)]
    lines += [*unlike_seeds(board, table), *settled(table)]
    lines += agreement(table)
    if others:
        standard = next(iter(others))
        lines.append(f"{bold}: significantly above {standard} (for {standard}: above every other row)")
        named = ", ".join(f"vs {'base' if 'baseline' in what else 'ref'}: {name}" for name, what in others.items())
        lines.append(f"{named}; + significantly above, - below, = neither")
    if unseen:
        lines.append(f"no room here for {', '.join(unseen)}")
    lines += [f"{kind}: {name}, {reason}" for kind, name, reason in left_out(table)]
    return lines


def _short_names(names: Sequence[str]) -> list[str]:
    """Names cut to the column's width: at the end or, where that makes two alike, at the front or in the middle."""
    room = NAME_WIDTH - 1
    half = room // 2
    cuts = [
        [name if len(name) <= NAME_WIDTH else cut for name, cut in zip(names, shorter, strict=True)]
        for shorter in (
            [f"{name[:room]}…" for name in names],
            [f"…{name[-room:]}" for name in names],
            [f"{name[:half]}…{name[half - room :]}" for name in names],
        )
    ]
    # A whole name, where there is no other way.
    return [next((cut[place] for cut in cuts if cut.count(cut[place]) == 1), name) for place, name in enumerate(names)]


def _starred(figure: Mapping[str, Any] | None) -> str:
    return UNKNOWN if figure is None else f"{value(figure['mean'])}{'*' if figure['bold'] else ' '}"


def _interval(figure: Mapping[str, Any] | None) -> str:
    return "" if figure is None or figure["low"] is None else f"{value(figure['low'])}-{value(figure['high'])}"


def _mark(figure: Mapping[str, Any] | None, other: str) -> str:
    against = figure["against"] if figure else {}
    return (against[other]["mark"] or "=") if other in against else ""


def _aligned(columns: Sequence[Sequence[str]]) -> list[str]:
    """Columns side by side, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(width) if number else cell.ljust(width) for cell in column]
        for number, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return ["  ".join(cells) for cells in zip(*padded, strict=True)]
