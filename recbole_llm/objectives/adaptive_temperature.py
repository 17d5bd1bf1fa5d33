"""The temperature of a softmax by which a share of the mass is the label's: MSL's adaptive strategy (ATS).

Let C be the logarithm of ``eta`` times the number of tokens, and let the others' scores be normal with the variance v
and a mean that is d below the label's. Then the logarithm of the label's share of the softmax at the temperature tau,
over that of ``1 / eta`` of a uniform one, is d / tau - v / (2 tau^2) - C, and tau is the larger of its two zeros:

    tau = (d + sqrt(max(d^2 - 2 C v, 0))) / (2 C)

Source: Wang et al., "MSL: Not All Tokens Are What You Need for Tuning LLM as a Recommender", SIGIR 2025, and the
authors' public code, which reads the first tokens of items alone, holds tau within 1.5 and 5 and averages it over
steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOWEST, HIGHEST = 1.5, 5.0
# The newest step's share of the running mean.
SHARE = 0.05


@torch.no_grad()
def adaptive_temperature(scores: Tensor, labels: Tensor, eta: float) -> float:
    """The temperature for a batch.

    Args:
        scores: logits of the legal tokens, float ``[B, n]``, B at least 1.
        labels: the column of each row's label, int64 ``[B]``.
        eta: above 0.

    Returns:
        Within ``LOWEST`` and ``HIGHEST``; the latter where the tokens are fewer than ``1 / eta``, so that any
        temperature gives a label its share.
    """
    scores = scores.double()
    own = scores.gather(1, labels.unsqueeze(1))
    others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, labels.unsqueeze(1), False)
    count = scores.shape[1]
    share = math.log(max(count * eta, 1.0))
    if not share or count < 2:
        return HIGHEST
    negatives = scores[others].view(len(scores), count - 1)
    ahead = float((own - negatives.mean(1, keepdim=True)).mean())
    variance = float(negatives.var(1, correction=0).mean())
    tau = (ahead + math.sqrt(max(ahead**2 - 2 * share * variance, 0.0))) / (2 * share)
    return min(max(tau, LOWEST), HIGHEST)
