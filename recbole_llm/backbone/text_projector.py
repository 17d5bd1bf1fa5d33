"""A soft token for an item that the graph has never seen, from its description.

A graph model gives an item without train interactions an embedding that means nothing. Here the descriptions of the
items that it has seen are mapped onto their graph embeddings, and the map is applied to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.encoder_decoder import text_states
from recbole_llm.progress import progress
from recbole_llm.ridge import ridge

if TYPE_CHECKING:
    from recbole_llm.training.state import ResumeFile

# Descriptions read at once.
BATCH = 64


@torch.no_grad()
def text_features(backbone: Backbone, texts: Sequence[str], limit: int, resume: ResumeFile | None = None) -> Tensor:
    """What the language model makes of descriptions: the mean of its last states over a description's tokens.

    Args:
        backbone: the frozen language model.
        texts: descriptions.
        limit: each is cut to so many tokens.
        resume: where to keep what was read so far, and to find what an attempt that was cut off has read.

    Returns:
        float32 ``[len(texts), H]`` on the CPU; zero for a text without tokens.
    """
    opening = [] if backbone.bos_id is None else [backbone.bos_id]
    rows = [opening + ids[:limit] if ids else [] for ids in backbone.encode_batch(texts)]
    device = backbone.embed_tokens.weight.device
    state = resume.take_up() if resume is not None else None
    state = state or {"done": 0, "features": torch.zeros(len(rows), backbone.hidden_size), "tokens": 0}
    features, before = state["features"], backbone.tokens_read
    backbone.tokens_read += state["tokens"]
    order = sorted((row for row, ids in enumerate(rows) if ids), key=lambda row: len(rows[row]))
    for first in progress(range(state["done"], len(order), BATCH), "reading descriptions"):
        batch = order[first : first + BATCH]
        width = len(rows[batch[-1]])
        ids = torch.tensor([rows[row] + [backbone.pad_id] * (width - len(rows[row])) for row in batch])
        own = torch.tensor([[len(opening) <= place < len(rows[row]) for place in range(width)] for row in batch])
        lengths = torch.tensor([len(rows[row]) for row in batch])
        states = text_states(backbone.decoder, ids.to(device), lengths).float().cpu()
        features[batch] = (states * own.unsqueeze(-1)).sum(1) / own.sum(1, keepdim=True)
        if resume is not None and resume.due():
            read = backbone.tokens_read - before
            resume.save({"done": first + BATCH, "features": features, "tokens": read})
    return features


def cold_item_embeddings(item_embeddings: np.ndarray, features: Tensor, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Item embeddings with those of unseen items made from text, by ridge regression over the seen ones.

    Args:
        item_embeddings: float ``[n_items, d]``, the graph model's.
        features: float ``[n_items, H]`` of the descriptions.
        seen: bool ``[n_items]``, items with a train interaction.
        penalty: the ridge's, in units of the features' mean square.

    Returns:
        float32 ``[n_items, d]``; rows of seen items, and row 0, are as they were.
    """
    cold = ~seen
    cold[0] = False
    made = np.asarray(item_embeddings, dtype=np.float32).copy()
    if not cold.any() or not seen.any():
        return made
    x = features.numpy().astype(np.float64)
    made[cold] = ridge(x[seen], made[seen], x[cold], penalty).astype(np.float32)
    return made
