"""Tokens of texts on disk: what is read of them, and that they are encoded once."""

from __future__ import annotations

import logging
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.data import token_table
from recbole_llm.data.instructions import InstructionWriter
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.templates import Wording
from recbole_llm.data.token_table import Segments, TokenTable, fingerprint_of_texts
from recbole_llm.tasks import number
from recbole_llm.tasks.language import QUERY, TEXT
from recbole_llm.training.store import StageStore
from recbole_llm.training.text_tables import text_tables

ROWS = st.lists(st.lists(st.integers(0, 99), max_size=5), max_size=6)


def encode(texts: Sequence[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def rows_of(table: Ragged) -> list[list[int]]:
    return [part.tolist() for part in table.values.split(table.lengths.tolist())]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), ROWS), min_size=1, max_size=5), st.randoms())
def test_tables_behind_one_numbering(parts: list[tuple[bool, list[list[int]]]], draw: Any) -> None:
    tables = [TokenTable.of(rows) if apart else Ragged.from_lists(rows) for apart, rows in parts]
    made = Segments(tables)
    flat = [row for _, rows in parts for row in rows]
    assert len(made.take(torch.empty(0, dtype=torch.long))) == 0
    assert made.bases.tolist() == np.cumsum([0, *(len(rows) for _, rows in parts)]).tolist()
    if flat:
        numbers = torch.tensor([draw.randrange(len(flat)) for _ in range(9)])
        assert rows_of(made.take(numbers)) == [flat[number] for number in numbers.tolist()]
        lengths = made.lengths_of(numbers.view(3, 3))
        assert lengths.flatten().tolist() == [len(flat[number]) for number in numbers.tolist()]


def test_a_table_on_disk_is_not_read_but_for_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "CHUNK", 3)
    texts = ["a", "", "bcd", "efghij", "", "kl", "mnopqrstu"]
    made = TokenTable.write(tmp_path, texts, encode, 4)
    assert isinstance(made.values, np.memmap) and isinstance(made.offsets, np.memmap)
    cut = [row[:4] for row in encode(texts)]
    every = torch.tensor([6, 0, 3, 3, 1])
    assert rows_of(made.take(every)) == [cut[row] for row in every.tolist()]
    assert len(made) == len(texts) and made.longest == 4
    shorter = made.cut(2).added(1000)
    assert rows_of(shorter.take(every)) == [[1000 + token for token in cut[row][:2]] for row in every.tolist()]
    assert shorter.longest == 2 and shorter.lengths_of(every).tolist() == [2, 1, 2, 2, 0]
    assert len(TokenTable.write(tmp_path, [], encode, 4)) == 0 and TokenTable.open(tmp_path).longest == 0


def test_memory_holds_a_few_texts_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_table, "CHUNK", 50)
    texts = ["x" * 100] * 5_000
    tracemalloc.start()
    try:
        made = TokenTable.write(tmp_path, texts, encode, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < made.values.nbytes / 2


def test_texts_are_told_apart() -> None:
    lists = [["a", "b"], ["ab"], ["ab", ""], ["", "ab"], ["b", "a"], [], [""], ["\ud800"]]
    assert len({fingerprint_of_texts(texts) for texts in lists}) == len(lists)


def test_texts_are_encoded_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[str] = []

    def counting(texts: Sequence[str]) -> list[list[int]]:
        calls.extend(texts)
        return encode(texts)

    def language_model(mark: str) -> Any:
        return SimpleNamespace(encode_batch=counting, tokenizer_fingerprint=lambda: mark)

    texts = {"title": ["a", "bc"], "query": ["def"]}
    store = StageStore(tmp_path)
    tables, stages = text_tables(texts, language_model("one"), 2, store)
    assert calls == ["a", "bc", "def"] and not any(stage.cached for stage in stages)
    assert rows_of(tables["query"].take(torch.tensor([0]))) == [encode(["de"])[0]]
    calls.clear()
    again, stages = text_tables(texts, language_model("one"), 2, store)
    assert not calls and all(stage.cached for stage in stages)
    assert rows_of(again["title"].take(torch.tensor([1, 0]))) == encode(["bc", "a"])
    # Other reviews, another tokenizer, another length: what changed is made anew, and nothing else.
    text_tables(texts | {"query": ["xyz"]}, language_model("one"), 2, store)
    assert calls == ["xyz"]
    text_tables(texts, language_model("two"), 2, store)
    text_tables(texts, language_model("one"), 3, store)
    assert calls == ["xyz"] + 2 * ["a", "bc", "def"]
    # A file that was damaged is noticed.
    (stages[1].folder / token_table.VALUES).write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="recbole_llm"):
        mended, _ = text_tables(texts, language_model("one"), 2, store)
    assert "is damaged" in caplog.text and rows_of(mended["query"].take(torch.tensor([0]))) == [encode(["de"])[0]]


def test_prompts_from_disk_are_those_from_memory(tmp_path: Path) -> None:
    texts = {"title": ["", "one", "two", "three"], "query": ["what?", "why", "how so"]}
    asked = {TEXT: ["Which is {title}?", "{title}: name it"], QUERY: ["A user says {query}."]}
    prompts = {task: [Wording(text, "{target}") for text in texts] for task, texts in asked.items()}
    items = Ragged.from_lists([[], [200, 201], [202], [203, 204, 205]])

    def writer(tables: dict[str, TokenTable]) -> InstructionWriter:
        return InstructionWriter(
            prompts, lambda texts: encode(texts), bos_id=1, eos_id=2, items=items, separator=", ", texts=tables
        )

    for place in texts:
        (tmp_path / place).mkdir()
    disk = writer({place: TokenTable.write(tmp_path / place, own, encode, 3) for place, own in texts.items()})
    memory = writer({place: TokenTable.of(encode(own), 3) for place, own in texts.items()})
    tasks = torch.tensor([number(task) for task in (TEXT, QUERY, QUERY, TEXT)])
    sources, targets = torch.tensor([3, 0, 2, 1]), torch.tensor([3, 1, 2, 1])
    none = Ragged.from_lists([[]] * 4)
    drawn = disk.draw(tasks, torch.Generator().manual_seed(0))
    one, other = (made.write(drawn, none, sources, targets) for made in (disk, memory))
    for name in ("ids", "rows", "places", "labels"):
        assert torch.equal(getattr(one, name), getattr(other, name))
    wordings = [text for task in (TEXT, QUERY) for text in asked[task]]
    for row, (template, source) in enumerate(zip(drawn.tolist(), sources.tolist(), strict=True)):
        place = "query" if tasks[row] == number(QUERY) else "title"
        text = wordings[template].replace(f"{{{place}}}", texts[place][source][:3])
        expected = [1, *encode([text])[0], *rows_of(items)[targets[row]]]
        assert one.ids[row].tolist()[: len(expected)] == expected
    lengths = disk.lengths(tasks, torch.zeros(4, dtype=torch.long), sources)
    assert torch.equal(lengths, memory.lengths(tasks, torch.zeros(4, dtype=torch.long), sources))
    assert disk.longest(5) == memory.longest(5)
