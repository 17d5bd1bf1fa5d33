"""Popularity as it is meant: the number of train interactions of an item."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from recbole.model.general_recommender.pop import Pop as RecBolePop

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


class Pop(RecBolePop):
    """RecBole's Pop with every interaction counted.

    RecBole's (pop.py:44) adds one for an item however often it stands in a batch, and counts sampled negatives too, so
    with its own batch size the counts say little of popularity. ``properties/model/Pop.yaml`` asks for no negatives.
    """

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Count a batch's items.

        Args:
            interaction: RecBole's pointwise batch without negatives: item ids ``[B]``.

        Returns:
            Zero, ``[1]``, as in RecBole.
        """
        items = interaction[self.ITEM_ID]
        self.item_cnt.index_add_(0, items, torch.ones_like(items)[:, None])
        self.max_cnt = torch.max(self.item_cnt, dim=0)[0]
        return torch.zeros(1, device=self.device, requires_grad=True)
