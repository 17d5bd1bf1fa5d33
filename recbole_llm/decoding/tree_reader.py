"""Prompts behind which a decoder reads a whole tree of tokens, in pieces, each node once.

A piece is a run of nodes in the tree's depth-first order, so whatever stands above one of its nodes is in the piece or
on the path to its first node. Behind the prompts' keys and values lie therefore those of that path and of the piece,
and each node sees its prompt and the nodes above it (``path_attention.py``). What a piece leaves behind is cut down to
the path that the next one needs: memory is that of one piece, however large the tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from recbole_llm.decoding.path_attention import PathView, along_paths
from recbole_llm.decoding.shared_cache import Roomy, last_states, read_prompts
from recbole_llm.errors import UserError

if TYPE_CHECKING:
    from recbole_llm.decoding.beam_search import BeamSearch
    from recbole_llm.decoding.opening import Opening


class TreeReader(Protocol):
    """Prompts whose tree is being read."""

    state: Tensor
    """The state at the last position of each prompt, [B, hidden]."""

    def read(self, tokens: Tensor, depths: Tensor, above: Tensor) -> Tensor:
        """Read the next piece.

        Args:
            tokens: the language model's ids of the nodes, int64 [C]; [B, C] where each prompt has its own.
            depths: tokens that lead to each node, its own among them, int64 like ``tokens``.
            above: which nodes each one sees, itself among them: of the path kept before, and of the piece, bool
                [C, A + C]; [B, C, A + C] where each prompt has its own.

        Returns:
            States of the nodes, [B, C, hidden].
        """

    def keep(self, places: Tensor) -> None:
        """Forget all but some nodes.

        Args:
            places: among the A + C of the last piece, ascending, int64 [A'];
                none at all where each prompt has nodes of its own.
        """


def tree_behind(search: BeamSearch, prompts: Sequence[Sequence[int]], room: int) -> TreeReader:
    """A reader of the tree of a search's items behind prompts.

    Args:
        search: whose decoder reads.
        prompts: the language model's token ids of each row.
        room: see :class:`SharedTree`.

    Raises:
        UserError: see :meth:`~recbole_llm.decoding.beam_search.BeamSearch.lay_out`.
    """
    ids, lengths = search.lay_out(prompts)
    if search.shares_prompts:
        return SharedTree(search.decoder, ids, lengths, room, search.opening)
    return WholeTree(search.decoder, ids, lengths)


def check_nodes(nodes: int) -> None:
    """Refuse a number of nodes to read at once that is none."""
    if nodes < 1:
        raise UserError(f"tree_nodes is {nodes}; at least 1 node is read at a time")


class SharedTree:
    """A tree over prompts whose keys and values are read once; see :class:`TreeReader`.

    Args:
        decoder: a Hugging Face base model that :func:`~recbole_llm.decoding.shared_cache.shares`.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
        room: nodes of a path and a piece together, at most.
        opening: see :func:`~recbole_llm.decoding.shared_cache.read_prompts`.
    """

    def __init__(
        self, decoder: nn.Module, ids: Tensor, lengths: Tensor, room: int, opening: Opening | None = None
    ) -> None:
        self._decoder, self._lengths = decoder, lengths
        self._cache, self.state = read_prompts(decoder, ids, lengths, room, opening)
        self._prompt = ids.shape[1]

    def read(self, tokens: Tensor, depths: Tensor, above: Tensor) -> Tensor:
        """See :class:`TreeReader`."""
        rows, nodes = len(self._lengths), tokens.shape[-1]
        with along_paths(self._decoder):
            states: Tensor = self._decoder(
                input_ids=tokens.expand(rows, -1),
                position_ids=self._lengths.unsqueeze(1) + depths - 1,
                past_key_values=self._cache,
                use_cache=True,
                path_view=PathView(self._prompt, self._lengths, depths.view(-1, nodes), paths_of(above)),
            ).last_hidden_state
        return states

    def keep(self, places: Tensor) -> None:
        """See :class:`TreeReader`."""
        for layer in self._cache.layers:
            assert isinstance(layer, Roomy)
            layer.keep(self._prompt, places)


class WholeTree:
    """A tree over prompts that are read anew for every node; see :class:`TreeReader`.

    For models that remember more than keys and values (Mamba), or count positions in a way of their own.

    Args:
        decoder: a Hugging Face base model.
        ids: the prompts, filled up on the right with any token, int64 [B, P].
        lengths: int64 [B], each at least 1.
    """

    def __init__(self, decoder: nn.Module, ids: Tensor, lengths: Tensor) -> None:
        self._decoder, self._ids, self._lengths = decoder, ids, lengths
        self._tokens = lengths.new_empty(len(ids), 0)
        self.state = last_states(decoder, ids.unsqueeze(1), lengths.unsqueeze(1))[:, 0]

    def read(self, tokens: Tensor, depths: Tensor, above: Tensor) -> Tensor:
        """See :class:`TreeReader`."""
        rows, nodes = len(self._ids), tokens.shape[-1]
        self._tokens = torch.cat((self._tokens, tokens.expand(rows, -1)), dim=1)
        depths, places = depths.expand(rows, -1), paths_of(above).expand(rows, -1, -1)
        paths = self._tokens.gather(1, places.clamp(min=0).flatten(1)).view(places.shape)
        ids = torch.cat((self._ids, self._ids.new_zeros(rows, paths.shape[2])), dim=1).unsqueeze(1).repeat(1, nodes, 1)
        behind = self._lengths.view(-1, 1, 1) + torch.arange(paths.shape[2], device=paths.device)
        ids.scatter_(2, behind.expand(-1, nodes, -1), paths)
        return last_states(self._decoder, ids, self._lengths.unsqueeze(1) + depths)

    def keep(self, places: Tensor) -> None:
        """See :class:`TreeReader`."""
        self._tokens = self._tokens[:, places]


def paths_of(above: Tensor) -> Tensor:
    """Which nodes each one sees, one after the other.

    Args:
        above: whether it sees each, these in such an order that what stands above comes first, bool [..., C, N].

    Returns:
        int64 [R, C, D], R being 1 where there is no first dimension; -1 behind a path's end.
    """
    above = above.view(-1, *above.shape[-2:])
    row, node, place = above.nonzero(as_tuple=True)
    order = above.cumsum(-1)[row, node, place] - 1
    paths = torch.full((*above.shape[:2], int(above.sum(-1).max())), -1, device=above.device)
    paths[row, node, order] = place
    return paths
