"""Collaborative next-token distributions against a dictionary trie, and the losses that mix them into labels."""

from __future__ import annotations

import math

import pytest
import torch
from catalogues import END, Node, catalogues, dictionary
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.nn import functional

from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.objectives.quirks import OFFICIAL, OURS, behaviour
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer, SoftLabels, deviations
from recbole_llm.objectives.soft_loss import FORMS, SoftLabelLoss

SPREADS = [0.0, 1.0, 30.0, 400.0]


@st.composite
def batches(draw: st.DrawFn) -> tuple[ItemTokens, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Item tokens, logits of widely different spread with items ruled out, targets and perhaps histories."""
    item_tokens = draw(catalogues)
    with_tokens = item_tokens.lengths.nonzero().squeeze(1).tolist()
    assume(with_tokens)
    targets = torch.tensor(draw(st.lists(st.sampled_from(with_tokens), min_size=1, max_size=4)))
    rows, items = len(targets), item_tokens.n_items
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(rows, items, generator=generator) * draw(st.sampled_from(SPREADS))
    if draw(st.booleans()):
        logits[torch.rand(rows, items, generator=generator) < 0.3] = -torch.inf
    history = None
    if draw(st.booleans()):
        history = torch.randint(0, items, (rows, draw(st.integers(0, 5))), generator=generator)
    return item_tokens, logits, targets, history


def naive(
    nodes: dict[tuple[int, ...], Node], prefix: tuple[int, ...], label: int, logits: torch.Tensor, excluded: set[int]
) -> dict[int, float]:
    """A softmax over the items with the prefix, added up by their next tokens, as the equation is written."""
    node = nodes[prefix]
    items = [item for item in node.items if item not in excluded and logits[item] > -math.inf]
    if not items:
        return {token: float(token == label) for token in node.children}
    shares = dict(zip(items, logits.double()[items].softmax(0).tolist()))
    return {
        token: sum(shares.get(item, 0.0) for item in child.items) for token, child in node.children.items()
    }  # fmt: skip


def entries(soft: SoftLabels, position: int) -> dict[int, float]:
    low, high = soft.offsets[position : position + 2].tolist()
    assert soft.positions[low:high].tolist() == [position] * (high - low)
    found = dict(zip(soft.tokens[low:high].tolist(), soft.probs[low:high].tolist()))
    assert len(found) == high - low
    return found


def lm_ids_of(item_tokens: ItemTokens) -> list[int]:
    return list(range(item_tokens.size)) if item_tokens.lm_ids is None else item_tokens.lm_ids.tolist()


class TestDistributions:
    @given(batches())
    def test_equal_the_loop_over_a_dictionary(
        self, batch: tuple[ItemTokens, torch.Tensor, torch.Tensor, torch.Tensor | None]
    ) -> None:
        item_tokens, logits, targets, history = batch
        soft = CollaborativeTokenizer(item_tokens)(logits, targets, history)
        nodes, ids, position = dictionary(item_tokens), lm_ids_of(item_tokens), 0
        for row, target in enumerate(targets.tolist()):
            tokens = item_tokens.of(target)
            excluded = set() if history is None else set(history[row].tolist()) - {target}
            for place, label in enumerate(tokens):
                expected = naive(nodes, tuple(tokens[:place]), label, logits[row], excluded)
                found = entries(soft, position)
                assert list(found) == sorted(ids[token] for token in expected)
                for token, share in expected.items():
                    assert found[ids[token]] == pytest.approx(share, rel=1e-5, abs=1e-7)
                assert sum(found.values()) == pytest.approx(1, abs=1e-5)
                assert soft.labels[position] == ids[label] and soft.samples[position] == row
                assert soft.forced[position] == (len(expected) == 1)
                position += 1
        assert position == len(soft)

    @given(catalogues, st.integers(0, 9), st.sampled_from(SPREADS), st.sampled_from([0.3, 1.0, 4.0]))
    def test_product_along_an_item_is_its_softmax_with_that_of_its_equals(
        self, item_tokens: ItemTokens, seed: int, spread: float, beta: float
    ) -> None:
        trie = item_tokens.trie
        items = trie.order
        assume(len(items))
        row = torch.randn(item_tokens.n_items, generator=torch.Generator().manual_seed(seed)) * spread
        logits = row.expand(len(items), -1)
        tokenizer = CollaborativeTokenizer(item_tokens, beta=beta)
        positions = tokenizer.positions(items)
        children = tokenizer.children(positions.nodes)
        probs = tokenizer.probs(logits, items, positions, children)
        own = trie.tokens[children.nodes] == positions.labels[children.positions]
        logs = torch.zeros(len(items), dtype=torch.float64).index_add(0, positions.samples, probs[own].log())
        softmax = (row[items].double() / beta).log_softmax(0)
        for place, leaf in enumerate(trie.leaves[items].tolist()):
            equals = softmax[trie.leaves[items] == leaf].logsumexp(0)
            assert logs[place].exp().item() == pytest.approx(equals.exp().item(), abs=1e-10)
            # Below, float64's exponents themselves are rounded to nothing.
            if equals > -700:
                assert logs[place].item() == pytest.approx(equals.item(), abs=1e-6)

    def test_golden(self) -> None:
        # "a b" twice, "a", "c": by hand with weights 1, 2, 3, 4.
        item_tokens = ItemTokens.from_sequences([[], [10, 11], [10, 11], [10], [30]], END)
        logits = torch.tensor([[9.0, math.log(1), math.log(2), math.log(3), math.log(4)]])
        soft = CollaborativeTokenizer(item_tokens)(logits, torch.tensor([2]))
        assert soft.labels.tolist() == [10, 11, END] and soft.offsets.tolist() == [0, 2, 4, 5]
        assert soft.tokens.tolist() == [10, 30, END, 11, END]
        assert soft.probs.tolist() == pytest.approx([0.6, 0.4, 0.5, 0.5, 1.0])
        assert soft.dense(40)[1, [END, 11]].tolist() == pytest.approx([0.5, 0.5])

    def test_masses_far_below_the_total_are_exact(self) -> None:
        codes = [[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]
        item_tokens = ItemTokens.from_codes(codes, [2, 2])
        soft = CollaborativeTokenizer(item_tokens)(torch.tensor([[0.0, 500, 499, -300, -301, -302]]), torch.tensor([4]))
        below = [1.0, math.exp(-1) + math.exp(-2)]
        assert soft.probs[:2].tolist() == [1.0, 0.0]
        assert soft.probs[2:].tolist() == pytest.approx([mass / sum(below) for mass in below], rel=1e-6)

    @pytest.mark.parametrize("gap", [20.0, 30, 40])
    def test_children_far_below_their_parent_are_exact(self, gap: float) -> None:
        item_tokens = ItemTokens.from_codes([[-1, -1], [0, 0], [0, 1], [1, 0], [1, 1]], [2, 2])
        logits = torch.tensor([[0.0, gap, 2 * gap, 1, 0.5]])
        found = CollaborativeTokenizer(item_tokens)(logits, torch.tensor([1])).probs.double()
        wholes = logits[0, 1:].double().exp()
        first = wholes.view(2, 2).sum(1)
        expected = torch.cat([first / first.sum(), wholes[:2] / first[0]])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)

    def test_a_target_keeps_its_mass_though_it_was_seen(self) -> None:
        soft = CollaborativeTokenizer(ItemTokens.raw(4))(
            torch.zeros(1, 4), torch.tensor([2]), torch.tensor([[2, 3, 0]])
        )
        assert soft.probs.tolist() == pytest.approx([0.5, 0.5, 0.0])

    def test_beta_and_standardised_logits(self) -> None:
        item_tokens, logits = ItemTokens.raw(5), torch.tensor([[99.0, 1.0, 2.0, 6.0, 3.0]])
        target = torch.tensor([1])
        sharp = CollaborativeTokenizer(item_tokens, beta=0.5)(logits, target)
        torch.testing.assert_close(sharp.probs, (logits[0, 1:] * 2).softmax(0))
        even = CollaborativeTokenizer(item_tokens, standardise=True)
        expected = ((logits[0, 1:] - 3) / logits[0, 1:].std(correction=0)).softmax(0)
        torch.testing.assert_close(even(logits, target).probs, expected)
        # The scale of the teacher's logits no longer matters.
        torch.testing.assert_close(even(logits * 100 + 7, target).probs, expected)
        assert deviations(torch.tensor([[2.0, 2.0, -math.inf], [1.0, 5.0, -math.inf]])).tolist() == [[1], [2]]
        # What they are multiplied by stays a number, however little they differ.
        hard = CollaborativeTokenizer(item_tokens, beta=1e-307, standardise=True)
        assert hard(logits * 1e-3, target).probs.tolist() == [0, 0, 1, 0]

    def test_official_drops_the_last_two_and_rounds(self) -> None:
        item_tokens = ItemTokens.from_sequences([[], [5, 6, 7], [5], [8, 9]], END)
        quirks = behaviour(True)
        tokenizer = CollaborativeTokenizer(item_tokens, drop_last=quirks.drop_last, dtype=quirks.dtype)
        logits = torch.tensor([[0.0, 1.0, 1.001, 3.0]] * 3)
        soft = tokenizer(logits, torch.tensor([1, 2, 3]))
        assert soft.labels.tolist() == [5, 6, 8] and soft.samples.tolist() == [0, 0, 2]
        assert soft.probs[2:4].tolist() == [0.5, 0.5]  # 1.001 is 1 in bfloat16
        assert behaviour(False) == OURS and OFFICIAL.skip_forced is False

    def test_codes_under_the_language_models_ids(self) -> None:
        item_tokens = ItemTokens.from_codes([[-1, -1], [1, 0], [0, 2]], [2, 3])
        soft = CollaborativeTokenizer(item_tokens, torch.arange(100, 105))(torch.zeros(1, 3), torch.tensor([1]))
        assert soft.labels.tolist() == [101, 102] and soft.tokens.tolist() == [100, 101, 102]

    def test_edges(self) -> None:
        item_tokens = ItemTokens.from_codes([[-1], [-1], [0]], [1])
        tokenizer = CollaborativeTokenizer(item_tokens)
        assert len(tokenizer(torch.zeros(1, 3), torch.tensor([1]))) == 0
        assert len(tokenizer(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))) == 0
        assert tokenizer(torch.full((1, 3), -math.inf), torch.tensor([2])).probs.tolist() == [1.0]
        empty = CollaborativeTokenizer(ItemTokens.from_codes([[-1], [-1]], [1]))
        assert len(empty(torch.zeros(1, 2), torch.tensor([1]))) == 0
        with pytest.raises(ValueError, match="1 x 3 items"):
            tokenizer(torch.zeros(1, 4), torch.tensor([2]))
        with pytest.raises(UserError, match=r"beta is .* above 0, not 0"):
            CollaborativeTokenizer(item_tokens, beta=0)

    def test_fingerprint_tells_settings_apart(self) -> None:
        one, other = ItemTokens.raw(4), ItemTokens.raw(5)
        made = [
            CollaborativeTokenizer(one), CollaborativeTokenizer(other), CollaborativeTokenizer(one, beta=2),
            CollaborativeTokenizer(one, standardise=True), CollaborativeTokenizer(one, drop_last=1),
            CollaborativeTokenizer(one, dtype=torch.bfloat16), CollaborativeTokenizer(one, torch.arange(5, 8)),
        ]  # fmt: skip
        assert len({tokenizer.fingerprint() for tokenizer in made}) == len(made)
        assert CollaborativeTokenizer(ItemTokens.raw(4)).fingerprint() == made[0].fingerprint()


SIZE = 40
TITLES = ItemTokens.from_sequences([[], [10, 11], [10, 11], [10], [30, 5], [30, 6, 7]], END)


def labels_and_logits(seed: int = 0, spread: float = 2.0) -> tuple[SoftLabels, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.tensor([1, 3, 5, 4])
    scores = torch.randn(4, 6, generator=generator) * spread
    soft = CollaborativeTokenizer(TITLES)(scores, targets)
    return soft, torch.randn(len(soft), SIZE, generator=generator) * spread


def plain(form: str, logits: torch.Tensor, soft: SoftLabels, alpha: float, tau: float, legal: bool) -> torch.Tensor:
    """The equations over whole rows, float64."""
    rows = logits.double() / tau
    teacher = soft.dense(logits.shape[1]).double()
    if legal:
        mask = torch.zeros_like(rows, dtype=torch.bool)
        mask[soft.positions, soft.tokens] = True
        rows = rows.masked_fill(~mask, -math.inf)
    mixed = (1 - alpha) * functional.one_hot(soft.labels, logits.shape[1]) + alpha * teacher
    log_model = rows.log_softmax(1)
    if form == "log_mixture":
        return -(mixed * log_model.exp()).sum(1).log()
    cross = -(mixed * log_model.where(mixed > 0, 0)).sum(1)
    return cross if form == "soft_ce" else cross + torch.xlogy(mixed, mixed).sum(1)


class TestLosses:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("legal", [False, True])
    @pytest.mark.parametrize("alpha", [0.0, 0.05, 0.7, 1.0])
    @pytest.mark.parametrize("tau", [1.0, 4.5])
    def test_equal_whole_rows_with_their_gradients(self, form: str, legal: bool, alpha: float, tau: float) -> None:
        soft, logits = labels_and_logits()
        mine, theirs = (logits.clone().requires_grad_() for _ in "12")
        found = SoftLabelLoss(form, alpha, tau, legal_only=legal).of_positions(mine, soft)
        expected = plain(form, theirs, soft, alpha, tau, legal)
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
        weights = torch.linspace(0.5, 2, len(soft))
        (found * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("form", FORMS)
    def test_without_a_teachers_share_it_is_the_cross_entropy(self, form: str) -> None:
        soft, logits = labels_and_logits(spread=5.0)
        mine, theirs = (logits.clone().requires_grad_() for _ in "12")
        found = SoftLabelLoss(form, alpha=0.0)(mine, soft)
        expected = functional.cross_entropy(theirs, soft.labels)
        assert abs(found.item() - expected.item()) < 1e-6
        found.backward()
        expected.backward()
        assert (mine.grad - theirs.grad).abs().max() < 1e-7

    @given(st.integers(0, 99), st.floats(0, 1))
    def test_gradient_is_p_less_q(self, seed: int, alpha: float) -> None:
        soft, logits = labels_and_logits(seed)
        logits.requires_grad_()
        SoftLabelLoss("log_mixture", alpha).of_positions(logits, soft).sum().backward()
        model = logits.detach().double().softmax(1)
        mixed = (1 - alpha) * functional.one_hot(soft.labels, SIZE) + alpha * soft.dense(SIZE)
        q = model * mixed / (model * mixed).sum(1, keepdim=True)
        torch.testing.assert_close(logits.grad, (model - q).float(), rtol=1e-4, atol=1e-6)

    def test_kl_is_nothing_where_the_model_is_the_mixture(self) -> None:
        soft, _ = labels_and_logits()
        mixed = 0.7 * functional.one_hot(soft.labels, SIZE) + 0.3 * soft.dense(SIZE)
        logits = mixed.clamp(min=1e-30).log().requires_grad_()
        found = SoftLabelLoss("kl", 0.3).of_positions(logits, soft)
        assert found.abs().max() < 1e-6
        found.sum().backward()
        assert logits.grad.abs().max() < 1e-6

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("legal", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_ruled_out_tokens_make_no_nan(self, form: str, legal: bool, dtype: torch.dtype) -> None:
        soft, logits = labels_and_logits()
        logits[:, 10] = -math.inf  # the label of some positions, and a token that the teacher likes at others
        logits[1, :] = -math.inf
        logits = logits.to(dtype).requires_grad_()
        losses = SoftLabelLoss(form, 0.3, 2.0, legal_only=legal).of_positions(logits, soft)
        assert losses.dtype == torch.float32 and not losses.isnan().any()
        assert losses[1] == math.inf
        spared = (soft.labels != 10) & (torch.arange(len(soft)) != 1)
        assert losses[spared].isfinite().all()
        losses.sum().backward()
        assert logits.grad.dtype == dtype and not logits.grad.isnan().any()
        assert logits.grad[0, 10] == 0 or form != "log_mixture"

    @pytest.mark.parametrize("form", FORMS)
    def test_logits_hundreds_apart(self, form: str) -> None:
        soft, logits = labels_and_logits(spread=300.0)
        logits.requires_grad_()
        losses = SoftLabelLoss(form, 0.5).of_positions(logits, soft)
        assert losses.isfinite().all()
        torch.testing.assert_close(losses, plain_logs(form, logits.detach(), soft, 0.5).float(), rtol=1e-5, atol=1e-5)
        losses.sum().backward()
        assert logits.grad.isfinite().all()

    def test_forced_tokens_in_and_out_of_the_mean(self) -> None:
        soft, logits = labels_and_logits()
        losses = SoftLabelLoss(legal_only=True).of_positions(logits, soft)
        assert soft.forced.any() and not soft.forced.all()
        assert losses[soft.forced].abs().max() < 1e-6
        out = SoftLabelLoss(legal_only=True)(logits, soft)
        within = SoftLabelLoss(legal_only=True, skip_forced=False)(logits, soft)
        torch.testing.assert_close(out, losses[~soft.forced].mean())
        torch.testing.assert_close(within, losses.mean())
        # Over the whole vocabulary a forced token has something to learn.
        torch.testing.assert_close(SoftLabelLoss()(logits, soft), SoftLabelLoss().of_positions(logits, soft).mean())

    @pytest.mark.parametrize("legal", [False, True])
    def test_nothing_to_learn_from_is_zero(self, legal: bool) -> None:
        none = CollaborativeTokenizer(TITLES)(torch.zeros(1, 6), torch.tensor([0]))
        logits = torch.zeros(0, SIZE, requires_grad=True)
        loss = SoftLabelLoss(legal_only=legal)(logits, none)
        loss.backward()
        assert loss.item() == 0

    def test_no_gradient_reaches_the_teacher(self) -> None:
        scores = torch.randn(2, 6, requires_grad=True)
        soft = CollaborativeTokenizer(TITLES)(scores, torch.tensor([1, 5]))
        assert not soft.probs.requires_grad
        logits = torch.randn(len(soft), SIZE, requires_grad=True)
        SoftLabelLoss()(logits, soft).backward()
        assert scores.grad is None and logits.grad is not None

    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("legal_only", [False, True])
    def test_half_precision_is_rounded_once(self, form: str, legal_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        soft, logits = labels_and_logits()
        # Pieces of two rows and a last one of fewer.
        monkeypatch.setattr("recbole_llm.objectives.soft_loss.PIECE", 2 * logits.shape[1] + 1)
        half = logits.detach().to(torch.bfloat16).requires_grad_()
        single = half.detach().float().requires_grad_()
        loss = SoftLabelLoss(form, 0.3, 0.7, legal_only=legal_only)
        found, expected = loss(half, soft), loss(single, soft)
        found.backward()
        expected.backward()
        assert torch.equal(found, expected) and half.grad is not None and single.grad is not None
        assert torch.equal(half.grad, single.grad.to(torch.bfloat16))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_array_of_the_logits_size_but_their_gradient(self, dtype: torch.dtype) -> None:
        soft, _ = labels_and_logits()
        size = 2**20
        logits = torch.randn(len(soft), size).to(dtype).requires_grad_()
        largest: list[int] = []

        class Watch(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
                made = func(*args, **(kwargs or {}))
                seen = [*args, *(kwargs or {}).values()]
                for each in made if isinstance(made, tuple | list) else [made]:
                    if isinstance(each, torch.Tensor) and each.numel() >= 2 * size:
                        known = {a.untyped_storage().data_ptr() for a in seen if isinstance(a, torch.Tensor)}
                        if each.untyped_storage().data_ptr() not in known:
                            largest.append(each.numel())
                return made

        with Watch():
            loss = SoftLabelLoss("log_mixture", 0.3)(logits, soft)
            assert not largest
            loss.backward()
        assert largest.count(logits.numel()) <= 2  # the gradient, and where it is kept

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"alpha": 1.5}, "alpha is .* within 0 and 1, not 1.5"),
            ({"alpha": -0.1}, "not -0.1"),
            ({"alpha": math.nan}, "not nan"),
            ({"tau": 0.0}, "tau is .* above 0, not 0.0"),
            ({"form": "log_mix"}, "not 'log_mix'; did you mean 'log_mixture'"),
        ],
    )
    def test_wrong_settings_are_one_line(self, settings: dict[str, object], message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            SoftLabelLoss(**settings)  # type: ignore[arg-type]
        assert "\n" not in str(error.value)

    def test_logits_of_other_positions_are_refused(self) -> None:
        soft, logits = labels_and_logits()
        with pytest.raises(ValueError, match="label positions"):
            SoftLabelLoss()(logits[1:], soft)


def plain_logs(form: str, logits: torch.Tensor, soft: SoftLabels, alpha: float) -> torch.Tensor:
    """As :func:`plain` but in logarithms throughout, for what underflows there."""
    mixed = (1 - alpha) * functional.one_hot(soft.labels, SIZE) + alpha * soft.dense(SIZE).double()
    log_model = logits.double().log_softmax(1)
    if form == "log_mixture":
        return -(mixed.log() + log_model).logsumexp(1)
    cross = -(mixed * log_model).sum(1)
    return cross if form == "soft_ce" else cross + torch.xlogy(mixed, mixed).sum(1)


@given(catalogues, st.integers(0, 99))
def test_samples_are_taken_any_number_of_times(item_tokens: ItemTokens, seed: int) -> None:
    items = item_tokens.lengths.nonzero().squeeze(1)
    assume(len(items))
    generator = torch.Generator().manual_seed(seed)
    targets = items[torch.randint(0, len(items), (4,), generator=generator)]
    logits = torch.randn(4, item_tokens.n_items, generator=generator)
    samples = torch.randint(0, 4, (6,), generator=generator)
    tokenizer = CollaborativeTokenizer(item_tokens)
    found, wanted = tokenizer(logits, targets).take(samples), tokenizer(logits[samples], targets[samples])
    for name in ("offsets", "positions", "tokens", "labels", "samples"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    torch.testing.assert_close(found.probs, wanted.probs)
    assert not len(tokenizer(logits, targets).take(samples[:0]))
