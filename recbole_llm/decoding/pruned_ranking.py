"""The k best items of a large catalogue, exactly, without reading what cannot be among them.

A log-probability is at most 0, so no item scores above a node on its way. Beam search gives k items and with the k-th
a score that the k best all reach; then every inner node that reaches it is read as well, and no other. What is found is
what scoring the whole catalogue (``full_ranking.py``) would put first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from recbole_llm.data.ties import leaders
from recbole_llm.decoding.beam_search import BeamSearch, Found, best
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.tree_reader import TreeReader, check_nodes, tree_behind
from recbole_llm.itemid.exclusion import Exclusion

# How far below the k-th score a node's may lie, relative, by bytes a number of the states: more than two readings of a
# prompt differ by.
SLACK = {8: 1e-3, 4: 1e-3, 2: 5e-2}


class PrunedRanking:
    """Finds the k best items of each prompt; see :class:`BeamSearch` for what scores are.

    Nodes are read depth by depth, each time with those above them: the keys and values of a piece are forgotten when it
    has been read, so memory is that of one piece, and some nodes of the first depths are read more than once.

    Args:
        search: for items among the same tokens, whose beams give the first k.
        nodes: of the trie, read at once behind each prompt, at least 1; those above them come on top.

    Attributes:
        behind: tokens that are kept behind a prompt at most.
        read: inner nodes read so far for all prompts, each counted once; the beams' own are not among them.
        there: inner nodes that reading the whole trie for these prompts would have read.

    Raises:
        UserError: ``nodes`` is below 1.
    """

    def __init__(self, search: BeamSearch, nodes: int) -> None:
        check_nodes(nodes)
        self._search, self._nodes = search, nodes
        self.read, self.there = 0, 0
        trie = search.trie
        self.behind = nodes * len(trie.widths)
        self._depths = trie.depths(torch.arange(len(trie), device=trie.device))
        self._inner = int((trie.child_offsets.diff() > 0).sum()) - 1

    @property
    def visited_share(self) -> float:
        """Of the trie's inner nodes, the share that was read."""
        return self.read / max(self.there, 1)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[int]], k: int | None = None, exclude: Exclusion | None = None,
        guide: Guide | None = None,
    ) -> Found:  # fmt: skip
        """Find.

        Args:
            prompts: as for the search.
            k: items asked for; as many as beams if ``None``.
            exclude: made with the search's trie, what each row is not to be shown.
            guide: made with it too, a recommender that has a say.

        Returns:
            The k best; nothing is told of what leaked.

        Raises:
            UserError: what :class:`BeamSearch` refuses.
        """
        search, trie = self._search, self._search.trie
        k = search.beams if k is None else k
        first = search(prompts, k, exclude, guide=guide)
        reader = tree_behind(search, prompts, self.behind)
        least = first.scores[:, -1:]
        least = least - SLACK[reader.state.element_size()] * least.abs().clamp(min=1)
        scores = torch.full((len(prompts), len(trie) + 1), -torch.inf, device=trie.device)
        scores[:, 0] = 0.0
        self._grow(scores, reader.state.unsqueeze(1), scores.new_zeros(len(prompts), 1).long(), 0, exclude, guide)
        for depth in range(1, len(search.levels)):
            low, high = trie.level_bounds[depth : depth + 2]
            nodes = torch.arange(low, high, device=trie.device)
            waits = (scores[:, low:high] >= least) & ~trie.is_leaf(nodes)
            self.read += int(waits.sum())
            # Of every row the nodes that wait, side by side.
            width = int(waits.sum(1).max())
            if not width:
                continue
            waiting = torch.where(waits, nodes, high).topk(width, dim=1, largest=False).values
            for part in waiting.masked_fill(waiting == high, -1).split(self._nodes, dim=1):
                self._grow(scores, self._states(reader, part), part, depth, exclude, guide)
        self.there += self._inner * len(prompts)
        return self._found(scores, first, exclude, guide)

    def _grow(
        self, scores: Tensor, states: Tensor, nodes: Tensor, depth: int, exclude: Exclusion | None, guide: Guide | None
    ) -> None:
        """Write the scores of the children of nodes [B, K] of one depth; a last column takes what is none."""
        added = self._search.added(states, nodes, depth, guide)
        whole = scores.gather(1, nodes.clamp(min=0)).unsqueeze(-1) + added.scores
        there = added.children >= 0 if exclude is None else exclude.left(added.children) > 0
        columns = torch.where(there, added.children, scores.shape[1] - 1)
        scores.scatter_(1, columns.flatten(1), whole.flatten(1))
        scores[:, -1] = -torch.inf

    def _states(self, reader: TreeReader, nodes: Tensor) -> Tensor:
        """The decoder's states at nodes [B, K], -1 for none: [B, K, hidden]."""
        trie = self._search.trie
        paths, above = [nodes], nodes
        while int(above.max()) > 0:
            above = torch.where(above > 0, trie.parents[above.clamp(min=0)], -1)
            paths.append(above)
        every = torch.cat(paths, dim=1)
        # Each node once and in order, the filling (-1, and the root, which is the prompt) behind.
        beyond = len(trie)
        every = torch.where(every > 0, every, beyond).sort(dim=1).values
        every[:, 1:] = torch.where(every[:, 1:] == every[:, :-1], beyond, every[:, 1:])
        every = every.sort(dim=1).values[:, : int((every < beyond).sum(1).max())].contiguous()
        none = every == beyond
        safe = every.masked_fill(none, 0)
        starts, ends, depths = trie.starts[safe], trie.ends[safe], self._depths[safe]
        sees = (
            (starts.unsqueeze(1) <= starts.unsqueeze(2))
            & (ends.unsqueeze(1) >= ends.unsqueeze(2))
            & (depths.unsqueeze(1) <= depths.unsqueeze(2))
            & ~none.unsqueeze(1)
        )
        reader.keep(trie.order[:0])
        states = reader.read(self._search.lm_ids[trie.tokens[safe].clamp(min=0)], depths, sees)
        places = torch.searchsorted(every, nodes.clamp(min=0)).clamp(max=every.shape[1] - 1)
        return states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))

    def _found(self, scores: Tensor, first: Found, exclude: Exclusion | None, guide: Guide | None) -> Found:
        search, trie = self._search, self._search.trie
        rows, count, k = len(scores), len(trie.order), first.items.shape[1]
        leaves = trie.leaves[trie.order].expand(rows, -1)
        places = torch.arange(count, device=trie.device).expand(rows, -1)
        found = scores.gather(1, leaves)
        if guide is not None:
            found = found + guide.apart(leaves, places.unsqueeze(-1))[..., 0]
        if exclude is not None:
            row = torch.arange(rows, device=trie.device).unsqueeze(1)
            found = found.masked_fill(exclude.contains(row, places), -torch.inf)
        # What the beams found and this reading did not reach, as it rounded otherwise, keeps the beams' score.
        place_of = torch.full((len(search.rank),), count, device=trie.device).scatter(0, trie.order, places[0])
        own = place_of[first.items]
        found = torch.cat((found, found.new_full((rows, 1), -torch.inf)), dim=1)
        reached = found.gather(1, own)
        found = found.scatter(1, own, torch.where(reached.isneginf(), first.scores, reached))[:, :count]
        items = trie.order.expand(rows, -1)
        if search.distinct:
            found = found.where(leaders(found, leaves[0], search.rank[trie.order]), -torch.inf)
        chosen = best(found, k, search.rank[items])
        scores, items = found.gather(1, chosen), items.gather(1, chosen)
        return Found(items.masked_fill(scores.isneginf(), 0) if search.distinct else items, scores, None)
