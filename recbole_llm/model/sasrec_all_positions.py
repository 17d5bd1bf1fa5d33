"""SASRec trained at every position of a user's history at once, as its authors did."""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch

from recbole_llm.errors import UserError
from recbole_llm.model.all_positions import AllPositions
from recbole_llm.model.sasrec import SASRec
from recbole_llm.model.transformer import causal_mask


class SASRecAllPositions(AllPositions, SASRec):
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

    def __init__(self, config: Any, dataset: Any) -> None:
        if config["loss_type"] not in ("CE", "BCE"):
            raise UserError(f"SASRecAllPositions has loss_type CE or BCE, not {config['loss_type']}; SASRec has BPR")
        # RecBole's SASRec refuses a loss that it does not have.
        super().__init__(ChainMap({"loss_type": "CE"}, config), dataset)
        self.take_loss(config, dataset)

    def encode_all(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The encoder's output at every position, ``[B, L, H]`` for item ids ``[B, L]``."""
        hidden = self.embed(item_seq)
        mask = causal_mask(item_seq.size(1), hidden)
        for layer in self.trm_encoder.layer:
            hidden = layer(hidden, mask)
        return hidden
