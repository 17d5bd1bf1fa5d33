"""Graph models whose items are pulled to their descriptions: GLTA's baselines LightGCN+ and HCCF+."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from recbole_llm.model.contrast import InfoNCE
from recbole_llm.model.hccf import HCCF
from recbole_llm.model.lightgcn import LightGCN
from recbole_llm.model.standardise import standardised

if TYPE_CHECKING:
    from recbole.data.interaction import Interaction


def projector(kind: str, width: int, target: int) -> nn.Module:
    """What takes vectors from one width to another.

    Args:
        kind: ``linear``; or ``mlp``, two layers with a leaky ReLU between, as wide as the mean of both (RLMRec's).
        width: of what comes in.
        target: of what goes out.
    """
    if kind == "linear":
        return nn.Linear(width, target)
    between = (width + target) // 2
    return nn.Sequential(nn.Linear(width, between), nn.LeakyReLU(), nn.Linear(between, target))


class TextContrast:
    r"""Adds the contrast of items with their descriptions to the loss of a graph model that stands behind it.

    .. math:: L = L_\mathrm{base} + \lambda \, \mathrm{InfoNCE}(e_i, f(t_i); \tau)

    :math:`e_i` is an item's embedding after the graph, :math:`t_i` what a frozen language model makes of its
    description and :math:`f` a projector, all compared by their cosine, among the distinct positive items of the batch.
    The paper of GLTA (Yang et al., WWW 2025 Companion, arXiv 2502.18757) says of its LightGCN+ and HCCF+ only that
    InfoNCE aligns node embeddings with those that a sentence encoder (MiniLM) has of the descriptions. What it leaves
    open is as in RLMRec-Con (Ren et al., WWW 2024, the authors' code), which has the same term over profiles.

    Ours: the descriptions are read by the run's language model (``llm``), what it makes of them is centred and scaled,
    an item without a description has no part in the term, and the projector has no penalty.

    The model behind it has ``loss_and_nodes``.

    Args:
        config: has ``text_weight``, ``text_tau``, ``projector`` and what the base has.
        dataset: the train rows.
    """

    stages: tuple[str, ...]

    device: Any
    n_users: int
    ITEM_ID: str
    item_texts: torch.Tensor
    described: torch.Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)  # type: ignore[call-arg]
        self.text_weight = config["text_weight"]
        self.text_tau = config["text_tau"]
        self._width, self._kind = config["embedding_size"], config["projector"]

    def take_item_texts(self, vectors: torch.Tensor, described: torch.Tensor) -> None:
        """Take in what the language model makes of the items' descriptions, and build the projector.

        Args:
            vectors: float ``[n_items, H]``, by internal item id.
            described: bool ``[n_items]``, which items have a description of their own.
        """
        buffers = {"item_texts": standardised(vectors, described), "described": described}
        for name, values in buffers.items():
            self.register_buffer(name, values, persistent=False)  # type: ignore[attr-defined]
        self.text_projector = projector(self._kind, vectors.shape[1], self._width).to(self.device)
        self.to(self.device)  # type: ignore[attr-defined]

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """The base's loss and the weighted contrast with the descriptions.

        Args:
            interaction: RecBole's pairwise batch: user, item and negative item ids, each ``[B]``.

        Returns:
            The loss, of the base's shape.
        """
        loss: torch.Tensor
        loss, nodes = self.loss_and_nodes(interaction)  # type: ignore[attr-defined]
        if self.text_weight:
            loss = loss + self.text_weight * self.text_loss(nodes, interaction[self.ITEM_ID])
        return loss

    def text_loss(self, nodes: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """InfoNCE of items with their descriptions; zero where none has one.

        Args:
            nodes: ``[n_users + n_items, d]``, final embeddings.
            items: int64 ``[B]``; one that stands there twice counts once.

        Returns:
            A scalar.
        """
        items = torch.unique(items)
        items = items[self.described[items]]
        if not len(items):
            return nodes.new_zeros(())
        with torch.autocast(nodes.device.type, enabled=False):
            own = F.normalize(nodes.index_select(0, items + self.n_users))
            said = F.normalize(self.text_projector(self.item_texts[items]))
            loss: torch.Tensor = InfoNCE.apply(own, said, self.text_tau)
        return loss


class LightGCNPlus(TextContrast, LightGCN):
    """LightGCN+ of the GLTA paper: :class:`~recbole_llm.model.lightgcn.LightGCN` with :class:`TextContrast`."""

    stages = ("item_texts", "train-LightGCNPlus")


class HCCFPlus(TextContrast, HCCF):
    """HCCF+ of the GLTA paper: :class:`~recbole_llm.model.hccf.HCCF` with :class:`TextContrast`."""

    stages = ("item_texts", "train-HCCFPlus")
