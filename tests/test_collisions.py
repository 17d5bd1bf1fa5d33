"""Collision policies: ids of their own, near what was encoded, whatever the items are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.itemid.codebook import ResidualCodebook
from recbole_llm.itemid.collisions import colliding, resolve
from recbole_llm.itemid.sinkhorn import balanced, centred, sinkhorn


def case(
    seed: int, n: int, levels: int, size: int, kind: tuple[str, str] = ("l2", "signed"), copies: bool = False
) -> tuple[ResidualCodebook, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    book = ResidualCodebook(torch.randn(levels, size, 3, generator=generator), *kind)  # type: ignore[arg-type]
    points = torch.randn(n, 3, generator=generator)
    if copies:
        points[n // 2 :] = points[: n - n // 2]
    return book, points, book.encode(points)[0]


def plain_distance(book: ResidualCodebook, level: int, inputs: torch.Tensor, code: int) -> float:
    vector = book.levels[level, code].double()
    if book.distance == "l2":
        return float((inputs - vector).square().sum())
    return float(1 - inputs @ vector / (inputs.norm() * vector.norm()))


def plain_nearest(
    book: ResidualCodebook, points: torch.Tensor, codes: torch.Tensor, keys: np.ndarray
) -> list[list[int]]:
    """``nearest`` by sets and sorting, one item at a time; the longest prefix that has room, then the nearest below."""
    rows = [tuple(row) for row in codes.tolist()]
    last = book.residuals(points, codes)[:, -1].double()
    gaps = [np.float32(plain_distance(book, book.depth - 1, last[i], rows[i][-1])) for i in range(len(rows))]
    order = sorted(range(len(rows)), key=lambda i: (gaps[i], keys[i]))
    taken, moving = set(), []
    for i in order:
        (moving.append(i) if rows[i] in taken else taken.add(rows[i]))

    def room(prefix: tuple[int, ...]) -> bool:
        below = sum(row[: len(prefix)] == prefix for row in taken)
        return below < book.size ** (book.depth - len(prefix))

    for i in moving:
        prefix = rows[i][:-1]
        while not room(prefix):
            prefix = prefix[:-1]
        while len(prefix) < book.depth:
            level = len(prefix)
            inputs = points[i].double()
            for above, code in enumerate(prefix):
                inputs = inputs - book.levels[above, code].double()
                inputs = inputs.abs() if book.residual == "abs" else inputs
            free = [code for code in range(book.size) if room((*prefix, code))]
            prefix = (*prefix, min(free, key=lambda code: plain_distance(book, level, inputs, code)))
        rows[i] = prefix
        taken.add(prefix)
    return [list(row) for row in rows]


@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 4), st.floats(0, 1),
    st.sampled_from([("l2", "signed"), ("cosine", "abs")]),
)  # fmt: skip
def test_nearest_is_the_plain_loop(seed: int, levels: int, size: int, share: float, kind: tuple[str, str]) -> None:
    n = max(1, min(40, round(share * size**levels)))
    book, points, codes = case(seed, n, levels, size, kind)
    keys = np.random.default_rng(seed).permutation(n)
    found = resolve("nearest", book, points, codes, keys)
    assert found.codes.tolist() == plain_nearest(book, points, codes, keys)
    assert len(np.unique(found.codes, axis=0)) == n and found.colliding == 0
    assert found.sizes == (size,) * levels


@given(st.integers(0, 10**6), st.integers(1, 16))
def test_nearest_keeps_prefixes_while_there_is_room(seed: int, n: int) -> None:
    book, points, codes = case(seed, n, 2, 16)
    found = resolve("nearest", book, points, codes)
    assert np.array_equal(found.codes[:, 0], codes[:, 0].numpy())
    alone = ~colliding(codes.numpy())
    assert np.array_equal(found.codes[alone], codes.numpy()[alone])
    assert found.changed == n - len(np.unique(codes.numpy(), axis=0))
    assert found.colliding_before == (~alone).sum()


@pytest.mark.parametrize("policy", ["nearest", "extra_token"])
@given(seed=st.integers(0, 10**6))
def test_new_numbers_change_nothing(policy: str, seed: int) -> None:
    """Half of the items are copies of others: then it is the key that decides."""
    book, points, codes = case(seed, 60, 3, 4, copies=True)
    keys = np.array([f"item {number}" for number in range(60)])
    order = np.random.default_rng(seed).permutation(60)
    first = resolve(policy, book, points, codes, keys)
    second = resolve(policy, book, points[order], codes[order], keys[order])
    assert np.array_equal(first.codes[order], second.codes)
    assert first.colliding == 0


@given(st.integers(0, 10**6), st.integers(1, 50))
def test_an_extra_token_counts_within_a_group(seed: int, n: int) -> None:
    book, points, codes = case(seed, n, 2, 2)
    found = resolve("extra_token", book, points, codes)
    assert np.array_equal(found.codes[:, :2], codes.numpy()) and found.changed == 0
    assert len(np.unique(found.codes, axis=0)) == n
    for group in np.unique(codes.numpy(), axis=0):
        members = found.codes[(codes.numpy() == group).all(axis=1), 2]
        assert sorted(members) == list(range(len(members)))
    assert found.sizes == (2, 2, found.codes[:, 2].max() + 1)


def test_the_nearest_of_a_group_keeps_its_codes() -> None:
    book = ResidualCodebook(torch.tensor([[[0.0], [10.0], [11.0], [20.0]]]))
    points = torch.tensor([[10.4], [10.0], [9.8], [0.1]])
    found = resolve("nearest", book, points, book.encode(points)[0])
    assert found.codes[:, 0].tolist() == [3, 1, 2, 0]
    assert (found.changed, found.colliding_before, found.colliding) == (2, 3, 0)


def test_keep_keeps() -> None:
    book, points, codes = case(0, 40, 2, 3)
    found = resolve("keep", book, points, codes)
    assert np.array_equal(found.codes, codes.numpy())
    assert found.colliding == found.colliding_before > 0 and found.changed == 0


class TestSinkhorn:
    @staticmethod
    def lc_rec(distances: np.ndarray, epsilon: float, iterations: int) -> np.ndarray:
        """The algorithm with loops over rows and columns."""
        middle = (distances.max() + distances.min()) / 2
        shares = np.exp(-(distances - middle) / (distances.max() - middle + 1e-5) / epsilon)
        shares /= shares.sum()
        items, codes = shares.shape
        for _ in range(iterations):
            for row in range(items):
                shares[row] /= shares[row].sum() * items
            for column in range(codes):
                shares[:, column] /= shares[:, column].sum() * codes
        return shares * items

    def test_against_loops(self) -> None:
        distances = torch.rand(3, 12, 5, generator=torch.Generator().manual_seed(0))
        found = sinkhorn(distances, 0.05, 20)
        for batch in range(3):
            assert found[batch].numpy() == pytest.approx(
                self.lc_rec(distances[batch].double().numpy(), 0.05, 20), rel=1e-9
            )
        assert torch.allclose(found.sum(-2), torch.full((3, 5), 12 / 5, dtype=torch.float64))
        assert float(centred(distances).abs().max()) <= 1

    def test_codes_are_given_out_evenly(self) -> None:
        # All are nearest to code 0, and 8 of them hardly.
        distances = torch.tensor([[0.0, 1.0]] * 8 + [[0.4, 0.5]] * 8)
        assert balanced(distances).tolist() == [0] * 8 + [1] * 8

    def test_prefixes_stay_and_fewer_collide(self) -> None:
        book, points, codes = case(0, 200, 2, 32)
        found = resolve("sinkhorn", book, points, codes)
        assert np.array_equal(found.codes[:, 0], codes[:, 0].numpy())
        alone = ~colliding(codes.numpy())
        assert found.colliding == colliding(found.codes).sum() < found.colliding_before
        assert found.codes.shape == codes.shape and alone.any()

    def test_equal_points_cannot_be_told_apart_and_are_counted(self) -> None:
        book, points, _ = case(0, 2, 2, 8)
        points[1] = points[0]
        codes, _ = book.encode(points)
        assert resolve("sinkhorn", book, points, codes).colliding == 2


def test_what_cannot_be_is_told() -> None:
    book, points, codes = case(0, 10, 2, 3)
    with pytest.raises(
        UserError, match=r"10 items cannot have codes of their own: 2 level\(s\) of 3 codes make 9; take"
    ):
        resolve("nearest", book, points, codes)
    with pytest.raises(UserError, match=r"nearest, sinkhorn, extra_token, keep, but is 'extra'"):
        resolve("extra", book, points, codes)
