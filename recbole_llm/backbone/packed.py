"""Prompts of a training batch as one sequence without filling, in which what several of them open with stands once.

All prompts of a batch form a tree: they open with the same wrapper, those of one template with the same wording, those
of one history with its items. Whatever a decoder does position by position (projections, feed-forward layers, norms) is
done once for each node of that tree. Attention alone unfolds it, into rows under the plain causal mask, or, where that
is less work, into bins of prompts under the tree's own (:mod:`~recbole_llm.backbone.tree_attention`). Of the last layer
only the states that the loss reads are wanted, so its feed-forward part runs for those. Every state is what it would be
if each prompt were read alone, and so is every gradient; only LoRA's dropout is drawn once for a shared node.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from recbole_llm.backbone.tree_attention import Layout, Whole, ends_of, laid_out
from recbole_llm.decoding.shared_cache import agrees, windows

ATTENTION = "recbole_llm_packed"


@dataclass(frozen=True)
class Tree:
    """How prompts lie in one sequence.

    Attributes:
        nodes: int64 ``[B, T]``, where each token of each prompt is in the sequence; any node behind a prompt's end.
        places: int64 ``[N]``, the place of each node within its prompts.
        owners: int64 ``[N]``, a token that each node is of, by number in ``[B, T]``.
    """

    nodes: Tensor
    places: Tensor
    owners: Tensor

    @classmethod
    def of(cls, ids: Tensor, lengths: Tensor) -> Tree:
        """Fold prompts that open alike.

        Args:
            ids: int64 ``[B, T]``, filled up on the right with any token; on the CPU.
            lengths: int64 ``[B]``, at least 1.
        """
        columns = torch.arange(ids.shape[1])
        inside = columns < lengths.unsqueeze(1)
        keys = ids.masked_fill(~inside, -1)
        order = torch.from_numpy(np.lexsort(keys.numpy().T[::-1]))
        keys, inside = keys[order], inside[order]
        # In order, a prompt shares with the one before it what it shares with any before it.
        shared = (keys[1:] == keys[:-1]).cumprod(1).bool()
        own = inside.clone()
        own[1:] &= ~shared
        number = own.flatten().cumsum(0).view_as(keys) - 1
        # The node of a shared token is the last one above it in its column.
        nodes = number.masked_fill(~own, -1).cummax(0).values.clamp(min=0)
        unsorted = torch.empty_like(nodes)
        unsorted[order] = nodes
        rows, places = own.nonzero(as_tuple=True)
        return cls(unsorted, places, order[rows] * ids.shape[1] + places)


def lengths_of(ids: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Tokens of each prompt up to the last whose state is asked for.

    Args:
        ids: int64 ``[B, T]``.
        rows, places: int64 ``[L]``, where states are asked for.

    Returns:
        int64 ``[B]``; 0 where none is.
    """
    return torch.zeros(len(ids), dtype=torch.long).scatter_reduce(0, rows, places + 1, "amax")


class PackedReader:
    """Reads the states at some places of many prompts.

    A decoder that does not give the same states this way as it does row by row is read row by row: it is asked itself.

    Args:
        decoder: a Hugging Face base model in evaluation mode, whatever of it trains.
    """

    def __init__(self, decoder: nn.Module) -> None:
        self._decoder, self._flex = decoder, next(decoder.parameters()).is_cuda
        self.packs = _may_pack(decoder) and self._agrees()

    def states(self, ids: Tensor, rows: Tensor, places: Tensor, device: torch.device | str | None = None) -> Tensor:
        """Last-layer states.

        Args:
            ids: int64 ``[B, T]``, filled up on the right with any token; on the CPU.
            rows: int64 ``[L]``; each prompt comes at least once.
            places: int64 ``[L]``; nothing behind a prompt's last place is read.
            device: the decoder's, where it is not the CPU.

        Returns:
            ``[L, H]``, in the decoder's type.
        """
        device = ids.device if device is None else device
        if not self.packs:
            return self._row_by_row(ids, rows, places, device)
        states, read, which = self._packed(ids, rows, places, device)
        return states.index_select(0, read[which])

    def read(
        self, ids: Tensor, rows: Tensor, places: Tensor, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Last-layer states, those that several prompts share once.

        Args:
            ids, rows, places, device: as for :meth:`states`.

        Returns:
            ``[R, H]``, in the decoder's type; which of them is asked for by each row and place, int64 ``[L]``.
        """
        device = ids.device if device is None else device
        if not self.packs:
            return self._row_by_row(ids, rows, places, device), torch.arange(len(rows), device=device)
        states, read, which = self._packed(ids, rows, places, device)
        return states.index_select(0, read), which

    def _row_by_row(self, ids: Tensor, rows: Tensor, places: Tensor, device: torch.device | str) -> Tensor:
        states: Tensor = self._decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        return states[rows.to(device), places.to(device)]

    def _packed(
        self, ids: Tensor, rows: Tensor, places: Tensor, device: torch.device | str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The states of all nodes, [N, H], those asked for, int64 [R], and which of these each place is, int64 [L]."""
        lengths = lengths_of(ids, rows, places)
        tree = Tree.of(ids[:, : int(lengths.max())], lengths)
        read, which = (one.to(device) for one in tree.nodes[rows, places].unique(return_inverse=True))
        packed = Packed(self._decoder, read, self._attention(tree, lengths).to(device))
        flat = ids[:, : tree.nodes.shape[1]].flatten()[tree.owners].to(device)
        with packed.reading():
            states = self._decoder(
                input_ids=flat.unsqueeze(0), position_ids=tree.places.to(device).unsqueeze(0), use_cache=False,
                packed=packed,
            ).last_hidden_state[0]  # fmt: skip
        return states, read, which

    def _attention(self, tree: Tree, lengths: Tensor) -> Layout | Whole:
        """How the nodes of a tree attend."""
        if self._flex:
            return Whole(ends_of(tree.nodes, lengths, len(tree.places)), tree.places)
        return laid_out(tree, lengths)

    @torch.no_grad()
    def _agrees(self) -> bool:
        device = next(self._decoder.parameters()).device
        ids = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 5, 4], [1, 2, 3, 0, 0], [2, 1, 0, 0, 0]])
        rows, places = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([1, 4, 1, 4, 2, 1])
        whole = self._decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
        expected = whole[rows.to(device), places.to(device)]
        self.packs = True
        for flex in dict.fromkeys((self._flex, False)):
            self._flex = flex
            try:
                found = self.states(ids, rows, places, device)
            except TypeError:
                # What its layers are given does not reach attention.
                return False
            except RuntimeError:
                # No kernel of FlexAttention can be made here.
                if not flex:
                    raise
                continue
            if agrees(found, expected):
                return True
        return False


class Packed:
    """A batch on its way through a decoder; handed to every layer.

    Args:
        decoder: the model.
        read: int64 ``[R]``, nodes whose last states are read, ascending.
        attention: how nodes attend.
    """

    def __init__(self, decoder: nn.Module, read: Tensor, attention: Layout | Whole) -> None:
        self._read, self.attention = read, attention
        self._config: Any = decoder.config
        layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
        last = getattr(layers[-1], "mlp", None) if layers else None
        # A feed-forward part that someone else has wrapped is left alone.
        self._mlp: Any = last if isinstance(last, nn.Module) and "forward" not in vars(last) else None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While it lasts the decoder attends by the tree; entered anew where layers run again in the backward pass."""
        before, mlp = self._config._attn_implementation, self._mlp
        outer = mlp is not None and "forward" not in vars(mlp)
        self._config._attn_implementation = ATTENTION
        if outer:
            mlp.forward = self._where_read
        try:
            yield
        finally:
            self._config._attn_implementation = before
            if outer:
                del mlp.forward

    def _where_read(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The last layer's feed-forward part, of which the rest reads nothing elsewhere: zeros."""
        forward = type(self._mlp).forward
        made = forward(self._mlp, hidden.index_select(1, self._read), *args, **kwargs)
        return made.new_zeros(hidden.shape).index_copy(1, self._read, made)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, packed: Packed,
    sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of transformers' interface over a :class:`Packed` batch; see ``sdpa_attention_forward`` there."""
    return packed.attention.attend(module, query, key, value, sliding_window, **kwargs), None


AttentionInterface.register(ATTENTION, attend)


def _may_pack(decoder: Any) -> bool:
    """Whether positions of a decoder meet in attention alone, and that is transformers' own over keys and values."""
    config = decoder.config
    return (
        getattr(config, "_attn_implementation", None) == "sdpa"
        and "position_ids" in inspect.signature(decoder.forward).parameters
        and set(windows(config.get_text_config())) <= {"full_attention", "sliding_attention"}
    )
