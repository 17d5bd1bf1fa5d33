"""The quality card of a codebook as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of a title, so much is shown.
TITLE_WIDTH = 70
NONE = "-"
GAP = "   "


def as_text(card: Mapping[str, Any]) -> str:
    """A card as aligned columns, each table with a few words on what its figures are.

    Args:
        card: what :func:`recbole_llm.itemid.quality.card` returned, also after a way through JSON.
    """
    sizes = card["sizes"]
    each = f"{sizes[0]} codes each" if len(set(sizes)) == 1 else f"{', '.join(map(str, sizes))} codes"
    without = f", {card['items_without_tokens']} without" if card["items_without_tokens"] else ""
    parts = [
        f"{card['items']} items with tokens{without}; levels: {card['levels']} of {each}",
        _apart(card),
        _used(card),
    ]
    parts += [_alike(card)] if any(card["neighbours"].values()) else []
    parts += [_kept(card)] if card["reconstruction"] else []
    parts += [_groups(card, moment) for moment in ("before", "after") if card["largest_groups"][moment]]
    return "\n\n".join(parts)


def _columns(head: Sequence[str], rows: Sequence[Sequence[str]], above: Mapping[str, int] | None = None) -> list[str]:
    """Cells flush right.

    Args:
        head: the columns' names.
        rows: their cells.
        above: names over the columns after the first, each over so many of them.
    """
    widths = [max(len(row[place]) for row in [head, *rows]) for place in range(len(head))]
    lines, place = [], 1
    if above:
        for name, columns in above.items():
            short = len(name) - sum(widths[place : place + columns]) - len(GAP) * (columns - 1)
            widths[place] += max(0, short)
            lines.append(name.rjust(len(name) - min(0, short)))
            place += columns
        lines = ["  " + GAP.join([" " * widths[0], *lines])]
    return lines + ["  " + GAP.join(cell.rjust(width) for cell, width in zip(row, widths)) for row in [head, *rows]]


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    """A chance level, which may be far below what four decimals show."""
    return NONE if value is None else f"{value:.4f}" if value >= 1e-3 or value == 0 else f"{value:.1e}"


def _apart(card: Mapping[str, Any]) -> str:
    """Collisions by the number of levels."""
    sides = {"before": "as chosen", "hashing": "at random"}
    if card["collisions"][0]["after"]:
        sides = {"before": "as chosen", "after": f"after {card['policy'] or 'policy'}", "hashing": "at random"}
    head = ["levels", *["rate", "sharing"] * len(sides)]
    rows = [
        [str(row["levels"])]
        + [_share(row[side] and row[side][figure]) for side in sides for figure in ("rate", "sharing")]
        for row in card["collisions"]
    ]
    return "\n".join([
        "items kept apart by their first levels",
        *_columns(head, rows, dict.fromkeys(sides.values(), 2)),
        "  rate: 1 - distinct sequences / items; sharing: items whose sequence another one has;",
        "  at random: expected where each item draws its codes by lot",
    ])  # fmt: skip


def _used(card: Mapping[str, Any]) -> str:
    """Use of the codes by level."""
    head = ["level", "codes", "used", "utilisation", "entropy", "perplexity", "gini", "largest share"]
    rows = [
        [str(row["level"]), str(row["size"]), str(row["used"]), f"{row['utilisation']:.1%}", f"{row['entropy']:.2f}"]
        + [f"{row['perplexity']:.1f}", f"{row['gini']:.3f}", f"{row['max_share']:.2%}"]
        for row in card["usage"]
    ]
    return "\n".join([
        "codes in use, as chosen",
        *_columns(head, rows),
        "  entropy in bits; perplexity: so many codes, evenly used, would have this entropy; gini: 0 even, 1 one code",
        "  has all; largest share: items of the code that has most",
    ])  # fmt: skip


def _alike(card: Mapping[str, Any]) -> str:
    """Agreement between neighbours."""
    found = {kind: view for kind, view in card["neighbours"].items() if view}
    names = {"embeddings": "embedding", "texts": "text"}
    head = ["first levels", *["shared", "chance", "times"] * len(found)]
    rows = []
    for level, first in enumerate(next(iter(found.values()))["agreement"]):
        cells = [str(first["levels"])]
        for view in found.values():
            row = view["agreement"][level]
            times = NONE if row["ratio"] is None else f"{row['ratio']:.1f}x"
            cells += [_share(row["share"]), _small(row["chance"]), times]
        rows.append(cells)
    looked = "; ".join(
        f"{names[kind]}: the {view['k']} nearest of {view['items']} items, {view['queries']} looked at"
        for kind, view in found.items()
    )
    return "\n".join([
        "like items, like codes",
        *_columns(head, rows, {f"nearest by {names[kind]}": 3 for kind in found}),
        f"  {looked}",
        "  shared: nearest items by cosine with the same first codes; chance: two items drawn at random",
    ])  # fmt: skip


def _kept(card: Mapping[str, Any]) -> str:
    """Reconstruction by level."""
    view = card["reconstruction"]
    rows = [[str(row["level"]), f"{row['mean_distance']:.4g}", _share(row["explained"])] for row in view["levels"]]
    lines = [
        f"what the codes keep ({view['distance']} distance, {view['residual']} residuals)",
        *_columns(["level", "mean distance", "variance explained"], rows),
        "  mean distance: of a level's input to the chosen code; explained: by the sum of the codes so far",
    ]
    if any(row["explained"] is None for row in view["levels"]):
        lines[-1] = "  mean distance: of a level's input to the chosen code; these codes do not add up to the points"
    return "\n".join(lines)


def _groups(card: Mapping[str, Any], moment: str) -> str:
    """The largest groups of equal items."""
    words = "as chosen" if moment == "before" else f"after {card['policy'] or 'policy'}"
    lines = [f"largest groups of items with equal tokens, {words}"]
    for group in card["largest_groups"][moment]:
        lines.append(f"  {group['items']} items at {'-'.join(map(str, group['tokens']))}")
        width = max(len(example["item"]) for example in group["examples"])
        for example in group["examples"]:
            title = example["title"] or ""
            shown = title if len(title) <= TITLE_WIDTH else title[: TITLE_WIDTH - 3] + "..."
            lines.append(f"    {example['item']:<{width}}  {shown}".rstrip())
        if group["items"] > len(group["examples"]):
            lines.append(f"    and {group['items'] - len(group['examples'])} more")
    return "\n".join(lines)
