"""TIGER: an encoder-decoder reads a user's history as semantic ids and writes the next item's.

Items become tokens by an RQ-VAE of their texts' embeddings, and a further token numbers those with equal codes
(``properties/item_tokens/tiger.yaml``). The encoder reads one token of the user and the items' tokens, and no word; a
T5 that nothing trained beforehand learns next items from that.

Source: Rajput et al., "Recommender Systems with Generative Retrieval", NeurIPS 2023, arXiv 2305.05065.
There is no official code. What the paper leaves open, and what differs, stands in ``properties/model/TIGER.yaml``.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.token_table import TokenTable
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import AlignTokenRec
from recbole_llm.tasks.base import USER, check_no_texts, of_users


class TIGER(AlignTokenRec):
    """TIGER (arXiv 2305.05065) as a RecBole recommender.

    A user's token is that of a bucket that his id falls into by a hash, so that users whom training has not
    seen have one too. With ``user_tokens: 0`` a history alone says all.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        if not self.further_tokens:
            return
        check_no_texts(self.tasks)
        self._histories = dataset.train_histories
        names = dataset.field2id_token[self.USER_ID].tolist()
        self._buckets = torch.tensor([zlib.crc32(str(name).encode()) % self.further_tokens for name in names])

    @property
    def further_tokens(self) -> int:  # type: ignore[override]
        """Tokens of users."""
        return int(self.config["user_tokens"])

    @property
    def tells_user(self) -> bool:  # type: ignore[override]
        """Whether prompts hold a token of the user."""
        return self.further_tokens > 0

    def prepare(
        self, *, item_tokens: ItemTokens, backbone: Any, texts: Mapping[str, Sequence[str] | TokenTable], **made: Any
    ) -> None:
        """See :meth:`~recbole_llm.model.generative.GenerativeRecommender.prepare`."""
        if self.tells_user:
            first = backbone.embed_tokens.num_embeddings + item_tokens.size
            texts = {**texts, USER: TokenTable.of([[first + bucket] for bucket in self._buckets.tolist()])}
        super().prepare(item_tokens=item_tokens, backbone=backbone, texts=texts, **made)

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples, with their users."""
        if not self.tells_user:
            return super().training_batch(interaction)
        return super().training_batch(of_users(interaction, self._histories))
