"""Figures and sentences of a leaderboard, the same in every form it is shown in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.evaluation.consistency import is_consistency
from recbole_llm.leaderboard.choice import sentence

UNKNOWN = "-"


def value(number: float | None) -> str:
    """A metric: four decimals."""
    return UNKNOWN if number is None else f"{number:.4f}"


def amount(number: float | None) -> str:
    """A count or a size in three digits: ``12.9k``."""
    if number is None:
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            short = number / size
            return f"{short:.0f}{letter}" if short >= 100 else f"{short:.1f}{letter}"
    return f"{number:.0f}"


def seconds(number: float | None) -> str:
    """A duration in seconds, with decimals where it is short."""
    if number is None:
        return UNKNOWN
    return f"{number:.0f}" if number >= 100 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"


def probability(number: float | None) -> str:
    """A p-value in two digits."""
    return UNKNOWN if number is None else f"{number:.2g}"


def percent(number: float | None) -> str:
    """A share with its sign."""
    return UNKNOWN if number is None else f"{number:+.1%}"


def title_of(table: Mapping[str, Any]) -> str:
    """What a table is of."""
    return " ".join(filter(None, (table["dataset"], table["protocol"], table["column"])))


def comparators(table: Mapping[str, Any]) -> dict[str, str]:
    """The rows that the others are tested against, with what each is: the best baseline, the reference, or both."""
    found: dict[str, str] = {}
    for name, what in ((table["best_baseline"], "best baseline"), (table["reference"], "reference")):
        if name is not None:
            found[name] = f"{found[name]} and {what}" if name in found else what
    return found


def pairs(table: Mapping[str, Any]) -> bool:
    """Whether rows are tested against bases of their own."""
    return any(row.get("against") for row in table["rows"])


def own_bases(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """How many rows are above their own base, and how these tests were corrected."""
    tests = [
        figure["own"] for row in table["rows"] if (figure := row["metrics"].get(board["metric"])) and figure["own"]
    ]
    if not tests:
        return []
    signs = [(test["difference"] > 0) - (test["difference"] < 0) for test in tests]
    above, below = signs.count(1), signs.count(-1)
    marks = [test["mark"] for test in tests]
    return [
        f"Against its own base: {above} of {len(tests)} rows are above it, {marks.count('+')} significantly; {below} "
        f"below, {marks.count('-')} significantly. Paired t-tests over users, seeds averaged first; Holm's correction "
        f"over these {len(tests)} a metric, a family of their own, alpha {board['alpha']:g}."
    ]


def seeds_alike(test: Mapping[str, Any]) -> str:
    """In how many of the seeds that two rows share their difference has its sign; unknown with fewer than two."""
    return f"{test['seeds_alike']} of {test['seeds_both']}" if test["seeds_both"] > 1 else UNKNOWN


def unlike(test: Mapping[str, Any]) -> bool:
    """Whether a difference that is significant over users has another sign in some seed."""
    return bool(test["mark"]) and test["seeds_both"] > 1 and test["seeds_alike"] < test["seeds_both"]


def unlike_seeds(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    """Which differences are significant over users and not of one sign in every seed; none where no row has seeds."""
    tests: dict[frozenset[str], tuple[str, Mapping[str, Any]]] = {}
    for row in table["rows"]:
        figure = row["metrics"].get(board["metric"])
        own = figure["own"] if figure else None
        met = [*(figure["against"].items() if figure else ()), *([(own["row"], own)] if own else [])]
        for other, test in met:
            if test["mark"] and test["seeds_both"] > 1:
                tests.setdefault(frozenset((row["name"], other)), (f"{row['name']} against {other}", test))
    if not tests:
        return []
    others = [f"{words} ({seeds_alike(test)})" for words, test in tests.values() if unlike(test)]
    count = f"{len(tests) - len(others)} of {len(tests)} significant differences of {board['metric']}"
    if not others:
        return [f"One sign in every seed: {count}."]
    return [
        f"One sign in every seed: {count}; not {', '.join(others)}. A test over users tells how sure a difference "
        "between these trained models is, not whether they would differ so if trained again."
    ]


def settled(table: Mapping[str, Any]) -> list[str]:
    """What was chosen on valid for which row, among which values."""
    return [f"Chosen: {sentence(row['name'], row['choice'], value)}" for row in table["rows"] if row["choice"]]


def agreement(table: Mapping[str, Any]) -> list[str]:
    """What consistency means, where a row has it."""
    if not any(is_consistency(metric) for row in table["rows"] for metric in row["metrics"]):
        return []
    return [
        "consistency@K: the share of a row's first K that its own teacher has among its first K, the mean over users. "
        "It says nothing of whether either is right, so it is not tested."
    ]


def orders(paper: Mapping[str, Any]) -> list[str]:
    """How far the systems stand in the paper's order, a line a metric; empty where too few of them are here."""
    return [
        f"{order['metric']}, {order['systems']} systems: Spearman's rho {order['spearman']:+.2f}, "
        f"p {probability(order['spearman_p'])}; Kendall's tau {order['kendall']:+.2f}, "
        f"p {probability(order['kendall_p'])}"
        for order in paper["orders"]
    ]


def reasons(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line a run that failed or was refused."""
    lines = []
    for run in runs:
        seed = "" if run["seed"] is None else f"seed {run['seed']}: "
        lines.append(seed + " ".join(str(run["reason"]).split()))
    return lines


def left_out(table: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Runs that stand in no figure, as (``failed`` or ``refused``, row, reason)."""
    return [
        (kind, row["name"], reason)
        for row in table["rows"]
        for kind in ("failed", "refused")
        for reason in reasons(row[kind])
    ]


def judged(table: Mapping[str, Any]) -> str:
    """The split and the candidate policy."""
    split, evaluation = table["split"], table["evaluation"]
    if not split or not evaluation:
        return "No run of this table counts."
    counts = ", ".join(f"{split[key]} {key}" for key in ("users", "items", "train", "valid", "test") if key in split)
    dropped = split.get("dropped_repeats")
    if dropped:
        counts += f", {dropped} repeats of earlier items dropped"
    policy = ", ".join(
        f"{key} {str(evaluation[key]).lower()}"
        for key in ("policy", "exclude_history", "eval_unit", "ranking", "title_match", "leaking_ids", "test_users")
        if key in evaluation
    )
    told = f"Split {split['fingerprint'][:16]} ({counts}); candidates: {policy}."
    if evaluation.get("eval_unit") == "row":
        told += (
            " A figure is the mean over rankings, one a test interaction (test_users counts these); tests and "
            "intervals take a user's together."
        )
    return told


def unshared(table: Mapping[str, Any]) -> list[str]:
    """What is not the same in the evaluation of all rows, though it leaves them comparable."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in table["rows"]:
        # Hardly two rows have as many ties, and each says so itself.
        for key, content in row["evaluation"].items():
            if key == "tied_targets":
                continue
            found.setdefault(key, {}).setdefault(str(content).lower(), []).append(row["name"])
    lines = []
    for key, by_value in found.items():
        said = [f"{content} for {', '.join(names)}" for content, names in by_value.items()]
        lines.append(f"{key}: {'; '.join(said)}.")
    return lines


def chosen(board: Mapping[str, Any], table: Mapping[str, Any]) -> str:
    """How the best baseline came to be it, and how many tests were corrected together."""
    metric, best = board["metric"], table["best_baseline"]
    if best is None:
        instead = f"; {table['reference']} stands in its place" if table["reference"] else ""
        text = f"No baseline has {metric} on valid, so none is the best one{instead}."
    else:
        known = {
            row["name"]: row["metrics"][metric]["valid"]
            for row in table["rows"]
            if row["baseline"] and row["metrics"].get(metric, {}).get("valid") is not None
        }
        listed = ", ".join(
            f"{name} {value(known[name])}" for name in sorted(known, key=known.__getitem__, reverse=True)
        )
        text = f"Best baseline: {best}, chosen by {metric} on valid, never on test ({listed})."
    return (
        f"{text} Paired t-tests over users, seeds averaged first; Holm's correction over {table['tests']} "
        f"test{'' if table['tests'] == 1 else 's'} a metric, alpha {board['alpha']:g}."
    )
