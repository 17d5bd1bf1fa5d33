"""One split for every model: a phase per interaction, made once, with a fingerprint.

The split is made on the filtered, unaugmented rows, in exact time order (float64, ties by file order), with its own
seed. Nothing here knows about models.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from recbole_llm.data.histories import Histories, runs
from recbole_llm.data.phases import DROPPED, PHASE_NAMES, TEST, TRAIN, VALID, WITHHELD
from recbole_llm.data.withheld import withhold, withhold_fold, withhold_items
from recbole_llm.errors import UserError


@dataclass(frozen=True)
class SplitProtocol:
    """How interactions are divided.

    Attributes:
        kind: ``LS`` (leave one out), ``RS`` (by ratio) or ``TS`` (by global time).
        ratios: train, valid and test shares of RS and TS.
        leave_one_mode: ``valid_and_test``, ``valid_only`` or ``test_only`` of LS.
        by_time: order by time before dividing; otherwise at random.
        group_by_user: divide every user's rows by themselves (RS).
        seed: of the random order.
        short_users: what becomes of users with too few rows: ``drop``, ``train`` or ``refuse``.
        drop_repeats: drop a valid or test row whose item the user already had.
        train_share: share of every user's train rows that training sees; the others are withheld.
        cold_item_share: share of the items of which training sees no row; their train and valid rows are withheld.
        cold_item_choice: which ones: ``random`` or ``newest``.
        fold: which fold of the train rows is withheld, of how many (:mod:`recbole_llm.data.folds`); ``None``, none.
    """

    kind: str
    ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)
    leave_one_mode: str = "valid_and_test"
    by_time: bool = True
    group_by_user: bool = True
    seed: int = 2020
    short_users: str = "drop"
    drop_repeats: bool = True
    train_share: float = 1.0
    cold_item_share: float = 0.0
    cold_item_choice: str = "random"
    fold: tuple[int, int] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The protocol as it stands in ``result.json``."""
        shared: dict[str, Any] = {
            "kind": self.kind,
            "order": "time" if self.by_time else "random",
            "short_users": self.short_users,
        }
        if self.train_share < 1:
            shared |= {"train_share": self.train_share, "split_seed": self.seed}
        if self.cold_item_share > 0:
            shared |= {"cold_item_share": self.cold_item_share, "cold_item_choice": self.cold_item_choice}
            shared |= {"split_seed": self.seed}
        if self.fold is not None:
            shared |= {"fold": list(self.fold), "split_seed": self.seed}
        if self.kind == "LS":
            return shared | {"leave_one_mode": self.leave_one_mode}
        shared |= {"ratios": list(self.ratios)}
        if self.kind == "TS":
            return shared
        shared |= {"group_by": "user" if self.group_by_user else "none"}
        return shared if self.by_time else shared | {"split_seed": self.seed}


@dataclass(frozen=True)
class Split:
    """The divided rows, in time order within each user.

    Attributes:
        users, items: int64 [n], internal ids, sorted by user, then exact time, then file order.
        ranks: int64 [n], position of a row in its user's exact time order (from 0).
        phases: int8 [n]: TRAIN, VALID, TEST, DROPPED or WITHHELD (by ``train_share``, ``cold_item_share`` or ``fold``:
            in no view of training, but known to whoever excludes a user's history).
        rows: int64 [n], the row of the filtered interaction table that each entry is.
        n_users, n_items: numbers of internal ids, padding included.
        candidates: bool [n_items], the items with an interaction after filtering.
        protocol: how it was divided.
        fingerprint: SHA-256, see :func:`fingerprint`.
        dropped_repeats, dropped_users: what was left out.
        cold: bool [n_items], the items that ``cold_item_share`` took from training.
        held: bool [n], the rows of the fold that is withheld, valid rows among them, which it holds once they are train
            rows; all false without a fold.
    """

    users: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    phases: np.ndarray
    rows: np.ndarray
    n_users: int
    n_items: int
    candidates: np.ndarray
    protocol: SplitProtocol
    fingerprint: str = ""
    dropped_repeats: int = 0
    dropped_users: int = 0
    cold: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    held: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    _cache: dict[tuple[int, ...], Histories] = field(default_factory=dict, repr=False, compare=False)

    def histories(self, *phases: int) -> Histories:
        """The items of some phases by user, oldest first.

        Args:
            phases: of TRAIN, VALID, TEST, WITHHELD.
        """
        if phases not in self._cache:
            chosen = np.isin(self.phases, phases)
            self._cache[phases] = Histories.from_rows(self.users[chosen], self.items[chosen], self.n_users)
        return self._cache[phases]

    def count(self, phase: int) -> int:
        """Number of rows of a phase."""
        return int(np.count_nonzero(self.phases == phase))

    def with_valid_in_train(self) -> Split:
        """The same test rows, with the valid rows moved into train: what ``refit_on_valid`` trains on."""
        moved = np.where(self.held, WITHHELD, TRAIN)
        return self._with_phases(np.where(self.phases == VALID, moved, self.phases))

    def with_fold_in_train(self) -> Split:
        """The same rows with those of the withheld fold back in train."""
        return self._with_phases(np.where(self.held & (self.phases == WITHHELD), TRAIN, self.phases))

    def _with_phases(self, phases: np.ndarray) -> Split:
        return replace(self, phases=phases.astype(np.int8), _cache={})

    def as_dict(self) -> dict[str, Any]:
        """The ``split`` block of ``result.json``."""
        cold = {"cold_items": int(self.cold.sum())} if self.protocol.cold_item_share > 0 else {}
        return {
            "fingerprint": self.fingerprint,
            "protocol": self.protocol.as_dict(),
            "users": len(np.unique(self.users[self.phases != DROPPED])),
            "items": int(self.candidates.sum()),
            "train": self.count(TRAIN),
            "valid": self.count(VALID),
            "test": self.count(TEST),
            "withheld": self.count(WITHHELD),
            **cold,
            "dropped_repeats": self.dropped_repeats,
            "dropped_users": self.dropped_users,
        }


def make_split(
    users: np.ndarray,
    items: np.ndarray,
    times: np.ndarray | None,
    file_order: np.ndarray,
    user_tokens: Sequence[str],
    item_tokens: Sequence[str],
    protocol: SplitProtocol,
) -> Split:
    """Divide interactions into train, valid and test.

    Args:
        users: int64 [n], internal user ids (1 up).
        items: int64 [n], internal item ids (1 up).
        times: float64 [n], exact; ``None`` when the data has no time.
        file_order: int64 [n], line order in the file; breaks ties of time.
        user_tokens, item_tokens: raw ids by internal id.
        protocol: how to divide.

    Raises:
        UserError: an order by time without times, users too short under ``short_users: refuse``, or a
            ``cold_item_share`` that some user would not survive.
    """
    if times is None and (protocol.by_time or protocol.kind == "TS"):
        raise UserError(
            "the split is by time, but the data has no timestamp column; set eval_args.order: RO or TIME_FIELD"
        )
    if times is None and protocol.cold_item_share > 0 and protocol.cold_item_choice == "newest":
        raise UserError(
            "cold_item_choice: newest needs a timestamp column; load one (TIME_FIELD, load_col), or set it to random"
        )
    # Without times the rank is the file's order, which nothing but the fingerprint and histories reads.
    clock = np.zeros(len(users)) if times is None else times
    order = np.lexsort((file_order, clock, users))
    users, items, clock, rows = users[order], items[order], clock[order], order
    ranks, lengths = runs(users)

    if protocol.kind == "LS":
        phases = _leave_one_out(ranks, lengths, protocol, users, file_order[order])
    elif protocol.kind == "RS":
        phases = _by_ratio(users, ranks, lengths, clock, file_order[order], protocol)
    elif protocol.kind == "TS":
        phases = _by_global_time(clock, protocol.ratios)
    else:
        raise UserError(f"unknown split {protocol.kind!r}: one of LS, RS, TS")

    phases, dropped_users = _short_users(users, phases, protocol, user_tokens)
    dropped_repeats = 0
    if protocol.drop_repeats:
        phases, dropped_repeats = _drop_repeats(users, items, phases)
    candidates = np.zeros(len(item_tokens), dtype=bool)
    candidates[items] = True
    # Last, so that test rows, users and candidates are the same whatever the shares.
    phases, cold = withhold_items(users, items, clock, phases, candidates, protocol, item_tokens)
    phases = withhold(users, ranks, phases, protocol, user_tokens)
    phases, held = withhold_fold(users, items, ranks, phases, protocol, user_tokens)
    kept = phases != DROPPED
    mark = fingerprint(users[kept], items[kept], ranks[kept], phases[kept], candidates, user_tokens, item_tokens)
    return Split(
        users, items, ranks, phases, rows, len(user_tokens), len(item_tokens), candidates,
        protocol, mark, dropped_repeats, dropped_users, cold, held,
    )  # fmt: skip


def _random_ranks(users: np.ndarray, file_order: np.ndarray, seed: int) -> np.ndarray:
    """A random rank of each row within its user; depends on the seed and the file's order only."""
    draws = np.empty(len(users))
    draws[np.argsort(file_order, kind="stable")] = np.random.Generator(np.random.PCG64(seed)).random(len(users))
    order = np.lexsort((draws, users))
    shuffled, _ = runs(users[order])
    ranks = np.empty(len(users), dtype=np.int64)
    ranks[order] = shuffled
    return ranks


def _leave_one_out(
    ranks: np.ndarray, lengths: np.ndarray, protocol: SplitProtocol, users: np.ndarray, file_order: np.ndarray
) -> np.ndarray:
    if not protocol.by_time:
        ranks = _random_ranks(users, file_order, protocol.seed)
    from_end = lengths - 1 - ranks
    phases = np.full(len(ranks), TRAIN, dtype=np.int8)
    held_out = {"valid_and_test": (TEST, VALID), "valid_only": (VALID,), "test_only": (TEST,)}
    if protocol.leave_one_mode not in held_out:
        raise UserError(f"unknown LS mode {protocol.leave_one_mode!r}: one of {', '.join(held_out)}")
    for back, phase in enumerate(held_out[protocol.leave_one_mode]):
        # The first row always stays in train, as in RecBole (dataset.py:1650): a user of two rows has no valid row.
        phases[(from_end == back) & (ranks > 0)] = phase
    return phases


def _ratio_counts(total: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """How many of ``total`` rows go to each phase, by RecBole's rounding (dataset.py:1610).

    Args:
        total: int64 [m].
        ratios: shares of the phases, which sum to 1.

    Returns:
        int64 [m, 3]. Valid and test are rounded down, and get one row when their share is below one and train
        keeps two.
    """
    shares = total[:, None] * np.asarray(ratios)[None, :]
    counts = shares.astype(np.int64)
    counts[:, 0] = total - counts[:, 1:].sum(axis=1)
    open_ = counts[:, 0] > 1
    for phase in (2, 1):
        give = open_ & (shares[:, phase] > 0) & (shares[:, phase] < 1)
        counts[give, phase] += 1
        counts[give, 0] -= 1
        open_ &= counts[:, 0] > 1
    return counts


def _by_ratio(
    users: np.ndarray,
    ranks: np.ndarray,
    lengths: np.ndarray,
    clock: np.ndarray,
    file_order: np.ndarray,
    protocol: SplitProtocol,
) -> np.ndarray:
    if not protocol.group_by_user:
        users, lengths = np.zeros_like(users), np.full_like(lengths, len(users))
        ranks = np.empty(len(users), dtype=np.int64)
        ranks[np.lexsort((file_order, clock))] = np.arange(len(users))
    if not protocol.by_time:
        ranks = _random_ranks(users, file_order, protocol.seed)
    counts = _ratio_counts(lengths, _shares(protocol.ratios))
    phases = np.full(len(users), TRAIN, dtype=np.int8)
    phases[ranks >= counts[:, 0]] = VALID
    phases[ranks >= counts[:, 0] + counts[:, 1]] = TEST
    return phases


def _shares(ratios: Sequence[float]) -> list[float]:
    total = sum(ratios)
    return [ratio / total for ratio in ratios]


def _by_global_time(clock: np.ndarray, ratios: Sequence[float]) -> np.ndarray:
    """Two moments cut the whole data; rows of one moment stay on one side."""
    train, valid, _ = _shares(ratios)
    ordered = np.sort(clock)
    # Of 10 rows .7 and .1 are 8, though floats add up to less.
    last_train, last_valid = (
        ordered[max(int(round(len(ordered) * share, 6)) - 1, 0)] for share in (train, train + valid)
    )
    return np.where(clock <= last_train, TRAIN, np.where(clock <= last_valid, VALID, TEST)).astype(np.int8)


def _short_users(
    users: np.ndarray, phases: np.ndarray, protocol: SplitProtocol, user_tokens: Sequence[str]
) -> tuple[np.ndarray, int]:
    """Apply ``short_users`` to the users that the protocol cannot give what it promises.

    Under LS and a ratio by user that is a row in every phase asked for; elsewhere a train row.
    """
    n_users = len(user_tokens)
    has = np.stack([np.bincount(users[phases == phase], minlength=n_users) > 0 for phase in (TRAIN, VALID, TEST)])
    promised = [True, False, False]
    if protocol.kind == "LS":
        promised[1:] = [protocol.leave_one_mode != "test_only", protocol.leave_one_mode != "valid_only"]
    elif protocol.kind == "RS" and protocol.group_by_user:
        promised = [ratio > 0 for ratio in protocol.ratios]
    present = np.bincount(users, minlength=n_users) > 0
    short = present & ~np.logical_and.reduce([has[phase] for phase in range(3) if promised[phase]])
    found = int(short.sum())
    if not found:
        return phases, 0
    if protocol.short_users == "refuse":
        example = user_tokens[int(np.flatnonzero(short)[0])]
        raise UserError(
            f"{found} users have too few interactions for this split (user {example!r} is one); "
            "set short_users: drop, or user_inter_num_interval to filter them"
        )
    rows = short[users]
    if protocol.short_users == "train":
        return np.where(rows, TRAIN, phases).astype(np.int8), 0
    return np.where(rows, DROPPED, phases).astype(np.int8), found


def _drop_repeats(users: np.ndarray, items: np.ndarray, phases: np.ndarray) -> tuple[np.ndarray, int]:
    """Drop valid and test rows whose (user, item) stands in an earlier phase, or earlier in their own."""
    # Rows are in time order, so a stable sort by (user, item, phase) keeps the first row of each phase in front.
    order = np.lexsort((phases, items, users))
    same = np.zeros(len(users), dtype=bool)
    same[1:] = (users[order][1:] == users[order][:-1]) & (items[order][1:] == items[order][:-1])
    sorted_phases = phases[order]
    repeat = same & np.isin(sorted_phases, (VALID, TEST))
    out = phases.copy()
    out[order[repeat]] = DROPPED
    return out, int(repeat.sum())


def fingerprint(
    users: np.ndarray,
    items: np.ndarray,
    ranks: np.ndarray,
    phases: np.ndarray,
    candidates: np.ndarray,
    user_tokens: Sequence[str],
    item_tokens: Sequence[str],
) -> str:
    """SHA-256 that two splits share exactly when they are the same.

    It is over the UTF-8 lines ``user <tab> item <tab> rank <tab> phase`` (raw ids; rank of exact time within the user,
    from 0; phase ``train``, ``valid``, ``test`` or ``withheld``), sorted bytewise, each ended by a newline; then the
    raw ids of the candidates, likewise. It does not depend on internal ids, nor on the file's arrangement where times
    differ.

    Args:
        users, items, ranks, phases: the kept rows, each [n].
        candidates: bool [n_items].
        user_tokens, item_tokens: raw ids by internal id.

    Returns:
        64 hexadecimal digits.
    """
    lines = sorted(
        f"{user_tokens[user]}\t{item_tokens[item]}\t{rank}\t{PHASE_NAMES[phase]}".encode()
        for user, item, rank, phase in zip(users.tolist(), items.tolist(), ranks.tolist(), phases.tolist(), strict=True)
    )
    names = sorted(str(item_tokens[item]).encode() for item in np.flatnonzero(candidates).tolist())
    digest = hashlib.sha256()
    for part in (lines, names):
        digest.update(b"".join(line + b"\n" for line in part))
    return digest.hexdigest()
