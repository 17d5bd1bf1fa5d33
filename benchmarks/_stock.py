"""Stock RecBole as its user has it: its own config, data set, loaders, samplers and models, by its own functions."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm import compat

SHARED = Path(__file__).resolve().parent.parent.parent / "shared" / "data"


def stock_config(model: str, dataset: str, **settings: Any) -> Any:
    """RecBole's own ``Config``; only the NumPy aliases that it cannot set any more are kept from it."""
    compat.install()
    from recbole.config import Config

    class StockConfig(Config):
        def compatibility_settings(self) -> None:
            """Done by compat.install()."""

    logging.disable(logging.WARNING)
    before, sys.argv = sys.argv, sys.argv[:1]  # RecBole reads the command line of whoever imports it
    try:
        return StockConfig(model=model, dataset=dataset, config_dict={"use_gpu": False, **settings})
    finally:
        sys.argv = before


def stock_loaders(config: Any) -> tuple[Any, Any, Any]:
    """RecBole's train, valid and test loaders."""
    from recbole.data import create_dataset, data_preparation

    return data_preparation(config, create_dataset(config))


def stock_class(package: str, name: str) -> Any:
    """RecBole's own model class; importing a sequential one leaves anomaly mode as RecBole does: on."""
    return getattr(importlib.import_module(f"recbole.model.{package}.{name.lower()}"), name)


def train_batches(model: Any, optimizer: Any, batches: Iterable[Any]) -> list[float]:
    """The step loop of RecBole's trainer (trainer.py:_train_epoch): every batch's loss."""
    model.train()
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        losses.append(loss.item())
        if np.isnan(losses[-1]):
            raise ValueError("Training loss is nan")
        loss.backward()
        optimizer.step()
    return losses


def seeded(make: Callable[[], Any], seed: int = 2020) -> Any:
    """What ``make`` returns under torch's seed."""
    torch.manual_seed(seed)
    return make()
