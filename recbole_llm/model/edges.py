"""Weights of the edges of the user-item graph that are learned: computed, summed over and differentiated per edge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from recbole_llm.model.graph import product


@dataclass(frozen=True)
class Edges:
    """The edges of a user-item graph, each standing once between its user and its item and twice in the adjacency.

    Nodes are users before items. A weight that is the same in both directions, as a cosine is, is computed once.

    Attributes:
        crow: int32 ``[n + 1]``, where the neighbours of each of the ``n`` nodes begin.
        col: int32 ``[2 m]``, those neighbours; the first ``m`` are the users' ones.
        edge: int64 ``[2 m]``, which of the ``m`` edges leads there.
        half: sparse CSR ``[n_users, n_items]`` of zeros, the pattern of the ``m`` edges by user.
    """

    crow: torch.Tensor
    col: torch.Tensor
    edge: torch.Tensor
    half: torch.Tensor

    @classmethod
    def of(cls, adjacency: sp.csr_matrix, n_users: int, dtype: torch.dtype = torch.float32) -> Edges:
        """The edges of ``normalised_adjacency``'s matrix, whose columns must be sorted; its values do not matter."""
        m = adjacency.nnz // 2
        crow, col = (torch.from_numpy(part.astype(np.int32)) for part in (adjacency.indptr, adjacency.indices))
        # Seen from the items, the edges come in the order of (item, user): a stable sort of those of (user, item).
        by_item = np.argsort(adjacency.indices[:m], kind="stable")
        size = (n_users, adjacency.shape[0] - n_users)
        half = torch.sparse_csr_tensor(crow[: n_users + 1], col[:m] - n_users, torch.zeros(m, dtype=dtype), size=size)
        return cls(crow, col, torch.from_numpy(np.concatenate([np.arange(m), by_item])), half)

    def to(self, device: torch.device) -> Edges:
        """The same edges on a device."""
        return Edges(*(part.to(device) for part in (self.crow, self.col, self.edge, self.half)))

    def dots(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """Dot product of the two ends of every edge, not differentiable.

        Args:
            users: ``[n_users, d]``, of the weights' dtype.
            items: ``[n_items, d]``.

        Returns:
            ``[m]``.
        """
        # Three to six times as fast as to gather both ends, and no table of ends is made.
        return torch.sparse.sampled_addmm(self.half, users, items.t(), beta=0.0).values()

    def weighted(self, weights: torch.Tensor) -> torch.Tensor:
        """The adjacency with these weights ``[m]`` in both directions, as a sparse CSR tensor ``[n, n]``."""
        n = len(self.crow) - 1
        return torch.sparse_csr_tensor(self.crow, self.col, weights.index_select(0, self.edge), size=(n, n))

    def thinned(self, adjacency: torch.Tensor, ratio: float) -> torch.Tensor:
        """The adjacency without some of its edges, each gone in both directions; the others weigh as much more.

        Args:
            adjacency: sparse CSR ``[n, n]`` of these edges, symmetric.
            ratio: how likely an edge is to go.

        Returns:
            Sparse CSR ``[n, n]``, symmetric.
        """
        # The first half of the values are the users' edges, in the order that the edges have.
        return self.weighted(F.dropout(adjacency.values()[: len(self.edge) // 2], ratio))


class AdaptiveMean(torch.autograd.Function):
    r"""Mean of a node's neighbours, each weighted by how near the two ends of the edge are.

    With :math:`\alpha_{ht} = (\hat x_h \cdot \hat x_t + 1) / 2` row :math:`h` of the result is
    :math:`\sum_t \alpha_{ht} e_t / \sum_t \alpha_{ht}` (DCCF, Ren et al. 2023, equations 9-11); zero for a node without
    neighbours, or whose weights are all zero.

    The gradients are written out. As :math:`\alpha` is symmetric, each is one sum over the edges' dot products or one
    product with the same pattern, and nothing as large as the edges times the width is kept or made.
    """

    @staticmethod
    def forward(ctx: Any, edges: Edges, unit: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """``unit`` ``[n, d]`` has rows of length one (or zero), ``states`` ``[n, k]``; returns ``[n, k]``."""
        n_users = edges.half.shape[0]
        # Rounding takes the cosine of opposite rows below -1, and a sum of weights of both signs near zero.
        weights = edges.dots(unit[:n_users], unit[n_users:]).add_(1).div_(2).clamp_min_(0)
        adjacency = edges.weighted(weights)
        total = product(adjacency, torch.ones_like(states[:, :1]))
        scale = torch.where(total > 0, 1 / total, 0)
        mean = product(adjacency, states) * scale
        ctx.edges = edges
        ctx.save_for_backward(unit, states, weights, scale, mean)
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, torch.Tensor]:
        """Gradients of ``unit`` and ``states``."""
        unit, states, weights, scale, mean = ctx.saved_tensors
        edges, n_users = ctx.edges, ctx.edges.half.shape[0]
        scaled = grads[0] * scale
        states_grad = product(edges.weighted(weights), scaled)
        # d alpha = scaled_h (states_t - mean_h) + scaled_t (states_h - mean_t): one dot product of wider rows.
        minus_mean = -(scaled * mean).sum(dim=1, keepdim=True)
        one = torch.ones_like(minus_mean)
        users = torch.cat((scaled, states, minus_mean, one), dim=1)[:n_users]
        items = torch.cat((states, scaled, one, minus_mean), dim=1)[n_users:]
        unit_grad = product(edges.weighted(edges.dots(users, items).div_(2)), unit)
        return None, unit_grad, states_grad
