"""Ids that no codebook makes: how they are spelled, what they are made from, and that leaking ones are refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score
from test_item_token_stage import TOLD, quick, tokenized, write_world

from recbole_llm.config import Config
from recbole_llm.data import create_dataset
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.errors import UserError
from recbole_llm.itemid.identifiers import met_first, of_digits, of_paths, of_pieces, spelled
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.spectral import cluster_paths, co_occurrence
from recbole_llm.training.identifiers import METHODS
from recbole_llm.training.item_tokens import ORIGIN

SMALL_TREE = {"id_clusters": 3, "id_leaf_items": 10}


# --- numbers and paths -----------------------------------------------------------------------------------------------
@given(st.permutations(range(1, 13)))
def test_numbers_are_the_order_in_as_many_digits(order: list[int]) -> None:
    numbers = spelled(np.array(order))
    assert numbers[0] == "" and {len(number) for number in numbers[1:]} == {2}
    assert [int(numbers[item]) for item in order] == list(range(12))
    tokens = of_digits(numbers)
    assert [tokens.strings(item) for item in order] == [[f"<{digit}>" for digit in numbers[item]] for item in order]
    assert tokens.collision_rate() == 0


@given(st.lists(st.integers(1, 9), max_size=20))
def test_items_stand_as_they_are_met_and_then_the_others(walk: list[int]) -> None:
    met = met_first(np.array(walk, dtype=np.int64), np.arange(9, 0, -1))
    assert met.tolist() == list(dict.fromkeys([*walk, *range(9, 0, -1)]))


@given(st.lists(st.lists(st.sampled_from("abc"), max_size=3), min_size=1, max_size=12), st.randoms())
def test_paths_lead_to_numbers_and_no_id_begins_another(own: list[list[str]], random: Any) -> None:
    order = list(range(1, len(own) + 1))
    random.shuffle(order)
    tokens = of_paths([[], *own], np.array(order))
    counted: dict[tuple[str, ...], int] = {}
    for item in order:
        path = tuple(own[item - 1])
        assert tokens.strings(item) == [*(f"<{step}>" for step in path), f"<n_{counted.get(path, 0)}>"]
        counted[path] = counted.get(path, 0) + 1
    # The trie refuses tokens of which some begin others.
    assert len(tokens.trie.order) == len(own) and tokens.collision_rate() == 0


def test_named_tokens_are_kept_whole(tmp_path: Path) -> None:
    made = ItemTokens.named([[], [0, 2], [1]], ["<x>", "<y>", "<z>"], ["[PAD]", "i1", "i2"])
    made.save(tmp_path)
    read = ItemTokens.load(tmp_path, ["[PAD]", "i1", "i2"])
    assert (read.kind, read.names, read.strings(1), read.longest) == ("ids", made.names, ["<x>", "<z>"], 2)
    assert read.fingerprint() == made.fingerprint()
    assert ItemTokens.named([[], [0, 2], [1]], ["<x>", "<y>", "<w>"]).fingerprint() != made.fingerprint()
    for wrong, says in (([[0], [1]], "padding"), ([[], [3]], "not among 3"), ([[], [-1]], "not among 3")):
        with pytest.raises(ValueError, match=says):
            ItemTokens.named(wrong, made.names)


def test_a_number_that_has_no_token_is_told_and_the_padding_item_needs_none() -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[int(digit) for digit in text if digit != "0"] for text in texts]

    numbers = spelled(np.array([3, 1, 2]))
    assert numbers == ["", "1", "2", "0"]
    with pytest.raises(UserError, match="no token for '0', the number of item 'c'; set id_spelling: digits") as caught:
        of_pieces(numbers, encode, lambda used: list(map(str, used)), ["[PAD]", "a", "b", "c"])
    assert "\n" not in str(caught.value)
    made = of_pieces(["", "1", "2", "12"], encode, lambda used: list(map(str, used)))
    assert made.lengths.tolist() == [0, 1, 1, 2]


# --- clusters --------------------------------------------------------------------------------------------------------
@given(st.lists(st.lists(st.integers(1, 6), max_size=6), min_size=1, max_size=8))
def test_items_are_tied_by_the_users_that_have_both(users: list[list[int]]) -> None:
    items, offsets = np.array([item for own in users for item in own], dtype=np.int64), np.cumsum([0, *map(len, users)])
    expected = np.zeros((7, 7))
    for own in users:
        for one, other in combinations(sorted(set(own)), 2):
            expected[one, other] += 1
            expected[other, one] += 1
    assert np.array_equal(co_occurrence(items, offsets, 7).toarray(), expected)


def planted(sizes: Sequence[int], across: float, seed: int = 0) -> tuple[sp.csr_matrix, np.ndarray]:
    """Blocks whose items are all tied, and a share of the others."""
    owners = np.repeat(np.arange(len(sizes)), sizes)
    tied = np.random.default_rng(seed).random((len(owners), len(owners))) < across
    ties = np.triu((owners[:, None] == owners) | tied, 1)
    return sp.csr_matrix((ties | ties.T).astype(np.float64)), owners


@pytest.mark.parametrize("across", [0.0, 0.02])
def test_planted_clusters_are_found_again(across: float) -> None:
    affinity, owners = planted([12] * 10, across)
    paths = cluster_paths(affinity, clusters=10, leaf_items=20, seed=0)
    leaves = [
        {path for path, owner in zip(paths, owners.tolist(), strict=True) if owner == block} for block in range(10)
    ]
    assert all(len(own) == 1 for own in leaves) and len(set.union(*leaves)) == 10
    assert cluster_paths(affinity, clusters=10, leaf_items=20, seed=0) == paths


# Both sizes: of few items all eigenvectors are found at once.
@given(st.integers(0, 2**31), st.sampled_from([40, 300]), st.integers(2, 6))
@settings(max_examples=15, deadline=None)
def test_clusters_are_those_of_the_normalised_laplacian(seed: int, size: int, clusters: int) -> None:
    """Against scikit-learn, which factorises the Laplacian and looks for its smallest eigenvalues."""
    blocks = np.diff(np.linspace(0, size, clusters + 1).astype(int)).tolist()
    affinity, _ = planted(blocks, 0.1, seed)
    paths = cluster_paths(affinity, clusters=clusters, leaf_items=size - 1, seed=0)
    theirs = SpectralClustering(
        n_clusters=clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=0
    ).fit_predict(affinity.toarray())
    assert adjusted_rand_score([path[0] for path in paths], theirs) == 1


@pytest.mark.parametrize("size", [40, 90, 130, 400])
def test_items_that_are_all_alike_are_divided(size: int) -> None:
    """A user whose items nobody else has: all eigenvalues but one are the same."""
    affinity = sp.csr_matrix(np.ones((size, size)) - np.eye(size))
    paths = cluster_paths(affinity, clusters=2, leaf_items=size // 3, seed=0)
    assert max(Counter(paths).values()) <= size // 3


def test_a_cluster_that_is_too_large_is_divided_again() -> None:
    # Three groups of three blocks each: groups are tied loosely, blocks within a group more.
    inner, owners = planted([10] * 9, 0.0)
    groups = owners // 3
    between = 0.2 * (groups[:, None] == groups) + 0.01
    affinity = sp.csr_matrix(np.where(inner.toarray() > 0, 1.0, between) - np.diag(np.full(90, between[0, 0])))
    paths = cluster_paths(affinity, clusters=3, leaf_items=12, seed=0)
    for group in range(3):
        assert len({path[0] for path, own in zip(paths, groups.tolist(), strict=True) if own == group}) == 1
    for block in range(9):
        assert len({path for path, own in zip(paths, owners.tolist(), strict=True) if own == block}) == 1
    assert min(map(len, paths)) >= 2


@pytest.mark.parametrize(
    "affinity",
    [
        sp.csr_matrix((200, 200)),
        sp.csr_matrix(np.ones((60, 60)) - np.eye(60)),
        planted([40, 1, 1, 1, 30, 2], 0.0)[0],
    ],
    ids=["nothing is tied", "everything is", "components"],
)
def test_every_leaf_is_small_enough_whatever_the_graph(affinity: sp.csr_matrix) -> None:
    paths = cluster_paths(affinity, clusters=4, leaf_items=9, seed=0)
    assert len(paths) == affinity.shape[0] and max(paths.count(path) for path in set(paths)) <= 9
    # No leaf is a node on the way to another.
    found = sorted(set(paths))
    assert not any(later[: len(path)] == path for path, later in pairwise(found))


def test_a_small_catalogue_is_one_leaf() -> None:
    assert cluster_paths(sp.csr_matrix((5, 5)), clusters=2, leaf_items=5, seed=0) == [()] * 5


# --- what they are made from -----------------------------------------------------------------------------------------
def numbers_of(tokens: ItemTokens, raw_ids: list[str]) -> dict[str, int]:
    return {raw: int("".join(map(str, tokens.of(item)))) for item, raw in enumerate(raw_ids) if item}


def ids_by_name(world: Path, **more: Any) -> dict[str, list[str]]:
    settings = quick(world / "saved", data_path=str(world), cache="refresh", **SMALL_TREE, **more)
    config = Config("SASRecCodes", "tiny", config_dict=settings)
    raw_ids = create_dataset(config).field2id_token["item_id"].tolist()
    tokens = tokenized(settings).tokens
    return {raw: tokens.strings(item) for item, raw in enumerate(raw_ids) if item}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same train rows; test and valid items dealt out otherwise in the second and third."""
    return [write_world(tmp_path_factory.mktemp("world"), phase) for phase in (None, TEST, VALID)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("more", [{}, {"cold_item_share": 0.3}], ids=["all trained", "some unseen"])
def test_other_test_and_valid_items_move_no_id(worlds: list[Path], method: str, more: dict[str, Any]) -> None:
    plain, *swapped = (ids_by_name(world, item_tokens=method, **TOLD.get(method, {}), **more) for world in worlds)
    assert len(plain) == 80 and all(other == plain for other in swapped)
    if method == "collaborative":
        assert any(own[0] == "<unseen>" for own in plain.values()) == bool(more)


def test_leaking_ids_move_with_the_test_items(worlds: list[Path]) -> None:
    leaking = {"item_tokens": "sequential", "id_rows": "all", "leaking_ids": True}
    assert ids_by_name(worlds[0], **leaking) != ids_by_name(worlds[1], **leaking)


@pytest.mark.parametrize("method", METHODS)
def test_how_the_file_orders_its_rows_moves_no_id(worlds: list[Path], method: str, tmp_path: Path) -> None:
    """Test rows first number all items otherwise within; users follow each other by time, as the file says nothing."""
    shutil.copytree(worlds[0] / "tiny", tmp_path / "tiny")
    file = tmp_path / "tiny" / "tiny.inter"
    head, *rows = file.read_text().splitlines()
    file.write_text("\n".join([head, *rows[::-1]]) + "\n")
    more = {"item_tokens": method, "id_order": "time", **TOLD.get(method, {})}
    if method == "sequential":
        # All users begin at time 0 here; of equal ones the file says which comes first.
        rows = [row.split("\t") for row in rows]
        shift = {user: place for place, user in enumerate(sorted({row[0] for row in rows}))}
        for folder, kept in ((tmp_path, rows[::-1]), (tmp_path / "other", rows)):
            (folder / "tiny").mkdir(parents=True, exist_ok=True)
            shutil.copy(worlds[0] / "tiny/tiny.item", folder / "tiny/tiny.item")
            lines = ["\t".join([*row[:3], str(float(row[3]) + shift[row[0]] / 1000)]) for row in kept]
            (folder / "tiny/tiny.inter").write_text("\n".join([head, *lines]) + "\n")
        assert ids_by_name(tmp_path, **more) == ids_by_name(tmp_path / "other", **more)
        return
    assert ids_by_name(tmp_path, **more) == ids_by_name(worlds[0], **more)


def walked(rows: list[tuple[str, str, float]], users: Sequence[str]) -> list[str]:
    """Items as they are met: user by user, each one's by time."""
    own = {user: sorted((row for row in rows if row[0] == user), key=lambda row: row[2]) for user in users}
    return list(dict.fromkeys(item for user in users for _, item, _ in own[user]))


@pytest.mark.parametrize("rows", ["train", "all"])
@pytest.mark.parametrize("order", ["user", "time", "random"])
def test_sequential_numbers_are_a_walk_through_the_rows(rows: str, order: str, tmp_path: Path) -> None:
    settings = quick(tmp_path, item_tokens="sequential", id_order=order, id_rows=rows, leaking_ids=rows == "all")
    config = Config("SASRecCodes", "tiny", config_dict=settings)
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    users, raw_ids = dataset.field2id_token["user_id"].tolist(), dataset.field2id_token["item_id"].tolist()
    counted = np.isin(split.phases, [TRAIN] if rows == "train" else [TRAIN, VALID, TEST])
    table = [
        (
            users[split.users[row]],
            raw_ids[split.items[row]],
            float(dataset.exact_times[split.rows[row]]),
            int(split.rows[row]),
        )
        for row in np.flatnonzero(counted)
    ]
    key = {"user": 3, "time": 2, "random": 3}[order]
    firsts = {user: min(row[key] for row in table if row[0] == user) for user in {row[0] for row in table}}
    ordered = sorted(firsts, key=lambda user: firsts[user])
    numbers = numbers_of(tokenized(settings).tokens, raw_ids)
    found = sorted(numbers, key=lambda raw: numbers[raw])
    if order == "random":
        # Some walk through the users; another seed takes another.
        other = numbers_of(tokenized(settings | {"seed": 3}).tokens, raw_ids)
        assert other != numbers and set(other.values()) == set(range(80))
        return
    met = walked([row[:3] for row in table], ordered)
    assert found[: len(met)] == met and len(met) > 70


def test_random_numbers_follow_the_seed_alone(tmp_path: Path) -> None:
    first, again, other, fewer = (
        tokenized(quick(tmp_path / str(place), item_tokens="random", **more)).tokens
        for place, more in enumerate([{}, {}, {"seed": 1}, {"train_share": 0.5}])
    )
    assert torch.equal(first.tokens, again.tokens) and torch.equal(first.tokens, fewer.tokens)
    assert not torch.equal(first.tokens, other.tokens)


def test_semantic_ids_are_the_categories(tmp_path: Path) -> None:
    settings = quick(tmp_path, item_tokens="semantic", **TOLD["semantic"])
    config = Config("SASRecCodes", "tiny", config_dict=settings)
    raw_ids = create_dataset(config).field2id_token["item_id"].tolist()
    tokens = tokenized(settings).tokens
    lines = [line.split("\t") for line in (ROOT / "dataset/tiny/tiny.item").read_text().strip("\n").split("\n")[1:]]
    genres = {line[0]: line[2].split() for line in lines}
    assert not all(genres.values()), "every item has a genre; the test would pass blindly"
    for item, raw in enumerate(raw_ids[1:], 1):
        assert tokens.strings(item)[:-1] == [f"<{genre}>" for genre in genres.get(raw) or ["no_category"]]


@pytest.mark.parametrize("method", ["random", "sequential"])
def test_pieces_spell_the_same_numbers_in_the_language_models_tokens(method: str, tmp_path: Path) -> None:
    digits, pieces = (
        tokenized(quick(tmp_path, item_tokens=method, id_spelling=spelling)) for spelling in ("digits", "pieces")
    )
    backbone, tokens = pieces.sources.backbone, pieces.tokens
    assert digits.sources.backbone is None and backbone is not None and tokens.lm_ids is not None
    for item in range(1, tokens.n_items):
        number = "".join(name.strip("<>") for name in digits.tokens.strings(item))
        assert tokens.lm_ids[tokens.of(item)].tolist() == backbone.encode(number)
        assert "".join(tokens.strings(item)) == number
    assert tokens.collision_rate() == 0 and pieces.stage.fingerprint != digits.stage.fingerprint


# --- refused ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"item_tokens": "sequential", "id_rows": "all"},
            "the item after a history then has the next number.*leaking_ids",
        ),
        ({"item_tokens": "sequential", "leaking_ids": True}, "means nothing with id_rows: train"),
        ({"item_tokens": "random", "id_rows": "all", "leaking_ids": True}, "id_rows: all is for sequential ids"),
        ({"leaking_ids": True}, "leaking_ids: true means nothing with code_method: alignment"),
        ({"item_tokens": "semantic"}, "id_categories; columns of .*title, genre, description; .*rq .*tiger"),
        ({"item_tokens": "semantic", "id_categories": "gerne"}, "gerne"),
        ({"item_tokens": "collaborative", "id_clusters": 30, "id_leaf_items": 20}, "not above id_leaf_items 20"),
        (
            {"item_tokens": "random", "code_shuffle": True},
            "code_shuffle swaps the codes of a codebook, and none is made",
        ),
    ],
    ids=str,
)
def test_refused_before_anything_is_made(tmp_path: Path, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        tokenized(quick(tmp_path, **settings))
    assert "\n" not in str(caught.value) and not list(tmp_path.rglob("stage.json"))


def test_given_tokens_that_leak_are_known_as_such(tmp_path: Path) -> None:
    leaking = {"item_tokens": "sequential", "id_rows": "all", "leaking_ids": True}
    made = tokenized(quick(tmp_path / "made", **leaking))
    plain = tokenized(quick(tmp_path / "plain", item_tokens="sequential"))
    assert (made.stage.folder / ORIGIN).is_file()
    with pytest.raises(UserError, match=r"numbered by test rows too.*leaking_ids: true"):
        tokenized(quick(tmp_path, code_tokens=str(made.stage.folder)))
    taken = tokenized(quick(tmp_path, code_tokens=str(made.stage.folder), leaking_ids=True))
    assert taken.tokens.fingerprint() == made.tokens.fingerprint()
    with pytest.raises(UserError, match="do not leak"):
        tokenized(quick(tmp_path, code_tokens=str(plain.stage.folder), leaking_ids=True))


def test_given_tokens_that_are_a_language_models_own_are_refused(tmp_path: Path) -> None:
    """Another language model has other words at these numbers."""
    pieces = tokenized(quick(tmp_path / "made", item_tokens="random", id_spelling="pieces")).stage.folder
    raw_ids = create_dataset(Config("SASRecCodes", "tiny", config_dict=quick(tmp_path))).field2id_token["item_id"]
    titles = tmp_path / "titles"
    titles.mkdir()
    ItemTokens.from_sequences([[], *([item] for item in range(1, 81))], 0, raw_ids.tolist()).save(titles)
    for folder in (pieces, titles):
        with pytest.raises(UserError, match="tokens of the language model that they were made with") as caught:
            tokenized(quick(tmp_path / "taken", code_tokens=str(folder)))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
    assert not list((tmp_path / "taken").rglob("stage.json"))


@pytest.mark.parametrize("method", ["raw", "random"])
def test_equal_ids_of_other_rows_are_told_from_them(method: str, tmp_path: Path) -> None:
    """A run finds no stage that says of its tokens that they are made from another's rows."""
    plain, merged = (tokenized(quick(tmp_path, item_tokens=method, merge_valid=merge)) for merge in (False, True))
    assert plain.sources.seen.tolist() == merged.sources.seen.tolist()
    assert plain.tokens.fingerprint() == merged.tokens.fingerprint()
    rows = [json.loads((made.stage.folder / ORIGIN).read_text())["train"] for made in (plain, merged)]
    assert rows[0] < rows[1]
    # Handed on, they are taken for what they are.
    with pytest.raises(UserError, match="made from other train rows"):
        tokenized(quick(tmp_path, code_tokens=str(plain.stage.folder), merge_valid=True))
    assert tokenized(quick(tmp_path, code_tokens=str(merged.stage.folder), merge_valid=True)).tokens.n_items == 81
