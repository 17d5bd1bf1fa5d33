"""Beam search on the trie: against scoring every item, against transformers' own search, and what it may never do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from searches import (
    CODE_IDS,
    END,
    LM_SIZE,
    NORMALISERS,
    PROMPTS,
    SIZES,
    TITLES,
    assert_best_where_rows_are_left_out,
    assert_same_ranking,
    exhaustive,
    language_model,
    random_codes,
    searcher,
)
from tiny_folders import KINDS
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.data.ties import tie_order
from recbole_llm.decoding.beam_search import BeamSearch, best
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.pruned_ranking import PrunedRanking
from recbole_llm.decoding.shared_cache import SharedPrompts
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    return language_model(request.param)


@pytest.mark.parametrize("normaliser", NORMALISERS)
@pytest.mark.parametrize("kind", ["codes", "titles"])
def test_equals_exhaustive_search(model: Any, kind: str, normaliser: str) -> None:
    item_tokens = random_codes(12) if kind == "codes" else TITLES
    count = item_tokens.n_items - 1
    search = searcher(model, item_tokens, beams=count, normaliser=normaliser)
    found = search(PROMPTS, leaked=True)
    for row, prompt in enumerate(PROMPTS):
        wanted = exhaustive(model, item_tokens, prompt, normaliser)
        assert_same_ranking(found.items[row].tolist(), found.scores[row], wanted)
        # Of the tokens that are read.
        read = item_tokens.unique_prefixes() if normaliser == "legal" else item_tokens
        among = exhaustive(model, read, prompt, "legal" if normaliser == "legal" else "level")
        share = (exhaustive(model, read, prompt, "vocabulary") - among)[found.items[row]].exp()
        torch.testing.assert_close(found.leaked[row].double(), 1 - share, atol=1e-4, rtol=1e-4)


def test_prompts_are_shared_wherever_keys_and_values_are_all_there_is(model: Any) -> None:
    assert searcher(model, TITLES, beams=2).shares_prompts == (model.config.model_type not in ("mamba", "lfm2"))


def begun_by(search: BeamSearch, item_tokens: ItemTokens, width: int) -> Any:
    """transformers' prefix function over plain sets, for prompts filled up on the left to one width."""
    legal: dict[tuple[int, ...], set[int]] = {}
    lm_ids = CODE_IDS if item_tokens.lm_ids is None else item_tokens.lm_ids
    for item in range(1, item_tokens.n_items):
        ids = lm_ids[item_tokens.of(item)].tolist()
        for depth, token in enumerate(ids):
            legal.setdefault(tuple(ids[:depth]), set()).add(token)
    # Behind an end token, of titles as of codes, comes whatever ends the sequence.
    return lambda _, sentence: sorted(legal.get(tuple(sentence[width:].tolist()), {END}))


def generated(model: Any, item_tokens: ItemTokens, prompts: list[list[int]], beams: int) -> tuple[Any, Any]:
    """Items [B, beams] and their scores by transformers' own search."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    seen = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    lengths = item_tokens.lengths.max()
    out = model.generate(
        input_ids=ids, attention_mask=seen, num_beams=beams, num_return_sequences=beams, do_sample=False,
        max_new_tokens=int(lengths), length_penalty=0.0, early_stopping=False, return_dict_in_generate=True,
        output_scores=True, prefix_allowed_tokens_fn=begun_by(model, item_tokens, width), pad_token_id=0,
        eos_token_id=END if item_tokens.kind == "titles" else None,
    )  # fmt: skip
    tokens = out.sequences[:, width:]
    if item_tokens.kind == "titles":
        own = item_tokens.own(tokens)
        behind = (tokens == END).cumsum(1) - (tokens == END).long() > 0
        found = item_tokens.items_of(own.masked_fill(behind, -1))
    else:
        back = torch.full((LM_SIZE + sum(SIZES),), -1)
        back[CODE_IDS] = torch.arange(len(CODE_IDS))
        found = item_tokens.items_of(back[tokens])
    return found.view(len(prompts), beams), out.sequences_scores.view(len(prompts), beams)


@pytest.mark.parametrize("beams", [2, 7])
def test_equals_generate_with_a_prefix_function(model: Any, beams: int) -> None:
    item_tokens = random_codes(40)
    wanted, scores = generated(model, item_tokens, PROMPTS, beams)
    found = searcher(model, item_tokens, beams=beams)(PROMPTS)
    torch.testing.assert_close(found.scores, scores, atol=1e-3, rtol=1e-3)
    assert found.items.tolist() == wanted.tolist()


def test_titles_are_found_no_worse_than_by_generate(llama: Any) -> None:
    """It drops a title that ends outside the best beams of its step, so its k-th is at most as good as ours."""
    for beams in (2, 4):
        scores = generated(llama, TITLES, PROMPTS, beams)[1]
        found = searcher(llama, TITLES, beams=beams)(PROMPTS)
        assert (found.scores >= scores - 1e-4).all()
        same = (found.scores - scores).abs() < 1e-4
        assert same[:, 0].all() and same.float().mean() > 0.5


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_what_a_row_must_not_be_shown_never_comes_out_and_moves_no_score(llama: Any, normaliser: str) -> None:
    item_tokens = random_codes(30, distinct=False)
    search = searcher(llama, item_tokens, beams=12, normaliser=normaliser)
    wanted = [exhaustive(llama, item_tokens, prompt, normaliser) for prompt in PROMPTS]
    # The best ones: without the exclusion inside the search they would take the beams and leave none.
    histories = torch.stack([scores.topk(18).indices for scores in wanted])
    histories[0, 5:] = 0
    found = search(PROMPTS, exclude=Exclusion(search.trie, histories))
    assert found.items.shape == (len(PROMPTS), 12)
    for row, scores in enumerate(wanted):
        scores[histories[row]] = -torch.inf
        items = found.items[row].tolist()
        assert not set(items) & set(histories[row].tolist()) and len(set(items)) == 12
        torch.testing.assert_close(found.scores[row].double(), scores[items], atol=2e-4, rtol=1e-4)
        if row:  # twelve items are left, and twelve beams hold them all
            assert_same_ranking(items, found.scores[row], scores)


@pytest.mark.parametrize("exact", [False, True])
def test_of_items_of_equal_tokens_one_is_found_where_they_count_as_one(llama: Any, exact: bool) -> None:
    item_tokens, order = random_codes(60, distinct=False), tie_order([str(item) for item in range(61)])
    search = searcher(llama, item_tokens, beams=20, tie_order=order, distinct=True)
    count = len(search.trie.leaf_nodes)
    assert 20 < count < 50
    everything = searcher(llama, item_tokens, beams=50, tie_order=order, distinct=True)
    histories = torch.tensor([[1, 2, 3, 4, 5]] * len(PROMPTS))
    for used in (search, everything):
        ranker = PrunedRanking(used, 8) if exact else used
        found = ranker(PROMPTS, exclude=Exclusion(used.trie, histories))
        for row, prompt in enumerate(PROMPTS):
            wanted = exhaustive(llama, item_tokens, prompt, "vocabulary")
            best_of: dict[tuple[int, ...], int] = {}
            for item in order.tolist():
                if item > 5:
                    best_of.setdefault(tuple(item_tokens.of(item)), item)
            items = found.items[row].tolist()
            assert set(items) - {0} <= set(best_of.values())
            there = [item for item in items if item]
            assert len(there) == len(set(there)) == min(used.beams, len(best_of))
            assert found.scores[row, len(there) :].isneginf().all() and not any(items[len(there) :])
            if exact or used is everything:
                ranked = sorted(best_of.values(), key=lambda item: -float(wanted[item]))
                torch.testing.assert_close(wanted[there], wanted[ranked[: len(there)]], atol=2e-4, rtol=1e-4)


def test_no_invalid_item_in_ten_thousand_beams(model: Any) -> None:
    """Few of the possible codes are items, so that an unconstrained search would hardly meet one."""
    item_tokens = random_codes(24, seed=3)
    generator = torch.Generator().manual_seed(0)
    search = searcher(model, item_tokens, beams=20, normaliser="level")
    for _ in range(5):
        lengths = torch.randint(1, 14, (100,), generator=generator).tolist()
        prompts = [torch.randint(0, LM_SIZE, (length,), generator=generator).tolist() for length in lengths]
        found = search(prompts)
        assert ((found.items >= 1) & (found.items < item_tokens.n_items)).all() and found.scores.isfinite().all()
        assert (found.items.sort(dim=1).values.diff(dim=1) > 0).all()
        assert (found.scores.diff(dim=1) <= 0).all()


def test_a_batch_of_ragged_prompts_is_searched_as_each_alone(model: Any) -> None:
    search = searcher(model, TITLES, beams=4)
    together = search(PROMPTS)
    backwards = search(PROMPTS[::-1])
    for row, prompt in enumerate(PROMPTS):
        alone = search([prompt])
        for found, place in ((together, row), (backwards, -1 - row)):
            torch.testing.assert_close(found.scores[place], alone.scores[0], atol=1e-4, rtol=1e-4)
            assert found.items[place].tolist() == alone.items[0].tolist()


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_rows_and_beams_in_which_nothing_can_change_are_left_out(kind: str, normaliser: str) -> None:
    assert_best_where_rows_are_left_out(language_model(kind), searcher, exhaustive, normaliser)


def test_a_smaller_k_is_the_beginning_of_a_larger(llama: Any) -> None:
    search = searcher(llama, TITLES, beams=8)
    whole = search(PROMPTS)
    for k in (1, 3, 7):
        assert torch.equal(search(PROMPTS, k).items, whole.items[:, :k])


def test_equal_items_come_in_the_tie_order(llama: Any) -> None:
    """Three items have one sequence, and of the two that have another one is excluded."""
    rows = [[-1, -1, -1], [0, 0, 0], [1, 2, 4], [0, 0, 0], [1, 2, 4], [3, 1, 2], [0, 0, 0]]
    item_tokens = ItemTokens.from_codes(rows, SIZES)
    order = tie_order(["[PAD]", "u", "v", "w", "x", "y", "z"])
    rank = {item: place for place, item in enumerate(order.tolist())}
    search = searcher(llama, item_tokens, beams=5, tie_order=order)
    histories = torch.tensor([[4], [2]])
    found = search(PROMPTS[:2], exclude=Exclusion(search.trie, histories))
    for row, excluded in enumerate((4, 2)):
        assert sorted(found.items[row].tolist()) == sorted({1, 2, 3, 4, 5, 6} - {excluded})
        scores = exhaustive(llama, item_tokens, PROMPTS[row], "vocabulary")
        wanted = sorted({1, 2, 3, 4, 5, 6} - {excluded}, key=lambda i: (-round(float(scores[i]), 3), rank[i]))
        assert found.items[row].tolist() == wanted


class Indifferent(torch.nn.Module):
    """A language model that says the same whatever it reads, so that all items of one length tie."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None, position_ids: Any = None,
                attention_mask: Any = None, use_cache: bool = False) -> Any:  # fmt: skip
        out = self.model(input_ids=input_ids)
        out.last_hidden_state = torch.zeros_like(out.last_hidden_state)
        return out


@pytest.mark.parametrize("beams", [3, 6])
def test_ties_between_different_tokens_are_settled_too(llama: Any, beams: int) -> None:
    item_tokens = random_codes(20)
    order = torch.randperm(21, generator=torch.Generator().manual_seed(5))
    search = BeamSearch(
        Indifferent(decoder_of(llama)), Head.of(llama), item_tokens, beams=beams, lm_ids=CODE_IDS, tie_order=order
    )
    # The earliest prefixes go on, then the items below them come in the tie order.
    codes = item_tokens.codes.tolist()
    prefixes = sorted({tuple(row[:2]) for row in codes[1:]})[:beams]
    below = [item for item in order.tolist() if item and tuple(codes[item][:2]) in prefixes]
    assert search(PROMPTS).items.tolist() == [below[:beams]] * len(PROMPTS)


@given(st.lists(st.sampled_from([-np.inf, -2.5, -0.0, 0.0, 1e-30, -1e-30, 3.0]), min_size=1, max_size=12), st.data())
def test_best_is_a_stable_sort(scores: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(scores)))
    order = data.draw(st.none() | st.permutations(range(len(scores))))
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i if order is None else order[i]))
    given_order = None if order is None else torch.tensor([order])
    assert best(torch.tensor([scores]), k, given_order).tolist() == [ranked[:k]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(st.lists(st.lists(st.integers(3, 8), min_size=1, max_size=4), min_size=2, max_size=9), st.integers(0, 2))
def test_any_titles_are_found_with_as_many_beams(sequences: list[list[int]], which: int) -> None:
    model = language_model("llama")
    item_tokens = ItemTokens.from_sequences([[], *sequences], END)
    found = searcher(model, item_tokens, beams=len(sequences), normaliser=NORMALISERS[which])(PROMPTS[:1])
    wanted = exhaustive(model, item_tokens, PROMPTS[0], NORMALISERS[which])
    assert_same_ranking(found.items[0].tolist(), found.scores[0], wanted)


def test_forced_tokens_are_scored_and_take_no_more_beams(llama: Any) -> None:
    """Under ``legal`` a chain of only children costs an item nothing; over the vocabulary it does."""
    item_tokens = ItemTokens.from_codes([[-1] * 3, [0, 1, 2], [1, 0, 0], [2, 2, 4]], SIZES)
    first = exhaustive(llama, ItemTokens.from_codes([[-1], [0], [1], [2]], SIZES[:1]), PROMPTS[0], "legal")
    legal = searcher(llama, item_tokens, beams=3, normaliser="legal")(PROMPTS[:1])
    torch.testing.assert_close(legal.scores[0].double(), first[legal.items[0]], atol=1e-4, rtol=1e-4)
    whole = searcher(llama, item_tokens, beams=3)(PROMPTS[:1])
    assert_same_ranking(
        whole.items[0].tolist(), whole.scores[0], exhaustive(llama, item_tokens, PROMPTS[0], "vocabulary")
    )


def test_under_legal_nothing_is_read_behind_what_tells_an_item(llama: Any) -> None:
    item_tokens = ItemTokens.from_sequences([[], [5, 6, 7, 8, 9, 10], [5, 11], [12, *range(5, 25)], [12, 30, 31]], END)
    steps = {name: searcher(llama, item_tokens, beams=4, normaliser=name).steps for name in NORMALISERS}
    whole = [2, 4, 3, 2, 2, 2, *15 * [1]]
    assert steps == {"vocabulary": whole, "level": whole, "legal": [2]}


def test_the_head_has_a_row_for_each_code_wherever_it_lies(llama: Any) -> None:
    head = Head.of(llama)
    states = torch.randn(5, llama.config.hidden_size)
    tokens = head.tokens(torch.tensor([96, 3, 108]))
    logits = functional.linear(states, llama.lm_head.weight)
    torch.testing.assert_close(head.logits(states, tokens), logits[:, [96, 3, 108]])
    rest = logits.index_fill(1, tokens.ids, -torch.inf).logsumexp(1)
    torch.testing.assert_close(head.log_sum_of_rest(states, tokens, head.logits(states, tokens).amax(1)), rest)
    with pytest.raises(ValueError, match="two tokens are one"):
        head.tokens(torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="in a vocabulary of 109"):
        head.tokens(torch.tensor([109]))


@pytest.mark.parametrize("size", [0.5, 20.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_in_many_pieces_is_the_sum(dtype: torch.dtype, size: float) -> None:
    """Large weights put logits so far above those left out that the quick sum overflows and the safe one is taken."""
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5000, 16, generator=generator) * size, torch.randn(5000, generator=generator)
    states = torch.randn(3, 300, 16, generator=generator)
    head = Head(weight, bias, scale=0.5, softcap=300.0, dtype=dtype)
    left_out = torch.arange(2040, 2060)
    given_weight, given_states = weight.to(dtype).double(), states.to(dtype).double()
    logits = 300 * (0.5 * (given_states @ given_weight.T + bias.double()) / 300).tanh()
    wanted = logits.index_fill(2, left_out, -torch.inf).logsumexp(2)
    tokens = head.tokens(left_out)
    found = head.log_sum_of_rest(states, tokens, head.logits(states, tokens).amax(2))
    assert head._quick_sums(states.flatten(0, 1).to(dtype), tokens, torch.zeros(900, 1)).isinf().any() == (size > 1)
    torch.testing.assert_close(found.double(), wanted, **({"rtol": 1e-2, "atol": 1.0} if dtype == torch.bfloat16 else
                                                          {"rtol": 1e-5, "atol": 1e-4}))  # fmt: skip


def test_a_narrow_sum_moves_scores_little(llama: Any) -> None:
    """Tokens of the level are added in float32, so only what leaks is rounded."""
    item_tokens = random_codes(12)
    exact = searcher(llama, item_tokens, beams=12)(PROMPTS)
    narrow = searcher(llama, item_tokens, torch.bfloat16, beams=12)(PROMPTS)
    places = narrow.items.argsort(1).gather(1, exact.items.argsort(1).argsort(1))
    torch.testing.assert_close(narrow.scores.gather(1, places), exact.scores, atol=2e-2, rtol=0)


def test_a_model_in_bfloat16(llama: Any) -> None:
    narrow = language_model("llama").to(torch.bfloat16)
    found = searcher(narrow, random_codes(12), beams=12)(PROMPTS)
    wanted = searcher(llama, random_codes(12), beams=12)(PROMPTS)
    scores = torch.zeros(len(PROMPTS), 13).scatter(1, found.items, found.scores)
    torch.testing.assert_close(scores.gather(1, wanted.items), wanted.scores, atol=0.5, rtol=0.05)


def test_eager_attention_reads_the_same(llama: Any) -> None:
    eager = language_model("gemma3")
    wanted = searcher(eager, TITLES, beams=5)(PROMPTS)
    eager.set_attn_implementation("eager")
    search = searcher(eager, TITLES, beams=5)
    assert search.shares_prompts
    torch.testing.assert_close(search(PROMPTS).scores, wanted.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_adapters_and_new_rows_that_train_are_read_as_the_model_reads_them(kind: str) -> None:
    model = language_model(kind)
    adapted = get_peft_model(
        model, LoraConfig(target_modules=["q_proj", "down_proj", "lm_head"][: 3 - (kind == "llama-tied")],
                          init_lora_weights=False, trainable_token_indices=sorted(CODE_IDS.tolist()))
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens" in name:
                parameter.normal_(std=0.3)
    item_tokens = random_codes(12)
    found = searcher(adapted, item_tokens, beams=12)(PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        wanted = exhaustive(adapted, item_tokens, prompt, "vocabulary")
        assert_same_ranking(found.items[row].tolist(), found.scores[row], wanted)


class TestRefused:
    def test_before_anything_is_read(self, llama: Any) -> None:
        search = searcher(llama, random_codes(12), beams=8)
        read: list[Any] = []
        hook = search.decoder.register_forward_pre_hook(lambda *given: read.append(given))
        history = Exclusion(search.trie, torch.tensor([[0, 0, 0, 0, 0], [1, 2, 3, 4, 5]]))
        wrong: list[tuple[str, Any]] = [
            ("9 items are asked for and the search keeps 8 beams", lambda: search(PROMPTS, 9)),
            ("0 items are asked for", lambda: search(PROMPTS, 0)),
            ("8 beams are more than the 7 items that can be recommended to row 1",
             lambda: search(PROMPTS[:2], 1, history)),
            ("a prompt has no tokens", lambda: search([[3], []])),
            ("there are no prompts", lambda: search([])),
            (r"the prompt of row 1 has 2047 tokens and an item up to 3; the language model reads 2048",
             lambda: search([[3], [3] * 2047])),
        ]  # fmt: skip
        for message, call in wrong:
            with pytest.raises(UserError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match="1 prompts and exclusions of 2 rows"):
            search([[3]], 1, Exclusion(search.trie, torch.zeros(2, 1, dtype=torch.int64)))
        hook.remove()
        assert not read

    def test_when_it_is_made(self, llama: Any) -> None:
        for message, options in (
            ("normaliser is 'vocab'; did you mean 'vocabulary'", {"normaliser": "vocab", "beams": 2}),
            ("beams is 0", {"beams": 0}),
        ):
            with pytest.raises(UserError, match=message):
                searcher(llama, random_codes(12), **options)
        with pytest.raises(UserError, match="no item has tokens"):
            searcher(llama, ItemTokens.from_codes([[-1] * 3], SIZES), beams=1)
        with pytest.raises(ValueError, match="ids of 12 tokens are needed"):
            BeamSearch(decoder_of(llama), Head.of(llama), random_codes(3), beams=1, lm_ids=CODE_IDS[:4])

    def test_scores_that_are_no_numbers(self) -> None:
        model = language_model("llama")
        with torch.no_grad():
            model.model.norm.weight.fill_(torch.nan)
        head = Head(model.lm_head.weight)
        search = BeamSearch(decoder_of(model), head, random_codes(12), beams=2, lm_ids=CODE_IDS)
        with pytest.raises(UserError, match="are no numbers"):
            search(PROMPTS)

    def test_logits_that_are_not_the_heads_alone(self) -> None:
        model = language_model("granite")
        model.config.logits_scaling = 3.0
        Head.of(model)
        model.lm_head.register_forward_hook(lambda module, given, logits: logits * 2)
        with pytest.raises(UserError, match="the logits of a granite are not those of its head alone"):
            Head.of(model)


class Largest(TorchDispatchMode):
    """Notes the most numbers that any tensor made has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.most = max(self.most, tensor.numel())
        return made


def test_a_steps_largest_tensor_grows_with_the_beams_and_not_with_their_square(llama: Any) -> None:
    most = []
    for beams in (200, 400):
        reader = SharedPrompts(
            decoder_of(llama), torch.tensor([PROMPTS[1]]), torch.tensor([len(PROMPTS[1])]), 3 * beams
        )
        tokens = torch.arange(beams).remainder(LM_SIZE).unsqueeze(0)
        reader.step(tokens, torch.zeros_like(tokens))
        with Largest() as noted:
            reader.step(tokens, torch.arange(beams).unsqueeze(0))
        most.append(noted.most)
    assert 1.9 < most[1] / most[0] < 2.1
