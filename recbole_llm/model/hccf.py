"""HCCF: graph convolution and learned hypergraphs over users and over items, contrasted by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.graph import SymmetricProduct
from recbole_llm.model.propagated import PropagatedRecommender

if TYPE_CHECKING:
    pass


class HCCF(PropagatedRecommender):
    r"""Hypergraph contrastive collaborative filtering (Xia et al., SIGIR 2022, arXiv 2204.12200).

    Users have a hypergraph of their own, and items theirs: how much a node belongs to each of K hyperedges is learned,
    at low rank, as :math:`H = E W` of the node's embedding. A layer's output is what the neighbours in the user-item
    graph say (local), plus what the hyperedges say (global), :math:`\sigma(H \sigma(H^\top X))` with a leaky ReLU; the
    two are contrasted at every layer.

    Where the paper and the authors' released PyTorch code differ the code is followed: a layer has no residual of its
    own and the local view no activation, final embeddings are the sum over layers, hyperedges are not mapped onto each
    other, the loss is BPR, the contrast is among the distinct users and the distinct positive items of the batch, and
    of its two views only the hypergraph's gets a gradient. That code has no activation at all: ``leaky_slope: 1``.

    Ours: an edge that is dropped is dropped in both directions, so that the graph stays symmetric and its gradient is
    the same fast product. The graph has the train rows, each user-item pair once.

    Args:
        config: has ``embedding_size``, ``n_layers``, ``n_hyperedges``, ``leaky_slope``, ``drop_ratio``, ``ssl_tau``,
            ``ssl_weight`` and ``reg_weight``.
        dataset: the train rows.
    """

    # 2: padding is no node.
    train_version = 2

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.leaky_slope = config["leaky_slope"]
        self.drop_ratio = config["drop_ratio"]
        size = config["embedding_size"], config["n_hyperedges"]
        self.user_hyperedges = nn.Parameter(torch.empty(size))
        self.item_hyperedges = nn.Parameter(torch.empty(size))
        for parameter in self.parameters():
            nn.init.xavier_uniform_(parameter)
        with torch.no_grad():
            # The padding user and item are no nodes. At zero they belong to no hyperedge, and get no gradient either.
            self.user_embedding.weight[0], self.item_embedding.weight[0] = 0, 0

    def _kept(self) -> torch.Tensor:
        """The graph of one layer; in training without some of the edges, the others weighing as much more."""
        if not self.training or not self.drop_ratio:
            return self.adjacency
        return self.edges.thinned(self.adjacency, self.drop_ratio)

    def _global(self, table: torch.Tensor, hyperedges: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """What the hyperedges say of one side's nodes.

        Args:
            table: ``[n, d]``, the side's embeddings below the graph.
            hyperedges: ``[d, K]``.
            states: ``[n, d]``, the layer's input.

        Returns:
            ``[n, d]``.
        """
        if self.training and self.drop_ratio:
            belongs = F.dropout(table @ hyperedges, self.drop_ratio)
            said = belongs @ F.leaky_relu(belongs.t() @ states, self.leaky_slope)
        else:
            # E (W x) in place of (E W) x: no table of nodes by hyperedges is made.
            heard = F.leaky_relu(hyperedges.t() @ (table.t() @ states), self.leaky_slope)
            said = table @ (hyperedges @ heard)
        return F.leaky_relu(said, self.leaky_slope)

    def _propagate(self, initial: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """The sum of all layers' states, and each layer's local and global view."""
        sizes = [self.n_users, self.n_items]
        tables = initial.split(sizes)
        total, states, layers = initial, initial, []
        for _ in range(self.n_layers):
            local = SymmetricProduct.apply(self._kept(), states)
            users, items = states.split(sizes)
            said = torch.cat((
                self._global(tables[0], self.user_hyperedges, users),
                self._global(tables[1], self.item_hyperedges, items),
            ))  # fmt: skip
            states = local + said
            total = total + states
            layers.append((local, said))
        return total, layers

    def _penalties(self, initial: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """Of all weights, as the authors have it."""
        hyperedges = self.user_hyperedges.square().sum() + self.item_hyperedges.square().sum()
        return [self.reg_weight * (initial.square().sum() + hyperedges)]

    def _contrast(
        self, layers: list[tuple[torch.Tensor, torch.Tensor]], users: torch.Tensor, items: torch.Tensor
    ) -> torch.Tensor:
        """Each layer's global view against the local one, users among users and items among items."""
        terms = []
        for local, said in layers:
            for nodes in (users, items + self.n_users):
                anchor = F.normalize(local.detach().index_select(0, nodes))
                terms.append(InfoNCE.apply(anchor, F.normalize(said.index_select(0, nodes)), self.ssl_tau))
        return torch.stack(terms).sum()
