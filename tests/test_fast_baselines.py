"""Our faster LightGCN, NGCF, SGL, SASRec and BERT4Rec compute what RecBole's compute."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.stats
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.data.transform import MaskItemSequence
from recbole.model.general_recommender import lightgcn, ngcf, sgl
from recbole.model.layers import TransformerEncoder
from torch import nn

from recbole_llm import compat
from recbole_llm.data.dataset import windows
from recbole_llm.data.histories import Histories
from recbole_llm.errors import UserError
from recbole_llm.model.bert4rec import BERT4Rec, RecBoleBERT4Rec
from recbole_llm.model.graph import MeanOfPowers, SymmetricProduct, csr_tensor, normalised_adjacency
from recbole_llm.model.lightgcn import LightGCN
from recbole_llm.model.ngcf import NGCF
from recbole_llm.model.sasrec import RecBoleSASRec, SASRec
from recbole_llm.model.sasrec_all_positions import SASRecAllPositions
from recbole_llm.model.sgl import SGL
from recbole_llm.model.transformer import FusedMultiHeadAttention, accelerate, by_length, dropout, encode_at

compat.install()

N_USERS, N_ITEMS, LENGTH = 30, 41, 12
FIELDS = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "NEG_PREFIX": "neg_", "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "MAX_ITEM_LIST_LENGTH": LENGTH, "device": torch.device("cpu"),
}  # fmt: skip
GRAPH = {
    "embedding_size": 40, "n_layers": 3, "reg_weight": 0.01, "require_pow": False, "hidden_size_list": [16, 8],
    "node_dropout": 0.0, "message_dropout": 0.1, "type": "ED", "drop_ratio": 0.1, "ssl_tau": 0.5, "ssl_weight": 0.05,
}  # fmt: skip
SEQUENCE = {
    "n_layers": 2, "n_heads": 2, "hidden_size": 16, "inner_size": 32, "hidden_dropout_prob": 0.5,
    "attn_dropout_prob": 0.5, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "initializer_range": 0.3,
    "loss_type": "CE", "mask_ratio": 0.3,
}  # fmt: skip


def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Interactions with repeats, a user and an item without any."""
    rng = np.random.default_rng(0)
    return rng.integers(1, N_USERS - 1, 200), rng.integers(1, N_ITEMS - 1, 200)


def dataset() -> Any:
    users, items = pairs()
    return SimpleNamespace(
        num=lambda field: N_USERS if field == "user_id" else N_ITEMS,
        uid_field="user_id",
        iid_field="item_id",
        inter_feat={"user_id": torch.from_numpy(users), "item_id": torch.from_numpy(items)},
        inter_matrix=lambda form: sp.coo_matrix((np.ones(len(users)), (users, items)), shape=(N_USERS, N_ITEMS)),
    )


def seeded(make: Callable[[], Any], seed: int = 1) -> Any:
    torch.manual_seed(seed)
    np.random.seed(seed)
    return make()


def twins(ours: type, stock: type, **settings: Any) -> tuple[Any, Any]:
    """Both models from the same seed, which must lead to the same parameters and leave the same random state."""
    made, states = [], []
    for cls in (ours, stock):
        made.append(seeded(lambda cls=cls: cls({**FIELDS, **GRAPH, **SEQUENCE, **settings}, dataset())))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    mine, theirs = (model.state_dict() for model in made)
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    return made[0], made[1]


def pair_batches(count: int, size: int = 16) -> list[Interaction]:
    draw = torch.Generator().manual_seed(7)
    return [
        Interaction({
            "user_id": torch.randint(1, N_USERS, (size,), generator=draw),
            "item_id": torch.randint(1, N_ITEMS, (size,), generator=draw),
            "neg_item_id": torch.randint(1, N_ITEMS, (size,), generator=draw),
        })
        for _ in range(count)
    ]  # fmt: skip


def losses(model: nn.Module, batches: list[Interaction]) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    np.random.seed(5)
    torch.manual_seed(5)
    model.train()
    seen = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return seen


class TestGraph:
    def test_adjacency_by_hand(self) -> None:
        # Users 1 and 2, items 1 and 2; the pair (1, 1) twice: degrees u1 = 2, u2 = 1, i1 = 2, i2 = 1.
        matrix = normalised_adjacency(np.array([1, 1, 1, 2]), np.array([1, 1, 2, 1]), 3, 3).toarray()
        expected = np.zeros((6, 6))
        expected[1, 4], expected[1, 5], expected[2, 4] = 1 / 2, 1 / np.sqrt(2), 1 / np.sqrt(2)
        np.testing.assert_allclose(matrix, expected + expected.T, atol=1e-6)

    def test_adjacency_is_recboles_to_the_bit(self) -> None:
        ours, stock = twins(LightGCN, lightgcn.LightGCN)
        assert torch.equal(ours.norm_adj_matrix.to_dense(), stock.norm_adj_matrix.to_dense())

    @pytest.mark.parametrize("columns", [5, 70])
    def test_mean_of_powers_and_its_gradients(self, columns: int) -> None:
        users, items = pairs()
        graph = csr_tensor(normalised_adjacency(users, items, N_USERS, N_ITEMS))
        dense = graph.to_dense()
        x = torch.randn(N_USERS + N_ITEMS, columns, requires_grad=True)
        weights = torch.randn_like(x)
        results = []
        for compute in (
            lambda v: MeanOfPowers.apply(graph, v, 2),
            lambda v: (v + SymmetricProduct.apply(graph, v) + SymmetricProduct.apply(graph, dense @ v)) / 3,
            lambda v: (v + dense @ v + dense @ dense @ v) / 3,
        ):
            out = compute(x)
            (grad,) = torch.autograd.grad((out.tanh() * weights).sum(), x, create_graph=True)
            (second,) = torch.autograd.grad((grad * grad).sum(), x)
            results.append((out, grad, second))
        for result in results[:2]:
            for got, expected in zip(result, results[2], strict=True):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)

    @pytest.mark.parametrize("require_pow", [False, True])
    @pytest.mark.parametrize("n_layers", [0, 1, 3])
    def test_lightgcn(self, n_layers: int, require_pow: bool) -> None:
        ours, stock = twins(LightGCN, lightgcn.LightGCN, n_layers=n_layers, require_pow=require_pow)
        batches = pair_batches(8)
        np.testing.assert_allclose(losses(ours, batches), losses(stock, batches), rtol=1e-5)
        ours.eval(), stock.eval()
        with torch.no_grad():
            for score in ("predict", "full_sort_predict"):
                mine, theirs = (getattr(model, score)(batches[0]) for model in (ours, stock))
                torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)

    def test_lightgcn_embeddings_for_other_stages(self) -> None:
        ours, stock = twins(LightGCN, lightgcn.LightGCN)
        for got, expected, rows in zip(ours.graph_embeddings(), stock.forward(), (N_USERS, N_ITEMS), strict=True):
            assert not got.requires_grad and got.shape == (rows, 40)
            torch.testing.assert_close(got, expected.detach())

    def test_lightgcn_after_scoring_trains_on(self) -> None:
        ours, _ = twins(LightGCN, lightgcn.LightGCN)
        batch = pair_batches(1)[0]
        before = ours.full_sort_predict(batch)
        losses(ours, [batch])
        assert not torch.equal(ours.full_sort_predict(batch), before)

    @pytest.mark.parametrize("node_dropout", [0.0, 0.2])
    def test_ngcf(self, node_dropout: float) -> None:
        ours, stock = twins(NGCF, ngcf.NGCF, node_dropout=node_dropout)
        batches = pair_batches(5)
        np.testing.assert_allclose(losses(ours, batches), losses(stock, batches), rtol=1e-5)
        ours.eval(), stock.eval()
        torch.testing.assert_close(
            ours.full_sort_predict(batches[0]), stock.full_sort_predict(batches[0]), atol=1e-4, rtol=1e-4
        )

    @pytest.mark.parametrize("views", ["ED", "ND", "RW"])
    def test_sgl(self, views: str) -> None:
        ours, stock = twins(SGL, sgl.SGL, type=views)
        batches = pair_batches(5)
        np.testing.assert_allclose(losses(ours, batches), losses(stock, batches), rtol=1e-5)
        ours.eval(), stock.eval()
        torch.testing.assert_close(
            ours.full_sort_predict(batches[0]), stock.full_sort_predict(batches[0]), atol=1e-4, rtol=1e-4
        )


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
    def test_keeps_the_stated_share_and_the_mean(self, p: float) -> None:
        torch.manual_seed(0)
        x = torch.ones(1001, 1001, requires_grad=True)  # not a multiple of the lanes in a draw
        out = dropout(x, p, True)
        dropped = out.detach() == 0
        spread = (p * (1 - p) / x.numel()) ** 0.5
        assert abs(dropped.float().mean() - p) < 5 * spread
        assert out[~dropped].detach().sub(1 / (1 - p)).abs().max() < 1e-3
        out.sum().backward()
        assert torch.equal(x.grad, out.detach())
        # Neighbours share a 64-bit draw: they must fall independently all the same, at every distance inside one.
        flat = dropped.flatten().float() - p
        for lag in range(1, 9):
            assert abs(float((flat[:-lag] * flat[lag:]).mean())) < 5 * p * (1 - p) / x.numel() ** 0.5

    def test_follows_torchs_seed(self) -> None:
        x = torch.ones(999)
        first, again, other = (seeded(lambda: dropout(x, 0.5, True), seed) for seed in (1, 1, 2))
        assert torch.equal(first, again) and not torch.equal(first, other)

    def test_edges(self) -> None:
        x = torch.randn(7, 3)
        assert dropout(x, 0.5, False) is x
        assert torch.equal(dropout(x, 0.0, True), x)
        assert not dropout(x, 1.0, True).any()
        assert dropout(torch.ones(0, 4), 0.5, True).shape == (0, 4)
        assert dropout(torch.randn(8, 6).t(), 0.5, True).shape == (6, 8)


def encoder(act: str = "gelu", p: float = 0.5) -> TransformerEncoder:
    return seeded(lambda: TransformerEncoder(2, 2, 16, 32, p, p, act, 1e-12))


class TestAccelerate:
    @pytest.mark.parametrize("act", ["gelu", "relu", "swish", "tanh", "sigmoid"])
    @pytest.mark.parametrize("training", [False, True])
    def test_same_function_and_gradients(self, act: str, training: bool) -> None:
        stock = encoder(act, 0.0).train(training)
        fast = accelerate(copy.deepcopy(stock))
        assert list(fast.state_dict()) == list(stock.state_dict())
        x = torch.randn(5, 9, 16)
        mask = torch.where(torch.rand(5, 1, 9, 9) < 0.3, -10000.0, 0.0)
        outputs = [model(x, mask)[-1] for model in (fast, stock)]
        torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)
        for out in outputs:
            out.pow(2).sum().backward()
        for mine, theirs in zip(fast.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-3, rtol=1e-4)

    def test_dropout_has_the_same_distribution(self) -> None:
        stock = encoder().train()
        fast = accelerate(copy.deepcopy(stock))
        x, mask = torch.randn(1, 6, 16).expand(6000, -1, -1), torch.zeros(1, 1, 1, 6)
        with torch.no_grad():
            mine, theirs = (seeded(lambda model=model: model(x, mask)[-1]) for model in (fast, stock))
        for moment in (torch.mean, torch.std):
            torch.testing.assert_close(moment(mine, 0), moment(theirs, 0), atol=0.1, rtol=0.1)

    def test_other_classes_are_left_alone(self) -> None:
        class Own(FusedMultiHeadAttention):
            pass

        own = Own(2, 16, 0.1, 0.1, 1e-12)
        alpha = nn.AlphaDropout(0.5)
        accelerate(nn.Sequential(own, alpha))
        assert type(own) is Own and type(alpha) is nn.AlphaDropout

    @pytest.mark.parametrize("rows", [1, 7])
    def test_encode_at_is_the_encoder_at_those_positions(self, rows: int) -> None:
        model = accelerate(encoder()).eval()
        x, positions = torch.randn(4, 7, 16), torch.tensor([[6, 0], [2, 2], [3, 5], [1, 4]])
        mask = torch.where(torch.rand(4, 1, rows, 7) < 0.3, -10000.0, 0.0)
        full = model(x, mask)[-1]
        expected = torch.stack([full[row, where] for row, where in enumerate(positions)])
        torch.testing.assert_close(encode_at(model, x, mask, positions), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("lengths", [[1], [50], [1, 50], [3, 3, 4], [50, 50, 49], [0, 2, 8], list(range(1, 51))])
    def test_by_length_has_every_row_once_and_whole(self, lengths: list[int]) -> None:
        sizes = torch.tensor(lengths)
        groups = list(by_length(sizes, 50))
        if groups[0][0] is None:
            assert len(groups) == 1 and groups[0][1] >= max(lengths)
            return
        assert sorted(torch.cat([rows for rows, _ in groups]).tolist()) == list(range(len(lengths)))
        assert all(sizes[rows].max() <= end <= 50 and end >= 1 for rows, end in groups)


def sequences(lengths: list[int], seed: int = 0) -> Interaction:
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(lengths)
    items = torch.randint(1, N_ITEMS, (len(lengths), LENGTH), generator=draw)
    return Interaction({
        "item_id_list": torch.where(torch.arange(LENGTH) < sizes[:, None], items, 0),
        "item_length": sizes,
        "item_id": torch.randint(1, N_ITEMS, (len(lengths),), generator=draw),
        "neg_item_id": torch.randint(1, N_ITEMS, (len(lengths),), generator=draw),
    })  # fmt: skip


LENGTHS = [[LENGTH] * 6, list(range(1, LENGTH + 1)), [1, 1, 2, 3, LENGTH], [1]]


def without_dropout(*models: nn.Module) -> None:
    for model in models:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0


def check_twins(ours: Any, stock: Any, batch: Interaction) -> None:
    """Same scores, loss and gradients."""
    ours.eval(), stock.eval()
    with torch.no_grad():
        for score in ("predict", "full_sort_predict"):
            mine, theirs = (getattr(model, score)(batch) for model in (ours, stock))
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    without_dropout(ours, stock)
    both = [model.calculate_loss(batch) for model in (ours, stock)]
    torch.testing.assert_close(*both, atol=1e-6, rtol=1e-5)
    for loss in both:
        loss.backward()
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)


class TestSASRec:
    @pytest.mark.parametrize("loss_type", ["CE", "BPR"])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_is_recboles(self, lengths: list[int], loss_type: str) -> None:
        check_twins(*twins(SASRec, RecBoleSASRec, loss_type=loss_type), sequences(lengths))

    def test_one_layer(self) -> None:
        check_twins(*twins(SASRec, RecBoleSASRec, n_layers=1), sequences(LENGTHS[1]))

    def test_importing_it_leaves_anomaly_mode_off(self) -> None:
        assert not torch.is_anomaly_enabled()


def masked(lengths: list[int], whole: bool) -> Interaction:
    """A batch through RecBole's own masking; ``whole`` masks the last item only, as its fine-tuning batches do."""
    batch = sequences(lengths)
    # RecBole asks for the ratio as an attribute, then as a key.
    config = type("Config", (dict,), {"ft_ratio": None})({**FIELDS, **SEQUENCE, "ft_ratio": float(whole)})
    random.seed(4)
    return MaskItemSequence(config)(dataset(), batch)


MASKED = {
    "MASK_ITEM_SEQ": "Mask_item_id_list", "POS_ITEMS": "Pos_item_id", "NEG_ITEMS": "Neg_item_id",
    "MASK_INDEX": "MASK_INDEX",
}  # fmt: skip


class TestBERT4Rec:
    @pytest.mark.parametrize("loss_type", ["CE", "BPR"])
    @pytest.mark.parametrize("whole", [False, True])
    @pytest.mark.parametrize("lengths", LENGTHS[:3])
    def test_is_recboles(self, lengths: list[int], whole: bool, loss_type: str) -> None:
        ours, stock = twins(BERT4Rec, RecBoleBERT4Rec, loss_type=loss_type, **MASKED)
        check_twins(ours, stock, masked(lengths, whole))

    def test_masks_after_the_last_item_as_recbole_does(self) -> None:
        ours, stock = twins(BERT4Rec, RecBoleBERT4Rec, **MASKED)
        batch = sequences(list(range(1, LENGTH + 1)))
        arguments = batch["item_id_list"], batch["item_length"]
        before = arguments[0].clone()
        assert torch.equal(ours.reconstruct_test_data(*arguments), stock.reconstruct_test_data(*arguments))
        assert torch.equal(arguments[0], before)

    def test_a_batch_without_a_counted_position(self) -> None:
        ours, _ = twins(BERT4Rec, RecBoleBERT4Rec, **MASKED)
        batch = masked([1, 1], True)  # the only masked position is 0, which RecBole does not count
        loss = ours.calculate_loss(batch)
        loss.backward()
        assert loss.item() == 0


def share_learnt(model: Any, steps: int) -> float:
    """Train on walks around a circle of items; the share of walks whose next item is ranked first afterwards."""
    starts = torch.randint(0, N_ITEMS - 1, (64, 1))
    walk = (starts + torch.arange(LENGTH + 1)) % (N_ITEMS - 1) + 1
    batch = Interaction({
        "item_id_list": walk[:, :-1], "target_list": walk[:, 1:], "item_length": torch.full((64,), LENGTH),
        "user_id": torch.randint(1, N_USERS - 1, (64,)),
    })  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
    model.eval()
    scores = model.full_sort_predict(batch)
    return float((scores.argmax(dim=1) == walk[:, -1]).float().mean())


class TestSASRecAllPositions:
    def batch(self, lengths: list[int]) -> Interaction:
        """One window a user, as the loader cuts it: inputs and, one step on, targets."""
        draw = torch.Generator().manual_seed(3)
        sizes = np.array(lengths)
        items = torch.randint(1, N_ITEMS, (int((sizes + 1).sum()),), generator=draw)
        ends = np.cumsum(sizes + 1) - 1
        table, real = windows(ends, sizes, LENGTH)
        return Interaction({
            "item_id_list": torch.where(real, items[table], 0),
            "target_list": torch.where(real, items[torch.where(real, table + 1, 0)], 0),
            "item_length": torch.from_numpy(sizes),
        })  # fmt: skip

    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_loss_is_that_of_recboles_rows_one_for_each_prefix(self, lengths: list[int]) -> None:
        ours, stock = twins(SASRecAllPositions, RecBoleSASRec)
        batch = self.batch(lengths)
        prefixes, targets = [], []
        for row, length in enumerate(lengths):
            for end in range(1, length + 1):
                prefixes.append(F.pad(batch["item_id_list"][row, :end], (0, LENGTH - end)))
                targets.append(batch["target_list"][row, end - 1])
        rows = torch.stack(prefixes)
        expected_batch = {"item_id_list": rows, "item_length": (rows != 0).sum(1), "item_id": torch.stack(targets)}
        without_dropout(ours, stock)
        both = ours.calculate_loss(batch), stock.calculate_loss(expected_batch)
        torch.testing.assert_close(*both, atol=1e-6, rtol=1e-5)
        for loss in both:
            loss.backward()
        for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-4)

    def test_learns_a_cycle(self) -> None:
        model = seeded(
            lambda: SASRecAllPositions({**FIELDS, **SEQUENCE, "hidden_size": 32, "initializer_range": 0.02}, dataset())
        )
        assert share_learnt(model, steps=150) > 0.9

    def test_a_batch_without_a_target(self) -> None:
        ours, _ = twins(SASRecAllPositions, RecBoleSASRec)
        batch = self.batch([2, 3])
        batch["target_list"].zero_()
        loss = ours.calculate_loss(batch)
        loss.backward()
        assert loss.item() == 0

    def test_refuses_pairwise_loss(self) -> None:
        with pytest.raises(UserError, match="loss_type CE or BCE, not BPR"):
            SASRecAllPositions({**FIELDS, **SEQUENCE, "loss_type": "BPR"}, dataset())

    def binary(self, negatives: int, unused: int = 7, **more: Any) -> Any:
        """With binary cross entropy; user u has had the items of :func:`pairs`, one item is no candidate."""
        data = dataset()
        data.train_histories = Histories.from_rows(*pairs(), N_USERS)
        data.split = SimpleNamespace(candidates=np.arange(N_ITEMS) != unused)
        settings = {**FIELDS, **SEQUENCE, "loss_type": "BCE", "negatives": negatives, "seed": 3, **more}
        return seeded(lambda: SASRecAllPositions(settings, data))

    @pytest.mark.parametrize("negatives", [1, 3])
    @pytest.mark.parametrize("lengths", LENGTHS)
    def test_binary_cross_entropy_is_a_plain_loop(
        self, lengths: list[int], negatives: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, batch = self.binary(negatives), self.batch(lengths)
        without_dropout(model)
        batch["user_id"] = torch.arange(1, len(lengths) + 1)
        # Negatives that tell their user, so that a mix-up of positions between users shows.
        monkeypatch.setattr(
            model, "draw", lambda users: (users[:, None] * 5 + torch.arange(negatives)) % (N_ITEMS - 1) + 1
        )
        loss = model.calculate_loss(batch)
        total, count = 0.0, 0
        table = model.item_embedding.weight
        for row, length in enumerate(lengths):
            for end in range(1, length + 1):
                prefix = F.pad(batch["item_id_list"][row, :end], (0, LENGTH - end))
                state = RecBoleSASRec.forward(model, prefix[None], torch.tensor([end]))[0]
                total = total - torch.sigmoid(state @ table[batch["target_list"][row, end - 1]]).log()
                for number in range(negatives):
                    refused = ((row + 1) * 5 + number) % (N_ITEMS - 1) + 1
                    total = total - (1 - torch.sigmoid(state @ table[refused])).log()
                count += 1
        torch.testing.assert_close(loss, total / count, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(value, table)[0] for value in (loss, total / count)]
        torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-4)

    def test_negatives_are_even_over_what_the_user_has_not_had(self) -> None:
        model = self.binary(3)
        draws = model.draw(torch.full((20000,), 4))
        assert draws.shape == (20000, 3) and draws.dtype == torch.int64
        users, items = pairs()
        allowed = np.setdiff1d(np.arange(1, N_ITEMS), [7, *items[users == 4]])
        counts = np.bincount(draws.flatten().numpy(), minlength=N_ITEMS)
        assert counts[np.setdiff1d(np.arange(N_ITEMS), allowed)].sum() == 0
        assert scipy.stats.chisquare(counts[allowed]).pvalue > 1e-4
        # Neither a user's positions nor the negatives of one position share their draws.
        assert (draws[:, 0] == draws[:, 1]).float().mean() < 2 / len(allowed)

    def test_negatives_follow_the_seed_and_nothing_else(self) -> None:
        first = self.binary(2)
        torch.manual_seed(99)
        np.random.seed(99)
        again = self.binary(2)
        torch.rand(5)
        assert torch.equal(first.draw(torch.arange(1, 20)), again.draw(torch.arange(1, 20)))
        # A resumed training puts the model's generator back.
        state = first.generator.bit_generator.state
        after = first.draw(torch.arange(1, 20))
        first.generator.bit_generator.state = state
        assert torch.equal(first.draw(torch.arange(1, 20)), after)

    def test_binary_learns_a_cycle(self) -> None:
        model = self.binary(
            4, unused=0, hidden_size=32, initializer_range=0.02, hidden_dropout_prob=0.1, attn_dropout_prob=0.1
        )
        assert share_learnt(model, steps=300) > 0.9

    def test_binary_without_a_target(self) -> None:
        model, batch = self.binary(1), self.batch([2, 3])
        batch["user_id"] = torch.tensor([1, 2])
        batch["target_list"].zero_()
        loss = model.calculate_loss(batch)
        loss.backward()
        assert loss.item() == 0
