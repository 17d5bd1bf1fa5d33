"""Items that training never sees: what is withheld, what stays the same, and that every model runs so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from small_models import SMALL
from test_split import Rows, rows_strategy, split_of
from worlds import assert_same, fitted_state, settings_of, write_rows

from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.phases import DROPPED, TEST, TRAIN, VALID, WITHHELD
from recbole_llm.data.split import SplitProtocol, make_split
from recbole_llm.errors import UserError
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.runs import run


def test_settings_names() -> None:
    """GLTA's ``cold_items`` says what to do with such items; a typo must not turn one key into the other."""
    with pytest.raises(UserError, match="cold_item_share"):
        Config("BPR", "tiny", config_dict={"cold_items_share": 0.1})


@given(
    rows_strategy,
    st.sampled_from(["LS", "RS", "TS"]),
    st.booleans(),
    st.sampled_from(["random", "newest"]),
    st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
    st.sampled_from([1.0, 0.5]),
    st.integers(0, 3),
)
def test_cold_items_are_in_no_train_row_and_nothing_of_the_test_moves(
    rows: Rows, kind: str, by_time: bool, choice: str, shares: list[float], train_share: float, seed: int
) -> None:
    protocol: dict[str, Any] = {"kind": kind, "by_time": by_time, "seed": seed, "train_share": train_share}
    whole = split_of(rows, **protocol)
    splits = []
    for share in shares:
        try:
            splits.append(split_of(rows, cold_item_share=share, cold_item_choice=choice, **protocol))
        except UserError:
            assume(False)
    full = split_of(rows, **protocol | {"train_share": 1.0})
    for split, share in zip(splits, shares, strict=True):
        assert split.cold.sum() == int(np.floor(share * whole.candidates.sum() + 0.5))
        assert not split.cold[~whole.candidates].any()
        known = np.isin(split.phases, (TRAIN, VALID))
        assert not split.cold[split.items[known]].any()
        assert not split.cold[split.histories(TRAIN, VALID).items].any()
        for phase in (TEST, DROPPED):
            assert np.array_equal(split.phases == phase, whole.phases == phase)
        assert np.array_equal(split.candidates, whole.candidates)
        # Valid rows go with their item only, and what a user may not be recommended at test is the same.
        assert np.array_equal(split.phases == VALID, (whole.phases == VALID) & ~split.cold[split.items])
        assert np.array_equal(
            np.isin(split.phases, (TRAIN, VALID, WITHHELD)), np.isin(whole.phases, (TRAIN, VALID, WITHHELD))
        )
        had = set(full.users[full.phases == TRAIN].tolist())
        assert set(split.users[split.phases == TRAIN].tolist()) == had, "every user keeps a train row"
        again = split_of(rows, cold_item_share=share, cold_item_choice=choice, **protocol)
        assert np.array_equal(again.phases, split.phases) and again.fingerprint == split.fingerprint
        assert (split.fingerprint == whole.fingerprint) == np.array_equal(split.phases, whole.phases)
    assert (splits[1].cold | ~splits[0].cold).all(), "what is cold at one share is cold at a larger one"
    if train_share == 1:
        assert (splits[0].phases[splits[1].phases == TRAIN] == TRAIN).all()


@given(rows_strategy, st.floats(0, 1), st.integers(0, 3))
def test_the_choice_is_that_of_a_plain_loop(rows: Rows, share: float, seed: int) -> None:
    """Newest first: an item goes unless a user would be left without a train row; ties by time are left to the draw."""
    times = list(range(len(rows)))
    np.random.default_rng(seed).shuffle(times)
    rows = [(user, item, time) for (user, item, _), time in zip(rows, times, strict=True)]
    whole = split_of(rows, short_users="train")
    train = [
        (int(user), int(item))
        for user, item, phase in zip(whole.users, whole.items, whole.phases, strict=True)
        if phase == TRAIN
    ]
    first = {item: min(time for _, other, time in rows if other == item) for _, item, _ in rows}
    wanted, cold = int(np.floor(share * len(first) + 0.5)), set[int]()
    for item in sorted(first, key=lambda item: -first[item]):
        without = {user for user, other in train if other not in cold | {item}}
        if len(cold) < wanted and without == {user for user, _ in train}:
            cold.add(item)
    protocol = {"short_users": "train", "cold_item_share": share, "cold_item_choice": "newest"}
    if len(cold) < wanted:
        with pytest.raises(UserError, match=f"after {len(cold)} every further one"):
            split_of(rows, **protocol)
    else:
        assert set(np.flatnonzero(split_of(rows, **protocol).cold).tolist()) == cold


def test_a_user_keeps_his_last_train_item() -> None:
    rows = [(user, 1 if user == 1 else item, item) for user in (1, 2) for item in (1, 2, 3, 4)]
    split = split_of(rows, drop_repeats=False, cold_item_share=0.5)
    assert not split.cold[1] and split.cold.sum() == 2
    with pytest.raises(UserError, match=r"take at most 0\.75"):
        split_of(rows, drop_repeats=False, cold_item_share=1.0)


def test_the_choice_depends_on_the_seed_and_raw_ids_only() -> None:
    rows = [(user, item, 10 * user + item) for user in (1, 2, 3) for item in range(1, 11)]
    mark = split_of(rows, cold_item_share=0.3).fingerprint
    assert split_of(rows[::-1], cold_item_share=0.3).fingerprint == mark
    assert split_of(rows, cold_item_share=0.3, seed=1).fingerprint != mark
    users, items, times = (np.array(column, dtype=np.int64) for column in zip(*rows, strict=True))
    # The same data under other internal item ids.
    other = make_split(
        users, 11 - items, times.astype(float), np.arange(len(rows)), ["[PAD]", "u1", "u2", "u3"],
        ["[PAD]", *(f"i{11 - number}" for number in range(1, 11))], SplitProtocol("LS", cold_item_share=0.3),
    )  # fmt: skip
    same = make_split(
        users, items, times.astype(float), np.arange(len(rows)), ["[PAD]", "u1", "u2", "u3"],
        ["[PAD]", *(f"i{number}" for number in range(1, 11))], SplitProtocol("LS", cold_item_share=0.3),
    )  # fmt: skip
    assert other.fingerprint == same.fingerprint


def test_the_result_says_it() -> None:
    rows = [(user, item, item) for user in (1, 2) for item in range(1, 11)]
    plain, cold = split_of(rows).as_dict(), split_of(rows, cold_item_share=0.2).as_dict()
    assert cold["protocol"] == plain["protocol"] | {
        "cold_item_share": 0.2, "cold_item_choice": "random", "split_seed": 2020,
    }  # fmt: skip
    assert cold["cold_items"] == 2 and cold["test"] == plain["test"] and "cold_items" not in plain
    assert cold["train"] + cold["valid"] + cold["withheld"] == plain["train"] + plain["valid"]


def test_refit_on_valid_leaves_cold_items_out() -> None:
    split = split_of([(user, item, item) for user in (1, 2) for item in range(1, 11)], cold_item_share=0.3)
    merged = split.with_valid_in_train()
    assert not split.cold[merged.items[merged.phases == TRAIN]].any() and np.array_equal(merged.cold, split.cold)


def test_newest_without_times_is_refused() -> None:
    two = np.array([1, 1])
    protocol = SplitProtocol("RS", by_time=False, cold_item_share=0.5, cold_item_choice="newest", short_users="train")
    with pytest.raises(UserError, match="newest needs a timestamp"):
        make_split(two, np.array([1, 2]), None, np.arange(2), ["p", "u"], ["p", "i", "j"], protocol)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"cold_item_share": 0.5, "policy": "recbole"}, "cold_item_share above 0 needs policy: unified"),
        ({"cold_item_share": 0.5, "eval_unit": "row"}, "cold_item_share above 0 needs eval_unit: user"),
        ({"cold_item_share": 1.5}, "cold_item_share should be float 0..1"),
        ({"cold_item_share": 1.0}, "cold_item_share: 1 would take"),
        ({"cold_item_choice": "oldest"}, "cold_item_choice should be"),
        ({"cold_item_share": 0.1, "cold_item_choice": "newest", "time_scope": "user"}, "no item is newer"),
    ],
)
def test_what_cannot_be_is_refused(small_data: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run("BPR", "small", config_dict=settings_of(small_data, tmp_path / "saved", **more))


def test_what_is_ranked_at_test_is_the_same_for_every_share(small_data: Path, tmp_path: Path) -> None:
    for model in ("LightGCN", "SASRec"):
        seen = []
        for share in (0.0, 0.3):
            config = Config(model, "small", config_dict=settings_of(small_data, tmp_path, cold_item_share=share))
            train, _, test = data_preparation(config, create_dataset(config))
            seen.append((train._dataset.split, list(test)))
        (_, whole), (split, part) = seen
        for one, other in zip(whole, part, strict=True):
            pairs = [np.unique(np.stack([np.asarray(side) for side in given[1]]), axis=1) for given in (one, other)]
            assert np.array_equal(*pairs), "what is excluded"
            assert all(np.array_equal(one[place], other[place]) for place in (2, 3)), "what is wanted"
            if model == "SASRec":
                shown = other[0]["item_id_list"].numpy()
                assert not split.cold[shown].any() and (other[0]["item_length"] > 0).all()


def test_a_part_has_the_split_of_the_whole(small_data: Path, tmp_path: Path) -> None:
    more = {"cold_item_share": 0.2, "cold_item_choice": "newest"}
    config = Config("GLTA", "small", config_dict=settings_of(small_data, tmp_path, **SMALL["GLTA"], **more))
    marks = {
        create_dataset(one).make_split(one.split_protocol()).fingerprint for one in (config, config.part("graph_model"))
    }
    assert len(marks) == 1


MODELS = {
    "Pop": {}, "ItemKNN": {}, "EASE": {}, "BPR": {}, "LightGCN": {}, "GLTA": {}, "GLTA, text": {"cold_items": "text"},
    "SASRec": {}, "SASRecAllPositions": {}, "BERT4Rec": {}, "SASRec, BCE": {"loss_type": "BPR"},
}  # fmt: skip


@pytest.mark.parametrize("row", MODELS)
def test_models_run_and_rank_items_they_never_saw(row: str, small_data: Path, tmp_path: Path) -> None:
    model = row.partition(",")[0]
    more = {"cold_item_share": 0.3, "eval_step": 1, **SMALL.get(model, {}), **MODELS[row]}
    config = Config(model, "small", config_dict=settings_of(small_data, tmp_path, **more))
    fitted = fit(config, store_of(config))
    split = fitted.train_data._dataset.split
    assert split.cold.sum() == round(0.3 * split.candidates.sum())
    assert not split.cold[fitted.train_data._dataset.inter_feat["item_id"].numpy()].any()
    metrics = fitted.trainer.evaluate(fitted.test_data, load_best_model=False)
    assert np.isfinite(list(metrics.values())).all()
    targets = fitted.test_data.targets
    assert split.cold[targets].any() and len(fitted.trainer.measured.users) == len(np.unique(split.users))


def write_with_cold(source: Path, target: Path, move: bool) -> None:
    """The data set again, train rows at ``cold_item_share: 0.3`` first and with ranks for times; in the rows before
    the test, cold items exchanged, or not, for other cold ones that their users do not have."""
    config = Config("BPR", "small", config_dict=settings_of(source, target / "saved", cold_item_share=0.3))
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    users, names = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    items, cold = split.items.copy(), np.flatnonzero(split.cold)
    rng = np.random.default_rng(0)
    hidden = split.cold[split.items] & np.isin(split.phases, (TRAIN, VALID, WITHHELD))
    for row in np.flatnonzero(hidden) if move else ():
        own = split.users == split.users[row]
        taken = np.concatenate([items[own], split.items[own]])
        free = np.setdiff1d(cold, taken)
        items[row] = rng.choice(free) if len(free) else items[row]
    # First of all a user who had everything, so that no exchange moves an internal id or a candidate.
    everything = [f"all\t{name}\t{place}" for place, name in enumerate(names[1:])]
    write_rows(source, target, split, (users, names), items, first=everything)


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SASRec", "SASRecAllPositions", "EASE", "GLTA"])
def test_exchanged_rows_of_cold_items_move_no_fitted_state(model: str, small_data: Path, tmp_path: Path) -> None:
    states = []
    for name in ("plain", "moved"):
        write_with_cold(small_data, tmp_path / name, move=name == "moved")
        states.append(fitted_state(model, tmp_path / name, tmp_path / name / "saved", cold_item_share=0.3))
    assert_same(*states)
