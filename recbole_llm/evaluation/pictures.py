"""Pictures of results: the one place that draws. Without matplotlib (the extra ``plots``) there are none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.disk import write_whole

MISSING_PLOTS = "matplotlib is not installed (pip install 'recbole-llm[plots]')"


def can_draw() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def _figure(width: float, height: float) -> Any:
    # Not pyplot, which would choose a window system and keep every figure in memory.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    write_whole(path, lambda part: figure.savefig(part, dpi=120))


def draw_maps(
    maps: Mapping[str, tuple[np.ndarray, np.ndarray]], names: tuple[str, str], title: str, path: Path
) -> None:
    """Two clouds of points in pairs, a panel a map.

    Args:
        maps: panel title to the two sides' places, each float [n, 2].
        names: of the two sides.
        title: of the picture.
        path: the PNG.
    """
    figure = _figure(6.0 * len(maps), 6.2)
    for axis, (label, (left, right)) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items(), strict=True):
        ends = np.stack([left, right], axis=1)
        axis.plot(ends[:, :, 0].T, ends[:, :, 1].T, color="0.85", linewidth=0.4, zorder=1)
        for points, color, marker, name in ((left, "tab:orange", "o", names[0]), (right, "tab:blue", "^", names[1])):
            axis.scatter(points[:, 0], points[:, 1], s=10, c=color, marker=marker, linewidths=0, label=name, zorder=2)
        axis.set_title(label)
        axis.set_xticks([])
        axis.set_yticks([])
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    figure.suptitle(title)
    _save(figure, path)


def draw_heat(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], title: str, label: str, path: Path
) -> None:
    """A heat map with its numbers, white at zero.

    Args:
        values: float [rows, columns], shares such as 0.02 for +2%; NaN where there is none.
        rows, columns: their names.
        title: of the picture.
        label: of the colours.
        path: the PNG.
    """
    figure = _figure(2.8 + 1.5 * len(columns), 1.6 + 0.5 * len(rows))
    axis = figure.subplots()
    known = np.abs(values[np.isfinite(values)])
    bound = max(float(known.max()) if len(known) else 0.0, 0.01)
    image = axis.imshow(np.ma.masked_invalid(values), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    for row, line in enumerate(values):
        for column, value in enumerate(line):
            text = f"{value:+.1%}" if np.isfinite(value) else "none"
            dark = np.isfinite(value) and abs(value) > 0.6 * bound
            axis.text(column, row, text, ha="center", va="center", color="white" if dark else "black")
    axis.set_title(title)
    figure.colorbar(image, ax=axis, label=label, format=lambda value, _: f"{value:+.0%}")
    _save(figure, path)


def draw_curves(curve: Mapping[str, Any], title: str, path: Path) -> None:
    """Metrics over a setting, a panel a metric: means with their intervals, and each seed's own mean as a dot.

    Args:
        curve: what :func:`recbole_llm.leaderboard.curve.curve_of` returned.
        title: of the picture.
        path: the PNG.
    """
    metrics, lines = curve["metrics"], curve["lines"]
    figure = _figure(5.6 * len(metrics), 4.6 + 0.22 * ((len(lines) + 1) // 2))
    panels = np.atleast_1d(figure.subplots(1, len(metrics)))
    colours, markers = [f"tab:{name}" for name in _LINES], "osD^vP*X"
    gap = 0.008 * (curve["ticks"][-1]["at"] - curve["ticks"][0]["at"])
    for axis, metric in zip(panels, metrics, strict=True):
        for place, line in enumerate(lines):
            style = {"color": colours[place % len(colours)], "marker": markers[place % len(markers)]}
            # A little beside each other, or their bars would lie on one another.
            _draw_line(axis, line, metric, (place - (len(lines) - 1) / 2) * gap, style)
        axis.set_xticks([tick["at"] for tick in curve["ticks"]], [f"{tick['value']:g}" for tick in curve["ticks"]])
        axis.set_xlabel(f"{curve['setting']} (scale grows like a logarithm)" if curve["scaled"] else curve["setting"])
        axis.set_ylabel(f"{metric} on test")
        axis.grid(color="0.92", linewidth=0.8)
    handles, labels = panels[0].get_legend_handles_labels()
    bars = "bars: 95% interval of the mean over users; dots: each seed"
    ring = f"ring: best {curve['metric']} on valid"
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, title=f"{bars}; {ring}")
    figure.suptitle(title)
    _save(figure, path)


_LINES = ("blue", "orange", "green", "red", "purple", "brown", "pink", "olive")


def _draw_line(axis: Any, line: Mapping[str, Any], metric: str, shift: float, style: Mapping[str, Any]) -> None:
    points = [point for point in line["points"] if metric in point["metrics"]]
    figures = [point["metrics"][metric] for point in points]
    at, means = [point["at"] + shift for point in points], [figure["mean"] for figure in figures]
    # A mean over one user, or none over users, has no interval.
    ends = [
        [abs(figure["mean"] - (figure["mean"] if figure[end] is None else figure[end])) for figure in figures]
        for end in ("low", "high")
    ]
    axis.errorbar(at, means, ends, label=line["name"], linewidth=1.6, elinewidth=0.9, capsize=3, markersize=6, **style)
    for place, figure in zip(at, figures, strict=True):
        if len(figure["seeds"]) > 1:
            axis.scatter([place] * len(figure["seeds"]), figure["seeds"], s=9, color=style["color"], alpha=0.45)
    best = [(point["at"] + shift, point["metrics"][metric]["mean"]) for point in points if point["best"]]
    if best:
        axis.scatter(*zip(*best, strict=True), s=150, facecolors="none", edgecolors=style["color"], linewidths=1.4)


def draw_codebook(card: Mapping[str, Any], path: Path) -> None:
    """The quality card of a codebook: use of the codes, agreement between like items, collisions by level.

    Args:
        card: what :func:`recbole_llm.itemid.quality.card` returned, also after a way through JSON.
        path: the PNG.
    """
    views = {kind: view["agreement"] for kind, view in card["neighbours"].items() if view}
    figure = _figure(16.5 if views else 11.0, 4.8)
    panels = list(np.atleast_1d(figure.subplots(1, 3 if views else 2)))
    _draw_usage(panels[0], card)
    if views:
        _draw_agreement(panels[1], views)
    _draw_collisions(panels[-1], card)
    sizes = " x ".join(map(str, card["sizes"]))
    figure.suptitle(f"Codebook of {card['items']} items, {card['levels']} levels: {sizes}")
    _save(figure, path)


def _draw_usage(axis: Any, card: Mapping[str, Any]) -> None:
    """Items of each code, most used first, a line a level."""
    for row in card["usage"]:
        edges = np.arange(row["size"] + 1) / row["size"]
        label = f"level {row['level']}: {row['utilisation']:.0%} in use"
        axis.stairs(np.array(row["counts"]) * row["size"] / card["items"], edges, label=label, linewidth=1.6)
    axis.axhline(1, color="0.5", linestyle=":", linewidth=1, label="even use")
    axis.set_xlim(0, 1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("codes of the level, most used first")
    axis.set_ylabel("items of a code; 1 is even use")
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axis.set_title("Use of the codes")
    axis.legend(frameon=False)


def _draw_agreement(axis: Any, views: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """How often neighbours share their first codes, bars beside chance."""
    names = {"embeddings": "nearest by embedding", "texts": "nearest by text"}
    bars = {names[kind]: [row["share"] for row in rows] for kind, rows in views.items()}
    first = next(iter(views.values()))
    bars["two items at random"] = [row["chance"] for row in first]
    seen = [value for values in bars.values() for value in values if value > 0]
    floor = 10.0 ** np.floor(np.log10(min(seen, default=0.1)))
    width = 0.8 / len(bars)
    for place, (name, color) in enumerate(
        zip(bars, ("tab:blue", "tab:green", "0.7") if len(bars) > 2 else ("tab:blue", "0.7"))
    ):
        at = np.arange(len(first)) + (place - (len(bars) - 1) / 2) * width
        drawn = axis.bar(at, np.maximum(bars[name], floor), width * 0.94, label=name, color=color)
        axis.bar_label(drawn, [_share_label(value) for value in bars[name]], fontsize=8, padding=2)
    axis.set_yscale("log")
    axis.set_ylim(floor, 6)  # room for the legend
    axis.set_xticks(
        range(len(first)), ["level 1" if row["levels"] == 1 else f"levels 1-{row['levels']}" for row in first]
    )
    axis.set_ylabel("share of pairs with the same codes")
    axis.set_title("Like items, like codes")
    axis.legend(frameon=False)


def _share_label(value: float) -> str:
    return f"{value:.1%}" if value >= 0.001 else "0" if value == 0 else f"{value:.0e}"


def _draw_collisions(axis: Any, card: Mapping[str, Any]) -> None:
    """Collision rate by the number of levels, beside hashing."""
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "before": ("as chosen", {"color": "tab:blue", "marker": "o", "markersize": 9, "fillstyle": "none"}),
        "after": (f"after {card['policy'] or 'the policy'}", {"color": "tab:green", "marker": "s", "linestyle": "--"}),
        "hashing": ("random hashing", {"color": "0.5", "marker": "^", "linestyle": ":"}),
    }
    for side, (name, style) in sides.items():
        rows = [row for row in card["collisions"] if row[side]]
        if not rows:
            continue
        levels, rates = [row["levels"] for row in rows], [row[side]["rate"] for row in rows]
        axis.plot(levels, rates, label=f"{name}: {rates[-1]:.2%} with {levels[-1]} levels", **style)
    axis.set_xticks([row["levels"] for row in card["collisions"]])
    # Rates of 0 are the aim, so the scale has to hold them.
    axis.set_yscale("symlog", linthresh=1e-4, linscale=0.5)
    axis.set_ylim(-2e-5, 1.5)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}" if value else "0")
    axis.set_xlabel("levels")
    axis.set_ylabel("1 - distinct sequences / items")
    axis.set_title("Collisions")
    axis.legend(frameon=False)
