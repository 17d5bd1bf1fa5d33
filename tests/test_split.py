"""The split: exact, complete, fingerprinted; checked against plain loops and against RecBole's own counts."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.data.histories import Histories
from recbole_llm.data.phases import DROPPED, TEST, TRAIN, VALID, WITHHELD
from recbole_llm.data.split import SplitProtocol, make_split
from recbole_llm.errors import UserError

Rows = list[tuple[int, int, int]]


def split_of(rows: Rows, **protocol: Any) -> Any:
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    user_tokens = ["[PAD]", *(f"u{number}" for number in range(1, 12))]
    item_tokens = ["[PAD]", *(f"i{number}" for number in range(1, 12))]
    kind = protocol.pop("kind", "LS")
    return make_split(
        users,
        items,
        times.astype(float),
        np.arange(len(rows)),
        user_tokens,
        item_tokens,
        SplitProtocol(kind, **protocol),
    )


rows_strategy = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 10), st.integers(0, 5)), min_size=1, max_size=60)


@given(rows_strategy)
def test_leave_one_out_is_the_last_two_by_time_and_file_order(rows: Rows) -> None:
    split = split_of(rows, short_users="train", drop_repeats=False)
    expected = {}
    for user in {row[0] for row in rows}:
        own = sorted((time, number) for number, (who, _, time) in enumerate(rows) if who == user)
        if len(own) >= 3:
            expected[own[-1][1]], expected[own[-2][1]] = TEST, VALID
    found = {int(row): int(phase) for row, phase in zip(split.rows, split.phases, strict=True) if phase != TRAIN}
    assert found == expected


@given(rows_strategy, st.sampled_from(["LS", "RS", "TS"]), st.booleans(), st.booleans())
def test_every_row_has_one_phase_and_no_target_was_seen_before(
    rows: Rows, kind: str, by_time: bool, drop: bool
) -> None:
    split = split_of(rows, kind=kind, by_time=by_time, drop_repeats=drop)
    assert sorted(split.rows.tolist()) == list(range(len(rows)))
    assert set(split.phases.tolist()) <= {TRAIN, VALID, TEST, DROPPED}
    if drop:
        pairs = [
            (int(user), int(item))
            for user, item, phase in zip(split.users, split.items, split.phases, strict=True)
            if phase in (VALID, TEST)
        ]
        train = {
            (int(user), int(item))
            for user, item, phase in zip(split.users, split.items, split.phases, strict=True)
            if phase == TRAIN
        }
        assert len(pairs) == len(set(pairs))
        assert not train & set(pairs)


@given(st.integers(1, 200))
def test_ratio_counts_are_recboles(total: int) -> None:
    from recbole.data.dataset import Dataset

    from recbole_llm.data.split import _ratio_counts

    ends = Dataset._calcu_split_ids(None, tot=total, ratios=[0.8, 0.1, 0.1])
    train, valid, test = _ratio_counts(np.array([total]), [0.8, 0.1, 0.1])[0]
    assert [train, train + valid] == list(ends) and train + valid + test == total


def test_global_time_puts_every_test_row_after_every_train_row() -> None:
    rng = np.random.default_rng(0)
    rows = [
        (int(user), int(item), int(time))
        for user, item, time in zip(
            rng.integers(1, 8, 300), rng.integers(1, 11, 300), rng.integers(0, 1000, 300), strict=True
        )
    ]
    split = split_of(rows, kind="TS", drop_repeats=False)
    times = np.array([row[2] for row in rows])[split.rows]
    assert times[split.phases == TRAIN].max() < times[split.phases == VALID].min()
    assert times[split.phases == VALID].max() < times[split.phases == TEST].min()
    assert 0.75 < split.count(TRAIN) / 300 < 0.85


def test_global_time_takes_the_share_that_was_asked_for() -> None:
    rows = [(1, item, item) for item in range(1, 11)]
    for ratios in ([0.7, 0.1, 0.2], [0.1, 0.7, 0.2], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]):
        split = split_of(rows, kind="TS", ratios=tuple(ratios), drop_repeats=False)
        assert [split.count(phase) for phase in (TRAIN, VALID, TEST)] == [round(10 * ratio) for ratio in ratios]


def test_time_is_exact_where_float32_is_not() -> None:
    base = 1_700_000_000
    rows = [(1, 3, base + 2), (1, 1, base), (1, 2, base + 1), (1, 4, base + 3)]
    assert np.float32(base) == np.float32(base + 3)
    split = split_of(rows)
    assert split.histories(TRAIN).of(1).tolist() == [1, 2]
    assert split.histories(VALID).of(1).tolist() == [3]
    assert split.histories(TEST).of(1).tolist() == [4]


def test_fingerprint_is_the_documented_hash() -> None:
    split = split_of([(1, 2, 5), (1, 1, 3), (1, 3, 9), (2, 1, 1), (2, 2, 2), (2, 3, 3)])
    lines = [
        "u1\ti1\t0\ttrain",
        "u1\ti2\t1\tvalid",
        "u1\ti3\t2\ttest",
        "u2\ti1\t0\ttrain",
        "u2\ti2\t1\tvalid",
        "u2\ti3\t2\ttest",
    ]
    text = "".join(line + "\n" for line in sorted(lines)) + "i1\ni2\ni3\n"
    assert split.fingerprint == hashlib.sha256(text.encode()).hexdigest()


def test_fingerprint_ignores_the_files_arrangement_and_sees_one_changed_item() -> None:
    rows = [(user, item, 10 * user + item) for user in (1, 2, 3) for item in (1, 2, 3, 4)]
    mark = split_of(rows).fingerprint
    assert split_of(rows[::-1]).fingerprint == mark
    changed = [(user, 5 if (user, item) == (2, 4) else item, time) for user, item, time in rows]
    assert split_of(changed).fingerprint != mark


def test_random_split_depends_on_its_seed_only() -> None:
    rows = [(1 + number % 5, 1 + number % 11, number) for number in range(100)]
    one = split_of(rows, kind="RS", by_time=False, seed=1)
    assert one.fingerprint == split_of(rows, kind="RS", by_time=False, seed=1).fingerprint
    assert one.fingerprint != split_of(rows, kind="RS", by_time=False, seed=2).fingerprint


@pytest.mark.parametrize(("rule", "train", "dropped"), [("drop", 2, 1), ("train", 4, 0)])
def test_short_users_are_dropped_and_counted_or_kept(rule: str, train: int, dropped: int) -> None:
    split = split_of([(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 3, 3), (2, 4, 4)], short_users=rule)
    assert (split.count(TRAIN), split.dropped_users) == (train, dropped)


def test_short_users_are_refused_by_name() -> None:
    with pytest.raises(UserError, match="'u1'"):
        split_of([(1, 1, 1), (2, 1, 1), (2, 2, 2), (2, 3, 3)], short_users="refuse")


def test_repeats_are_dropped_and_counted() -> None:
    split = split_of([(1, 1, 1), (1, 2, 2), (1, 3, 3), (1, 1, 4)])
    assert split.dropped_repeats == 1
    assert split.count(TEST) == 0


def test_no_time_under_an_order_by_time_is_refused() -> None:
    one = np.array([1])
    with pytest.raises(UserError, match="timestamp"):
        make_split(one, one, None, np.array([0]), ["p", "u"], ["p", "i"], SplitProtocol("LS"))


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), max_size=40))
def test_histories_are_each_users_items_in_order(pairs: list[tuple[int, int]]) -> None:
    users = np.array([pair[0] for pair in pairs], dtype=np.int64)
    items = np.array([pair[1] for pair in pairs], dtype=np.int64)
    histories = Histories.from_rows(users, items, 6)
    for user in range(6):
        assert histories.of(user).tolist() == [item for who, item in pairs if who == user]


@given(
    rows_strategy,
    st.sampled_from(["LS", "RS", "TS"]),
    st.booleans(),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.integers(0, 3),
)
def test_a_share_of_train_is_withheld_and_nothing_else_moves(
    rows: Rows, kind: str, by_time: bool, shares: list[float], seed: int
) -> None:
    whole, more, less = (
        split_of(rows, kind=kind, by_time=by_time, seed=seed, train_share=share) for share in (1.0, *reversed(shares))
    )
    was_train = whole.phases == TRAIN
    for split, share in ((more, shares[1]), (less, shares[0])):
        assert np.array_equal(split.phases[~was_train], whole.phases[~was_train])
        assert set(split.phases[was_train].tolist()) <= {TRAIN, WITHHELD}
        assert np.array_equal(split.candidates, whole.candidates)
        for user in set(whole.users[was_train].tolist()):
            of = was_train & (whole.users == user)
            kept = int((split.phases[of] == TRAIN).sum())
            assert kept >= 1 and abs(kept - share * of.sum()) <= max(0.5, 1 - share * of.sum())
        assert not np.isin(np.flatnonzero(split.phases == WITHHELD), np.flatnonzero(split.phases == TRAIN)).any()
    assert (more.phases[less.phases == TRAIN] == TRAIN).all(), "what a share keeps, a larger one keeps"
    assert (less.fingerprint == whole.fingerprint) == np.array_equal(less.phases, whole.phases)


def test_what_is_withheld_depends_on_the_seed_and_raw_ids_only() -> None:
    rows = [(user, item, 10 * user + item) for user in (1, 2, 3) for item in range(1, 11)]
    mark = split_of(rows, train_share=0.5).fingerprint
    assert split_of(rows[::-1], train_share=0.5).fingerprint == mark
    assert split_of(rows, train_share=0.5, seed=1).fingerprint != mark
    # The same data under other internal ids: users 1 and 3 exchanged, in rows and in tokens.
    columns = [np.array(column, dtype=np.int64) for column in zip(*rows, strict=True)]
    tokens = [f"i{number}" for number in range(12)]
    other = make_split(
        4 - columns[0], columns[1], columns[2].astype(float), np.arange(len(rows)),
        ["[PAD]", "u3", "u2", "u1"], tokens, SplitProtocol("LS", train_share=0.5),
    )  # fmt: skip
    same = make_split(
        *columns[:2], columns[2].astype(float), np.arange(len(rows)), ["[PAD]", "u1", "u2", "u3"], tokens,
        SplitProtocol("LS", train_share=0.5),
    )  # fmt: skip
    assert other.fingerprint == same.fingerprint


def test_withheld_rows_stand_in_no_history_but_in_the_fingerprint() -> None:
    split = split_of([(1, item, item) for item in range(1, 11)], train_share=0.5)
    train, withheld = split.histories(TRAIN).of(1), split.histories(WITHHELD).of(1)
    assert sorted([*train, *withheld]) == list(range(1, 9)) and len(train) == len(withheld) == 4
    phases = {item: "withheld" if item in withheld else "train" for item in range(1, 9)} | {9: "valid", 10: "test"}
    lines = sorted(f"u1\ti{item}\t{item - 1}\t{phase}\n" for item, phase in phases.items())
    names = sorted(f"i{item}\n" for item in phases)
    assert split.fingerprint == hashlib.sha256("".join(lines + names).encode()).hexdigest()
    assert split.as_dict()["withheld"] == 4 and split.as_dict()["protocol"]["train_share"] == 0.5
