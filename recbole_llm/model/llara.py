"""LLaRA: a language model that reads each item of a history as its title and a sequential recommender's vector of it.

Source: Liao et al., "LLaRA: Large Language-Recommendation Assistant", SIGIR 2024, arXiv 2312.02445, and the authors'
public code. There the answer is one of 20 candidates that the prompt lists; that ranks no catalogue, so here the next
item's title is generated among all titles, as TCA4Rec (Lin et al., WWW 2026, arXiv 2601.18457) has it among its bases.
What else differs, and why, stands in ``properties/model/LLaRA.yaml``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recbole_llm.model.hybrid import HYBRID, TEXT, HybridRecommender


class LLaRA(HybridRecommender):
    """LLaRA (arXiv 2312.02445), generating titles, as a RecBole recommender.

    The curriculum: of the batches of training the share that has vectors grows from none to all. Batch t of T has them
    with probability t / T, and its prompts are text otherwise.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    # Of the curriculum, kept with the weights so that training goes on where it was.
    batches_drawn: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.register_buffer("batches_drawn", torch.zeros((), dtype=torch.long))

    @staticmethod
    def usual_width(vector: int, hidden: int) -> int:
        """The language model's width, as in the authors' code."""
        return hidden

    def begin_stage(self, stage: str) -> Any:
        """See the base class; the curriculum begins."""
        self.batches_drawn.zero_()
        return super().begin_stage(stage)

    def kind_of_batch(self) -> str:
        """Drawn by torch's own generator."""
        if not self.config["curriculum"] or not self.batches_planned:
            return HYBRID
        share = self.batches_drawn.item() / self.batches_planned
        self.batches_drawn += 1
        return HYBRID if torch.rand((), dtype=torch.double).item() < share else TEXT
