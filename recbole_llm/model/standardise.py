"""Vectors of another model's brought to a common centre and size."""

from __future__ import annotations

import torch
from torch import Tensor


def scale_of(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Where vectors lie, and how far around.

    Args:
        vectors: float ``[n, H]``.

    Returns:
        Their mean ``[H]``, and the root mean square of what is left of them, a scalar; one where nothing is.
    """
    mean = vectors.mean(dim=0)
    size = (vectors - mean).square().mean().sqrt()
    return mean, torch.where(size > 0, size, 1.0)


def standardised(vectors: Tensor, own: Tensor) -> Tensor:
    """Vectors centred, and scaled to a mean square of one, by those that count.

    Args:
        vectors: float ``[n, H]``.
        own: bool ``[n]``, which rows count.

    Returns:
        ``[n, H]``; what it was if no row counts.
    """
    if not own.any():
        return vectors
    # Mean states of texts lie close together around a direction of their own, which tells nothing apart.
    mean, size = scale_of(vectors[own])
    return (vectors - mean) / size
