"""The trie of all items' tokens as flat arrays: a node is a range of the items sorted by their tokens.

Legal next tokens, the items below a prefix, sums over them and masks are array operations on any device, with no loop
over batch, beam or item. Nodes are numbered breadth first from the root 0, so a node's children are neighbours, and
their tokens ascend; -1 stands for no node everywhere. No operation waits for the device unless its text says so.
"""

from __future__ import annotations

import copy
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch

from recbole_llm.itemid.trie_arrays import build

if TYPE_CHECKING:
    from recbole_llm.itemid.exclusion import Exclusion
    from recbole_llm.itemid.item_tokens import ItemTokens

# Masks of the first depths are kept whole, as far as they fit into so many bytes: few nodes there, and nearly every
# token is legal, so that on a CPU one look-up is many times as fast as writing each row's tokens.
WHOLE_MASK_BYTES = 2**21


class Trie:
    """The sorted map of items to tokens.

    I is the number of items that have tokens, N that of nodes, V that of tokens in the vocabulary.

    Args:
        item_tokens: the map.
        tie_order: all item ids in the order in which items of equal tokens are to stand, int64 [n_items]; by id if
            ``None``.

    Attributes:
        order: items sorted by their tokens, equal ones neighbours, int64 [I].
        positions: the place of each item in the order, int64 [n_items]; -1 for items without tokens.
        starts, ends: the places of a node's items are ``starts[n]`` to ``ends[n] - 1``, int64 [N].
        tokens: the token that leads to a node, int64 [N]; -1 at the root.
        child_offsets: a node's children are the nodes ``child_offsets[n]`` to ``child_offsets[n + 1] - 1``, int64
            [N + 1]; none at a leaf, where items end.
        edges: parent * V + token of every node but the root, ascending, int64 [N - 1].
        level_bounds: the nodes of depth d are ``level_bounds[d]`` to ``level_bounds[d + 1] - 1``; one number more than
            depths.
        widths: most children of a node, by depth.
        size: V.

    Raises:
        UserError: the tokens of one item are the beginning of another's.
    """

    def __init__(self, item_tokens: ItemTokens, tie_order: torch.Tensor | None = None) -> None:
        offsets = item_tokens.offsets.cpu().numpy()
        items = np.arange(item_tokens.n_items) if tie_order is None else tie_order.cpu().numpy().astype(np.int64)
        items = items[np.diff(offsets)[items] > 0]
        made = build(offsets, item_tokens.tokens.cpu().numpy(), item_tokens.size, items)
        children = np.diff(made.child_offsets)
        positions = np.full(item_tokens.n_items, -1, dtype=np.int64)
        positions[made.order] = np.arange(len(made.order))

        self.size = item_tokens.size
        self.level_bounds: tuple[int, ...] = tuple(made.level_bounds.tolist())
        self.widths: tuple[int, ...] = tuple(np.maximum.reduceat(children, made.level_bounds[:-1]).tolist())
        self.order = torch.from_numpy(made.order)
        self.positions = torch.from_numpy(positions)
        self.starts = torch.from_numpy(made.starts)
        self.ends = torch.from_numpy(made.ends)
        self.tokens = torch.from_numpy(made.tokens)
        self.child_offsets = torch.from_numpy(made.child_offsets)
        self.edges = torch.from_numpy(made.parents[1:] * self.size + made.tokens[1:])
        self._to(item_tokens.tokens.device)

    def _to(self, device: torch.device | str) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, torch.Tensor):
                vars(self)[name] = value.to(device)

    def to(self, device: torch.device | str) -> Trie:
        """A copy whose tensors are on a device."""
        made = copy.copy(self)
        made._to(device)
        return made

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.order.device

    @property
    def nbytes(self) -> int:
        """What the tensors take."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, torch.Tensor))

    def __len__(self) -> int:
        return len(self.tokens)

    # Where a node is.

    @property
    def parents(self) -> torch.Tensor:
        """The node above each node, int64 [N]; -1 for the root."""
        return torch.cat((self.edges.new_full((1,), -1), self.edges // max(self.size, 1)))

    def depths(self, nodes: torch.Tensor) -> torch.Tensor:
        """How many tokens lead to each node.

        Args:
            nodes: int64 [...].

        Returns:
            int64 [...]; -1 for -1.
        """
        return torch.bucketize(nodes, torch.tensor(self.level_bounds, device=nodes.device), right=True) - 1

    @cached_property
    def leaf_nodes(self) -> torch.Tensor:
        """The nodes where items end, in the order of the items, int64 [leaves].

        Waits for the device when first read.
        """
        found = (self.child_offsets.diff() == 0).nonzero().squeeze(1)
        found = found[self.ends[found] > self.starts[found]]  # the root of no items is not one
        return found[self.starts[found].argsort()]

    @cached_property
    def leaves(self) -> torch.Tensor:
        """The node at which each item ends, int64 [n_items]; -1 for items without tokens.

        Waits for the device when first read.
        """
        starts, ends = self.ranges(self.leaf_nodes)
        found = torch.full_like(self.positions, -1)
        found[self.order] = self.leaf_nodes.repeat_interleave(ends - starts, output_size=len(self.order))
        return found

    def is_leaf(self, nodes: torch.Tensor) -> torch.Tensor:
        """Whether items end at each node.

        Args:
            nodes: int64 [...].

        Returns:
            bool [...]; false for -1.
        """
        safe = nodes.clamp(min=0)
        return (nodes >= 0) & (self.child_offsets[safe] == self.child_offsets[safe + 1]) & (self.ends[safe] > 0)

    # Going down.

    def step(self, nodes: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """One token further.

        Args:
            nodes: int64 [...].
            tokens: of our vocabulary, int64, of a shape that goes with the nodes'; anything else is illegal.

        Returns:
            The child that the token leads to, int64 of the common shape; -1 where the token is illegal.
        """
        legal = (nodes >= 0) & (tokens >= 0) & (tokens < self.size)
        if not len(self.edges):
            return torch.where(legal, -1, -1)
        # One search among all edges: they are sorted, as nodes are numbered by their parents and then by their tokens.
        keys = nodes * self.size + tokens
        found = torch.searchsorted(self.edges, keys).clamp(max=len(self.edges) - 1)
        return torch.where(legal & (self.edges[found] == keys), found + 1, -1)

    def walk(self, tokens: torch.Tensor) -> torch.Tensor:
        """The nodes that sequences of tokens pass.

        Args:
            tokens: int64 [..., L], filled up with -1.

        Returns:
            int64 [..., L + 1]: the root, then the node after each token; -1 from the first illegal token on, and the
            last node again where a sequence has ended.
        """
        nodes = [torch.zeros(tokens.shape[:-1], dtype=torch.int64, device=tokens.device)]
        for column in tokens.unbind(dim=-1):
            nodes.append(torch.where(column == -1, nodes[-1], self.step(nodes[-1], column)))
        return torch.stack(nodes, dim=-1)

    def items_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The item that each sequence of tokens stands for; of several equal ones the first in the order.

        Args:
            tokens: int64 [..., L], filled up with -1.

        Returns:
            Internal ids, int64 [...]; -1 where no item has just these tokens.
        """
        nodes = self.walk(tokens)[..., -1]
        if not len(self.order):
            return torch.full_like(nodes, -1)
        places = self.starts[nodes.clamp(min=0)]
        return torch.where(self.is_leaf(nodes), self.order[places], -1)

    # What is legal.

    def _children(self, nodes: torch.Tensor, depth: int | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each node's children side by side.

        Returns:
            Children int64 [..., W], the last one again in places that a node does not need, and any node where it has
            none; whether a place is needed, bool [..., W]; whether the node has children, bool [..., 1].
        """
        # For -1 these are the last offset and the first: an empty range, like a leaf's.
        first, end = self.child_offsets[nodes], self.child_offsets[nodes + 1]
        if depth is not None:
            width = self.widths[depth]
        else:
            width = max(int((end - first).max()), 0) if nodes.numel() else 0
        first, end = first.unsqueeze(-1), end.unsqueeze(-1)
        children = first + torch.arange(width, device=nodes.device)
        return torch.minimum(children, end - 1), children < end, end > first

    def legal(
        self, nodes: torch.Tensor, exclude: Exclusion | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The legal next tokens of all nodes, one after the other.

        Waits for the device, as their number is part of the answer.

        Args:
            nodes: int64 [R], or [B, ...] with an exclusion of B rows; -1 has none.
            exclude: makes a token legal only while an item that the row may be shown stands below it.

        Returns:
            Three int64 tensors of one length, by row and then by token: the place of the node among ``nodes`` read row
            by row, the token, and the child that it leads to.
        """
        flat = nodes.reshape(-1)
        first = self.child_offsets[flat]
        counts = (self.child_offsets[flat + 1] - first).clamp(min=0)
        row = torch.arange(len(flat), device=nodes.device).repeat_interleave(counts)
        within = torch.arange(len(row), device=nodes.device) - (counts.cumsum(0) - counts)[row]
        child = first[row] + within
        if exclude is not None:
            left = exclude.left_of(row // max(nodes[:1].numel(), 1), child) > 0
            row, child = row[left], child[left]
        return row, self.tokens[child], child

    def legal_padded(
        self, nodes: torch.Tensor, depth: int | None = None, exclude: Exclusion | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The legal next tokens of each node, side by side.

        Args:
            nodes: int64 [...]; [B, ...] with an exclusion of B rows; -1 has none.
            depth: of all of them, but for -1 and leaves; ``None`` if they differ or it is not known (which waits for
                the device).
            exclude: makes a token legal only while an item that the row may be shown stands below it.

        Returns:
            Tokens and children, int64 [..., W] each, tokens ascending; -1 in places that are illegal or unused. W is
            ``widths[depth]``, or what the widest of these nodes needs.
        """
        children, needed, _ = self._children(nodes, depth)
        if exclude is not None:
            needed = needed & (exclude.left(children) > 0)
        return torch.where(needed, self.tokens[children], -1), torch.where(needed, children, -1)

    def _columns(
        self, nodes: torch.Tensor, lm_ids: torch.Tensor | None, depth: int | None, exclude: Exclusion | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Columns int64 [..., W] of a vocabulary and whether each is legal: the same is said of one named twice."""
        children, _, legal = self._children(nodes, depth)
        legal = legal.expand_as(children) if exclude is None else legal & (exclude.left(children) > 0)
        tokens = self.tokens[children].clamp(min=0)
        return (tokens if lm_ids is None else lm_ids[tokens]), legal

    def mask(
        self,
        nodes: torch.Tensor,
        *,
        lm_ids: torch.Tensor | None = None,
        size: int | None = None,
        depth: int | None = None,
        exclude: Exclusion | None = None,
    ) -> torch.Tensor:
        """Which tokens are legal next, over a whole vocabulary.

        Args:
            nodes: int64 [...]; [B, ...] with an exclusion of B rows; -1 has none.
            lm_ids: the language model's id of each of our tokens, int64 [V]; the columns are our own tokens if
                ``None``.
            size: of the vocabulary that the mask is over; V if ``None``.
            depth: as for :meth:`legal_padded`.
            exclude: as for :meth:`legal_padded`.

        Returns:
            bool [..., size].
        """
        if depth is not None and depth < self._whole_depths and lm_ids is None and size is None and exclude is None:
            return self._whole_masks[nodes]
        mask = torch.zeros(*nodes.shape, self.size if size is None else size, dtype=torch.bool, device=nodes.device)
        return mask.scatter_(-1, *self._columns(nodes, lm_ids, depth, exclude))

    def mask_logits_(
        self,
        logits: torch.Tensor,
        nodes: torch.Tensor,
        *,
        lm_ids: torch.Tensor | None = None,
        depth: int | None = None,
        exclude: Exclusion | None = None,
    ) -> torch.Tensor:
        """Set the logits of illegal tokens to -inf, in place and in one pass over them.

        A row without a legal token becomes -inf throughout.

        Args:
            logits: float [..., size of the vocabulary]; not part of a graph that is differentiated.
            nodes: int64, of the logits' shape but for the last dimension.
            lm_ids: as for :meth:`mask`.
            depth: as for :meth:`legal_padded`.
            exclude: as for :meth:`legal_padded`.

        Returns:
            ``logits``.
        """
        columns, legal = self._columns(nodes, lm_ids, depth, exclude)
        kept = logits.gather(-1, columns).masked_fill_(~legal, -torch.inf)
        return logits.fill_(-torch.inf).scatter_(-1, columns, kept)

    @cached_property
    def _whole_depths(self) -> int:
        """How many depths have their masks kept whole."""
        return sum((bound + 1) * self.size <= WHOLE_MASK_BYTES for bound in self.level_bounds[1:])

    @cached_property
    def _whole_masks(self) -> torch.Tensor:
        """The masks of the nodes of the first depths, and a last one without a legal token, where -1 leads."""
        nodes = torch.arange(self.level_bounds[self._whole_depths] + 1, device=self.device)
        nodes[-1] = -1
        return self.mask(nodes)

    @cached_property
    def _levelwise(self) -> torch.Tensor:
        used = torch.zeros(len(self.level_bounds) - 1, self.size, dtype=torch.bool, device=self.device)
        used[self.depths(torch.arange(1, len(self), device=self.device)) - 1, self.tokens[1:]] = True
        return used

    def levelwise_mask(self, depths: torch.Tensor) -> torch.Tensor:
        """Which tokens any item has at a depth, whatever came before.

        LC-Rec's constraint, under which a search can end at tokens that are no item's.

        Args:
            depths: tokens chosen so far, int64 [...].

        Returns:
            bool [..., V]; all false from the longest item's end on.
        """
        return self._levelwise[depths.clamp(max=len(self._levelwise) - 1)]

    # What stands below.

    def ranges(self, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The places in the order of the items below each node.

        Args:
            nodes: int64 [...].

        Returns:
            First places and last places + 1, int64 [...] each; 0 and 0 for -1.
        """
        safe, there = nodes.clamp(min=0), nodes >= 0
        return self.starts[safe] * there, self.ends[safe] * there

    def items_under(self, nodes: torch.Tensor, exclude: Exclusion | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The items below all nodes, one after the other.

        Waits for the device, as their number is part of the answer.

        Args:
            nodes: int64 [R], or [B, ...] with an exclusion of B rows.
            exclude: leaves out what the row is not to be shown.

        Returns:
            The place of the node among ``nodes`` read row by row and the item's internal id, int64 each; within a node
            in the order.
        """
        starts, ends = self.ranges(nodes.reshape(-1))
        counts = ends - starts
        row = torch.arange(len(counts), device=nodes.device).repeat_interleave(counts)
        places = torch.arange(len(row), device=nodes.device) + (ends - counts.cumsum(0))[row]
        if exclude is not None:
            kept = ~exclude.contains(row // max(nodes[:1].numel(), 1), places)
            row, places = row[kept], places[kept]
        return row, self.order[places]

    def sums(self, values: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        """Prefix sums over the items in their order, from which :meth:`mass` reads any node's sum.

        Args:
            values: of every item by internal id, [..., n_items].
            dtype: of the sums. A mass is a difference of two of them, so its error is that of the total: some 1e-16 of
                it in float64, 1e-7 in float32.

        Returns:
            [..., I + 1], beginning with 0.
        """
        ordered = values[..., self.order].to(dtype)
        return torch.nn.functional.pad(ordered.cumsum(dim=-1), (1, 0))

    def mass(self, sums: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """The sum over the items below each node.

        Args:
            sums: from :meth:`sums`, [I + 1] for all nodes or [B, I + 1].
            nodes: int64 [...], or [B, ...].

        Returns:
            Of the nodes' shape; 0 for -1. What it takes depends on the nodes, not on the items below them.
        """
        starts, ends = self.ranges(nodes)
        if sums.dim() == 1:
            return sums[ends] - sums[starts]
        flat = len(nodes), -1
        found = sums.gather(1, ends.reshape(flat)) - sums.gather(1, starts.reshape(flat))
        return found.view(nodes.shape)
