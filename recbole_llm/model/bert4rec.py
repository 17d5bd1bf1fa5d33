"""BERT4Rec as RecBole has it, on faster kernels and computed at the masked positions only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from recbole_llm import compat
from recbole_llm.errors import UserError
from recbole_llm.model.transformer import accelerate, embed, encode_at, encode_by_length

with compat.anomaly_mode_kept():
    from recbole.model.sequential_recommender.bert4rec import BERT4Rec as RecBoleBERT4Rec

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class BERT4Rec(RecBoleBERT4Rec):
    """RecBole's BERT4Rec (Sun et al., CIKM 2019): same parameters, masking, losses and scores, less time.

    Attributes:
        slots_needed: whether it is trained on RecBole's batches, with as many slots as its longest history has masks.

    Args:
        config: RecBole's ``Config``.
        dataset: the train data set.
    """

    slots_needed = True

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if self.slots_needed and self.mask_item_length < 1:
            raise UserError(
                f"mask_ratio {self.mask_ratio} of MAX_ITEM_LIST_LENGTH {self.max_seq_length} masks not even one item; "
                "raise one of them"
            )
        accelerate(self)

    def reconstruct_test_data(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Put the mask after the last item; as in RecBole the first item gives way, also where there is room.

        Args:
            item_seq: int64 ``[B, L]``, padded on the right.
            item_seq_len: int64 ``[B]``.

        Returns:
            int64 ``[B, L]``; the mask is at ``item_seq_len - 1``.
        """
        wider = F.pad(item_seq, (0, 1))
        return wider.scatter(1, item_seq_len.unsqueeze(1), self.mask_token)[:, 1:]

    def encode_positions(self, item_seq: torch.Tensor, lengths: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The encoder's output, before the output head.

        Args:
            item_seq: int64 ``[B, L]``, masked, padded on the right.
            lengths: int64 ``[B]``, the filled positions of each row.
            positions: int64 ``[B, P]``.

        Returns:
            ``[B, P, H]``.
        """
        return encode_by_length(self._encode, item_seq, lengths, positions)

    def _embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        return embed(self, item_seq)

    def _encode(self, item_seq: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self._embed(item_seq)
        return encode_at(self.trm_encoder, hidden, self.get_attention_mask(item_seq, bidirectional=True), positions)

    def output_head(self, hidden: torch.Tensor) -> torch.Tensor:
        """The two-layer head before the item embeddings (Sun et al. 2019, equation 7): ``[..., H]`` to the same."""
        return self.output_ln(self.output_gelu(self.output_ffn(hidden)))

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Mean loss over the masked items.

        A masked position 0 is not counted, which is RecBole's habit: it marks the unused slots with 0. A batch without
        any counted position has the loss 0 (RecBole divides by 0 there).

        Args:
            interaction: RecBole's batch after its ``mask_itemseq`` transform.

        Returns:
            The loss, a scalar.
        """
        item_seq = interaction[self.MASK_ITEM_SEQ]
        positions, wanted = interaction[self.MASK_INDEX], interaction[self.POS_ITEMS]
        counted = positions > 0
        # The slots are filled from the right, and a fine-tuning batch fills one of them.
        first = int(counted.any(dim=0).to(torch.uint8).argmax())
        positions, counted = positions[:, first:], counted[:, first:]
        hidden = self.encode_positions(item_seq, (item_seq != 0).sum(dim=1), positions)
        output = self.output_head(hidden[counted])
        wanted = wanted[:, first:][counted]
        if self.loss_type == "CE":
            logits = F.linear(output, self.item_embedding.weight[: self.n_items], self.output_bias)
            losses = F.cross_entropy(logits, wanted, reduction="sum")
        else:
            refused = interaction[self.NEG_ITEMS][:, first:][counted]
            difference = self._score(output, wanted) - self._score(output, refused)
            losses = -torch.log(1e-14 + torch.sigmoid(difference)).sum()
        return losses / max(len(wanted), 1)

    def _score(self, output: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        return (output * self.item_embedding(items)).sum(dim=-1) + self.output_bias[items]

    def _at_mask(self, interaction: Interaction) -> torch.Tensor:
        lengths = interaction[self.ITEM_SEQ_LEN]
        item_seq = self.reconstruct_test_data(interaction[self.ITEM_SEQ], lengths)
        return self.output_head(self.encode_positions(item_seq, lengths, (lengths - 1).unsqueeze(1))).squeeze(1)

    def predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of the given items as the next ones, ``[B]``."""
        return self._score(self._at_mask(interaction), interaction[self.ITEM_ID])

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        """Scores of all items as the next one, ``[B, n_items]``."""
        return F.linear(self._at_mask(interaction), self.item_embedding.weight[: self.n_items], self.output_bias)
