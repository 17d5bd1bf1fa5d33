"""What is done about items whose codes are equal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.itemid.codebook import ResidualCodebook
from recbole_llm.itemid.sinkhorn import EPSILON, ITERATIONS, balanced

POLICIES = ("nearest", "sinkhorn", "extra_token", "keep")
# LC-Rec re-encodes the items that collide at most so often.
ROUNDS = 20
# Items whose order of all codes is held at once.
BATCH = 4096


@dataclass(frozen=True)
class Resolved:
    """Codes after a policy.

    Args:
        codes: int64 ``[n, N]``, or ``[n, N + 1]`` with an extra token.
        sizes: the codes of each level.
        changed: items whose codes are others than before (an extra token alone is no change).
        colliding_before: items that shared their codes with another item.
        colliding: items that still do.
    """

    codes: np.ndarray
    sizes: tuple[int, ...]
    changed: int
    colliding_before: int
    colliding: int


def groups_of(codes: np.ndarray) -> np.ndarray:
    """The number of the group of equal codes that each item is in, int64 ``[n]``, from ``codes`` ``[n, N]``."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def by_size(groups: np.ndarray) -> Iterator[np.ndarray]:
    """The members of groups, those of one size together, so that they can be dealt with as batches.

    Args:
        groups: the number of the group that each item is in, int64 ``[n]``.

    Yields:
        Items int64 ``[g, size]``, a row a group, sizes ascending; at most ``BATCH`` items at a time, or one group.
    """
    counts = np.bincount(groups)
    by_group = np.argsort(groups, kind="stable")
    sizes = counts[groups[by_group]]
    for size in np.unique(sizes):
        rows = by_group[sizes == size].reshape(-1, size)
        step = max(1, BATCH // int(size))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]


def colliding(codes: np.ndarray) -> np.ndarray:
    """Which items share their codes with another, bool ``[n]``, from ``codes`` ``[n, N]``."""
    groups = groups_of(codes)
    return np.bincount(groups)[groups] > 1


def check_room(policy: str, items: int, size: int, levels: int) -> None:
    """Refuse, before anything is trained, a policy that cannot keep so many items apart.

    Args:
        policy: see :func:`resolve`.
        items: how many are to have codes.
        size: codes of a level.
        levels: of an item.

    Raises:
        UserError: ``nearest`` with more items than there are sequences of codes.
    """
    if policy == "nearest" and items > size**levels:
        raise UserError(
            f"{items} items cannot have codes of their own: {levels} level(s) of {size} codes make {size**levels}; "
            "take more levels, more codes or another collision policy"
        )


def resolve(
    policy: str, codebook: ResidualCodebook, points: Tensor, codes: Tensor, keys: np.ndarray | None = None
) -> Resolved:
    """Apply a collision policy.

    Within a group of equal codes, items come in the order of their distance from the last level's code, and where that
    is equal too by their key, so that the outcome hangs on the items and not on how they are numbered.

    Args:
        policy: ``nearest``: the first of a group keeps its codes, each other takes the nearest last code that is
            free under its prefix; where none is, the nearest code one level up under which there is one, and so on.
            ``sinkhorn``: LC-Rec's; up to 20 rounds, in each of which every group's last codes are given out
            by Sinkhorn-Knopp; what still collides is left. ``extra_token``: TIGER's; one more level numbers the items
            of a group. ``keep``: nothing.
        codebook: what the codes are of.
        points: ``[n, d]``, what was encoded.
        codes: int64 ``[n, N]``, as encoded.
        keys: ``[n]``, sortable and all different, that an item keeps when items are numbered anew; the row number
            where there are none.

    Returns:
        The codes and what was done.

    Raises:
        UserError: an unknown policy, or ``nearest`` with more items than there are sequences of codes.
    """
    if policy not in POLICIES:
        raise UserError(
            f"a collision policy can be {', '.join(POLICIES)}, but is {policy!r}{did_you_mean(policy, POLICIES)}"
        )
    before = codes.cpu().numpy()
    sizes = (codebook.size,) * codebook.depth
    check_room(policy, len(before), codebook.size, codebook.depth)
    struck = np.flatnonzero(colliding(before))
    after = before.copy()
    if len(struck) and policy != "keep":
        order = _in_order(codebook, points, codes, struck, np.arange(len(before)) if keys is None else keys)
        if policy == "nearest":
            _move_to_nearest(codebook, points, after, order)
        elif policy == "sinkhorn":
            _rounds_of_sinkhorn(codebook, points, after)
    changed = int((after != before).any(axis=1).sum())
    if policy == "extra_token":
        extra = np.zeros((len(before), 1), dtype=np.int64)
        if len(struck):
            extra[order, 0] = _places(groups_of(before)[order])
        after, sizes = (
            np.concatenate([after, extra], axis=1),
            (*sizes, max(codebook.size, int(extra.max(initial=0)) + 1)),
        )
    return Resolved(after, sizes, changed, len(struck), int(colliding(after).sum()))


def place_new(
    policy: str, codebook: ResidualCodebook, points: Tensor, codes: Tensor, settled: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The policy for items that come later: those that have their codes keep them.

    Args:
        policy: as for :func:`resolve`; ``sinkhorn`` deals with a whole catalogue at once and leaves new items as they
            are, like ``keep``.
        codebook: what the codes are of.
        points: ``[n, d]`` of the new items.
        codes: int64 ``[n, N]``, as encoded.
        settled: int64 ``[m, N]``, the codes of the others (``[m, N + 1]`` under ``extra_token``).
        keys: ``[n]``, sortable and all different: new items take their places in this order.

    Returns:
        int64, like ``settled`` ``[n, ...]``.

    Raises:
        UserError: there is no sequence of codes left for all of them.
    """
    made = codes.cpu().numpy().copy()
    if policy == "nearest":
        if len(made) + len(settled) > codebook.size**codebook.depth:
            raise UserError(
                f"{len(made)} new items find {codebook.size**codebook.depth - len(settled)} sequences of codes left; "
                "make the item tokens anew with more levels or more codes"
            )
        taken = _Taken(codebook, settled)
        order = np.argsort(keys, kind="stable")
        for item, nearest in _last_codes_by_distance(codebook, points, made, order):
            own = tuple(made[item].tolist())
            if own in taken.taken:
                made[item] = taken.place(made[item], nearest, points[int(item)])
            else:
                taken.add(own)
    elif policy == "extra_token":
        whole = np.concatenate([settled[:, :-1], made])
        order = np.concatenate([np.lexsort((settled[:, -1],)), len(settled) + np.argsort(keys, kind="stable")])
        extra = np.empty(len(whole), dtype=np.int64)
        extra[order] = _places(groups_of(whole)[order])
        made = np.concatenate([made, extra[len(settled) :, None]], axis=1)
    return made


def _in_order(
    codebook: ResidualCodebook, points: Tensor, codes: Tensor, struck: np.ndarray, keys: np.ndarray
) -> np.ndarray:
    """The colliding items by distance from their last code, then by key."""
    rows = torch.from_numpy(struck).to(codes.device)
    inputs = codebook.residuals(points[rows], codes[rows])[:, -1].double()
    found = []
    for part, chosen in zip(inputs.split(BATCH), codes[rows, -1].to(inputs.device).split(BATCH)):
        found.append(codebook.distances(codebook.depth - 1, part).gather(1, chosen[:, None])[:, 0])
    # Rounded, as the last bits of a matrix product hang on where in it a row stands.
    gaps = torch.cat(found).float().cpu().numpy()
    return struck[np.lexsort((np.asarray(keys)[struck], gaps))]


def _places(groups: np.ndarray) -> np.ndarray:
    """How many of the same group come before each entry."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    lengths = np.diff(np.append(starts, len(ordered)))
    places = np.empty(len(groups), dtype=np.int64)
    places[order] = np.arange(len(groups)) - np.repeat(starts, lengths)
    return places


def _move_to_nearest(codebook: ResidualCodebook, points: Tensor, codes: np.ndarray, order: np.ndarray) -> None:
    """Rewrite the codes of all but the first item of each group; ``order`` holds the colliding items."""
    moving = order[_places(groups_of(codes)[order]) > 0]
    stays = np.ones(len(codes), dtype=bool)
    stays[moving] = False
    taken = _Taken(codebook, codes[stays])
    for item, nearest in _last_codes_by_distance(codebook, points, codes, moving):
        codes[item] = taken.place(codes[item], nearest, points[int(item)])


def _last_codes_by_distance(
    codebook: ResidualCodebook, points: Tensor, codes: np.ndarray, items: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Each item with the last level's codes, nearest first."""
    for start in range(0, len(items), BATCH):
        part = items[start : start + BATCH]
        rows = torch.from_numpy(part)
        inputs = codebook.residuals(points[rows.to(points.device)], torch.from_numpy(codes[part]).to(points.device))
        gaps = codebook.distances(codebook.depth - 1, inputs[:, -1].double())
        yield from zip(part.tolist(), gaps.argsort(dim=1, stable=True).cpu().numpy())


class _Taken:
    """Which code sequences are taken, and under which prefixes none is free."""

    def __init__(self, codebook: ResidualCodebook, codes: np.ndarray) -> None:
        self.codebook = codebook
        self.taken = set(map(tuple, codes.tolist()))
        self.counts: Counter[tuple[int, ...]] = Counter()
        for length in range(codebook.depth):
            self.counts.update(row[:length] for row in self.taken)

    def _full(self, prefix: tuple[int, ...]) -> bool:
        return self.counts[prefix] == self.codebook.size ** (self.codebook.depth - len(prefix))

    def place(self, codes: np.ndarray, nearest: np.ndarray, point: Tensor) -> tuple[int, ...]:
        """Take the free sequence that keeps as long a prefix of ``codes`` as can be.

        Args:
            codes: ``[N]``, the item's.
            nearest: ``[C]``, the last level's codes by their distance from the item.
            point: ``[d]``, the item's vector.
        """
        prefix = tuple(codes[:-1].tolist())
        if not self._full(prefix):
            found = next(row for code in nearest.tolist() if (row := (*prefix, code)) not in self.taken)
        else:
            while self._full(prefix):
                prefix = prefix[:-1]
            found = self._search(prefix, point)
        self.add(found)
        return found

    def add(self, codes: tuple[int, ...]) -> None:
        """A sequence is no longer free."""
        self.taken.add(codes)
        self.counts.update(codes[:length] for length in range(len(codes)))

    def _search(self, prefix: tuple[int, ...], point: Tensor) -> tuple[int, ...]:
        """Under a prefix that is not full: at each level the nearest code under which something is free."""
        inputs = point[None].to(self.codebook.levels.device, torch.float64)
        for level in range(self.codebook.depth):
            if level < len(prefix):
                code = prefix[level]
            else:
                by_distance = self.codebook.distances(level, inputs)[0].argsort(stable=True).tolist()
                code = next(code for code in by_distance if not self._closed((*prefix, code)))
                prefix = (*prefix, code)
            inputs = self.codebook.left_over(inputs, self.codebook.levels[level, code].double())
        return prefix

    def _closed(self, prefix: tuple[int, ...]) -> bool:
        return prefix in self.taken if len(prefix) == self.codebook.depth else self._full(prefix)


def _rounds_of_sinkhorn(codebook: ResidualCodebook, points: Tensor, codes: np.ndarray) -> None:
    """Rewrite last codes, each group as a batch of its own."""
    for _ in range(ROUNDS):
        struck = [batches for batches in by_size(groups_of(codes)) if batches.shape[1] > 1]
        if not struck:
            return
        for batches in struck:
            _spread_last_codes(codebook, points, codes, batches)


def _spread_last_codes(codebook: ResidualCodebook, points: Tensor, codes: np.ndarray, batches: np.ndarray) -> None:
    rows = batches.reshape(-1)
    own = torch.from_numpy(codes[rows]).to(points.device)
    inputs = codebook.residuals(points[torch.from_numpy(rows).to(points.device)], own)[:, -1].double()
    gaps = codebook.distances(codebook.depth - 1, inputs).view(*batches.shape, codebook.size)
    codes[rows, -1] = balanced(gaps, EPSILON, ITERATIONS).flatten().cpu().numpy()
