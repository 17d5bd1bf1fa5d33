"""Breakdowns of a table against plain loops, and the choice of example users."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from test_rankings import made_up

from recbole_llm.errors import UserError
from recbole_llm.evaluation.metrics import USER_METRICS
from recbole_llm.evaluation.rankings import RECENT, Rankings
from recbole_llm.leaderboard.aligned import align, user_values
from recbole_llm.leaderboard.breakdown import breakdowns, quantile_groups, target_hits
from recbole_llm.leaderboard.examples import choose, examples, titles

Table = dict[str, list[Rankings]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Two rows of two seeds over the same users and targets, in files of different arrangement."""
    users, items = draw(st.integers(1, 12)), 14
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    targets = [sorted(rng.permutation(np.arange(1, items))[: rng.integers(1, 5)].tolist()) for _ in range(users)]
    facts = {
        "item_count": rng.integers(0, draw(st.sampled_from([2, 5, 60])), items),
        "user_count": rng.integers(1, draw(st.sampled_from([2, 6, 300])), users),
        "history_length": rng.integers(1, 40, users),
        "recent": rng.integers(-1, items, (users, RECENT)).astype(np.int32),
    }
    facts["item_count"][0] = 0

    def one() -> Rankings:
        top = np.stack([rng.permutation(np.arange(1, items))[:6] for _ in range(users)])
        return rearranged(made_up(top, targets, items, **facts), rng)

    return {"A": [one(), one()], "B": [one(), one()]}


def rearranged(one: Rankings, rng: np.random.Generator) -> Rankings:
    """The same rankings as another run might write them: other users first, other internal ids."""
    users = rng.permutation(len(one.user_id))
    items = np.concatenate(([0], 1 + rng.permutation(len(one.item_id) - 1)))
    code = np.argsort(items)
    own = [sorted(code[one.targets[one.target_offsets[u] : one.target_offsets[u + 1]]].tolist()) for u in users]
    return made_up(
        code[one.top[users]], own, len(items), user_id=one.user_id[users], item_id=one.item_id[items],
        item_count=one.item_count[items], user_count=one.user_count[users], history_length=one.history_length[users],
        recent=np.where(one.recent[users] < 0, -1, code[one.recent[users]]).astype(np.int32),
    )  # fmt: skip


def told(one: Rankings) -> dict[str, Any]:
    """A run's rankings in raw ids."""
    names, bounds = one.item_id.tolist(), one.target_offsets
    return {
        user: {
            "top": [names[item] for item in one.top[place]],
            "targets": sorted(names[item] for item in one.targets[bounds[place] : bounds[place + 1]]),
            "count": int(one.user_count[place]),
            "length": int(one.history_length[place]),
            "recent": [names[item] for item in one.recent[place] if item >= 0],
        }
        for place, user in enumerate(one.user_id.tolist())
    }


def popularity(one: Rankings) -> dict[str, int]:
    return dict(zip(one.item_id.tolist(), one.item_count.tolist(), strict=True))


@given(tables())
def test_aligned_rankings_say_the_same_in_one_order(table: Table) -> None:
    made = align(table)
    first = made["A"][0]
    for name, seeds in table.items():
        for one, same in zip(seeds, made[name], strict=True):
            assert told(same) == told(one) and popularity(same) == popularity(one)
            for key in ("user_id", "item_id", "targets", "target_offsets", "item_count", "user_count", "recent"):
                assert np.array_equal(getattr(same, key), getattr(first, key)), key


def bounds_of(label: str) -> tuple[int, int]:
    low, _, high = label.replace(",", "").partition("-")
    return int(low), int(high or low)


@given(tables())
def test_groups_of_users_are_those_of_a_plain_loop(table: Table) -> None:
    for block in breakdowns(table, "NDCG@5"):
        if block["unit"] != "users":
            continue
        key = {"user activity": "count", "history length": "length"}[block["name"]]
        assert block["metric"] == "ndcg@5"
        facts = told(table["A"][0])
        spans = [bounds_of(group["label"]) for group in block["groups"]]
        assert spans == sorted(spans) and all(one[1] < other[0] for one, other in pairwise(spans))
        for place, (low, high) in enumerate(spans):
            members = [user for user, fact in facts.items() if low <= fact[key] <= high]
            assert block["groups"][place]["count"] == len(members) > 0
            for name, seeds in table.items():
                values = []
                for one in seeds:
                    hits, counts = one.hits()
                    own = USER_METRICS["ndcg"](hits, counts)[:, 4]
                    values += [own[one.user_id.tolist().index(user)] for user in members]
                assert block["rows"][name][place] == pytest.approx(np.mean(values))


@given(tables())
def test_groups_of_items_are_those_of_a_plain_loop(table: Table) -> None:
    counts = popularity(table["A"][0])
    total = sum(counts.values())
    blocks = {block["name"]: block for block in breakdowns(table, "recall@4")}
    pairs = [(user, item) for user, fact in told(table["A"][0]).items() for item in fact["targets"]]

    def group_of(item: str) -> str:
        above = sum(count for count in counts.values() if count > counts[item])
        return "never" if not counts[item] else ("head", "mid", "tail")[3 * above // total]

    named = {"item popularity": group_of, "seen and unseen items": lambda i: "seen" if counts[i] else "never"}
    for name, group in named.items():
        expected = {group(item) for _, item in pairs}
        if len(expected) == 1:
            assert name not in blocks
            continue
        block = blocks[name]
        assert block["metric"] == "hit rate@4" and block["unit"] == "test interactions"
        labels = [line["label"].split()[0] for line in block["groups"]]
        assert set(labels) == expected and labels == sorted(labels, key=["head", "mid", "tail", "seen", "never"].index)
        for place, label in enumerate(labels):
            members = [(user, item) for user, item in pairs if group(item) == label]
            assert block["groups"][place]["count"] == len(members)
            for row, seeds in table.items():
                hits = [item in told(one)[user]["top"][:4] for one in seeds for user, item in members]
                assert block["rows"][row][place] == pytest.approx(np.mean(hits))


@given(tables(), st.sampled_from(["ndcg@5", "mrr@3", "map@6"]))
def test_the_groups_of_a_breakdown_average_to_the_whole(table: Table, metric: str) -> None:
    for block in breakdowns(table, metric):
        counts = np.array([group["count"] for group in block["groups"]])
        for row, seeds in table.items():
            k = int(metric[-1])
            if block["unit"] == "users":
                whole = np.mean([user_values(one, metric) for one in seeds])
            else:
                whole = np.mean([target_hits(one, k) for one in seeds])
            assert np.average(block["rows"][row], weights=counts) == pytest.approx(whole)


def test_popularity_has_the_figures_of_a_case_worked_by_hand() -> None:
    # Train interactions 6, 3, 3, 0 of i1 to i4: above i1 stands nothing, above i2 and i3 half, so no tail.
    one = made_up(
        np.array([[1, 2], [3, 4], [4, 1]]), [[1, 4], [2, 3], [4]], 5, item_count=np.array([0, 6, 3, 3, 0]),
        user_count=np.array([2, 2, 8]), history_length=np.array([3, 3, 3]),
    )  # fmt: skip
    popular, seen, activity = sorted(
        breakdowns({"A": [one], "B": []}, "hit@2"), key=lambda block: (block["unit"], block["name"])
    )
    assert [(group["label"], group["count"]) for group in popular["groups"]] == [
        ("head (6 in train)", 1), ("mid (3 in train)", 2), ("never seen in training", 2),
    ]  # fmt: skip
    assert popular["rows"] == {"A": [1.0, 0.5, 0.5], "B": [None, None, None]}
    assert seen["rows"]["A"] == pytest.approx([2 / 3, 1 / 2])
    assert activity["name"] == "user activity" and activity["rows"]["A"] == [1.0, 1.0]
    assert [group["label"] for group in activity["groups"]] == ["2", "8"]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=80), st.integers(2, 6))
def test_equal_values_share_a_group_and_sizes_are_even_where_values_allow(values: list[int], most: int) -> None:
    array = np.array(values)
    group, labels = quantile_groups(array, most)
    assert len(labels) == group.max() + 1 <= most and set(group.tolist()) == set(range(len(labels)))
    for value in set(values):
        assert len(set(group[array == value].tolist())) == 1
    assert (np.diff(group[np.argsort(array, kind="stable")]) >= 0).all()
    for place in range(len(labels)):
        own = array[group == place]
        # A group is larger than its share by no more than its last value's repeats.
        assert len(own) <= -(-len(values) // most) + int((own == own.max()).sum())


def test_groups_do_not_hang_on_which_run_comes_first() -> None:
    one = made_up(
        np.array([[1], [1], [3]]), [[1], [2], [3]], 4, item_count=np.array([0, 6, 3, 0]), user_count=np.array([2, 3, 4])
    )
    # Trained on valid rows too, it counts them.
    merged = replace(one, item_count=np.array([0, 7, 4, 1]), user_count=np.array([3, 4, 5]))
    assert breakdowns({"A": [one], "B": [merged]}, "hit@1") == breakdowns({"A": [merged], "B": [one]}, "hit@1")
    seen = next(block for block in breakdowns({"A": [merged], "B": [one]}, "hit@1") if "unseen" in block["name"])
    assert [group["count"] for group in seen["groups"]] == [2, 1]


def test_rankings_of_one_user_are_counted_as_rankings() -> None:
    one = made_up(
        np.array([[1], [1], [2]]), [[1], [2], [2]], 3, user_id=np.array(["a", "a", "b"]), user_count=np.array([2, 2, 4])
    )
    activity = next(block for block in breakdowns({"A": [one]}, "hit@1") if block["name"] == "user activity")
    assert (activity["unit"], [group["count"] for group in activity["groups"]]) == ("rankings", [2, 1])
    assert activity["rows"]["A"] == [0.5, 1.0]


def test_a_metric_that_is_no_mean_over_users_groups_items_only() -> None:
    one = made_up(np.array([[1, 2], [3, 4]]), [[1], [2]], 5, item_count=np.array([0, 1, 5, 3, 1]))
    names = [block["name"] for block in breakdowns({"A": [one]}, "itemcoverage@10")]
    assert names == ["item popularity"]
    assert breakdowns({"A": [], "B": []}, "ndcg@10") == [] == examples({"A": []}, "ndcg@10", {})


def test_rows_of_other_targets_are_refused_by_name() -> None:
    one, other = (made_up(np.array([[1, 2], [3, 4]]), targets) for targets in ([[1], [2]], [[1], [3]]))
    with pytest.raises(UserError, match="rankings of B"):
        breakdowns({"A": [one], "B": [one, other]}, "ndcg@2")


# --- example users ---------------------------------------------------------------------------------------------------
@given(tables(), st.integers(1, 14), st.integers(0, 5))
def test_examples_show_what_the_first_seeds_say(table: Table, count: int, seed: int) -> None:
    shown = examples(table, "ndcg@5", {"i1": "One"}, count, seed)
    assert shown == examples({name: seeds[:1] for name, seeds in table.items()}, "ndcg@5", {"i1": "One"}, count, seed)
    facts = {name: told(seeds[0]) for name, seeds in table.items()}
    assert len(shown) == min(count, len(facts["A"])) == len({one["user"] for one in shown})
    for one in shown:
        fact = facts["A"][one["user"]]
        assert [item["item"] for item in one["history"]] == fact["recent"]
        assert sorted(item["item"] for item in one["targets"]) == fact["targets"]
        for name, listed in one["top"].items():
            assert [item["item"] for item in listed] == facts[name][one["user"]]["top"]
            assert [item["hit"] for item in listed] == [item["item"] in fact["targets"] for item in listed]
        for item in [*one["history"], *one["targets"], *one["top"]["A"]]:
            assert item["title"] == ("One" if item["item"] == "i1" else item["item"])
    assert json.loads(json.dumps(shown)) == shown


def test_who_has_no_more_items_left_is_shown_none() -> None:
    one = made_up(np.array([[3, 1, 0], [2, 0, 0]]), [[1], [3]], 5)
    shown = {user["user"]: user["top"]["A"] for user in examples({"A": [one]}, "ndcg@3", {})}
    assert {user: [item["item"] for item in listed] for user, listed in shown.items()} == {
        "u0": ["i3", "i1"], "u1": ["i2"],
    }  # fmt: skip


def test_the_choice_tells_something() -> None:
    rng = np.random.default_rng(0)
    values = np.full((3, 200), 0.5)
    divided, unserved = np.arange(0, 40), np.arange(40, 60)
    values[:, divided] = rng.random((3, 40))
    values[:, unserved] = 0
    chosen = choose(values, 12, seed=1)
    spread = values.max(axis=0) - values.min(axis=0)
    by_why: dict[str, list[int]] = {}
    for user, why in chosen:
        by_why.setdefault(why, []).append(user)
    assert by_why["the rows differ"] == np.argsort(-spread)[:6].tolist()
    assert len(by_why["nobody serves him"]) == 3 and set(by_why["nobody serves him"]) <= set(unserved.tolist())
    assert len(by_why["at random"]) == 3 and len(dict(chosen)) == 12
    assert choose(values, 12, seed=1) == chosen != choose(values, 12, seed=2)
    # Nobody differs and everybody is served: all at random.
    assert {why for _, why in choose(np.ones((2, 30)), 12, seed=1)} == {"at random"}


def result_of(folder: Path, **more: Any) -> dict[str, Any]:
    config = {
        "data_path": str(folder), "dataset": folder.name, "item_text": "{title}[ ({genre})]",
        "ITEM_ID_FIELD": "item_id", "field_separator": "\t", "encoding": None,
    }  # fmt: skip
    return {"dataset": folder.name, "config": config | more}


def test_titles_are_the_first_column_of_the_item_text(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "dataset" / "tiny", tmp_path / "tiny")
    lines = (tmp_path / "tiny" / "tiny.item").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines[1:]]
    made = titles(result_of(tmp_path / "tiny"))
    assert made == {row[0]: " ".join(row[1].split()) for row in rows if row[1].strip()} and made["i1"]
    assert any(row[0] not in made for row in rows), "the data has items without a title"


def test_without_the_data_there_is_a_note_and_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "bare.item").write_text("item_id:token\tname:token\ni1\tOne\n", encoding="utf-8")
    with caplog.at_level("INFO", logger="recbole_llm"):
        for folder, more in (
            (tmp_path / "nowhere", {}), (tmp_path / "bare", {}), (tmp_path / "bare", {"item_text": None}),
        ):  # fmt: skip
            caplog.clear()
            assert titles(result_of(folder, **more)) == {}
            assert "shown by their ids" in caplog.text
    assert titles(result_of(tmp_path / "bare", item_text="{name}")) == {"i1": "One"}
    # A data set that ships with the package is found wherever the run was.
    assert titles(result_of(tmp_path / "tiny"))["i1"]
