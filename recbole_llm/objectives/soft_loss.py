"""Losses of a next-token distribution against a hard label mixed with a soft one: TCA4Rec's soft label alignment.

The mixture is y(v) = (1 - alpha) [v is the label] + alpha p(v). Against the model's P(v) = softmax(s / tau)(v):

- ``log_mixture``: -log sum_v y(v) P(v), the paper's. Its gradient by s / tau is P - q, q(v) proportional to
  P(v) y(v): tokens that the teacher likes are pushed down less. It is smallest at one token, the likeliest under y.
- ``soft_ce``: -sum_v y(v) log P(v), with the gradient P - y, smallest at P = y.
- ``kl``: ``soft_ce`` less the entropy of y, which has the same gradient and is 0 at P = y.

With alpha = 0 all three are the cross-entropy. Soft labels stay listed token by token (:class:`SoftLabels`): a loss
reads the logits at these tokens and the logarithm of the sum of the exponentials of all, and the one array of the
logits' size is their gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.objectives.soft_labels import SoftLabels

FORMS = ("log_mixture", "soft_ce", "kl")
# Logits of which the exponentials are made at a time.
PIECE = 2**20


@dataclass(frozen=True)
class SoftLabelLoss:
    """The loss at label positions.

    Attributes:
        form: ``log_mixture``, ``soft_ce`` or ``kl``.
        alpha: the teacher's share, within 0..1.
        tau: the logits' temperature. It applies to all positions alike; gradients shrink by it.
        legal_only: P is over the legal tokens, not over the vocabulary (masked softmax loss, Wang et al., SIGIR 2025).
        skip_forced: under ``legal_only``, positions where but one token is legal, whose loss is 0, do not count in the
            mean.

    Raises:
        UserError: a setting is out of its range.
    """

    form: str = "log_mixture"
    alpha: float = 0.1
    tau: float = 1.0
    legal_only: bool = False
    skip_forced: bool = True

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"tca_loss is one of {', '.join(FORMS)}, not {self.form!r}{did_you_mean(self.form, FORMS)}")
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha is the collaborative model's share of a label, within 0 and 1, not {self.alpha}")
        if not 0 < self.tau < math.inf:
            raise UserError(f"tau is the temperature of a softmax and must be above 0, not {self.tau}")

    def __call__(self, logits: Tensor, soft: SoftLabels) -> Tensor:
        """The mean over positions.

        Args:
            logits: float [M, V], those of the positions of ``soft``.
            soft: the labels.

        Returns:
            float32 scalar; 0 without a position.
        """
        losses = self.of_positions(logits, soft)
        if not (self.legal_only and self.skip_forced):
            return losses.sum() / max(len(losses), 1)
        counted = ~soft.forced
        return losses.where(counted, 0).sum() / counted.sum().clamp(min=1)

    def of_positions(self, logits: Tensor, soft: SoftLabels) -> Tensor:
        """The loss at each position, for a base that averages in a way of its own.

        Args:
            logits: float [M, V]; -inf for tokens that the base has ruled out.
            soft: the labels.

        Returns:
            float32 [M]; inf, and never NaN, where the label and all that the teacher likes are ruled out. ``soft_ce``
            and ``kl`` leave out what the teacher gives to tokens that are ruled out.

        Raises:
            ValueError: logits and labels are not of the same positions.
        """
        if logits.dim() != 2 or len(logits) != len(soft):
            raise ValueError(f"logits {tuple(logits.shape)} for {len(soft)} label positions")
        flat = torch.cat((torch.arange(len(soft), device=logits.device), soft.positions)) * logits.shape[1]
        flat += torch.cat((soft.labels, soft.tokens))
        read, partition = _Read.apply(logits, flat, self.tau, not self.legal_only)
        own, others = read.split((len(soft), len(soft.tokens)))
        if self.legal_only:
            nothing = torch.full_like(own, -torch.inf)
            partition = _log_sum(nothing, others, soft.positions)
        if self.form == "log_mixture":
            return self._log_mixture(own, others, partition, soft)
        return self._cross_entropy(own, others, partition, soft)

    def _log_mixture(self, own: Tensor, others: Tensor, partition: Tensor, soft: SoftLabels) -> Tensor:
        hard = math.log1p(-self.alpha) if self.alpha < 1 else -math.inf
        mixed = _log_sum(own + hard, others + (self.alpha * soft.probs).log(), soft.positions)
        there = mixed > -torch.inf
        return torch.where(there, partition.where(there, 0) - mixed.where(there, 0), torch.inf)

    def _cross_entropy(self, own: Tensor, others: Tensor, partition: Tensor, soft: SoftLabels) -> Tensor:
        there = others > -torch.inf
        shares = (self.alpha * soft.probs).where(there, 0)
        hard = 1 - self.alpha
        read = torch.zeros_like(own).index_add(0, soft.positions, others.where(there, 0) * shares)
        given = torch.zeros_like(own).index_add(0, soft.positions, shares)
        losses = (hard + given) * partition - read
        if hard:
            losses = losses - hard * own
        if self.form == "kl":
            losses = losses - self._entropy(shares, hard, soft)
        return losses.nan_to_num(nan=torch.inf, posinf=torch.inf)

    @staticmethod
    def _entropy(shares: Tensor, hard: float, soft: SoftLabels) -> Tensor:
        """Of the mixture, float32 [M]."""
        is_label = soft.tokens == soft.labels.index_select(0, soft.positions)
        at_label = torch.zeros_like(soft.labels, dtype=shares.dtype)
        at_label = at_label.index_add(0, soft.positions, shares.where(is_label, 0)) + hard
        rest = shares.where(~is_label, 0)
        summed = torch.xlogy(at_label, at_label).index_add(0, soft.positions, torch.xlogy(rest, rest))
        return -summed


def _log_sum(first: Tensor, others: Tensor, positions: Tensor) -> Tensor:
    """Log-sum-exp of a value and a run of others at each position, float [M]; -inf of nothing but -inf, without NaN."""
    with torch.no_grad():
        most = first.detach().scatter_reduce(0, positions, others.detach(), "amax")
        base = most.where(most > -torch.inf, 0)
    summed = (first - base).exp().index_add(0, positions, (others - base.index_select(0, positions)).exp())
    there = summed > 0
    return torch.where(there, summed.where(there, 1).log() + base, -torch.inf)


class _Read(torch.autograd.Function):
    """Logits over tau at some places, and the log of the sum of the exponentials of whole rows, in float32.

    Both in one function, as its gradient then is one array of the logits' size and type and not the sum of two. Logits
    of half precision are made single ones a piece at a time.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, flat: Tensor, tau: float, whole: bool) -> tuple[Tensor, Tensor | None]:
        rows = max(1, PIECE // max(logits.shape[1], 1))
        partition = None
        if whole:
            pieces = (piece.float() for piece in logits.split(rows))
            partition = torch.cat([(piece if tau == 1 else piece / tau).logsumexp(1) for piece in pieces])
        ctx.save_for_backward(logits, flat, partition)
        ctx.tau, ctx.rows = tau, rows
        return logits.reshape(-1).index_select(0, flat).float() / tau, partition

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_read: Tensor, by_partition: Tensor | None) -> tuple[Tensor, None, None, None]:
        logits, flat, partition = ctx.saved_tensors
        rows, width = ctx.rows, logits.shape[1]
        made = torch.empty_like(logits, memory_format=torch.contiguous_format)
        if partition is not None:
            assert by_partition is not None
            base = partition.where(partition > -torch.inf, 0).unsqueeze(1)
            scale = (by_partition / ctx.tau).unsqueeze(1)
        flat, order = flat.sort()
        by_read = (by_read / ctx.tau)[order]
        firsts = range(0, len(logits), rows)
        ends = torch.searchsorted(flat, torch.tensor([*firsts, len(logits)], device=flat.device) * width).tolist()
        # Piece by piece, so that each is written over and over in the cache and once to memory.
        for number, first in enumerate(firsts):
            part = slice(first, first + rows)
            piece = made[part] if made.dtype == torch.float32 else made[part].float()
            if partition is None:
                piece.zero_()
            else:
                given = logits[part].float()
                torch.sub(given if ctx.tau == 1 else given / ctx.tau, base[part], out=piece).exp_().mul_(scale[part])
            own = slice(ends[number], ends[number + 1])
            piece.view(-1).index_add_(0, flat[own] - first * width, by_read[own])
            if piece.dtype != made.dtype:
                made[part] = piece
        return made, None, None, None
