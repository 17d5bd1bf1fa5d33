"""Attention of many continuations of a prompt: each sees the prompt and, of all that was read behind it, its own path.

A mask over everything that was read would let each see the same, but it is as wide as the continuations are many, and
so is the work. Here a continuation's own keys and values are gathered, as many as its path is long: work and memory
grow with the number of continuations, and the prompt's keys and values are neither copied nor expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "recbole_llm_paths"


@dataclass(frozen=True)
class PathView:
    """What each of K tokens behind B prompts sees. R is B, or 1 where all prompts have the same tokens.

    Attributes:
        room: places that the prompts take in the keys and values, P.
        lengths: of the prompts, int64 [B]; the first so many places are theirs.
        depths: how many tokens there are from the prompt's end to each, itself among them, int64 [R, K].
        paths: the places, counted behind the prompts', of the tokens that each sees, from the prompt on and itself the
            last, int64 [R, K, D]; -1 behind a path's end.
    """

    room: int
    lengths: Tensor
    depths: Tensor
    paths: Tensor

    def seen(self, window: int | None) -> Tensor:
        """Which places of the prompt and of its path each token sees.

        Args:
            window: how far back, in positions; ``None`` for all the way.

        Returns:
            bool [B, 1, K or 1, 1, P + D].
        """
        places = torch.arange(self.room, device=self.lengths.device)
        prompt = (places < self.lengths.unsqueeze(1)).unsqueeze(1)
        path = self.paths >= 0
        if window is not None:
            first = (self.depths - window).unsqueeze(-1)
            prompt = prompt & (places > self.lengths.view(-1, 1, 1) - 1 + first)
            path = path & (torch.arange(1, path.shape[2] + 1, device=places.device) > first)
        rows, count = len(self.lengths), self.paths.shape[1]
        both = torch.cat((prompt.expand(rows, count, -1), path.expand(rows, -1, -1)), dim=-1)
        return both.unsqueeze(1).unsqueeze(3)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, path_view: PathView,
    scaling: float | None = None, softcap: float | None = None, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers' interface as :class:`PathView` has it.

    Args:
        module: the layer's.
        query: [B, heads, K, size].
        key, value: of the prompts and of all that was read behind them, [B, key heads, P + T, size].
        attention_mask: plays no part.
        path_view: what each token sees.
        scaling: of the scores; one over the root of ``size`` if ``None``.
        softcap: Gemma 2's ``softcap * tanh(scores / softcap)``.
        sliding_window: how far back this layer looks.
        kwargs: what other kinds of attention are told.

    Returns:
        [B, K, heads, size].
    """
    rows, heads, count, size = query.shape
    shared, room = key.shape[1], path_view.room
    scaling = size**-0.5 if scaling is None else scaling
    # Query heads of one key head side by side: they read the same keys.
    asked = query.view(rows, shared, heads // shared, count, size).transpose(2, 3)
    flat = asked.reshape(rows, shared, -1, size)
    behind = path_view.paths.clamp(min=0).expand(rows, -1, -1)
    length = behind.shape[2]
    chosen = behind.reshape(rows, 1, -1, 1).expand(-1, shared, -1, size)
    own_key, own_value = (
        held[:, :, room:].gather(2, chosen).view(rows, shared, count, length, size) for held in (key, value)
    )
    prompt = (flat @ key[:, :, :room].transpose(2, 3)).view(rows, shared, count, -1, room)
    scores = torch.cat((prompt, asked @ own_key.transpose(3, 4)), dim=-1).mul_(scaling)
    if softcap is not None:
        scores = scores.div_(softcap).tanh_().mul_(softcap)
    scores = scores.masked_fill_(~path_view.seen(sliding_window), torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    made = weights[..., :room].reshape(rows, shared, -1, room) @ value[:, :, :room]
    made = made.view(asked.shape) + weights[..., room:] @ own_value
    return made.permute(0, 2, 1, 3, 4).reshape(rows, count, heads, size), None


AttentionInterface.register(ATTENTION, attend)


@contextmanager
def along_paths(decoder: nn.Module) -> Iterator[None]:
    """While it lasts, a decoder attends by the ``path_view`` that it is given."""
    own: Any = decoder.config
    config = own.get_text_config()
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
