"""CoLLM: a language model that reads a collaborative model's vectors of the user and of his items beside their titles.

Source: Zhang et al., "CoLLM: Integrating Collaborative Embeddings into Large Language Models for Recommendation", TKDE
2025, arXiv 2310.19488, and the authors' public code. There the answer is whether the user would like one item, "Yes" or
"No"; that ranks no catalogue, so here the next item's title is generated, as TCA4Rec (Lin et al., WWW 2026, arXiv
2601.18457) has it among its bases. What else differs, and why, stands in ``properties/model/CoLLM.yaml``.
"""

from __future__ import annotations

from typing import Any

from recbole.utils import ModelType

from recbole_llm import registry
from recbole_llm.errors import UserError
from recbole_llm.model.generative import FINE_TUNING
from recbole_llm.model.hybrid import HYBRID, TEXT, HybridRecommender
from recbole_llm.model.states import NO_STATES, makes_states

# The first of two stages.
TEXT_TUNING = "text_tuning"


class CoLLM(HybridRecommender):
    """CoLLM (arXiv 2310.19488), generating titles, as a RecBole recommender.

    In two stages, as in the paper: the language model's weights learn on prompts of text; then they are frozen, and
    the projector learns on prompts with vectors. Or both at once on the latter (``collm_stages: joint``).

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Raises:
        UserError: ``embedding_model`` has no vectors of users.
    """

    tells_user = True
    _stage = FINE_TUNING

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if config["collm_stages"] == "two":
            self.stages = (TEXT_TUNING, FINE_TUNING)
        name = config["embedding_model"]
        source = registry.get_model(name)
        # BERT4Rec and its like, seen before any of them is trained.
        if source.type == ModelType.SEQUENTIAL and not makes_states(source):
            raise UserError(NO_STATES.format(part="embedding_model", name=name))

    @staticmethod
    def usual_width(vector: int, hidden: int) -> int:
        """Ten times the vectors' width, as in the authors' code."""
        return 10 * vector

    def begin_stage(self, stage: str) -> Any:
        """Free what trains in a stage; see the base class."""
        self._stage = stage
        groups: Any = super().begin_stage(stage)
        if len(self.stages) == 1:
            return groups
        projector, language_model = groups
        trained, kept = (language_model, projector) if stage == TEXT_TUNING else (projector, language_model)
        for weight in kept["params"]:
            weight.requires_grad_(False)
        return [trained]

    def kind_of_batch(self) -> str:
        """By the stage."""
        return TEXT if self._stage == TEXT_TUNING else HYBRID
