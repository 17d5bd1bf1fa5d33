"""LETTER: a language model that generates items as codes which know texts and behaviour and are evenly used.

Items become tokens by an RQ-VAE of their texts' embeddings with two more terms in its loss
(:mod:`recbole_llm.itemid.letter`, ``properties/item_tokens/letter.yaml``). The generative half is that of the model
which reads them, with a temperature in the cross-entropy: the authors' "ranking-guided generation loss", by which a
low temperature weighs the hardest other tokens more.

Source: Wang et al., "Learnable Item Tokenization for Generative Recommendation", CIKM 2024, arXiv 2405.07314, and the
authors' public code, which puts it into TIGER and into LC-Rec. This is the latter's form, of the sequential task alone.
What differs from the authors' program, and why, stands in ``properties/model/LETTER.yaml``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from recbole_llm.data.instructions import TokenBatch
from recbole_llm.model.aligntokenrec import AlignTokenRec

if TYPE_CHECKING:
    from recbole_llm.objectives.soft_labels import SoftLabels
    from recbole_llm.objectives.soft_loss import SoftLabelLoss


class LETTER(AlignTokenRec):
    """LETTER (arXiv 2405.07314) as a RecBole recommender: AlignTokenRec's parts with other tokens and loss."""

    def label_loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Mean over labels of ``-log softmax(logits / loss_temperature)[label]``.

        Args:
            logits: float ``[L, V]``, those of the batch's labels.
            batch: which labels.

        Returns:
            float32 scalar.
        """
        return F.cross_entropy(logits / self.config["loss_temperature"], batch.labels.to(self.device))

    def mean_loss(self, logits: Tensor, soft: SoftLabels, loss: SoftLabelLoss, counted: Tensor | None = None) -> Tensor:
        """The mean over labels against soft ones, at ``loss_temperature`` too.

        Args:
            logits: float ``[L, V]``, those of the batch's labels.
            soft: the labels.
            loss: of each; its own temperature divides what this one leaves.
            counted: bool ``[L]``, which of them count; ``None``, all.

        Returns:
            float32 scalar; 0 where no label counts.
        """
        return super().mean_loss(logits, soft, replace(loss, tau=loss.tau * self.config["loss_temperature"]), counted)
