"""Every item of the catalogue scored by a language model, exactly, with each inner node of the items' trie read once.

An item's score is the sum of the log-probabilities of its tokens (:class:`~recbole_llm.decoding.beam_search.BeamSearch`
says relative to what), and a token's is known from the state of the node above it. So the decoder reads a prompt, and
behind it the inner nodes of the trie in pieces (``tree_reader.py``): no token twice, and none of the last tokens of
items at all. Beam search over as many beams as there are items finds the same scores with as much reading, but in
memory for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.tree_reader import check_nodes, tree_behind
from recbole_llm.errors import UserError

# Logits made at a time, as numbers.
LOGITS = 2**24


class _Piece(NamedTuple):
    """A run of nodes that are read at once, and what stands above them.

    Attributes:
        nodes: of the trie, int64 [C], depth first.
        depths: int64 [C].
        above: which nodes each sees, of the path before and of the piece, bool [C, A + C].
        keep: which of these the next piece needs, int64.
        by_depth: the depths in the piece, each with the places of its nodes in it, int64.
    """

    nodes: Tensor
    depths: Tensor
    above: Tensor
    keep: Tensor
    by_depth: list[tuple[int, Tensor]]


class FullRanking:
    """Scores all items of a search after prompts.

    Args:
        search: for items among the same tokens, whose scores these are; made anew after training, as it has to be.
        nodes: of the trie, read at once behind each prompt, at least 1. Memory grows with it, time hardly falls beyond
            a few hundred.

    Attributes:
        behind: tokens that are kept behind a prompt at most.
        reads: nodes that are read for each prompt: all of the search's trie that have children.

    Raises:
        UserError: ``nodes`` is below 1.
    """

    def __init__(self, search: BeamSearch, nodes: int) -> None:
        check_nodes(nodes)
        self._search, self._nodes = search, nodes
        trie = search.trie
        self.behind = nodes + len(trie.widths)
        self._starts, self._ends = trie.starts.cpu(), trie.ends.cpu()
        self._depths = trie.depths(torch.arange(len(trie), device=trie.device)).cpu()
        inner = trie.child_offsets.diff().cpu() > 0
        inner[0] = False
        read = inner.nonzero().squeeze(1)
        # A node's items begin where its first child's do.
        self._order = read[(self._starts[read] * len(trie.widths) + self._depths[read]).argsort()]
        self.reads = len(read)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Sequence[int]], guide: Guide | None = None, told: Callable[[int], None] | None = None
    ) -> Tensor:
        """Score.

        Args:
            prompts: the language model's token ids of each row, BOS included where it has one; of any lengths.
            guide: made with the search's trie, a recommender that has a say; ``None``, the language model alone.
            told: called after each piece with the number of its nodes.

        Returns:
            float32 [B, n_items]: what :class:`~recbole_llm.decoding.beam_search.BeamSearch` would find an item with;
            -inf for one without tokens.

        Raises:
            UserError: a prompt is empty or too long, or the model's scores are no numbers.
        """
        trie = self._search.trie
        reader = tree_behind(self._search, prompts, self.behind)
        # One column more takes what belongs to no node.
        scores = torch.zeros(len(prompts), len(trie) + 1, device=trie.device)
        root = torch.zeros(1, dtype=torch.int64, device=trie.device)
        self._tell(scores, reader.state.unsqueeze(1), root, 0, guide)
        for piece in self._pieces():
            nodes = piece.nodes.to(trie.device)
            states = reader.read(
                self._search.lm_ids[trie.tokens[nodes]], piece.depths.to(trie.device), piece.above.to(trie.device)
            )
            for depth, places in piece.by_depth:
                here = places.to(trie.device)
                self._tell(scores, states.index_select(1, here), nodes[here], depth, guide)
            reader.keep(piece.keep.to(trie.device))
            if told is not None:
                told(len(nodes))
        return self._of_items(scores, guide)

    def _pieces(self) -> Iterator[_Piece]:
        kept = self._order[:0]
        for start in range(0, len(self._order), self._nodes):
            nodes = self._order[start : start + self._nodes]
            following = self._order[start + self._nodes : start + self._nodes + 1]
            there = torch.cat((kept, nodes))
            depths = self._depths[nodes]
            keep = (self._above(following, there) & (there != following.unsqueeze(1))).nonzero()[:, 1]
            by_depth = [(int(depth), (depths == depth).nonzero().squeeze(1)) for depth in depths.unique()]
            yield _Piece(nodes, depths, self._above(nodes, there), keep, by_depth)
            kept = there[keep]

    def _above(self, nodes: Tensor, others: Tensor) -> Tensor:
        """Which others each node stands below or is, bool [nodes, others]."""
        starts, ends, depths = (of[nodes].unsqueeze(1) for of in (self._starts, self._ends, self._depths))
        return (self._starts[others] <= starts) & (self._ends[others] >= ends) & (self._depths[others] <= depths)

    def _tell(self, scores: Tensor, states: Tensor, nodes: Tensor, depth: int, guide: Guide | None) -> None:
        """Write what the children of nodes of one depth add to a score.

        Args:
            scores: written to, [B, N + 1].
            states: of the nodes, [B, n, hidden].
            nodes: int64 [n].
            depth: theirs.
            guide: as in :meth:`__call__`.
        """
        level, _ = self._search.levels[depth]
        width = max(len(level.ids), self._search.trie.widths[depth])
        step = max(1, LOGITS // (width * len(states)))
        for part, given in zip(nodes.split(step), states.split(step, dim=1)):
            spread = part.expand(len(given), -1)
            added = self._search.added(given, spread, depth, guide)
            # The same nodes in every row.
            children = added.children[0]
            columns = torch.where(children >= 0, children, scores.shape[1] - 1)
            scores.index_copy_(1, columns.flatten(), added.scores.flatten(1))

    def _of_items(self, scores: Tensor, guide: Guide | None) -> Tensor:
        """Scores of items by what each node adds."""
        trie = self._search.trie
        for low, high in zip(trie.level_bounds[1:], trie.level_bounds[2:]):
            scores[:, low:high] += scores.index_select(1, trie.parents[low:high])
        leaves = trie.leaves[trie.order]
        found = scores.index_select(1, leaves)
        if guide is not None:
            places = torch.arange(len(leaves), device=leaves.device)
            found = (
                found + guide.apart(leaves.expand(len(found), -1), places.expand(len(found), -1).unsqueeze(-1))[..., 0]
            )
        if not found.isfinite().all():
            raise UserError(
                "the language model's scores are no numbers: its weights are damaged or their type too narrow"
            )
        made = torch.full((len(found), len(trie.positions)), -torch.inf, device=found.device)
        return made.index_copy_(1, trie.order, found)
