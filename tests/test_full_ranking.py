"""Every item scored by reading the trie once, and the best of them by reading part of it: against plain readings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from searches import (
    CODE_IDS,
    LM_SIZE,
    NORMALISERS,
    PROMPTS,
    SIZES,
    TITLES,
    exhaustive,
    language_model,
    random_codes,
    searcher,
)
from small_models import SMALL
from tiny_folders import KINDS

from recbole_llm.data.ties import tie_order
from recbole_llm.decoding import tree_reader
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.pruned_ranking import PrunedRanking
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.training.runs import run


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    return language_model(request.param)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("kind", ["codes", "titles"])
def test_scores_are_those_of_plain_readings(model: Any, kind: str, normaliser: str) -> None:
    item_tokens = random_codes(14, distinct=False) if kind == "codes" else TITLES
    search = searcher(model, item_tokens, beams=2, normaliser=normaliser)
    wanted = torch.stack([exhaustive(model, item_tokens, prompt, normaliser) for prompt in PROMPTS])
    for nodes in (1, 3, 256):
        found = FullRanking(search, nodes)(PROMPTS)
        torch.testing.assert_close(found.double(), wanted, atol=2e-4, rtol=1e-4)


def test_200_users_and_500_items() -> None:
    sizes = (16, 16, 16)
    model = language_model("llama", LM_SIZE + sum(sizes))
    rng = np.random.default_rng(0)
    codes = np.concatenate((np.full((1, 3), -1), rng.integers(0, 16, (500, 3))))
    item_tokens = ItemTokens.from_codes(codes, sizes)
    lm_ids = LM_SIZE + torch.arange(sum(sizes))
    prompts = [rng.integers(3, LM_SIZE, rng.integers(1, 12)).tolist() for _ in range(200)]
    search = BeamSearch(decoder_of(model), Head.of(model), item_tokens, beams=1, lm_ids=lm_ids)
    found = FullRanking(search, 100)(prompts)
    told = lm_ids[item_tokens.tokens.view(500, 3)]
    for row, prompt in enumerate(prompts):
        with torch.no_grad():
            ids = torch.cat((torch.tensor(prompt).expand(500, -1), told), dim=1)
            logs = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(-1)
        wanted = logs.gather(2, told.unsqueeze(-1)).sum((1, 2))
        torch.testing.assert_close(found[row, 1:], wanted, atol=1e-4, rtol=0)
    assert found[:, 0].isneginf().all()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 40), st.integers(0, 10**6), st.sampled_from(NORMALISERS), st.integers(1, 60), st.data(),
)  # fmt: skip
def test_pruned_is_the_top_of_the_full(
    llama: Any, items: int, seed: int, normaliser: str, nodes: int, data: st.DataObject
) -> None:
    item_tokens = random_codes(items, seed, distinct=False)
    excluded = torch.tensor(
        data.draw(
            st.lists(
                st.lists(st.integers(0, items), min_size=2, max_size=2), min_size=len(PROMPTS), max_size=len(PROMPTS)
            )
        )
    )
    left = items - max(len(set(row.tolist()) - {0}) for row in excluded)
    beams = data.draw(st.integers(1, max(left, 1)))
    if left < beams:
        return
    order = tie_order([f"{seed}-{item}" for item in range(items + 1)])
    search = searcher(
        llama,
        item_tokens,
        beams=beams,
        normaliser=normaliser,
        tie_order=order,
    )
    wanted = FullRanking(search, nodes)(PROMPTS).scatter(1, excluded, -torch.inf)
    found = PrunedRanking(search, nodes)(PROMPTS, exclude=Exclusion(search.trie, excluded))
    torch.testing.assert_close(found.scores, wanted.topk(beams, dim=1).values, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(wanted.gather(1, found.items), found.scores, atol=1e-4, rtol=1e-4)
    assert all(len(set(row)) == beams for row in found.items.tolist())


@pytest.mark.parametrize("normaliser", ["legal", "vocabulary"])
def test_what_the_beams_found_is_kept_where_the_second_reading_differs(
    llama: Any, normaliser: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [[int(token)] for token in torch.arange(3, 60)]
    search = searcher(llama, random_codes(55), beams=10, normaliser=normaliser)
    pruned, generator = PrunedRanking(search, 64), torch.Generator().manual_seed(5)
    read = pruned._states

    def noisy(*given: Any) -> torch.Tensor:
        states = read(*given)
        return states * (1 + 10.0 * torch.randn(states.shape, generator=generator))

    monkeypatch.setattr(pruned, "_states", noisy)
    found = pruned(prompts)
    assert found.scores.isfinite().all()
    assert all(len(set(row)) == 10 for row in found.items.tolist())


def test_pruning_finds_what_one_beam_misses_and_reads_a_part(llama: Any) -> None:
    item_tokens = random_codes(55)
    prompts = [[int(token)] for token in torch.arange(3, 60)]
    search = searcher(llama, item_tokens, beams=1)
    best = FullRanking(search, 64)(prompts).argmax(1)
    pruned = PrunedRanking(search, 64)
    missed = search(prompts).items[:, 0] != best
    assert missed.any()
    assert torch.equal(pruned(prompts).items[:, 0], best)
    assert 0 < pruned.visited_share < 1


def test_a_node_with_one_item_below_is_not_read_where_only_legal_tokens_count(llama: Any) -> None:
    item_tokens = random_codes(20)
    reads = {name: FullRanking(searcher(llama, item_tokens, beams=1, normaliser=name), 8).reads for name in NORMALISERS}
    paths = {tuple(tokens[:depth]) for tokens in map(item_tokens.of, range(1, 21)) for depth in (1, 2)}
    several = {
        path for path in paths if sum(tuple(item_tokens.of(item)[: len(path)]) == path for item in range(1, 21)) > 1
    }
    assert reads == {"vocabulary": len(paths), "level": len(paths), "legal": len(several)}


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_a_guide_has_its_say(llama: Any, weight: float) -> None:
    item_tokens = random_codes(30, distinct=False)
    search = searcher(llama, item_tokens, beams=4)
    scores = torch.randn(len(PROMPTS), 31, generator=torch.Generator().manual_seed(1))
    guide = Guide(search.trie, scores, weight)
    alone = torch.stack([exhaustive(llama, item_tokens, prompt, "vocabulary") for prompt in PROMPTS])[:, 1:]
    wanted = weight * alone + (1 - weight) * scores[:, 1:].log_softmax(1)
    found = FullRanking(search, 5)(PROMPTS, guide)[:, 1:]
    torch.testing.assert_close(found.double(), wanted.double(), atol=2e-4, rtol=1e-4)
    top = PrunedRanking(search, 5)(PROMPTS, guide=guide)
    torch.testing.assert_close(top.scores, found.topk(4).values, atol=2e-4, rtol=1e-4)


def test_progress_is_told_and_nonsense_refused(llama: Any) -> None:
    search = searcher(llama, random_codes(30), beams=1)
    told: list[int] = []
    ranking = FullRanking(search, 7)
    ranking(PROMPTS, told=told.append)
    assert sum(told) == ranking.reads
    assert max(told) == 7
    for kind in (FullRanking, PrunedRanking):
        with pytest.raises(UserError, match="tree_nodes is 0"):
            kind(search, 0)
        with pytest.raises(UserError, match="no tokens"):
            kind(search, 4)([[]])


def test_no_more_is_held_than_a_piece(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The room behind the prompts does not grow with the catalogue."""
    rooms: list[int] = []
    plain = tree_reader.Roomy.__init__

    def noted(self: tree_reader.Roomy, room: int) -> None:
        rooms.append(room)
        plain(self, room)

    rankings = [FullRanking(searcher(llama, random_codes(items), beams=1), 4) for items in (10, 55)]
    monkeypatch.setattr(tree_reader.Roomy, "__init__", noted)
    for ranking in rankings:
        ranking(PROMPTS)
    assert len(set(rooms)) == 1
    assert rooms[0] < len(SIZES) + 6
    assert len(CODE_IDS) == sum(SIZES)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["AlignTokenRec", "TALLRec"])
def test_a_run_ranks_the_whole_catalogue(tmp_path: Path, name: str) -> None:
    """Of one training: the first of a full and a pruned ranking are equal, and measures go beyond the beams."""
    own = SMALL[name] | {"epochs": 1, "beams": 10, "topk": [10], "output_dir": str(tmp_path), "tensorboard": False}
    results = {how: run(name, "tiny", config_dict=own | {"ranking": how}) for how in ("beam", "full", "pruned")}
    assert {how: result["evaluation"]["ranking"] for how, result in results.items()} == {how: how for how in results}
    assert results["full"]["test"] == pytest.approx(results["pruned"]["test"])
    assert 0 < results["pruned"]["evaluation"]["visited_share"] <= 1
    assert not {"visited_share"} & (results["full"]["evaluation"].keys() | results["beam"]["evaluation"].keys())
    deep = run(name, "tiny", config_dict=own | {"ranking": "full", "topk": [10, 60], "metrics": ["NDCG", "GAUC"]})
    assert deep["test"]["ndcg@10"] == pytest.approx(results["full"]["test"]["ndcg@10"])
    assert deep["test"]["ndcg@60"] > deep["test"]["ndcg@10"]
    assert 0 < deep["test"]["gauc"] < 1


def test_a_level_search_scores_no_catalogue(settings_of: Any) -> None:
    own = settings_of(item_text="{movie_title}", **SMALL["AlignTokenRec"])
    with pytest.raises(UserError, match="with constraint: level set ranking: beam"):
        run("AlignTokenRec", "small", config_dict=own | {"ranking": "full", "constraint": "level"})
