"""SASRec over the codes of items: what semantic ids give a traditional model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F

from recbole_llm.errors import UserError
from recbole_llm.model.sasrec_all_positions import SASRecAllPositions

if TYPE_CHECKING:
    from recbole_llm.itemid.item_tokens import ItemTokens


class CodeEmbedding(nn.Module):
    """A table of items, each the sum of the embeddings of its tokens.

    It stands where ``nn.Embedding`` of items stood: it is called with item ids, and :attr:`weight` is the whole table.

    Args:
        tokens: int64 ``[n_items, N]``, the tokens of each item, -1 where it has none (padding) or fewer.
        size: of the vocabulary.
        width: of the embeddings.
        own: whether each item has an embedding of its own besides, added to the sum.
        std: of the initial values of the sum.
    """

    tokens: torch.Tensor

    def __init__(self, tokens: torch.Tensor, size: int, width: int, own: bool, std: float) -> None:
        super().__init__()
        self.register_buffer("tokens", tokens + 1, persistent=False)
        parts = tokens.size(1) + own
        self.codes = nn.Embedding(size + 1, width, padding_idx=0)
        self.items = nn.Embedding(len(tokens), width, padding_idx=0) if own else None
        for table in (self.codes, self.items):
            if table is not None:
                nn.init.normal_(table.weight, std=std / parts**0.5)
                nn.init.zeros_(table.weight[0])

    @property
    def weight(self) -> torch.Tensor:
        """The embeddings of all items, ``[n_items, H]``."""
        made = F.embedding_bag(self.tokens, self.codes.weight, mode="sum", padding_idx=0)
        return made if self.items is None else made + self.items.weight

    def forward(self, items: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[..., H]`` of items int64 ``[...]``."""
        made = self.codes(self.tokens[items]).sum(dim=-2)
        return made if self.items is None else made + self.items(items)


class SASRecCodes(SASRecAllPositions):
    """SASRec at every position whose item embeddings are sums of the embeddings of semantic codes.

    "Semantic Convergence" (Li et al., AAAI 2025, arXiv 2412.13771) names such codes, as features for traditional
    models, its second contribution, and does not say how they enter. Here an item is the sum of one embedding a level,
    at the input and at the output; with ``item_input: codes_and_id`` an embedding of its own is added. Everything else
    is :class:`~recbole_llm.model.sasrec_all_positions.SASRecAllPositions`, so that a difference is the codes'.

    Args:
        config: the run's configuration.
        dataset: the train data set.
    """

    parts = ("embedding_model",)
    item_parts = ("embedding_model",)
    stages = ("item_tokens", "train-SASRecCodes")

    n_items: int

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self._own = config["item_input"] == "codes_and_id"

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Put the item table over tokens in the place of RecBole's, as large at first.

        Args:
            tokens: of every item.
        """
        padded, _ = tokens.padded(torch.arange(self.n_items))
        table = CodeEmbedding(padded, tokens.size, self.hidden_size, self._own, self.initializer_range)
        self.item_embedding = table.to(self.device)

    def enter_items(self, tokens: ItemTokens, tie_order: torch.Tensor) -> None:
        """Let items that came after training be read and ranked; nothing that was learned changes.

        Args:
            tokens: of every item, those that were there first under the ids they had.
            tie_order: all item ids; equal scores are not this model's to order.

        Raises:
            UserError: items have embeddings of their own, and a new one has none.
        """
        if self._own:
            raise UserError(
                "a new item has no embedding of its own (item_input: codes_and_id); train with item_input: codes"
            )
        padded, _ = tokens.padded(torch.arange(tokens.n_items))
        self.item_embedding.tokens = (padded + 1).to(self.device)
        self.n_items = tokens.n_items
