"""Texts made comparable with codes: the projection P of the text loss.

Texts are centred and brought to unit size first: language models put all their vectors into a narrow cone, and towards
that cone's direction every code would be pulled. Wide ones are then turned into their first principal components. Both
are linear, and are folded into the map that comes out, so that it is a map of texts as they were handed in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Projection = Literal["learned", "pca", "random", "code_up"]

# A learned projection sees at most so many principal components: the work of a step is then the same for any language
# model, and a linear map to some 32 dimensions has little use for the others.
COMPONENTS = 256


class TextSide:
    """The texts, and P.

    Args:
        texts: float32 ``[n, H]``.
        points: float32 ``[n, d]``, whose size a fixed projection takes over.
        projection: ``learned``: a linear map H -> d with bias, trained with the codes; ``pca``: the first d principal
            components; ``random``: d Gaussian directions; ``code_up``: a linear map d -> H with bias of codes, trained
            with them.
        seed: of the random directions and the learned weights' start.
    """

    def __init__(self, texts: Tensor, points: Tensor, projection: Projection, seed: int) -> None:
        self.projection = projection
        generator = torch.Generator().manual_seed(seed)
        self.mean = texts.mean(dim=0)
        centred = texts - self.mean
        width, d = texts.shape[1], points.shape[1]
        if projection == "random":
            basis = torch.randn(width, d, generator=generator).to(texts.device)
        elif projection == "pca" or width > COMPONENTS:
            basis = principal(centred, min(d if projection == "pca" else COMPONENTS, *texts.shape), generator)
        else:
            basis = torch.eye(width, device=texts.device)
        seen = centred @ basis
        if projection in ("pca", "random"):
            # On average as long as the points; where texts have fewer dimensions than codes, the rest are 0.
            size = seen.square().sum().sqrt() / points.square().sum().sqrt()
            seen = torch.nn.functional.pad(seen, (0, d - seen.shape[1]))
            basis = torch.nn.functional.pad(basis, (0, d - basis.shape[1]))
        else:
            size = seen.square().mean().sqrt()
        self.scale = float(size) or 1.0
        self.basis, self.seen = basis, seen / self.scale
        k = self.seen.shape[1]
        rows, columns = (k, d) if projection == "code_up" else (d, k)
        self.weight = ((torch.rand(rows, columns, generator=generator) * 2 - 1) / columns**0.5).to(texts.device)
        self.bias = torch.zeros(rows, device=texts.device)

    @property
    def trained(self) -> list[Tensor]:
        """What an optimizer moves."""
        return [self.weight, self.bias] if self.projection in ("learned", "code_up") else []

    def aims(self, rows: Tensor) -> Tensor:
        """What the codes of some items are compared with; with ``code_up``, what their images are."""
        seen = self.seen.index_select(0, rows)
        return torch.addmm(self.bias, seen, self.weight.T) if self.projection == "learned" else seen

    def up(self) -> tuple[Tensor, Tensor] | None:
        """The map of codes, where it is the codes that are mapped."""
        return (self.weight, self.bias) if self.projection == "code_up" else None

    def gradients(self, rows: Tensor, sides: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Of the trained weight and bias.

        Args:
            rows: ``[m]``, the items.
            sides: :attr:`~recbole_llm.itemid.alignment_loss.Step.sides`.
            chosen: ``[N, m, d]``, the code vectors before the step.
        """
        if self.projection == "learned":
            return sides.T @ self.seen.index_select(0, rows), sides.sum(0)
        flat = sides.flatten(0, 1)
        return flat.T @ chosen.flatten(0, 1), flat.sum(0)

    def folded(self) -> tuple[Tensor, Tensor]:
        """P for texts as they were handed in.

        Returns:
            Weight and bias: of texts, ``[d, H]`` and ``[d]``; under ``code_up`` of codes, ``[H, d]`` and ``[H]``.
        """
        if self.projection == "code_up":
            up = self.scale * self.basis
            return up @ self.weight, up @ self.bias + self.mean
        down = self.basis.T / self.scale
        if self.projection != "learned":
            return down, -(down @ self.mean)
        weight = self.weight @ down
        return weight, self.bias - weight @ self.mean


def principal(centred: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions of the largest variance, found by randomised subspace iteration.

    Args:
        centred: ``[n, H]`` of mean 0.
        count: how many; at most n and H.
        generator: of the random start.

    Returns:
        ``[H, count]``, the largest first.
    """
    # N. Halko, P.-G. Martinsson, J. A. Tropp: Finding Structure with Randomness, SIAM Review 2011, algorithm 4.4.
    width = min(count + 10, *centred.shape)
    basis = torch.randn(centred.shape[1], width, generator=generator).to(centred.device)
    for _ in range(2):
        basis = torch.linalg.qr(centred.T @ (centred @ basis)).Q
    _, _, rotation = torch.linalg.svd(centred @ basis, full_matrices=False)
    directions = (basis @ rotation.T)[:, :count]
    # The sign of a direction is arbitrary; its largest entry is made positive.
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    return directions * torch.where(largest < 0, -1.0, 1.0)
