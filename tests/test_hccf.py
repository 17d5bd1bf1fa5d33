"""HCCF and the text term of LightGCN+ and HCCF+ against the same equations written densely, and what a run owes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from recbole.data.interaction import Interaction
from small_models import SMALL
from test_dccf import N_ITEMS, N_USERS, batch, dense_adjacency, dense_nce, gradients, pairs, unit

from recbole_llm import Config, compat, run
from recbole_llm.data.phases import TRAIN
from recbole_llm.errors import UserError
from recbole_llm.model.edges import Edges
from recbole_llm.model.graph import csr_tensor, normalised_adjacency
from recbole_llm.model.hccf import HCCF
from recbole_llm.model.text_contrast import HCCFPlus, LightGCNPlus
from recbole_llm.registry import get_model
from recbole_llm.training.embeddings import graph_embeddings
from recbole_llm.training.pipeline import fit, store_of, versions_of

compat.install()

SETTINGS = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "NEG_PREFIX": "neg_", "device": torch.device("cpu"),
    "embedding_size": 6, "n_layers": 2, "n_hyperedges": 5, "leaky_slope": 0.3, "drop_ratio": 0.0, "ssl_tau": 0.4,
    "ssl_weight": 0.3, "reg_weight": 0.02, "require_pow": False, "text_weight": 0.7, "text_tau": 0.3,
    "projector": "mlp",
}  # fmt: skip
WIDTH = 8  # of descriptions


def make(kind: type = HCCF, double: bool = True, seed: int = 1, fresh: bool = False, **more: Any) -> Any:
    """A model on a small random graph, in evaluation mode, its tables large enough that every part of it matters.

    Those of a ``fresh`` one are as the model makes them.
    """
    users, items = pairs()
    matrix = sp.coo_matrix((np.ones(len(users)), (users, items)), shape=(N_USERS, N_ITEMS))
    dataset: Any = SimpleNamespace(
        num=lambda field: N_USERS if field == "user_id" else N_ITEMS, inter_matrix=lambda form: matrix
    )
    torch.manual_seed(seed)
    model = kind(SETTINGS | more, dataset)
    if hasattr(model, "take_item_texts"):
        model.take_item_texts(*descriptions())
    if not fresh:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.5)
    if double:
        model.double()
        adjacency = normalised_adjacency(users, items, N_USERS, N_ITEMS)
        if isinstance(model, HCCF):
            model.adjacency = csr_tensor(adjacency).double()
            model.edges = Edges.of(adjacency, N_USERS, torch.float64)
        else:
            model.norm_adj_matrix = csr_tensor(adjacency).double()
    return model.eval()


def descriptions() -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors far from the origin, as mean states are; every fifth item has none of its own."""
    draw = torch.Generator().manual_seed(7)
    return 3 + 0.2 * torch.randn(N_ITEMS, WIDTH, generator=draw), torch.arange(N_ITEMS) % 5 > 0


def leaky(x: torch.Tensor, slope: float) -> torch.Tensor:
    return torch.where(x > 0, x, slope * x)


def dropped(x: torch.Tensor, ratio: float) -> torch.Tensor:
    return torch.nn.functional.dropout(x, ratio) if ratio else x


def dense_layers(model: HCCF, drop: float = 0.0) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The sum of the layers' states and each layer's local and global view, all as dense matrices."""
    edges = dense_adjacency(*pairs())
    degree = edges.sum(dim=1).clamp_min(1e-7)
    norm = edges / degree.sqrt()[:, None] / degree.sqrt()
    half = norm[:N_USERS, N_USERS:]
    ends = half.nonzero(as_tuple=True)
    tables = model.user_embedding.weight, model.item_embedding.weight
    sides = [table @ weights for table, weights in zip(tables, hyperedges(model), strict=True)]
    states = total = torch.cat(tables)
    layers = []
    for _ in range(model.n_layers):
        kept = torch.zeros_like(half)
        kept[ends] = dropped(half[ends], drop)
        local = torch.cat([kept @ states[N_USERS:], kept.T @ states[:N_USERS]])
        said = []
        for belongs, own in zip(sides, (states[:N_USERS], states[N_USERS:]), strict=True):
            belongs = dropped(belongs, drop)
            said.append(leaky(belongs @ leaky(belongs.T @ own, model.leaky_slope), model.leaky_slope))
        states = local + torch.cat(said)
        total = total + states
        layers.append((local, torch.cat(said)))
    return total, layers


def hyperedges(model: HCCF) -> tuple[torch.Tensor, torch.Tensor]:
    return model.user_hyperedges, model.item_hyperedges


def dense_loss(model: HCCF, rows: Interaction, drop: float = 0.0) -> torch.Tensor:
    total, layers = dense_layers(model, drop)
    user, item, negative = rows["user_id"], rows["item_id"], rows["neg_item_id"]
    good = (total[user] * total[N_USERS + item]).sum(dim=1)
    bad = (total[user] * total[N_USERS + negative]).sum(dim=1)
    loss = -torch.nn.functional.logsigmoid(good - bad).mean()
    for table in (model.user_embedding.weight, model.item_embedding.weight, *hyperedges(model)):
        loss = loss + model.reg_weight * (table**2).sum()
    for local, said in layers:
        for nodes in (sorted(set(user.tolist())), [N_USERS + one for one in sorted(set(item.tolist()))]):
            loss = loss + model.ssl_weight * dense_nce(local[nodes].detach(), said[nodes], model.ssl_tau)
    return loss


def assert_equal(model: Any, *losses: torch.Tensor) -> None:
    # The adjacency's values are float32, as RecBole's.
    torch.testing.assert_close(*(loss.reshape(()) for loss in losses), rtol=1e-6, atol=1e-6)
    for got, expected in zip(*(gradients(model, loss) for loss in losses), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


class TestEquations:
    @pytest.mark.parametrize("n_layers", [0, 1, 3])
    def test_embeddings_are_the_dense_ones(self, n_layers: int) -> None:
        model = make(n_layers=n_layers)
        torch.testing.assert_close(torch.cat(model.forward()), dense_layers(model)[0], rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(("ssl_tau", "leaky_slope"), [(0.1, 0.3), (1.0, 0.0), (1.0, 1.0)])
    def test_loss_and_gradients_are_the_dense_ones(self, ssl_tau: float, leaky_slope: float) -> None:
        model, rows = make(ssl_tau=ssl_tau, leaky_slope=leaky_slope), batch()
        assert_equal(model, model.calculate_loss(rows), dense_loss(model, rows))

    def test_what_is_dropped_is_dropped_in_both_directions_and_in_training_only(self) -> None:
        model, rows = make(drop_ratio=0.4), batch()
        assert_equal(model, model.calculate_loss(rows), dense_loss(model, rows))
        model.train()
        losses = []
        for compute in (model.calculate_loss, lambda rows: dense_loss(model, rows, drop=0.4)):
            torch.manual_seed(5)
            losses.append(compute(rows))
        assert_equal(model, *losses)
        assert not torch.isclose(losses[0], model.eval().calculate_loss(rows))

    def test_single_precision_is_near(self) -> None:
        losses = [make(double=double).calculate_loss(batch()).item() for double in (False, True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    def test_the_local_view_learns_nothing_from_the_contrast(self) -> None:
        model = make(n_layers=1, reg_weight=0.0)
        rows = batch()
        local, said = model._propagate(model._initial())[1][0]
        seen = torch.autograd.grad(
            model._contrast([(local, said)], *(rows[one].unique() for one in ("user_id", "item_id"))),
            (local, said), allow_unused=True,
        )  # fmt: skip
        assert seen[0] is None and seen[1].abs().sum() > 0


class TestBatch:
    def test_the_contrast_is_among_distinct_users_and_positive_items(self) -> None:
        model, once = make(), batch(12)
        twice = Interaction({
            field: torch.cat((once[field], once[field])) for field in ("user_id", "item_id", "neg_item_id")
        })  # fmt: skip
        torch.testing.assert_close(model.calculate_loss(twice), model.calculate_loss(once))

    def test_a_user_and_an_item_without_edges(self) -> None:
        model = make(double=False, drop_ratio=0.5).train()
        nobody = Interaction({
            "user_id": torch.tensor([N_USERS - 1]), "item_id": torch.tensor([N_ITEMS - 1]),
            "neg_item_id": torch.tensor([1]),
        })  # fmt: skip
        loss = model.calculate_loss(nobody)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in gradients(model, loss))

    @pytest.mark.parametrize("kind", [HCCF, HCCFPlus])
    def test_the_padding_rows_belong_to_no_hyperedge(self, kind: type) -> None:
        model = make(kind, fresh=True, drop_ratio=0.3).train()
        tables = [model.user_embedding.weight, model.item_embedding.weight]
        assert not any(table[0].any() for table in tables) and all(table[1:].any(dim=1).all() for table in tables)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model.calculate_loss(batch()).backward()
            optimizer.step()
        assert not any(table[0].any() for table in tables)

    def test_scores_are_those_of_the_final_embeddings_and_are_made_anew_after_a_step(self) -> None:
        model, rows = make(double=False), batch(8)
        expected = (model.forward()[0][rows["user_id"]] @ model.forward()[1].T).detach()
        torch.testing.assert_close(model.full_sort_predict(rows), expected.view(-1))
        torch.testing.assert_close(model.predict(rows), expected[torch.arange(8), rows["item_id"]])
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model.calculate_loss(rows).backward()
        optimizer.step()
        assert not torch.allclose(model.full_sort_predict(rows), expected.view(-1))

    def test_embeddings_for_other_stages(self) -> None:
        model = make(double=False)
        assert torch.equal(model.graph_embeddings(layer="e0")[1], model.item_embedding.weight)
        with pytest.raises(UserError, match=r"^HCCF has embeddings of layer final or e0, not 'finale'; did you"):
            model.graph_embeddings(layer="finale")


def dense_text_term(model: Any, nodes: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
    """The text term as the equations have it: the projector by its weights, the softmax over a table of all pairs."""
    vectors, described = descriptions()
    own = [item for item in sorted(set(items.tolist())) if described[item]]
    centred = vectors - vectors[described].mean(dim=0)
    texts = (centred / centred[described].square().mean().sqrt()).double()[own]
    weights = list(model.text_projector.parameters())
    texts = texts @ weights[0].T + weights[1]
    if len(weights) == 4:
        texts = leaky(texts, 0.01) @ weights[2].T + weights[3]
    table = unit(nodes[[N_USERS + item for item in own]]) @ unit(texts).T / model.text_tau
    return -torch.log_softmax(table, dim=1).diag().mean()


@pytest.mark.parametrize("kind", [LightGCNPlus, HCCFPlus])
class TestTextTerm:
    @pytest.mark.parametrize("projector", ["mlp", "linear"])
    def test_loss_and_gradients_are_the_bases_and_the_dense_term(self, kind: type, projector: str) -> None:
        model, rows = make(kind, projector=projector), batch()
        plain, nodes = model.loss_and_nodes(rows)
        torch.testing.assert_close(nodes, torch.cat(model.forward()))
        term = dense_text_term(model, nodes, rows["item_id"])
        assert term > 0.5
        assert_equal(model, model.calculate_loss(rows), plain + 0.7 * term)

    def test_items_without_a_description_have_no_part(self, kind: type) -> None:
        model = make(kind)
        nodes = torch.cat(model.forward()).detach().requires_grad_()
        (grad,) = torch.autograd.grad(model.text_loss(nodes, torch.tensor([4, 5, 6, 10, 6])), nodes)
        assert set(grad.abs().sum(dim=1).nonzero().flatten().tolist()) == {N_USERS + 4, N_USERS + 6}
        assert model.text_loss(nodes, torch.tensor([5, 10])) == 0

    def test_a_description_draws_its_item(self, kind: type) -> None:
        model = make(kind, double=False, text_weight=5.0, reg_weight=0.0, ssl_weight=0.0).train()
        items = torch.arange(1, N_ITEMS)[descriptions()[1][1:]]
        rows = Interaction({
            "user_id": torch.ones(len(items), dtype=torch.long), "item_id": items, "neg_item_id": items,
        })  # fmt: skip

        @torch.no_grad()
        def own_and_other() -> tuple[float, float]:
            table = unit(model.forward()[1][items]) @ unit(model.text_projector(model.item_texts[items])).T
            count = len(items)
            return float(table.diag().mean()), float((table.sum() - table.diag().sum()) / (count * (count - 1)))

        # The projector stays as it is: what comes nearer is the item.
        tables = [model.user_embedding.weight, model.item_embedding.weight]
        optimizer = torch.optim.Adam(tables, lr=0.05)
        before = own_and_other()
        for _ in range(60):
            optimizer.zero_grad()
            model.calculate_loss(rows).sum().backward()
            optimizer.step()
        after = own_and_other()
        assert after[0] > before[0] + 0.2 and after[0] - after[1] > before[0] - before[1] + 0.2


def quick(settings_of: Callable[..., dict[str, Any]], **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL["HCCFPlus"]) | more


class TestRuns:
    @pytest.mark.parametrize(("name", "expected"), [("HCCF", {"model": 2}), ("HCCFPlus", {"model": 2}), ("DCCF", {})])
    def test_what_was_trained_before_a_change_of_one_model_is_not_found(
        self, name: str, expected: dict[str, int], settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        assert versions_of(get_model(name)) == expected
        if name == "HCCF":
            config = Config("HCCF", "small", config_dict=settings_of(epochs=0))
            made = fit(config, store_of(config))
            inputs = json.loads((made.folder / "stage.json").read_text(encoding="utf-8"))["inputs"]
            assert inputs["model"] == 2

    def test_learns(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        settings = {key: value for key, value in settings_of().items() if key not in ("data_path", "load_col")}
        more = {"epochs": 20, "learning_rate": 0.01, "train_batch_size": 512, "drop_ratio": 0.2}
        result = run("HCCF", "tiny", config_dict=settings | more)
        popularity = run("Pop", "tiny", config_dict=settings | {"epochs": 1})
        assert result["test"]["ndcg@10"] > 1.5 * popularity["test"]["ndcg@10"]
        assert result["curves"]["loss"][-1] < result["curves"]["loss"][0]

    def test_edges_are_the_train_rows_and_embeddings_the_final_ones(
        self, settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        config = Config("HCCF", "small", config_dict=settings_of(epochs=0, train_share=0.5))
        fitted = fit(config, store_of(config))
        split, n_users = fitted.train_data._dataset.split, fitted.model.n_users
        rows = split.phases == TRAIN
        crow, col = (part.long() for part in (fitted.model.edges.crow, fitted.model.edges.col))
        ends = torch.repeat_interleave(crow.diff())[: len(col) // 2].tolist(), (col[: len(col) // 2] - n_users).tolist()
        assert set(zip(*ends, strict=True)) == set(
            zip(split.users[rows].tolist(), split.items[rows].tolist(), strict=True)
        )
        for got, expected in zip(graph_embeddings(fitted.model, "HCCF"), fitted.model.forward(), strict=True):
            np.testing.assert_array_equal(got, expected.detach().numpy())

    @pytest.mark.parametrize("base", ["LightGCN", "HCCF"])
    def test_without_weight_the_text_changes_no_bit(
        self, base: str, settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        plus = Config(f"{base}Plus", "small", config_dict=quick(settings_of, text_weight=0.0))
        with_texts, plain, weighted = (
            fit(config, store_of(config)).model.state_dict()
            for config in (
                plus,
                Config(base, "small", config_dict=settings_of()),
                Config(f"{base}Plus", "small", config_dict=quick(settings_of, text_weight=0.5)),
            )
        )
        assert plain.keys() < with_texts.keys()
        for name, values in plain.items():
            assert torch.equal(values, with_texts[name]), name
        assert not torch.equal(plain["item_embedding.weight"], weighted["item_embedding.weight"])

    def test_the_texts_are_read_once(self, settings_of: Callable[..., dict[str, Any]]) -> None:
        first = run("LightGCNPlus", "small", config_dict=quick(settings_of))
        assert [stage["name"] for stage in first["stages"]] == ["backbone", "item_texts", "train-LightGCNPlus"]
        assert first["item_text"]["missing"] == 0
        other = run("HCCFPlus", "small", config_dict=quick(settings_of))
        assert [stage["cached"] for stage in other["stages"]] == [True, True, False]

    @pytest.mark.parametrize("model", ["LightGCNPlus", "HCCFPlus"])
    def test_data_without_texts_is_refused_before_any_work(
        self, model: str, settings_of: Callable[..., dict[str, Any]], tmp_path: Path
    ) -> None:
        with pytest.raises(
            UserError, match=f"^{model} needs item text, but 'small' has no template; set item_text[^\n]*$"
        ):
            run(model, "small", config_dict=settings_of())
        assert not list(tmp_path.rglob("*.safetensors"))

    @pytest.mark.parametrize(
        ("model", "key", "value"),
        [("HCCF", "ssl_tau", 0.0), ("HCCF", "n_hyperedges", 0), ("HCCF", "n_layers", -1), ("HCCF", "drop_ratio", 1.0),
         ("HCCF", "leaky_slope", 2.0), ("HCCF", "reg_weight", -1.0), ("HCCF", "ssl_weight", "much"),
         ("HCCFPlus", "text_tau", 0.01), ("LightGCNPlus", "text_weight", -1.0), ("LightGCNPlus", "projector", "deep")],
    )  # fmt: skip
    def test_wrong_settings_are_refused(
        self, model: str, key: str, value: Any, settings_of: Callable[..., dict[str, Any]]
    ) -> None:
        with pytest.raises(UserError, match=f"^{key} should be .* but is {value!r}[^\n]*$"):
            Config(model, "small", config_dict=settings_of(**{key: value}))
