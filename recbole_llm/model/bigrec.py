"""BIGRec: a language model writes a title, and the catalogue is ranked by how near items' titles are to it.

Fine-tuning is that of the other recommenders that generate titles. What differs is how a text becomes a ranking
(``grounding: embedding``): the model writes freely, whether or not an item is called so; the last state of the text's
last token is its embedding, as of every title; and items are ranked by the L2 distance. This ranks all of them.

Source: Bao et al., "A Bi-Step Grounding Paradigm for Large Language Models in Recommendation Systems", 2023, arXiv
2308.08434, and the authors' public code, which embeds texts by the language model as it was before fine-tuning. Here it
is the fine-tuned one, the only one there is where all of it trains.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_llm.data.prompts import Ragged, join, repeated
from recbole_llm.decoding.free_search import FreeSearch
from recbole_llm.model.titles import TitleRecommender

EMBEDDING = "embedding"
# Texts that are read at a time.
TEXTS_AT_ONCE = 1024


class BIGRec(TitleRecommender):
    """BIGRec (arXiv 2308.08434) as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    _title_states: Tensor | None = None
    # With the prompt of inference whose opening it has read.
    _writes: tuple[int, FreeSearch] | None = None

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        counts = torch.bincount(self._train_items, minlength=self.n_items).float()
        self._popularity = _scaled(counts[1:]).unsqueeze(0)

    @classmethod
    def searches(cls, config: Any) -> bool:
        """See the base class; with ``grounding: embedding`` the catalogue is scored by distances."""
        return bool(config["grounding"] != EMBEDDING)

    @classmethod
    def ranked_by(cls, config: Any) -> str:
        """See the base class."""
        return super().ranked_by(config) if cls.searches(config) else "full"

    def forget_search(self) -> None:
        """See the base class; titles are read anew too."""
        self._title_states = self._writes = None
        super().forget_search()

    @torch.no_grad()
    def full_sort_predict_excluding(self, interaction: Any, rows: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
        """See the base class; with ``grounding: embedding`` scores are distances with a minus before them."""
        if self.searches(self.config):
            return super().full_sort_predict_excluding(interaction, rows, items, candidates)
        history = self._histories_of(interaction)
        scores = torch.full((len(history), self.n_items), -torch.inf, device=self.device)
        asked, search = self._ask(history, self._users_of(interaction)), self.free_search()
        most = self.config["inference_batch_size"]
        # Of short prompts too no more, as logits of all words lie in memory for each.
        for part in (some for rows in self._parts(asked.lengths, search.behind) for some in rows.split(most)):
            states = self._states_of(search(asked.take(part)))
            # Not by products, whose rounding is more than what is between near titles.
            distances = torch.cdist(states, self._titles(), compute_mode="donot_use_mm_for_euclid_dist")
            scores[part.to(self.device), 1:] = -self._weighted(distances)
        scores[:, ~candidates.to(self.device)] = -torch.inf
        scores[rows.to(self.device), items.to(self.device)] = -torch.inf
        return scores

    def _weighted(self, distances: Tensor) -> Tensor:
        """Distances ``[B, n_items - 1]``, those of popular items made smaller where ``popularity_gamma`` is above 0."""
        gamma = self.config["popularity_gamma"]
        if not gamma:
            return distances
        return _scaled(distances) * (1 + self._popularity.to(distances)) ** -gamma

    def free_search(self) -> FreeSearch:
        """What writes behind the prompts of inference, with the weights as they are."""
        if self._writes is None or self._writes[0] != self.asked_with:
            search = FreeSearch(
                self.backbone.decoder, self.head.for_search(), beams=self.config["generation_beams"],
                longest=self.item_tokens.longest, eos_id=self.backbone.eos_id, opening=self._opening(),
            )  # fmt: skip
            self._writes = self.asked_with, search
        return self._writes[1]

    def _states_of(self, texts: Ragged) -> Tensor:
        """The last state of each text's last token, float32 ``[R, H]``; a text opens as the language model has it."""
        opening = [] if self.backbone.bos_id is None else [self.backbone.bos_id]
        whole = join([repeated(torch.tensor(opening, dtype=torch.long), len(texts)), texts])
        states = []
        for part in torch.arange(len(whole)).split(TEXTS_AT_ONCE):
            own = whole.take(part)
            rows = torch.arange(len(own))
            states.append(self._reader.states(own.padded(0), rows, own.lengths - 1, self.device).float())
        return torch.cat(states)

    def _titles(self) -> Tensor:
        """Of every item but the padding one, float32 ``[n_items - 1, H]``."""
        if self._title_states is None:
            self._title_states = self._states_of(self._shown().take(torch.arange(1, self.n_items)))
        return self._title_states


def _scaled(values: Tensor) -> Tensor:
    """Rows brought to 0 to 1; 0 where all values of a row are equal."""
    least, most = values.aminmax(dim=-1, keepdim=True)
    return (values - least) / (most - least).clamp(min=torch.finfo(values.dtype).tiny)
