"""A leaderboard as Markdown: quality, tests and cost of every row, and all that a reader needs to believe them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from recbole_llm.evaluation.consistency import is_consistency
from recbole_llm.leaderboard.words import (
    UNKNOWN,
    agreement,
    amount,
    chosen,
    comparators,
    judged,
    left_out,
    orders,
    own_bases,
    pairs,
    percent,
    probability,
    seconds,
    seeds_alike,
    settled,
    title_of,
    unlike,
    unlike_seeds,
    unshared,
    value,
)


def markdown(board: Mapping[str, Any]) -> str:
    """The whole leaderboard; a figure is bold only where it is significantly better."""
    commit = f", commit `{board['commit']}`" if board["commit"] else ""
    lines = [
        f"# {_plain(board['title'])}",
        "",
        f"Made {board['made']} by `{board['command']}`{commit}.",
        "",
        "Figures are on test: the mean over users, each user's value averaged over seeds, and in brackets its 95% "
        "confidence interval. **Bold**: significantly above the best baseline (that one: above every other row). + and "
        "-: significantly above and below; =: neither.",
    ]
    for table in board["tables"]:
        lines += ["", f"## {_plain(title_of(table))}", "", *_quality(board, table), "", *_notes(board, table)]
        lines += [*_tests(board, table), *_curve(table), *_cost(table), *_breakdowns(table), *_papers(table)]
    packages = ", ".join(f"{name} {version}" for name, version in board["versions"].items())
    return "\n".join([*lines, *(["", f"Versions: {packages}."] if packages else []), ""])


def _plain(text: Any) -> str:
    """Text that means nothing to Markdown's tables."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _grid(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    ruler = "|---" + "|--:" * (len(heads) - 1) + "|"
    return [f"| {' | '.join(map(_plain, cells))} |" for cells in (heads,)] + [
        ruler,
        *(f"| {' | '.join(map(_plain, cells))} |" for cells in rows),
    ]


def _signed(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:+.4f}"


def _figure(figure: Mapping[str, Any] | None, interval: bool) -> str:
    if figure is None:
        return UNKNOWN
    text = f"**{value(figure['mean'])}**" if figure["bold"] else value(figure["mean"])
    if interval and figure["low"] is not None:
        text += f" [{value(figure['low'])}, {value(figure['high'])}]"
    return text


def _quality(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    metric, others = board["metric"], comparators(table)
    shown = [name for name in board["metrics"] if any(name in row["metrics"] for row in table["rows"])]
    shown = [name for name in shown if name != metric]
    lines = []
    for row in table["rows"]:
        figure = row["metrics"].get(metric)
        against = figure["against"] if figure else {}
        lines.append([
            row["name"],
            _figure(figure, True),
            value(figure["std"]) if figure else UNKNOWN,
            *(_figure(row["metrics"].get(name), is_consistency(name)) for name in shown),
            *(_sign(against[other]) if other in against else "" for other in others),
            *([_own(figure)] if pairs(table) else []),
            str(len(row["seeds"])),
        ])  # fmt: skip
    heads = ["row", metric, "std over seeds", *shown, *(f"against {other}" for other in others)]
    heads += [*(["against its own base"] if pairs(table) else []), "seeds"]
    return _grid(heads, lines)


def _own(figure: Mapping[str, Any] | None) -> str:
    test = figure["own"] if figure else None
    return f"{_sign(test)} {percent(test['gain'])}" if test else ""


def _sign(test: Mapping[str, Any]) -> str:
    """The verdict of a test over users, with the seeds that share its sign where it is significant and not all do."""
    return f"{test['mark'] or '='}{f' ({seeds_alike(test)} seeds)' if unlike(test) else ''}"


def _notes(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    said = (judged(table), *unshared(table), chosen(board, table), *own_bases(board, table))
    said += (*unlike_seeds(board, table), *settled(table), *agreement(table))
    lines = [f"- {_plain(line)}" for line in said]
    for kind, name, reason in left_out(table):
        lines.append(f"- **{kind}**: {_plain(name)}, {_plain(reason)}")
    return lines


def _tests(board: Mapping[str, Any], table: Mapping[str, Any]) -> list[str]:
    def lines_of(metric: str) -> list[list[str]]:
        return [
            [
                f"{row['name']} against {other}", metric, _signed(test["difference"]),
                f"[{_signed(test['low'])}, {_signed(test['high'])}]", percent(test["gain"]),
                UNKNOWN if test["effect"] is None else f"{test['effect']:+.3f}",
                probability(test["p"]), probability(test["p_adjusted"]), probability(test["wilcoxon_p"]),
                seeds_alike(test), probability(test["seeds_p"]), test["mark"] or "=",
            ]
            for row in table["rows"]
            if metric in row["metrics"]
            for other, test in _met(row["metrics"][metric])
        ]  # fmt: skip

    heads = ["rows", "metric", "difference", "95% CI", "gain", "d_z", "p", "p (Holm)", "p (Wilcoxon)"]
    heads += ["seeds alike", "p (seeds)", ""]
    ranked = lines_of(board["metric"])
    if not ranked:
        return []
    said = (
        "Tests: the difference of the means over users, its share of the other row's mean, Cohen's d_z, and p of the "
        "paired t-test as it is, after Holm's correction, and of Wilcoxon's signed-rank test (not corrected). Seeds "
        "alike: those whose own difference has its sign. p (seeds): of a paired t-test over seeds instead of users, "
        "not corrected, which few seeds hardly make small."
    )
    text = ["", said, "", *_grid(heads, ranked)]
    rest = [line for metric in board["metrics"] if metric != board["metric"] for line in lines_of(metric)]
    if rest:
        text += ["", "<details><summary>The other metrics</summary>", "", *_grid(heads, rest), "", "</details>"]
    return text


def _met(figure: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Whom a row was tested against, with the test."""
    own = figure["own"]
    return [*figure["against"].items(), *([(f"its own base {own['row']}", own)] if own else [])]


def _curve(table: Mapping[str, Any]) -> list[str]:
    curve = table["curve"]
    if not curve:
        return []
    lines = ["", f"Metrics on test over {curve['setting']}; *: best {curve['metric']} on valid."]
    if curve["picture"]:
        lines += ["", f"![{', '.join(curve['metrics'])} over {curve['setting']}]({curve['picture']})"]
    rows = [
        [
            line["name"],
            f"{point['value']:g}{'*' if point['best'] else ''}",
            *(_interval(point["metrics"].get(metric)) for metric in curve["metrics"]),
        ]
        for line in curve["lines"]
        for point in line["points"]
    ]
    return [*lines, "", *_grid(["rows", curve["setting"], *curve["metrics"]], rows)]


def _interval(figure: Mapping[str, Any] | None) -> str:
    return _figure(figure and {**figure, "bold": False}, True)


def _cost(table: Mapping[str, Any]) -> list[str]:
    rows = [
        [
            row["name"], seconds(cost["seconds"]), amount(cost["peak_memory_mb"]), amount(cost["parameters"]),
            amount(cost["trainable"]), amount(cost["tokens"]), amount(cost["users_per_second"]),
        ]
        for row in table["rows"]
        if row["runs"]
        for cost in (row["cost"],)
    ]  # fmt: skip
    heads = ["row", "seconds", "peak memory, MB", "parameters", "trainable", "tokens read", "users per second"]
    if not rows:
        return []
    said = (
        "Cost, the mean over seeds: seconds to make all stages (as measured when each was made, found in the cache or "
        "not), most memory held, tokens that a language model read in training, users ranked per second at test."
    )
    return ["", said, "", *_grid(heads, rows)]


def _breakdowns(table: Mapping[str, Any]) -> list[str]:
    lines = []
    for breakdown in table["breakdowns"]:
        heads = ["row", *(f"{group['label']} ({group['count']})" for group in breakdown["groups"])]
        rows = [[name, *map(value, values)] for name, values in breakdown["rows"].items()]
        said = f"{breakdown['metric']} by {breakdown['name']} (in brackets: {breakdown['unit']})"
        lines += ["", f"{_plain(said)}:", "", *_grid(heads, rows)]
    return lines


def _papers(table: Mapping[str, Any]) -> list[str]:
    return [line for paper in table["papers"] for line in _paper(paper)]


def _paper(paper: Mapping[str, Any]) -> list[str]:
    lines = ["", f"The paper's figures beside ours{': ' + _plain(paper['source']) if paper['source'] else ''}."]
    if paper["note"]:
        lines += ["", _plain(paper["note"])]
    rows = [
        [row["name"], metric, value(cell["paper"]), value(cell["ours"]), percent(cell["deviation"])]
        for row in paper["rows"]
        for metric, cell in row["metrics"].items()
    ]
    lines += ["", *_grid(["row", "metric", "paper", "ours", "deviation"], rows)]
    if paper["gains"]:
        gains = [
            [f"{gain['name']} over {gain['over']}", gain["metric"], percent(gain["paper"]), percent(gain["ours"])]
            for gain in paper["gains"]
        ]
        lines += ["", *_grid(["gain", "metric", "paper", "ours"], gains)]
    said = orders(paper)
    if said:
        lines += ["", "The order of the systems beside the paper's, of several rows for one of its systems the first:"]
        lines += ["", *(f"- {line}" for line in said)]
    if paper["missing"]:
        lines += ["", *(f"- not here: {_plain(row['name'])}, {_plain(row['why'])}" for row in paper["missing"])]
    return lines
