"""Beam search that knows of each level's codes alone: what LC-Rec's program does, beside the trie's search.

LC-Rec (arXiv 2311.09049) lets a beam go on by any code that some item has at that level, so that beams may end in
sequences that no item has. Those are counted, and dropped or not, which is its ``--filter_items``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from recbole_llm.decoding.beam_search import BeamSearch, Found, best
from recbole_llm.decoding.guide import Guide
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion

# LC-Rec's score of a sequence that is no item, where these are filtered.
FILTERED = -1000.0


class LevelSearch(BeamSearch):
    """Finds the likeliest sequences of one code a level; see :class:`BeamSearch` for what is not said here.

    Of a row's beams those come last that stand for nothing that may be shown: excluded items, and, where they are
    filtered, sequences of no item. Of items with equal tokens all are found.

    Args:
        filter_items: drop sequences that no item has; otherwise they keep their places.
        given: as for :class:`BeamSearch`; the tokens are codes or raw ids.

    Attributes:
        sequences: how many sequences all searches so far have ended with.
        invalid: how many of them no item has.

    Raises:
        UserError: the tokens are titles, which have no levels; and what :class:`BeamSearch` refuses.
    """

    def __init__(self, *given: Any, filter_items: bool = True, **more: Any) -> None:
        super().__init__(*given, **more)
        if self.trie.depths(self.trie.leaf_nodes).unique().numel() > 1:
            raise UserError("constraint: level needs tokens of one length, codes or raw ids; take constraint: trie")
        self.filter_items, self.sequences, self.invalid = filter_items, 0, 0
        # At each level the tokens that some item has there.
        bounds = pairwise(self.trie.level_bounds[1:])
        self._used = [self.trie.tokens[low:high].unique() for low, high in bounds]

    @property
    def steps(self) -> list[int]:
        """See the base class."""
        return self._kept()[:-1]

    @property
    def invalid_share(self) -> float:
        """The share of sequences that no item has."""
        return self.invalid / max(self.sequences, 1)

    @torch.no_grad()
    def forward(
        self, prompts: Sequence[Sequence[int]], k: int | None = None, exclude: Exclusion | None = None,
        leaked: bool = False, guide: Guide | None = None,
    ) -> Found:  # fmt: skip
        """Search.

        Args:
            prompts: as for :class:`BeamSearch`.
            k: sequences asked for; as many as beams if ``None``.
            exclude: made with :attr:`trie`, what each row is not to be shown.
            leaked: must be false: it is told of the trie's search only.
            guide: must be ``None``: what is no item has no probability to a recommender.

        Returns:
            Items int64 [B, k], best first; -1 stands for a sequence of no item, with its own score, or
            :data:`FILTERED` where these are filtered, and with -inf for what a row may not be shown.

        Raises:
            UserError: as :class:`BeamSearch` does.
        """
        if leaked:
            raise ValueError("leaked mass is told by the search on the trie")
        if guide is not None:
            raise ValueError("only the search on the trie can be guided")
        k = self.beams if k is None else k
        self.check(k, exclude)
        widths = self._kept()
        reader = self._read(prompts)
        scores = torch.zeros(len(prompts), 1, device=self.trie.device)
        sequences = torch.zeros(len(prompts), 1, 0, dtype=torch.int64, device=self.trie.device)
        for depth, used in enumerate(self._used):
            grown = (scores.unsqueeze(-1) + self._logs(reader.state, depth)).flatten(1)
            chosen = best(grown, widths[depth])
            scores, parents = grown.gather(1, chosen), chosen // len(used)
            tokens = used[chosen % len(used)]
            whole = parents.unsqueeze(-1).expand(-1, -1, depth)
            sequences = torch.cat((sequences.gather(1, whole), tokens.unsqueeze(-1)), dim=-1)
            if depth + 1 < len(self._used):
                reader.step(self.lm_ids[tokens], parents)
        return self._found(sequences, scores, k, exclude)

    def _kept(self) -> list[int]:
        """Beams that there are after each level."""
        widths, possible = [], 1
        for used in self._used:
            possible = min(self.beams, possible * len(used))
            widths.append(possible)
        return widths

    def _logs(self, states: Tensor, depth: int) -> Tensor:
        """Log-probabilities of the level's used tokens, float32 [B, K, W]."""
        level, columns = self.levels[depth]
        logits = self.head.logits(states, level)
        used = logits[..., columns[self._used[depth]]]
        base = (used if self.normaliser == "legal" else logits).logsumexp(-1)
        if self.normaliser == "vocabulary":
            base = torch.logaddexp(base, self.head.log_sum_of_rest(states, level, logits.amax(-1)))
        return used - base.unsqueeze(-1)

    def _found(self, sequences: Tensor, scores: Tensor, k: int, exclude: Exclusion | None) -> Found:
        """The best k of the sequences' items and of the sequences of none."""
        nodes = self.trie.walk(sequences)[..., -1]
        none = nodes < 0
        self.sequences, self.invalid = self.sequences + none.numel(), self.invalid + int(none.sum())
        places, there = self._at(nodes.clamp(min=0), exclude)
        there &= ~none.unsqueeze(-1)
        items = torch.where(there, self.trie.order[places], -1)
        found = torch.where(there, scores.unsqueeze(-1), -torch.inf)
        found[..., 0] = torch.where(none, FILTERED if self.filter_items else scores, found[..., 0])
        items, found = items.flatten(1), found.flatten(1)
        order = torch.where(items >= 0, self.rank[items.clamp(min=0)], len(self.rank))
        width = min(k, items.shape[1])
        chosen = best(found, width, order)
        items, found = items.gather(1, chosen), found.gather(1, chosen)
        # Fewer codes than beams leave places empty.
        return Found(pad(items, (0, k - width), value=-1), pad(found, (0, k - width), value=-torch.inf), None)

    def placed(self, found: Found, legal: Tensor) -> Found:
        """Found items for a ranking of the catalogue, in which each place belongs to an item.

        A sequence of no item that is not filtered keeps its place: of the items that were not found the last in the tie
        order stand there, so that a hit is chance. What is dropped has item 0.

        Args:
            found: from :meth:`forward`.
            legal: bool [B, n_items], what each row may be shown; not item 0.
        """
        items = found.items.clamp(min=0)
        if self.filter_items:
            return found._replace(items=items)
        holes = (found.items < 0) & found.scores.isfinite()
        free = legal.scatter(1, items, False)
        last = torch.where(free, self.rank, -1).topk(items.shape[1], dim=1).indices
        stand_ins = last.gather(1, (holes.cumsum(1) - 1).clamp(min=0))
        return found._replace(items=torch.where(holes, stand_ins, items))
