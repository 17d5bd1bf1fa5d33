"""RecBole-LLM: LLM recommenders and collaborative ones on RecBole 1.2.1, under one provable split.

``import recbole_llm`` is cheap; the names below load what they need on first use. They take the arguments of their
RecBole namesakes and serve RecBole's models and ours alike.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Config": "recbole_llm.config",
    "get_model": "recbole_llm.registry",
    "create_dataset": "recbole_llm.data",
    "data_preparation": "recbole_llm.data",
    "get_trainer": "recbole_llm.training",
    "run": "recbole_llm.training",
    "UserError": "recbole_llm.errors",
}

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'recbole_llm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
