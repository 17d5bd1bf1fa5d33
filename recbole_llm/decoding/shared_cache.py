"""Prompts that are read once and continued by many beams each, over one set of keys and values a prompt.

The beams of a prompt are rows of one sequence: behind the prompt's keys and values lie those of every token that any
of its beams has had, and each beam sees the prompt and its own tokens, a path in the tree of them
(``path_attention.py``). So the prompt is neither copied nor expanded, and when beams are exchanged only the places of
their paths move, no keys and values. Memory grows with the number of beams.
"""

from __future__ import annotations

import inspect
import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from recbole_llm.decoding.path_attention import PathView, along_paths

if TYPE_CHECKING:
    from recbole_llm.decoding.opening import Opening

logger = logging.getLogger("recbole_llm")

# How far states over shared keys and values may be from those of a plain reading, relative, by bytes a number.
TOLERANCE = {8: 1e-6, 4: 1e-3, 2: 5e-2}


def agrees(states: Tensor, plain: Tensor) -> bool:
    """Whether states are those of a plain reading, but for rounding in their type; both of one shape."""
    error = (states.float() - plain.float()).norm() / plain.float().norm()
    return bool(error <= TOLERANCE[plain.element_size()])


class Reader(Protocol):
    """Prompts under way."""

    state: Tensor
    """The state at the last position of each beam, [B, K, hidden]; K is 1 after the prompt."""

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Read one more token a beam.

        Args:
            tokens: the language model's ids, int64 [B, K].
            parents: the beam of the step before that each goes on from, int64 [B, K].

        Returns:
            The new :attr:`state`, [B, K, hidden].
        """

    def keep_rows(self, rows: Tensor) -> None:
        """Go on with some of the prompts; :attr:`state` has them all until the next step.

        Args:
            rows: int64 [n].
        """


class Roomy(DynamicLayer):
    """Keys and values with room behind them, so that taking in new ones copies nothing that is there.

    Args:
        room: positions behind those taken in first.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self._room, self._used = room, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room; called by :meth:`update`."""
        super().lazy_initialization(key_states, value_states)
        rows, heads, length = key_states.shape[:3]
        self.keys = key_states.new_empty(rows, heads, length + self._room, key_states.shape[3])
        self.values = value_states.new_empty(rows, heads, length + self._room, value_states.shape[3])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in ``[B, heads, T, head_dim]`` each and return all there are, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, self._used = self._used, self._used + key_states.shape[-2]
        self.keys[:, :, start : self._used] = key_states
        self.values[:, :, start : self._used] = value_states
        return self.keys[:, :, : self._used], self.values[:, :, : self._used]

    def keep(self, start: int, places: Tensor) -> None:
        """Forget what was taken in from a position on, but for some, which move up.

        Args:
            start: position.
            places: counted from ``start``, int64 [n].
        """
        self._used = start + len(places)
        for held in (self.keys, self.values):
            held[:, :, start : self._used] = held[:, :, start + places]

    def crop(self, max_length: int) -> None:
        """Forget what was taken in from a position on."""
        self._used = min(self._used, max_length)

    def get_seq_length(self) -> int:
        """Positions taken in."""
        return self._used


def windows(config: Any) -> dict[str, int | None]:
    """How far back each kind of a model's layers looks, in positions; ``None`` for all the way."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not kinds:
        return {"sliding_attention" if window else "full_attention": window or None}
    return {kind: window if kind == "sliding_attention" else None for kind in dict.fromkeys(kinds)}


def roomy_cache(decoder: nn.Module, room: int) -> tuple[DynamicCache, list[Roomy]]:
    """A cache for a decoder, with room behind what it takes in first, and its layers."""
    config: Any = decoder.config
    cache, layers = DynamicCache(), [Roomy(room) for _ in range(config.get_text_config().num_hidden_layers)]
    cache.layers.extend(layers)
    return cache, layers


def read_prompts(
    decoder: nn.Module, ids: Tensor, lengths: Tensor, room: int, opening: Opening | None = None
) -> tuple[DynamicCache, Tensor]:
    """Read prompts once.

    Args:
        decoder: a Hugging Face base model.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
        room: places behind the prompts.
        opening: what prompts begin with, as it was read before; of it is taken what all of them have.

    Returns:
        Their keys and values, in layers that are :class:`Roomy`, and the state at the last position of each,
        [B, hidden].
    """
    shared = 0 if opening is None else opening.shared(ids, lengths)
    cache, layers = roomy_cache(decoder, room + ids.shape[1] - shared if shared else room)
    if opening is not None and shared:
        opening.write(layers, len(ids), 0, shared)
    # No position sees what follows it, so the filling needs no mask.
    states = decoder(input_ids=ids[:, shared:], past_key_values=cache, use_cache=True).last_hidden_state
    last = (lengths - 1 - shared).view(-1, 1, 1).expand(-1, 1, states.shape[-1])
    return cache, states.gather(1, last).squeeze(1)


class SharedPrompts:
    """Prompts whose beams share keys and values; see :class:`Reader`.

    Args:
        decoder: a Hugging Face base model that :func:`shares`.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
        room: tokens of beams that will be read at most, over all steps: the sum of their numbers of beams.
        opening: see :func:`read_prompts`.
    """

    def __init__(
        self, decoder: nn.Module, ids: Tensor, lengths: Tensor, room: int, opening: Opening | None = None
    ) -> None:
        self._decoder, self._lengths = decoder, lengths
        self._cache, state = read_prompts(decoder, ids, lengths, room, opening)
        self.state = state.unsqueeze(1)
        self._prompt = ids.shape[1]
        # The places behind the prompts of the tokens that each beam has had, [B, K, steps], and how many there are.
        self._paths = lengths.new_empty(len(ids), 1, 0)
        self._read = 0

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See :class:`Reader`."""
        rows, beams = tokens.shape
        own = torch.arange(self._read, self._read + beams, device=tokens.device).expand(rows, -1).unsqueeze(-1)
        before = self._paths.gather(1, parents.unsqueeze(-1).expand(-1, -1, self._paths.shape[-1]))
        self._paths, self._read = torch.cat((before, own), dim=-1), self._read + beams
        depths = torch.full((1, beams), self._paths.shape[-1], device=tokens.device)
        with along_paths(self._decoder):
            self.state = self._decoder(
                input_ids=tokens,
                position_ids=self._lengths.unsqueeze(1) + depths - 1,
                past_key_values=self._cache,
                use_cache=True,
                path_view=PathView(self._prompt, self._lengths, depths, self._paths),
            ).last_hidden_state
        return self.state

    def keep_rows(self, rows: Tensor) -> None:
        """See :class:`Reader`."""
        self._lengths, self._paths = self._lengths[rows], self._paths[rows]
        self._cache.batch_select_indices(rows)


def last_states(decoder: nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
    """The state at the last position of each of several texts a row, all of them read.

    Args:
        decoder: a Hugging Face base model.
        ids: int64 [B, K, T], filled up on the right with any token.
        lengths: int64 [B, K], or [B, 1] where those of a row are of one length; of a text of none the state means
            nothing.

    Returns:
        [B, K, hidden].
    """
    rows, count, length = ids.shape
    states = decoder(input_ids=ids.reshape(-1, length), use_cache=False).last_hidden_state
    last = (lengths - 1).clamp(min=0).expand(rows, count).reshape(-1, 1, 1)
    return states.gather(1, last.expand(-1, 1, states.shape[-1])).view(rows, count, -1)


class WholePrompts:
    """Prompts that are read anew at every step, once a beam; see :class:`Reader`.

    For models that remember more than keys and values (Mamba), or count positions in a way of their own.

    Args:
        decoder: a Hugging Face base model.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
        room: plays no part.
    """

    def __init__(self, decoder: nn.Module, ids: Tensor, lengths: Tensor, room: int = 0) -> None:
        self._decoder, self._ids, self._lengths = decoder, ids.unsqueeze(1), lengths
        self.state = last_states(decoder, self._ids, lengths.unsqueeze(1))

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """See :class:`Reader`."""
        ids = self._ids.gather(1, parents.unsqueeze(-1).expand(-1, -1, self._ids.shape[-1]))
        ids = torch.cat((ids, tokens.unsqueeze(-1)), dim=-1)
        place = self._lengths.view(-1, 1, 1).expand(-1, ids.shape[1], 1)
        self._ids = ids.scatter(2, place, tokens.unsqueeze(-1))
        self._lengths = self._lengths + 1
        self.state = last_states(self._decoder, self._ids, self._lengths.unsqueeze(1))
        return self.state

    def keep_rows(self, rows: Tensor) -> None:
        """See :class:`Reader`."""
        self._ids, self._lengths = self._ids[rows], self._lengths[rows]


def shares(decoder: nn.Module) -> bool:
    """Whether a decoder's states over shared keys and values are those that it has when it reads each beam alone.

    Asked of the model itself, with two short prompts of two beams: architectures differ in what they make of positions
    and masks that they are given. Where they are not, the log says so.

    Args:
        decoder: a Hugging Face base model, in evaluation mode.
    """
    found = _agrees_with_itself(decoder)
    if not found:
        logger.info("a %s cannot share its prompts among beams: each beam reads its own", type(decoder).__name__)
    return found


@torch.no_grad()
def _agrees_with_itself(decoder: nn.Module) -> bool:
    config: Any = decoder.config
    known = inspect.signature(decoder.forward).parameters
    if not {"past_key_values", "position_ids", "attention_mask"} <= set(known):
        return False
    if getattr(config, "_attn_implementation", None) not in ("sdpa", "eager"):
        return False
    if not set(windows(config.get_text_config())) <= {"full_attention", "sliding_attention"}:
        return False
    device = next(decoder.parameters()).device
    prompts, lengths = torch.tensor([[1, 2, 3], [2, 4, 0]], device=device), torch.tensor([3, 2], device=device)
    steps = [([[5, 6], [6, 1]], [[0, 0], [0, 0]]), ([[3, 5], [2, 3]], [[1, 0], [0, 0]])]
    readers: tuple[Reader, Reader] = (
        SharedPrompts(decoder, prompts, lengths, 4),
        WholePrompts(decoder, prompts, lengths),
    )
    try:
        for tokens, parents in steps:
            for reader in readers:
                reader.step(torch.tensor(tokens, device=device), torch.tensor(parents, device=device))
    except TypeError:
        # What its layers are given does not reach attention.
        return False
    return agrees(*(reader.state for reader in readers))
