"""What came out, in figures, beside what the paper says of its own data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.inspection import LONG
from recbole_llm.sources.filters import Rows

# In the order of the card; what a preset publishes has these names.
FIGURES = (
    "users", "items", "interactions", "mean_length", "median_length", "min_length", "max_length", "long_share",
    "density", "mean_item_degree",
)  # fmt: skip


@dataclass
class Filled:
    """How often a text column says something.

    Attributes:
        rows: read so far.
        filled: of them with a text.
        words: in all texts.
    """

    rows: int = 0
    filled: int = 0
    words: int = 0

    def add(self, text: str) -> None:
        """Count a cleaned text."""
        self.rows += 1
        self.filled += bool(text)
        self.words += text.count(" ") + bool(text)

    def as_dict(self, of: int | None = None) -> dict[str, Any]:
        """As it stands in the card.

        Args:
            of: how many could have a text, if not the rows.
        """
        of = self.rows if of is None else of
        mean = round(self.words / self.filled, 1) if self.filled else 0.0
        share = round(self.filled / of, 4) if of else 0.0
        return {"filled": self.filled, "of": of, "share": share, "mean_words": mean}


def figures(rows: Rows) -> dict[str, Any]:
    """Size and shape of the interactions.

    Args:
        rows: at least one.
    """
    lengths = np.unique(rows.users, return_counts=True)[1]
    n_users, n_items = len(lengths), len(np.unique(rows.items))
    return {
        "users": n_users,
        "items": n_items,
        "interactions": len(rows),
        "mean_length": round(len(rows) / n_users, 3),
        "median_length": float(np.median(lengths)),
        "min_length": int(lengths.min()),
        "max_length": int(lengths.max()),
        "long_share": round(float((lengths > LONG).mean()), 4),
        "density": float(f"{len(rows) / n_users / n_items:.4g}"),
        "mean_item_degree": round(len(rows) / n_items, 3),
    }


def held_against(made: dict[str, Any], published: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures beside the published ones.

    Args:
        made: of :func:`figures`.
        published: of a preset.

    Returns:
        By figure: ``here``, ``paper`` and ``deviation`` (here / paper - 1).
    """
    return {
        name: {"here": made[name], "paper": published[name], "deviation": round(made[name] / published[name] - 1, 4)}
        for name in FIGURES
        if name in published
    }


def card_lines(card: dict[str, Any]) -> list[str]:
    """The card for a terminal."""
    against = card.get("published", {})
    head = f"{'':18}{'here':>14}" + (f"{'paper':>14}{'deviation':>12}" if against else "")
    lines = [head.rstrip()]
    for name in FIGURES:
        line = f"{name:18}{card[name]:>14g}" if name == "density" else f"{name:18}{_number(card[name]):>14}"
        if name in against:
            line += f"{_number(against[name]['paper']):>14}{against[name]['deviation']:>+12.2%}"
        lines.append(line)
    for name, texts in card["texts"].items():
        lines.append(
            f"{name:18}{texts['share']:>14.2%}   {texts['filled']} of {texts['of']}, mean {texts['mean_words']:g} words"
        )
    return lines


def filter_lines(steps: list[dict[str, Any]]) -> list[str]:
    """What each filter left, for a terminal."""
    head = f"{'':34}{'interactions':>14}{'users':>12}{'items':>12}"
    rows = (f"{step['filter']:34}{step['interactions']:>14,}{step['users']:>12,}{step['items']:>12,}" for step in steps)
    return [head, *rows]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
