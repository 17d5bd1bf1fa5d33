"""Keywords about users, against a plain count of every word by hand."""

from __future__ import annotations

import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from recbole_llm.data import keywords
from recbole_llm.data.histories import Histories
from recbole_llm.data.keywords import prediction_keywords, profile_keywords

TEXTS = ["", "Space opera, space ships", "Ships of the desert 42", "A desert opera", "a of the", "robots robots x_y"]


def histories(*users: list[int]) -> Histories:
    offsets = np.cumsum([0, *(len(items) for items in users)])
    return Histories(offsets.astype(np.int64), np.array([item for items in users for item in items], dtype=np.int64))


def words_of(text: str) -> list[str]:
    return [word for word in re.findall(r"[^\W_]{2,}", text.lower()) if word not in ENGLISH_STOP_WORDS]


def by_hand(texts: list[str], seen: set[int], groups: list[list[int]], count: int) -> list[str]:
    """Smoothed TF-IDF of unit length an item, summed over each group of items, one word at a time."""
    frequency = Counter(word for item in seen for word in set(words_of(texts[item])))
    found = []
    for group in groups:
        sums: Counter[str] = Counter()
        for item in group:
            weights = {
                word: times * (math.log((1 + len(seen)) / (1 + frequency[word])) + 1)
                for word, times in Counter(words_of(texts[item])).items()
                if word in frequency
            }
            length = math.sqrt(sum(weight**2 for weight in weights.values()))
            for word, weight in weights.items():
                sums[word] += weight / length
        ranked = sorted(sums, key=lambda word: (-round(sums[word], 9), word))
        found.append(", ".join(ranked[:count]))
    return found


def test_profile_by_hand() -> None:
    rows = histories([], [1, 2], [4], [], [5, 3, 5])
    assert profile_keywords(TEXTS, rows, 3) == by_hand(TEXTS, {1, 2, 3, 4, 5}, [[], [1, 2], [4], [], [5, 3]], 3)
    # Written out: "ships" is in both texts of user 1, and the words of user 4's second text tie: the alphabet decides.
    assert profile_keywords(TEXTS, rows, 2)[1] == "ships, space"
    assert profile_keywords(TEXTS, rows, 9)[4] == "robots, desert, opera"
    assert profile_keywords(TEXTS, rows, 9)[2] == ""


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_profile_of_any_histories(data: st.DataObject) -> None:
    word = st.sampled_from(["space", "opera", "robot", "the", "x", "42", "été"])
    texts = ["", *data.draw(st.lists(st.lists(word, max_size=4).map(" ".join), min_size=1, max_size=6))]
    item = st.integers(1, len(texts) - 1)
    users = [[], *data.draw(st.lists(st.lists(item, max_size=5), max_size=5))]
    count = data.draw(st.integers(1, 4))
    seen = {item for items in users for item in items}
    expected = by_hand(texts, seen, [sorted(set(items)) for items in users], count)
    assert profile_keywords(texts, histories(*users), count) == expected


def test_order_and_repeats_of_a_history_do_not_matter() -> None:
    first = profile_keywords(TEXTS, histories([], [1, 2, 5]), 5)
    assert profile_keywords(TEXTS, histories([], [5, 1, 1, 2]), 5) == first


def test_prediction_by_hand() -> None:
    rows = histories([], [1], [5, 2], [3, 4])
    users = torch.tensor([[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # Item 0 would come first for everyone, were it one. Items 2 and 3 tie for the first axis.
    items = torch.tensor([[9.0, 9.0], [3.0, 0.0], [2.0, 0.5], [2.0, 3.0], [1.0, 1.0], [0.5, 2.0]])
    found = prediction_keywords(TEXTS, rows, users, items, count=3, neighbours=2)
    nearest = [[], [2, 3], [3, 4], [1, 2]]
    assert found == by_hand(TEXTS, {1, 2, 3, 4, 5}, nearest, 3)
    one = prediction_keywords(TEXTS, rows, users.numpy(), items.requires_grad_(), count=3, neighbours=1)
    assert one == by_hand(TEXTS, {1, 2, 3, 4, 5}, [[], [2], [3], [1]], 3)
    # More neighbours than there are items left: all of those, the user's own never.
    every = prediction_keywords(TEXTS, rows, users, items, count=9, neighbours=100)
    assert every == by_hand(TEXTS, {1, 2, 3, 4, 5}, [[], [2, 3, 4, 5], [1, 3, 4], [1, 2, 5]], 9)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(3)
    words = np.array([f"w{number:02d}" for number in range(30)])
    texts = ["", *(" ".join(draw.choice(words, 5)) for _ in range(40))]
    rows = histories([], *(list(draw.choice(np.arange(1, 41), 6, replace=False)) for _ in range(25)))
    users, items = draw.normal(size=(26, 8)), draw.normal(size=(41, 8))
    profile = profile_keywords(texts, rows, 4)
    prediction = prediction_keywords(texts, rows, users, items, 4, 7)
    assert len(profile) == len(prediction) == 26
    assert profile[0] == prediction[0] == ""
    for user in range(1, 26):
        mine = set(rows.items[rows.offsets[user] : rows.offsets[user + 1]])
        ranked = sorted(set(range(1, 41)) - mine, key=lambda item: -np.float32(users[user]) @ np.float32(items[item]))
        assert prediction[user] == by_hand(texts, set(rows.items.tolist()), [ranked[:7]], 4)[0]
    monkeypatch.setattr(keywords, "CHUNK_CELLS", 100)
    assert profile_keywords(texts, rows, 4) == profile
    assert prediction_keywords(texts, rows, users, items, 4, 7) == prediction


def test_texts_without_words() -> None:
    rows = histories([], [1], [2])
    texts = ["", "the", "a b c"]
    assert profile_keywords(texts, rows, 3) == ["", "", ""]
    assert prediction_keywords(texts, rows, np.ones((3, 2)), np.ones((3, 2)), 3, 1) == ["", "", ""]


def test_words_of_items_outside_train_do_not_count() -> None:
    rows = histories([], [1], [2])
    changed = [*TEXTS[:3], "space space space ships", "ships", "ships"]
    assert profile_keywords(TEXTS, rows, 5) == profile_keywords(changed, rows, 5)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="2 users and 6 items"):
        prediction_keywords(TEXTS, histories([], [1], [2]), np.ones((2, 2)), np.ones((6, 2)), 3, 1)
