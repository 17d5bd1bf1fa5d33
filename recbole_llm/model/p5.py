"""P5: a language model that reads users and items as ids, spelled in several tokens, and generates the next item's.

What the ids of items are is the recipe of their tokens (``properties/item_tokens``: ``random``, ``sequential``,
``collaborative``, ``semantic``, or any other); those of users are numbers in the language model's own pieces. Beside
the next item of a history it learns a user's items without one, and it is told which tokens are one word.

Sources: Geng et al., "Recommendation as Language Processing (RLP): A Unified Pretrain, Personalized Prompt & Predict
Paradigm (P5)", RecSys 2022, arXiv 2203.13366; Hua et al., "How to Index Item IDs for Recommendation Foundation Models",
SIGIR-AP 2023, arXiv 2305.06569; tasks and prompts as in OpenP5 (Xu et al., SIGIR 2024, arXiv 2306.11134). What differs,
and why, stands in ``properties/model/P5.yaml``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.backbone.whole_words import WordStarts, numbered, opened, read_words, without_marks
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.ties import tie_order
from recbole_llm.data.token_table import TokenTable
from recbole_llm.itemid.identifiers import spelled
from recbole_llm.model.aligntokenrec import AlignTokenRec
from recbole_llm.tasks.base import USER, check_no_texts, of_users


class P5(AlignTokenRec):
    """P5 (arXiv 2203.13366) with the ids of arXiv 2305.06569, as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories`` and the raw ids of users.

    Attributes:
        user_mark: uint8 ``[32]``, whose number is which; a part of the weights, as what is learned of a number is of
            one user.
    """

    tells_user = True
    user_mark: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        check_no_texts(self.tasks)
        self._whole_words: bool = config["whole_word_embeddings"]
        self._histories = dataset.train_histories
        self._user_numbers = spelled(_users_in_order(config, dataset))
        named = sorted(zip(dataset.field2id_token[self.USER_ID].tolist(), self._user_numbers, strict=True))
        digest = bytearray(hashlib.sha256(json.dumps(named).encode()).digest())
        self.register_buffer("user_mark", torch.frombuffer(digest, dtype=torch.uint8))

    def prepare(self, *, backbone: Any, texts: Mapping[str, Sequence[str] | TokenTable], **made: Any) -> None:
        """See :meth:`~recbole_llm.model.generative.GenerativeRecommender.prepare`."""
        self._starts = WordStarts(backbone) if self._whole_words else None
        users = self._words(Ragged.from_lists(backbone.encode_batch(self._user_numbers)))
        texts = {**texts, USER: TokenTable(users.values.numpy().astype(np.int32), users.offsets.numpy())}
        super().prepare(backbone=backbone, texts=texts, **made)

    def _take_tokens(self, item_tokens: Any, head_model: Any, codebook: Tensor | None) -> None:
        super()._take_tokens(item_tokens, head_model, codebook)
        if self._whole_words:
            self.whole_words = read_words(self.backbone)

    # Prompts

    def _words(self, rows: Ragged) -> Ragged:
        """Rows of token ids that are a word each."""
        return opened(rows) if self._whole_words else rows

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        rows = super()._encode(texts)
        return rows if self._starts is None else self._starts(rows)

    def _shown(self) -> Ragged:
        return self._words(super()._shown())

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples; each tells of the user whose item it asks for."""
        batch = super().training_batch(of_users(interaction, self._histories))
        if not self._whole_words:
            return batch
        # Words are of what is asked, as in P5, whose encoder alone is told of them; a search tells of none either.
        told = batch.answers
        last = torch.full((len(batch.ids),), batch.ids.shape[1])
        last = last.scatter_reduce(0, batch.rows[told], batch.places[told], "amin")
        return replace(batch, ids=numbered(batch.ids, last), labels=without_marks(batch.labels))

    # Inference

    def _ask(self, history: Ragged, users: Tensor | None) -> Ragged:
        asked = super()._ask(history, users)
        if not self._whole_words:
            return asked
        ids = numbered(asked.padded(0), asked.lengths - 1)
        return Ragged.from_padded(ids, torch.arange(ids.shape[1]) < asked.lengths.unsqueeze(1))


def _users_in_order(config: Any, dataset: Any) -> np.ndarray:
    """Users but the padding one in the order of their numbers: int64 ``[n_users - 1]``."""
    if config["user_ids"] == "sequential":
        return np.arange(1, dataset.user_num)
    # Of names and the seed alone: internal ids are in the order of the data file.
    order = tie_order(dataset.field2id_token[dataset.uid_field]).numpy()
    return np.random.default_rng(config["seed"]).permutation(order[order > 0])
