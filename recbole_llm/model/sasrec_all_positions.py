"""SASRec trained at every position of a user's history at once, as its authors did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from recbole_llm.errors import UserError
from recbole_llm.model.sasrec import SASRec
from recbole_llm.model.transformer import by_length, causal_mask

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class SASRecAllPositions(SASRec):
    """RecBole's SASRec with one training row for a window of a user's history instead of one for each prefix.

    Every position predicts its next item (Kang and McAuley, ICDM 2018, section III-E), here by cross entropy over all
    items as RecBole's SASRec does. The causal encoder gives each position what RecBole's row for that prefix would give
    it, so the same predictions are learnt from a fraction of the computation. It is another model than SASRec in the
    tables all the same: a batch holds whole histories, and where a history is cut into several windows a position
    sees the items of its own window only.

    Args:
        config: RecBole's ``Config``; ``loss_type`` is ``CE``.
        dataset: the train data set.

    Raises:
        UserError: another ``loss_type``.
    """

    train_view = "windows"
    TARGETS = "target_list"  # int64 [B, L]: the item after each position, 0 where none is learnt

    def __init__(self, config: Any, dataset: Any) -> None:
        if config["loss_type"] != "CE":
            raise UserError(f"SASRecAllPositions has loss_type CE only, not {config['loss_type']}; SASRec has BPR too")
        super().__init__(config, dataset)

    def encode_all(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The encoder's output at every position, ``[B, L, H]`` for item ids ``[B, L]``."""
        hidden = self.embed(item_seq)
        mask = causal_mask(item_seq.size(1), hidden)
        for layer in self.trm_encoder.layer:
            hidden = layer(hidden, mask)
        return hidden

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Mean cross entropy over all items at the positions with a target.

        Args:
            interaction: item ids ``[B, L]`` padded on the right, their lengths ``[B]`` and the targets ``[B, L]``.

        Returns:
            The loss, a scalar; 0 for a batch without a target.
        """
        item_seq, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        targets = interaction[self.TARGETS]
        outputs, wanted = [], []
        for rows, end in by_length(lengths, item_seq.size(1)):
            part, goal = (item_seq, targets) if rows is None else (item_seq[rows], targets[rows])
            goal = goal[:, :end]
            learnt = goal != 0
            outputs.append(self.encode_all(part[:, :end])[learnt])
            wanted.append(goal[learnt])
        goals = torch.cat(wanted)
        logits = F.linear(torch.cat(outputs), self.item_embedding.weight)
        return F.cross_entropy(logits, goals, reduction="sum") / max(len(goals), 1)
