"""What recommenders share whose scores are dot products of node embeddings that a graph has propagated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn

from recbole_llm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

LAYERS = ("final", "e0")


class PropagatedRecommender(GeneralRecommender):
    """Tables of users and items below a graph, and scores by what :meth:`forward` makes of them.

    A subclass has ``forward`` (final embeddings, users ``[n_users, d]`` and items ``[n_items, d]``), and forgets
    ``restore_user_e`` and ``restore_item_e`` when it trains.

    Args:
        config: has ``embedding_size``.
        dataset: the train rows.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_embedding = nn.Embedding(self.n_users, config["embedding_size"])
        self.item_embedding = nn.Embedding(self.n_items, config["embedding_size"])
        self.restore_user_e: torch.Tensor | None = None
        self.restore_item_e: torch.Tensor | None = None
        self.other_parameter_name = ["restore_user_e", "restore_item_e"]

    def _initial(self) -> torch.Tensor:
        return torch.cat((self.user_embedding.weight, self.item_embedding.weight))

    def _restored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final embeddings, computed once between two training steps."""
        if self.restore_user_e is None or self.restore_item_e is None:
            self.restore_user_e, self.restore_item_e = self.graph_embeddings()
        return self.restore_user_e, self.restore_item_e

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of the given user-item pairs, ``[B]``."""
        users, items = self._restored()
        return (users[interaction[self.USER_ID]] * items[interaction[self.ITEM_ID]]).sum(dim=1)

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of all items for the given users, ``[B * n_items]``."""
        users, items = self._restored()
        return (users[interaction[self.USER_ID]] @ items.t()).view(-1)

    @torch.no_grad()
    def graph_embeddings(self, layer: str = "final") -> tuple[torch.Tensor, torch.Tensor]:
        """What other stages take from a trained model: users ``[n_users, d]``, items ``[n_items, d]``, detached.

        Args:
            layer: ``final``, what scores are made of, or ``e0``, the tables below the graph.

        Raises:
            UserError: another layer.
        """
        if layer not in LAYERS:
            raise UserError(
                f"{type(self).__name__} has embeddings of layer {' or '.join(LAYERS)}, not {layer!r}"
                f"{did_you_mean(layer, LAYERS)}"
            )
        if layer == "e0":
            return self.user_embedding.weight.detach(), self.item_embedding.weight.detach()
        users, items = self.forward()
        return users, items
