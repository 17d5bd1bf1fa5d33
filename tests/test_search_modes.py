"""One user at a time in kept memory, and many in batches filled to a budget: both find what the plain search finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_t5
import torch
from hypothesis import given
from hypothesis import strategies as st
from searches import (
    CODE_IDS,
    LM_SIZE,
    NORMALISERS,
    SIZES,
    TITLES,
    language_model,
    random_codes,
    searcher,
)
from test_aligntokenrec import build as build_codes
from test_aligntokenrec import users
from test_glta import N_ITEMS, N_USERS
from test_title_bases import build as build_titles
from tiny_folders import KINDS, WINDOW
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.backbone.encoder_decoder import base_of
from recbole_llm.config import NEUTRAL_KEYS
from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.level_search import LevelSearch
from recbole_llm.decoding.one_user import OneUser
from recbole_llm.decoding.opening import Opening
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.tallrec import TALLRec

OPENING = [8, 3, 9, 4]
# Some open as announced, one leaves the opening early, one is shorter than it, and one is longer than a window.
PROMPTS = [
    [*OPENING, 5, 6, 7], [*OPENING, 11, 12, *range(3, 3 + WINDOW + 5)], [*OPENING[:2], 7, 7, 7], OPENING[:3], [5],
    OPENING, [*OPENING, 5],
]  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    return language_model(request.param)


def assert_alike(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.items, wanted.items)


def ready(search: BeamSearch, opening: list[int], longest: int = 24) -> BeamSearch:
    search.open_with(opening)
    if search.opening is not None:
        search.one_user = OneUser(search.decoder, search.opening, longest, search.steps)
    return search


@pytest.mark.parametrize("kind", ["codes", "titles"])
def test_one_user_after_another_is_found_the_same(model: Any, kind: str) -> None:
    item_tokens = random_codes(30, distinct=False) if kind == "codes" else TITLES
    plain = searcher(model, item_tokens, beams=6)
    kept = ready(searcher(model, item_tokens, beams=6), OPENING)
    assert (kept.one_user is not None) == plain.shares_prompts
    assert (kept.opening is not None) == plain.shares_prompts
    if kept.opening is not None:
        assert kept.opening.tokens.tolist() == OPENING
    wanted = [plain([prompt]) for prompt in PROMPTS]
    for row in (*range(len(PROMPTS)), *reversed(range(len(PROMPTS)))):
        assert_alike(kept([PROMPTS[row]]), wanted[row])


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_without_an_opening_and_in_too_little_room(llama: Any, normaliser: str) -> None:
    plain = searcher(llama, TITLES, beams=6, normaliser=normaliser)
    for opening in ([], OPENING, [1, 1, 1]):
        kept = ready(searcher(llama, TITLES, beams=6, normaliser=normaliser), opening, longest=0)
        for prompt in PROMPTS:
            assert_alike(kept([prompt]), plain([prompt]))


WIDE = (16, 16, 16)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt2"])
@pytest.mark.parametrize("beams", [50, 100, 256])
def test_wide_searches_with_items_left_out_and_a_guide(kind: str, beams: int) -> None:
    wide = language_model(kind, LM_SIZE + sum(WIDE))
    rng = np.random.default_rng(0)
    item_tokens = ItemTokens.from_codes(np.concatenate((np.full((1, 3), -1), rng.integers(0, 16, (400, 3)))), WIDE)
    lm_ids = LM_SIZE + torch.arange(sum(WIDE))

    def made(search: type[BeamSearch] = BeamSearch) -> BeamSearch:
        return search(decoder_of(wide), Head.of(wide), item_tokens, beams=beams, lm_ids=lm_ids)

    plain, kept = made(), ready(made(), OPENING)
    for seed, prompt in enumerate(PROMPTS[:3]):
        history = torch.from_numpy(rng.integers(1, 401, (1, 40)))
        scores = torch.randn(1, 401, generator=torch.Generator().manual_seed(seed))
        for told in (
            {}, {"exclude": Exclusion(plain.trie, history)}, {"guide": Guide(plain.trie, scores, 0.5)}, {"k": 7},
        ):  # fmt: skip
            assert_alike(kept([prompt], **told), plain([prompt], **told))
        assert set(history.flatten().tolist()).isdisjoint(
            kept([prompt], exclude=Exclusion(plain.trie, history)).items.flatten().tolist()
        )
    by_level, kept_by_level = made(LevelSearch), ready(made(LevelSearch), OPENING)
    assert_alike(kept_by_level(PROMPTS[:1]), by_level(PROMPTS[:1]))


def test_who_came_before_moves_no_bit(llama: Any) -> None:
    alone = [ready(searcher(llama, TITLES, beams=6), OPENING)([prompt]) for prompt in PROMPTS]
    kept = ready(searcher(llama, TITLES, beams=6), OPENING)
    for row in (0, 1, 2, 6, 3, 5, 4, 1, 1, 0):
        found = kept([PROMPTS[row]])
        assert torch.equal(found.scores, alone[row].scores) and torch.equal(found.items, alone[row].items)


def test_memory_is_made_once(llama: Any) -> None:
    search = ready(searcher(llama, TITLES, beams=6), OPENING)
    search([PROMPTS[1]])
    assert search.one_user is not None
    before = {name: held.data_ptr() for name, held in search.one_user.buffers().items()}
    assert len(before) == 4 + 4 + 5  # two layers' keys and values; paths twice, positions twice; attention's
    for prompt in (PROMPTS[0], PROMPTS[6], PROMPTS[1]):
        search([prompt])
    assert {name: held.data_ptr() for name, held in search.one_user.buffers().items()} == before


def test_of_a_prompt_the_opening_is_not_read(llama: Any) -> None:
    search = ready(searcher(llama, TITLES, beams=6), OPENING)
    read: list[tuple[int, ...]] = []
    hook = search.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    first = []
    for prompts in ([PROMPTS[0]], [PROMPTS[2]], [PROMPTS[0]], [OPENING], [PROMPTS[0], PROMPTS[6]]):
        read.clear()
        search(prompts)
        first.append(read[0])
    hook.remove()
    assert first == [(1, 3), (1, 3), (1, 3), (1, 1), (2, 3)]


class Made(TorchDispatchMode):
    """Adds up the bytes of all memory that is asked for."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {
            tensor.untyped_storage().data_ptr()
            for tensor in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(tensor, torch.Tensor)
        }
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.total += tensor.untyped_storage().nbytes()
        return made


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_step_asks_for_no_memory_that_grows_with_the_prompt(kind: str) -> None:
    decoder = decoder_of(language_model(kind))
    reader = OneUser(decoder, Opening(decoder, OPENING), 600, [20, 20])
    totals = []
    for length in (20, 500, 600):
        ids = torch.arange(length).remainder(LM_SIZE).unsqueeze(0)
        ids[0, : len(OPENING)] = torch.tensor(OPENING)
        reader.begin(ids, torch.tensor([length]))
        tokens = torch.arange(20).unsqueeze(0)
        with Made() as made, torch.no_grad():
            reader.step(tokens, torch.zeros_like(tokens))
            reader.step(tokens, tokens.flip(1))
        totals.append(made.total)
    assert totals[0] == totals[1] == totals[2]


def test_an_encoder_reads_its_prompts_whole() -> None:
    whole = tiny_t5.model("t5", LM_SIZE + sum(SIZES))
    search = BeamSearch(base_of(whole), Head.of(whole), random_codes(12), beams=4, lm_ids=CODE_IDS)
    plain = search(PROMPTS[:2])
    search.open_with(OPENING)
    assert search.opening is None and torch.equal(search(PROMPTS[:2]).scores, plain.scores)


def test_a_decoder_that_reads_otherwise_behind_what_is_kept_keeps_nothing(llama: Any) -> None:
    class Forgetful(torch.nn.Module):
        """Counts every text from 0."""

        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = decoder_of(llama), decoder_of(llama).config

        def forward(self, input_ids: torch.Tensor, **given: Any) -> Any:
            if "position_ids" not in given:
                given["position_ids"] = torch.arange(input_ids.shape[1]).unsqueeze(0)
            return self.inner(input_ids=input_ids, **given)

    assert len(Opening(decoder_of(llama), OPENING).tokens) == len(OPENING)
    assert len(Opening(Forgetful(), OPENING).tokens) == 0


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3", "gpt2"])
def test_many_behind_an_opening_are_found_the_same(kind: str) -> None:
    made = language_model(kind)
    plain, opened = (searcher(made, TITLES, beams=6) for _ in range(2))
    opened.open_with(OPENING)
    together = [prompt for prompt in PROMPTS if prompt[: len(OPENING)] == OPENING and prompt != OPENING]
    for prompts in (together, PROMPTS):
        assert_alike(opened(prompts), plain(prompts))
        torch.testing.assert_close(
            FullRanking(opened, 3)(prompts), FullRanking(plain, 3)(prompts), atol=1e-5, rtol=1e-5
        )


# --- many users ------------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 300), max_size=60), st.integers(0, 50), st.integers(1, 2000))
def test_batches_hold_every_prompt_once_and_stay_within_the_budget(
    lengths: list[int], behind: int, tokens: int
) -> None:
    batches = batches_of(torch.tensor(lengths, dtype=torch.int64), behind, tokens)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    ordered = [lengths[row] for batch in batches for row in batch.tolist()]
    assert ordered == sorted(lengths, reverse=True)
    for batch, following in zip(batches, [*batches[1:], None]):
        width = lengths[int(batch[0])] + behind
        assert len(batch) * width <= tokens or len(batch) == 1
        # Full: one more would be too much.
        assert following is None or (len(batch) + 1) * width > tokens


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(0, 50), st.integers(1, 70))
def test_the_budget_of_some_users_is_what_they_take_at_most(lengths: list[int], behind: int, users: int) -> None:
    told = torch.tensor(lengths)
    tokens = budget_of(told, behind, users)
    assert tokens == users * (max(lengths) + behind)
    # So no batch but the last is of fewer users.
    assert all(len(batch) >= users for batch in batches_of(told, behind, tokens)[:-1])


# --- recommenders ----------------------------------------------------------------------------------------------------
EVERYBODY = users(*range(1, N_USERS))
MODES: dict[str, dict[str, Any]] = {
    "throughput": {"search_mode": "throughput"}, "latency": {"search_mode": "latency"},
    "budget": {"search_mode": "throughput", "inference_tokens": 200},
}  # fmt: skip


def recommender(name: str, folders: Any, kind: str, **settings: Any) -> Any:
    if name == "AlignTokenRec":
        return build_codes(folders(kind), **settings)
    return build_titles(folders(kind), TALLRec, name, **settings)


@pytest.mark.parametrize("name", ["AlignTokenRec", "TALLRec"])
@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
def test_every_mode_scores_the_same_rows_the_same(
    name: str, kind: str, folders: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    barred = torch.tensor([[0, 3], [0, 8], [2, 5]]).T
    candidates = torch.ones(N_ITEMS, dtype=torch.bool)
    more = {"lora_target_modules": ["in_proj"]} if kind == "mamba" else {}

    def scores(**given: Any) -> torch.Tensor:
        model = recommender(name, folders, kind, **more, **given)
        return model.full_sort_predict_excluding(EVERYBODY, *barred, candidates)

    found = {mode: scores(**given) for mode, given in MODES.items()}
    # Each prompt by itself and whole.
    monkeypatch.setattr(BeamSearch, "open_with", lambda search, tokens: None)
    wanted = scores(search_mode="throughput", inference_tokens=1)
    assert wanted.isneginf().sum() == len(wanted) + 3
    for scored in found.values():
        torch.testing.assert_close(scored, wanted, atol=1e-5, rtol=1e-5)


def test_one_user_is_searched_in_memory_that_is_kept_and_many_are_not(folders: Any) -> None:
    model = recommender("AlignTokenRec", folders, "llama")
    assert model.asks_alone(1) and not model.asks_alone(2)
    model.full_sort_predict(users(1))
    kept = model._one_user[2]
    before = {name: held.data_ptr() for name, held in kept.buffers().items()}
    for rows in ((2,), (1, 2, 3), (4,), (1,)):
        model.full_sort_predict(users(*rows))
        assert (model._search[1].one_user is kept) == (len(rows) == 1)
    # What the longest history needs was there from the first.
    assert model._one_user[2] is kept and {name: held.data_ptr() for name, held in kept.buffers().items()} == before
    together = recommender("AlignTokenRec", folders, "llama", search_mode="throughput")
    together.full_sort_predict(users(1))
    assert together._search[1].one_user is None and together._one_user[2] is None


def test_what_prompts_open_with_is_found_and_forgotten_with_the_weights(folders: Any) -> None:
    model = recommender("AlignTokenRec", folders, "llama")
    before = model.full_sort_predict(users(1, 4))
    told = model.writer.ask(Ragged.from_lists([[1], [9, 3], [29, 2, 2, 4]]))
    prompts = [prompt.tolist() for prompt in told.values.split(told.lengths.tolist())]
    opening = model._opening()
    assert opening and all(prompt[: len(opening)] == opening for prompt in prompts)
    assert len({prompt[len(opening)] for prompt in prompts}) > 1
    held = model._search[1].opening
    with torch.no_grad():
        model.backbone.embed_tokens.weight[opening[-1]] += 5.0
    model.train()
    assert model._one_user is None
    model.eval()
    moved = model.full_sort_predict(users(1, 4))
    assert model._search[1].opening is not held and not torch.allclose(moved, before, atol=1e-3)
    fresh = recommender("AlignTokenRec", folders, "llama", inference_batch_size=1)
    with torch.no_grad():
        fresh.backbone.embed_tokens.weight[opening[-1]] += 5.0
    torch.testing.assert_close(moved, fresh.full_sort_predict(users(1, 4)), atol=1e-4, rtol=1e-5)


def test_latency_without_a_search_is_refused(folders: Any) -> None:
    with pytest.raises(UserError, match="search_mode: latency is a way of beam search; with ranking: full leave it"):
        recommender("AlignTokenRec", folders, "llama", search_mode="latency", ranking="full")


def test_modes_are_no_part_of_a_fingerprint() -> None:
    for key in ("search_mode", "inference_tokens"):
        assert key in NEUTRAL_KEYS
