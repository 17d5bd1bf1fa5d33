"""Prompts that an encoder reads once, and answers that a decoder writes for many beams each.

The beams of a prompt are positions of one row of the decoder: all of them look at the same keys and values of the
prompt, which are made at the first step and never copied. Of what the decoder has written it keeps the tokens of all
beams, a few positions a step, and a mask lets each beam see its own (:class:`Paths`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

from recbole_llm.decoding.shared_cache import Roomy


class Paths:
    """Which of the tokens that the beams of prompts have had each beam has had: paths in a tree a prompt.

    Args:
        rows: prompts.
        device: of the tensors.

    Attributes:
        seen: bool [B, K, tokens read], a column for each token of any beam.
        steps: of each token read, in which step that was, from 0.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.seen = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        self.steps: list[int] = []

    def grow(self, parents: Tensor) -> int:
        """Let each beam go on by a token of its own.

        Args:
            parents: the beam of the step before that each goes on from, int64 [B, K].

        Returns:
            The number of the step.
        """
        beams = parents.shape[1]
        seen = self.seen.gather(1, parents.unsqueeze(-1).expand(-1, -1, self.seen.shape[-1]))
        own = torch.eye(beams, dtype=torch.bool, device=seen.device).expand(len(seen), -1, -1)
        self.seen = torch.cat((seen, own), dim=-1)
        at = self.steps[-1] + 1 if self.steps else 0
        self.steps += [at] * beams
        return at


class EncodedPrompts:
    """Prompts under way; see :class:`~recbole_llm.decoding.shared_cache.Reader`.

    The decoder's layers are asked one by one: T5 counts positions as they lie in the row, and beams that lie side by
    side stand at one depth.

    Args:
        model: a Hugging Face base model with encoder and decoder (T5), in evaluation mode.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
        room: tokens of beams that will be read at most, over all steps: the sum of their numbers of beams.
    """

    def __init__(self, model: nn.Module, ids: Tensor, lengths: Tensor, room: int) -> None:
        whole: Any = model
        self._decoder = whole.get_decoder()
        own = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        self._read = whole.get_encoder()(input_ids=ids, attention_mask=own).last_hidden_state
        dtype = self._read.dtype
        self._unread = torch.zeros(own.shape, dtype=dtype, device=ids.device)
        self._unread.masked_fill_(~own, torch.finfo(dtype).min)
        layers = len(self._decoder.block)
        written, prompt = DynamicCache(), DynamicCache()
        written.layers.extend(Roomy(room + 1) for _ in range(layers))
        prompt.layers.extend(DynamicLayer() for _ in range(layers))
        self._cache = EncoderDecoderCache(written, prompt)
        # Answers begin with a token of the model's own, which every beam has had.
        self._paths = Paths(len(ids), ids.device)
        start = torch.full((len(ids), 1), whole.config.decoder_start_token_id, device=ids.device)
        self.state = self._step(start, torch.zeros_like(start))

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See :class:`~recbole_llm.decoding.shared_cache.Reader`."""
        self.state = self._step(tokens, parents)
        return self.state

    def keep_rows(self, rows: Tensor) -> None:
        """See :class:`~recbole_llm.decoding.shared_cache.Reader`."""
        self._read, self._unread, self._paths.seen = self._read[rows], self._unread[rows], self._paths.seen[rows]
        self._cache.batch_select_indices(rows)

    def _step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        at, decoder = self._paths.grow(parents), self._decoder
        states = decoder.embed_tokens(tokens)
        hidden = torch.zeros(self._paths.seen.shape, dtype=states.dtype, device=states.device)
        hidden.masked_fill_(~self._paths.seen, torch.finfo(states.dtype).min)
        bias = self._bias(at)
        for block in decoder.block:
            states = block(
                states, hidden.unsqueeze(1), bias, self._read, None, self._unread[:, None, None],
                past_key_values=self._cache,
            )[0]  # fmt: skip
        found: Tensor = decoder.final_layer_norm(states)
        return found

    def _bias(self, at: int) -> Tensor:
        """What attention adds for how far back each token read was, [1, heads, 1, tokens read]; of all layers."""
        attention = self._decoder.block[0].layer[0].SelfAttention
        back = torch.tensor(self._paths.steps, device=self._read.device) - at
        buckets = attention._relative_position_bucket(
            back, bidirectional=False, num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )  # fmt: skip
        found: Tensor = attention.relative_attention_bias(buckets).T[None, :, None]
        return found
