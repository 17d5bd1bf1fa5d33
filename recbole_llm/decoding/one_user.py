"""One user's search after another, in memory that is made once: for answers while somebody waits.

What all prompts open with is read once, and its keys and values stay; of a user's prompt only the rest is read behind
them. His beams' keys, values and paths, and what attention makes on its way, are written where the last user's were.
What a user is found does not hang on who was asked about before him: nothing but the opening stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from recbole_llm.decoding.path_attention import PathView, Workspace, along_paths, reserve
from recbole_llm.decoding.shared_cache import TOLERANCE, Roomy


class OneUser:
    """A prompt whose beams share keys and values, the next one in the place of the last.

    See :class:`~recbole_llm.decoding.shared_cache.Reader` for what it does. It holds what the weights made of the
    opening: after training a new one is needed.

    Args:
        decoder: a Hugging Face base model that :func:`~recbole_llm.decoding.shared_cache.shares`.
        opening: token ids that prompts begin with; one that leaves them sooner shares what it has of them.
        longest: tokens of the longest prompt. One that is longer has all memory made anew.
        beams: that are read at each step, at most.

    Attributes:
        kept: tokens of the opening whose keys and values stay; 0 where the decoder does not give the same states
            behind kept ones.
        opened: how often the opening has been read.
    """

    def __init__(self, decoder: nn.Module, opening: Sequence[int], longest: int, beams: Sequence[int]) -> None:
        self._decoder, self._longest, self._beams = decoder, longest, list(beams)
        self._opening = torch.tensor(list(opening), dtype=torch.int64, device=next(decoder.parameters()).device)
        if len(opening) and not continues(decoder):
            self._opening = self._opening[:0]
        self.kept, self.opened = len(self._opening), 0
        self._workspace = Workspace()
        self._cache, self._layers = DynamicCache(), list[Roomy]()
        # Of the opening's tokens, those that no prompt has been written over.
        self._whole = 0
        self._prompt, self._depth, self._read = 0, 0, 0

    @torch.no_grad()
    def begin(self, ids: Tensor, lengths: Tensor) -> Self:
        """Read a prompt.

        Args:
            ids: int64 [1, P].
            lengths: int64 [1], P.
        """
        self._prompt, self._depth, self._read, self._lengths = ids.shape[1], 0, 0, lengths
        # The last token is read in any case: its state is asked for.
        most = min(self.kept, self._prompt - 1)
        shared = int((ids[0, :most] == self._opening[:most]).long().cumprod(0).sum())
        self._make_room()
        if self._whole < shared:
            self._read_opening()
        self._whole = shared
        for layer in self._layers:
            layer.crop(shared)
        states = self._decoder(input_ids=ids[:, shared:], past_key_values=self._cache, use_cache=True).last_hidden_state
        self.state = states[:, -1:]
        return self

    def _make_room(self) -> None:
        if self._layers and self._prompt <= self._longest:
            return
        self._longest, self._whole = max(self._longest, self._prompt, self.kept), 0
        config: Any = self._decoder.config
        config = config.get_text_config()
        # A layer's memory is made when its first tokens are taken in, and with it the room behind those.
        first = self.kept or self._prompt
        room = self._longest + sum(self._beams) - first
        self._layers = [Roomy(room) for _ in range(config.num_hidden_layers)]
        self._cache = DynamicCache()
        self._cache.layers.extend(self._layers)
        like, most = next(self._decoder.parameters())[:0], max(self._beams, default=0)
        reserve(self._workspace, config, like, most, self._longest, len(self._beams))
        for name, count in ("paths 0", len(self._beams)), ("paths 1", len(self._beams)), ("depths", 1), ("places", 1):
            self._workspace.take(name, (count * most,), self._opening)

    def _read_opening(self) -> None:
        for layer in self._layers:
            layer.crop(0)
        self._decoder(input_ids=self._opening.unsqueeze(0), past_key_values=self._cache, use_cache=True)
        self.opened += 1

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See :class:`~recbole_llm.decoding.shared_cache.Reader`."""
        depth, beams, take = self._depth, tokens.shape[1], self._workspace.take
        # Two tables in turn, as one is read while the other is written.
        paths = take(f"paths {depth % 2}", (depth + 1, beams), tokens)
        if depth:
            torch.index_select(self._paths, 1, parents[0], out=paths[:depth])
        torch.arange(self._read, self._read + beams, out=paths[depth])
        self._paths, self._depth, self._read = paths, depth + 1, self._read + beams
        depths = take("depths", (1, beams), tokens).fill_(depth + 1)
        with along_paths(self._decoder):
            self.state = self._decoder(
                input_ids=tokens,
                position_ids=take("places", (1, beams), tokens).fill_(self._prompt + depth),
                past_key_values=self._cache,
                use_cache=True,
                path_view=PathView(
                    self._prompt, self._lengths, depths, paths.T.unsqueeze(0), whole=True, workspace=self._workspace
                ),
            ).last_hidden_state
        return self.state

    def buffers(self) -> dict[str, Tensor]:
        """What is kept from one prompt to the next, by name."""
        found = self._workspace.held()
        for number, layer in enumerate(self._layers):
            found |= {f"keys {number}": layer.keys, f"values {number}": layer.values}
        return found


@torch.no_grad()
def continues(decoder: nn.Module) -> bool:
    """Whether a decoder reads a text behind kept keys and values as it reads the whole of it; it is asked itself.

    Args:
        decoder: a Hugging Face base model, in evaluation mode.
    """
    ids = torch.tensor([[1, 2, 3, 4, 5]], device=next(decoder.parameters()).device)
    config: Any = decoder.config
    cache = DynamicCache()
    cache.layers.extend(Roomy(3) for _ in range(config.get_text_config().num_hidden_layers))
    decoder(input_ids=ids[:, :2], past_key_values=cache, use_cache=True)
    behind = decoder(input_ids=ids[:, 2:], past_key_values=cache, use_cache=True).last_hidden_state
    whole = decoder(input_ids=ids, use_cache=False).last_hidden_state[:, 2:]
    error = (behind.float() - whole.float()).norm() / whole.float().norm()
    return bool(error <= TOLERANCE[whole.element_size()])
