"""Further tokens for a language model: rows of their own behind its table of embeddings and behind its vocabulary head.

The model's own tables stay as they are; an id from their size on is a new token. Where input and output share a
table, so do the new rows. What the rows of the table are made of may be a codebook (:mod:`.codebook_rows`); a head of
its own has rows of its own either way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.codebook_rows import CodebookRows
from recbole_llm.backbone.live_head import LiveHead, own_rows
from recbole_llm.decoding.head import Head

# Rows that are weights, or that are made anew at each pass.
Rows = nn.Parameter | CodebookRows


class CodeTokens(nn.Module):
    """The rows of new tokens, in float32 whatever the type of the language model: Adam's steps are lost in less.

    Args:
        count: new tokens.
        inputs: the language model's table, ``[V, H]``; rows are drawn at the size of its own.
        outputs: its head's rows likewise, ``None`` where it has those of the table.
        codebook: float32 ``[N, C, d]``, from which the rows of the table are made; ``None``, they are weights.
        hidden: widths of the network that makes them.

    Attributes:
        inputs: ``[count, H]``, or what makes it.
        outputs: likewise; the same where the head shares its rows with the table, else weights.
    """

    def __init__(
        self,
        count: int,
        inputs: Tensor,
        outputs: Tensor | None,
        codebook: Tensor | None = None,
        hidden: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.inputs: Rows = (
            self._rows(count, inputs)
            if codebook is None
            else CodebookRows(codebook, count, inputs.shape[1], hidden, self._size(inputs))
        )
        self.own_outputs = None if outputs is None else self._rows(count, outputs)

    @staticmethod
    def _size(like: Tensor) -> float:
        return float(like.detach().float().square().mean().sqrt())

    def _rows(self, count: int, like: Tensor) -> nn.Parameter:
        return nn.Parameter(torch.randn(count, like.shape[1]) * self._size(like))

    @property
    def outputs(self) -> Rows:
        """Rows of the head."""
        return self.inputs if self.own_outputs is None else self.own_outputs


def _now(rows: Tensor | Callable[[], Tensor]) -> Tensor:
    return rows if isinstance(rows, Tensor) else rows()


class ExtendedEmbedding(nn.Module):
    """A table of embeddings with further rows behind it; stands where the language model's own stood.

    Args:
        table: the model's own, kept.
        rows: ``[count, H]``, those of ids from the table's size on.
        count: how many.
    """

    def __init__(self, table: nn.Embedding, rows: Rows, count: int) -> None:
        super().__init__()
        self.table, self.rows = table, rows
        self.embedding_dim, self.num_embeddings = table.embedding_dim, table.num_embeddings + count
        self._scale = _factor(table)

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., H]`` of ids int64 ``[...]``, in the table's type."""
        first = self.table.num_embeddings
        known = self.table(ids.clamp(max=first - 1))
        new = F.embedding((ids - first).clamp(min=0), _now(self.rows)) * self._scale
        return torch.where((ids >= first).unsqueeze(-1), new.to(known.dtype), known)


@torch.no_grad()
def _factor(table: nn.Embedding) -> float:
    """What an embedding module multiplies its rows with; Gemma's has the root of the width."""
    row = table.weight.detach().float().norm(dim=1).argmax()
    return float(table(row).float().norm() / table.weight[row].float().norm())


class ExtendedHead(LiveHead):
    """A vocabulary head with further rows behind its own, as it stands at each moment of the training.

    Args:
        head: the language model's.
        weight: its rows ``[V, H]``, live.
        rows: ``[count, H]``, live.
    """

    def __init__(self, head: Head, weight: Tensor, rows: Rows) -> None:
        super().__init__(head, weight)
        self._rows = rows

    def logits(self, states: Tensor) -> Tensor:
        """Logits of all tokens, the new ones last.

        Args:
            states: ``[L, H]``.

        Returns:
            float32 ``[L, V + count]``.
        """
        states = states.to(self._weight.dtype)
        known, new = F.linear(states, self._weight, self._bias), F.linear(states, _now(self._rows).to(states.dtype))
        return self._capped(torch.cat([known, new], dim=-1))

    @torch.no_grad()
    def for_search(self) -> Head:
        """The head as a search reads it; later training does not reach it."""
        rows = _now(self._rows)
        weight = torch.cat([self._weight, rows.to(self._weight)])
        bias = None if self._bias is None else F.pad(self._bias, (0, len(rows)))
        return Head(weight, bias, scale=self._scale, softcap=self._softcap)


def extend(
    backbone: Backbone, model: Any, count: int, codebook: Tensor | None = None, hidden: Sequence[int] = ()
) -> tuple[CodeTokens, nn.Parameter | None, ExtendedHead]:
    """Give a language model new tokens: it reads ids from the size of its table on.

    Args:
        backbone: whose decoder gets them, in place.
        model: the same language model with its vocabulary head.
        count: new tokens.
        codebook, hidden: see :class:`CodeTokens`.

    Returns:
        The new rows; the head's own rows, ``None`` where they are the table's; the head with both.
    """
    table = backbone.embed_tokens
    head, own = Head.of(model), own_rows(model)
    tokens = CodeTokens(count, table.weight, own, codebook, hidden).to(table.weight.device)
    decoder: Any = backbone.decoder
    decoder.set_input_embeddings(ExtendedEmbedding(table, tokens.inputs, count))
    return tokens, own, ExtendedHead(head, table.weight if own is None else own, tokens.outputs)
