"""The loss of alignment tokenization and its gradients, written out.

Each item and level has one selected code, so the gradient is a few vectors an item, added up by code; that needs no
graph and no tensor of all distances kept for the way back.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.itemid.codebook import Residual, left_over
from recbole_llm.itemid.kmeans import Distance


@dataclass
class Step:
    """One batch under the codebooks.

    Args:
        behaviour: L^B, summed over levels, mean over items; a tensor of no dimensions.
        text: L^L likewise, not yet weighted; 0 without texts.
        codes: int64 ``[N, m]``, the selected codes.
        chosen: ``[N, m, d]``, their vectors.
        levels: ``[N, C, d]``, the gradient of L^B + weight * L^L with respect to the codebooks.
        sides: ``[m, k]`` or ``[N, m, k]``, the gradient with respect to what the text side was handed in as; ``None``
            without texts.
    """

    behaviour: Tensor
    text: Tensor
    codes: Tensor
    chosen: Tensor
    levels: Tensor
    sides: Tensor | None


def unit(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors divided by their norm, and one over the norm, ``[..., 1]``; both 0 for a vector of zeros."""
    norms = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    inverse = torch.where(norms > 0, 1 / norms, 0)
    return vectors * inverse, inverse


def gap(first: Tensor, second: Tensor, distance: Distance) -> tuple[Tensor, Tensor, Tensor]:
    """Distances row by row and their gradients.

    Args:
        first: ``[..., d]``.
        second: ``[..., d]``.
        distance: ``l2`` is squared.

    Returns:
        Distances ``[...]``, and the gradients of each with respect to its ``first`` and ``second`` row.
    """
    if distance == "l2":
        difference = first - second
        return difference.square().sum(-1), 2 * difference, -2 * difference
    a, a_inverse = unit(first)
    b, b_inverse = unit(second)
    similarity = (a * b).sum(-1, keepdim=True)
    towards = torch.addcmul(b, similarity, a, value=-1).mul_(-a_inverse)
    back = torch.addcmul(a, similarity, b, value=-1).mul_(-b_inverse)
    return 1 - similarity[..., 0], towards, back


def select(levels: Tensor, inputs: Tensor, distance: Distance, residual: Residual) -> tuple[Tensor, Tensor, Tensor]:
    """The nearest code at every level.

    Args:
        levels: ``[N, C, d]``.
        inputs: ``[m, d]``, those of the first level.
        distance: by which codes are chosen.
        residual: what goes on to the next level.

    Returns:
        Codes int64 ``[N, m]``, their vectors ``[N, m, d]``, and the inputs of every level, ``[N, m, d]``.
    """
    # Nearest is the largest product with a unit code, or with a code less half its square.
    keys = unit(levels)[0] if distance == "cosine" else levels
    offsets = None if distance == "cosine" else levels.square().sum(-1).mul_(-0.5)
    codes, chosen, seen = [], [], []
    for level in range(len(levels)):
        nearness = inputs @ keys[level].T if offsets is None else torch.addmm(offsets[level], inputs, keys[level].T)
        code = nearness.argmax(dim=1)
        vectors = levels[level].index_select(0, code)
        codes.append(code)
        chosen.append(vectors)
        seen.append(inputs)
        inputs = left_over(inputs, vectors, residual)
    return torch.stack(codes), torch.stack(chosen), torch.stack(seen)


def step(
    levels: Tensor,
    inputs: Tensor,
    distance: Distance,
    residual: Residual,
    *,
    aims: Tensor | None = None,
    weight: float = 0.0,
    up: tuple[Tensor, Tensor] | None = None,
) -> Step:
    """Loss and gradients of a batch.

    ``L^B = sum_n Dist(E^n, B^n_c)`` and ``L^L = sum_n Dist(B^n_c, P(E_LLM))``; what a level looks at is taken as given,
    so no gradient goes through it.

    Args:
        levels: ``[N, C, d]``.
        inputs: ``[m, d]``.
        distance: Dist.
        residual: what goes on to the next level.
        aims: P(E_LLM) ``[m, d]``, or with ``up`` the texts ``[m, k]`` themselves; ``None`` leaves L^L out.
        weight: of L^L.
        up: a linear map from codes to texts, ``[k, d]`` and ``[k]``: L^L is then ``sum_n Dist(P(B^n_c), E_LLM)``.

    Returns:
        Losses, codes and gradients.
    """
    codes, chosen, seen = select(levels, inputs, distance, residual)
    losses, gradients, _ = gap(chosen, seen, distance)
    behaviour, text, sides = losses.sum() / len(inputs), losses.new_zeros(()), None
    if aims is not None:
        images = chosen if up is None else torch.nn.functional.linear(chosen, *up)
        losses, of_images, of_aims = gap(images, aims, distance)
        text = losses.sum() / len(inputs)
        gradients = gradients.add(of_images if up is None else of_images @ up[0], alpha=weight)
        # Of P(E_LLM), or of P(B): whichever the projection makes.
        sides = (of_aims.sum(0) if up is None else of_images) * (weight / len(inputs))
    size, width = levels.shape[1:]
    places = codes + torch.arange(len(levels), device=codes.device)[:, None] * size
    summed = levels.new_zeros(len(levels) * size, width)
    summed.index_add_(0, places.flatten(), gradients.reshape(-1, width), alpha=1 / len(inputs))
    return Step(behaviour, text, codes, chosen, summed.view_as(levels), sides)
