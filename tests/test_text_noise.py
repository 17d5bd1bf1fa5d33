"""Texts left out or exchanged: by raw ids, nested, and part of every stage that reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import SMALL

from recbole_llm.data.item_text import ItemText
from recbole_llm.data.text_noise import with_noise
from recbole_llm.training.runs import run

FALLBACK = "Nr. {item_id}"


def item_text(tokens: list[str], missing: set[str]) -> ItemText:
    texts = ["", *(f"Nr. {token}" if token in missing else f"text of {token}" for token in tokens)]
    named = (False, *(token not in missing for token in tokens))
    return ItemText(texts, len(tokens) - sum(named), "{title}", FALLBACK, named)


catalogue = st.lists(st.text("abcdef", min_size=1, max_size=4), min_size=1, max_size=40, unique=True)
share = st.floats(0, 1)


def by_token(text: ItemText, tokens: list[str]) -> dict[str, str]:
    return dict(zip(tokens, text.texts[1:], strict=True))


@given(catalogue, st.data(), share, share, st.integers(0, 5))
def test_shares_are_exact_and_the_exchange_leaves_nobody_his_own(
    tokens: list[str], data: st.DataObject, drop: float, shuffle: float, seed: int
) -> None:
    missing = set(data.draw(st.lists(st.sampled_from(tokens), max_size=len(tokens) // 2)))
    plain = item_text(tokens, missing)
    own = len(tokens) - len(missing)
    noisy = with_noise(plain, ["[PAD]", *tokens], drop, shuffle, seed)
    assert noisy.texts[0] == "" and len(noisy.texts) == len(plain.texts)
    assert abs(noisy.dropped - drop * own) <= 0.5 and noisy.missing == plain.missing + noisy.dropped
    assert sum(noisy.named) == own - noisy.dropped
    read = by_token(noisy, tokens)
    assert all(read[token] == f"Nr. {token}" for token in missing)
    exchanged = with_noise(plain, ["[PAD]", *tokens], 0, shuffle, seed)
    moved = [token for token in tokens if by_token(exchanged, tokens)[token] != by_token(plain, tokens)[token]]
    assert len(moved) == exchanged.shuffled and (exchanged.shuffled == 0 or abs(len(moved) - shuffle * own) <= 0.5)
    assert sorted(exchanged.texts) == sorted(plain.texts), "texts change hands, none is lost or doubled"


@given(catalogue, st.tuples(share, share).map(sorted), st.sampled_from(["drop", "shuffle"]), st.integers(0, 5))
def test_what_a_share_touches_a_larger_one_touches(
    tokens: list[str], shares: list[float], kind: str, seed: int
) -> None:
    plain = item_text(tokens, set())
    touched = []
    for size in shares:
        noisy = with_noise(plain, ["[PAD]", *tokens], **{"drop": 0.0, "shuffle": 0.0, kind: size}, seed=seed)
        touched.append({item for item in range(len(noisy.texts)) if noisy.texts[item] != plain.texts[item]})
    assert touched[0] <= touched[1]


@given(catalogue, share, share, st.integers(0, 5), st.randoms(use_true_random=False))
def test_internal_ids_do_not_matter(tokens: list[str], drop: float, shuffle: float, seed: int, random: Any) -> None:
    others = list(tokens)
    random.shuffle(others)
    one, two = (
        by_token(with_noise(item_text(order, set()), ["[PAD]", *order], drop, shuffle, seed), order)
        for order in (tokens, others)
    )
    assert one == two


def test_another_seed_chooses_others_and_no_noise_is_the_same_object() -> None:
    tokens = [f"i{number}" for number in range(50)]
    plain = item_text(tokens, set())
    assert with_noise(plain, ["[PAD]", *tokens], 0.0, 0.0, 1) is plain
    one, two = (with_noise(plain, ["[PAD]", *tokens], 0.5, 0.0, seed).texts for seed in (1, 2))
    assert one != two


@pytest.mark.parametrize("noise", [{"text_drop": 0.5}, {"text_shuffle": 0.5}])
def test_every_stage_that_reads_texts_is_another_one(
    settings_of: Callable[..., dict[str, Any]], noise: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings_of(item_text="{movie_title} {class}", **SMALL["GLTA"])
    plain = run("GLTA", "small", config_dict=settings)
    noisy = run("GLTA", "small", config_dict=settings | noise)
    marks = [{stage["name"]: stage["fingerprint"] for stage in result["stages"]} for result in (plain, noisy)]
    same = {name for name in marks[0] if marks[0][name] == marks[1][name]}
    read = {"item_text_alignment", "user_item_alignment"}
    # An exchange leaves the language model's corpus as it was: the same texts, whoever they belong to.
    read |= {"backbone"} if "text_drop" in noise else set()
    assert same.isdisjoint(read) and "graph_model" in same
    counts = noisy["item_text"]
    assert counts["dropped" if "text_drop" in noise else "shuffled"] > 0
    assert "text_noise_seed 2020" in open(noisy["log_file"], encoding="utf-8").read()
    again = run("GLTA", "small", config_dict=settings | noise | {"text_noise_seed": 3})
    assert again["stages"][-1]["fingerprint"] != noisy["stages"][-1]["fingerprint"]
