"""A paper's figures beside the rows of a table that stand for its rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.leaderboard.order import orders

_KEYS = ("source", "note", "beside", "rows", "gains", "missing", "figures")
_KINDS: dict[str, type] = {"beside": dict, "rows": dict, "figures": dict, "missing": dict, "gains": list}


def check_paper(path: str, paper: Mapping[str, Any], rows: Mapping[str, Any]) -> None:
    """See that a suite's ``paper`` can be read.

    Args:
        path: of the suite, for errors.
        paper: ``source``; ``note``; ``beside``, our data set to the paper's; ``rows``, our row to the paper's;
            ``gains``, a list of ``[our row, our other row]`` whose relative gains are compared; ``missing``, a row of
            the paper's to why it is not here; ``figures``, by the paper's data set, row and metric.
        rows: the suite's.

    Raises:
        UserError: a key or a row is unknown, or a figure is no number.
    """
    _check_kinds(path, paper)
    for key in ("source", "beside", "rows", "figures"):
        if not paper.get(key):
            raise UserError(f"{path}: paper needs {key}")
    for row in [*paper["rows"], *(row for pair in paper.get("gains", ()) for row in pair)]:
        if row not in rows:
            raise UserError(f"{path}: paper names '{row}', which is no row{did_you_mean(str(row), rows)}")
    for data in paper["beside"].values():
        if data not in paper["figures"]:
            raise UserError(f"{path}: paper.figures has no '{data}'{did_you_mean(str(data), paper['figures'])}")
    for data, rows_of in paper["figures"].items():
        _check_figures(f"{path}: paper.figures.{data}", rows_of)


def _check_figures(where: str, rows: Any) -> None:
    if not isinstance(rows, Mapping):
        raise UserError(f"{where} should read `row: {{metric: figure}}`, but is {rows!r}")
    for row, cells in rows.items():
        if not isinstance(cells, Mapping):
            raise UserError(f"{where}.{row} should read `metric: figure`, but is {cells!r}")
        for metric, figure in cells.items():
            number = isinstance(figure, int | float) and not isinstance(figure, bool)
            if not isinstance(metric, str) or not number or not math.isfinite(figure):
                raise UserError(f"{where}.{row}.{metric} should be a number, but is {figure!r}")


def _check_kinds(path: str, paper: Any) -> None:
    if not isinstance(paper, Mapping):
        raise UserError(f"{path}: paper should read `key: value`, but is {paper!r}")
    for key, value in paper.items():
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key 'paper.{key}'{did_you_mean(key, _KEYS)}")
        if not isinstance(value, _KINDS.get(key, object)):
            raise UserError(f"{path}: paper.{key} should be a {_KINDS[key].__name__}, but is {value!r}")
    for pair in paper.get("gains", ()):
        if not isinstance(pair, list) or len(pair) != 2:
            raise UserError(f"{path}: paper.gains should hold pairs of rows, but has {pair!r}")


def limited_to(paper: Mapping[str, Any], rows: Mapping[str, Any]) -> dict[str, Any]:
    """A suite's ``paper`` for a suite of other rows.

    Args:
        paper: see :func:`check_paper`.
        rows: the other suite's; of the paper's, those with the same names stay, and the gains of one over another.
    """
    return {
        **paper,
        "rows": {name: theirs for name, theirs in paper["rows"].items() if name in rows},
        "gains": [pair for pair in paper.get("gains", ()) if all(name in rows for name in pair)],
        "missing": {},
    }


def beside_paper(paper: Mapping[str, Any], dataset: str, table: Mapping[str, Any]) -> dict[str, Any] | None:
    """The paper's figures, ours, and how far they are apart.

    Args:
        paper: see :func:`check_paper`.
        dataset: ours.
        table: with ``rows``.

    Returns:
        ``source``, ``note``, ``rows`` (name to metrics with ``paper``, ``ours`` and ``deviation`` = ours / paper - 1),
        ``gains`` of one row over another in the paper and here, what is ``missing``, and ``orders``, how far the rows'
        order is the paper's (see :func:`recbole_llm.leaderboard.order.orders`; of several rows that stand for one of
        the paper's, the first counts); ``None`` where the paper has nothing that this data set stands for.
    """
    if dataset not in paper["beside"]:
        return None
    # Metrics in lower case, as in results.
    figures = {
        row: {metric.lower(): value for metric, value in cells.items()}
        for row, cells in paper["figures"][paper["beside"][dataset]].items()
    }
    ours = {row["name"]: {metric: cell["mean"] for metric, cell in row["metrics"].items()} for row in table["rows"]}
    rows = []
    for name, theirs in paper["rows"].items():
        cells = {
            metric: _apart(value, ours.get(name, {}).get(metric)) for metric, value in figures.get(theirs, {}).items()
        }
        if cells:
            rows.append({"name": name if name == theirs else f"{name} (paper: {theirs})", "metrics": cells})
    gains = []
    for name, over in paper.get("gains", ()):
        theirs, base = figures.get(paper["rows"].get(name), {}), figures.get(paper["rows"].get(over), {})
        for metric in theirs:
            if base.get(metric):
                mine, other = ours.get(name, {}).get(metric), ours.get(over, {}).get(metric)
                gains.append({
                    "name": name, "over": over, "metric": metric, "paper": theirs[metric] / base[metric] - 1,
                    "ours": mine / other - 1 if mine is not None and other else None,
                })  # fmt: skip
    return {
        "source": f"{paper['source']}, {paper['beside'][dataset]}",
        "note": paper.get("note", ""),
        "rows": rows,
        "missing": [{"name": name, "why": why} for name, why in paper.get("missing", {}).items()],
        "gains": gains,
        "orders": orders(_paired(paper["rows"], figures, ours)),
    }


def _paired(
    rows: Mapping[str, str], figures: Mapping[str, Mapping[str, float]], ours: Mapping[str, Mapping[str, float]]
) -> dict[str, list[tuple[float, float]]]:
    """By metric, the paper's figure and ours of each of its systems that has both."""
    found: dict[str, list[tuple[float, float]]] = {}
    standing: dict[str, str] = {}
    for name, theirs in rows.items():
        standing.setdefault(theirs, name)
    for theirs, name in standing.items():
        for metric, value in figures.get(theirs, {}).items():
            mine = ours.get(name, {}).get(metric)
            if mine is not None:
                found.setdefault(metric, []).append((value, mine))
    return found


def _apart(paper: float, ours: float | None) -> dict[str, float | None]:
    return {"paper": paper, "ours": ours, "deviation": ours / paper - 1 if ours is not None and paper else None}
