"""What LETTER adds to the loss of an RQ-VAE: what items do, and codes that are not alike.

Of a batch's quantised vectors z and the items' embeddings e in a collaborative model, which do not train::

    L_CF = mean over items i of -log softmax_j(z_i . e_j)[i],   j over the items of the batch

and, at each level, of an item's code q_i and another code q_+ of the same cluster of that level's codes, drawn anew::

    L_div = mean over items i of -log softmax_j(q_i . q_j)[+],  j over the codes of the level but q_i's own

Source: Wang et al., "Learnable Item Tokenization for Generative Recommendation", CIKM 2024, arXiv 2405.07314, and the
authors' public code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.itemid.even_kmeans import bounded_clusters


def collaborative_loss(quantised: Tensor, behaviour: Tensor) -> Tensor:
    """L_CF: each item's quantised vector is to find the item's own embedding among those of the batch.

    Args:
        quantised: float ``[B, d]``.
        behaviour: float ``[B, d]``, as they are (not normalised); rows of NaN are items without one, and left out.

    Returns:
        Scalar; 0 where no item is left.
    """
    known = behaviour.isfinite().all(1)
    similar = quantised[known] @ behaviour[known].T
    return F.cross_entropy(similar, torch.arange(len(similar), device=similar.device), reduction="sum") / max(
        len(similar), 1
    )


def diversity_loss(vectors: Tensor, codes: Tensor, level: Tensor, aims: Tensor) -> Tensor:
    """L_div of one level: the code that an item has is drawn to another one, and so pushed from the rest.

    Args:
        vectors: float ``[B, d]``, the items' codes.
        codes: int64 ``[B]``, their numbers.
        level: float ``[C, d]``, all codes.
        aims: int64 ``[B]``, the other one's number.

    Returns:
        Scalar.
    """
    similar = (vectors @ level.T).scatter(1, codes.unsqueeze(1), -torch.inf)
    return F.cross_entropy(similar, aims)


def diversity_losses(vectors: Tensor, codes: Tensor, levels: Tensor, clusters: Tensor) -> list[Tensor]:
    """L_div of each level, the other codes drawn by torch's own generator.

    Args:
        vectors: float ``[B, N, d]``, the items' codes.
        codes: int64 ``[B, N]``, their numbers.
        levels: float ``[N, C, d]``, all codes.
        clusters: int64 ``[N, C]``, as :func:`cluster_codes` makes them.
    """
    parts = zip(vectors.unbind(1), codes.unbind(1), levels, clusters, strict=True)
    return [diversity_loss(own, chosen, level, draw_partners(chosen, groups)) for own, chosen, level, groups in parts]


def draw_partners(codes: Tensor, clusters: Tensor) -> Tensor:
    """For each code another one of its cluster, by torch's own generator.

    Args:
        codes: int64 ``[B]``.
        clusters: int64 ``[C]``, each code's; of two codes at least.

    Returns:
        int64 ``[B]``.
    """
    order = clusters.argsort(stable=True)
    sizes = clusters.bincount()
    begins, own = sizes.cumsum(0) - sizes, clusters[codes]
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    # So many places on in the circle of the cluster's codes, once round excluded.
    steps = 1 + (torch.rand(len(codes), device=codes.device) * (sizes[own] - 1)).long()
    return order[begins[own] + (places[codes] - begins[own] + steps) % sizes[own]]


@torch.no_grad()
def cluster_codes(levels: Tensor, count: int, seed: int, before: Tensor | None = None) -> Tensor:
    """Clusters of each level's codes, about equally large.

    Args:
        levels: float ``[N, C, d]``.
        count: clusters; fewer where there are not two codes for each.
        seed: of the start.
        before: what this returned when the codes stood elsewhere, to start from.

    Returns:
        int64 ``[N, C]``, on the codes' device.
    """
    found = [
        bounded_clusters(level, count, seed, None if before is None else before[number].cpu().numpy())
        for number, level in enumerate(levels.cpu().numpy())
    ]
    return torch.stack([torch.from_numpy(labels) for labels in found]).to(levels.device)
