"""Item embeddings out of a trained recommender, and texts out of a language model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.text_projector import text_features
from recbole_llm.errors import UserError
from recbole_llm.training.state import ResumeFile


def graph_embeddings(model: Any, name: str, part: str = "graph_model") -> tuple[np.ndarray, np.ndarray]:
    """User [n_users, d] and item [n_items, d] embeddings of a trained collaborative model.

    Args:
        model: has ``graph_embeddings()``, or a ``forward()`` that returns both tables (RecBole's graph models), or
            embedding layers named ``user_embedding`` and ``item_embedding``.
        name: what to call it in an error.
        part: the setting that named it.

    Raises:
        UserError: the model has no such tables.
    """
    model.eval()
    with torch.no_grad():
        if hasattr(model, "graph_embeddings"):
            tables = model.graph_embeddings()
        else:
            tables = _forward_tables(model)
    if tables is None:
        raise UserError(f"{part}: {name} has no user and item embeddings; take one such as LightGCN, NGCF, SGL or BPR")
    return tables[0].detach().cpu().numpy(), tables[1].detach().cpu().numpy()


def _forward_tables(model: Any) -> tuple[torch.Tensor, torch.Tensor] | None:
    if hasattr(model, "GcEncoder"):  # GCMC's forward takes pairs; its encoder makes the tables
        return model.GcEncoder(model.user_features, model.item_features)
    try:
        output = model.forward()
    except TypeError:
        output = None
    if (
        isinstance(output, tuple)
        and len(output) >= 2
        and len(output[0]) == model.n_users
        and len(output[1]) == model.n_items
    ):
        return output[0], output[1]
    user, item = getattr(model, "user_embedding", None), getattr(model, "item_embedding", None)
    if isinstance(user, nn.Embedding) and isinstance(item, nn.Embedding):
        return user.weight, item.weight
    return None


def item_embeddings(model: Any, name: str, layer: str) -> np.ndarray:
    """Item embeddings of a trained recommender of any kind.

    Args:
        model: see :func:`graph_embeddings`; one with items only (a sequential one) has ``item_embedding``.
        name: what to call it in an error.
        layer: ``final``, what it scores with; ``e0``, its table before any graph convolution.

    Returns:
        float32 ``[n_items, d]``.

    Raises:
        UserError: the model has no such table, or it holds a value that is no number.
    """
    made = _item_table(model, name, layer)
    broken = int((~np.isfinite(made)).any(axis=1).sum())
    if broken:
        raise UserError(f"embedding_model: {broken} item embeddings of {name} are NaN or infinite; train it again")
    return np.ascontiguousarray(made, dtype=np.float32)


def item_width(model: Any, name: str, layer: str) -> int:
    """How wide :func:`item_embeddings` will be, of a recommender that need not be trained.

    Raises:
        UserError: the model has no such table.
    """
    return _item_table(model, name, layer).shape[1]


def _item_table(model: Any, name: str, layer: str) -> np.ndarray:
    own = getattr(model, "item_embedding", None)
    made: np.ndarray | None = None
    if layer == "final" and not (isinstance(own, nn.Embedding) and not hasattr(model, "n_users")):
        made = graph_embeddings(model, name, "embedding_model")[1]
    elif hasattr(model, "graph_embeddings") and "layer" in inspect.signature(model.graph_embeddings).parameters:
        made = model.graph_embeddings(layer="e0")[1].detach().cpu().numpy()
    elif isinstance(own, nn.Embedding):
        # SASRec and its kin have rows after the items, for their own signs.
        made = own.weight[: model.n_items].detach().cpu().numpy()
    if made is None:
        raise UserError(f"embedding_model: {name} has no table of items; take one such as DCCF, LightGCN or SASRec")
    return made


@torch.no_grad()
def text_embeddings(
    backbone: Backbone, texts: Sequence[str], kind: str, limit: int, resume: ResumeFile | None = None
) -> np.ndarray:
    """Items' texts in a language model's space.

    Args:
        backbone: the language model.
        texts: by internal item id, the padding item's first.
        kind: ``input``, the mean of the input table's rows of a text's tokens, without BOS and padding ("Semantic
            Convergence", section on alignment tokenization); ``last``, the mean of the last states (LC-Rec).
        limit: each text is cut to so many tokens.
        resume: where to keep what was read so far, and to find what an attempt that was cut off has read.

    Returns:
        float32 ``[len(texts), H]``; zero for a text without tokens.
    """
    if kind == "last":
        return text_features(backbone, texts, limit, resume).numpy()
    rows = [ids[:limit] for ids in backbone.encode_batch(texts)]
    lengths = torch.tensor([len(ids) for ids in rows])
    flat = torch.tensor([token for ids in rows for token in ids], dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)[:-1]])
    table = backbone.embed_tokens.weight.detach().float().cpu()
    return nn.functional.embedding_bag(flat, table, offsets, mode="mean").numpy()
