"""One metric by row and column: what a suite that varies something shows at one look."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.disk import write_whole
from recbole_llm.evaluation.pictures import MISSING_PLOTS, can_draw, draw_heat


def grids(board: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Mapping[str, Any]]]]:
    """The board's tables of several columns, turned: title to row to column to the table's row.

    Args:
        board: as :func:`recbole_llm.leaderboard.assemble.board_of` makes it.
    """
    made: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for table in board["tables"]:
        if not table["column"]:
            continue
        title = " ".join(filter(None, (table["dataset"], table["protocol"])))
        for row in table["rows"]:
            made.setdefault(title, {}).setdefault(row["name"], {})[table["column"]] = row
    return made


def write_grid(board: Mapping[str, Any], rows: Sequence[str], reference: str | None, folder: Path) -> list[str]:
    """Write ``grid.md`` and, where they can be drawn, heat maps of each row's gain over the reference.

    Args:
        board: the board.
        rows: their names in order.
        reference: the row that the others are set against, column by column.
        folder: where they go.

    Returns:
        Lines that say where they are; none where nothing is varied.
    """
    made = grids(board)
    if not made:
        return []
    columns = list(dict.fromkeys(table["column"] for table in board["tables"]))
    text = _markdown(board, made, rows, columns, reference)
    write_whole(folder / "grid.md", lambda part: part.write_text(text + "\n", encoding="utf-8"))
    lines = [f"grid        {folder / 'grid.md'}"]
    if reference is None:
        return lines
    if not can_draw():
        return [*lines, f"picture     none: {MISSING_PLOTS}"]
    for title, table in made.items():
        others = [row for row in rows if row != reference]
        gains = [
            [_against(table[row][column], board["metric"], reference, "gain") for column in columns] for row in others
        ]
        if any(gain is not None for line in gains for gain in line):
            values = np.array([[np.nan if gain is None else gain for gain in line] for line in gains])
            # A protocol may be called 8/1/1.
            plain = re.sub(r"[^\w.+-]", "-", title)
            metric, path = board["metric"].upper(), folder / f"{plain}.png"
            words = f"{metric} relative to {reference} in the same column, {title}"
            draw_heat(values, others, columns, words, f"{metric}, {reference} = 0", path)
            lines.append(f"picture     {path}")
    return lines


def _against(row: Mapping[str, Any], metric: str, reference: str, what: str) -> float | None:
    return row["metrics"].get(metric, {}).get("against", {}).get(reference, {}).get(what)


def _markdown(
    board: Mapping[str, Any],
    made: Mapping[str, Mapping[str, Mapping[str, Mapping[str, Any]]]],
    rows: Sequence[str],
    columns: Sequence[str],
    reference: str | None,
) -> str:
    words = f"{board['metric'].upper()} on test, mean ± standard deviation over seeds."
    if reference:
        words += (
            f" In brackets: relative to {reference} in the same column, and Holm's p of the paired test over users."
        )
    lines = [f"# {board['title']}", "", words]
    for title, table in made.items():
        heads = " | ".join(map(_plain, columns))
        lines += ["", f"## {title}", "", f"| row | {heads} |", "|---" * (len(columns) + 1) + "|"]
        for row in rows:
            cells = [_cell(table[row][column], board["metric"], reference) for column in columns]
            lines.append(f"| {_plain(row)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _plain(name: str) -> str:
    return name.replace("|", "\\|")


def _cell(row: Mapping[str, Any], metric: str, reference: str | None) -> str:
    figure = row["metrics"].get(metric)
    if figure is None:
        return "failed" if row["failed"] else "refused" if row["refused"] else "…"
    text = f"{figure['mean']:.4f}" + (f" ± {figure['std']:.4f}" if figure["std"] else "")
    against = figure["against"].get(reference)
    if against and against["gain"] is not None:
        text += f" ({against['gain']:+.1%}, p {against['p_adjusted']:.2g})"
    return text
