"""AlignTokenRec: a language model that reads histories as item tokens and generates the next item's.

Items become tokens first (``properties/item_tokens``: alignment tokenization of a collaborative model's embeddings).
The tokens join the language model's vocabulary, untrained, and it is fine-tuned on instructions of several tasks. Items
are ranked by beam search among the tokens of items alone.

Source: Li et al., "Semantic Convergence: Harmonizing Recommender Systems via Two-Stage Alignment and Behavioral
Semantic Tokenization", AAAI 2025, arXiv 2412.13771; prompts and training as in LC-Rec (Zheng et al., ICDE 2024, arXiv
2311.09049), on which it builds. What the paper leaves open is a setting, explained in
``properties/model/AlignTokenRec.yaml``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recbole_llm.backbone.code_tokens import extend
from recbole_llm.backbone.codebook_rows import hidden_widths
from recbole_llm.backbone.live_head import live_head
from recbole_llm.data.prompts import Ragged
from recbole_llm.decoding.beam_search import BeamSearch, Found
from recbole_llm.decoding.level_search import LevelSearch
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.generative import FINE_TUNING, GenerativeRecommender
from recbole_llm.tasks.behaviour import NEGATIVE

__all__ = ["FINE_TUNING", "AlignTokenRec"]


class AlignTokenRec(GenerativeRecommender):
    """AlignTokenRec (arXiv 2412.13771) as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Raises:
        UserError: a setting that means nothing as the others stand is not as it is shipped.
    """

    parts: tuple[str, ...] = ("embedding_model", *GenerativeRecommender.guides)
    item_parts = ("embedding_model",)
    # New tokens behind those of items, that stand in prompts.
    further_tokens = 0

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if config["score_end"]:
            self._check_answers(self.templates, "its score counts the end token behind it (score_end)")
        hidden_widths(config)
        _check_idle(config, [task.name for task in self.tasks])

    def _take_tokens(self, item_tokens: ItemTokens, head_model: Any, codebook: Tensor | None) -> None:
        if item_tokens.lm_ids is not None:
            # Ids in the language model's own tokens: none joins them.
            head, own = live_head(head_model, self.backbone.embed_tokens.weight)
            self.__dict__["head"], self.head_weight = head, own if self.config["adapter"] == "full" else None
            self._lm_ids = item_tokens.lm_ids
            return
        first = self.backbone.embed_tokens.num_embeddings
        self.code_tokens, own, self.__dict__["head"] = extend(
            self.backbone, head_model, item_tokens.size + self.further_tokens, codebook, hidden_widths(self.config)
        )
        self.head_weight = own if self.config["adapter"] == "full" else None
        self._lm_ids = first + torch.arange(item_tokens.size)

    def _search_kind(self) -> tuple[type[BeamSearch], dict[str, Any]]:
        if self.config["constraint"] == "level":
            return LevelSearch, {"filter_items": self.config["filter_items"]}
        return super()._search_kind()

    @property
    def invalid_share(self) -> float | None:
        """Of the last evaluation, the share of sequences that no item has; ``None`` where the search allows none."""
        search = self._search[1] if self._search else None
        return search.invalid_share if isinstance(search, LevelSearch) else None

    def _placed(self, search: BeamSearch, found: Found, scores: Tensor, barred: Ragged) -> Found:
        if not isinstance(search, LevelSearch):
            return found
        legal = scores.isfinite()
        legal[barred.rows.to(self.device), barred.values.to(self.device)] = False
        return search.placed(found, legal)


def _check_idle(config: Any, tasks: Sequence[str]) -> None:
    if config["dislike_below"] is not None and not (NEGATIVE in tasks and config["negative_ratio"]):
        raise UserError(
            f"dislike_below chooses negatives, and none are learned; take the task {NEGATIVE} and a negative_ratio "
            "above 0, or leave dislike_below out"
        )
    if config["constraint"] == "trie" and not config["filter_items"]:
        raise UserError(
            "filter_items: false means nothing with constraint: trie, whose search finds nothing but items; set "
            "constraint: level too"
        )
