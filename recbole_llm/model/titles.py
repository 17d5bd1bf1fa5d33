"""What recommenders share that generate the title of the next item, in the language model's own tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recbole_llm.backbone.live_head import live_head
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.templates import Templates
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.generative import GenerativeRecommender
from recbole_llm.tasks import active_tasks
from recbole_llm.tasks.behaviour import SEQUENTIAL


class TitleRecommender(GenerativeRecommender):
    """A recommender whose items are titles: shown as they are, answered with the end token behind.

    Nothing joins the vocabulary. Items of equal titles are one sequence of tokens: they are found together, with equal
    scores, and ranked in the order of ties.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Raises:
        UserError: nothing of the language model trains, or a task other than the sequential one, labels other than
            answers, or answers with words that the loss cannot take are asked for.
    """

    item_kind = "titles"
    # Titles are what a causal language model goes on with.
    causal_only = True

    def __init__(self, config: Any, dataset: Any) -> None:
        others = [task.name for task in active_tasks(config) if task.name != SEQUENTIAL]
        if others:
            raise UserError(f"tasks: {config['model']} learns next items alone; {others[0]} is no task of its")
        super().__init__(config, dataset)
        self._check_titles(self.templates)

    def _check_titles(self, templates: Templates) -> None:
        """Refuse answers in which a title's end token would not be the last, or whose words the loss cannot take."""
        self._check_answers(templates, "a title ends with a token of its own", alone=self.legal_only)

    def _take_tokens(self, item_tokens: ItemTokens, head_model: Any, codebook: Tensor | None) -> None:
        head, own = live_head(head_model, self.backbone.embed_tokens.weight)
        self.__dict__["head"], self.head_weight = head, own if self.config["adapter"] == "full" else None

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Note what the tokens of every item are."""
        super().take_item_tokens(tokens)
        assert tokens.lm_ids is not None
        self._lm_ids = tokens.lm_ids

    def _search_kind(self) -> tuple[type[BeamSearch], dict[str, Any]]:
        """See the base class; where titles count a search is for titles."""
        return BeamSearch, {"distinct": self.config["title_match"]}

    @property
    def counts_as(self) -> Tensor | None:
        """What each item counts as when rankings are measured, int64 ``[n_items]``; ``None``, as itself.

        Under ``title_match`` it is the first by id that has its title.
        """
        if not self.config["title_match"]:
            return None
        trie = self.item_tokens.trie
        first = trie.order.new_zeros(self.n_items)
        first[trie.order] = trie.order[trie.starts[trie.leaves[trie.order]]]
        return first

    def wording(self, searched: bool = True) -> list[Any]:
        """See the base class; and whether the search that picks the best epoch is for titles."""
        distinct = searched and self.config["title_match"] and self.ranking != "full"
        return [*super().wording(searched), *(["titles are found as one"] if distinct else [])]

    def _shown(self) -> Ragged:
        """Titles without their end tokens."""
        whole = self._told()
        return whole.keep(whole.positions < whole.lengths[whole.rows] - 1)

    def _told(self) -> Ragged:
        """Titles with their end tokens."""
        return super()._shown()
