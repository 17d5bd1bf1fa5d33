"""Soft tokens in the prompt of a frozen causal LM, with the prompt's fixed opening run once for all rows.

What GLTA needs of its language model is the last layer's state at a few response slots. Hence:

- soft tokens are written into the input embeddings in one step, whatever their number and places;
- the tokens before the first soft token are the same for every row and depend on nothing that is trained: they run
  once, with one row and without gradients, and their keys and values are lent to every row of every batch. Nothing
  after them is kept: gradients flow through it;
- rows are filled up on the right. Under a causal mask no real position sees the filling, so no padding mask is needed;
- the decoder has no vocabulary head, so none runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


def embed_with_soft_tokens(embed_tokens: nn.Module, ids: Tensor, soft: Tensor) -> Tensor:
    """Input embeddings of ids of which some stand for soft tokens.

    Args:
        embed_tokens: the language model's frozen token embedding.
        ids: int64 ``[B, T]``; ``>= 0`` is a token, ``-1 - r`` is row ``r`` of ``soft``.
        soft: ``[R, H]``, any floating type; gradients flow into it.

    Returns:
        ``[B, T, H]`` in the language model's type.
    """
    flat = ids.reshape(-1)
    with torch.no_grad():
        text = embed_tokens(flat.clamp_min(0))
    places = (flat < 0).nonzero().squeeze(1)
    rows = soft[-1 - flat[places]].to(text.dtype)
    return text.index_put((places,), rows).view(*ids.shape, -1)


class _LentLayer(DynamicLayer):
    """Keys and values that are read with new ones behind them and never take those in.

    With gradient checkpointing a layer runs again in the backward pass and must find what it found the first time.
    """

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The lent states and the new ones, ``[B, heads, P + T, head_dim]``."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class SoftPromptDecoder:
    """Runs the prompts of one template through a frozen decoder.

    Args:
        decoder: a Hugging Face base decoder (``LlamaModel``, ``GPT2Model``, …), in eval mode, without LM head.
        embed_tokens: its token embedding.
        prefix: the token ids that open every prompt; may be empty.
    """

    def __init__(self, decoder: nn.Module, embed_tokens: nn.Module, prefix: Sequence[int]) -> None:
        self.decoder = decoder
        self.embed_tokens = embed_tokens
        self.prefix = tuple(prefix)
        self._shared: dict[tuple[torch.device, torch.dtype, torch.dtype | None], list[tuple[Tensor, Tensor]]] = {}

    @torch.no_grad()
    def _prefix_states(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[1, heads, P, head_dim]`` of the prefix by layer, worked out once a device and type."""
        # Under autocast (mixed precision) the states are in its type; what is ranked afterwards must not read those.
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (device, dtype, autocast)
        if key not in self._shared:
            # Not made from the model's config: a sliding-window cache would keep only a window's tail of the prefix.
            cache = DynamicCache()
            ids = torch.tensor([self.prefix], device=device)
            self.decoder(inputs_embeds=self.embed_tokens(ids), past_key_values=cache, use_cache=True)
            self._shared[key] = [(layer.keys, layer.values) for layer in cache.layers]
        return self._shared[key]

    def _lend(self, embeds: Tensor, kind: type[DynamicLayer]) -> DynamicCache:
        """The prefix as a cache for a batch, as views; the decoder adds to it without touching the shared states."""
        cache = DynamicCache()
        if self.prefix:
            rows = len(embeds)
            for keys, values in self._prefix_states(embeds.device, embeds.dtype):
                layer = kind()
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1)
                cache.layers.append(layer)
        return cache

    def states(self, ids: Tensor, soft: Tensor, places: Tensor) -> Tensor:
        """Last-layer states at some places of each prompt.

        Args:
            ids: int64 ``[B, T]``, the prompts after the prefix, filled up on the right with any token.
            soft: ``[R, H]``, the soft tokens that negative ids name.
            places: int64 ``[B, S]``, positions within ``ids``.

        Returns:
            ``[B, S, H]`` in the language model's type.
        """
        embeds = embed_with_soft_tokens(self.embed_tokens, ids, soft)
        past = self._lend(embeds, _LentLayer) if self.prefix else None
        hidden = self.decoder(inputs_embeds=embeds, past_key_values=past, use_cache=False).last_hidden_state
        return hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    @torch.no_grad()
    def stream(self, ids: Tensor, soft: Tensor, lengths: Tensor) -> Stream:
        """Open prompts that go on one input vector at a time (autoregressive inference).

        Args:
            ids: int64 ``[B, T]`` as in :meth:`states`.
            soft: ``[R, H]``.
            lengths: int64 ``[B]``, each row's true length within ``ids``, at least 1.

        Returns:
            The open prompts; :attr:`Stream.state` is the state at each row's last position.
        """
        embeds = embed_with_soft_tokens(self.embed_tokens, ids, soft)
        seen = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        mask = torch.cat([seen.new_ones(len(ids), len(self.prefix)), seen], dim=1)
        cache = self._lend(embeds, DynamicLayer)
        hidden = self.decoder(inputs_embeds=embeds, past_key_values=cache, use_cache=True).last_hidden_state
        state = hidden[torch.arange(len(ids), device=ids.device), lengths - 1]
        return Stream(self.decoder, cache, mask, lengths + len(self.prefix), state, embeds.dtype)


class Stream:
    """Prompts under way: the cache of what was read, and the state at each row's last position."""

    def __init__(
        self, decoder: nn.Module, cache: DynamicCache, mask: Tensor, length: Tensor, state: Tensor, dtype: torch.dtype
    ) -> None:
        self._decoder, self._cache, self._mask, self._length, self._dtype = decoder, cache, mask, length, dtype
        self.state = state

    @torch.no_grad()
    def step(self, inputs: Tensor) -> Tensor:
        """Read one more input vector a row, ``[B, H]``, and return the new :attr:`state`, ``[B, H]``."""
        # The filling of shorter rows stays in the cache, hence the mask; each row goes on at its own position.
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        out = self._decoder(
            inputs_embeds=inputs.unsqueeze(1).to(self._dtype),
            attention_mask=self._mask.long(),
            position_ids=self._length.unsqueeze(1),
            past_key_values=self._cache,
            use_cache=True,
        )
        self._length = self._length + 1
        self.state = out.last_hidden_state[:, 0]
        return self.state
