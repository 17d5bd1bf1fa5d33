"""How recommenders that generate an item's tokens rank items: among the tokens of items alone, in one of three ways.

``ranking: beam`` searches (:mod:`recbole_llm.decoding.beam_search`), ``full`` scores every item
(:mod:`recbole_llm.decoding.full_ranking`), and ``pruned`` finds the best of all and leaves out what cannot be among
them (:mod:`recbole_llm.decoding.pruned_ranking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.filling import batches_of, budget_of
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.one_user import OneUser
from recbole_llm.decoding.pruned_ranking import PrunedRanking
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.model.guided import GuidedSearch
from recbole_llm.search_keys import SEARCH_KEYS

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone
    from recbole_llm.data.instructions import InstructionWriter
    from recbole_llm.itemid.item_tokens import ItemTokens

# How a search is done.
AUTO, LATENCY = "auto", "latency"
# Items whose prompts tell what all prompts begin with.
OPENINGS = 256


class TokenRanking(GuidedSearch):
    """What a generative recommender ranks items by: to stand before RecBole's class among its bases.

    Attributes:
        ranking: ``beam``, ``full`` or ``pruned``.
        backbone: the language model.
        head: the vocabulary's, with ``for_search``.
        item_tokens: of every item.
        writer: of prompts.
        history_length: items that a prompt shows at most.
        asked_with: which of the prompts of inference is asked.
        tells_user: whether prompts tell of the user.
    """

    ranking = "beam"
    asked_with = 0
    tells_user = False

    # What the items' tokens are: ``codes`` (or raw ids) or ``titles``.
    item_kind: str
    backbone: Backbone
    head: Any
    item_tokens: ItemTokens
    writer: InstructionWriter
    history_length: int
    n_items: int
    device: Any
    USER_ID: str
    ITEM_ID: str
    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    # The language model's id of each token of the items' vocabulary, int64.
    _lm_ids: Tensor
    # All item ids, int64 [n_items]: how equal scores are ranked.
    _tie_order: Tensor
    _search: tuple[Tensor, BeamSearch] | None = None
    _exact: tuple[BeamSearch, FullRanking | PrunedRanking] | None = None
    # With the search and the prompt of inference that it is of.
    _one_user: tuple[BeamSearch, int, OneUser | None] | None = None

    def __init__(self, config: Any, dataset: Any) -> None:
        self.ranking = self.ranked_by(config)
        super().__init__(config, dataset)
        self.config = config
        self._n_users: int = dataset.num(self.USER_ID)
        if self.ranking != "full" and max(config["topk"]) > config["beams"]:
            raise UserError(
                f"topk asks for {max(config['topk'])} items and the search keeps {config['beams']} beams; "
                f"set beams to {max(config['topk'])}"
            )

    @classmethod
    def ranked_by(cls, config: Any) -> str:
        """How items are ranked as the settings stand: ``beam``, ``full`` or ``pruned``.

        Raises:
            UserError: settings of one that mean nothing with another.
        """
        ranking = str(config["ranking"])
        if ranking != "beam" and config["constraint"] not in (None, "trie"):
            raise UserError(f"ranking: {ranking} scores items alone; with constraint: level set ranking: beam")
        if ranking != "beam" and config["search_mode"] == LATENCY:
            raise UserError(f"search_mode: latency is a way of beam search; with ranking: {ranking} leave it auto")
        return ranking

    @classmethod
    def idle_settings(cls, config: Any) -> tuple[str, ...]:
        """Settings that mean nothing as the others stand."""
        told = super().idle_settings(config)
        told = (*told, "tree_nodes") if config["ranking"] == "beam" else told
        # Without it a run is one of those from before there was such a setting.
        idle = cls.item_kind == "titles" or config["normaliser"] == "legal" or not config["score_end"]
        return (*told, "score_end") if idle else told

    @classmethod
    def search_settings(cls) -> frozenset[str]:
        """Settings that the search alone reads; one that names whom training asks too (``teachers``) is none of them.

        A recommender whose training reads one of them has to leave it out here.
        """
        return SEARCH_KEYS.difference(getattr(cls, "teachers", ()))

    def forget_search(self) -> None:
        """Make the search anew when it is next needed: weights or items may have changed."""
        self._search = self._one_user = self._exact = None

    def train(self, mode: bool = True) -> Self:
        """Training or evaluation mode; the search is made anew, as weights may have changed."""
        self.forget_search()
        return super().train(mode)  # type: ignore[misc]

    def searcher(self, candidates: Tensor) -> BeamSearch:
        """The search among some items, with the weights as they are.

        Args:
            candidates: bool ``[n_items]``, the items that may be found.
        """
        candidates = candidates.cpu()
        if self._search is None or not torch.equal(self._search[0], candidates):
            tokens, lm_ids = self._searched()
            kept = candidates.repeat_interleave(tokens.lengths)
            offsets = torch.cat([tokens.offsets[:1], (tokens.lengths * candidates).cumsum(0)])
            kind, more = self._search_kind()
            search = kind(
                self.backbone.decoder, self.head.for_search(),
                replace(tokens, offsets=offsets, tokens=tokens.tokens[kept]),
                beams=self.config["beams"], lm_ids=lm_ids, normaliser=self.config["normaliser"],
                tie_order=self._tie_order, **more,
            )  # fmt: skip
            self._search = candidates, search
        return self._search[1]

    def _searched(self) -> tuple[ItemTokens, Tensor]:
        """The tokens that make up an item's score, and the language model's ids of their vocabulary.

        Where an end token behind an item's own could only add nothing, as it is the one token that is counted, the
        search is spared reading what stands before it.
        """
        tokens, normaliser = self.item_tokens, self.config["normaliser"]
        counts = normaliser == "vocabulary" or (normaliser == "level" and tokens.kind == "ids")
        if tokens.kind == "titles" or not (counts and self.config["score_end"]):
            return tokens, self._lm_ids
        return tokens.ended(), torch.cat((self._lm_ids, self._lm_ids.new_tensor([self.backbone.eos_id])))

    def _ranker(self, search: BeamSearch) -> BeamSearch | FullRanking | PrunedRanking:
        """What ranks: the search, or what goes beyond it."""
        if self.ranking == "beam":
            return search
        if self._exact is None or self._exact[0] is not search:
            kind = FullRanking if self.ranking == "full" else PrunedRanking
            self._exact = search, kind(search, self.config["tree_nodes"])
        return self._exact[1]

    def asks_alone(self, users: int) -> bool:
        """Whether so many users, where no others are asked about, are searched for one after the other.

        Args:
            users: how many there are.
        """
        mode = self.config["search_mode"]
        one_by_one = mode == LATENCY or (mode == AUTO and users == 1)
        return one_by_one and self.ranking == "beam" and self.searches(self.config)

    def _ready(self, search: BeamSearch, alone: bool) -> None:
        """Have a search read what all prompts of inference open with, and one user after another in kept memory."""
        known = self._one_user
        if known is None or known[0] is not search or known[1] != self.asked_with:
            if search.can_open:
                search.open_with(self._opening())
            known = self._one_user = search, self.asked_with, None
        if alone and known[2] is None and search.opening is not None:
            longest = self.writer.longest_asked(self.history_length, self.asked_with)
            made = OneUser(search.decoder, search.opening, longest, search.steps)
            known = self._one_user = *known[:2], made
        search.one_user = known[2] if alone else None

    def _opening(self) -> list[int]:
        """The token ids that prompts begin with whatever is in the history, as far as some items tell.

        Where prompts tell of users it goes as far as they are alike for two of them, or for the only one there is.
        """
        items = torch.arange(1, min(self.n_items, OPENINGS + 1))
        users = items.remainder(min(self._n_users - 1, 2)) + 1 if self.tells_user else None
        asked = self._ask(Ragged.from_lengths(items, torch.ones_like(items)), users).padded(-1)
        alike = int((asked == asked[0]).all(0).long().cumprod(0).sum())
        return [int(token) for token in asked[0, :alike]]

    def _parts(self, lengths: Tensor, behind: int) -> Sequence[Tensor]:
        """Rows that are ranked at once, by the lengths of their prompts and the tokens that are read behind each."""
        tokens = self.config["inference_tokens"]
        if tokens is None:
            tokens = budget_of(lengths, behind, self.config["inference_batch_size"])
        return batches_of(lengths, behind, tokens)

    @property
    def visited_share(self) -> float | None:
        """Of the items' trie, the share that ``ranking: pruned`` read for the last evaluation; ``None`` of others."""
        ranker = self._exact[1] if self._exact else None
        return ranker.visited_share if isinstance(ranker, PrunedRanking) else None

    def _search_kind(self) -> tuple[type[BeamSearch], dict[str, Any]]:
        """The search, and settings that it has beside those of every search."""
        return BeamSearch, {}

    @property
    def invalid_share(self) -> float | None:
        """Of the last evaluation, the share of sequences that no item has; ``None`` where the search allows none."""
        return None

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores over the catalogue with nothing excluded but the padding item, ``[B, n_items]``."""
        none = torch.empty(0, dtype=torch.long)
        return self.full_sort_predict_excluding(interaction, none, none, torch.ones(self.n_items, dtype=torch.bool))

    @torch.no_grad()
    def full_sort_predict_excluding(self, interaction: Any, rows: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
        """Scores over the catalogue: log-probabilities of the items that were found, one value below them for others.

        With ``ranking: full`` all are found, with ``pruned`` as many as there are beams, and these the best.

        Args:
            interaction: users' item lists (0-padded on the right, oldest first).
            rows: int64 ``[E]`` rows of the batch.
            items: int64 ``[E]``; ``items[e]`` may not be recommended in row ``rows[e]``.
            candidates: bool ``[n_items]``.

        Returns:
            ``[B, n_items]``: finite, but ``-inf`` for the padding item and what may not be recommended.
        """
        history, users = self._histories_of(interaction), self._users_of(interaction)
        excluded = self._by_row(len(history), rows.cpu(), items.cpu())
        candidates = candidates.cpu().clone()
        candidates[0] = False
        search = self.searcher(candidates)
        ranker = self._ranker(search)
        scores = torch.full((len(history), self.n_items), -torch.inf, device=self.device)
        scores[:, candidates.to(self.device)] = 0.0
        every = self._ask(history, users)
        alone = self.asks_alone(len(history))
        self._ready(search, alone)
        for part in torch.arange(len(history)).split(1) if alone else self._parts(every.lengths, ranker.behind):
            asked, barred = every.take(part), excluded.take(part)
            prompts = asked.values.split(asked.lengths.tolist())
            guide = self.guide(interaction, part, search.trie)
            own = scores[part.to(self.device)]
            if isinstance(ranker, FullRanking):
                scores[part.to(self.device)] = own + ranker(prompts, guide)
                continue
            exclude = Exclusion.from_lists(search.trie, barred.offsets, barred.values)
            found = ranker(prompts, exclude=exclude, guide=guide)
            found = self._placed(search, found, own, barred)
            least = found.scores.masked_fill((found.items == 0) | ~found.scores.isfinite(), torch.inf).amin(
                1, keepdim=True
            )
            # Below the least of them by one; equal, so that the tie order alone ranks them.
            own = own + torch.where(least.isfinite(), least - 1.0, 0.0)
            scores[part.to(self.device)] = own.scatter(1, found.items, found.scores)
        scores[:, 0] = -torch.inf
        scores[rows.to(self.device), items.to(self.device)] = -torch.inf
        return scores

    def _histories_of(self, interaction: Any) -> Ragged:
        """The items that prompts of users show: of their lists the latest."""
        lists, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu().unsqueeze(1)
        places = torch.arange(lists.shape[1])
        return Ragged.from_padded(lists, (places < lengths) & (places >= lengths - self.history_length))

    def _users_of(self, interaction: Any) -> Tensor | None:
        """Numbers of the users whom prompts tell of, int64 ``[B]``; ``None`` where they tell of none."""
        return interaction[self.USER_ID].cpu() if self.tells_user else None

    def _ask(self, history: Ragged, users: Tensor | None) -> Ragged:
        """The prompts of inference: token ids, one row a history.

        Args:
            history: items, oldest first.
            users: see :meth:`_users_of`, of these histories.
        """
        return self.writer.ask(history, self.asked_with, users)

    def _placed(self, search: BeamSearch, found: Found, scores: Tensor, barred: Ragged) -> Found:
        """What was found, with an item in the place of what is none.

        Args:
            search: that found it.
            found: of B prompts.
            scores: ``[B, n_items]``, -inf at what is no candidate.
            barred: items that may not be recommended, by row.
        """
        return found

    @staticmethod
    def _by_row(count: int, rows: Tensor, items: Tensor) -> Ragged:
        order = rows.argsort(stable=True)
        return Ragged.from_lengths(items[order], torch.bincount(rows, minlength=count))

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of the items in the interaction, one a row."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID].to(scores.device).unsqueeze(1)).squeeze(1)
