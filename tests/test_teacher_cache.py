"""Soft labels kept on the disk: exact where they fit, truncated and told where not, found again by their mark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from catalogues import END, catalogues
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer
from recbole_llm.objectives.teacher_cache import ENTRY, Batch, TeacherCache, keep_within

LARGE = 2**20


class Teacher:
    """Logits of all samples in two batches out of order, and how often they were asked for."""

    def __init__(self, logits: torch.Tensor, history: torch.Tensor | None = None) -> None:
        self.logits, self.history, self.asked = logits, history, 0

    def __call__(self) -> Iterator[Batch]:
        self.asked += 1
        order = torch.arange(len(self.logits)).flip(0)
        for part in order.split(max(1, (len(order) + 1) // 2)):
            yield part, self.logits[part], None if self.history is None else self.history[part]


def some(item_tokens: ItemTokens, count: int, seed: int = 0, spread: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    items = item_tokens.lengths.nonzero().squeeze(1)
    targets = items[torch.randint(0, len(items), (count,), generator=generator)]
    return targets, torch.randn(count, item_tokens.n_items, generator=generator) * spread


class TestExact:
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
    @given(item_tokens=catalogues, count=st.integers(1, 5), seed=st.integers(0, 99), masked=st.booleans())
    def test_equals_what_the_tokenizer_makes(
        self, tmp_path: Path, item_tokens: ItemTokens, count: int, seed: int, masked: bool
    ) -> None:
        assume(item_tokens.lengths.any())
        tokenizer = CollaborativeTokenizer(item_tokens)
        targets, logits = some(item_tokens, count, seed)
        history = torch.randint(0, item_tokens.n_items, (count, 3)) if masked else None
        cache = TeacherCache.find_or_make(
            tmp_path, f"{seed}{masked}{history}", tokenizer, targets, Teacher(logits, history), LARGE
        )
        samples = torch.randint(0, count, (4,), generator=torch.Generator().manual_seed(seed))
        found = cache.labels(samples)
        expected = tokenizer(logits[samples], targets[samples], None if history is None else history[samples])
        for name in ("offsets", "positions", "tokens", "labels", "samples"):
            assert torch.equal(getattr(found, name), getattr(expected, name))
        torch.testing.assert_close(found.probs, expected.probs, rtol=1e-6, atol=1e-9)
        assert cache.card.exact and cache.card.dropped_max < 1e-9


class TestTruncated:
    def test_keeps_the_likeliest_and_the_label_and_tells_what_is_lost(self, tmp_path: Path) -> None:
        item_tokens = ItemTokens.raw(101)
        tokenizer = CollaborativeTokenizer(item_tokens)
        targets, logits = some(item_tokens, 20)
        budget = 20 * 10 * ENTRY.itemsize
        cache = TeacherCache.find_or_make(tmp_path, "key", tokenizer, targets, Teacher(logits), budget)
        assert cache.card.keep == 10 and not cache.card.exact and cache.card.nbytes == budget
        whole = tokenizer(logits, targets).dense(100)
        found = cache.labels(torch.arange(20)).dense(100)
        label = torch.zeros_like(whole, dtype=torch.bool).scatter_(1, targets.unsqueeze(1) - 1, True)
        kept = torch.zeros_like(label).scatter_(1, whole.masked_fill(label, 2).topk(10).indices, True)
        assert torch.equal(found > 0, kept)
        mass = (whole * kept).sum(1, keepdim=True)
        torch.testing.assert_close(found, whole * kept / mass)
        assert cache.card.dropped_mean == pytest.approx((1 - mass).mean().item(), abs=1e-6)
        assert cache.card.dropped_max == pytest.approx((1 - mass).max().item(), abs=1e-6)
        assert cache.card.decisions == 20

    @given(catalogues, st.integers(1, 400))
    def test_the_budget_holds_and_is_used(self, item_tokens: ItemTokens, entries: int) -> None:
        assume(item_tokens.lengths.any())
        tokenizer = CollaborativeTokenizer(item_tokens)
        targets, _ = some(item_tokens, 6)
        counts = tokenizer.children_count(tokenizer.positions(targets).nodes)
        counts = counts[counts > 1]

        def size(keep: int) -> int:
            return int(counts.clamp(max=keep).sum())

        if size(1) > entries:
            with pytest.raises(UserError, match="MiB at the least"):
                keep_within(tokenizer, targets, entries * ENTRY.itemsize)
            return
        keep = keep_within(tokenizer, targets, entries * ENTRY.itemsize)
        assert keep >= 1 and size(keep) <= entries
        assert size(keep + 1) > entries or size(keep) == int(counts.sum())


class TestFiles:
    TITLES = ItemTokens.from_sequences([[], [10, 11], [10, 11], [10], [30, 5], [30, 6, 7]], END)

    def test_found_again_only_by_what_it_was_made_of(self, tmp_path: Path) -> None:
        tokenizer = CollaborativeTokenizer(self.TITLES)
        targets, logits = some(self.TITLES, 7)
        teacher = Teacher(logits)

        def ask(key: str = "a", tokenizer: CollaborativeTokenizer = tokenizer, targets: torch.Tensor = targets) -> None:
            TeacherCache.find_or_make(tmp_path, key, tokenizer, targets, teacher, LARGE)

        ask()
        ask()
        assert teacher.asked == 1
        ask(key="b")
        ask(tokenizer=CollaborativeTokenizer(self.TITLES, beta=2.0))
        ask(targets=targets.flip(0))
        assert teacher.asked == 4
        assert len(list(tmp_path.iterdir())) == 8

    def test_a_cut_off_attempt_leaves_nothing(self, tmp_path: Path) -> None:
        tokenizer = CollaborativeTokenizer(self.TITLES)
        targets, logits = some(self.TITLES, 7)

        def broken() -> Iterator[Batch]:
            yield torch.tensor([0]), logits[:1], None
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            TeacherCache.find_or_make(tmp_path, "a", tokenizer, targets, broken, LARGE)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="sample 1 of 7 came 0 times"):
            TeacherCache.find_or_make(
                tmp_path, "a", tokenizer, targets, lambda: [(torch.tensor([0]), logits[:1], None)], LARGE
            )
        with pytest.raises(UserError, match=r"no numbers \(NaN\)"):
            TeacherCache.find_or_make(tmp_path, "a", tokenizer, targets, Teacher(logits * torch.nan), LARGE)
        assert not list(tmp_path.iterdir())

    def test_a_damaged_card_is_made_again(self, tmp_path: Path) -> None:
        tokenizer = CollaborativeTokenizer(self.TITLES)
        targets, logits = some(self.TITLES, 3)
        teacher = Teacher(logits)
        TeacherCache.find_or_make(tmp_path, "a", tokenizer, targets, teacher, LARGE)
        (card,) = tmp_path.glob("*.json")
        card.write_text("{")
        cache = TeacherCache.find_or_make(tmp_path, "a", tokenizer, targets, teacher, LARGE)
        assert teacher.asked == 2 and cache.card.samples == 3

    def test_a_teacher_that_gives_the_kept_children_nothing(self, tmp_path: Path) -> None:
        tokenizer = CollaborativeTokenizer(ItemTokens.raw(6))
        logits = torch.tensor([[0.0, 500.0, 500.0, 500.0, 500.0, 0.0]])
        cache = TeacherCache.find_or_make(
            tmp_path, "a", tokenizer, torch.tensor([5]), Teacher(logits), 1 * ENTRY.itemsize
        )
        assert cache.labels(torch.tensor([0])).probs.tolist() == [0, 0, 0, 0, 1]
        assert cache.card.dropped_max == pytest.approx(1.0)
