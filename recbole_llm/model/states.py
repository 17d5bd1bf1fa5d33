"""Which recommenders have a vector of a history, to be read by another one."""

from __future__ import annotations

import inspect
from typing import Any

NO_STATES = (
    "{part}: {name} makes no one vector of a history; for vectors of users take one such as SASRec or GRU4Rec "
    "(sequential) or LightGCN or BPR (general)"
)


def makes_states(model: Any) -> bool:
    """Whether a sequential recommender, or its class, has a ``forward`` of item lists and their lengths alone.

    Its result is then the user's state, unless it is one at each position (BERT4Rec's is asked otherwise).
    """
    return [name for name in inspect.signature(model.forward).parameters if name != "self"] == [
        "item_seq", "item_seq_len",
    ]  # fmt: skip
