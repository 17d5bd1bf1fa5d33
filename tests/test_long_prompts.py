"""Prompts that are too long: what of them is taken away, what never is, and that it is told."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import SMALL
from test_aligntokenrec import build, loader, users
from tiny_folders import KINDS, write

from recbole_llm.config import Config
from recbole_llm.data.instructions import InstructionWriter
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.templates import INFERENCE, Wording
from recbole_llm.data.token_table import TokenTable
from recbole_llm.errors import UserError
from recbole_llm.model.aligntokenrec import FINE_TUNING
from recbole_llm.tasks import number
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.tasks.language import QUERY, TEXT
from recbole_llm.training.pipeline import fit, store_of

ITEMS = [[], [201, 202], [203], [204, 205, 206], [207, 208]]
TITLES = ["", "one", "second", "the third", "f"]
QUERIES = ["why not this one", "no", "a rather long review of it"]
PROMPTS = {
    SEQUENTIAL: [Wording("After {history} comes?", "{target}")],
    TEXT: [Wording("Which is {title}, told as {description}?", "{target}")],
    QUERY: [Wording("User: {query}!", "{target}")],
    INFERENCE: [Wording("After {history} comes?", "")],
}
BOS, EOS = 1, 2


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def writer(every: bool = False) -> InstructionWriter:
    tables = {"title": TITLES, "description": [text[::-1] * 2 for text in TITLES], "query": QUERIES}
    return InstructionWriter(
        PROMPTS, encode, bos_id=BOS, eos_id=EOS, items=Ragged.from_lists(ITEMS), separator=", ",
        texts={place: TokenTable.of(encode(texts)) for place, texts in tables.items()}, label_history=every,
    )  # fmt: skip


def expected(task: str, history: list[int], source: int, target: int | None, room: int) -> list[int]:
    """The same one thing after another: items from the front while there are two, then letters from the back."""
    answer = [] if target is None else [*ITEMS[target], EOS]
    fills = {"title": encode(TITLES)[source], "description": encode([TITLES[source][::-1] * 2])[0]}
    fills["query"] = encode(QUERIES)[source % len(QUERIES)]

    def spelled() -> list[int]:
        shown = []
        for place, item in enumerate(history):
            shown += ([] if not place else encode([", "])[0]) + ITEMS[item]
        text, ids = PROMPTS[task][0].ask, [BOS]
        while text:
            if text.startswith("{"):
                name, _, text = text[1:].partition("}")
                ids += shown if name == "history" else fills[name]
            else:
                ids.append(ord(text[0]))
                text = text[1:]
        return ids + answer

    reserve = 0 if target is not None else max(map(len, ITEMS)) + 1
    while len(spelled()) > room - reserve:
        if task in (SEQUENTIAL, INFERENCE):
            history = history[1:]
        else:
            last = next(
                name
                for name in ("query", "description", "title")
                if f"{{{name}}}" in PROMPTS[task][0].ask and fills[name]
            )
            fills[last] = fills[last][:-1]
    return spelled()


SAMPLES = st.lists(
    st.tuples(
        st.sampled_from([SEQUENTIAL, TEXT, QUERY]), st.lists(st.integers(1, 4), min_size=1, max_size=6),
        st.integers(1, 2), st.integers(1, 4),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(SAMPLES, st.integers(0, 40), st.booleans())
def test_what_is_too_long_is_shortened_item_by_item_then_letter_by_letter(
    samples: list[tuple[str, list[int], int, int]], more: int, every: bool
) -> None:
    made = writer(every)
    room = made.shortest() + more
    made.leave_room(room, drop=False)
    tasks, histories, sources, targets = zip(*samples, strict=True)
    numbers = torch.tensor([number(task) for task in tasks])
    drawn = made.draw(numbers, torch.Generator())
    given = drawn, Ragged.from_lists(histories), torch.tensor(sources), torch.tensor(targets)
    batch, whole = made.write(*given), writer(every).write(*given)
    long: Counter[str] = Counter()
    for row, (task, history, source, target) in enumerate(samples):
        wanted = expected(task, history, source, target, room)
        full = expected(task, history, source, target, 10_000)
        long[task] += wanted != full
        assert batch.ids[row].tolist()[: len(wanted) - 1] == wanted[:-1] and len(wanted) <= room
        own, before = batch.labels[batch.rows == row].tolist(), whole.labels[whole.rows == row].tolist()
        assert own[-len(ITEMS[target]) - 1 :] == [*ITEMS[target], EOS] and before[len(before) - len(own) :] == own
        assert batch.ids[row, batch.places[batch.rows == row][1:]].tolist()[-len(ITEMS[target]) :] == ITEMS[target]
    assert made.too_long == +long
    asked = made.ask(Ragged.from_lists(histories))
    for row, history in enumerate(histories):
        assert asked.take(torch.tensor([row])).values.tolist() == expected(INFERENCE, history, 1, None, room)


@settings(deadline=None, max_examples=60)
@given(SAMPLES, st.integers(0, 40))
def test_what_is_too_long_is_left_out(samples: list[tuple[str, list[int], int, int]], more: int) -> None:
    made = writer()
    room = made.shortest() + more
    made.leave_room(room, drop=True)
    tasks, histories, sources, targets = zip(*samples, strict=True)
    drawn = made.draw(torch.tensor([number(task) for task in tasks]), torch.Generator())
    batch = made.write(drawn, Ragged.from_lists(histories), torch.tensor(sources), torch.tensor(targets))
    full = [expected(*sample, 10_000) for sample in samples]
    kept = [prompt for prompt in full if len(prompt) <= room]
    assert len(batch.ids) == len(kept)
    for row, prompt in enumerate(kept):
        assert batch.ids[row].tolist()[: len(prompt) - 1] == prompt[:-1]
    assert made.too_long == Counter(task for task, prompt in zip(tasks, full, strict=True) if len(prompt) > room)
    # A user is never left out.
    assert len(made.ask(Ragged.from_lists(histories))) == len(histories)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(KINDS["llama"], tmp_path_factory.mktemp("llama"))


def test_settings(folder: Path) -> None:
    plain = build(folder).writer
    longest, shortest = plain.longest(4), plain.shortest()
    with pytest.raises(UserError, match=rf"up to {longest} tokens, prompt_tokens allows {longest - 1}; .*truncate or"):
        build(folder, prompt_tokens=longest - 1)
    with pytest.raises(UserError, match=rf"one item take {shortest} tokens, prompt_tokens allows {shortest - 1}"):
        build(folder, prompt_tokens=shortest - 1, long_prompts="drop")
    assert build(folder, prompt_tokens=longest)._search is None
    long = {"history_length": 1000, "MAX_ITEM_LIST_LENGTH": 1000}
    with pytest.raises(UserError, match="the language model has 2048; lower history_length or text_tokens, or set"):
        build(folder, **long)
    with pytest.raises(UserError, match="lower history_length or text_tokens, raise llm_context, or set"):
        build(folder, **long, llm="embedded")
    build(folder, **long, long_prompts="truncate")


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_no_user_is_left_out(policy: str, folder: Path) -> None:
    inference = build(folder).writer
    model = build(folder, prompt_tokens=inference.shortest(), long_prompts=policy)
    given = users(1, 4, 6)
    scores = model.full_sort_predict(given)
    assert scores[:, 1:].isfinite().all() and model.writer.too_long[INFERENCE] > 0
    lengths = model.writer.ask(Ragged.from_padded(given["item_id_list"], given["item_id_list"] > 0)).lengths
    assert lengths.max() + 4 <= inference.shortest()


def test_a_batch_of_nothing_teaches_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = build(folder, long_prompts="drop", prompt_tokens=build(folder).writer.shortest(), prompt_set="first")
    rows = next(iter(loader(negative_ratio=1)))
    long = (rows["stop"] - rows["start"]) > 1
    assert long.any()
    model.training_batch(rows)
    assert sum(model.writer.too_long.values()) >= int(long.sum()) - int((rows["task"] == number(NEGATIVE)).sum())
    with caplog.at_level("INFO", logger="recbole_llm"):
        model.tell_long_prompts()
    assert "prompts were too long and left out" in caplog.text and not model.writer.too_long
    only = {name: values[long] for name, values in rows.interaction.items()}
    only["task"] = torch.zeros_like(only["task"]) + number(SEQUENTIAL)
    batch = model.training_batch(only)
    assert batch.targets_count() == 0
    loss = model.stage_loss(FINE_TUNING, batch)
    loss.backward()
    assert loss.item() == 0 and all(not weight.grad.any() for weight in model.parameters() if weight.requires_grad)


@pytest.mark.parametrize("policy", ["drop", "truncate"])
def test_a_run_says_how_many_were_too_long(
    policy: str, settings_of: Any, small_data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = {"item_text": "{movie_title}", "llm_context": 512, "long_prompts": policy, "prompt_tokens": 120}
    config = Config("AlignTokenRec", "small", config_dict=settings_of(**SMALL["AlignTokenRec"] | more))
    with caplog.at_level("INFO", logger="recbole_llm"):
        fit(config, store_of(config))
    done = "left out" if policy == "drop" else "made shorter"
    assert "sequential: " in caplog.text and f"prompts were too long and {done} (long_prompts)" in caplog.text
