"""Breakdowns and example users of a table, from what its runs recommended."""

from __future__ import annotations

import json
from typing import Any

from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.evaluation.results import result_file
from recbole_llm.leaderboard.breakdown import breakdowns
from recbole_llm.leaderboard.examples import examples, titles
from recbole_llm.leaderboard.rows import rankings_of


def with_details(table: dict[str, Any], metric: str) -> dict[str, Any]:
    """A table with its ``breakdowns`` and ``users`` filled in.

    Args:
        table: from :func:`recbole_llm.leaderboard.assemble.table_of`; the runs that it counts are of one split.
        metric: what users are judged by, e.g. ``ndcg@10``.

    Returns:
        The same table; rows whose runs have no rankings are left out of both.
    """
    rankings: dict[str, list[Rankings]] = {}
    names: dict[str, str] = {}
    for row in table["rows"]:
        seeds = []
        for run in row["runs"]:
            file = result_file(run)
            result = json.loads(file.read_text(encoding="utf-8"))
            found = rankings_of(file, result)
            if found is not None:
                seeds.append(found)
                names = names or titles(result)
        if seeds and len(seeds) == len(row["runs"]):
            rankings[row["name"]] = seeds
    table["breakdowns"] = breakdowns(rankings, metric)
    table["users"] = examples(rankings, metric, names)
    return table
