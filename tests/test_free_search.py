"""What a language model writes behind a prompt: against transformers' own search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from searches import END, LM_SIZE, PROMPTS, language_model
from tiny_folders import KINDS
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.free_search import FreeSearch
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.shared_cache import shares


def ending(kind: str, often: float) -> Any:
    """A language model whose texts end now and then: the end token's logits vary more than the others'."""
    model = language_model(kind, LM_SIZE)
    model.get_output_embeddings().weight[END] *= often
    return model


@pytest.fixture(scope="module", params=list(KINDS))
def model(request: pytest.FixtureRequest) -> Any:
    return ending(request.param, 12.0)


@pytest.fixture(scope="module")
def llama() -> Any:
    return ending("llama", 12.0)


def searching(model: Any, **options: Any) -> FreeSearch:
    return FreeSearch(decoder_of(model), Head.of(model), eos_id=END, **options)


def generated(model: Any, prompts: list[list[int]], beams: int, longest: int) -> list[list[int]]:
    """Each prompt asked about alone, so that nothing is filled up."""
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        made = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, min_new_tokens=1,
            max_new_tokens=longest, eos_token_id=END, pad_token_id=END,
        )[0, len(prompt) :].tolist()  # fmt: skip
        texts.append(made[: made.index(END)] if END in made else made)
    return texts


def lists(texts: Ragged) -> list[list[int]]:
    return [values.tolist() for values in texts.values.split(texts.lengths.tolist())]


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_writes_what_generate_writes(model: Any, beams: int) -> None:
    found = lists(searching(model, beams=beams, longest=9)(Ragged.from_lists(PROMPTS)))
    assert found == generated(model, PROMPTS, beams, 9)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_of_any_prompts_too(data: st.DataObject, llama: Any) -> None:
    texts = st.lists(st.integers(3, LM_SIZE - 1), min_size=1, max_size=12)
    opening = data.draw(st.lists(st.integers(3, LM_SIZE - 1), max_size=4), label="opening")
    prompts = [opening + text for text in data.draw(st.lists(texts, min_size=1, max_size=5), label="texts")]
    beams, longest = data.draw(st.integers(1, 6), label="beams"), data.draw(st.integers(1, 8), label="longest")
    # Another opening than theirs, in part or wholly, is none of their business.
    told = opening + data.draw(st.lists(st.integers(3, LM_SIZE - 1), max_size=2), label="more")
    found = lists(searching(llama, beams=beams, longest=longest, opening=told)(Ragged.from_lists(prompts)))
    assert found == generated(llama, prompts, beams, longest)


def test_texts_that_end_at_different_steps_and_some_that_never_do() -> None:
    """What the others are compared on is worth comparing."""
    lengths = {len(text) for text in generated(ending("llama", 12.0), [[token] for token in range(3, 40)], 3, 9)}
    assert lengths >= {1, 3, 9}


def test_a_vocabulary_of_fewer_words_than_are_looked_at() -> None:
    model = language_model("llama", 8)
    prompts = [[3, 4], [5], [7, 3, 6]]
    for longest in (1, 2, 5):
        found = lists(searching(model, beams=6, longest=longest)(Ragged.from_lists(prompts)))
        assert found == generated(model, prompts, 6, longest)


def test_the_prompt_is_read_once_whatever_the_beams(llama: Any) -> None:
    class Reads(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.embedding.default:
                self.rows += args[1].numel()
            return func(*args, **(kwargs or {}))

    assert shares(decoder_of(llama))
    prompt = list(range(3, 33))
    search = searching(llama, beams=4, longest=3, opening=prompt[:20])
    with Reads() as counted:
        search(Ragged.from_lists([prompt, [*prompt[:20], 40]]))
    # Behind the opening ten tokens of the longer prompt, twice as it is a table, and two steps of four beams.
    assert counted.rows <= 2 * 10 + 2 * 2 * 4
