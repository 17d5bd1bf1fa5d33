"""Pictures of results: the one place that draws. Without matplotlib (the extra ``plots``) there are none."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

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
    figure.savefig(path, dpi=120)


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
    figure.savefig(path, dpi=120)
