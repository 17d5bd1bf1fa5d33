"""Soft tokens in the prompt of a frozen causal LM, with the prompt's fixed opening run once for all rows.

What GLTA needs of its language model is the last layer's state at a few response slots. Hence:

- soft tokens are written into the input embeddings in one step, whatever their number and places;
- the tokens before the first soft token are the same for every row: they run with one row, and their keys and values
  are lent to every row of a batch. Behind a frozen model they depend on nothing that is trained, so one run without
  gradients serves every batch. Where the model trains too (an adapter), training reads each prompt in one piece, and
  each batch that is ranked has a run of its own. Nothing after them is kept: gradients flow through it;
- rows are filled up on the right. Under a causal mask no real position sees the filling, so no padding mask is needed;
- the decoder has no vocabulary head, so none runs.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer


@torch.no_grad()
def token_scale(embed_tokens: nn.Module) -> float:
    """Root mean square of what the language model's layers read for a token, over the vocabulary.

    Soft tokens enter beside the tokens' vectors, so this is their size. It is not always the table's: Gemma's embedding
    module multiplies its rows by the root of the width.

    Args:
        embed_tokens: the language model's token embedding.
    """
    table: Any = embed_tokens.weight
    vectors = embed_tokens(torch.arange(len(table), device=table.device))
    return float(vectors.float().square().mean().sqrt())


def embed_with_soft_tokens(embed_tokens: nn.Module, ids: Tensor, soft: Tensor) -> Tensor:
    """Input embeddings of ids of which some stand for soft tokens.

    Args:
        embed_tokens: the language model's token embedding; gradients flow into it where it trains.
        ids: int64 ``[B, T]``; ``>= 0`` is a token, ``-1 - r`` is row ``r`` of ``soft``.
        soft: ``[R, H]``, any floating type; gradients flow into it.

    Returns:
        ``[B, T, H]`` in the language model's type.
    """
    flat = ids.reshape(-1)
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
        trained: whether weights of the decoder train, so that the prefix's states are never the same for long.
    """

    def __init__(
        self, decoder: nn.Module, embed_tokens: nn.Module, prefix: Sequence[int], trained: bool = False
    ) -> None:
        self.decoder = decoder
        self.embed_tokens = embed_tokens
        self.prefix = tuple(prefix)
        self.trained = trained
        config: Any = decoder.config
        self._lends = _keeps_only_keys_and_values(decoder, config)
        # Windows and chunks are counted in places of the cache, filling included, so a stream may not outgrow one.
        spans = (getattr(config, "sliding_window", None), getattr(config, "attention_chunk_size", None))
        self._room = min((span for span in spans if span), default=None)
        self._shared: dict[tuple[torch.device, torch.dtype, torch.dtype | None], list[tuple[Tensor, Tensor]]] = {}

    def _prefix_states(self, device: torch.device, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """Keys and values ``[1, heads, P, head_dim]`` of the prefix by layer; once a device and type where frozen."""
        if self.trained:
            return self._run_prefix(device)
        # Under autocast (mixed precision) the states are in its type; what is ranked afterwards must not read those.
        autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        key = (device, dtype, autocast)
        if key not in self._shared:
            with torch.no_grad():
                self._shared[key] = self._run_prefix(device)
        return self._shared[key]

    def read_prefix(self) -> None:
        """Read the prefix now, where one reading serves every batch: the first of them finds it read."""
        if self.prefix and self._lends and not self.trained:
            table: Any = self.embed_tokens.weight
            self._prefix_states(table.device, table.dtype)

    def _run_prefix(self, device: torch.device) -> list[tuple[Tensor, Tensor]]:
        # Not made from the model's config: a sliding-window cache would keep only a window's tail of the prefix.
        cache = DynamicCache()
        ids = torch.tensor([self.prefix], device=device)
        self.decoder(inputs_embeds=self.embed_tokens(ids), past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers]

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
        return self._read(embed_with_soft_tokens(self.embed_tokens, ids, soft), places)

    def _read(self, embeds: Tensor, places: Tensor) -> Tensor:
        """Last-layer states ``[B, S, H]`` at places of prompts whose embeddings after the prefix are given."""
        past: DynamicCache | None = None
        # A cache that takes part in the gradient could not be filled a second time, as gradient checkpointing does.
        whole = not self._lends or (self.trained and torch.is_grad_enabled())
        if self.prefix and not whole:
            past = self._lend(embeds, _LentLayer)
        elif self.prefix:
            ids = torch.tensor([self.prefix], device=embeds.device)
            embeds = torch.cat([self.embed_tokens(ids).expand(len(embeds), -1, -1), embeds], dim=1)
            places = places + len(self.prefix)
        given = {} if past is None else {"past_key_values": past}
        hidden = self.decoder(inputs_embeds=embeds, use_cache=False, **given).last_hidden_state
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
        return Stream(self, embed_with_soft_tokens(self.embed_tokens, ids, soft), lengths)


def _keeps_only_keys_and_values(decoder: nn.Module, config: Any) -> bool:
    """Whether keys and values a layer are all that a model remembers of what it has read.

    Layers with a state of another kind (linear attention, convolutions) or with the keys of another layer cannot be
    lent a prefix; such models read every prompt in one piece.
    """
    kinds = set(getattr(config, "layer_types", None) or ())
    return (
        "past_key_values" in inspect.signature(decoder.forward).parameters
        and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}
        and not getattr(config, "num_kv_shared_layers", 0)
    )


class SoftTokenMean:
    """Reads no language model at all: the state at a place is the mean of the soft tokens up to it.

    The control that tells what the head and the projectors do by themselves; it stands where
    :class:`SoftPromptDecoder` does.
    """

    def states(self, ids: Tensor, soft: Tensor, places: Tensor) -> Tensor:
        """See :meth:`SoftPromptDecoder.states`; zero at a place with no soft token before it."""
        flat = ids.reshape(-1)
        at = (flat < 0).nonzero().squeeze(1)
        tokens = soft.new_zeros(len(flat), soft.shape[1]).index_put((at,), soft[-1 - flat[at]])
        counts = (ids < 0).cumsum(1).clamp_min(1).unsqueeze(-1)
        means = tokens.view(*ids.shape, -1).cumsum(1) / counts
        return means.gather(1, places.unsqueeze(-1).expand(-1, -1, means.shape[-1]))


class Stream:
    """Prompts under way, with the state ``[B, H]`` at each row's last position in :attr:`state`.

    What was read is kept as keys and values; where that cannot be, each step reads the prompts again.

    Args:
        reader: of the prompts.
        embeds: ``[B, T, H]``, the prompts after the prefix, filled up on the right.
        lengths: int64 ``[B]``, each row's true length within them.
    """

    @torch.no_grad()
    def __init__(self, reader: SoftPromptDecoder, embeds: Tensor, lengths: Tensor) -> None:
        self._reader, self._embeds, self._lengths = reader, embeds, lengths
        self._rows = torch.arange(len(embeds), device=embeds.device)
        prefix, places = len(reader.prefix), torch.arange(embeds.shape[1], device=embeds.device)
        seen = places < lengths.unsqueeze(1)
        self._mask = torch.cat([seen.new_ones(len(embeds), prefix), seen], dim=1)
        self._cache: DynamicCache | None = None
        if self._may_keep():
            self._cache = reader._lend(embeds, DynamicLayer)
            hidden = reader.decoder(inputs_embeds=embeds, past_key_values=self._cache, use_cache=True).last_hidden_state
            self.state = hidden[self._rows, lengths - 1]
        else:
            self.state = reader._read(embeds, lengths.unsqueeze(1) - 1)[:, 0]

    def _may_keep(self) -> bool:
        room = self._reader._room
        return self._reader._lends and (room is None or self._mask.shape[1] <= room)

    @torch.no_grad()
    def step(self, inputs: Tensor) -> Tensor:
        """Read one more input vector a row, ``[B, H]``, and return the new :attr:`state`, ``[B, H]``."""
        inputs = inputs.to(self._embeds.dtype)
        self._embeds = torch.cat([self._embeds, torch.zeros_like(inputs).unsqueeze(1)], dim=1)
        self._embeds[self._rows, self._lengths] = inputs
        # The filling of shorter rows stays in the cache, hence the mask; each row goes on at its own position.
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], dim=1)
        if self._cache is not None and self._may_keep():
            self.state = self._reader.decoder(
                inputs_embeds=inputs.unsqueeze(1),
                attention_mask=self._mask.long(),
                position_ids=(self._lengths + len(self._reader.prefix)).unsqueeze(1),
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state[:, 0]
        else:
            self._cache = None
            self.state = self._reader._read(self._embeds, self._lengths.unsqueeze(1))[:, 0]
        self._lengths = self._lengths + 1
        return self.state
