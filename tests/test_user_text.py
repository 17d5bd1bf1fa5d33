"""Tags that the language model writes, and soft tokens of items that the graph has not seen."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.embedded import EmbeddedSettings, train_embedded
from recbole_llm.backbone.generation import DONE, answer_prompts, tags_of
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.backbone.text_projector import cold_item_embeddings, text_features
from recbole_llm.errors import UserError
from recbole_llm.training.store import StageStore
from recbole_llm.training.user_text import generated_texts, text_source

OPTIONS = {"dtype": "float32", "attention": "sdpa", "quantization": "none", "trust_remote_code": False, "device": "cpu"}
WORDS = ["red", "green", "blue", "drama", "comedy", "noir", "space", "war"]
ITEM_TEXTS = ["", *(f"{WORDS[item % 8]} film {WORDS[(item * 3) % 8]}" for item in range(1, 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("lm")
    settings = EmbeddedSettings(layers=2, hidden_size=32, heads=2, vocab_size=320, context=256, train_steps=30)
    train_embedded(ITEM_TEXTS[1:] * 4, settings, seed=1, folder=where)
    return where


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return load_backbone(folder, **OPTIONS)


# --- tags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "count", "tags"),
    [
        ("Tacos, Ground beef, tacos,Lettuce", 10, "Tacos, Ground beef, Lettuce"),
        ("1. Tacos\n2. Ground beef\n- Lettuce", 2, "Tacos, Ground beef"),
        ("", 5, ""),
        (" , ;;\n\n...", 5, ""),
        ("The user seems to like films that are very old and slow, noir", 5, "noir"),
        ("3 Idiots; 1917", 5, "3 Idiots, 1917"),
    ],
)
def test_tags_of_an_answer(answer: str, count: int, tags: str) -> None:
    assert tags_of(answer, count) == tags


@given(st.text(), st.integers(0, 6))
def test_tags_are_few_short_and_distinct(answer: str, count: int) -> None:
    tags = [tag for tag in tags_of(answer, count).split(", ") if tag]
    assert len(tags) <= count
    assert len({tag.casefold() for tag in tags}) == len(tags)
    assert all(len(tag.split()) <= 5 and any(map(str.isalnum, tag)) for tag in tags)


# --- generation ------------------------------------------------------------------------------------------------------


def by_hand(model: Any, prompt: list[int], new_tokens: int, eos: int) -> list[int]:
    """Greedy decoding, reading the whole text again for every token."""
    ids = list(prompt)
    for _ in range(new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def test_answers_of_a_batch_are_those_of_each_prompt_alone(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    model = load_with_head(folder, **OPTIONS)
    prompts = [
        [0, *backbone.encode(text)] for text in ("red film", "space film war", "drama", "a very long green film")
    ]
    prompts.insert(1, [])
    answers = answer_prompts(model, backbone, prompts, new_tokens=8, batch_size=3, folder=tmp_path, what="writing")
    assert answers[1] == ""
    for prompt, answer in zip(prompts, answers, strict=True):
        if prompt:
            ids = by_hand(model, prompt, 8, backbone.eos_id)
            assert answer == backbone.tokenizer.decode(ids, skip_special_tokens=True)


def test_generation_goes_on_after_the_last_whole_batch(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    model = load_with_head(folder, **OPTIONS)
    prompts = [[0, *backbone.encode(f"{word} film")] for word in WORDS]
    whole = answer_prompts(model, backbone, prompts, new_tokens=6, batch_size=2, folder=tmp_path, what="writing")
    lines = (tmp_path / DONE).read_bytes().splitlines(keepends=True)
    assert len(lines) == len(prompts)
    (tmp_path / DONE).write_bytes(b"".join(lines[:5]) + lines[5][:-4])  # cut off in the middle of a line
    ran: list[int] = []

    class Counting:
        def generate(self, **inputs: Any) -> Any:
            ran.append(len(inputs["input_ids"]))
            return model.generate(**inputs)

    again = answer_prompts(Counting(), backbone, prompts, new_tokens=6, batch_size=2, folder=tmp_path, what="writing")
    assert again == whole
    assert sum(ran) == 4  # of the third batch one row was there, the fourth not at all


# --- the stage -------------------------------------------------------------------------------------------------------


def config(**settings: Any) -> dict[str, Any]:
    return {
        "llm": "embedded", "text_source": "llm", "profile_words": 3, "prediction_words": 2, "text_descriptions": 4,
        "text_new_tokens": 6, "text_cue": "\n", "text_batch_size": 4, "alignment_description_tokens": 8, **settings,
    }  # fmt: skip


def dataset() -> SimpleNamespace:
    items = np.array([1, 2, 3, 4, 5, 6, 2, 7, 7, 9])
    return SimpleNamespace(train_histories=SimpleNamespace(offsets=np.array([0, 0, 6, 9, 9, 10]), items=items))


def test_the_stage_asks_templates_c_and_d_of_the_latest_items(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    asked: list[str] = []
    model = load_with_head(folder, **OPTIONS)

    class Watching:
        def generate(self, **inputs: Any) -> Any:
            asked.extend(backbone.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True))
            return model.generate(**inputs)

    store = StageStore(tmp_path)
    given_parts = (config(), dataset(), ITEM_TEXTS, backbone, "mark")
    (profiles, predictions), stage = generated_texts(*given_parts, Watching, store)
    assert profiles is not None and predictions is not None
    assert len(profiles) == len(predictions) == 5 and profiles[0] == profiles[3] == ""
    heads = {
        "Use 3 tags to summarize descriptions of the user's interacted items as user profile: ",
        "Use 2 words to predict the user's interests based on descriptions of items interacted: ",
    }
    descriptions = {
        "; ".join(ITEM_TEXTS[item] for item in items) for items in ([3, 4, 5, 6], [2, 7], [9])
    }  # the repeated item 7 once
    assert {text for text in asked if text} == {f"{head}{body}\n" for head in heads for body in descriptions}
    assert not list(stage.folder.rglob(DONE))
    assert stage.as_dict()["tokens"] is None, "a language model read, so it is not 0"

    def never() -> Any:
        raise AssertionError("a finished stage is found")

    found, again = generated_texts(*given_parts, never, store)
    assert again.cached and found == (profiles, predictions)
    other, more = generated_texts(config(prediction_words=0), *given_parts[1:], Watching, store)
    assert not more.cached and other == (profiles, None)


def test_prompts_too_long_for_the_model_are_refused(backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it has 256; lower text_descriptions"):
        generated_texts(
            config(text_new_tokens=250), dataset(), ITEM_TEXTS, backbone, "mark", lambda: None, StageStore(tmp_path)
        )


@pytest.mark.parametrize(
    ("llm", "source", "wanted"),
    [
        ("embedded", "auto", "keywords"),
        ("some/model", "auto", "llm"),
        ("embedded", "llm", "llm"),
        ("x", "none", "none"),
    ],
)
def test_who_writes(llm: str, source: str, wanted: str) -> None:
    assert text_source(config(llm=llm, text_source=source)) == wanted


# --- cold items ------------------------------------------------------------------------------------------------------


def test_features_are_means_of_last_states(backbone: Backbone) -> None:
    texts = ["", "red film", "a longer green film of war"]
    found = text_features(backbone, texts, limit=3)
    assert not found[0].any()
    for row in (1, 2):
        ids = [0, *backbone.encode(texts[row])[:3]]
        states = backbone.decoder(input_ids=torch.tensor([ids])).last_hidden_state[0, 1:]
        torch.testing.assert_close(found[row], states.mean(0), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 1000))
def test_a_cold_item_lands_beside_the_items_that_read_like_it(seed: int) -> None:
    draw = np.random.default_rng(seed)
    kinds = draw.permutation(np.arange(60) % 4)
    graph = draw.normal(size=(4, 8)) * 3
    embeddings = graph[kinds] + draw.normal(size=(60, 8)) * 0.1
    words = draw.normal(size=(4, 12))
    features = torch.from_numpy(words[kinds] + draw.normal(size=(60, 12)) * 0.05).float()
    seen = np.ones(60, dtype=bool)
    seen[[0, 5, 6, 7]] = False
    made = cold_item_embeddings(embeddings, features, seen, penalty=1e-3)
    assert np.array_equal(made[seen], embeddings[seen].astype(np.float32))
    assert np.array_equal(made[0], embeddings[0].astype(np.float32))
    for item in (5, 6, 7):
        assert np.square(graph - made[item]).sum(1).argmin() == kinds[item]


def test_without_cold_items_nothing_moves() -> None:
    embeddings = np.ones((4, 3))
    assert np.array_equal(
        cold_item_embeddings(embeddings, torch.ones(4, 2), np.array([False, True, True, True]), 1.0), embeddings
    )


def test_answers_are_kept_as_plain_json(folder: Path, backbone: Backbone, tmp_path: Path) -> None:
    model = load_with_head(folder, **OPTIONS)
    answer_prompts(model, backbone, [[0, 5, 6]], new_tokens=2, batch_size=1, folder=tmp_path, what="writing")
    row, text = json.loads((tmp_path / DONE).read_text(encoding="utf-8"))
    assert row == 0 and isinstance(text, str)
