"""DCCF against the same equations written densely, edge cases of its graph, and what it owes to the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given
from hypothesis import strategies as st
from recbole.data.interaction import Interaction

from recbole_llm import Config, compat, run
from recbole_llm.data.phases import TRAIN
from recbole_llm.errors import UserError
from recbole_llm.model import contrast, dccf
from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.dccf import DCCF, Intents
from recbole_llm.model.edges import AdaptiveMean, Edges
from recbole_llm.model.graph import csr_tensor, normalised_adjacency
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.staged import graph_embeddings

compat.install()

N_USERS, N_ITEMS = 23, 31
SETTINGS = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "NEG_PREFIX": "neg_", "device": torch.device("cpu"),
    "embedding_size": 6, "n_layers": 2, "n_intents": 5, "ssl_tau": 0.4, "ssl_weight": 0.3, "reg_weight": 0.02,
    "intent_reg_weight": 0.03,
}  # fmt: skip


def pairs(seed: int = 0, count: int = 150) -> tuple[np.ndarray, np.ndarray]:
    """Interactions with repeats; the paddings and the last user and item have none."""
    rng = np.random.default_rng(seed)
    return rng.integers(1, N_USERS - 1, count), rng.integers(1, N_ITEMS - 1, count)


def make(double: bool = True, seed: int = 1, edges: tuple[np.ndarray, np.ndarray] | None = None, **more: Any) -> DCCF:
    """A model on a small random graph, its tables large enough that every part of it matters."""
    users, items = pairs() if edges is None else edges
    matrix = sp.coo_matrix((np.ones(len(users)), (users, items)), shape=(N_USERS, N_ITEMS))
    dataset: Any = SimpleNamespace(
        num=lambda field: N_USERS if field == "user_id" else N_ITEMS, inter_matrix=lambda form: matrix
    )
    torch.manual_seed(seed)
    model = DCCF(SETTINGS | more, dataset)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    if double:
        model.double()
        adjacency = normalised_adjacency(users, items, N_USERS, N_ITEMS)
        model.adjacency = csr_tensor(adjacency).double()
        model.edges = Edges.of(adjacency, N_USERS, torch.float64)
    return model


def batch(size: int = 40, seed: int = 3) -> Interaction:
    """Train pairs with negatives; users and items occur several times."""
    users, items = pairs()
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, len(users), size)
    fields = {"user_id": users[rows], "item_id": items[rows], "neg_item_id": rng.integers(1, N_ITEMS, size)}
    return Interaction({name: torch.from_numpy(values) for name, values in fields.items()})


def dense_adjacency(users: np.ndarray, items: np.ndarray) -> torch.Tensor:
    whole = torch.zeros(N_USERS + N_ITEMS, N_USERS + N_ITEMS, dtype=torch.float64)
    for user, item in zip(users, items, strict=True):
        whole[user, N_USERS + item] = whole[N_USERS + item, user] = 1
    return whole


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(1e-12)


def dense_mean(edges: torch.Tensor, x: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    weights = edges * (unit(x) @ unit(x).T + 1) / 2
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1), 0) @ states


def dense_nce(a: torch.Tensor, b: torch.Tensor, temperature: float) -> torch.Tensor:
    near = torch.exp(unit(a) @ unit(b).T / temperature)
    return -torch.log(near.diag() / (near.sum(dim=1) + 1e-8) + 1e-8).mean()


def dense_layers(model: DCCF, edges: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """The sum of the layers' states and each layer's four messages, all as dense matrices."""
    degree = edges.sum(dim=1).clamp_min(1e-7)
    norm = edges / degree.sqrt()[:, None] / degree.sqrt()
    states = torch.cat([model.user_embedding.weight, model.item_embedding.weight])
    total, layers = states, []
    for _ in range(model.n_layers):
        gnn = norm @ states
        parts = []
        for table, intents in ((states[:N_USERS], model.user_intents), (states[N_USERS:], model.item_intents)):
            parts.append(torch.softmax(table @ intents, dim=1) @ intents.T)
        intent = torch.cat(parts)
        layer = (gnn, intent, dense_mean(edges, gnn, states), dense_mean(edges, intent, states))
        states = states + gnn + intent + layer[2] + layer[3]
        total = total + states
        layers.append(layer)
    return total, layers


def dense_loss(model: DCCF, edges: torch.Tensor, rows: Interaction) -> torch.Tensor:
    total, layers = dense_layers(model, edges)
    user, item, negative = rows["user_id"], rows["item_id"], rows["neg_item_id"]
    good = (total[user] * total[N_USERS + item]).sum(dim=1)
    bad = (total[user] * total[N_USERS + negative]).sum(dim=1)
    loss = torch.logaddexp(bad - good, torch.zeros_like(bad)).mean()
    tables = model.user_embedding.weight, model.item_embedding.weight
    for ids, table in ((user, tables[0]), (item, tables[1]), (negative, tables[1])):
        loss = loss + model.reg_weight * (table[ids] ** 2).sum()
    loss = loss + model.intent_reg_weight * ((model.user_intents**2).sum() + (model.item_intents**2).sum())
    for gnn, *others in layers:
        for nodes in (sorted(set(user.tolist())), [N_USERS + one for one in sorted(set(item.tolist()))]):
            for other in others:
                loss = loss + model.ssl_weight * dense_nce(gnn[nodes], other[nodes], model.ssl_tau)
    return loss


def gradients(model: DCCF, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True))


class TestEquations:
    @pytest.mark.parametrize("n_layers", [0, 1, 3])
    def test_embeddings_are_the_dense_ones(self, n_layers: int) -> None:
        model = make(n_layers=n_layers)
        expected = dense_layers(model, dense_adjacency(*pairs()))[0]
        torch.testing.assert_close(torch.cat(model.forward()), expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("ssl_tau", [0.05, 1.0])
    def test_loss_and_gradients_are_the_dense_ones(self, ssl_tau: float) -> None:
        model, rows = make(ssl_tau=ssl_tau), batch()
        losses = model.calculate_loss(rows), dense_loss(model, dense_adjacency(*pairs()), rows)
        # The adjacency's values are float32, as RecBole's.
        torch.testing.assert_close(*losses, rtol=1e-6, atol=1e-6)
        for got, expected in zip(*(gradients(model, loss) for loss in losses), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)

    def test_single_precision_is_near(self) -> None:
        losses = [make(double).calculate_loss(batch()).item() for double in (False, True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


class TestParts:
    """The written-out gradients, against finite differences."""

    def test_adaptive_mean(self) -> None:
        users, items = pairs(count=40)
        edges = Edges.of(normalised_adjacency(users, items, N_USERS, N_ITEMS), N_USERS, torch.float64)
        draw = torch.Generator().manual_seed(0)
        tables = [
            torch.randn(N_USERS + N_ITEMS, width, dtype=torch.float64, generator=draw, requires_grad=True)
            for width in (3, 4)
        ]
        assert torch.autograd.gradcheck(lambda x, states: AdaptiveMean.apply(edges, unit(x), states), tables)

    @pytest.mark.parametrize("rows", [3, 1000])
    def test_intents(self, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dccf, "_ROWS_CPU", rows)
        x, intents = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((10, 4), (4, 6)))
        torch.testing.assert_close(Intents.apply(x, intents), torch.softmax(x @ intents, dim=1) @ intents.T)
        assert torch.autograd.gradcheck(Intents.apply, (x, intents))

    @pytest.mark.parametrize("cells", [1, 33, 10_000])
    def test_contrast(self, cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(contrast, "_CELLS_CPU", cells)
        a, b = (torch.randn(11, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
        torch.testing.assert_close(InfoNCE.apply(unit(a), unit(b), 0.3), dense_nce(a, b, 0.3))
        assert torch.autograd.gradcheck(lambda a, b: InfoNCE.apply(unit(a), unit(b), 0.3), (a, b))

    def test_contrast_of_hopeless_rows_is_finite(self) -> None:
        # Opposite rows at the lowest temperature: the share of the pair is far below the constant in the logarithm.
        a = torch.nn.functional.normalize(torch.randn(50, 8)).requires_grad_()
        loss = InfoNCE.apply(a, -a, 0.03)
        loss.backward()
        assert loss.item() == pytest.approx(-np.log(1e-8), rel=0.01) and a.grad.isfinite().all()

    def test_opposite_ends_weigh_nothing(self) -> None:
        # One edge whose ends point away from each other, one edge besides.
        edges = Edges.of(normalised_adjacency(np.array([0, 1]), np.array([0, 1]), 2, 2), 2)
        x = torch.nn.functional.normalize(torch.randn(2, 5))
        x = torch.cat((x, x * torch.tensor([[-1.0], [1.0]]))).requires_grad_()
        states = torch.randn(4, 3, requires_grad=True)
        mean = AdaptiveMean.apply(edges, x, states)
        mean.square().sum().backward()
        torch.testing.assert_close(mean[1::2], states[[3, 1]].detach())
        assert x.grad.isfinite().all() and states.grad.isfinite().all()


class TestGraph:
    @given(seed=st.integers(0, 10_000), count=st.integers(0, 60))
    def test_any_graph_is_finite_and_the_dense_one(self, seed: int, count: int) -> None:
        drawn = pairs(seed, count)
        model = make(edges=drawn, seed=seed)
        model.ssl_weight = 0.3
        rows = batch(seed=seed)
        if count:  # train rows are edges; a batch of users without any is below
            rows = Interaction({
                "user_id": torch.from_numpy(drawn[0]), "item_id": torch.from_numpy(drawn[1]),
                "neg_item_id": torch.from_numpy(np.random.default_rng(seed).integers(1, N_ITEMS, count)),
            })  # fmt: skip
        loss = model.calculate_loss(rows)
        torch.testing.assert_close(loss, dense_loss(model, dense_adjacency(*drawn), rows), rtol=1e-5, atol=1e-5)
        assert all(grad.isfinite().all() for grad in gradients(model, loss))

    def test_a_user_and_an_item_without_edges(self) -> None:
        model = make(double=False)
        views = model._views(model._initial())
        for node in (0, N_USERS - 1, N_USERS, N_USERS + N_ITEMS - 1):
            for view in (views.graph, views.near_by_graph, views.near_by_intent):
                assert (view[node] == 0).all()
        assert (views.near_by_graph[1] != 0).all()
        nobody = Interaction({
            "user_id": torch.tensor([N_USERS - 1]), "item_id": torch.tensor([N_ITEMS - 1]),
            "neg_item_id": torch.tensor([1]),
        })  # fmt: skip
        loss = model.calculate_loss(nobody)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(model, loss))

    def test_a_repeated_pair_is_one_edge(self) -> None:
        users, items = pairs()
        twice = np.concatenate([users, users]), np.concatenate([items, items])
        assert torch.equal(torch.cat(make().forward()), torch.cat(make(edges=twice).forward()))

    def test_edges_are_the_train_rows(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        config = Config("DCCF", "small", config_dict=settings_of(epochs=0, train_share=0.5))
        fitted = fit(config, store_of(config))
        edges, n_users = fitted.model.edges, fitted.model.n_users
        ends = torch.repeat_interleave(edges.crow.long().diff()), edges.col.long()
        found = {(user, item - n_users) for user, item in zip(*(end.tolist() for end in ends), strict=True)}
        found = {(user, item) for user, item in found if user < n_users}
        split = fitted.train_data._dataset.split
        rows = split.phases == TRAIN
        assert found == set(zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True))
        assert 0 < rows.sum() < len(rows) / 2 + 60, "the case of interest: rows of every phase are left out"


class TestBatch:
    def test_the_contrast_is_among_distinct_users_and_positive_items(self) -> None:
        model = make(reg_weight=0.0)
        once, fields = batch(12), ("user_id", "item_id", "neg_item_id")
        twice = Interaction({field: torch.cat((once[field], once[field])) for field in fields})
        # BPR is a mean over rows; so nothing changes when all rows stand twice.
        torch.testing.assert_close(model.calculate_loss(twice), model.calculate_loss(once))
        model.ssl_weight = 0
        plain = model.calculate_loss(once), model.calculate_loss(twice)
        torch.testing.assert_close(*plain)
        other = Interaction({field: once[field] for field in fields})
        other["neg_item_id"] = torch.roll(once["neg_item_id"], 1)
        bpr = model.calculate_loss(other)
        model.ssl_weight = 0.3
        terms = [model.calculate_loss(rows) - loss for rows, loss in ((once, plain[0]), (other, bpr))]
        torch.testing.assert_close(*terms)
        assert terms[0] > 0.1 and not torch.isclose(bpr, plain[0])

    def test_the_penalty_is_a_sum_over_the_batch(self) -> None:
        once, fields = batch(12), ("user_id", "item_id", "neg_item_id")
        twice = Interaction({field: torch.cat((once[field], once[field])) for field in fields})
        penalties = [make().calculate_loss(rows) - make(reg_weight=0.0).calculate_loss(rows) for rows in (once, twice)]
        torch.testing.assert_close(penalties[1], 2 * penalties[0])

    def test_scores_are_those_of_the_final_embeddings_and_are_made_anew_after_a_step(self) -> None:
        model, rows = make(double=False), batch(8)
        expected = model.forward()[0][rows["user_id"]] @ model.forward()[1].T
        torch.testing.assert_close(model.full_sort_predict(rows), expected.detach().view(-1))
        torch.testing.assert_close(model.predict(rows), expected.detach()[torch.arange(8), rows["item_id"]])
        assert not model.full_sort_predict(rows).requires_grad
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model.calculate_loss(rows).backward()
        optimizer.step()
        assert not torch.allclose(model.full_sort_predict(rows), expected.view(-1))

    def test_embeddings_for_other_stages(self) -> None:
        model = make(double=False)
        final, below = model.graph_embeddings(), model.graph_embeddings(layer="e0")
        assert all(torch.equal(got, expected) for got, expected in zip(final, model.forward(), strict=True))
        assert torch.equal(below[1], model.item_embedding.weight) and not torch.equal(below[1], final[1])
        assert not any(table.requires_grad for table in (*final, *below))
        with pytest.raises(UserError, match="layer final or e0, not 'finale'; did you mean 'final'"):
            model.graph_embeddings(layer="finale")


class TestRuns:
    def test_learns(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        settings = {key: value for key, value in settings_of().items() if key not in ("data_path", "load_col")}
        more = {"epochs": 15, "learning_rate": 0.01, "train_batch_size": 512}
        result = run("DCCF", "tiny", config_dict=settings | more)
        popularity = run("Pop", "tiny", config_dict=settings | {"epochs": 1})
        assert result["test"]["ndcg@10"] > 1.5 * popularity["test"]["ndcg@10"]
        assert result["curves"]["loss"][-1] < result["curves"]["loss"][0]

    def test_hands_over_its_final_embeddings(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        config = Config("DCCF", "small", config_dict=settings_of(epochs=1))
        model = fit(config, store_of(config)).model
        for got, expected in zip(graph_embeddings(model, "DCCF"), model.graph_embeddings(), strict=True):
            np.testing.assert_array_equal(got, expected.numpy())

    @pytest.mark.parametrize(
        ("key", "value"),
        [("ssl_tau", 0.0), ("ssl_tau", 0.01), ("n_intents", 0), ("n_layers", -1), ("embedding_size", 0),
         ("ssl_weight", -0.1), ("reg_weight", -1.0), ("intent_reg_weight", "much")],
    )  # fmt: skip
    def test_wrong_settings_are_refused(
        self, key: str, value: Any, settings_of: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=f"^{key} should be .* but is {value!r}[^\n]*$"):
            Config("DCCF", "small", config_dict=settings_of(**{key: value}))
        assert not (tmp_path / "saved").exists()
