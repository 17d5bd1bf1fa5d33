"""A language model's vocabulary head as it stands at each moment of the training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.decoding.head import Head


class LiveHead:
    """The head of a language model whose weights may train.

    Args:
        head: the language model's, for what it does to its logits.
        weight: its rows ``[V, H]``, live.
    """

    def __init__(self, head: Head, weight: Tensor) -> None:
        self._scale, self._softcap, self._bias = head.scale, head.softcap, head.bias
        self._weight = weight

    def logits(self, states: Tensor) -> Tensor:
        """Logits of all tokens.

        Args:
            states: ``[L, H]``.

        Returns:
            float32 ``[L, V]``.
        """
        return self._capped(F.linear(states.to(self._weight.dtype), self._weight, self._bias))

    def logits_of(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Logits of some tokens of the language model, whose rows alone are read.

        Args:
            tokens: int64 ``[U]``.
            states: ``[L, H]``.

        Returns:
            float32 ``[L, U]``.
        """
        bias = None if self._bias is None else self._bias.index_select(0, tokens)
        return self._capped(F.linear(states.to(self._weight.dtype), self._weight.index_select(0, tokens), bias))

    def _capped(self, logits: Tensor) -> Tensor:
        logits = logits.float() * self._scale
        return logits if self._softcap is None else self._softcap * torch.tanh(logits / self._softcap)

    @torch.no_grad()
    def for_search(self) -> Head:
        """The head as a search reads it; later training does not reach it."""
        return Head(self._weight, self._bias, scale=self._scale, softcap=self._softcap)


def own_rows(model: Any) -> nn.Parameter | None:
    """A head's rows where they are not those of the table of embeddings, in the memory that the model has them in.

    Args:
        model: a Hugging Face causal language model, with its vocabulary head.

    Returns:
        ``[V, H]``, to be registered where it is to train; ``None`` where the head is tied.
    """
    output = model.get_output_embeddings().weight
    tied = output is model.get_input_embeddings().weight
    return None if tied else nn.Parameter(output.detach(), requires_grad=False)


def live_head(model: Any, table: Tensor) -> tuple[LiveHead, nn.Parameter | None]:
    """A language model's head as it trains.

    Args:
        model: with its vocabulary head.
        table: the rows of its embeddings ``[V, H]``, live.

    Returns:
        The head, and its own rows as :func:`own_rows` has them.
    """
    own = own_rows(model)
    return LiveHead(Head.of(model), table if own is None else own), own
