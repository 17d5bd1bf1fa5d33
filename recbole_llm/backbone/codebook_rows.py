"""Rows of code tokens that a small network makes of the codebooks' vectors, instead of rows of their own.

Source: Li et al., "Semantic Convergence", AAAI 2025, arXiv 2412.13771, table 7: "MLP-ReLU-MLP" and
"MLP-ReLU-MLP-ReLU-MLP", through which the codebooks' vectors become embeddings of the language model's width. Network
and vectors both train with the language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.errors import UserError

# Hidden widths of each kind where no setting names others; the paper gives none.
WIDTHS: dict[str, tuple[int, ...]] = {"mlp2": (512,), "mlp3": (256, 1024)}


class CodebookRows(nn.Module):
    """Rows of all tokens: of codes from their vectors, of further tokens (a collision policy's) on their own.

    Args:
        vectors: float32 ``[N, C, d]``, the codes of each level; token ``level * C + code`` is theirs. They train too.
        count: tokens in all, at least N * C.
        width: H of the language model.
        hidden: widths of the network's hidden layers.
        size: root mean square that the rows have before training, as rows of their own would.

    Attributes:
        vectors: ``[N * C, d]``.
        extra: ``[count - N * C, H]``, or ``None``.
    """

    def __init__(self, vectors: Tensor, count: int, width: int, hidden: Sequence[int], size: float) -> None:
        super().__init__()
        self.vectors = nn.Parameter(vectors.detach().flatten(0, 1).clone())
        sizes = [self.vectors.shape[1], *hidden, width]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.network = nn.Sequential(*layers[:-1])
        rest = count - len(self.vectors)
        self.extra = nn.Parameter(torch.randn(rest, width) * size) if rest else None
        with torch.no_grad():
            factor = size / self.network(self.vectors).square().mean().sqrt()
            for weight in self.network[-1].parameters():
                weight.mul_(factor)

    def forward(self) -> Tensor:
        """The rows as they stand, ``[count, H]``."""
        made: Tensor = self.network(self.vectors)
        return made if self.extra is None else torch.cat([made, self.extra])


def hidden_widths(config: Any) -> tuple[int, ...]:
    """Widths of the hidden layers that ``code_embedding`` asks for; none where it is ``none`` or no setting.

    Raises:
        UserError: ``code_embedding_widths`` does not fit it.
    """
    kind, given = config["code_embedding"] or "none", config["code_embedding_widths"]
    if kind == "none":
        if given is not None:
            raise UserError("code_embedding_widths means nothing with code_embedding: none; set mlp2 or mlp3 too")
        return ()
    usual = WIDTHS[kind]
    if given is None:
        return usual
    if len(given) != len(usual) or not all(type(width) is int and width > 0 for width in given):
        raise UserError(
            f"code_embedding_widths should be {len(usual)} width(s) for code_embedding: {kind}, such as "
            f"{list(usual)}, but is {given!r}"
        )
    return tuple(given)
