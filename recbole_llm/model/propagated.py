"""What recommenders share that propagate node embeddings over the train rows and contrast views of every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import InputType
from torch import nn

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.model.edges import Edges
from recbole_llm.model.graph import csr_tensor, normalised_adjacency

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction

LAYERS = ("final", "e0")


class PropagatedRecommender(GeneralRecommender):
    """Tables of users and items below a graph, scores by dot products of what comes out, and BPR with a contrast.

    The graph has the train rows, each user-item pair once. A subclass says how layers follow one another
    (:meth:`_propagate`), what is penalised (:meth:`_penalties`) and how a layer's views are contrasted
    (:meth:`_contrast`).

    Args:
        config: has ``embedding_size``, ``n_layers``, ``ssl_tau``, ``ssl_weight`` and ``reg_weight``.
        dataset: the train rows.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.user_embedding = nn.Embedding(self.n_users, config["embedding_size"])
        self.item_embedding = nn.Embedding(self.n_items, config["embedding_size"])
        self.n_layers = config["n_layers"]
        self.ssl_tau = config["ssl_tau"]
        self.ssl_weight = config["ssl_weight"]
        self.reg_weight = config["reg_weight"]
        pairs = dataset.inter_matrix(form="coo")
        adjacency = normalised_adjacency(pairs.row, pairs.col, self.n_users, self.n_items)
        self.adjacency = csr_tensor(adjacency).to(self.device)
        self.edges = Edges.of(adjacency, self.n_users).to(self.device)
        self.restore_user_e: torch.Tensor | None = None
        self.restore_item_e: torch.Tensor | None = None
        self.other_parameter_name = ["restore_user_e", "restore_item_e"]

    def _initial(self) -> torch.Tensor:
        return torch.cat((self.user_embedding.weight, self.item_embedding.weight))

    def _propagate(self, initial: torch.Tensor) -> tuple[torch.Tensor, list[Any]]:
        """Final embeddings ``[n_users + n_items, d]`` of the tables below the graph, and each layer's views."""
        raise NotImplementedError

    def _penalties(self, initial: torch.Tensor, rows: torch.Tensor) -> list[torch.Tensor]:
        """What is added to the loss for the size of weights.

        Args:
            initial: the tables, users before items.
            rows: int64 ``[3 B]``, the batch's nodes.
        """
        raise NotImplementedError

    def _contrast(self, layers: list[Any], users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The contrast of every layer's views, users among users and items among items.

        Args:
            layers: from :meth:`_propagate`.
            users: int64, distinct.
            items: likewise.
        """
        raise NotImplementedError

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Final embeddings.

        Returns:
            Users ``[n_users, d]`` and items ``[n_items, d]``.
        """
        with torch.autocast(self.device.type, enabled=False):
            users, items = self._propagate(self._initial())[0].split([self.n_users, self.n_items])
        return users, items

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """BPR loss, the weights' penalties, and the contrast of each layer's views.

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, a scalar.
        """
        return self.loss_and_nodes(interaction)[0]

    def loss_and_nodes(self, interaction: Interaction) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the final embeddings ``[n_users + n_items, d]`` that it was taken of, users before items."""
        self.restore_user_e = self.restore_item_e = None
        user, item, negative = (interaction[field] for field in (self.USER_ID, self.ITEM_ID, self.NEG_ITEM_ID))
        with torch.autocast(self.device.type, enabled=False):
            initial = self._initial()
            final, layers = self._propagate(initial)
            rows = torch.cat((user, item + self.n_users, negative + self.n_users))
            user_row, item_row, negative_row = final.index_select(0, rows).split(len(user))
            loss = F.softplus((user_row * negative_row).sum(dim=1) - (user_row * item_row).sum(dim=1)).mean()
            for penalty in self._penalties(initial, rows):
                loss = loss + penalty
            if self.ssl_weight and layers:
                loss = loss + self.ssl_weight * self._contrast(layers, torch.unique(user), torch.unique(item))
        return loss, final

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
