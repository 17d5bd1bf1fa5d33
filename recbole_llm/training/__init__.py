"""Stages, trainers, checkpoints, runs."""

from __future__ import annotations

from typing import Any


def get_trainer(model_type: Any, model_name: str) -> type:
    """The trainer class of a model; takes the arguments of RecBole's ``get_trainer`` and serves its models and ours.

    Args:
        model_type: RecBole's ModelType, as in ``config["MODEL_TYPE"]``.
        model_name: a registered name.

    Returns:
        A class to call with ``(config, model)``.
    """
    from recbole_llm.registry import get_model
    from recbole_llm.training.pipeline import trainer_of
    from recbole_llm.training.standalone import standalone_trainer

    model_class = get_model(model_name)
    base = trainer_of(model_class, model_type, model_name)
    return standalone_trainer(base) if hasattr(model_class, "stages") else base


def run(*args: Any, **kwargs: Any) -> dict[str, Any]:
    """Train, rank and report; see :func:`recbole_llm.training.runs.run`."""
    from recbole_llm.training.runs import run as run_

    return run_(*args, **kwargs)
