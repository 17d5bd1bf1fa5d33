"""Vectors of a trained collaborative recommender for the prompts of a language model: of items, and of users."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import torch
from recbole.utils import ModelType
from torch import Tensor

from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.model.standardise import scale_of, standardised
from recbole_llm.model.states import NO_STATES, makes_states
from recbole_llm.training.embeddings import graph_embeddings, item_embeddings, item_width
from recbole_llm.training.teacher import frozen

if TYPE_CHECKING:
    from recbole_llm.training.pipeline import Fit

logger = logging.getLogger("recbole_llm")

# Users by whose states it is told how large states are.
MEASURED = 2048


class Users(Protocol):
    """Users by number, and the vector of each number."""

    width: int

    def at(self, moments: Tensor) -> Tensor:
        """Numbers of users right before some of their train interactions.

        Args:
            moments: places of these among the train histories' items, int64 ``[B]``.
        """

    def asked(self, interaction: Any) -> Tensor:
        """Numbers, int64 ``[B]``, of those who are to be recommended something; the next call forgets them."""

    def __call__(self, numbers: Tensor) -> Tensor:
        """Their vectors: int64 ``[n]`` to float32 ``[n, d]``."""


class CollaborativeVectors:
    """What prompts hold of a frozen recommender, in float32: each kind centred, with elements of mean square 1.

    Of an item without a train interaction, or of such a user in a table, nothing is learned, so it stands in the
    middle: a vector of zeros.

    Args:
        fit: the recommender, trained on the train rows.
        dataset: the train data set of the model whose prompts they are.
        part: the setting that named the recommender.

    Attributes:
        items: ``[n_items, d]``.

    Raises:
        UserError: it has no table of items, or was trained on other rows.
    """

    def __init__(self, fit: Fit, dataset: Any, part: str = "embedding_model") -> None:
        self.name: str = fit.config["model"]
        self.part, self._fit, self._dataset = part, fit, dataset
        model = frozen(fit, dataset, part, "those that its vectors are to tell of")
        table = torch.from_numpy(item_embeddings(model, self.name, "final"))
        self.items = _of_seen(table, torch.from_numpy(dataset.train_histories.seen(len(table))))
        self.fingerprint = fit.fingerprint

    def users(self, longest: int) -> Users:
        """Vectors of users in the items' space.

        Args:
            longest: items of a history at most, at inference and so in training.

        Raises:
            UserError: the recommender has none, or they are of another width than the items'.
        """
        fit = self._fit
        check_vectors(fit.model, self.name, self.part, users=True)
        if fit.config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            return UserStates(fit.model, self._dataset, longest)
        table = torch.from_numpy(graph_embeddings(fit.model, self.name, self.part)[0]).float()
        logger.info(
            "%s: %s reads no history, its vectors of users have seen all train interactions: those that are learned "
            "among them", self.part, self.name,
        )  # fmt: skip
        return UserTable(table, self._dataset)


@torch.no_grad()
def check_vectors(model: Any, name: str, part: str, users: bool) -> None:
    """Refuse a recommender whose vectors prompts cannot hold; it need not be trained.

    Args:
        model: the recommender's.
        name, part: what to call it, and the setting that named it, in an error.
        users: vectors of users are asked for too.

    Raises:
        UserError: it has no table of items; or no vectors of users, or of another width than the items'.
    """
    width = item_width(model, name, "final")
    if not users:
        return
    if model.type == ModelType.SEQUENTIAL:
        state = _state_of_one(model) if makes_states(model) else None
        if state is None or state.dim() != 2:
            raise UserError(NO_STATES.format(part=part, name=name))
        asked = state.shape[1]
    else:
        asked = graph_embeddings(model, name, part)[0].shape[1]
    if asked != width:
        raise UserError(
            f"{part}: the vectors of {name} have {asked} numbers for a user and {width} for an item; one projector "
            "needs as many"
        )


def _state_of_one(model: Any) -> Tensor:
    """What a sequential recommender makes of a history of one item."""
    device = next(model.parameters()).device
    lists = torch.zeros(1, model.max_seq_length, dtype=torch.long, device=device)
    lists[0, 0] = 1
    state: Tensor = model.eval()(lists, torch.ones(1, dtype=torch.long, device=device))
    return state


class UserTable:
    """A vector a user, the same at any moment; the number of a user is his id.

    Args:
        table: ``[n_users, d]``.
        dataset: the train data set.
    """

    def __init__(self, table: Tensor, dataset: Any) -> None:
        self._histories = dataset.train_histories
        self._field: str = dataset.uid_field
        self._table = _of_seen(table, torch.from_numpy(self._histories.lengths > 0))
        self.width = table.shape[1]

    def at(self, moments: Tensor) -> Tensor:
        """See :class:`Users`."""
        return torch.from_numpy(self._histories.owners(moments.numpy()))

    def asked(self, interaction: Any) -> Tensor:
        """See :class:`Users`."""
        found: Tensor = interaction[self._field].cpu()
        return found

    def __call__(self, numbers: Tensor) -> Tensor:
        """See :class:`Users`."""
        return self._table[numbers.cpu()].to(numbers.device)


class UserStates:
    """The state in which a sequential recommender is after what a user has had, when it is asked what comes next.

    States of train interactions are made when a batch needs them, from what stands before the interaction and never
    from it or what follows. The number of one is its place among the train histories' items; those who are asked at
    inference have numbers behind.

    Args:
        model: in evaluation mode; its ``forward`` makes a state of item lists and their lengths.
        dataset: the train data set.
        longest: items of a history that it is given at most.
    """

    def __init__(self, model: Any, dataset: Any, longest: int) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._width: int = model.max_seq_length
        self._longest = min(longest, self._width)
        self._histories = dataset.train_histories
        self._items = torch.from_numpy(self._histories.items).long()
        self._fields = model.ITEM_SEQ, model.ITEM_SEQ_LEN
        self._asked = torch.empty(0)
        places = torch.arange(len(self._items))
        places = places[places > self._begins(places)]
        states = self.states(places[:: max(1, len(places) // MEASURED)].contiguous())
        self._mean, self._size = scale_of(states)
        self.width = states.shape[1]

    def _begins(self, moments: Tensor) -> Tensor:
        return torch.from_numpy(self._histories.begins(moments.numpy()))

    def at(self, moments: Tensor) -> Tensor:
        """See :class:`Users`."""
        return moments

    def asked(self, interaction: Any) -> Tensor:
        """See :class:`Users`."""
        lists, lengths = (interaction[field].cpu() for field in self._fields)
        columns, lengths = torch.arange(lists.shape[1]), lengths.unsqueeze(1)
        self._asked = self._read(Ragged.from_padded(lists, (columns < lengths) & (columns >= lengths - self._longest)))
        return len(self._items) + torch.arange(len(lists))

    def states(self, moments: Tensor) -> Tensor:
        """States as the recommender has them, float32 ``[n, d]``, right before train interactions."""
        starts = torch.maximum(self._begins(moments), moments - self._longest)
        return self._read(Ragged.from_slices(self._items, starts, moments))

    @torch.no_grad()
    def _read(self, histories: Ragged) -> Tensor:
        lists = torch.zeros(len(histories), self._width, dtype=torch.long)
        lists[histories.rows, histories.positions] = histories.values
        self._model.eval()
        with torch.autocast(self._device.type, enabled=False):
            made: Tensor = self._model(lists.to(self._device), histories.lengths.to(self._device))
        return made.float()

    def __call__(self, numbers: Tensor) -> Tensor:
        """See :class:`Users`."""
        told = numbers.cpu()
        train = told < len(self._items)
        found = torch.empty(len(told), self.width, device=self._mean.device)
        if train.any():
            found[train] = self.states(told[train])
        if not train.all():
            found[~train] = self._asked[told[~train] - len(self._items)]
        return ((found - self._mean) / self._size).to(numbers.device)


def _of_seen(table: Tensor, seen: Tensor) -> Tensor:
    """A table standardised by its seen rows; others 0."""
    return standardised(table, seen).masked_fill(~seen.unsqueeze(1), 0.0)
