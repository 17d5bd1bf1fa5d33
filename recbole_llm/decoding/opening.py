"""What all prompts open with, read once: its keys and values stand before those of every prompt."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recbole_llm.decoding.shared_cache import Roomy, agrees, roomy_cache


class Opening:
    """Keys and values of tokens that prompts open with.

    They are what the weights made of them: after training a new one is needed.

    Args:
        decoder: a Hugging Face base model whose memory is keys and values alone, in evaluation mode.
        tokens: ids.

    Attributes:
        tokens: int64 [O], on the decoder's device; none where the decoder does not read the same behind kept keys and
            values as it does in one piece, which it is asked itself.
    """

    @torch.no_grad()
    def __init__(self, decoder: nn.Module, tokens: Sequence[int]) -> None:
        device = next(decoder.parameters()).device
        self.tokens = torch.tensor(list(tokens), dtype=torch.int64, device=device)
        if len(tokens) and not continues(decoder):
            self.tokens = self.tokens[:0]
        self._layers: list[tuple[Tensor, Tensor]] = []
        if len(self.tokens):
            cache, layers = roomy_cache(decoder, 0)
            decoder(input_ids=self.tokens.unsqueeze(0), past_key_values=cache, use_cache=True)
            self._layers = [(layer.keys, layer.values) for layer in layers]

    def shared(self, ids: Tensor, lengths: Tensor) -> int:
        """How many tokens all prompts have of it, but for the last of each, whose state is asked for.

        Args:
            ids: the prompts, filled up on the right, int64 [B, P].
            lengths: int64 [B], each at least 1.
        """
        most = min(len(self.tokens), int(lengths.min()) - 1)
        return int((ids[:, :most] == self.tokens[:most]).all(0).long().cumprod(0).sum())

    def write(self, layers: Sequence[Roomy], rows: int, start: int, stop: int) -> None:
        """Write some of it behind what layers hold.

        Args:
            layers: the decoder's.
            rows: prompts.
            start, stop: which tokens.
        """
        for layer, pair in zip(layers, self._layers, strict=True):
            layer.update(*(held[:, :, start:stop].expand(rows, -1, -1, -1) for held in pair))


@torch.no_grad()
def continues(decoder: nn.Module) -> bool:
    """Whether a decoder reads a text behind kept keys and values as it reads the whole of it.

    Args:
        decoder: a Hugging Face base model, in evaluation mode.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5]], device=next(decoder.parameters()).device)
    cache, _ = roomy_cache(decoder, 3)
    decoder(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
    behind = decoder(input_ids=ids[:, 2:], past_key_values=cache, use_cache=True).last_hidden_state
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 2:]
    return agrees(behind, whole)
