"""The items that a user is not to be shown again, in a form that a search on the trie can ask at every node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from recbole_llm.itemid.trie import Trie


class Exclusion:
    """Excluded items of each row of a batch: how many stand below a node, and whether an item is one.

    Args:
        trie: gives items their places; what is asked later lives on its device.
        items: excluded items of each row, int64 [B, H], filled up with 0 or -1; repeats count once, and items without
            tokens not at all. Use :meth:`from_lists` for rows one after the other.

    Attributes:
        keys: row * (I + 1) + place in the trie's order, sorted; repeats and filling are at the end, beyond any row.
            int64 [B * H].
        rows: B.
    """

    def __init__(self, trie: Trie, items: torch.Tensor) -> None:
        items = items.to(trie.device)
        rows = torch.arange(len(items), device=trie.device).unsqueeze(1).expand_as(items)
        self._set(trie, len(items), rows.reshape(-1), items.reshape(-1))

    @classmethod
    def from_lists(cls, trie: Trie, offsets: torch.Tensor, items: torch.Tensor) -> Exclusion:
        """Make one from rows that lie one after the other.

        Args:
            trie: gives items their places.
            offsets: where each row begins, int64 [B + 1].
            items: int64 [offsets[-1]].
        """
        made = cls.__new__(cls)
        offsets, items = offsets.to(trie.device), items.to(trie.device)
        count = len(offsets) - 1
        rows = torch.arange(count, device=trie.device).repeat_interleave(offsets.diff(), output_size=len(items))
        made._set(trie, count, rows, items)
        return made

    def _set(self, trie: Trie, count: int, rows: torch.Tensor, items: torch.Tensor) -> None:
        self.trie, self.rows, self._span = trie, count, len(trie.order) + 1
        beyond = count * self._span
        places = trie.positions[items.clamp(min=0)]
        keys = torch.where(places >= 0, rows * self._span + places, beyond).sort().values
        # Sorted again rather than cut out: the length of what is left would have to be waited for.
        keys[1:] = torch.where(keys[1:] == keys[:-1], beyond, keys[1:])
        self.keys = keys.sort().values

    def left(self, nodes: torch.Tensor) -> torch.Tensor:
        """How many items a row may still be shown below each of its nodes.

        Args:
            nodes: int64 [B, ...]; -1 is no node.

        Returns:
            int64 [B, ...], the items below less those that are excluded for the row; 0 for -1.

        Raises:
            ValueError: the nodes are of another number of rows.
        """
        if nodes.dim() == 0 or len(nodes) != self.rows:
            raise ValueError(f"nodes {tuple(nodes.shape)} are not those of {self.rows} rows")
        rows = torch.arange(self.rows, device=nodes.device).view(-1, *[1] * (nodes.dim() - 1))
        return self.left_of(rows, nodes)

    def left_of(self, rows: torch.Tensor, nodes: torch.Tensor) -> torch.Tensor:
        """The same for nodes of any rows.

        Args:
            rows: whose each node is, int64, of a shape that goes with the nodes'.
            nodes: int64 [...].

        Returns:
            int64 [...].
        """
        starts, ends = self.trie.ranges(nodes)
        bounds = torch.stack((starts, ends), dim=-1) + (rows * self._span).unsqueeze(-1)
        found = torch.searchsorted(self.keys, bounds)
        return (ends - starts) - (found[..., 1] - found[..., 0])

    def contains(self, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Whether what stands at a place of the trie's order is excluded for a row.

        Args:
            rows: int64 [...].
            places: int64 [...].

        Returns:
            bool [...].
        """
        if not len(self.keys):
            return torch.zeros_like(places, dtype=torch.bool)
        keys = rows * self._span + places
        found = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.keys[found] == keys
