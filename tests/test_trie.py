"""The trie as flat arrays against nested dictionaries, on random catalogues of every kind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from catalogues import Node, catalogues, codes, dictionary
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.mass import log_mass, log_masses
from recbole_llm.itemid.trie import Trie
from recbole_llm.itemid.trie_arrays import sort_items


def prefixes(trie: Trie) -> list[tuple[int, ...]]:
    """The tokens that lead to each node."""
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(trie.parents[1:].tolist(), trie.tokens[1:].tolist()):
        found.append((*found[parent], token))
    return found


def with_histories(draw: st.DrawFn, trie: Trie) -> list[list[int]]:
    items = st.integers(0, len(trie.positions) - 1)
    return draw(st.lists(st.lists(items, max_size=15), min_size=1, max_size=4))


def padded(rows: list[list[int]], fill: int = 0) -> torch.Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.int64).view(len(rows), width)


@st.composite
def excluding(draw: st.DrawFn) -> tuple[ItemTokens, list[list[int]]]:
    item_tokens = draw(catalogues)
    items = st.integers(0, item_tokens.n_items - 1)
    return item_tokens, draw(st.lists(st.lists(items, max_size=15), min_size=1, max_size=4))


class TestNodes:
    @given(catalogues)
    def test_equal_those_of_a_dictionary(self, item_tokens: ItemTokens) -> None:
        trie, nodes = Trie(item_tokens), dictionary(item_tokens)
        found = prefixes(trie)
        assert len(found) == len(set(found)) and set(found) == set(nodes)
        assert found == sorted(found, key=lambda prefix: (len(prefix), prefix))
        order, depths, leaf = trie.order.tolist(), trie.depths(torch.arange(len(trie))).tolist(), set()
        for node, prefix in enumerate(found):
            starts, ends = trie.ranges(torch.tensor(node))
            assert sorted(order[starts:ends]) == nodes[prefix].items
            assert depths[node] == len(prefix)
            assert trie.is_leaf(torch.tensor(node)) == (bool(nodes[prefix].items) and not nodes[prefix].children)
            if trie.is_leaf(torch.tensor(node)):
                leaf.add(node)
                assert order[starts:ends] == nodes[prefix].items  # equal items by id
        assert set(trie.leaf_nodes.tolist()) == leaf
        assert trie.starts[trie.leaf_nodes].tolist() == sorted(trie.starts[list(leaf)].tolist())

    @given(catalogues)
    def test_items_places_and_leaves(self, item_tokens: ItemTokens) -> None:
        trie, found = Trie(item_tokens), prefixes(Trie(item_tokens))
        for item, (place, leaf) in enumerate(zip(trie.positions.tolist(), trie.leaves.tolist())):
            tokens = tuple(item_tokens.of(item))
            assert (place, leaf) == (-1, -1) if not tokens else (trie.order[place], found[leaf]) == (item, tokens)
        assert sorted(trie.order.tolist()) == [item for item in range(item_tokens.n_items) if item_tokens.of(item)]

    @given(catalogues)
    def test_ranges_partition(self, item_tokens: ItemTokens) -> None:
        trie = Trie(item_tokens)
        for node in range(len(trie)):
            low, high = trie.child_offsets[node : node + 2].tolist()
            if high > low:
                bounds = torch.stack((trie.starts[low:high], trie.ends[low:high]), dim=1)
                assert bounds[0, 0] == trie.starts[node] and bounds[-1, 1] == trie.ends[node]
                assert torch.equal(bounds[1:, 0], bounds[:-1, 1]) and (bounds[:, 0] < bounds[:, 1]).all()
        leaves = trie.leaf_nodes
        assert (trie.ends - trie.starts)[leaves].sum() == len(trie.order)

    @given(catalogues, st.randoms(use_true_random=False))
    def test_tie_order_moves_equal_items_only(self, item_tokens: ItemTokens, random: object) -> None:
        shuffled = list(range(item_tokens.n_items))
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        plain, other = Trie(item_tokens), Trie(item_tokens, torch.tensor(shuffled))
        assert torch.equal(plain.edges, other.edges) and torch.equal(plain.starts, other.starts)
        rank = {item: place for place, item in enumerate(shuffled)}
        assert other.order.tolist() == sorted(plain.order.tolist(), key=lambda i: (item_tokens.of(i), rank[i]))

    def test_widths_and_bounds_by_depth(self) -> None:
        trie = Trie(ItemTokens.from_codes([[-1, -1], [0, 0], [0, 2], [0, 1], [3, 1]], [4, 3]))
        assert trie.level_bounds == (0, 1, 3, 7) and trie.widths == (2, 3, 0)
        assert trie.tokens.tolist() == [-1, 0, 3, 4, 5, 6, 5]
        assert trie.parents.tolist() == [-1, 0, 0, 1, 1, 1, 2]

    def test_an_item_that_begins_another_is_refused(self) -> None:
        offsets = torch.tensor([0, 0, 3, 6, 8, 10])
        tokens = torch.tensor([4, 1, 0, 4, 1, 0, 3, 3, 4, 1])
        with pytest.raises(
            UserError, match=r"of item 4 \(internal id; 4 1\) are the beginning of those of item 1,"
        ) as e:
            Trie(ItemTokens("titles", offsets, tokens, 5))
        assert "\n" not in str(e.value)

    @given(st.data())
    def test_sorting_with_keys_of_few_tokens(self, data: st.DataObject) -> None:
        # A large vocabulary puts one or two tokens into a key, so that several rounds are needed.
        size = data.draw(st.sampled_from([2, 2**20, 2**31, 2**40, 2**61]))
        token = st.integers(0, min(2, size - 1)) | st.integers(max(0, size - 2), size - 1)
        rows = data.draw(st.lists(st.lists(token, max_size=8), max_size=20))
        offsets = np.cumsum([0, *map(len, rows)])
        flat = np.array([t for row in rows for t in row], dtype=np.int64)
        items = np.array([i for i, row in enumerate(rows) if row], dtype=np.int64)
        expected = sorted(items.tolist(), key=lambda item: rows[item])
        assert sort_items(offsets, flat, size, items).tolist() == expected

    @given(
        count=st.integers(50, 2000), length=st.integers(2, 9), size=st.sampled_from([300, 8000, 151_000]),
        long=st.lists(st.tuples(st.integers(0, 49), st.integers(0, 49)), max_size=4), seed=st.integers(0, 9),
    )  # fmt: skip
    @settings(max_examples=30)
    def test_sorting_where_few_of_many_go_on(
        self, count: int, length: int, size: int, long: list[tuple[int, int]], seed: int
    ) -> None:
        # Nearly all items are settled by their first tokens, as titles are; those that go on are few, and few bits
        # number their places.
        rows = np.random.default_rng(seed).integers(0, size, (count, length))
        for one, other in long:
            rows[other] = rows[one]
            rows[other, -1] = (rows[one, -1] + 1) % size
        got = sort_items(np.arange(0, count * length + 1, length), rows.ravel(), size, np.arange(count))
        assert got.tolist() == sorted(range(count), key=lambda item: rows[item].tolist())

    def test_no_loop_over_items_in_building(self) -> None:
        # 200,000 items: with a Python loop over them this would take a second and far more calls than these.
        import cProfile
        import pstats

        codes = np.random.default_rng(0).integers(0, 256, (200_001, 3))
        codes[0] = -1
        item_tokens = ItemTokens.from_codes(codes, [256] * 3)
        profile = cProfile.Profile()
        profile.runcall(Trie, item_tokens)
        assert pstats.Stats(profile).total_calls < 2000  # type: ignore[attr-defined]


class TestGoingDown:
    @given(catalogues)
    def test_step_to_every_token_from_every_node(self, item_tokens: ItemTokens) -> None:
        trie, nodes, found = Trie(item_tokens), dictionary(item_tokens), prefixes(Trie(item_tokens))
        tokens = torch.arange(-2, trie.size + 3)
        where = torch.arange(-1, len(trie)).unsqueeze(1)
        for node, row in zip(range(-1, len(trie)), trie.step(where, tokens).tolist()):
            for token, child in zip(tokens.tolist(), row):
                legal = node >= 0 and token in nodes[found[node]].children
                assert found[child] == (*found[node], token) if legal else child == -1

    @given(catalogues, st.data())
    def test_walk_and_items_of(self, item_tokens: ItemTokens, data: st.DataObject) -> None:
        trie, found = Trie(item_tokens), prefixes(Trie(item_tokens))
        token = st.integers(0, max(trie.size - 1, 0))
        drawn = data.draw(st.lists(st.lists(token, max_size=5), max_size=5))
        known = [item_tokens.of(item) for item in range(item_tokens.n_items)]
        sequences = drawn + known + [row[:-1] for row in known if row]
        passed = trie.walk(padded(sequences, -1))
        for row, tokens in zip(passed.tolist(), sequences):
            expected = [
                found.index(tuple(tokens[:n])) if tuple(tokens[:n]) in found else -1 for n in range(len(tokens) + 1)
            ]
            assert row == expected + expected[-1:] * (len(row) - len(expected))
        for item, tokens in zip(trie.items_of(padded(sequences, -1)).tolist(), sequences):
            assert item == (known.index(tokens) if tokens and tokens in known else -1)


def legal_of(node: Node | None, excluded: set[int], nodes_below: dict[int, Node]) -> list[int]:
    return sorted(token for token, child in nodes_below.items() if set(child.items) - excluded) if node else []


class TestLegal:
    @given(excluding())
    def test_every_form_equals_plain_python(self, drawn: tuple[ItemTokens, list[list[int]]]) -> None:
        item_tokens, histories = drawn
        trie, nodes, found = Trie(item_tokens), dictionary(item_tokens), prefixes(Trie(item_tokens))
        every = torch.arange(-1, len(trie)).expand(len(histories), -1)
        lm_ids, lm_size = torch.arange(trie.size).flip(0) * 3 + 2, 3 * trie.size + 4
        logits = torch.randn(*every.shape, trie.size, generator=torch.Generator().manual_seed(0))
        for exclude in (None, Exclusion(trie, padded(histories))):
            expected = []
            for history in histories:
                gone = set(history) if exclude else set()
                for node in range(-1, len(trie)):
                    below = nodes[found[node]].children if node >= 0 else {}
                    expected.append(sorted(t for t, child in below.items() if set(child.items) - gone))
            row, token, child = trie.legal(every, exclude)
            flat = [(place, t) for place, tokens in enumerate(expected) for t in tokens]
            assert list(zip(row.tolist(), token.tolist())) == flat
            assert torch.equal(child, trie.step(every.reshape(-1)[row], token))

            tokens, children = trie.legal_padded(every, exclude=exclude)
            assert [[t for t in line if t >= 0] for line in tokens.flatten(0, 1).tolist()] == expected
            assert torch.equal(children, torch.where(tokens >= 0, trie.step(every.unsqueeze(-1), tokens), -1))

            mask = trie.mask(every, exclude=exclude)
            assert [line.nonzero().squeeze(1).tolist() for line in mask.flatten(0, 1)] == expected
            over_lm = trie.mask(every, lm_ids=lm_ids, size=lm_size, exclude=exclude)
            assert torch.equal(over_lm[..., lm_ids], mask) and over_lm.sum() == mask.sum()
            masked = trie.mask_logits_(logits.clone(), every, exclude=exclude)
            assert torch.equal(masked, logits.masked_fill(~mask, -torch.inf))

    @given(catalogues)
    def test_a_known_depth_changes_nothing(self, item_tokens: ItemTokens) -> None:
        trie, leaves = Trie(item_tokens), Trie(item_tokens).leaf_nodes
        for depth, width in enumerate(trie.widths):
            at = torch.arange(trie.level_bounds[depth], trie.level_bounds[depth + 1])
            at = torch.cat((torch.tensor([-1]), at, leaves[leaves < trie.level_bounds[depth]]))
            assert torch.equal(trie.mask(at, depth=depth), trie.mask(at))
            assert trie.legal_padded(at, depth)[0].shape == (len(at), width)
            assert all(map(torch.equal, trie.legal_padded(at, depth), trie.legal_padded(at)))

    def test_masks_kept_whole_end_with_the_memory_for_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        item_tokens = ItemTokens.from_codes([[-1] * 3, [0, 0, 0], [0, 1, 1], [1, 1, 0]], [2, 2, 2])
        plain = Trie(item_tokens)
        for depths, limit in ((0, 11), (1, 12), (1, 23), (2, 24), (4, 1000)):
            monkeypatch.setattr("recbole_llm.itemid.trie.WHOLE_MASK_BYTES", limit)
            trie = Trie(item_tokens)
            assert trie._whole_depths == depths
            for depth in range(3):
                nodes = torch.tensor([[-1, trie.level_bounds[depth]]])
                assert torch.equal(trie.mask(nodes, depth=depth), plain.mask(nodes))

    @given(codes())
    def test_levelwise_is_every_token_ever_used_there(self, item_tokens: ItemTokens) -> None:
        trie = Trie(item_tokens)
        sequences = [item_tokens.of(item) for item in range(item_tokens.n_items)]
        for depth, row in enumerate(trie.levelwise_mask(torch.arange(7))):
            assert row.nonzero().squeeze(1).tolist() == sorted({s[depth] for s in sequences if len(s) > depth})


class TestExclusion:
    @given(excluding())
    def test_left_and_items_under(self, drawn: tuple[ItemTokens, list[list[int]]]) -> None:
        item_tokens, histories = drawn
        trie, nodes, found = Trie(item_tokens), dictionary(item_tokens), prefixes(Trie(item_tokens))
        every = torch.arange(-1, len(trie)).expand(len(histories), -1)
        offsets = torch.tensor([0, *map(len, histories)]).cumsum(0)
        flat = torch.tensor([item for row in histories for item in row], dtype=torch.int64)
        exclude, same = Exclusion(trie, padded(histories, -1)), Exclusion.from_lists(trie, offsets, flat)
        left = exclude.left(every)
        assert torch.equal(left, same.left(every))
        below = [[], *(nodes[prefix].items for prefix in found)]
        expected = [[len(set(items) - set(row)) for items in below] for row in histories]
        assert left.tolist() == expected
        for given_exclusion, gone in ((exclude, histories), (None, [[]] * len(histories))):
            row, item = trie.items_under(every, given_exclusion)
            pairs = [
                (place, i)
                for place, (history, items) in enumerate((h, items) for h in gone for items in below)
                for i in sorted(items, key=lambda i: int(trie.positions[i]))
                if i not in history
            ]
            assert list(zip(row.tolist(), item.tolist())) == pairs

    def test_equal_items_are_left_one_by_one(self) -> None:
        trie = Trie(ItemTokens.from_codes([[-1], [0], [0], [0], [1]], [2]))
        leaf = torch.tensor([[1], [1], [1]])
        exclude = Exclusion(trie, torch.tensor([[0, 0, 0], [2, 2, 0], [3, 1, 2]]))
        assert exclude.left(leaf).tolist() == [[3], [2], [0]]
        assert trie.items_under(leaf, exclude)[1].tolist() == [1, 2, 3, 1, 3]

    def test_rows_must_be_those_excluded_for(self) -> None:
        trie = Trie(ItemTokens.raw(4))
        with pytest.raises(ValueError, match="2 rows"):
            trie.legal_padded(torch.zeros(3, dtype=torch.int64), exclude=Exclusion(trie, torch.zeros(2, 1).long()))


class TestSums:
    @given(catalogues, st.integers(0, 2**32 - 1))
    def test_mass_is_the_sum_below_and_children_add_up(self, item_tokens: ItemTokens, seed: int) -> None:
        trie, nodes, found = Trie(item_tokens), dictionary(item_tokens), prefixes(Trie(item_tokens))
        scores = torch.randn(2, item_tokens.n_items, generator=torch.Generator().manual_seed(seed))
        values = scores.exp()
        sums = trie.sums(values)
        assert sums.dtype == torch.float64 and sums.shape == (2, len(trie.order) + 1)
        every = torch.arange(-1, len(trie)).expand(2, -1)
        mass = trie.mass(sums, every)
        for row in range(2):
            below = [0.0, *(math.fsum(values[row, nodes[prefix].items].tolist()) for prefix in found)]
            assert mass[row].tolist() == pytest.approx(below, abs=1e-12)
            assert torch.equal(mass[row], trie.mass(sums[row], every[row]))
        _, children = trie.legal_padded(every)
        inner = (children >= 0).any(dim=-1)
        added = trie.mass(sums, children).sum(dim=-1)
        torch.testing.assert_close(added[inner], mass[inner])
        assert (trie.mass(sums, every.unsqueeze(-1)).squeeze(-1) == mass).all()

        exact = log_masses(trie, scores.double())
        torch.testing.assert_close(exact, log_mass(trie, sums, every)[:, 1:], atol=1e-6, rtol=0)
        if len(trie.order):
            torch.testing.assert_close(exact[:, 0], scores[:, trie.order].double().logsumexp(dim=1))

    @given(catalogues, st.integers(0, 2**32 - 1))
    def test_next_token_distributions_multiply_to_the_softmax_over_items(
        self, item_tokens: ItemTokens, seed: int
    ) -> None:
        trie = Trie(item_tokens)
        # Scores so far apart that a softmax in float64 has zeros: the logarithms do not.
        scores = torch.randn(2, item_tokens.n_items, generator=torch.Generator().manual_seed(seed)).double() * 800
        masses = log_masses(trie, scores)
        steps = masses[:, 1:] - masses[:, trie.parents[1:]]
        items = trie.order[: len(trie.order)]
        softmax = scores[:, items].log_softmax(dim=1)
        for column, item in enumerate(items.tolist()):
            path = trie.walk(item_tokens.padded(torch.tensor([item]))[0])[0, 1:]
            twins = scores[:, items[trie.leaves[items] == trie.leaves[item]]]
            share = scores[:, item] - twins.logsumexp(dim=1)  # of equal items
            torch.testing.assert_close(steps[:, path - 1].sum(dim=1) + share, softmax[:, column])

    def test_masses_far_below_the_total_are_exact(self) -> None:
        trie = Trie(ItemTokens.from_codes([[-1, -1], [0, 0], [1, 0], [1, 1]], [2, 2]))
        scores = torch.tensor([[0.0, 0.0, -700.0, -701.0]], dtype=torch.float64)
        assert log_masses(trie, scores)[0, 2].item() == pytest.approx(-700 + math.log1p(math.exp(-1)))
        gone = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
        assert log_masses(trie, gone)[0].tolist() == [0, 0, -math.inf, 0, -math.inf, -math.inf]


class TestEdges:
    def test_no_item_has_tokens(self) -> None:
        trie = Trie(ItemTokens.from_codes([[-1, -1], [-1, -1]], [2, 2]))
        root = torch.tensor([0, -1])
        assert len(trie) == 1 and trie.widths == (0,) and not trie.is_leaf(root).any()
        assert not trie.mask(root).any() and trie.legal_padded(root)[0].shape == (2, 0)
        assert trie.step(root, root).tolist() == [-1, -1] and trie.items_of(torch.tensor([[1]])).tolist() == [-1]
        assert Exclusion(trie, torch.tensor([[1]])).left(torch.tensor([[0, -1]])).tolist() == [[0, 0]]
        assert log_masses(trie, torch.zeros(1, 2)).tolist() == [[-math.inf]]

    def test_nothing_asked(self) -> None:
        trie, none = Trie(ItemTokens.raw(3)), torch.zeros(0, dtype=torch.int64)
        assert trie.mask(none).shape == (0, 2) and trie.legal(none)[0].shape == (0,)
        assert trie.legal_padded(none)[0].shape == (0, 0) and trie.step(none, none).shape == (0,)
        assert Exclusion(trie, torch.zeros(1, 0, dtype=torch.int64)).left(torch.tensor([[0]])).tolist() == [[2]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_gives_the_same_and_is_not_waited_for() -> None:
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, 16, (3001, 3))
    drawn[0] = -1
    trie = Trie(ItemTokens.from_codes(drawn, [16] * 3))
    there = trie.to("cuda")
    history = torch.from_numpy(rng.integers(0, 3001, (8, 40)))
    scores, logits = torch.randn(8, 3001), torch.randn(8, 20, trie.size)

    def all_of(trie: Trie, depth: int, *given: torch.Tensor) -> list[torch.Tensor]:
        nodes, history, scores, logits = given
        exclude = Exclusion(trie, history)
        tokens, children = trie.legal_padded(nodes, depth, exclude)
        mass = trie.mass(trie.sums(scores), children)
        masks = trie.mask(nodes, depth=depth), trie.mask(nodes, depth=depth, exclude=exclude)
        masked = trie.mask_logits_(logits.clone(), nodes, depth=depth)
        return [tokens, children, mass, *masks, masked, trie.step(nodes, tokens[..., 0]), exclude.left(nodes)]

    for depth in range(3):
        nodes = torch.from_numpy(rng.integers(trie.level_bounds[depth], trie.level_bounds[depth + 1], (8, 20)))
        given_there = [tensor.cuda() for tensor in (nodes, history, scores, logits)]
        all_of(there, depth, *given_there)  # what is made when first asked for
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = all_of(there, depth, *given_there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for mine, theirs in zip(found, all_of(trie, depth, nodes, history, scores, logits)):
            torch.testing.assert_close(mine.cpu(), theirs)
        for mine, theirs in zip(there.legal(given_there[0]), trie.legal(nodes)):
            assert torch.equal(mine.cpu(), theirs)
    torch.testing.assert_close(log_masses(there, scores.cuda()).cpu(), log_masses(trie, scores))
