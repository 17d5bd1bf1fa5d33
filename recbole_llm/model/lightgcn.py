"""LightGCN as RecBole has it, with the graph convolution and the loss computed several times faster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from recbole.model.general_recommender.lightgcn import LightGCN as RecBoleLightGCN

from recbole_llm.model.graph import MeanOfPowers, csr_tensor, normalised_adjacency

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class LightGCN(RecBoleLightGCN):
    """RecBole's LightGCN (He et al., SIGIR 2020): same parameters, initial values, losses and scores, less time.

    The adjacency is a CSR matrix built without Python loops, its gradient uses that it is symmetric, and rows are
    looked up so that their gradient is a plain scatter-add.
    """

    def get_norm_adj_mat(self) -> torch.Tensor:
        """The normalised adjacency of the train graph, sparse CSR float32 ``[n_users + n_items] * 2``."""
        pairs = self.interaction_matrix
        return csr_tensor(normalised_adjacency(pairs.row, pairs.col, self.n_users, self.n_items))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings after the graph convolution.

        Returns:
            Users ``[n_users, d]`` and items ``[n_items, d]``.
        """
        users, items = torch.split(self._convolve(self.get_ego_embeddings()), [self.n_users, self.n_items])
        return users, items

    def _convolve(self, nodes: torch.Tensor) -> torch.Tensor:
        return MeanOfPowers.apply(self.norm_adj_matrix, nodes, self.n_layers)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """BPR loss plus the L2 norm of the batch's own embeddings (He et al. 2020, equation 15).

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, ``[1]`` as in RecBole.
        """
        return self.loss_and_nodes(interaction)[0]

    def loss_and_nodes(
        self, interaction: Interaction, below: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the embeddings ``[n_users + n_items, d]`` that it was taken of, users before items.

        Args:
            interaction: see :meth:`calculate_loss`.
            below: what the graph convolution reads in place of the tables, of their shape; the L2 norm stays theirs.
        """
        self.restore_user_e = self.restore_item_e = None
        user, item, negative = (interaction[field] for field in (self.USER_ID, self.ITEM_ID, self.NEG_ITEM_ID))
        # One look-up of nodes, users before items, has one scatter-add as its gradient instead of three.
        rows = torch.cat((user, item + self.n_users, negative + self.n_users))
        own = self.get_ego_embeddings()
        nodes = self._convolve(own if below is None else below)
        user_row, item_row, negative_row = nodes.index_select(0, rows).split(len(user))
        loss = self.mf_loss((user_row * item_row).sum(dim=1), (user_row * negative_row).sum(dim=1))
        penalty = self.reg_loss(*own.index_select(0, rows).split(len(user)), require_pow=self.require_pow)
        return loss + self.reg_weight * penalty, nodes

    @torch.no_grad()
    def graph_embeddings(self) -> tuple[torch.Tensor, torch.Tensor]:
        """What other stages take from a trained LightGCN: users ``[n_users, d]``, items ``[n_items, d]``, detached."""
        users, items = self.forward()
        return users.detach(), items.detach()
