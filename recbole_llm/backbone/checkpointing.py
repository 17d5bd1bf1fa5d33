"""Gradient checkpointing of a frozen language model that stays in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from recbole_llm.errors import UserError


def checkpoint_layers(decoder: nn.Module) -> None:
    """Let a decoder's layers forget their inner states and work them out again in the backward pass.

    transformers' own switch acts in training mode only, which turns on a frozen model's dropout, and takes the cache
    away from the layers, with which the prompts' shared opening would be lost. Here mode and cache stay as they are;
    the cache must be one that no layer adds to (:class:`~recbole_llm.backbone.soft_tokens.SoftPromptDecoder`'s).

    Args:
        decoder: a Hugging Face base model.

    Raises:
        UserError: its layers are not known to transformers as ones that can be run again.
    """
    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"gradient_checkpointing: a {type(decoder).__name__} has no layers that transformers can run again"
        )
    for layer in layers:
        if "forward" not in vars(layer):
            # On the instance, not the call: hooks of a sharded layer (FSDP) stay outside.
            layer.forward = _checkpointed(layer.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(again, *args, use_reentrant=False, **kwargs)

    def again(*args: Any, **kwargs: Any) -> Any:
        # The backward pass comes when the decoder no longer attends as it did (backbone/packed.py).
        with kwargs["packed"].reading() if "packed" in kwargs else nullcontext():
            return forward(*args, **kwargs)

    return run
