"""CF-guided search: an option of every recommender that generates items (:mod:`recbole_llm.decoding.guide`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from recbole_llm.decoding.guide import Guide
from recbole_llm.errors import UserError
from recbole_llm.search_keys import GUIDED

if TYPE_CHECKING:
    from recbole_llm.itemid.trie import Trie
    from recbole_llm.training.guidance import Guidance


class GuidedSearch:
    """What a generative recommender can be guided by: to stand before RecBole's class among its bases.

    Attributes:
        guides: the parts that are trained where the search is guided.
        guidance: whom to ask; whoever trains the recommender sets it.
    """

    guides: tuple[str, ...] = ("cf_model",)
    guidance: Guidance | None = None

    config: Any
    USER_ID: str

    def __init__(self, config: Any, dataset: Any) -> None:
        if is_guided(config):
            _check_guidance(config, self.searches(config))
        super().__init__(config, dataset)  # type: ignore[call-arg]

    @classmethod
    def searches(cls, config: Any) -> bool:
        """Whether there is a search to guide as the settings stand."""
        return True

    @classmethod
    def idle_settings(cls, config: Any) -> tuple[str, ...]:
        """Settings that mean nothing as the others stand."""
        return () if is_guided(config) else GUIDED

    def take_guidance(self, guidance: Guidance) -> None:
        """Note whose scores guide the search."""
        # Not a submodule: its weights are its own stage's.
        self.__dict__["guidance"] = guidance

    def guide(self, interaction: Any, part: torch.Tensor, trie: Trie) -> Guide | None:
        """The say of the guiding recommender in a search; ``None`` where there is none.

        Args:
            interaction: what is ranked, with the users' ids.
            part: which rows of it are searched for, int64 ``[B]``.
            trie: of the search.
        """
        if self.guidance is None:
            return None
        scores = self.guidance.scores(interaction[self.USER_ID].cpu()[part])
        return Guide(trie, scores, self.config["cf_guidance"], self.config["cf_guidance_beta"])


def is_guided(config: Any) -> bool:
    """Whether a recommender is to have a say in the search; not where there is no such setting."""
    weight = config["cf_guidance"]
    return weight is not None and weight < 1


def _check_guidance(config: Any, searches: bool) -> None:
    """Refuse before any work what cannot be guided."""
    if not searches:
        raise UserError("cf_guidance below 1 guides a search, and grounding: embedding has none; set grounding: trie")
    if config["constraint"] not in (None, "trie"):
        raise UserError(
            f"cf_guidance below 1 needs constraint: trie; to {config['cf_model']} a sequence that is no item has no "
            "probability"
        )
    if config["eval_unit"] == "row":
        raise UserError(f"cf_guidance below 1 needs eval_unit: user, as {config['cf_model']} is asked about users")
