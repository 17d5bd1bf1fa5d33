"""NGCF as RecBole has it, its graph built without Python loops and multiplied with the symmetric gradient."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recbole.model.general_recommender import ngcf as recbole_ngcf

from recbole_llm.model.graph import SymmetricProduct, csr_tensor, normalised_adjacency


class NGCF(recbole_ngcf.NGCF):
    """RecBole's NGCF (Wang et al., SIGIR 2019): same parameters, initial values, losses and scores, less time."""

    def get_norm_adj_mat(self) -> torch.Tensor:
        """The normalised adjacency of the train graph, sparse float32 ``[n_users + n_items] * 2``."""
        pairs = self.interaction_matrix
        graph = csr_tensor(normalised_adjacency(pairs.row, pairs.col, self.n_users, self.n_items))
        return graph.to_sparse_coo() if self.node_dropout else graph

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings of all layers side by side.

        Returns:
            Users ``[n_users, d]`` and items ``[n_items, d]``, ``d`` being the sum of the layers' widths.
        """
        if self.node_dropout:  # what is left of the graph after it is not symmetric
            users, items = super().forward()
            return users, items
        nodes = self.get_ego_embeddings()
        layers = [nodes]
        for layer in self.GNNlayers:
            near = SymmetricProduct.apply(self.norm_adj_matrix, nodes)
            nodes = F.leaky_relu(layer.linear(nodes + near) + layer.interActTransform(near * nodes), 0.2)
            nodes = F.normalize(self.emb_dropout(nodes), p=2, dim=1)
            layers.append(nodes)
        users, items = torch.split(torch.cat(layers, dim=1), [self.n_users, self.n_items])
        return users, items
