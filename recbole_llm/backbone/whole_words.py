"""Which word of its prompt a token belongs to, told to a language model: P5's whole-word embeddings.

A word is a word of the text, or all tokens of an item's or a user's id. Its number rides in the token's id, above the
vocabulary, so that whatever handles prompts (packed batches, shared openings) needs to know nothing of it.

Source: Geng et al., "Recommendation as Language Processing (RLP): A Unified Pretrain, Personalized Prompt & Predict
Paradigm (P5)", RecSys 2022, arXiv 2203.13366.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.prompts import Ragged

# Words that are told apart, as many as P5 has; later ones count as the last. Number 0 is no word.
WORDS = 512
_SHIFT = 24
# On the first token of a word; within the 32 bits that tables of tokens have.
START = 1 << 30
# How pieces begin that stand behind a blank, in byte-level vocabularies and in SentencePiece's.
_BLANKS = ("Ġ", "▁")


class WholeWords(nn.Module):
    """The embeddings of words' numbers, added to those of their tokens.

    Args:
        hidden_size: of the language model.

    Attributes:
        weight: float32 ``[WORDS, H]``; zeros before training, so that the language model reads at first as without.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(WORDS, hidden_size))


class WordedEmbedding(nn.Module):
    """A table of embeddings whose ids may carry the number of a word; stands where the language model's own stood.

    Args:
        table: what stood there.
        words: of :class:`WholeWords`, live.
    """

    def __init__(self, table: Any, words: nn.Parameter) -> None:
        super().__init__()
        self.table, self.words = table, words
        self.embedding_dim, self.num_embeddings = table.embedding_dim, table.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., H]`` of ids int64 ``[...]``, in the table's type."""
        known: Tensor = self.table(ids & ((1 << _SHIFT) - 1))
        # No word has no embedding: its row is never learned.
        return known + F.embedding(ids >> _SHIFT, self.words, padding_idx=0).to(known.dtype)


def read_words(backbone: Backbone) -> WholeWords:
    """Have a language model read the numbers of words, in place."""
    decoder: Any = backbone.decoder
    table = decoder.get_input_embeddings()
    words = WholeWords(table.embedding_dim).to(backbone.embed_tokens.weight.device)
    decoder.set_input_embeddings(WordedEmbedding(table, words.weight))
    return words


class WordStarts:
    """Marks where words of texts begin.

    Args:
        backbone: whose pieces they are.
    """

    def __init__(self, backbone: Backbone) -> None:
        count = len(backbone.tokenizer)
        pieces = backbone.tokenizer.convert_ids_to_tokens(list(range(count)))
        self._marks = [START if str(piece).startswith(_BLANKS) else 0 for piece in pieces]

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        """Token ids with :data:`START` on those that open a word behind a blank."""
        return [[token | self._marks[token] for token in row] for row in rows]


def opened(rows: Ragged) -> Ragged:
    """Rows of token ids, each of them one word."""
    return Ragged(rows.values | torch.where(rows.positions == 0, START, 0), rows.offsets)


def without_marks(ids: Tensor) -> Tensor:
    """Token ids as they were before any mark."""
    return ids & (START - 1)


def numbered(ids: Tensor, last: Tensor) -> Tensor:
    """Marked token ids as ids that carry the number of their word, counted from 1 in each prompt.

    Args:
        ids: int64 ``[B, T]``.
        last: int64 ``[B]``, the place of each prompt's last token that is of a word; what follows is of none.
    """
    words = ((ids & START) > 0).cumsum(1).add(1).clamp(max=WORDS - 1)
    inside = torch.arange(ids.shape[1]) <= last.unsqueeze(1)
    return without_marks(ids) + torch.where(inside, words << _SHIFT, 0)
