"""FMLP-Rec with the causal filter, trained at every position of a user's history at once."""

from __future__ import annotations

from typing import Any

import torch

from recbole_llm.errors import UserError
from recbole_llm.model.all_positions import AllPositions
from recbole_llm.model.fmlp import FMLP


class FMLPAllPositions(AllPositions, FMLP):
    """FMLP with ``filter: causal`` and one training row for a window of history instead of one for each prefix.

    Each position has the output that FMLP's row for its prefix would have, so the same predictions are learnt from a
    fraction of the computation. Not the authors': their filter sees later items, and trained at every position it
    would be shown what it has to predict.

    Limits: where a history is cut into several windows a position sees the items of its own window only.

    Args:
        config: as for :class:`~recbole_llm.model.fmlp.FMLP`; with ``loss_type: BCE`` also ``negatives``.
        dataset: the train data set.

    Raises:
        UserError: another ``filter`` than ``causal``, or an unknown ``loss_type``.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        if config["filter"] != "causal":
            raise UserError(
                f"training at all positions needs filter: causal, not {config['filter']!r}: the original filter sees "
                "later items, the one to predict among them"
            )
        super().__init__(config, dataset)
        self.take_loss(config, dataset)

    def encode_all(self, item_seq: torch.Tensor) -> torch.Tensor:
        """The output at every position, ``[B, L, H]`` for item ids ``[B, L]`` padded on the right."""
        hidden = self.embed(item_seq)
        for block in self.blocks:
            hidden = block(hidden)
        return hidden
