"""Vectors of a collaborative model as tokens of a language model: ids behind its vocabulary, each with a projected row.

A prompt stays a run of ids, so whatever reads ids reads these too: packed training, searches over shared prompts,
prompt writers. No head has rows for them: they are read and never generated. Projected are the vectors that a batch
holds, each once, and not the catalogue's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.backbone.soft_tokens import token_scale

ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "relu": nn.ReLU}
LINEAR = "linear"


class Projector(nn.Sequential):
    """From a collaborative model's space into a language model's: two linear layers, or one (``linear``).

    Sources: Liao et al., "LLaRA", SIGIR 2024, arXiv 2312.02445 (GELU between layers of H); Zhang et al., "CoLLM", TKDE
    2025, arXiv 2310.19488 (ReLU behind 10 d); in float32, whatever the language model's type is.

    Args:
        kind: ``gelu``, ``relu`` or ``linear``.
        sizes: d, the hidden width, H of the language model.
    """

    def __init__(self, kind: str, sizes: Sequence[int]) -> None:
        first, hidden, last = sizes
        if kind == LINEAR:
            super().__init__(nn.Linear(first, last))
        else:
            super().__init__(nn.Linear(first, hidden), ACTIVATIONS[kind](), nn.Linear(hidden, last))

    @torch.no_grad()
    def fit_size(self, vectors: Tensor, size: float) -> None:
        """Scale the last layer so that what is made of some vectors has a root mean square.

        Args:
            vectors: float32 ``[n, d]``.
            size: of an element of what is made.
        """
        factor = size / self(vectors).square().mean().sqrt()
        for weight in self[-1].parameters():
            weight.mul_(factor)


class ProjectedTokens(nn.Module):
    """Rows of tokens that stand for items and users: their vectors, projected. The vectors get no gradient.

    Token ``i`` is item i; token ``n_items + u`` the user of number u.

    Args:
        items: float32 ``[n_items, d]``.
        users: from numbers, int64 ``[n]``, to their vectors, float32 ``[n, d]``; ``None`` where there are none.
        projector: ``[n, d]`` to ``[n, H]``.
    """

    items: Tensor
    users: Callable[[Tensor], Tensor]

    def __init__(self, items: Tensor, users: Callable[[Tensor], Tensor] | None, projector: nn.Module) -> None:
        super().__init__()
        # Made anew from the model that they are of, so no part of the state.
        self.register_buffer("items", items.detach().float(), persistent=False)
        # Not a submodule: nothing of it trains.
        self.__dict__["users"] = users
        self.projector = projector

    @torch.no_grad()
    def vectors(self, numbers: Tensor) -> Tensor:
        """What is projected.

        Args:
            numbers: of tokens, int64 ``[n]``, ascending.

        Returns:
            float32 ``[n, d]``.
        """
        items = int((numbers < len(self.items)).sum())
        found = self.items[numbers[:items]]
        if items == len(numbers):
            return found
        return torch.cat([found, self.users(numbers[items:] - len(self.items)).to(found)])

    def forward(self, numbers: Tensor) -> Tensor:
        """Rows ``[n, H]`` of tokens by number, int64 ``[n]``, ascending."""
        made: Tensor = self.projector(self.vectors(numbers))
        return made


class ProjectedEmbedding(nn.Module):
    """A language model's table of embeddings that also reads :class:`ProjectedTokens`; stands in the table's place.

    Args:
        table: the model's own, kept; it may multiply its rows (Gemma's does), which the tokens' are not.
        tokens: those of ids from the table's size on.
    """

    def __init__(self, table: nn.Embedding, tokens: ProjectedTokens) -> None:
        super().__init__()
        self.table, self.tokens = table, tokens
        self.embedding_dim, self.num_embeddings = table.embedding_dim, table.num_embeddings

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings ``[..., H]`` of ids int64 ``[...]``, in the table's type."""
        first = self.table.num_embeddings
        known: Tensor = self.table(ids.clamp(max=first - 1))
        flat = ids.flatten()
        places = (flat >= first).nonzero().squeeze(1)
        if not len(places):
            return known
        numbers, back = (flat[places] - first).unique(return_inverse=True)
        rows = self.tokens(numbers)[back].to(known.dtype)
        return known.flatten(0, -2).index_put((places,), rows).view_as(known)


def read_projected(
    decoder: nn.Module, items: Tensor, users: Callable[[Tensor], Tensor] | None, kind: str, hidden: int
) -> ProjectedTokens:
    """Have a language model read vectors as ids from the size of its vocabulary on.

    Before training what is projected has the size of what the model's layers read for a token.

    Args:
        decoder: a Hugging Face base model, changed in place.
        items, users: see :class:`ProjectedTokens`.
        kind, hidden: of the :class:`Projector`.

    Returns:
        The tokens; what of them trains is the projector's.
    """
    model: Any = decoder
    table = model.get_input_embeddings()
    projector = Projector(kind, (items.shape[1], hidden, table.embedding_dim))
    projector.fit_size(items.detach().float().cpu(), token_scale(table))
    tokens = ProjectedTokens(items, users, projector).to(table.weight.device)
    model.set_input_embeddings(ProjectedEmbedding(table, tokens))
    return tokens
