"""BERT4Rec trained on whole windows of history, as its authors did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from recbole.utils import InputType

from recbole_llm.errors import UserError
from recbole_llm.model.bert4rec import BERT4Rec
from recbole_llm.model.transformer import by_length

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class BERT4RecWindows(BERT4Rec):
    """RecBole's BERT4Rec with one training row for a window of a user's history instead of one for each prefix.

    Each item of a window is masked with probability ``mask_ratio``, anew in every epoch, and a share ``ft_ratio`` of
    the windows has its last item masked and nothing else, as in every ranking (Sun et al., CIKM 2019, section 3.6). An
    epoch costs a fraction of RecBole's, whose rows hold the same items as often as there are prefixes. To rank, the
    mask follows the last item, and the first one gives way only where there is no room.

    Limits: cross entropy over all items only. Where a history is cut into several windows, an item is seen with those
    of its own window.

    Args:
        config: RecBole's ``Config``; ``mask_ratio`` and ``ft_ratio`` as in RecBole's BERT4Rec.
        dataset: the train data set.

    Raises:
        UserError: another ``loss_type`` than ``CE``.
    """

    train_view = "windows"
    slots_needed = False
    input_type = InputType.POINTWISE
    TARGETS = "target_list"  # int64 [B, L]: the item after each position, 0 where there is none

    def __init__(self, config: Any, dataset: Any) -> None:
        if config["loss_type"] != "CE":
            raise UserError(f"BERT4RecWindows has loss_type CE, not {config['loss_type']}; BERT4Rec has BPR")
        super().__init__(config, dataset)
        self.ft_ratio = config["ft_ratio"]

    def reconstruct_test_data(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """Put the mask after the last item; the first item gives way where the row is full.

        Args:
            item_seq: int64 ``[B, L]``, padded on the right.
            item_seq_len: int64 ``[B]``.

        Returns:
            int64 ``[B, L]``; the mask is the last of the filled places.
        """
        wider = F.pad(item_seq, (0, 1)).scatter(1, item_seq_len.unsqueeze(1), self.mask_token)
        return torch.where((item_seq_len == item_seq.size(1)).unsqueeze(1), wider[:, 1:], wider[:, :-1])

    def _at_mask(self, interaction: Interaction) -> torch.Tensor:
        item_seq = self.reconstruct_test_data(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        lengths = (item_seq != 0).sum(dim=1)
        return self.output_head(self.encode_positions(item_seq, lengths, (lengths - 1).unsqueeze(1))).squeeze(1)

    def mask(self, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Which places of windows are masked; at least one of each.

        Args:
            lengths: int64 ``[B]``, the filled places of each row.
            width: places of a row.

        Returns:
            bool ``[B, width]``, drawn by torch's own generator.
        """
        place = torch.arange(width, device=lengths.device)
        last = place == (lengths - 1).unsqueeze(1)
        drawn = torch.rand(len(lengths), width, device=lengths.device) < self.mask_ratio
        drawn &= place < lengths.unsqueeze(1)
        only_last = torch.rand(len(lengths), device=lengths.device) < self.ft_ratio
        return torch.where((only_last | ~drawn.any(dim=1)).unsqueeze(1), last, drawn)

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Mean cross entropy of the masked items.

        Args:
            interaction: item ids ``[B, L]`` padded on the right, their lengths ``[B]`` and the item after each
                ``[B, L]``.

        Returns:
            The loss, a scalar.
        """
        inputs, targets = interaction[self.ITEM_SEQ], interaction[self.TARGETS]
        # The inputs and, one step on, the targets are one sequence, an item longer than either.
        items = torch.cat([inputs[:, :1], targets], dim=1)
        lengths = interaction[self.ITEM_SEQ_LEN] + 1
        full = (lengths > self.max_seq_length).unsqueeze(1)
        items = torch.where(full, items[:, 1:], items[:, :-1])
        lengths = lengths.clamp(max=self.max_seq_length)
        outputs, wanted = [], []
        for rows, end in by_length(lengths, items.size(1)):
            part, filled = (items, lengths) if rows is None else (items[rows], lengths[rows])
            part = part[:, :end]
            masked = self.mask(filled, end)
            hidden = self._embed(part.masked_fill(masked, self.mask_token))
            attention = self.get_attention_mask(part, bidirectional=True)
            for layer in self.trm_encoder.layer:
                hidden = layer(hidden, attention)
            outputs.append(hidden[masked])
            wanted.append(part[masked])
        output = self.output_head(torch.cat(outputs))
        logits = F.linear(output, self.item_embedding.weight[: self.n_items], self.output_bias)
        return F.cross_entropy(logits, torch.cat(wanted))
