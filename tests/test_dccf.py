"""DCCF against the same equations written densely, edge cases of its graph, and what it owes to the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from recbole.data.interaction import Interaction

from recbole_llm import compat
from recbole_llm.model.dccf import DCCF
from recbole_llm.model.edges import Edges
from recbole_llm.model.graph import csr_tensor, normalised_adjacency

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
    loss = torch.log1p(torch.exp(bad - good)).mean()
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
