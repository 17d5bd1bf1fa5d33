"""Sinkhorn-Knopp: codes given out evenly over a batch instead of each item taking its nearest."""

from __future__ import annotations

import torch
from torch import Tensor

# LC-Rec's, whose last level is assigned so.
EPSILON = 0.003
ITERATIONS = 50


def centred(distances: Tensor) -> Tensor:
    """Distances of a batch brought into (-1, 1), in double precision.

    Args:
        distances: ``[..., n, C]``; each ``[n, C]`` on its own.

    Returns:
        float64 ``[..., n, C]``: minus the middle of the largest and smallest, over half their gap.
    """
    doubled = distances.double()
    largest, smallest = doubled.amax((-2, -1), keepdim=True), doubled.amin((-2, -1), keepdim=True)
    middle = (largest + smallest) / 2
    return (doubled - middle) / (largest - middle + 1e-5)


def sinkhorn(distances: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """How much of each item goes to each code when every code gets the same share of the batch.

    As in LC-Rec (Zheng et al., ICDE 2024): ``exp(-d / epsilon)`` of the :func:`centred` distances, whose rows and
    columns are normalised in turn.

    Args:
        distances: ``[..., n, C]``, at least one item; leading dimensions are batches of their own.
        epsilon: the smaller, the closer to one code an item; from 0.003 on no share leaves double precision.
        iterations: of the alternation.

    Returns:
        float64 ``[..., n, C]``; each column sums to ``n / C`` and, once it has converged, each row to 1.
    """
    shares = torch.exp(-centred(distances) / epsilon)
    shares /= shares.sum((-2, -1), keepdim=True)
    items, codes = shares.shape[-2:]
    for _ in range(iterations):
        shares /= shares.sum(-1, keepdim=True) * items
        shares /= shares.sum(-2, keepdim=True) * codes
    return shares * items


def balanced(distances: Tensor, epsilon: float = EPSILON, iterations: int = ITERATIONS) -> Tensor:
    """The code with the largest share of each item, int64 ``[..., n]``; see :func:`sinkhorn`."""
    return sinkhorn(distances, epsilon, iterations).argmax(dim=-1)
