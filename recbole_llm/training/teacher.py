"""A trained recommender that says, for every train interaction, what it would have recommended right before it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.utils import ModelType
from torch import Tensor

from recbole_llm.data.prefixes import PrefixLoader
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import catalogue_scores

if TYPE_CHECKING:
    from recbole_llm.training.pipeline import Fit

logger = logging.getLogger("recbole_llm")


class Teacher:
    """A frozen recommender's scores over the catalogue, in float32 and without gradients.

    A sequential one reads what a user had before the interaction in question. Any other has seen all train rows, the
    interaction among them; the log says so.

    Args:
        fit: the recommender, trained on the train rows.
        dataset: the train data set of the model that is taught.
        part: the setting that named the recommender.

    Raises:
        UserError: it was trained on other rows, or numbers users or items otherwise.
    """

    def __init__(self, fit: Fit, dataset: Any, part: str = "cf_model") -> None:
        own = fit.train_data._dataset
        self.name: str = fit.config["model"]
        self._sequential = fit.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        if not same_rows(own, dataset):
            raise UserError(f"{part}: {self.name} was trained on other rows than those that it is to teach")
        self.model = fit.model.eval().requires_grad_(False)
        # Its own training has left some.
        self.model.zero_grad(set_to_none=True)
        self.device = torch.device(fit.config["device"])
        self.fingerprint = fit.fingerprint
        self._loader, self._dataset = PrefixLoader(fit.config, own), own
        if not self._sequential:
            logger.info(
                "%s: %s reads no history, it has seen all train interactions: those that it teaches among them",
                part, self.name,
            )  # fmt: skip

    @torch.no_grad()
    def logits(self, moments: Tensor) -> Tensor:
        """Scores of every item for users right before some of their train interactions.

        Args:
            moments: numbers of the interactions, in the order of ``train_histories``, int64 ``[S]``.

        Returns:
            float32 ``[S, n_items]`` on the recommender's device; -inf for the padding item.

        Raises:
            UserError: a score is NaN.
        """
        told, back = moments.cpu(), None
        if not self._sequential:
            # It says of a user the same at any moment.
            users = torch.from_numpy(self._loader.users)[told]
            asked, back = users.unique(return_inverse=True)
            told = told.new_zeros(len(asked)).scatter_(0, back, told)
        self.model.eval()
        with torch.autocast(self.device.type, enabled=False):
            interaction = self._loader.before(told).to(self.device)
            scores = catalogue_scores(self.model, interaction, None, None, self._dataset).float()
        return scores if back is None else scores[back.to(scores.device)]


def same_rows(first: Any, second: Any) -> bool:
    """Whether two train data sets hold the same interactions under the same numbers."""
    one, other = first.train_histories, second.train_histories
    named = all(
        np.array_equal(first.field2id_token[field], second.field2id_token[field])
        for field in (first.uid_field, first.iid_field)
    )
    return named and np.array_equal(one.items, other.items) and np.array_equal(one.offsets, other.offsets)
