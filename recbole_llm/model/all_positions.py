"""Training at every position of a window of history at once: what causal encoders share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from recbole.utils import InputType

from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.model.transformer import by_length

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class AllPositions:
    """Every position of a window predicts its next item; stands before a sequential recommender among the bases.

    The recommender has an item table ``item_embedding``, says how an item sequence becomes an output at each position
    (:meth:`encode_all`, where no position may see a later one), and calls :meth:`take_loss` when it is made.
    """

    train_view = "windows"
    input_type = InputType.POINTWISE
    TARGETS = "target_list"  # int64 [B, L]: the item after each position, 0 where none is learnt

    ITEM_SEQ: str
    ITEM_SEQ_LEN: str
    USER_ID: str
    n_items: int
    item_embedding: Any

    def take_loss(self, config: Any, dataset: Any) -> None:
        """The loss, and where it draws negatives itself what it draws them with.

        Args:
            config: ``loss_type`` is ``CE`` or ``BCE``, the latter with ``negatives``.
            dataset: the train data set.
        """
        self.loss_type = config["loss_type"]
        if self.loss_type == "BCE":
            self.negatives = config["negatives"]
            self.sampler = NegativeSampler(
                dataset.train_histories, self.n_items, dataset.split.candidates, seed=config["seed"]
            )
            # What a resumed training puts back.
            self.generator = self.sampler.generator

    def encode_all(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The encoder's output at every position, ``[B, L, H]`` for item ids ``[B, L]`` padded on the right."""
        raise NotImplementedError

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Mean loss of the positions with a target.

        Args:
            interaction: item ids ``[B, L]`` padded on the right, their lengths ``[B]`` and the targets ``[B, L]``; for
                ``BCE`` also the users ``[B]``.

        Returns:
            The loss, a scalar; 0 for a batch without a target.
        """
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = interaction[self.TARGETS]
        outputs, wanted, owners = [], [], []
        for rows, end in by_length(lengths, item_seq.size(1)):
            part, goal = (item_seq, targets) if rows is None else (item_seq[rows], targets[rows])
            goal = goal[:, :end]
            learnt = goal != 0
            outputs.append(self.encode_all(part[:, :end])[learnt])
            wanted.append(goal[learnt])
            if self.loss_type == "BCE":
                users = interaction[self.USER_ID] if rows is None else interaction[self.USER_ID][rows]
                owners.append(users.repeat_interleave(learnt.sum(dim=1)))
        hidden, goals = torch.cat(outputs), torch.cat(wanted)
        if self.loss_type == "BCE":
            losses = self._binary(hidden, goals, self.draw(torch.cat(owners)))
        else:
            losses = F.cross_entropy(F.linear(hidden, self.item_embedding.weight), goals, reduction="sum")
        return losses / max(len(goals), 1)

    def draw(self, users: torch.Tensor) -> torch.Tensor:
        """Negatives for positions, uniform over the candidates that are not in their user's train history.

        Args:
            users: int64 ``[P]``, whose each position is.

        Returns:
            int64 ``[P, negatives]``.
        """
        drawn = torch.from_numpy(self.sampler.sample(users.cpu().numpy(), self.negatives))
        return drawn.view(self.negatives, len(users)).t().to(users.device)

    def _binary(self, hidden: torch.Tensor, goals: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        """Summed binary cross entropy, ``-log s(x+) - sum_j log(1 - s(x-_j))`` a position.

        Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, equation 6.

        Args:
            hidden: ``[P, H]``.
            goals: int64 ``[P]``.
            negatives: int64 ``[P, N]``.
        """
        positive = (hidden * self.item_embedding(goals)).sum(dim=-1)
        negative = torch.einsum("ph,pnh->pn", hidden, self.item_embedding(negatives))
        return F.softplus(-positive).sum() + F.softplus(negative).sum()
