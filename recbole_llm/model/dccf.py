"""DCCF: graph convolution with global intents and two adaptively weighted views of the graph, contrasted by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.edges import AdaptiveMean, Edges
from recbole_llm.model.graph import SymmetricProduct, csr_tensor, normalised_adjacency
from recbole_llm.model.propagated import PropagatedRecommender

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

_ROWS_CPU = 1024  # nodes whose intents are held at once: what stays in a core's cache
_ROWS_GPU = 1 << 17


class Intents(torch.autograd.Function):
    r"""What the intents say of each node, :math:`\mathrm{softmax}(x C) C^\top` (DCCF, Ren et al. 2023, equations 4-5).

    Node by node the shares of the intents are made again for the gradient: kept, they would be several times as large
    as the tables, and to read them back takes longer.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, intents: torch.Tensor) -> torch.Tensor:
        """``x`` ``[n, d]``, ``intents`` ``[d, K]``; returns ``[n, d]``."""
        rows = _ROWS_CPU if x.device.type == "cpu" else _ROWS_GPU
        out = torch.cat([torch.softmax(part @ intents, dim=1) @ intents.t() for part in x.split(rows)])
        ctx.save_for_backward(x, intents, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of ``x`` and ``intents``."""
        x, intents, out = ctx.saved_tensors
        rows = _ROWS_CPU if x.device.type == "cpu" else _ROWS_GPU
        x_grads, intents_grad = [], torch.zeros_like(intents)
        for part, said, grad in zip(x.split(rows), out.split(rows), grads[0].split(rows), strict=True):
            shares = torch.softmax(part @ intents, dim=1)
            # The gradient of a softmax takes off the mean under its shares, which is grad . said.
            logits_grad = (grad @ intents).sub_((grad * said).sum(dim=1, keepdim=True)).mul_(shares)
            x_grads.append(logits_grad @ intents.t())
            intents_grad.addmm_(part.t(), logits_grad).addmm_(grad.t(), shares)
        return torch.cat(x_grads), intents_grad


class Views(NamedTuple):
    """The four messages of one layer, each ``[n_users + n_items, d]``, users before items.

    Attributes:
        graph: from the neighbours, by the normalised adjacency.
        intent: from the intents.
        near_by_graph: from the neighbours, weighted by how near the two ends are in ``graph``.
        near_by_intent: the same, in ``intent``.
    """

    graph: torch.Tensor
    intent: torch.Tensor
    near_by_graph: torch.Tensor
    near_by_intent: torch.Tensor


class DCCF(PropagatedRecommender):
    """Disentangled contrastive collaborative filtering (Ren et al., SIGIR 2023), after the authors' released code.

    Where that code and the paper differ the code is followed: final embeddings are the sum over layers, the views are
    contrasted with the graph's message at every layer, and among the distinct users and the distinct positive items of
    the batch only. The graph has the train rows, each user-item pair once.

    Args:
        config: has ``embedding_size``, ``n_layers``, ``n_intents``, ``ssl_tau``, ``ssl_weight``, ``reg_weight`` and
            ``intent_reg_weight``.
        dataset: the train rows.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.n_layers = config["n_layers"]
        self.ssl_tau = config["ssl_tau"]
        self.ssl_weight = config["ssl_weight"]
        self.reg_weight = config["reg_weight"]
        self.intent_reg_weight = config["intent_reg_weight"]

        pairs = dataset.inter_matrix(form="coo")
        adjacency = normalised_adjacency(pairs.row, pairs.col, self.n_users, self.n_items)
        self.adjacency = csr_tensor(adjacency).to(self.device)
        self.edges = Edges.of(adjacency, self.n_users).to(self.device)

        size = config["embedding_size"], config["n_intents"]
        self.user_intents = nn.Parameter(torch.empty(size))
        self.item_intents = nn.Parameter(torch.empty(size))
        for parameter in self.parameters():
            nn.init.xavier_normal_(parameter)

    def _views(self, states: torch.Tensor) -> Views:
        """The messages of one layer to all nodes, from the layer's input ``[n_users + n_items, d]``."""
        graph = SymmetricProduct.apply(self.adjacency, states)
        users, items = states.split([self.n_users, self.n_items])
        intent = torch.cat((Intents.apply(users, self.user_intents), Intents.apply(items, self.item_intents)))
        return Views(
            graph,
            intent,
            AdaptiveMean.apply(self.edges, F.normalize(graph), states),
            AdaptiveMean.apply(self.edges, F.normalize(intent), states),
        )

    def _propagate(self, states: torch.Tensor) -> tuple[torch.Tensor, list[Views]]:
        """The sum of all layers' states, and each layer's messages."""
        total, layers = states, []
        for _ in range(self.n_layers):
            views = self._views(states)
            states = sum(views, states)
            total = total + states
            layers.append(views)
        return total, layers

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final embeddings, the sum over layers.

        Returns:
            Users ``[n_users, d]`` and items ``[n_items, d]``.
        """
        with torch.autocast(self.device.type, enabled=False):
            users, items = self._propagate(self._initial())[0].split([self.n_users, self.n_items])
        return users, items

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """BPR loss, the weights' penalties, and the contrast of each layer's messages.

        The penalty of the embeddings is a sum over the batch, as the authors have it: its weight belongs to a
        ``train_batch_size``.

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, a scalar.
        """
        self.restore_user_e = self.restore_item_e = None
        user, item, negative = (interaction[field] for field in (self.USER_ID, self.ITEM_ID, self.NEG_ITEM_ID))
        with torch.autocast(self.device.type, enabled=False):
            initial = self._initial()
            final, layers = self._propagate(initial)
            rows = torch.cat((user, item + self.n_users, negative + self.n_users))
            user_row, item_row, negative_row = final.index_select(0, rows).split(len(user))
            loss = F.softplus((user_row * negative_row).sum(dim=1) - (user_row * item_row).sum(dim=1)).mean()
            loss = loss + self.reg_weight * initial.index_select(0, rows).square().sum()
            intents = self.user_intents.square().sum() + self.item_intents.square().sum()
            loss = loss + self.intent_reg_weight * intents
            if self.ssl_weight and layers:
                loss = loss + self.ssl_weight * self._contrast(layers, torch.unique(user), torch.unique(item))
        return loss

    def _contrast(self, layers: list[Views], users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Each layer's other messages against the graph's, users among users and items among items."""
        nodes = torch.cat((users, items + self.n_users))
        terms = []
        for views in layers:
            unit = [F.normalize(view.index_select(0, nodes)).split([len(users), len(items)]) for view in views]
            for other in unit[1:]:
                terms += [InfoNCE.apply(a, b, self.ssl_tau) for a, b in zip(unit[0], other, strict=True)]
        return torch.stack(terms).sum()
