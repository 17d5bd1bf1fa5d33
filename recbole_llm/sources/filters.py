"""Which interactions stay: the filters of the papers, over arrays of integers."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from recbole_llm.errors import UserError

NO_METADATA, ROW, TITLE = 0, 1, 2


@dataclass
class Rows:
    """Interactions in the file's order; 40 bytes each.

    Attributes:
        users: index of the user in order of appearance, int32 ``[n]``.
        items: index of the item likewise, int32 ``[n]``.
        ratings: float64 ``[n]``, NaN where there is none.
        times: seconds since 1970 in UTC, float64 ``[n]``.
        lines: number of the row's line, int64 ``[n]``, ascending.
        editions: the item as it was read, int32 ``[n]``; another than ``items`` where titles are merged.
    """

    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    times: np.ndarray
    lines: np.ndarray
    editions: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def where(self, keep: np.ndarray) -> Rows:
        """The rows of a mask."""
        return Rows(*(getattr(self, column.name)[keep] for column in fields(self)))


def filtered(rows: Rows, metadata: np.ndarray, settings: dict[str, Any]) -> tuple[Rows, list[dict[str, Any]]]:
    """Apply the filters in the order of ``properties/sources/overall.yaml``.

    Args:
        rows: all interactions.
        metadata: ``NO_METADATA``, ``ROW`` or ``TITLE`` of each item, ``[n_items]``.
        settings: the filters' settings.

    Returns:
        The rows that stay, and what each filter took: its setting as text, rows, users and items left.

    Raises:
        UserError: nothing is left; the filter that took the last row is named.
    """
    steps = [_step("read", rows)]

    def apply(name: str, keep: np.ndarray) -> None:
        nonlocal rows
        before, rows = len(rows), rows.where(keep)
        steps.append(_step(name, rows))
        if before and not len(rows):
            raise UserError(f"no interaction is left: {name} takes the last {before} of {steps[0]['interactions']}")

    if settings["min_rating"] is not None:
        # A row without a rating is no row with a low one, but nothing says that it is good enough either.
        apply(f"min_rating {settings['min_rating']:g}", rows.ratings >= settings["min_rating"])
    window = _window(settings, rows.times)
    if window is not None:
        apply(window[0], (rows.times >= window[1]) & (rows.times < window[2]))
    if settings["repeats"] != "all":
        apply(f"repeats {settings['repeats']}", one_of_each(rows, settings["repeats"]))
    if settings["item_metadata"] != "none":
        least = {"row": ROW, "title": TITLE}[settings["item_metadata"]]
        apply(f"item_metadata {settings['item_metadata']}", metadata[rows.items] >= least)
    cores = settings["user_core"], settings["item_core"]
    if max(cores) > 1:
        apply(f"user_core {cores[0]}, item_core {cores[1]}", k_core(rows.users, rows.items, *cores))
    return rows, steps


def _step(name: str, rows: Rows) -> dict[str, Any]:
    users, items = (len(np.unique(column)) for column in (rows.users, rows.items))
    return {"filter": name, "interactions": len(rows), "users": users, "items": items}


def k_core(users: np.ndarray, items: np.ndarray, user_core: int, item_core: int) -> np.ndarray:
    """The largest part in which every user and every item has enough rows; it is the same whoever goes first.

    Args:
        users: non-negative integers ``[n]``.
        items: likewise.
        user_core: least rows of a user.
        item_core: least rows of an item.

    Returns:
        Mask, bool ``[n]``.
    """
    kept = np.arange(len(users))
    while len(kept):
        enough = (np.bincount(users[kept]) >= user_core)[users[kept]]
        enough &= (np.bincount(items[kept]) >= item_core)[items[kept]]
        if enough.all():
            break
        kept = kept[enough]
    mask = np.zeros(len(users), dtype=bool)
    mask[kept] = True
    return mask


def one_of_each(rows: Rows, which: str) -> np.ndarray:
    """The earliest (``first``) or latest (``last``) row of every pair of user and item.

    Of rows at one time the file's order decides.

    Returns:
        Mask, bool ``[n]``.
    """
    mask = np.zeros(len(rows), dtype=bool)
    if not len(rows):
        return mask
    pairs = pair_keys(rows.users, rows.items)
    # Stable, so rows of one time stay in the file's order.
    order = np.lexsort((rows.times, pairs))
    change = pairs[order][1:] != pairs[order][:-1]
    mask[order[np.r_[True, change] if which == "first" else np.r_[change, True]]] = True
    return mask


def pair_keys(users: np.ndarray, items: np.ndarray) -> np.ndarray:
    """One integer for each pair of user and item, int64."""
    return users.astype(np.int64) << 32 | items.astype(np.int64)


def _window(settings: dict[str, Any], times: np.ndarray) -> tuple[str, float, float] | None:
    """What the window is called, its first second and the one after its last; ``None`` where there is none."""
    since, until, months = (settings[key] for key in ("since", "until", "months"))
    if since is None and until is None and months is None:
        return None
    names, low, high = [], -np.inf, np.inf
    if since is not None:
        low = _day("since", since).timestamp()
        names.append(f"since {since}")
    if until is not None:
        high = _day("until", until).timestamp() + timedelta(days=1).total_seconds()
        names.append(f"until {until}")
    if months is not None:
        inside = times[(times >= low) & (times < high)]
        if len(inside):
            low = max(low, _months_before(float(inside.max()), months))
        names.append(f"months {months}")
    return ", ".join(names), low, high


def check_days(settings: dict[str, Any]) -> None:
    """Refuse days that are none, before anything is read."""
    for key in ("since", "until"):
        if settings[key] is not None:
            _day(key, settings[key])


def _day(key: str, text: str) -> datetime:
    try:
        return datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise UserError(f"{key} should be a day, YYYY-MM-DD, but is {text!r}") from None


def _months_before(time: float, months: int) -> float:
    """The same day of the month and time of day so many months earlier, or that month's last day."""
    latest = datetime.fromtimestamp(time, UTC)
    year, month = divmod(latest.year * 12 + latest.month - 1 - months, 12)
    day = latest.day
    while True:
        try:
            return latest.replace(year=max(year, 1), month=month + 1, day=day).timestamp()
        except ValueError:
            day -= 1
