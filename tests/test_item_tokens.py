"""Items as token sequences: there and back, what they share, and files that are told apart."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from catalogues import END, catalogues, codes
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ARRAYS, CARD, ItemTokens, pool_of

NONE = (-1, -1)


def ids(count: int, mark: str = "B") -> list[str]:
    return ["[PAD]", *(f"{mark}{item:03}" for item in range(1, count))]


class TestThereAndBack:
    @given(catalogues)
    def test_every_item_by_its_tokens(self, item_tokens: ItemTokens) -> None:
        every = torch.arange(item_tokens.n_items)
        tokens, lengths = item_tokens.padded(every)
        assert tokens.shape == (len(every), item_tokens.longest)
        rows = [item_tokens.of(item) for item in range(len(every))]
        assert lengths.tolist() == [len(row) for row in rows]
        assert [row[:n] for row, n in zip(tokens.tolist(), lengths)] == rows
        assert all(token == -1 for row, n in zip(tokens.tolist(), lengths) for token in row[n:])
        first = {tuple(row): item for item, row in reversed(list(enumerate(rows))) if row}
        assert item_tokens.items_of(tokens).tolist() == [first.get(tuple(row), -1) for row in rows]
        wider, _ = item_tokens.padded(every, item_tokens.longest + 2)
        assert torch.equal(item_tokens.items_of(wider), item_tokens.items_of(tokens))

    @given(codes())
    def test_codes(self, item_tokens: ItemTokens) -> None:
        again = ItemTokens.from_codes(item_tokens.codes, item_tokens.level_sizes)
        assert again.fingerprint() == item_tokens.fingerprint()
        for item, row in enumerate(item_tokens.codes.tolist()):
            expected = [f"<{'abcd'[level]}_{code}>" for level, code in enumerate(row) if code >= 0]
            assert item_tokens.strings(item) == expected

    @given(st.data())
    def test_titles(self, data: st.DataObject) -> None:
        words = st.integers(3, 40_000)
        sequences = [[], *data.draw(st.lists(st.lists(words, max_size=6), max_size=10))]
        item_tokens = ItemTokens.from_sequences(sequences, END)
        lm_ids = item_tokens.lm_ids
        assert lm_ids is not None and lm_ids.tolist() == sorted(
            {*chain.from_iterable(sequences), *([END] if any(sequences) else [])}
        )
        for item, sequence in enumerate(sequences):
            own = torch.tensor(item_tokens.of(item), dtype=torch.int64)
            assert lm_ids[own].tolist() == ([*sequence, END] if sequence else [])
            assert torch.equal(item_tokens.own(lm_ids[own]), own)
        unknown = [word for word in (0, 1, 41_000) if word not in lm_ids.tolist()]
        assert item_tokens.own(torch.tensor(unknown)).tolist() == [-1] * len(unknown)

    def test_a_title_that_begins_another_is_told_apart_by_the_end_token(self) -> None:
        item_tokens = ItemTokens.from_sequences([[], [7, 8], [7], [7, 8, 9]], END)
        tokens, _ = item_tokens.padded(torch.arange(1, 4))
        assert item_tokens.items_of(tokens).tolist() == [1, 2, 3]
        assert item_tokens.items_of(tokens[:, :1]).tolist() == [-1] * 3

    @given(codes())
    def test_an_end_token_behind_each(self, item_tokens: ItemTokens) -> None:
        ended = item_tokens.ended()
        for item in range(item_tokens.n_items):
            own = item_tokens.of(item)
            assert ended.of(item) == ([*own, item_tokens.size] if own else [])
        assert ended.size == item_tokens.size + 1 and ended.level_sizes == (*item_tokens.level_sizes, 1)

    @given(catalogues)
    def test_unique_prefixes_are_the_shortest(self, item_tokens: ItemTokens) -> None:
        """Each is the first beginning that all items which have it go on from alike."""
        rows = [item_tokens.of(item) for item in range(item_tokens.n_items)]
        unique = item_tokens.unique_prefixes()
        assert unique.n_items == len(rows) and unique.size == item_tokens.size and not unique.level_sizes
        for item, row in enumerate(rows):
            told = (
                length
                for length in range(1, len(row) + 1)
                if all(other == row for other in rows if other[:length] == row[:length])
            )
            assert unique.of(item) == row[: next(told, 0)]

    def test_ids_of_any_lengths_get_one_and_titles_have_theirs(self) -> None:
        ended = ItemTokens.named([[], [0, 1], [2]], ["x", "y", "z"]).ended()
        assert ended.strings(1) == ["x", "y", "<end>"] and ended.strings(2) == ["z", "<end>"] and not ended.of(0)
        with pytest.raises(ValueError, match="already"):
            ItemTokens.from_sequences([[], [7, 8]], END).ended()

    def test_raw_ids(self) -> None:
        item_tokens = ItemTokens.raw(9)
        assert item_tokens.strings(7) == ["<i_7>"] and item_tokens.strings(0) == [] and item_tokens.size == 8
        assert item_tokens.collision_rate() == 0

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([NONE, (0, 3)], r"item 1 .*\[0, 3\]"),
            ([NONE, (0, 1), (0, -1)], r"item 2 .*\[0, -1\]"),
            ([(0, 0), (0, 1)], "item 0"),
            ([NONE, (-2, 0)], "item 1"),
            ([(-1, -1, -1)], "do not fit 2 levels"),
        ],
    )
    def test_codes_out_of_range(self, rows: list[tuple[int, ...]], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ItemTokens.from_codes(np.array(rows), [2, 3])

    def test_wrong_titles(self) -> None:
        with pytest.raises(UserError, match=r"title of item 2 .* holds the end token 2"):
            ItemTokens.from_sequences([[], [5], [7, END], [END]], END)
        with pytest.raises(ValueError, match="padding"):
            ItemTokens.from_sequences([[5], [7]], END)
        with pytest.raises(ValueError, match="-3 is no"):
            ItemTokens.from_sequences([[], [7, -3]], END)

    def test_what_a_kind_does_not_have(self) -> None:
        titles = ItemTokens.from_sequences([[], [5]], END)
        for call in (lambda: titles.strings(1), lambda: titles.codes, lambda: ItemTokens.raw(3).own(torch.tensor([1]))):
            with pytest.raises(ValueError, match=r"titles|raw"):
                call()


class TestEqualItems:
    @given(catalogues)
    def test_groups_and_rates(self, item_tokens: ItemTokens) -> None:
        rows = [tuple(item_tokens.of(item)) for item in range(item_tokens.n_items)]
        counts = Counter(row for row in rows if row)
        groups = [[item for item, row in enumerate(rows) if row == shared] for shared in sorted(counts)]
        assert item_tokens.groups() == [group for group in groups if len(group) > 1]
        total = sum(counts.values())
        assert item_tokens.collision_rate() == pytest.approx(1 - len(counts) / total if total else 0)
        shared = sum(count for count in counts.values() if count > 1)
        assert item_tokens.duplicate_share() == pytest.approx(shared / total if total else 0)

    def test_both_definitions_by_hand(self) -> None:
        item_tokens = ItemTokens.from_codes([NONE, (0, 0), (0, 1), (0, 0), (0, 0), NONE], [1, 2])
        assert item_tokens.collision_rate() == 0.5 and item_tokens.duplicate_share() == 0.75
        assert item_tokens.groups() == [[1, 3, 4]]


class TestFingerprint:
    def test_of_the_tokens_not_of_the_way_they_were_made(self) -> None:
        rows = [NONE, (0, 2), (1, 1), (0, 0)]
        base = ItemTokens.from_codes(np.array(rows), [2, 3])
        assert base.fingerprint() == ItemTokens.from_codes(torch.tensor(rows, dtype=torch.int32), (2, 3)).fingerprint()
        assert base.fingerprint() == ItemTokens.from_codes(np.array(rows), [2, 3], ids(4)).fingerprint()
        others = [
            ItemTokens.from_codes(np.array([NONE, (0, 2), (1, 1), (1, 0)]), [2, 3]),
            ItemTokens.from_codes(np.array([NONE, (1, 1), (0, 2), (0, 0)]), [2, 3]),
            ItemTokens.from_codes(np.array([NONE, (0, 2), (1, 1), NONE]), [2, 3]),
            ItemTokens.from_codes(np.array([*rows, NONE]), [2, 3]),
            ItemTokens.from_codes(np.array(rows), [2, 4]),
            ItemTokens.from_sequences([[], [5], [6]], END),
            ItemTokens.from_sequences([[], [5], [7]], END),
            ItemTokens.raw(3),
            ItemTokens.raw(4),
        ]
        marks = [base.fingerprint(), *(other.fingerprint() for other in others)]
        assert len(set(marks)) == len(marks)

    @given(st.data())
    def test_any_changed_code_changes_it(self, data: st.DataObject) -> None:
        rows = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
        other = data.draw(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=6))
        marks = [ItemTokens.from_codes(np.array([NONE, *r]), [3, 3]).fingerprint() for r in (rows, other)]
        assert (marks[0] == marks[1]) == (rows == other)


class TestFiles:
    @given(item_tokens=catalogues)
    @settings(max_examples=15)
    def test_saved_and_loaded(self, item_tokens: ItemTokens, tmp_path_factory: pytest.TempPathFactory) -> None:
        folder = tmp_path_factory.mktemp("saved")
        item_tokens.save(folder)
        found = ItemTokens.load(folder)
        assert found.fingerprint() == item_tokens.fingerprint() and found.kind == item_tokens.kind
        assert torch.equal(found.tokens, item_tokens.tokens) and torch.equal(found.offsets, item_tokens.offsets)
        assert found.vocabulary == item_tokens.vocabulary and found.level_sizes == item_tokens.level_sizes
        assert sorted(path.name for path in folder.iterdir()) == [CARD, ARRAYS]

    def test_another_data_set_or_pool_is_refused_in_one_line(self, tmp_path: Path) -> None:
        ItemTokens.from_codes([NONE, (0, 0), (1, 1)], [2, 2], ids(3)).save(tmp_path)
        assert ItemTokens.load(tmp_path, ids(3)).pool == pool_of(ids(3))
        for other in (ids(3, "C"), ids(4), ids(2), ["[PAD]", *ids(3)[:0:-1]]):
            with pytest.raises(UserError, match="another data set or item pool") as error:
                ItemTokens.load(tmp_path, other)
            assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)

    def test_another_number_of_items_is_refused_also_without_a_pool(self, tmp_path: Path) -> None:
        ItemTokens.raw(3).save(tmp_path)
        assert ItemTokens.load(tmp_path, ids(3)).n_items == 3
        with pytest.raises(UserError, match="of 2 items, not 3"):
            ItemTokens.load(tmp_path, ids(4))

    def test_ids_that_only_look_alike_are_another_pool(self) -> None:
        assert pool_of(["[PAD]", "a", "b"]) != pool_of(["[PAD]", 'a"\n"b'])
        assert pool_of(["[PAD]", "1"]) == pool_of(["[PAD]", 1])  # type: ignore[list-item]

    def test_damaged_or_missing_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"holds no item tokens: item_tokens\.json is missing"):
            ItemTokens.load(tmp_path)
        ItemTokens.from_codes([NONE, (0, 0), (1, 1)], [2, 2]).save(tmp_path)
        whole = (tmp_path / ARRAYS).read_bytes()
        (tmp_path / ARRAYS).write_bytes(whole[:-8] + (1).to_bytes(8, "little"))
        with pytest.raises(UserError, match="damaged"):
            ItemTokens.load(tmp_path)
        (tmp_path / ARRAYS).write_bytes(whole[:20])
        with pytest.raises(UserError, match="cannot be read"):
            ItemTokens.load(tmp_path)
        (tmp_path / ARRAYS).unlink()
        with pytest.raises(UserError, match=r"item_tokens\.safetensors is missing"):
            ItemTokens.load(tmp_path)
        (tmp_path / ARRAYS).write_bytes(whole)
        card = json.loads((tmp_path / CARD).read_text())
        for text in ("{", "[]", json.dumps(card | {"kind": 3, "size": None}), json.dumps(card | {"schema": 99})):
            (tmp_path / CARD).write_text(text)
            with pytest.raises(UserError):
                ItemTokens.load(tmp_path)

    def test_pool_is_of_every_item(self) -> None:
        with pytest.raises(ValueError, match="3 raw ids for 4 items"):
            ItemTokens.raw(4, ids(3))
