"""What a run keeps of its test rankings: true to the split, to the metrics, and honest when damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL
from worlds import settings_of

from recbole_llm.config import Config
from recbole_llm.data.phases import DROPPED, TEST, TRAIN, VALID, WITHHELD
from recbole_llm.errors import UserError
from recbole_llm.evaluation.metrics import USER_METRICS
from recbole_llm.evaluation.rankings import RECENT, Rankings
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.runs import report

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
BY_RATIO = {"split": {"RS": [0.7, 0.1, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"}
AT_RANDOM = {"split": {"RS": [0.7, 0.1, 0.2]}, "order": "RO", "group_by": "user", "mode": "full"}
BY_TIME = {"split": {"TS": [0.7, 0.1, 0.2]}, "order": "TO", "group_by": "none", "mode": "full"}


def made_up(top: np.ndarray, targets: list[list[int]], items: int = 12, **more: Any) -> Rankings:
    """Rankings of users u0, u1, ... over items named by their places."""
    users = len(top)
    arrays: dict[str, Any] = {
        "user_id": np.array([f"u{user}" for user in range(users)], dtype=str),
        "item_id": np.array(["[PAD]", *(f"i{item}" for item in range(1, items))]),
        "top": top.astype(np.int32),
        "targets": np.array([item for own in targets for item in own], dtype=np.int32),
        "target_offsets": np.concatenate(([0], np.cumsum([len(own) for own in targets]))).astype(np.int64),
        "item_count": np.arange(items),
        "user_count": np.ones(users, dtype=np.int64),
        "history_length": np.ones(users, dtype=np.int64),
        "recent": np.full((users, RECENT), -1, dtype=np.int32),
    }
    return Rankings(**arrays | more)


@st.composite
def rankings(draw: st.DrawFn) -> Rankings:
    users, k, items = draw(st.integers(1, 6)), draw(st.integers(1, 5)), 9
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    top = np.stack([rng.permutation(np.arange(1, items))[:k] for _ in range(users)])
    targets = [sorted(rng.permutation(np.arange(1, items))[: rng.integers(1, 5)].tolist()) for _ in range(users)]
    return made_up(top, targets, items)


@given(rankings())
def test_hits_are_those_of_a_plain_loop(one: Rankings) -> None:
    hits, counts = one.hits()
    for user in range(len(one.user_id)):
        own = one.targets[one.target_offsets[user] : one.target_offsets[user + 1]].tolist()
        assert hits[user].tolist() == [item in own for item in one.top[user].tolist()]
        assert counts[user] == len(own)


@pytest.mark.parametrize("model", ["BPR", "SASRec"])
@pytest.mark.parametrize("unit", ["user", "row"])
@pytest.mark.parametrize("args", [LEAVE_ONE_OUT, BY_RATIO, AT_RANDOM, BY_TIME], ids=["LS", "RS", "RO", "TS"])
def test_they_are_true_to_the_split_and_to_the_metrics(
    model: str, unit: str, args: dict[str, Any], small_data: Path, tmp_path: Path
) -> None:
    more = {"eval_args": args, "eval_unit": unit, "metrics": ["NDCG", "Recall", "Hit", "Precision", "MRR", "MAP"]}
    config = Config(model, "small", config_dict=settings_of(small_data, tmp_path, **SMALL.get(model, {}), **more))
    fitted = fit(config, store_of(config))
    report(fitted, tmp_path / "run")
    one = Rankings.read(tmp_path / "run" / "rankings.npz")
    check_split(one, fitted, by_row=unit == "row" and model == "SASRec")
    with np.load(tmp_path / "run" / "per_user.npz", allow_pickle=False) as kept:
        assert np.array_equal(kept["user_id"], one.user_id)
        hits, counts = one.hits()
        for name in kept.files:
            metric, _, k = name.partition("@")
            if name != "user_id":
                assert np.array_equal(USER_METRICS[metric](hits, counts)[:, int(k) - 1], kept[name]), name
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert result["rankings"] == "rankings.npz"


def check_split(one: Rankings, fitted: Any, by_row: bool) -> None:
    """By a plain loop over the split's rows, which are each user's in time order."""
    split, tokens = fitted.train_data._dataset.split, fitted.dataset.field2id_token
    users, items = (tokens[name].tolist() for name in ("user_id", "item_id"))
    assert one.item_id.tolist() == items
    rows = list(
        zip(split.users.tolist(), split.items.tolist(), split.phases.tolist(), split.ranks.tolist(), strict=True)
    )
    expected = []
    for user in sorted({row[0] for row in rows}):
        own = [row for row in rows if row[0] == user]
        trained = sum(phase == TRAIN for _, _, phase, _ in own)
        test = [(item, rank) for _, item, phase, rank in own if phase == TEST]
        if by_row:
            for item, rank in test:
                before = [other for _, other, phase, place in own if place < rank and phase not in (DROPPED, WITHHELD)]
                if rank > 0:
                    expected.append((users[user], [item], trained, before))
        elif test:
            shown = [item for _, item, phase, _ in own if phase in (TRAIN, VALID)]
            expected.append((users[user], sorted({item for item, _ in test}), trained, shown))
    assert one.user_id.tolist() == [line[0] for line in expected]
    for place, (_, targets, trained, shown) in enumerate(expected):
        assert one.targets[one.target_offsets[place] : one.target_offsets[place + 1]].tolist() == targets
        assert one.user_count[place] == trained and one.history_length[place] == len(shown)
        latest = shown[-RECENT:]
        assert one.recent[place].tolist() == [-1] * (RECENT - len(latest)) + latest
    counts = np.zeros(len(items), dtype=np.int64)
    for _, item, phase, _ in rows:
        counts[item] += phase == TRAIN
    assert np.array_equal(one.item_count, counts)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    one = made_up(np.array([[1, 2], [3, 4]]), [[1], [5, 6]])
    one.save(tmp_path / "rankings.npz")
    again = Rankings.read(tmp_path / "rankings.npz")
    for name, array in vars(one).items():
        assert np.array_equal(getattr(again, name), array) and getattr(again, name).dtype == array.dtype, name


def test_a_damaged_file_is_told_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rankings.npz"
    one = made_up(np.array([[1, 2], [3, 4]]), [[1], [5, 6]])
    one.save(path)
    whole = path.read_bytes()
    damaged = [whole[:end] for end in range(0, len(whole), 97)]
    for place in range(0, len(whole), 11):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            again = Rankings.read(path)
        except UserError as error:
            refused += str(path) in str(error)
        else:
            assert all(np.array_equal(getattr(again, name), array) for name, array in vars(one).items())
    assert refused > len(damaged) / 2


@pytest.mark.parametrize("what", ["missing", "an array", "another archive", "objects"])
def test_another_file_is_told_in_a_line(what: str, tmp_path: Path) -> None:
    path = tmp_path / "rankings.npz"
    if what == "an array":
        with path.open("wb") as stream:
            np.save(stream, np.arange(3))
    elif what == "another archive":
        np.savez(path, top=np.arange(3))
    elif what == "objects":
        np.savez(path, **{name: np.array([{}]) for name in Rankings.__dataclass_fields__})
    with pytest.raises(UserError, match="cannot be read"):
        Rankings.read(path)
