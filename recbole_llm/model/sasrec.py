"""SASRec as RecBole has it, on faster kernels and without computing what no loss or score looks at."""

from __future__ import annotations

from typing import Any

import torch

from recbole_llm import compat
from recbole_llm.model.transformer import accelerate, causal_mask, embed, encode_at, encode_by_length

with compat.anomaly_mode_kept():
    from recbole.model.sequential_recommender.sasrec import SASRec as RecBoleSASRec


class SASRec(RecBoleSASRec):
    """RecBole's SASRec (Kang and McAuley, ICDM 2018): same parameters, training rows, losses and scores, less time.

    Args:
        config: RecBole's ``Config``.
        dataset: the train data set.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        accelerate(self)

    def embed(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The encoder's input, ``[B, L, H]`` for item ids ``[B, L]``."""
        return embed(self, item_seq)

    def forward(self, item_seq: torch.Tensor, item_seq_len: torch.Tensor) -> torch.Tensor:
        """The encoder's output at each sequence's last item.

        Args:
            item_seq: int64 ``[B, L]``, oldest item first, padded with 0 on the right.
            item_seq_len: int64 ``[B]``, at least 1.

        Returns:
            ``[B, H]``.
        """
        return encode_by_length(self._encode, item_seq, item_seq_len, (item_seq_len - 1).unsqueeze(1)).squeeze(1)

    def _encode(self, item_seq: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(item_seq)
        return encode_at(self.trm_encoder, hidden, causal_mask(item_seq.size(1), hidden), positions)
