"""How the nodes of a tree of prompts attend: as rows, as bins of prompts that open alike, or all at once on a GPU.

The nodes of a tree (:class:`~recbole_llm.backbone.packed.Tree`) are numbered so that each comes before all below it and
these are neighbours. So a node sees another if and only if that is not behind it and it is not behind the other's end:
two comparisons of numbers say what a mask of B prompts by their tokens would. A bin is a run of prompts in the tree's
order: the way to the first, then what each of the others adds. B prompts of T tokens cost ``B T^2`` as rows and
``G W^2`` in G bins of W nodes, which for the prefixes of a user is less by about as many times as he has prefixes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# Queries that attend at once in a bin; what stands behind a chunk, none of its queries sees, and it is not read.
CHUNK = 256
# What a pair costs in bins beside one in rows; and, in such pairs, what taking a node's query, key and value costs and
# putting back what comes of them. Measured on a CPU (4 heads of 64, forward and backward): pairs 0.9 to 1.05, as chunks
# skip about as much as the causal mask does; a node 150.
MASKED, TAKEN = 1.1, 150.0
# How many times the nodes of the longest prompt a bin may have; which is best is counted.
WIDTHS = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)


@dataclass(frozen=True)
class Layout:
    """Where nodes stand while they attend.

    Attributes:
        nodes: int64 ``[G, W]``, the node at each place of each bin; any at places that are none.
        owners: int64 ``[N]``, a place that each node has, by number in ``[G, W]``.
        ends: int64 ``[G, W]``, the first node that does not see the place; 0 at places that are none. ``None``, bins
            are rows under the causal mask.
        places: int64 ``[G, W]``, each one's place within its prompts; ``None`` likewise.
    """

    nodes: Tensor
    owners: Tensor
    ends: Tensor | None = None
    places: Tensor | None = None
    _masks: dict[Any, Tensor | None] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> Layout:
        """The same on a device."""
        if self.ends is None or self.places is None:
            return Layout(self.nodes.to(device), self.owners.to(device))
        return Layout(self.nodes.to(device), self.owners.to(device), self.ends.to(device), self.places.to(device))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None, **kwargs: Any
    ) -> Tensor:
        """Attention of nodes, ``[1, heads, N, D]`` each.

        Args:
            module: the layer's.
            query, key, value: of the nodes.
            window: how many tokens back a node sees; ``None``, all.
            **kwargs: of ``sdpa_attention_forward``.

        Returns:
            ``[1, N, heads, D]``.
        """
        query, key, value = self._unfold(query), self._unfold(key), self._unfold(value)
        width = query.shape[2]
        chunk = width if self.ends is None else CHUNK
        made = []
        for start in range(0, width, chunk):
            stop = min(start + chunk, width)
            mask = self._mask(start, stop, window, query.dtype)
            parts = (query[:, :, start:stop], key[:, :, :stop], value[:, :, :stop])
            made.append(sdpa_attention_forward(module, *parts, mask, **kwargs)[0])
        whole = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        return whole.flatten(0, 1).index_select(0, self.owners).unsqueeze(0)

    def _unfold(self, states: Tensor) -> Tensor:
        """Queries, keys or values ``[1, heads, N, D]`` of nodes by bin: ``[G, heads, W, D]``."""
        bins, width = self.nodes.shape
        heads, _, size = states.shape[1:]
        # As rows of a table: of torch's ways to gather the one whose gradient is the fastest.
        taken = functional.embedding(self.nodes, states[0].transpose(0, 1).flatten(1))
        return taken.view(bins, width, heads, size).transpose(1, 2)

    def _mask(self, start: int, stop: int, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the logits of the queries ``start:stop``, by place before ``stop``: all layers have it."""
        asked = (start, window, dtype)
        if asked not in self._masks:
            seen = self.sees(start, stop, window)
            if seen is not None:
                seen = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, -torch.inf)
            self._masks[asked] = seen
        return self._masks[asked]

    def sees(self, start: int, stop: int, window: int | None) -> Tensor | None:
        """Which places the queries ``start:stop`` see of those before ``stop``.

        Returns:
            bool ``[G or 1, 1, stop - start, stop]``; ``None``, as the causal mask says.
        """
        if self.ends is None or self.places is None:
            if window is None or window >= self.nodes.shape[1]:
                return None
            places = torch.arange(stop, device=self.nodes.device)
            back = places[start:].unsqueeze(1) - places
            return ((back >= 0) & (back < window)).view(1, 1, *back.shape)
        looking = self.nodes[:, start:stop].unsqueeze(2)
        seen = (self.nodes[:, None, :stop] <= looking) & (looking < self.ends[:, None, :stop])
        if window is not None:
            seen &= self.places[:, start:stop].unsqueeze(2) - self.places[:, None, :stop] < window
        return seen.unsqueeze(1)


@dataclass(frozen=True)
class Whole:
    """All nodes at once by FlexAttention, which skips blocks in which none sees another.

    Attributes:
        ends: int64 ``[N]``, from :func:`ends_of`.
        places: int64 ``[N]``, each node's place within its prompts.
    """

    ends: Tensor
    places: Tensor
    _masks: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def to(self, device: torch.device | str) -> Whole:
        """The same on a device."""
        return Whole(self.ends.to(device), self.places.to(device))

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: int | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        """See :meth:`Layout.attend`; without dropout. Kernels are compiled on a GPU alone."""
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        attention = _compiled() if query.is_cuda else flex_attention
        grouped = query.shape[1] != key.shape[1]
        # Under autocast what is rotated stays float32 beside values of half precision.
        query, key = query.to(value.dtype), key.to(value.dtype)
        made = attention(query, key, value, block_mask=self._masks[window], scale=scaling, enable_gqa=grouped)
        return made.transpose(1, 2)

    def _mask(self, window: int | None) -> Any:
        ends, places, count = self.ends, self.places, len(self.ends)

        def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            seen = (key <= query) & (query < ends[key])
            return seen if window is None else seen & (places[query] - places[key] < window)

        return create_block_mask(sees, None, None, count, count, device=str(ends.device))


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=True)


def ends_of(nodes: Tensor, lengths: Tensor, count: int) -> Tensor:
    """The first number behind each node and all below it: int64 ``[count]``.

    Args:
        nodes: int64 ``[B, T]``, of each token of each prompt.
        lengths: int64 ``[B]``.
        count: nodes.
    """
    last = nodes.gather(1, lengths.unsqueeze(1) - 1)
    inside = torch.arange(nodes.shape[1]) < lengths.unsqueeze(1)
    found = torch.zeros(count, dtype=torch.long)
    return found.scatter_reduce(0, nodes[inside], last.expand_as(nodes)[inside], "amax") + 1


def laid_out(tree: Any, lengths: Tensor) -> Layout:
    """Rows or bins, whichever is less work as counted.

    Args:
        tree: of prompts; on the CPU.
        lengths: int64 ``[B]``, of the prompts.
    """
    rows, longest = tree.nodes.shape
    # Prompts in the tree's order: by the number of their last node.
    order = tree.nodes.gather(1, lengths.unsqueeze(1) - 1).squeeze(1).argsort(stable=True)
    own = torch.bincount(tree.owners // longest, minlength=rows)[order].tolist()
    whole = lengths[order].tolist()
    least, best = _cost(rows, longest, 1.0), None
    for width in (int(times * longest) for times in WIDTHS):
        firsts, sizes = _bins(whole, own, width)
        cost = _cost(len(firsts), max(sizes), MASKED)
        if cost < least:
            least, best = cost, (firsts, sizes)
        if len(firsts) == 1:
            break
    if best is None:
        return Layout(tree.nodes, tree.owners)
    return _binned(tree, lengths, order, own, *best)


def _cost(count: int, width: int, pair: float) -> float:
    return count * (pair * width**2 + TAKEN * width)


def _bins(whole: list[int], own: list[int], width: int) -> tuple[list[int], list[int]]:
    """Which prompts open a bin when none has more nodes than ``width``, and how many each has.

    Args:
        whole: tokens of each prompt, in the tree's order.
        own: those that no prompt before it has.
        width: at least the longest's.
    """
    firsts, sizes = [0], [whole[0]]
    for row in range(1, len(whole)):
        if sizes[-1] + own[row] > width:
            firsts.append(row)
            sizes.append(whole[row])
        else:
            sizes[-1] += own[row]
    return firsts, sizes


def _binned(tree: Any, lengths: Tensor, order: Tensor, own: list[int], firsts: list[int], sizes: list[int]) -> Layout:
    width = max(sizes)
    begins = torch.tensor([0, *own]).cumsum(0)
    nodes = torch.zeros(len(firsts), width, dtype=torch.long)
    owners = torch.empty(len(tree.places), dtype=torch.long)
    for number, (first, stop) in enumerate(zip(firsts, [*firsts[1:], len(own)], strict=True)):
        row = order[first]
        path = tree.nodes[row, : lengths[row]]
        # What the first shares with those before it, then a run of numbers.
        begin, end = int(begins[first]), int(begins[stop])
        shared = path[path < begin]
        nodes[number, : sizes[number]] = torch.cat((shared, torch.arange(begin, end)))
        owners[begin:end] = number * width + len(shared) + torch.arange(end - begin)
    there = torch.arange(width) < torch.tensor(sizes).unsqueeze(1)
    # A place that is none looks where the bin's first does, so that it sees something.
    nodes = torch.where(there, nodes, nodes[:, :1])
    ends = ends_of(tree.nodes, lengths, len(tree.places))
    return Layout(nodes, owners, torch.where(there, ends[nodes], 0), tree.places[nodes])
