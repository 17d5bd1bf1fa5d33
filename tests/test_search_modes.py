"""One user at a time in kept memory, and many in batches filled to a budget: both find what the plain search finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_t5
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_beam_search import (
    CODE_IDS,
    LM_SIZE,
    NORMALISERS,
    SIZES,
    TITLES,
    language_model,
    random_codes,
    searcher,
)
from tiny_folders import KINDS, WINDOW
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.backbone.encoder_decoder import base_of
from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.level_search import LevelSearch
from recbole_llm.decoding.one_user import OneUser
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens

OPENING = [8, 3, 9, 4]
# Some open as announced, one leaves the opening early, one is shorter than it, and one is longer than a window.
PROMPTS = [
    [*OPENING, 5, 6, 7], [*OPENING, 11, 12, *range(3, 3 + WINDOW + 5)], [*OPENING[:2], 7, 7, 7], OPENING[:3], [5],
    OPENING, [*OPENING, 5],
]  # fmt: skip


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    return language_model(request.param)


@pytest.fixture(scope="module")
def llama() -> Any:
    return language_model("llama")


def assert_alike(found: Found, wanted: Found) -> None:
    torch.testing.assert_close(found.scores, wanted.scores, atol=1e-5, rtol=1e-5)
    assert torch.equal(found.items, wanted.items)


def ready(search: BeamSearch, opening: list[int], longest: int = 24) -> BeamSearch:
    search.one_user = search.for_one_user(opening, longest)
    return search


@pytest.mark.parametrize("kind", ["codes", "titles"])
def test_one_user_after_another_is_found_the_same(model: Any, kind: str) -> None:
    item_tokens = random_codes(30, distinct=False) if kind == "codes" else TITLES
    plain = searcher(model, item_tokens, beams=6)
    kept = ready(searcher(model, item_tokens, beams=6), OPENING)
    assert (kept.one_user is not None) == plain.shares_prompts
    if kept.one_user is not None:
        assert kept.one_user.kept == len(OPENING)
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


def test_memory_is_made_once_and_the_opening_read_once(llama: Any) -> None:
    search = ready(searcher(llama, TITLES, beams=6), OPENING)
    search([PROMPTS[1]])
    assert search.one_user is not None
    before = {name: held.data_ptr() for name, held in search.one_user.buffers().items()}
    assert len(before) == 4 + 4 + 5  # two layers' keys and values; paths twice, positions twice; attention's
    for prompt in (PROMPTS[0], PROMPTS[6], PROMPTS[1]):
        search([prompt])
    assert {name: held.data_ptr() for name, held in search.one_user.buffers().items()} == before
    assert search.one_user.opened == 1
    # One that leaves the opening is written over it.
    search([PROMPTS[2]])
    search([PROMPTS[2]])
    assert search.one_user.opened == 1
    search([PROMPTS[0]])
    assert search.one_user.opened == 2


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
    reader = OneUser(decoder_of(language_model(kind)), OPENING, 600, [20, 20])
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


def test_an_encoder_keeps_nothing_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    whole = tiny_t5.model("t5", LM_SIZE + sum(SIZES))
    kept = BeamSearch(base_of(whole), Head.of(whole), random_codes(12), beams=4, lm_ids=CODE_IDS)
    with caplog.at_level("INFO", logger="recbole_llm"):
        assert kept.for_one_user(OPENING, 24) is None
    assert "a T5Model keeps nothing between users: each prompt is read whole" in caplog.text


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

    assert OneUser(decoder_of(llama), OPENING, 40, [2]).kept == len(OPENING)
    assert OneUser(Forgetful(), OPENING, 40, [2]).kept == 0


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
