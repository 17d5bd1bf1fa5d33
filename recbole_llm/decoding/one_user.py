"""One user's search after another, in memory that is made once: for answers while somebody waits.

What all prompts open with stays (``opening.py``); of a user's prompt only the rest is read behind it. The beams' keys,
values and paths, and what attention makes on its way, are written where the last user's were. What a user is found does
not hang on who was asked about before: nothing but the opening stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from recbole_llm.decoding.opening import Opening
from recbole_llm.decoding.path_attention import PathView, Workspace, along_paths, reserve
from recbole_llm.decoding.shared_cache import Roomy, roomy_cache


class OneUser:
    """A prompt whose beams share keys and values, the next one in the place of the last.

    See :class:`~recbole_llm.decoding.shared_cache.Reader` for what it does.

    Args:
        decoder: a Hugging Face base model that :func:`~recbole_llm.decoding.shared_cache.shares`.
        opening: what prompts begin with; one that leaves it sooner shares what it has of it.
        longest: tokens of the longest prompt. One that is longer has all memory made anew.
        beams: that are read at each step, at most.
    """

    def __init__(self, decoder: nn.Module, opening: Opening, longest: int, beams: Sequence[int]) -> None:
        self._decoder, self._opening, self._longest, self._beams = decoder, opening, longest, list(beams)
        self._workspace = Workspace()
        self._cache, self._layers = DynamicCache(), list[Roomy]()
        # How much of the opening stands there.
        self._opened = 0
        self._prompt, self._depth, self._read = 0, 0, 0
        self._paths, self.state = torch.empty(0), torch.empty(0)

    @torch.no_grad()
    def begin(self, ids: Tensor, lengths: Tensor) -> Self:
        """Read a prompt.

        Args:
            ids: int64 [1, P].
            lengths: int64 [1], P.
        """
        self._prompt, self._depth, self._read, self._lengths = ids.shape[1], 0, 0, lengths
        shared = self._opening.shared(ids, lengths)
        if not self._layers or self._prompt > self._longest:
            self._make_room(shared or self._prompt)
        for layer in self._layers:
            layer.crop(min(shared, self._opened))
        if shared > self._opened:
            # A prompt that left it was written over it.
            self._opening.write(self._layers, 1, self._opened, shared)
        self._opened = shared
        states = self._decoder(input_ids=ids[:, shared:], past_key_values=self._cache, use_cache=True).last_hidden_state
        self.state = states[:, -1:]
        return self

    def _make_room(self, first: int) -> None:
        """Make all memory.

        Args:
            first: tokens that layers will take in first; their memory is made then, with the room behind those.
        """
        self._longest, self._opened = max(self._longest, self._prompt), 0
        self._cache, self._layers = roomy_cache(self._decoder, self._longest + sum(self._beams) - first)
        config: Any = self._decoder.config
        like, most = next(self._decoder.parameters())[:0], max(self._beams, default=0)
        reserve(self._workspace, config.get_text_config(), like, most, self._longest, len(self._beams))
        for name, count in ("paths 0", len(self._beams)), ("paths 1", len(self._beams)), ("depths", 1), ("places", 1):
            self._workspace.take(name, (count * most,), self._lengths)

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

    def keep_rows(self, rows: Tensor) -> None:
        """Its one row stays: a search is over where nothing can change in that."""

    def buffers(self) -> dict[str, Tensor]:
        """What is kept from one prompt to the next, by name."""
        found = self._workspace.held()
        for number, layer in enumerate(self._layers):
            found |= {f"keys {number}": layer.keys, f"values {number}": layer.values}
        return found
