"""RecBole's transformer layers on faster kernels, and an encoder that computes only the positions asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from recbole.model.layers import FeedForward, MultiHeadAttention, TransformerEncoder
from torch import nn

Module = TypeVar("Module", bound=nn.Module)

LANES = 4  # 16-bit numbers in one 64-bit draw
STEPS = 1 << 16

# Into how many lengths a batch is sorted, and the share of padding below which that is not worth its gathers.
LENGTH_GROUPS = 4
LITTLE_PADDING = 0.1


class _LaneDropout(torch.autograd.Function):
    """Dropout whose coin flips are 16-bit lanes of 64-bit draws: a sixth of the time of torch's Bernoulli on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        """``x`` of any shape; ``0 < p < 1``."""
        kept = round((1 - p) * STEPS)
        draws = torch.empty((x.numel() + LANES - 1) // LANES, dtype=torch.int64).random_(-(2**63), None)
        mask = (draws.view(torch.int16) < kept - STEPS // 2)[: x.numel()].view(x.shape)
        ctx.save_for_backward(mask)
        ctx.scale = STEPS / kept
        return torch.mul(x, mask).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The gradient through the same mask."""
        (mask,) = ctx.saved_tensors
        return torch.mul(grads[0], mask).mul(ctx.scale), None


def embed(model: Any, item_seq: torch.Tensor) -> torch.Tensor:
    """The first layer's input: items and positions, normalised, with dropout.

    Args:
        model: has ``item_embedding``, ``position_embedding``, ``LayerNorm`` and ``dropout``, as RecBole's have.
        item_seq: item ids, int64 ``[B, L]``.

    Returns:
        ``[B, L, H]``.
    """
    summed = model.item_embedding(item_seq) + model.position_embedding.weight[: item_seq.size(1)]
    made: torch.Tensor = model.dropout(model.LayerNorm(summed))
    return made


def dropout(x: torch.Tensor, p: float, training: bool) -> torch.Tensor:
    """``torch.nn.functional.dropout``, several times faster on a CPU.

    There the probability is rounded to a multiple of 2^-16 (0.5 is exact) and what is kept is scaled by the inverse of
    the rounded probability, so the expectation is exact. The draws come from torch's own generator.

    Args:
        x: any floating tensor.
        p: the probability of an element to be zeroed.
        training: ``False`` returns ``x``.

    Returns:
        A tensor like ``x``.
    """
    if training and x.device.type == "cpu" and 0 < round(p * STEPS) < STEPS:
        return _LaneDropout.apply(x, p)
    return F.dropout(x, p, training)


class FastDropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Any shape to the same shape."""
        return dropout(input, self.p, self.training)


class FusedMultiHeadAttention(MultiHeadAttention):
    """RecBole's multi-head self-attention on fused kernels: same parameters, same function."""

    def forward(self, input_tensor: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Self-attention, residual and normalisation.

        Args:
            input_tensor: ``[B, L, H]``.
            attention_mask: what is added to the scores, broadcastable to ``[B, heads, L, L]``.

        Returns:
            ``[B, L, H]``.
        """
        return self.attend(input_tensor, input_tensor, attention_mask)

    def attend(self, queries: torch.Tensor, inputs: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The same for some positions only.

        Args:
            queries: ``[B, P, H]``, the rows of ``inputs`` at the positions whose output is wanted.
            inputs: ``[B, L, H]``, what is attended to.
            attention_mask: broadcastable to ``[B, heads, P, L]``.

        Returns:
            ``[B, P, H]``.
        """
        query = self._heads(self.query(queries))
        key, value = self._heads(self.key(inputs)), self._heads(self.value(inputs))
        p = self.attn_dropout.p if self.training else 0.0
        if p and queries.device.type == "cpu":
            # torch's fused CPU kernel has no dropout, and what it falls back to spends most of its time in Bernoulli.
            scores = torch.matmul(query / math.sqrt(self.attention_head_size), key.transpose(-1, -2)) + attention_mask
            context = torch.matmul(dropout(torch.softmax(scores, dim=-1), p, True), value)
        else:
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, dropout_p=p)
        hidden = self.out_dropout(self.dense(context.transpose(1, 2).flatten(2)))
        return self.LayerNorm(hidden + queries)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_attention_heads, self.attention_head_size)).transpose(1, 2)


def accelerate(model: Module) -> Module:
    """Put RecBole's transformer layers and the dropouts inside ``model`` on faster kernels, in place.

    The parameters and their names, the function computed and the distribution of every dropout stay what they were
    (see :func:`dropout`); only rounding and the order in which random numbers are used change. Layers of other
    classes, RecBole's own variants of attention among them, are left alone.

    Args:
        model: any module.

    Returns:
        The same module.
    """
    modules: Iterator[Any] = model.modules()
    for module in modules:
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
        elif type(module) is MultiHeadAttention:
            module.__class__ = FusedMultiHeadAttention
        elif type(module) is FeedForward:
            # RecBole spells GELU's erf form and swish out in several operations; the other choices are torch's own.
            fused = {"gelu": F.gelu, "swish": F.silu}
            name = getattr(module.intermediate_act_fn, "__name__", "")
            module.intermediate_act_fn = fused.get(name, module.intermediate_act_fn)
    return model


def encode_at(
    encoder: TransformerEncoder, hidden: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """The encoder's last output at some positions, without computing its last layer elsewhere.

    Only keys and values of the last layer need every position; its queries and its feed-forward part do not.

    Args:
        encoder: an encoder that :func:`accelerate` has been through.
        hidden: ``[B, L, H]``.
        mask: what is added to the scores, ``[B or 1, 1, L or 1, L]``.
        positions: int64 ``[B, P]``.

    Returns:
        ``[B, P, H]``, row ``p`` of batch row ``b`` being the full output's row ``positions[b, p]``.
    """
    for layer in encoder.layer[:-1]:
        hidden = layer(hidden, mask)
    last = encoder.layer[-1]
    queries = hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.size(-1)))
    if mask.size(2) != 1:
        rows = positions[:, None, :, None].expand(-1, -1, -1, mask.size(3))
        mask = mask.expand(len(hidden), -1, -1, -1).gather(2, rows)
    return last.feed_forward(last.multi_head_attention.attend(queries, hidden, mask))


def by_length(lengths: torch.Tensor, width: int) -> Iterator[tuple[torch.Tensor | None, int]]:
    """Sort the rows of a padded batch into a few lengths, so that little padding is computed.

    On an accelerator, where a wait for the lengths costs more than padding does, there is one group.

    Args:
        lengths: int64 ``[B]``, the filled positions of each row, all on the left.
        width: the padded length.

    Yields:
        Row numbers (``None``: every row, in place) and the length that holds all of them.
    """
    if lengths.device.type != "cpu" or len(lengths) == 0:
        yield None, width
        return
    longest = max(int(lengths.max()), 1)
    if float(lengths.sum()) > (1 - LITTLE_PADDING) * longest * len(lengths):
        yield None, longest
        return
    group = (lengths * LENGTH_GROUPS + longest - 1).div(longest, rounding_mode="floor").clamp_(min=1)
    for number in range(1, LENGTH_GROUPS + 1):
        rows = (group == number).nonzero().squeeze(1)
        if len(rows):
            yield rows, int(lengths.index_select(0, rows).max().clamp(min=1))


def encode_by_length(
    encode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    sequences: torch.Tensor,
    lengths: torch.Tensor,
    positions: torch.Tensor,
) -> torch.Tensor:
    """Run ``encode`` on the groups of :func:`by_length` and put the rows back in order.

    Args:
        encode: takes sequences ``[b, l]`` and positions ``[b, P]``, returns ``[b, P, H]``; rows do not see each other.
        sequences: int64 ``[B, L]``, padded on the right.
        lengths: int64 ``[B]``.
        positions: int64 ``[B, P]``, each within its row's length.

    Returns:
        ``[B, P, H]``.
    """
    order, outputs = [], []
    for rows, end in by_length(lengths, sequences.size(1)):
        if rows is None:
            return encode(sequences[:, :end], positions)
        order.append(rows)
        outputs.append(encode(sequences.index_select(0, rows)[:, :end], positions.index_select(0, rows)))
    return torch.cat(outputs).index_select(0, torch.cat(order).argsort())


def causal_mask(length: int, like: torch.Tensor) -> torch.Tensor:
    """``[1, 1, length, length]``, zero at and below the diagonal and minus infinity above, like ``like``.

    With the padding on the right, a position that holds an item sees no padding through it.
    """
    return torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu(1)[None, None]
