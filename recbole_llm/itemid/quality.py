"""The quality card of a codebook: do items keep apart, are codes in use, do like items share their first codes?

Figures stand beside what they would be if codes said nothing: items hashed at random, two items drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.errors import UserError

if TYPE_CHECKING:
    from recbole_llm.itemid.codebook import ResidualCodebook

SCHEMA = 1
NEIGHBOURS = 10
# Neighbours are looked up for at most so many items, among all of them.
QUERIES = 10_000
# Prefixes of so many levels are compared between neighbours; a fourth hardly ever agrees.
AGREEING_LEVELS = 3
LARGEST_GROUPS = 5
GROUP_EXAMPLES = 4
ROWS_AT_ONCE = 8192

Codes = np.ndarray | Tensor


def card(
    codes: Codes,
    sizes: Sequence[int],
    *,
    final_codes: Codes | None = None,
    policy: str | None = None,
    embeddings: Codes | None = None,
    texts: Codes | None = None,
    codebook: ResidualCodebook | None = None,
    names: Sequence[str] | None = None,
    titles: Sequence[str] | None = None,
    neighbours: int = NEIGHBOURS,
    queries: int = QUERIES,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a codebook.

    Args:
        codes: int64 ``[n_items, N]``, as the codebook chose them; rows of -1 have no tokens (row 0 is the padding).
        sizes: codes of each level, N.
        final_codes: int64 ``[n_items, N or more]`` after the collision policy; levels after the Nth are its own.
        policy: the name of the policy.
        embeddings: float ``[n_items, d]``, the points that were quantised.
        texts: float ``[n_items, H]``, text embeddings, to judge the codes by; rows of zeros have no text.
        codebook: what quantised ``embeddings``; with both there are figures of reconstruction.
        names: raw item ids ``[n_items]``, for the largest groups.
        titles: item titles ``[n_items]``, likewise.
        neighbours: how many nearest items count as an item's like.
        queries: items whose neighbours are looked at; of a larger catalogue it is a sample.
        seed: of that sample.

    Returns:
        Plain data, safe for JSON. A share is between 0 and 1, levels count from 1, and ``None`` stands for what was not
        asked for or does not exist::

            schema, items, items_without_tokens, levels, sizes, policy
            collisions: a row for the first 1, 2, ... levels: {levels,
                before, after: {rate, sharing, largest}, hashing: {rate, sharing}}
            usage: a row for each level: {level, size, used, utilisation, entropy (bits), perplexity, gini, max_share,
                counts (of items by code, falling)}
            neighbours: {embeddings, texts: {k, items, queries,
                agreement: a row for the first 1, 2, 3 levels: {levels, share, chance, ratio}}}
            reconstruction: {distance, residual, levels: a row for each: {level, mean_distance, explained}}
            largest_groups: {before, after: [{items, tokens, examples: [{item, title}]}]}

        ``rate`` is ``1 - distinct sequences / items``, ``sharing`` the share of items whose sequence another one has,
        ``largest`` the items of the largest group. ``explained`` is the share of the points' variance that the sum of
        the codes so far explains, for signed residuals alone.

    Raises:
        UserError: tables of different items, a code beyond its level, a number that is none, or no item with tokens.
    """
    before = _whole_rows(codes, sizes, "codes")
    rows = np.flatnonzero(before[:, 0] >= 0)
    if len(rows) == 0:
        raise UserError("no item has tokens: there is no codebook to measure")
    kept = before[rows]
    after = None if final_codes is None else _final(final_codes, before, rows)
    examples = (rows, names, titles)
    points, described = _table(embeddings, before, "embeddings"), _table(texts, before, "text embeddings")
    return {
        "schema": SCHEMA,
        "items": len(rows),
        "items_without_tokens": len(before) - 1 - len(rows),
        "levels": before.shape[1],
        "sizes": [int(size) for size in sizes],
        "policy": policy,
        "collisions": _collisions(kept, after, sizes),
        "usage": [usage(column, size, level) for level, (column, size) in enumerate(zip(kept.T, sizes), 1)],
        "neighbours": {
            kind: None if table is None else neighbour_agreement(table[rows], kept, neighbours, queries, seed)
            for kind, table in (("embeddings", points), ("texts", described))
        },
        "reconstruction": None if points is None or codebook is None else reconstruction(codebook, points[rows], kept),
        "largest_groups": {
            "before": largest_groups(kept, *examples),
            "after": None if after is None else largest_groups(after, *examples),
        },
    }


# --- what is handed in -----------------------------------------------------------------------------------------------
def _array(table: Codes) -> np.ndarray:
    return table.detach().cpu().numpy() if isinstance(table, Tensor) else np.asarray(table)


def _whole_rows(codes: Codes, sizes: Sequence[int], what: str) -> np.ndarray:
    """The codes as an array, every row of which has all its codes or none."""
    table = _array(codes)
    if table.ndim != 2 or table.shape[1] != len(sizes):
        raise UserError(f"{what} of shape {list(table.shape)} are not those of {len(sizes)} levels")
    partial = np.flatnonzero((table < 0).any(1) & (table >= 0).any(1))
    if len(partial):
        raise UserError(f"{what}: item {partial[0]} has a code at some levels only: {table[partial[0]].tolist()}")
    beyond = np.argwhere(table >= np.asarray(sizes))
    if len(beyond):
        item, level = beyond[0].tolist()
        raise UserError(
            f"{what}: item {item} has code {table[item, level]} at level {level + 1}, which has {sizes[level]} codes"
        )
    return table.astype(np.int64, copy=False)


def _final(codes: Codes, before: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The codes after the policy, of the items that have tokens."""
    table = _array(codes).astype(np.int64, copy=False)
    if len(table) != len(before) or not np.array_equal(np.flatnonzero(table[:, 0] >= 0), rows):
        raise UserError("the codes before and after the collision policy are not of the same items")
    return table[rows]


def _table(table: Codes | None, codes: np.ndarray, what: str) -> np.ndarray | None:
    """Float32 rows, one for each row of the codes; those of items with tokens are numbers."""
    if table is None:
        return None
    made = np.ascontiguousarray(_array(table), dtype=np.float32)
    if len(made) != len(codes):
        raise UserError(f"{len(made)} {what} for codes of {len(codes)} items: they are not of the same data set")
    wrong = np.flatnonzero(~np.isfinite(made).all(1) & (codes[:, 0] >= 0))
    if len(wrong):
        raise UserError(f"{len(wrong)} {what} hold a value that is no number, the first that of item {wrong[0]}")
    return made


# --- items kept apart ------------------------------------------------------------------------------------------------
def prefix_groups(codes: np.ndarray) -> list[np.ndarray]:
    """Which items share their first 1, 2, ... codes.

    Args:
        codes: int64 ``[n, N]``, none negative.

    Returns:
        N arrays int64 ``[n]``: the number of the group each item is in.
    """
    groups, group = [], np.zeros(len(codes), dtype=np.int64)
    for column in codes.T:
        # Renumbered at each level, so that no number of levels overflows.
        group = np.unique(group * (int(column.max()) + 1) + column, return_inverse=True)[1]
        groups.append(group)
    return groups


def collisions(group: np.ndarray) -> dict[str, Any]:
    """How many items cannot be told apart.

    Args:
        group: int64 ``[n]``, equal for equal items, counted from 0 without gaps.

    Returns:
        ``rate``, 1 - groups / items (LC-Rec's collision rate); ``sharing``, the share of items that are not alone;
        ``largest``, the items of the largest group.
    """
    counts = np.bincount(group)
    shared = counts[counts > 1].sum()
    return {
        "rate": 1 - len(counts) / len(group),
        "sharing": float(shared / len(group)),
        "largest": int(counts.max()),
    }


def hashing(items: int, cells: int) -> dict[str, float]:
    """What :func:`collisions` is expected to be where each item is put into one of many cells at random.

    Of S cells, I items leave ``S (1 - 1/S)^I`` empty; an item is alone with probability ``(1 - 1/S)^(I - 1)``.

    Args:
        items: I, at least 1.
        cells: S, at least 1: the product of the levels' sizes.

    Returns:
        ``rate`` and ``sharing``.
    """
    # Logarithms, as 1 - 1/S rounds to 1 where there are many cells.
    stay = math.log1p(-1 / cells) if cells > 1 else -math.inf
    distinct = -cells * math.expm1(items * stay)
    sharing = -math.expm1((items - 1) * stay) if items > 1 else 0.0
    return {"rate": max(0.0, 1 - distinct / items), "sharing": sharing}


def _collisions(before: np.ndarray, after: np.ndarray | None, sizes: Sequence[int]) -> list[dict[str, Any]]:
    chosen = prefix_groups(before)
    given = [] if after is None else prefix_groups(after)
    rows = []
    for level in range(max(len(chosen), len(given))):
        own = level < len(chosen)
        rows.append({
            "levels": level + 1,
            "before": collisions(chosen[level]) if own else None,
            "after": collisions(given[level]) if level < len(given) else None,
            "hashing": hashing(len(before), math.prod(int(size) for size in sizes[: level + 1])) if own else None,
        })  # fmt: skip
    return rows


def largest_groups(
    codes: np.ndarray, rows: np.ndarray, names: Sequence[str] | None, titles: Sequence[str] | None
) -> list[dict[str, Any]]:
    """The largest groups of items with equal tokens, the largest first; a group of one is none.

    Args:
        codes: int64 ``[n, N]``.
        rows: int64 ``[n]``, the internal id of each.
        names: raw ids by internal id; without them the internal ids stand.
        titles: by internal id.

    Returns:
        At most 5: ``items`` of the group, ``tokens`` they share, ``examples`` of at most 4 ``{item, title}``.
    """
    group = prefix_groups(codes)[-1]
    counts = np.bincount(group)
    found = []
    for number in np.argsort(-counts, kind="stable")[:LARGEST_GROUPS]:
        if counts[number] < 2:
            break
        members = np.flatnonzero(group == number)
        found.append({
            "items": int(counts[number]),
            "tokens": codes[members[0]].tolist(),
            "examples": [
                {
                    "item": str(item if names is None else names[item]),
                    "title": None if titles is None else str(titles[item]),
                }
                for item in rows[members[:GROUP_EXAMPLES]].tolist()
            ],
        })  # fmt: skip
    return found


# --- codes in use ----------------------------------------------------------------------------------------------------
def usage(column: np.ndarray, size: int, level: int) -> dict[str, Any]:
    """How evenly one level's codes are used.

    Args:
        column: int64 ``[n]``, the items' codes at this level.
        size: C, codes of the level.
        level: its number, counted from 1.

    Returns:
        The row of the card, see :func:`card`. ``perplexity`` is 2^entropy, the number of codes that would have this
        entropy if used evenly; ``gini`` is 0 for even use and near 1 where one code has everything.
    """
    counts = np.sort(np.bincount(column, minlength=size))
    shares = counts / len(column)
    used = shares[shares > 0]
    entropy = float(-(used * np.log2(used)).sum()) + 0.0  # no -0.0
    place = np.arange(1, size + 1)
    return {
        "level": level,
        "size": int(size),
        "used": len(used),
        "utilisation": len(used) / size,
        "entropy": entropy,
        "perplexity": 2**entropy,
        "gini": float(((2 * place - size - 1) * shares).sum() / size),
        "max_share": float(shares[-1]),
        "counts": counts[::-1].tolist(),
    }


# --- like items, like codes ------------------------------------------------------------------------------------------
def prefix_chance(group: np.ndarray) -> float:
    """The probability that two distinct items drawn at random are in one group: ``sum n (n - 1) / I (I - 1)``.

    Args:
        group: int64 ``[I]``, see :func:`prefix_groups`; at least two items.
    """
    counts = np.bincount(group).astype(np.float64)
    return float((counts * (counts - 1)).sum() / (len(group) * (len(group) - 1)))


def nearest_rows(rows: np.ndarray, asked: np.ndarray, k: int) -> np.ndarray:
    """The nearest other rows by cosine, by exact search.

    Args:
        rows: float32 ``[n, d]``, none of zeros.
        asked: int64 ``[q]``, rows to look at.
        k: how many; below n.

    Returns:
        int64 ``[q, k]``, the nearest first.
    """
    import faiss

    unit = np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    found = index.search(unit[asked], k + 1)[1]
    other = found != asked[:, None]
    # Where more than k equal rows stand before a row, it is not among its own nearest, and the last found is too many.
    other[other.all(1), -1] = False
    return found[other].reshape(len(asked), k)


def neighbour_agreement(
    points: np.ndarray, codes: np.ndarray, k: int, queries: int, seed: int
) -> dict[str, Any] | None:
    """How often an item's nearest items by cosine share its first 1, 2, 3 codes, beside two items drawn at random.

    Args:
        points: float32 ``[n, d]``; a row of zeros has no direction and takes no part.
        codes: int64 ``[n, N]``.
        k: how many neighbours an item has; fewer where there are fewer items.
        queries: items looked at, at most.
        seed: of their sample.

    Returns:
        ``k``, ``items`` that take part, ``queries`` looked at, and the rows of ``agreement`` (``ratio`` is ``None``
        where no two items share the prefix); ``None`` where fewer than two items take part.
    """
    taking_part = np.flatnonzero(points.any(1))
    points, codes = points[taking_part], codes[taking_part]
    count = len(points)
    k = min(k, count - 1)
    if k < 1:
        return None
    asked = np.arange(count)
    if count > queries:
        asked = np.sort(np.random.default_rng(seed).choice(count, queries, replace=False))
    near = nearest_rows(points, asked, k)
    agreement = []
    for level, group in enumerate(prefix_groups(codes[:, :AGREEING_LEVELS]), 1):
        share, chance = float((group[near] == group[asked, None]).mean()), prefix_chance(group)
        agreement.append({
            "levels": level, "share": share, "chance": chance, "ratio": share / chance if chance else None,
        })  # fmt: skip
    return {"k": k, "items": count, "queries": len(asked), "agreement": agreement}


# --- what the codes keep ---------------------------------------------------------------------------------------------
@torch.no_grad()
def reconstruction(codebook: ResidualCodebook, points: np.ndarray, codes: np.ndarray) -> dict[str, Any]:
    """How near the codes come to the points.

    Args:
        codebook: what chose the codes.
        points: float32 ``[n, d]``.
        codes: int64 ``[n, N]``.

    Returns:
        ``distance`` and ``residual`` of the codebook, and by level the mean distance of its input to the chosen code
        and the share of the points' variance explained so far (``None`` unless residuals are signed and points differ).
    """
    levels = codebook.levels.cpu().double()
    distance, left = np.zeros(len(levels)), np.zeros(len(levels))
    for first in range(0, len(points), ROWS_AT_ONCE):
        rows = torch.from_numpy(points[first : first + ROWS_AT_ONCE]).to(codebook.levels.device)
        chosen = torch.from_numpy(codes[first : first + ROWS_AT_ONCE]).to(rows.device)
        inputs = codebook.residuals(rows, chosen)
        for level in range(len(levels)):
            near = codebook.distances(level, inputs[:, level]).gather(1, chosen[:, level, None])
            distance[level] += near.double().sum().item()
            miss = inputs[:, level].cpu().double() - levels[level, chosen[:, level].cpu()]
            left[level] += miss.square().sum().item()
    spread = float(np.square(points.astype(np.float64) - points.mean(0, dtype=np.float64)).sum())
    signed = codebook.residual == "signed" and spread > 0
    return {
        "distance": codebook.distance,
        "residual": codebook.residual,
        "levels": [
            {
                "level": level + 1,
                "mean_distance": distance[level] / len(points),
                "explained": 1 - left[level] / spread if signed else None,
            }
            for level in range(len(levels))
        ],
    }
