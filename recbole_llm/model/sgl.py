"""SGL as RecBole has it, its graphs multiplied as CSR with the symmetric gradient."""

from __future__ import annotations

from typing import Any

import torch
from recbole.model.general_recommender import sgl as recbole_sgl

from recbole_llm.model.graph import MeanOfPowers, SymmetricProduct, csr_tensor


class SGL(recbole_sgl.SGL):
    """RecBole's SGL (Wu et al., SIGIR 2021): same parameters, initial values, views, losses and scores, less time."""

    def csr2tensor(self, matrix: Any) -> torch.Tensor:
        """A graph or view, as SciPy's sparse matrix, to a CSR tensor on the model's device."""
        return csr_tensor(matrix).to(self.device)

    def forward(self, graph: torch.Tensor | list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings after the graph convolution.

        Args:
            graph: one symmetric graph for all layers, or one for each (random walk views).

        Returns:
            Users ``[n_users, d]`` and items ``[n_items, d]``.
        """
        nodes = torch.cat([self.user_embedding.weight, self.item_embedding.weight])
        if isinstance(graph, list):
            layers = [nodes]
            for step in graph:
                layers.append(SymmetricProduct.apply(step, layers[-1]))
            mean = torch.stack(layers).mean(dim=0)
        else:
            mean = MeanOfPowers.apply(graph, nodes, self.n_layers)
        users, items = torch.split(mean, [self.n_users, self.n_items])
        return users, items
