"""The quality card of a codebook: golden values by hand, chance levels against brute force, what is refused."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from recbole_llm.errors import UserError
from recbole_llm.evaluation.pictures import draw_codebook
from recbole_llm.itemid.codebook import ResidualCodebook
from recbole_llm.itemid.kmeans import kmeans
from recbole_llm.itemid.quality import card, hashing, nearest_rows, neighbour_agreement, prefix_chance, prefix_groups
from recbole_llm.itemid.quality_text import as_text

# Items 1-6 with codes of two levels, of sizes 4 and 2; item 4 has none. 1, 2 and 6 are equal.
CODES = np.array([[-1, -1], [0, 1], [0, 1], [0, 0], [-1, -1], [2, 1], [0, 1]])
# The policy's third level tells them apart.
FINAL = np.array([[-1] * 3, [0, 1, 0], [0, 1, 1], [0, 0, 0], [-1] * 3, [2, 1, 0], [0, 1, 2]])
SIZES = [4, 2]

tables = arrays(np.int64, st.tuples(st.integers(2, 30), st.integers(1, 5)), elements=st.integers(0, 3))


def points(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def row_of(table: list[dict[str, Any]], levels: int) -> dict[str, Any]:
    return next(row for row in table if row.get("levels", row.get("level")) == levels)


def test_collisions_of_a_hand_made_codebook() -> None:
    made = card(CODES, SIZES, final_codes=FINAL, policy="extra_token")
    assert (made["items"], made["items_without_tokens"], made["levels"]) == (5, 1, 2)
    first, second, third = made["collisions"]
    # Codes 0 and 2 at level 1: two groups of 4 and 1.
    assert first["before"] == {"rate": pytest.approx(1 - 2 / 5), "sharing": pytest.approx(4 / 5), "largest": 4}
    assert second["before"] == {"rate": pytest.approx(1 - 3 / 5), "sharing": pytest.approx(3 / 5), "largest": 3}
    assert second["after"] == second["before"]
    assert third["before"] is None and third["hashing"] is None
    assert third["after"] == {"rate": 0.0, "sharing": 0.0, "largest": 1}


def test_use_of_the_codes_by_hand() -> None:
    first, second = card(CODES, SIZES)["usage"]
    assert first["counts"] == [4, 1, 0, 0]
    assert (first["used"], first["utilisation"], first["max_share"]) == (2, 0.5, 0.8)
    entropy = -(0.8 * math.log2(0.8) + 0.2 * math.log2(0.2))
    assert first["entropy"] == pytest.approx(entropy)
    assert first["perplexity"] == pytest.approx(2**entropy)
    # Mean absolute difference of all pairs of codes, over twice their mean.
    shares = [0.0, 0.0, 0.2, 0.8]
    gini = sum(abs(a - b) for a, b in itertools.product(shares, shares)) / (2 * 4 * 4 * 0.25)
    assert first["gini"] == pytest.approx(gini)
    assert second["counts"] == [4, 1]


def test_even_and_single_use_are_the_ends_of_the_scales() -> None:
    even = card(np.arange(-1, 8)[:, None], [8])["usage"][0]
    assert (even["entropy"], even["perplexity"]) == (pytest.approx(3), pytest.approx(8))
    assert even["gini"] == pytest.approx(0)
    single = card(np.array([[-1], [5], [5], [5]]), [8])["usage"][0]
    assert (single["entropy"], single["perplexity"], single["used"]) == (0, 1, 1)
    assert single["gini"] == pytest.approx(1 - 1 / 8)


def test_the_largest_groups_are_named() -> None:
    names, titles = [f"B{item}" for item in range(7)], [f"Title {item}" for item in range(7)]
    groups = card(CODES, SIZES, final_codes=FINAL, names=names, titles=titles)["largest_groups"]
    assert groups == {
        "before": [
            {
                "items": 3,
                "tokens": [0, 1],
                "examples": [{"item": f"B{item}", "title": f"Title {item}"} for item in (1, 2, 6)],
            }
        ],
        "after": [],
    }


@pytest.mark.parametrize(("levels", "rate", "sharing"), [(2, 0.1183, 0.227), (3, 0.0005, 0.0010), (4, 0.0, 0.0)])
def test_hashing_of_the_games_catalogue_is_the_known_figure(levels: int, rate: float, sharing: float) -> None:
    found = hashing(16_859, 256**levels)
    assert found["rate"] == pytest.approx(rate, abs=5e-5)
    assert found["sharing"] == pytest.approx(sharing, abs=5e-4)


@pytest.mark.parametrize(("items", "cells"), [(50, 40), (200, 1000), (30, 1)])
def test_hashing_equals_a_simulation(items: int, cells: int) -> None:
    rng = np.random.default_rng(1)
    draws = 2000
    counts = np.zeros((draws, cells), dtype=int)
    np.add.at(counts, (np.arange(draws)[:, None], rng.integers(cells, size=(draws, items))), 1)
    rates = 1 - (counts > 0).sum(1) / items
    sharing = np.where(counts > 1, counts, 0).sum(1) / items
    found = hashing(items, cells)
    for simulated, exact in ((rates, found["rate"]), (sharing, found["sharing"])):
        assert exact == pytest.approx(simulated.mean(), abs=5 * simulated.std() / draws**0.5 + 1e-12)


def test_hashing_into_more_cells_than_a_float_can_count() -> None:
    found = hashing(1000, 256**16)
    assert 0 <= found["rate"] < 1e-12
    assert 0 <= found["sharing"] < 1e-12
    assert hashing(1, 5) == {"rate": pytest.approx(0), "sharing": 0}


@given(tables)
@settings(max_examples=100, deadline=None)
def test_more_levels_never_collide_more(codes: np.ndarray) -> None:
    rows = card(codes, [4] * codes.shape[1])["collisions"]
    for one, next_one in itertools.pairwise(rows):
        assert next_one["before"]["rate"] <= one["before"]["rate"]
        assert next_one["before"]["sharing"] <= one["before"]["sharing"]
        assert next_one["before"]["largest"] <= one["before"]["largest"]
    assert rows[-1]["before"]["rate"] == pytest.approx(1 - len({tuple(row) for row in codes.tolist()}) / len(codes))


@given(tables)
@settings(max_examples=100, deadline=None)
def test_chance_equals_all_pairs_of_items(codes: np.ndarray) -> None:
    for levels, group in enumerate(prefix_groups(codes), 1):
        pairs = list(itertools.combinations(codes[:, :levels].tolist(), 2))
        assert prefix_chance(group) == pytest.approx(sum(a == b for a, b in pairs) / len(pairs))


def test_neighbours_and_their_agreement_equal_brute_force() -> None:
    rows, k = points(60, 5), 4
    codes = np.random.default_rng(2).integers(0, 3, size=(60, 4))
    unit = rows.astype(np.float64) / np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    near = np.argsort(-cosine, axis=1)[:, :k]
    assert np.array_equal(nearest_rows(rows, np.arange(60), k), near)
    found = neighbour_agreement(rows, codes, k, queries=1000, seed=0)
    assert found is not None and (found["k"], found["items"], found["queries"]) == (4, 60, 60)
    assert [row["levels"] for row in found["agreement"]] == [1, 2, 3]
    for row in found["agreement"]:
        prefix = codes[:, : row["levels"]]
        share = np.mean([(prefix[item] == prefix[other]).all() for item in range(60) for other in near[item]])
        assert row["share"] == pytest.approx(share)
        assert row["ratio"] == pytest.approx(share / row["chance"]) if row["chance"] else row["ratio"] is None


def test_an_item_among_its_equals_is_no_neighbour_of_itself() -> None:
    rows = np.repeat(points(3, 4), 10, axis=0)
    near = nearest_rows(rows, np.arange(30), 3)
    assert (near != np.arange(30)[:, None]).all()
    assert (near // 10 == np.arange(30)[:, None] // 10).all()


def test_a_large_catalogue_is_sampled_with_the_seed() -> None:
    rows, codes = points(400, 6), np.random.default_rng(3).integers(0, 4, size=(400, 2))
    one, same, other = (neighbour_agreement(rows, codes, 5, queries=50, seed=seed) for seed in (1, 1, 2))
    assert one is not None and other is not None
    assert one == same and one["queries"] == 50
    assert one["agreement"][0]["share"] != other["agreement"][0]["share"]
    assert one["agreement"][0]["chance"] == other["agreement"][0]["chance"]


def test_an_item_without_a_vector_takes_no_part() -> None:
    rows = points(20, 4)
    rows[:5] = 0
    codes = np.zeros((20, 1), dtype=np.int64)
    found = neighbour_agreement(rows, codes, 100, queries=100, seed=0)
    assert found is not None and (found["k"], found["items"]) == (14, 15)
    assert found["agreement"] == [{"levels": 1, "share": 1.0, "chance": 1.0, "ratio": 1.0}]
    assert neighbour_agreement(np.zeros((20, 4), dtype=np.float32), codes, 5, 100, 0) is None


def test_codes_of_clusters_agree_and_shuffled_ones_are_at_chance() -> None:
    rng = np.random.default_rng(4)
    cluster = rng.integers(0, 8, size=800)
    rows = points(8, 16)[cluster] + 0.1 * points(800, 16, seed=5)
    good = neighbour_agreement(rows, cluster[:, None], 10, 1000, 0)
    none = neighbour_agreement(rows, rng.permutation(cluster)[:, None], 10, 1000, 0)
    assert good is not None and none is not None
    assert good["agreement"][0]["share"] == 1
    assert none["agreement"][0]["ratio"] == pytest.approx(1, abs=0.2)


def full_card() -> dict[str, Any]:
    rng = np.random.default_rng(6)
    codes = rng.integers(0, 8, size=(200, 3))
    codes[0] = -1
    final = np.concatenate([codes, np.where(codes[:, :1] < 0, -1, np.arange(200)[:, None] % 9)], axis=1)
    return card(
        codes,
        [8] * 3,
        final_codes=final,
        policy="extra_token",
        embeddings=points(200, 4),
        texts=torch.from_numpy(points(200, 6)),
        names=[str(item) for item in range(200)],
        titles=["A long title " * 10] * 200,
    )


def test_the_card_is_plain_json_and_its_text_says_every_figure() -> None:
    made = full_card()
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    text = as_text(made)
    for row in made["collisions"]:
        if row["before"]:
            assert f"{row['before']['rate']:.4f}" in text
    assert f"{made['neighbours']['texts']['agreement'][0]['share']:.4f}" in text
    assert "after extra_token" in text
    assert max(map(len, text.splitlines())) <= 120


def test_the_columns_of_each_table_stand_flush() -> None:
    table = as_text(full_card()).split("\n\n")[1].splitlines()
    assert len({len(line) for line in table[1:7]}) == 1


@pytest.mark.parametrize("small", [False, True])
def test_the_picture_is_drawn(small: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    made = card(CODES, SIZES) if small else json.loads(json.dumps(full_card()))
    draw_codebook(made, tmp_path / "card.png")
    assert (tmp_path / "card.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given_codes", "more", "words"),
    [
        (np.full((3, 2), -1), {}, "no item has tokens"),
        (np.array([[-1, -1], [1, -1]]), {}, "item 1 has a code at some levels only"),
        (np.array([[-1, -1], [1, 2]]), {}, "item 1 has code 2 at level 2, which has 2 codes"),
        (CODES[:, :1], {}, "not those of 2 levels"),
        (CODES, {"embeddings": points(9, 3)}, "9 embeddings for codes of 7 items"),
        (CODES, {"embeddings": np.full((7, 3), np.nan)}, "hold a value that is no number, the first that of item 1"),
        (CODES, {"final_codes": FINAL[:5]}, "not of the same items"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(given_codes: np.ndarray, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        card(given_codes, SIZES, **more)
    assert "\n" not in str(caught.value)


def residual_codebook(residual: str) -> tuple[ResidualCodebook, np.ndarray, np.ndarray]:
    """A codebook of three levels by k-means, with points and their codes; the first is the padding."""
    rows = points(300, 4)
    levels, left = [], rows[1:].copy()
    for level in range(3):
        centres, near = kmeans(left, 8, seed=level)
        levels.append(centres)
        left = left - centres[near] if residual == "signed" else np.abs(left - centres[near])
    codebook = ResidualCodebook(torch.from_numpy(np.stack(levels)), "l2", residual)
    codes = np.full((300, 3), -1)
    codes[1:] = codebook.encode(torch.from_numpy(rows[1:]))[0].numpy()
    return codebook, rows, codes


def test_reconstruction_equals_the_sums_of_codes() -> None:
    codebook, rows, codes = residual_codebook("signed")
    view = card(codes, [8] * 3, embeddings=rows, codebook=codebook)["reconstruction"]
    assert (view["distance"], view["residual"]) == ("l2", "signed")
    x, levels = rows[1:].astype(np.float64), codebook.levels.numpy().astype(np.float64)
    left, spread = x.copy(), np.square(x - x.mean(0)).sum()
    for level, row in enumerate(view["levels"]):
        assert row["level"] == level + 1
        left = left - levels[level][codes[1:, level]]
        assert row["explained"] == pytest.approx(1 - np.square(left).sum() / spread, rel=1e-5)
        # The squared distance of a level's input to its code is what that code leaves.
        assert row["mean_distance"] == pytest.approx(np.square(left).sum(1).mean(), rel=1e-4)
    assert view["levels"][0]["explained"] < view["levels"][2]["explained"]


def test_codes_of_absolute_residuals_explain_nothing_by_their_sum() -> None:
    codebook, rows, codes = residual_codebook("abs")
    made = card(codes, [8] * 3, embeddings=rows, codebook=codebook)
    assert [row["explained"] for row in made["reconstruction"]["levels"]] == [None] * 3
    assert "do not add up" in as_text(made)
