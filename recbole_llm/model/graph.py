"""The user-item graph of the collaborative baselines as a CSR matrix, and products with it that differentiate fast."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F


def normalised_adjacency(users: np.ndarray, items: np.ndarray, n_users: int, n_items: int) -> sp.csr_matrix:
    r"""``D^{-1/2} A D^{-1/2}`` of the bipartite graph, users before items (LightGCN, He et al. 2020, equations 7-8).

    A pair that occurs several times is one edge. As in RecBole, :math:`10^{-7}` is added to each degree, so that the
    values are RecBole's own to the last bit.

    Args:
        users: int ``[n]``, one end of each interaction.
        items: int ``[n]``, the other end.
        n_users: number of internal user ids, padding included.
        n_items: number of internal item ids, padding included.

    Returns:
        float32 ``[n_users + n_items, n_users + n_items]``, symmetric, with sorted column indices.
    """
    keys = np.unique(users.astype(np.int64) * n_items + items)
    users, items = keys // n_items, keys % n_items
    user_scale = np.power(np.bincount(users, minlength=n_users) + 1e-7, -0.5)
    item_scale = np.power(np.bincount(items, minlength=n_items) + 1e-7, -0.5)
    values = (user_scale[users] * item_scale[items]).astype(np.float32)
    half = sp.csr_matrix((values, (users, items)), shape=(n_users, n_items))
    whole = sp.bmat([[None, half], [half.T.tocsr(), None]], format="csr", dtype=np.float32)
    whole.sort_indices()
    return whole


def csr_tensor(matrix: sp.csr_matrix) -> torch.Tensor:
    """The same matrix as a float32 CSR tensor of torch."""
    matrix = matrix.tocsr()
    # 32-bit indices are half of what a product reads besides the rows, and what MKL and cuSPARSE take unconverted.
    return torch.sparse_csr_tensor(
        torch.from_numpy(matrix.indptr.astype(np.int32)),
        torch.from_numpy(matrix.indices.astype(np.int32)),
        torch.from_numpy(matrix.data.astype(np.float32)),
        size=matrix.shape,
    )


def product(matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """``matrix @ x``, not differentiable.

    Args:
        matrix: sparse CSR ``[n, m]``, float32 (or float64).
        x: dense ``[m, d]``.

    Returns:
        ``[n, d]``, of the matrix's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(matrix.dtype).contiguous()
        if x.device.type != "cpu":
            return torch.sparse.mm(matrix, x)
        # The same sums as an embedding bag: torch's kernel for that fetches the rows it will need next ahead of time,
        # and takes a third of the time of its sparse product on graphs of a few million edges.
        return F.embedding_bag(
            matrix.col_indices(),
            x,
            matrix.crow_indices(),
            mode="sum",
            include_last_offset=True,
            per_sample_weights=matrix.values(),
        )


class SymmetricProduct(torch.autograd.Function):
    """``A @ x`` for a fixed symmetric sparse ``A``: the gradient of ``x`` is ``A @ g``, the same fast product.

    torch multiplies by the transpose of a CSR matrix an order of magnitude more slowly than by the matrix itself, and
    cannot know that the two are equal.
    """

    @staticmethod
    def forward(ctx: Any, adjacency: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """``adjacency`` sparse ``[n, n]``, ``x`` ``[n, d]``; returns ``[n, d]``."""
        ctx.adjacency = adjacency
        return product(adjacency, x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        """``A @ g``, itself differentiable."""
        return None, SymmetricProduct.apply(ctx.adjacency, grads[0])


class MeanOfPowers(torch.autograd.Function):
    r""":math:`\frac{1}{L+1}\sum_{l=0}^{L} A^l x` for a fixed symmetric ``A``: LightGCN's light graph convolution.

    The operator is linear and its own adjoint, so the gradient is the same sum over the incoming gradient. Horner's
    rule needs ``L`` products and keeps no layer for the backward pass. (LightGCN, He et al. 2020, equations 3-4, with
    the uniform layer weights of section 3.1.2.)
    """

    @staticmethod
    def forward(ctx: Any, adjacency: torch.Tensor, x: torch.Tensor, n_layers: int) -> torch.Tensor:
        """``adjacency`` sparse ``[n, n]``, ``x`` ``[n, d]``; returns float32 ``[n, d]``."""
        ctx.adjacency, ctx.n_layers = adjacency, n_layers
        total = x.float()
        for _ in range(n_layers):
            total = product(adjacency, total).add_(x)
        return total / (n_layers + 1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        """The same operator on the gradient, itself differentiable."""
        return None, MeanOfPowers.apply(ctx.adjacency, grads[0], ctx.n_layers), None
