"""A trained recommender that is asked for its scores of the users that another one ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.evaluation.ranking import catalogue_scores
from recbole_llm.training.teacher import frozen, item_order

if TYPE_CHECKING:
    from recbole_llm.data.loaders import RankingLoader
    from recbole_llm.training.pipeline import Fit


class Guidance:
    """A frozen recommender's scores over the catalogue for users as they stand in a ranking.

    It is told what it would be told if it ranked them itself: a sequential one as much of their histories as it reads,
    of the train rows at validation and of the train and valid rows at test.

    Args:
        fit: the recommender.
        dataset: the train data set of the model that is guided.
        part: the setting that named the recommender.

    Attributes:
        fit: the recommender.

    Raises:
        UserError: it was trained on other rows, or numbers users otherwise.
    """

    def __init__(self, fit: Fit, dataset: Any, part: str = "cf_model") -> None:
        self.model = frozen(fit, dataset, part, "the model that it is to guide")
        self.fit = fit
        self._order = item_order(fit.train_data._dataset, dataset)
        self._loaders = [loader for loader in (fit.valid_data, fit.test_data) if loader is not None]
        self._loader = self._loaders[-1]

    def rank_as(self, loader: Any) -> None:
        """Be told from now on what stands before the rows of a phase.

        Args:
            loader: of the model that is guided; one of valid or of test rows.
        """
        found = [own for own in self._loaders if own.phase == loader.phase]
        self._loader = found[0]

    def rank_with(self, loader: RankingLoader) -> None:
        """Be told from now on what a loader has of users.

        Args:
            loader: made for the recommender of :attr:`fit`.
        """
        self._loader = loader

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """Scores of every item.

        Args:
            users: internal ids of users that the phase ranks, int64 ``[B]``.

        Returns:
            float32 ``[B, n_items]`` on the recommender's device; -inf for the padding item.

        Raises:
            UserError: a score is NaN.
        """
        asked = users.cpu().numpy()
        rows = np.searchsorted(self._loader.users, asked)
        device = torch.device(self.fit.config["device"])
        self.model.eval()
        with torch.autocast(device.type, enabled=False):
            interaction = self._loader._interaction(rows, asked).to(device)
            scores = catalogue_scores(self.model, interaction, None, None, self._loader._dataset).float()
        return scores if self._order is None else scores.index_select(1, self._order.to(device))
