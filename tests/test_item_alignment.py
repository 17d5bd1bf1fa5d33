"""Alignment tokenization against automatic differentiation of the loss as the paper writes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.itemid import text_projection
from recbole_llm.itemid.alignment import Aligned, AlignmentSettings, train_alignment
from recbole_llm.itemid.alignment_loss import step
from recbole_llm.itemid.codebook import residual_kmeans
from recbole_llm.itemid.text_projection import TextSide
from recbole_llm.training.state import ResumeFile

KINDS = [(distance, residual) for distance in ("cosine", "l2") for residual in ("abs", "signed")]
SMALL = AlignmentSettings(levels=2, codes=8, epochs=4, batch_size=32, patience=0)


def items(n: int = 100, d: int = 6, width: int = 10) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(n, d)).astype(np.float32)
    texts = (points @ rng.normal(size=(d, width)) + 0.3 * rng.normal(size=(n, width)) + 4).astype(np.float32)
    return points, texts


def trained(points: np.ndarray, texts: np.ndarray | None, seed: int = 0, **changes: Any) -> Aligned:
    return train_alignment(points, texts, dataclasses.replace(SMALL, **changes), seed=seed, show_progress=False)


def dist(first: Tensor, second: Tensor, kind: str) -> Tensor:
    if kind == "cosine":
        return 1 - F.cosine_similarity(first, second, dim=-1)
    return (first - second).square().sum(-1)


def written_loss(
    levels: Tensor, inputs: Tensor, kinds: tuple[str, str], weight: float, aims: Tensor | None, up: Any = None
) -> tuple[Tensor, Tensor, set[tuple[int, int]]]:
    """L^B + weight * L^L, item by item and level by level; and which codes were selected."""
    distance, residual = kinds
    behaviour, text, selected = [], [], set()
    for row, point in enumerate(inputs):
        seen = point
        for level in range(len(levels)):
            chosen = int(torch.stack([dist(seen, code, distance) for code in levels[level]]).argmin())
            selected.add((level, chosen))
            code = levels[level, chosen]
            behaviour.append(dist(seen, code, distance))
            if aims is not None:
                image = code if up is None else up[0] @ code + up[1]
                text.append(dist(image, aims[row], distance))
            seen = (seen - code).detach()
            seen = seen.abs() if residual == "abs" else seen
    total = torch.stack(behaviour).sum() / len(inputs)
    return total, (torch.stack(text).sum() / len(inputs) if text else torch.zeros(())), selected


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("projection", ["none", "learned", "code_up"])
def test_gradients_are_those_of_the_written_loss(kinds: tuple[Any, Any], projection: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    levels, inputs, texts = normal(3, 9, 5).requires_grad_(), normal(12, 5), normal(12, 7)
    weight, bias = (normal(5, 7), normal(5)) if projection == "learned" else (normal(7, 5), normal(7))
    weight.requires_grad_(), bias.requires_grad_()
    aims = None if projection == "none" else texts @ weight.T + bias if projection == "learned" else texts
    up = (weight, bias) if projection == "code_up" else None
    behaviour, text, selected = written_loss(levels, inputs, kinds, 0.7, aims, up)
    (behaviour + 0.7 * text).backward()

    with torch.no_grad():
        done = step(levels, inputs, *kinds, aims=aims, weight=0.7, up=up)
        assert done.behaviour.item() == pytest.approx(behaviour.item(), rel=1e-12)
        assert done.text.item() == pytest.approx(text.item(), rel=1e-12)
        assert levels.grad is not None and torch.allclose(done.levels, levels.grad, rtol=1e-9, atol=1e-12)
        moved = {(level, code) for level, code in done.levels.abs().sum(-1).nonzero().tolist()}
        assert moved == selected and len(selected) < 27
        if projection == "none":
            assert done.sides is None
            return
        side = TextSide(torch.randn(12, 7), torch.randn(12, 5), projection, 0)  # type: ignore[arg-type]
        side.seen = texts
        assert done.sides is not None
        found = side.gradients(torch.arange(12), done.sides, done.chosen)
        for ours, parameter in zip(found, (weight, bias)):
            assert parameter.grad is not None and torch.allclose(ours, parameter.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kinds", KINDS)
def test_an_epoch_is_adam_on_the_written_loss(kinds: tuple[Any, Any]) -> None:
    """One step an epoch; started as training starts, in double precision with torch's own Adam."""
    points, texts = items(40)
    found = trained(points, texts, epochs=3, batch_size=64, distance=kinds[0], residual=kinds[1], text_weight=0.5)
    levels = residual_kmeans(points, [8, 8], *kinds, seed=0).levels.double().requires_grad_()
    side = TextSide(torch.from_numpy(texts), torch.from_numpy(points), "learned", 0)
    weight, bias = (part.double().requires_grad_() for part in (side.weight, side.bias))
    optimizer = torch.optim.Adam([levels, weight, bias], lr=1e-3)
    for epoch in range(3):
        optimizer.zero_grad()
        aims = side.seen.double() @ weight.T + bias
        behaviour, text, _ = written_loss(levels, torch.from_numpy(points).double(), kinds, 0.5, aims)
        (behaviour + 0.5 * text).backward()
        optimizer.step()
        assert found.losses[epoch] == pytest.approx([behaviour.item(), text.item()], rel=1e-4)
    assert torch.allclose(found.codebook.levels, levels.detach().float(), atol=1e-4)
    assert found.weight is not None and found.bias is not None
    projected = side.seen @ weight.detach().float().T + bias.detach().float()
    assert torch.allclose(found.project(torch.from_numpy(texts)), projected, atol=1e-3)


def test_weight_zero_ignores_texts() -> None:
    points, texts = items()
    first = trained(points, texts, text_weight=0.0)
    for other in (None, texts[::-1].copy(), np.full((3, 2), np.nan)):
        again = trained(points, other, text_weight=0.0)
        assert torch.equal(first.codebook.levels, again.codebook.levels)
    assert first.weight is None and (first.losses[:, 1] == 0).all()
    with pytest.raises(UserError, match="trained without texts"):
        first.project(torch.from_numpy(texts))
    assert not torch.equal(first.codebook.levels, trained(points, texts).codebook.levels)


def test_equal_seeds_give_equal_codes() -> None:
    points, texts = items()
    first, second, other = (trained(points, texts, seed) for seed in (3, 3, 4))
    assert torch.equal(first.codebook.levels, second.codebook.levels) and np.array_equal(first.losses, second.losses)
    assert not torch.equal(first.codebook.levels, other.codebook.levels)


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_losses_fall_and_use_is_told(distance: str) -> None:
    points, texts = items(300)
    found = trained(points, texts, epochs=30, distance=distance, residual="signed")
    totals = found.losses.sum(axis=1)
    assert totals[-1] < totals[0] and found.epochs == 30 and found.ended == "epochs"
    assert found.used.shape == found.perplexity.shape == (30, 2)
    assert ((found.perplexity <= found.used + 1e-9) & (found.used <= 8) & (found.perplexity >= 1)).all()


def test_training_ends_where_the_loss_is_flat() -> None:
    points, texts = items()
    found = trained(points, texts, epochs=500, patience=3, least_gain=0.01)
    totals = found.losses.sum(axis=1)
    assert found.ended == "flat" and found.epochs < 500
    assert totals[:-3].min() - totals[-3:].min() <= 0.01 * totals[:-3].min()
    assert totals[:-4].min() - totals[-4:-1].min() > 0.01 * totals[:-4].min()


class TestCollapse:
    """A heavy text loss on texts that hardly differ: every code is pulled to one place."""

    def collapsing(self, **changes: Any) -> Callable[[], Aligned]:
        points, _ = items(200)
        texts = np.random.default_rng(1).normal(size=(200, 6)).astype(np.float32)
        texts[:-1] = texts[0]
        return lambda: trained(
            points, texts, epochs=100, text_weight=100.0, projection="random", learning_rate=0.05, **changes
        )

    def test_it_does_collapse(self) -> None:
        assert self.collapsing()().perplexity.min() < 4

    def test_the_watch_over_codes_in_use_stops_it(self) -> None:
        with pytest.raises(
            TrainingStoppedError, match=r"collapsed: at level \d items use \d of 8 codes .*try code_reseed_dead"
        ):
            self.collapsing(least_usage=0.9)()

    def test_the_watch_over_perplexity_stops_it(self) -> None:
        with pytest.raises(
            TrainingStoppedError, match=r"collapsed: at level \d the perplexity .* least allowed is 50.0%"
        ):
            self.collapsing(least_perplexity=0.5)()

    def test_dead_codes_are_seeded_again(self) -> None:
        plain, seeded = self.collapsing()(), self.collapsing(reseed_dead=True)()
        assert plain.reseeded == 0 < seeded.reseeded
        assert seeded.used.mean() > plain.used.mean()


class _CutError(Exception):
    pass


def test_a_training_that_was_cut_off_ends_alike(tmp_path: Path) -> None:
    points, texts = items()
    whole = trained(points, texts, epochs=6)

    class File(ResumeFile):
        saved, cut = 0, 3

        def due(self) -> bool:
            return True

        def save(self, state: Any) -> None:
            super().save(state)
            self.saved += 1
            if self.saved == self.cut:
                raise _CutError

    settings = dataclasses.replace(SMALL, epochs=6)
    with pytest.raises(_CutError):
        train_alignment(points, texts, settings, seed=0, resume=File(tmp_path / "resume"), show_progress=False)
    rest = File(tmp_path / "resume")
    rest.cut = 99
    again = train_alignment(points, texts, settings, seed=0, resume=rest, show_progress=False)
    assert rest.saved == 3
    assert torch.equal(again.codebook.levels, whole.codebook.levels)
    assert np.array_equal(again.losses, whole.losses) and np.array_equal(again.used, whole.used)


def test_what_was_left_of_another_training_is_not_taken_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    points, texts = items()
    file = ResumeFile(tmp_path / "resume")
    file.save({"mark": "another"})
    again = train_alignment(points, texts, SMALL, seed=0, resume=file, show_progress=False)
    assert torch.equal(again.codebook.levels, trained(points, texts).codebook.levels)
    assert "is of other items or settings; this stage starts over" in caplog.text


class TestProjections:
    @pytest.mark.parametrize("projection", ["learned", "pca", "random", "code_up"])
    @pytest.mark.parametrize("width", [4, 10])
    def test_the_folded_map_is_the_one_trained_with(self, projection: Any, width: int) -> None:
        points, texts = (torch.from_numpy(table) for table in items(width=width))
        side = TextSide(texts, points, projection, 0)
        side.weight.add_(0.1), side.bias.add_(0.2)
        weight, bias = side.folded()
        rows = torch.arange(len(texts))
        if projection == "code_up":
            images = F.linear(points, side.weight, side.bias)
            expected = images @ side.basis.T * side.scale + side.mean
            assert torch.allclose(F.linear(points, weight, bias), expected, atol=1e-4)
        else:
            assert torch.allclose(F.linear(texts, weight, bias), side.aims(rows), atol=1e-4)

    def test_pca_is_that_of_the_covariance(self) -> None:
        points, texts = (torch.from_numpy(table) for table in items(d=3))
        side = TextSide(texts, points, "pca", 0)
        found = side.aims(torch.arange(len(texts))).double()
        variances = torch.linalg.eigvalsh(torch.cov(texts.double().T)).flip(0)[:3]
        covariance = torch.cov(found.T) * side.scale**2
        assert torch.allclose(covariance, torch.diag(variances), rtol=1e-3, atol=1e-3 * float(variances[0]))
        assert float(found.square().sum()) == pytest.approx(float(points.square().sum()), rel=1e-4)

    def test_wide_texts_are_seen_by_their_first_components(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(text_projection, "COMPONENTS", 6)
        points, texts = items(width=40)
        found = trained(points, texts)
        assert found.weight is not None and found.weight.shape == (6, 40) and found.bias is not None
        outside = np.linalg.svd(texts - texts.mean(0))[2][6:].astype(np.float32)
        assert np.abs(found.weight.numpy() @ outside.T).max() < 0.02 * float(found.weight.norm())

    def test_code_up_gives_back_the_vector(self) -> None:
        points, texts = items()
        found = trained(points, texts, projection="code_up")
        assert found.weight is not None and found.bias is not None and found.weight.shape == (10, 6)
        vectors = torch.from_numpy(points)
        assert torch.allclose(found.project(F.linear(vectors, found.weight, found.bias)), vectors, atol=1e-3)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("changes", "line"),
        [
            ({"distance": "cosin"}, r"distance can be cosine, l2, not 'cosin'; did you mean 'cosine'"),
            ({"projection": "lerned"}, r"projection can be .*did you mean 'learned'"),
            ({"levels": 0}, "levels should be at least 1, but is 0"),
            ({"text_weight": -1.0}, "text_weight should be 0 or more, but is -1"),
            ({"least_usage": 1.5}, "least_usage should be a share from 0 to 1, but is 1.5"),
            ({"learning_rate": 0.0}, "learning_rate should be above 0"),
            ({"kmeans_points": 4}, "kmeans_points 4 is below the 8 codes"),
        ],
    )
    def test_settings(self, changes: dict[str, Any], line: str) -> None:
        with pytest.raises(UserError, match=line):
            dataclasses.replace(SMALL, **changes)

    def test_tables(self) -> None:
        points, texts = items()
        with pytest.raises(UserError, match="fewer items than codes: 5 items for 8 codes"):
            trained(points[:5], texts[:5])
        with pytest.raises(UserError, match="there are no texts to align the codes with"):
            trained(points, None)
        with pytest.raises(UserError, match="99 text vectors for 100 item vectors"):
            trained(points, texts[:99])
        with pytest.raises(UserError, match=r"item vectors should be a table \[items, dimensions\]"):
            trained(points[0], texts)
        for table, name in ((points, "item"), (texts, "text")):
            broken = table.copy()
            broken[7, 1] = np.nan
            pair = (broken, texts) if name == "item" else (points, broken)
            with pytest.raises(UserError, match=rf"1 of 100 {name} vectors have values .* row 7"):
                trained(*pair)
        with pytest.raises(UserError, match="texts of 9 dimensions, but the codebook was trained on 10"):
            trained(points, texts).project(torch.zeros(1, 9))

    def test_a_loss_that_is_no_number(self) -> None:
        points, texts = items()
        with pytest.raises(TrainingStoppedError, match=r"no number after epoch \d+; try a lower code_learning_rate"):
            trained(points, texts, learning_rate=1e30, epochs=20, distance="l2")
