"""The contrastive loss of two views of the same nodes, without a table of all their pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

_EPSILON = 1e-8
_CELLS_CPU = 1 << 20  # similarities held at once: 4 MiB on a CPU, 256 MiB elsewhere
_CELLS_GPU = 1 << 26


class InfoNCE(torch.autograd.Function):
    r"""Mean of :math:`-\log(p_i / (s_i + \epsilon) + \epsilon)` over the rows of two views.

    :math:`p_i = \exp(a_i \cdot b_i / \tau)`, :math:`s_i = \sum_j \exp(a_i \cdot b_j / \tau)`,
    :math:`\epsilon = 10^{-8}` (DCCF, Ren et al. 2023, in the form of the authors' code). Where ``own`` is given,
    :math:`b_{own_i}` stands for :math:`b_i` in :math:`p_i`, and :math:`j` goes over all rows of :math:`b`. Counts say
    how often rows stand in a view, so that equal rows are computed once.

    The similarities are made a few rows at a time and used for the gradients at once, so that memory grows with the
    rows and not with their square, and each exponential is taken once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        temperature: float,
        own: torch.Tensor | None = None,
        a_counts: torch.Tensor | None = None,
        b_counts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The loss, a scalar.

        Args:
            ctx: torch's.
            a: ``[n, d]`` with rows of length one, ``n >= 1``.
            b: ``[n, d]``, or ``[m, d]`` with ``own``; likewise.
            temperature: above 0.
            own: int64 ``[n]``, the row of ``b`` that belongs to each of ``a``; the one at its own place if ``None``.
            a_counts: of their dtype ``[n]``, how often each row of ``a`` stands there; once if ``None``.
            b_counts: ``[m]``, likewise of ``b``.
        """
        n = len(a) if a_counts is None else a_counts.sum()
        wanted = any(ctx.needs_input_grad)
        a_grad, b_grad = torch.zeros_like(a), torch.zeros_like(b)
        loss = a.new_zeros(())
        rows = max(1, (_CELLS_CPU if a.device.type == "cpu" else _CELLS_GPU) // len(b))
        for start in range(0, len(a), rows):
            part = slice(start, start + rows)
            mine, other = a[part], b[part] if own is None else b[own[part]]
            near = torch.mm(mine / temperature, b.t()).exp_()
            if b_counts is not None:
                near *= b_counts
            total = near.sum(dim=1, keepdim=True) + _EPSILON
            share = ((mine * other).sum(dim=1, keepdim=True) / temperature).exp_() / total
            often = 1.0 if a_counts is None else a_counts[part].unsqueeze(1)
            loss -= (often * torch.log(share + _EPSILON)).sum()
            if wanted:
                # d loss / d a.b_i through the numerator, and d loss / d total, both over the temperature.
                pull = -often * share / (share + _EPSILON) / (n * temperature)
                push = -pull / total
                a_grad[part] = pull * other + push * torch.mm(near, b)
                if own is None:
                    b_grad[part] += pull * mine
                else:
                    b_grad.index_add_(0, own[part], pull * mine)
                b_grad.addmm_(near.t(), push * mine)
        ctx.save_for_backward(a_grad, b_grad)
        return loss / n

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None, None]:
        """Gradients of ``a`` and ``b``, which the forward pass has made."""
        a_grad, b_grad = ctx.saved_tensors
        return a_grad * grads[0], b_grad * grads[0], None, None, None, None
