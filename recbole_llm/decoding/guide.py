"""A collaborative recommender's say in a search for items: its scores over items, read as probabilities of next tokens.

A token of a prefix is as likely to it as its softmax gives to the items that go on with the token, relative to those
that begin with the prefix. Per token the search then adds g log P_LLM + (1 - g) log P_CF in the place of log P_LLM.

Source: Bao et al., "Decoding Matters: Addressing Amplification Bias and Homogeneity Issue for LLM-based Recommendation"
(D3), EMNLP 2024, arXiv 2406.14900.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from recbole_llm.itemid.mass import log_masses
from recbole_llm.itemid.trie import Trie


class Guide:
    """Scores over items for the rows of one search.

    Along the tokens of an item the recommender's terms add up to the logarithm of its softmax, so that an item's score
    is g log P_LLM(tokens) + (1 - g) log softmax(item): at g = 0 its own ranking. Items of equal tokens, which are one
    to a language model, are told apart by the recommender alone. Probabilities are of all items of the trie, whichever
    are excluded for a row, so that an exclusion moves no other item's score.

    Each is the difference of two exact logarithms and not of prefix sums, whose last digits are those of the whole: the
    order far down the recommender's ranking counts as well.

    Args:
        trie: of the search.
        scores: float [B, n_items], the higher the better; what is -inf counts as 1 below the row's lowest other.
        weight: g, the language model's share, within 0..1.
        beta: the temperature of the softmax over items.
    """

    def __init__(self, trie: Trie, scores: Tensor, weight: float, beta: float = 1.0) -> None:
        self.trie, self.weight = trie, weight
        scores = scores.to(trie.device).float()
        least = scores.masked_fill(scores.isneginf(), torch.inf).amin(1, keepdim=True)
        least = torch.where(least.isfinite(), least - 1.0, 0.0)
        # Relative to a row's largest: float32 has then as many digits for any recommender's scores.
        scores = torch.where(scores.isneginf(), least, scores)
        scores = (scores - scores.amax(1, keepdim=True)) / beta
        self._masses = log_masses(trie, scores)
        self._placed = scores[:, trie.order]

    def of_rows(self, rows: Tensor) -> Guide:
        """The same for some of the rows.

        Args:
            rows: int64 [n].
        """
        made = copy.copy(self)
        made._masses, made._placed = self._masses[rows], self._placed[rows]
        return made

    def mixed(self, told: Tensor, nodes: Tensor, children: Tensor) -> Tensor:
        """What each token adds to a beam's score.

        Args:
            told: log-probabilities of tokens by the language model, float [B, K, W].
            nodes: of the beams, int64 [B, K]; -1 is none.
            children: where the tokens lead, int64 [B, K, W]; -1 for none, whose value means nothing.

        Returns:
            float32 [B, K, W].
        """
        before = self._masses.gather(1, nodes.clamp(min=0)).unsqueeze(-1)
        after = self._masses.gather(1, children.clamp(min=0).flatten(1)).view(children.shape)
        return self.weight * told + (1 - self.weight) * (after - before)

    def apart(self, leaves: Tensor, places: Tensor) -> Tensor:
        """What an item's score has beyond its leaf's.

        Args:
            leaves: int64 [B, K].
            places: of items that end there, in the trie's order, int64 [B, K, E].

        Returns:
            float32 [B, K, E], at most 0.
        """
        whole = self._masses.gather(1, leaves.clamp(min=0)).unsqueeze(-1)
        return (1 - self.weight) * (self._placed.gather(1, places.flatten(1)).view(places.shape) - whole)
