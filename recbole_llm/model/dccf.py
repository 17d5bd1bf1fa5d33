"""DCCF: graph convolution with global intents and two adaptively weighted views of the graph, contrasted by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.edges import AdaptiveMean
from recbole_llm.model.graph import SymmetricProduct
from recbole_llm.model.propagated import PropagatedRecommender

if TYPE_CHECKING:
    pass

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
        self.intent_reg_weight = config["intent_reg_weight"]
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

    def _penalties(self, initial: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """Of embeddings a sum over the batch, as the authors have it: its weight is for one ``train_batch_size``."""
        intents = self.user_intents.square().sum() + self.item_intents.square().sum()
        return [self.reg_weight * initial.index_select(0, rows).square().sum(), self.intent_reg_weight * intents]

    def _contrast(self, layers: list[Views], users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Each layer's other messages against the graph's, users among users and items among items."""
        nodes = torch.cat((users, items + self.n_users))
        terms = []
        for views in layers:
            unit = [F.normalize(view.index_select(0, nodes)).split([len(users), len(items)]) for view in views]
            for other in unit[1:]:
                terms += [InfoNCE.apply(a, b, self.ssl_tau) for a, b in zip(unit[0], other, strict=True)]
        return torch.stack(terms).sum()
