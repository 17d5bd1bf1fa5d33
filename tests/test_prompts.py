"""The templates byte by byte, and prompts laid out by array operations against a plain loop."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.data import prompts
from recbole_llm.data.prompts import Prompt, Ragged, join, repeated, soft_ids

ROWS = st.lists(st.lists(st.integers(-50, 50), max_size=6), min_size=1, max_size=6)


def lists(ragged: Ragged) -> list[list[int]]:
    return [part.tolist() for part in ragged.values.split(ragged.lengths.tolist())]


def words(text: str) -> list[int]:
    """One id a character: nothing of a text can be lost or merged."""
    return [ord(character) for character in text]


def text_of(ids: list[int]) -> str:
    return "".join(chr(one) if one >= 0 else f"<{-1 - one}>" for one in ids)


def test_template_a_is_the_papers() -> None:
    assert prompts.ITEM_TEXT_ALIGNMENT == (
        "[INST] <<SYS>> Reorder the randomly shuffled descriptions of items in align with item tokens. <</SYS>>\n"
        "Randomly shuffled descriptions: {DESCRIPTION_TOKEN}\n"
        "Item tokens: {ITEM_TOKEN} [/INST]"
    )


def test_template_b_is_the_papers() -> None:
    assert prompts.user_item_template() == (
        "[INST] <<SYS>> Select items interacted by the user from given items. <</SYS>>\n"
        "User token: {USER_TOKEN}\n"
        "Item tokens: {ITEM_TOKEN} \n"
        "User tags: {PROFILE_TOKEN}\n"
        "User's potential interest:{PREDICT_TOKEN}[/INST]"
    )


def test_template_b_loses_whole_lines_only() -> None:
    assert prompts.user_item_template(profile=False, prediction=False) == (
        "[INST] <<SYS>> Select items interacted by the user from given items. <</SYS>>\n"
        "User token: {USER_TOKEN}\n"
        "Item tokens: {ITEM_TOKEN} [/INST]"
    )
    assert prompts.user_item_template(items=False, profile=False).count("\n") == 2


def test_templates_c_and_d_are_the_papers() -> None:
    assert prompts.profile_prompt(["Toy Story", "Heat"], 10) == (
        "Use 10 tags to summarize descriptions of the user's interacted items as user profile: Toy Story; Heat"
    )
    assert prompts.prediction_prompt(["Toy Story", "Heat"], 7) == (
        "Use 7 words to predict the user's interests based on descriptions of items interacted: Toy Story; Heat"
    )
    assert len(prompts.TEMPLATES) == 4


@given(ROWS)
def test_ragged_round_trip(rows: list[list[int]]) -> None:
    ragged = Ragged.from_lists(rows)
    assert lists(ragged) == rows
    assert ragged.rows.tolist() == [row for row, values in enumerate(rows) for _ in values]
    assert ragged.positions.tolist() == [place for values in rows for place in range(len(values))]
    padded = ragged.padded(99)
    assert padded.tolist() == [values + [99] * (padded.shape[1] - len(values)) for values in rows]


@given(ROWS, st.data())
def test_ragged_take_keep_and_join(rows: list[list[int]], data: st.DataObject) -> None:
    ragged = Ragged.from_lists(rows)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=8))
    taken = ragged.take(torch.tensor(chosen, dtype=torch.long))
    assert lists(taken) == [rows[row] for row in chosen]
    assert lists(ragged.keep(ragged.values > 0)) == [[value for value in row if value > 0] for row in rows]
    other = [[7] * (row % 3) for row in range(len(rows))]
    both = join([ragged, Ragged.from_lists(other), ragged])
    assert lists(both) == [row + extra + row for row, extra in zip(rows, other, strict=True)]


def test_limit_cuts_each_row() -> None:
    assert lists(Ragged.from_lists([[1, 2, 3], [4], []], limit=2)) == [[1, 2], [4], []]


@given(st.lists(st.tuples(st.integers(0, 4), st.text(max_size=8), st.text(max_size=8)), min_size=1, max_size=4))
def test_prompt_equals_the_template_filled_by_hand(rows: list[tuple[int, str, str]]) -> None:
    prompt = Prompt(prompts.user_item_template(), words, bos_id=9)
    counts = torch.tensor([count for count, _, _ in rows])
    starts = counts.cumsum(0) - counts
    items = Ragged.from_lengths(soft_ids(torch.arange(int(counts.sum())) + len(rows)), counts)
    fills = {
        prompts.USER: Ragged.from_lists([[-1 - row] for row in range(len(rows))]),
        prompts.ITEMS: items,
        prompts.PROFILE: Ragged.from_lists([words(tags) for _, tags, _ in rows]),
        prompts.PREDICTION: Ragged.from_lists([words(interest) for _, _, interest in rows]),
    }
    built = lists(prompt.suffix(fills))
    assert prompt.prefix[0] == 9
    for row, (count, tags, interest) in enumerate(rows):
        first = int(starts[row]) + len(rows)
        shown = "".join(f"<{place}>" for place in range(first, first + count))
        wanted = prompts.user_item_template()
        for name, fill in (("USER", f"<{row}>"), ("ITEM", shown)):
            wanted = wanted.replace(f"{{{name}_TOKEN}}", fill)
        head, rest = wanted.split("{PROFILE_TOKEN}")
        middle, end = rest.split("{PREDICT_TOKEN}")
        assert text_of(prompt.prefix[1:]) + text_of(built[row]) == head + tags + middle + interest + end
        assert sum(one < 0 for one in built[row]) == 1 + count


def test_data_that_spells_a_placeholder_is_plain_text() -> None:
    prompt = Prompt(prompts.ITEM_TEXT_ALIGNMENT, words, bos_id=None)
    fills = {
        prompts.DESCRIPTIONS: Ragged.from_lists([words("{ITEM_TOKEN}")]),
        prompts.ITEMS: Ragged.from_lists([[-1, -2]]),
    }
    ids = prompt.suffix(fills).values.tolist()
    assert text_of(ids) == "{ITEM_TOKEN}\nItem tokens: <0><1> [/INST]"
    assert text_of(prompt.prefix).endswith("Randomly shuffled descriptions: ")


def test_fixed_length_counts_the_fixed_text_after_the_prefix() -> None:
    prompt = Prompt(prompts.ITEM_TEXT_ALIGNMENT, words, bos_id=3)
    assert prompt.fixed_length == len("\nItem tokens: ") + len(" [/INST]")


def test_repeated() -> None:
    assert lists(repeated(torch.tensor([5, 6]), 3)) == [[5, 6]] * 3
