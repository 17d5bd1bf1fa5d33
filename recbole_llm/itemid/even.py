"""Codes given out evenly: among the items of one prefix, every code of the next level is worth as much as any other."""

from __future__ import annotations

import torch
from torch import Tensor

from recbole_llm.itemid.codebook import ResidualCodebook
from recbole_llm.itemid.collisions import by_size, groups_of
from recbole_llm.itemid.sinkhorn import EPSILON, ITERATIONS, balanced


@torch.no_grad()
def encode_evenly(
    codebook: ResidualCodebook, points: Tensor, levels: int, epsilon: float = EPSILON, iterations: int = ITERATIONS
) -> Tensor:
    """The codes of a whole catalogue, the last levels given out evenly.

    Where each item takes its nearest code, like items take the same one level after level and end with equal codes.
    LC-Rec (Zheng et al., ICDE 2024) spreads the items that collide over the last level by Sinkhorn-Knopp; this does it
    for all items that share the levels before, and for as many levels as asked. What the levels before them say of an
    item stays.

    Args:
        codebook: N levels of C codes.
        points: ``[n, d]``, all items; the codes of one hang on the others.
        levels: so many last levels, at most N - 1: the first one is always the nearest.
        epsilon: of Sinkhorn-Knopp, the smaller the closer to one code an item.
        iterations: likewise.

    Returns:
        int64 ``[n, N]``.
    """
    free = codebook.depth - min(levels, codebook.depth - 1)
    codes, _ = codebook.encode(points)
    made = codes[:, :free]
    for level in range(free, codebook.depth):
        # The level's inputs follow from the codes before it; a column of any codes stands for the level itself.
        inputs = codebook.residuals(points, torch.cat([made, made[:, :1]], dim=1))[:, -1].double()
        made = torch.cat([made, _spread(codebook, level, inputs, made, epsilon, iterations)], dim=1)
    return made


def _spread(
    codebook: ResidualCodebook, level: int, inputs: Tensor, before: Tensor, epsilon: float, iterations: int
) -> Tensor:
    """Codes int64 ``[n, 1]`` of a level for inputs ``[n, d]``, even among rows with the same codes ``before``."""
    made = torch.empty(len(inputs), 1, dtype=torch.int64, device=inputs.device)
    # Each group is a batch of its own; of one item it is the nearest code.
    for batches in by_size(groups_of(before.cpu().numpy())):
        part = torch.from_numpy(batches).to(inputs.device)
        gaps = codebook.distances(level, inputs[part.flatten()]).view(*part.shape, codebook.size)
        chosen = gaps.argmin(dim=-1) if part.shape[1] == 1 else balanced(gaps, epsilon, iterations)
        made[part.flatten(), 0] = chosen.flatten()
    return made
