"""A trained recommender that says, for every train interaction, what it would have recommended right before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from recbole.utils import ModelType
from torch import Tensor

from recbole_llm import registry
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.data.phases import TRAIN, VALID
from recbole_llm.data.prefixes import PrefixLoader
from recbole_llm.errors import UserError
from recbole_llm.evaluation.ranking import catalogue_scores
from recbole_llm.training.store import fingerprint_of

if TYPE_CHECKING:
    from recbole_llm.training.pipeline import Fit

logger = logging.getLogger("recbole_llm")


class Teacher:
    """A frozen recommender's scores over the catalogue, in float32 and without gradients.

    A sequential one reads what a user had before the interaction in question. Any other has seen all train rows, the
    interaction among them. Either was trained to expect that very interaction; the log says so.

    Args:
        fit: the recommender, trained on the train rows, or on all but a fold of them.
        dataset: the train data set of the model that is taught.
        part: the setting that named the recommender.

    Raises:
        UserError: it was trained on other rows, or numbers users otherwise.
    """

    def __init__(self, fit: Fit, dataset: Any, part: str = "cf_model") -> None:
        own = trained = fit.train_data._dataset
        self.held = own.split.held
        if self.held.any():
            # It is asked about the very rows that it has not seen.
            own = own.cut(own.split.with_fold_in_train())[0]
        self.name: str = fit.config["model"]
        self._sequential = fit.config["MODEL_TYPE"] == ModelType.SEQUENTIAL
        self.model = frozen(fit, dataset, part, "those that it is to teach", own)
        self.device = torch.device(fit.config["device"])
        self.fingerprint = fit.fingerprint
        self._loader, self._dataset = PrefixLoader(fit.config, own), own
        self._order = item_order(own, dataset)
        if own is trained:
            told = "is told of what stood before an interaction" if self._sequential else "reads no history"
            logger.info(
                "%s: %s %s, and was trained on all train interactions: those that it teaches among them",
                part, self.name, told,
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
        if self._order is not None:
            scores = scores.index_select(1, self._order.to(scores.device))
        return scores if back is None else scores[back.to(scores.device)]


class FoldedTeacher:
    """Recommenders of which each was trained without a fold of the train rows: a row is taught by the one without it.

    Args:
        fits: one for every fold.
        dataset: as for :class:`Teacher`.
        part: as for :class:`Teacher`.

    Raises:
        UserError: as :class:`Teacher` does.
        ValueError: their folds are not all train rows, each once.
    """

    def __init__(self, fits: Sequence[Fit], dataset: Any, part: str = "cf_model") -> None:
        self.teachers = [Teacher(fit, dataset, part) for fit in fits]
        train = dataset.split.phases == TRAIN
        held = np.stack([teacher.held[train] for teacher in self.teachers])
        if not (held.sum(axis=0) == 1).all():
            raise ValueError(f"the folds of {part} are not each train row once")
        # Split rows lie by user and then by time, as histories do.
        self.folds = torch.from_numpy(held.argmax(axis=0))
        self.fingerprint = fingerprint_of([teacher.fingerprint for teacher in self.teachers])
        self._items = dataset.item_num

    @torch.no_grad()
    def logits(self, moments: Tensor) -> Tensor:
        """As :meth:`Teacher.logits`, each row by the recommender that was trained without it."""
        folds = self.folds[moments.cpu()]
        found = torch.empty(len(folds), self._items, device=self.teachers[0].device)
        for fold in folds.unique().tolist():
            mine = folds == fold
            found[mine.to(found.device)] = self.teachers[fold].logits(moments.cpu()[mine])
        return found


def check_folds(config: Any, dataset: Any) -> None:
    """Refuse, before anything is trained, more folds than train rows.

    Args:
        config: with ``cf_folds``, where the model learns from another one.
        dataset: the train data set.

    Raises:
        UserError: there are.
    """
    count, rows = config["cf_folds"] or 1, len(dataset.train_histories.items)
    if count > rows:
        raise UserError(f"cf_folds: {count} folds are more than the {rows} train rows")


def check_graphs(config: Any, dataset: Any) -> None:
    """Refuse, before anything is trained, a teacher whose knowledge graph has other items than it is to score.

    Args:
        config: of the model that has it as a part.
        dataset: the train data set of that model.

    Raises:
        UserError: RecBole leaves interactions of items out that are not linked to the graph, and has items that are in
            it alone; or there is no graph.
    """
    for part in config.parts():
        if registry.get_model(config[part]).type != ModelType.KNOWLEDGE:
            continue
        own = config.part(part)
        # Of a second training on train + valid rows, and of merge_valid's only one, the data set has no others.
        own["merge_valid"] = dataset.split.count(VALID) == 0
        if not same_rows(data_preparation(own, create_dataset(own))[0]._dataset, dataset):
            raise UserError(
                f"{part}: the items linked to {config[part]}'s knowledge graph are not those of '{config['dataset']}', "
                "and it would be trained on other rows; link each of its items and no other, or name SASRec or LightGCN"
            )


def frozen(fit: Fit, dataset: Any, part: str, use: str, own: Any = None) -> Any:
    """A trained recommender's model as another one takes it in: in evaluation mode, without gradients.

    Args:
        fit: the recommender.
        dataset: the train data set of the other one.
        part: the setting that named the recommender.
        use: what rows should be its own, for the error.
        own: its train data set, if not the one it was trained on.

    Raises:
        UserError: it was trained on other rows, or numbers users otherwise. It may number items otherwise.
    """
    if not same_rows(fit.train_data._dataset if own is None else own, dataset):
        raise UserError(f"{part}: {fit.config['model']} was trained on other rows than {use}")
    model = fit.model.eval().requires_grad_(False)
    # Its own training has left some.
    model.zero_grad(set_to_none=True)
    return model


def same_rows(first: Any, second: Any) -> bool:
    """Whether two train data sets hold the same interactions and items, of users under the same numbers."""
    users, items = first.uid_field, first.iid_field
    if not np.array_equal(first.field2id_token[users], second.field2id_token[users]):
        return False
    ours, theirs = first.field2id_token[items], second.field2id_token[items]
    if not np.array_equal(ours, theirs) and not np.array_equal(np.sort(ours), np.sort(theirs)):
        return False
    one, other = first.train_histories, second.train_histories
    same = np.array_equal(one.offsets, other.offsets)
    order = item_order(first, second)
    return same and np.array_equal(one.items, other.items if order is None else order.numpy()[other.items])


def item_order(first: Any, second: Any) -> Tensor | None:
    """The numbers that items have in another data set: those that a knowledge graph links are numbered as linked.

    Args:
        first: with the numbers that are looked for.
        second: with the same items.

    Returns:
        By number in ``second``, int64 ``[n_items]``; ``None`` where they are the same.
    """
    one, other = (data.field2id_token[data.iid_field] for data in (first, second))
    if np.array_equal(one, other):
        return None
    order = np.argsort(one)
    return torch.from_numpy(order[np.searchsorted(one, other, sorter=order)])
