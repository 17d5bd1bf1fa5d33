"""SASRec trained at every position of a user's history at once, as its authors did."""

from __future__ import annotations

from collections import ChainMap
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from recbole.utils import InputType

from recbole_llm.data.sampler import NegativeSampler
from recbole_llm.errors import UserError
from recbole_llm.model.sasrec import SASRec
from recbole_llm.model.transformer import by_length, causal_mask

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class SASRecAllPositions(SASRec):
    """RecBole's SASRec with one training row for a window of a user's history instead of one for each prefix.

    Every position predicts its next item (Kang and McAuley, ICDM 2018, section III-E): by cross entropy over all items
    as in RecBole's SASRec (``loss_type: CE``), or by the paper's binary cross entropy of that item against
    ``negatives`` random ones that are not in the user's train history (``BCE``). The causal encoder gives each position
    what RecBole's row for that prefix would give it, so the same predictions are learnt from a fraction of the
    computation. It is another model than SASRec in the tables all the same: a batch holds whole histories, and where a
    history is cut into several windows a position sees the items of its own window only.

    Args:
        config: RecBole's ``Config``; ``loss_type`` is ``CE`` or ``BCE``, the latter with ``negatives``.
        dataset: the train data set.

    Raises:
        UserError: another ``loss_type``.
    """

    train_view = "windows"
    input_type = InputType.POINTWISE
    TARGETS = "target_list"  # int64 [B, L]: the item after each position, 0 where none is learnt

    def __init__(self, config: Any, dataset: Any) -> None:
        if config["loss_type"] not in ("CE", "BCE"):
            raise UserError(f"SASRecAllPositions has loss_type CE or BCE, not {config['loss_type']}; SASRec has BPR")
        # RecBole's SASRec refuses a loss that it does not have.
        super().__init__(ChainMap({"loss_type": "CE"}, config), dataset)
        self.loss_type = config["loss_type"]
        if self.loss_type == "BCE":
            self.negatives = config["negatives"]
            self.sampler = NegativeSampler(
                dataset.train_histories, self.n_items, dataset.split.candidates, seed=config["seed"]
            )
            # What a resumed training puts back.
            self.generator = self.sampler.generator

    def encode_all(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The encoder's output at every position, ``[B, L, H]`` for item ids ``[B, L]``."""
        hidden = self.embed(item_seq)
        mask = causal_mask(item_seq.size(1), hidden)
        for layer in self.trm_encoder.layer:
            hidden = layer(hidden, mask)
        return hidden

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
        """Summed binary cross entropy, ``-log s(x+) - sum_j log(1 - s(x-_j))`` a position (Kang and McAuley, (6)).

        Args:
            hidden: ``[P, H]``.
            goals: int64 ``[P]``.
            negatives: int64 ``[P, N]``.
        """
        positive = (hidden * self.item_embedding(goals)).sum(dim=-1)
        negative = torch.einsum("ph,pnh->pn", hidden, self.item_embedding(negatives))
        return F.softplus(-positive).sum() + F.softplus(negative).sum()
