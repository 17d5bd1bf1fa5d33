"""Attention of many continuations of a prompt: each sees the prompt and, of all that was read behind it, its own path.

A mask over everything that was read would let each see the same, but it is as wide as the continuations are many, and
so is the work. Here a continuation's own keys and values are gathered, as many as its path is long: work and memory
grow with the number of continuations, and the prompt's keys and values are neither copied nor expanded.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

ATTENTION = "recbole_llm_paths"


class Workspace:
    """Memory that attention writes into instead of asking for new at every layer and step.

    What is made in it holds until the next thing of the same name is.
    """

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Memory of a shape, uninitialised, in the type and place of a tensor; made only where none is large enough.

        Args:
            name: whose it is.
            shape: how large.
            like: says what type of numbers, and on which device.
        """
        held, count = self._held.get(name), prod(shape)
        if held is None or len(held) < count or held.dtype != like.dtype or held.device != like.device:
            held = self._held[name] = like.new_empty(count)
        return held[:count].view(shape)

    def held(self) -> dict[str, Tensor]:
        """All of it, by name, flat."""
        return dict(self._held)


@dataclass(frozen=True)
class PathView:
    """What each of K tokens behind B prompts sees. R is B, or 1 where all prompts have the same tokens.

    Attributes:
        room: places that the prompts take in the keys and values, P.
        lengths: of the prompts, int64 [B]; the first so many places are theirs.
        depths: how many tokens there are from the prompt's end to each, itself among them, int64 [R, K].
        paths: the places, counted behind the prompts', of the tokens that each sees, from the prompt on and itself the
            last, int64 [R, K, D]; -1 behind a path's end.
        whole: whether prompts fill their room and paths have no end before D, so that only a window hides anything.
        workspace: memory to attend in; by itself, the layers' that are given this view.
    """

    room: int
    lengths: Tensor
    depths: Tensor
    paths: Tensor
    whole: bool = False
    workspace: Workspace = field(default_factory=Workspace, compare=False)
    # By window, as the layers ask for the same.
    _hidden: dict[int | None, Tensor | None] = field(default_factory=dict, init=False, compare=False)

    def hidden(self, window: int | None) -> Tensor | None:
        """Which places of the prompt and of its path each token does not see.

        Args:
            window: how far back, in positions; ``None`` for all the way.

        Returns:
            bool [B, 1, K or 1, 1, P + D]; ``None`` where there are none.
        """
        if window not in self._hidden:
            near = window is None or self.room + self.paths.shape[2] <= window
            self._hidden[window] = None if self.whole and near else ~self._seen(window)
        return self._hidden[window]

    def _seen(self, window: int | None) -> Tensor:
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
    take = path_view.workspace.take
    own_key, own_value = (
        torch.gather(held[:, :, room:], 2, chosen, out=take(name, chosen.shape, held)).view(
            rows, shared, count, length, size
        )
        for name, held in (("keys", key), ("values", value))
    )
    prompt = take("prompt", (*flat.shape[:3], room), query)
    torch.matmul(flat, key[:, :, :room].transpose(2, 3), out=prompt)
    prompt = prompt.view(rows, shared, count, -1, room)
    scores = take("scores", (*prompt.shape[:4], room + length), query)
    torch.cat((prompt, asked @ own_key.transpose(3, 4)), dim=-1, out=scores).mul_(scaling)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    hidden = path_view.hidden(sliding_window)
    if hidden is not None:
        scores.masked_fill_(hidden, torch.finfo(scores.dtype).min)
    weights = take("weights", scores.shape, scores.new_empty(0, dtype=torch.float32))
    torch.softmax(scores, dim=-1, dtype=torch.float32, out=weights)
    if weights.dtype != query.dtype:
        weights = scores.copy_(weights)
    made = weights[..., :room].reshape(rows, shared, -1, room) @ value[:, :, :room]
    made = made.view(asked.shape) + weights[..., room:] @ own_value
    return made.permute(0, 2, 1, 3, 4).reshape(rows, count, heads, size), None


AttentionInterface.register(ATTENTION, attend)


def reserve(workspace: Workspace, config: Any, like: Tensor, count: int, places: int, length: int) -> None:
    """Have a workspace hold what :func:`attend` will want of it for one prompt.

    Args:
        workspace: to make memory in.
        config: of the text model; layers that differ from it get their memory when they ask.
        like: says what type of numbers, and on which device.
        count: continuations at most.
        places: of the longest prompt.
        length: of the longest path.
    """
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    shared, size = getattr(config, "num_key_value_heads", heads), getattr(config, "head_dim", None) or size
    whole = count * heads * (places + length)
    for name, wanted, of in (
        ("keys", count * length * shared * size, like), ("values", count * length * shared * size, like),
        ("prompt", count * heads * places, like), ("scores", whole, like), ("weights", whole, like.float()),
    ):  # fmt: skip
        workspace.take(name, (wanted,), of)


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
