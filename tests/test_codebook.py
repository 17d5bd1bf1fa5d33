"""Cascaded codebooks against loops over items, levels and codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from recbole_llm.errors import UserError
from recbole_llm.itemid.codebook import ResidualCodebook, residual_kmeans

KINDS = [(distance, residual) for distance in ("cosine", "l2") for residual in ("abs", "signed")]


def random_codebook(
    distance: str, residual: str, shape: tuple[int, int, int] = (3, 6, 4), seed: int = 0
) -> ResidualCodebook:
    levels = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return ResidualCodebook(levels, distance, residual)  # type: ignore[arg-type]


def random_points(n: int = 50, d: int = 4, seed: int = 1) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def plain_encode(book: ResidualCodebook, point: np.ndarray) -> tuple[list[int], list[np.ndarray]]:
    """Codes and inputs of each level, one distance at a time."""
    codes, seen, inputs = [], [], point.astype(np.float64)
    for level in book.levels.double().numpy():
        gaps = []
        for code in level:
            if book.distance == "l2":
                gaps.append(sum((a - b) ** 2 for a, b in zip(inputs, code)))
            else:
                norms = np.sqrt((inputs**2).sum()) * np.sqrt((code**2).sum())
                gaps.append(1 - (inputs * code).sum() / norms if norms else 1.0)
        chosen = min(range(len(gaps)), key=lambda number: gaps[number])
        codes.append(chosen)
        seen.append(inputs)
        inputs = inputs - level[chosen]
        inputs = np.abs(inputs) if book.residual == "abs" else inputs
    return codes, seen


@pytest.mark.parametrize(("distance", "residual"), KINDS)
class TestEncode:
    def test_equals_brute_force(self, distance: str, residual: str) -> None:
        book, points = random_codebook(distance, residual), random_points()
        codes, last = book.encode(points, batch=7)
        residuals = book.residuals(points, codes)
        assert codes.dtype == torch.int64 and last.dtype == residuals.dtype == torch.float32
        for row, point in enumerate(points.numpy()):
            plain, seen = plain_encode(book, point)
            assert codes[row].tolist() == plain
            assert residuals[row].numpy() == pytest.approx(np.stack(seen), abs=1e-5)
            assert last[row].numpy() == pytest.approx(seen[-1], abs=1e-5)

    def test_codes_do_not_hang_on_the_batch(self, distance: str, residual: str) -> None:
        book, points = random_codebook(distance, residual, (3, 32, 16)), random_points(300, 16)
        whole, _ = book.encode(points)
        alone = torch.cat([book.encode(point[None])[0] for point in points])
        assert torch.equal(whole, alone)

    def test_kmeans_levels_are_centres_of_what_is_left(self, distance: str, residual: str) -> None:
        points = random_points(400, 6).numpy()
        book = residual_kmeans(points, [16, 16], distance, residual, seed=0, iterations=100)  # type: ignore[arg-type]
        codes, _ = book.encode(torch.from_numpy(points))
        inputs = book.residuals(torch.from_numpy(points), codes)
        for level in range(2):
            means = torch.stack([inputs[codes[:, level] == code, level].mean(0) for code in range(16)])
            close = torch.isclose(means, book.levels[level], rtol=1e-3, atol=1e-3).all(1)
            assert close.float().mean() > 0.6


@given(st.integers(0, 10**6), st.sampled_from(("cosine", "l2")))
def test_signed_codes_and_what_is_left_sum_to_the_point(seed: int, distance: str) -> None:
    book, points = random_codebook(distance, "signed", seed=seed), random_points(20, seed=seed + 1)
    codes, last = book.encode(points)
    rest = last - book.levels[-1][codes[:, -1]]
    assert torch.allclose(book.decode(codes) + rest, points, atol=1e-5)
    assert torch.allclose(book.decode(codes[:, :2]) + last, points, atol=1e-5)


def test_the_first_of_equally_near_codes_is_taken() -> None:
    levels = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    for distance in ("cosine", "l2"):
        codes, _ = ResidualCodebook(levels, distance).encode(torch.tensor([[3.0, 0.0], [2.0, 2.0], [0.0, 0.0]]))  # type: ignore[arg-type]
        assert codes[:, 0].tolist() == [0, 0, 0]


def test_absolute_residuals_cannot_be_summed() -> None:
    book = random_codebook("l2", "abs")
    with pytest.raises(ValueError, match="do not sum"):
        book.decode(torch.zeros(1, 3, dtype=torch.int64))


def test_saved_and_read_alike(tmp_path: Path) -> None:
    book = random_codebook("cosine", "abs")
    book.save(tmp_path / "codebook.safetensors")
    read = ResidualCodebook.load(tmp_path / "codebook.safetensors")
    assert torch.equal(read.levels, book.levels) and (read.distance, read.residual) == ("cosine", "abs")


class TestWrongInput:
    def test_unknown_kinds(self) -> None:
        with pytest.raises(UserError, match=r"distance can be cosine or l2, not 'cosin'; did you mean 'cosine'"):
            random_codebook("cosin", "abs")
        with pytest.raises(UserError, match="residual can be abs or signed, not 'plus'"):
            random_codebook("l2", "plus")

    def test_vectors_of_another_width(self) -> None:
        with pytest.raises(UserError, match=r"for vectors of 4 dimensions, but was given \(5,\)"):
            random_codebook("l2", "abs").encode(random_points(3, 5))

    def test_files_that_are_no_codebook(self, tmp_path: Path) -> None:
        path = tmp_path / "codebook.safetensors"
        with pytest.raises(UserError, match="does not exist"):
            ResidualCodebook.load(path)
        path.write_bytes(b"no codebook")
        with pytest.raises(UserError, match="damaged or no codebook"):
            ResidualCodebook.load(path)
        for tensors, header in (
            ({"levels": torch.zeros(2, 3, 4)}, None),
            ({"other": torch.zeros(2, 3, 4)}, {"distance": "l2", "residual": "abs"}),
            ({"levels": torch.zeros(3, 4)}, {"distance": "l2", "residual": "abs"}),
            ({"levels": torch.zeros(2, 3, 4)}, {"distance": "far", "residual": "abs"}),
        ):
            save_file(tensors, str(path), metadata=header)
            with pytest.raises(UserError, match="damaged or no codebook"):
                ResidualCodebook.load(path)
        save_file(
            {"levels": torch.full((2, 3, 4), torch.nan)}, str(path), metadata={"distance": "l2", "residual": "abs"}
        )
        with pytest.raises(UserError, match=r"6 of 6 codes of .* NaN"):
            ResidualCodebook.load(path)

    def test_levels_of_different_sizes_and_too_few_points(self) -> None:
        points = random_points(10).numpy()
        with pytest.raises(UserError, match=r"same number of codes, but \[4, 8\]"):
            residual_kmeans(points, [4, 8], "l2", "signed", 0)
        with pytest.raises(UserError, match="fewer items than codes: 10 items for 16 codes"):
            residual_kmeans(points, [16, 16], "l2", "signed", 0)
