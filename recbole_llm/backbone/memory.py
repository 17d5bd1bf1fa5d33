"""What a language model takes of a GPU behind soft tokens, worked out from its configuration without its weights.

Weights are counted in an empty model. Activations are what autograd keeps of a frozen decoder of Llama's kind (RMSNorm,
rotary positions, gated MLP) in transformers' own code with sdpa: frozen linear layers keep none of what they read, so
it is far less than in training the model. Not counted: the CUDA context, the allocator's slack, the small layers that
train, their optimizer, and what one kernel needs while it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.pytorch_utils import Conv1D

from recbole_llm.backbone.load import DTYPES, LOAD_ERRORS, is_hub_id, shipped_models
from recbole_llm.errors import UserError, did_you_mean

GROUP = 128  # GPTQ's usual group: weights that share one scale and one zero point
BLOCK = 64  # of nf4: weights that share one scale


@dataclass(frozen=True)
class Weights:
    """A decoder's weights, without the vocabulary head.

    Attributes:
        parameters: how many there are.
        linear: how many of them stand in the matrices of linear layers, which quantisation packs.
        size: bytes.
        unpacked: bytes of those matrices in the type that is computed in. GPTQ kernels that unpack them before they
            multiply may keep them for the backward pass, all at once without gradient checkpointing.
    """

    parameters: int
    linear: int
    size: int
    unpacked: int


def count_weights(config: Any, dtype: str = "float16", quantization: str = "none", group: int = GROUP) -> Weights:
    """Count a decoder's weights.

    Args:
        config: a Hugging Face configuration.
        dtype: a key of ``DTYPES``, of what is not quantised.
        quantization: ``none``, ``gptq`` (4 bit), ``int8`` or ``nf4``.
        group: GPTQ's.
    """
    with torch.device("meta"):
        model: nn.Module = AutoModel.from_config(config)
    width = DTYPES[dtype].itemsize
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear | Conv1D)]
    total = sum(weight.numel() for weight in model.parameters())
    linear = sum(weight.numel() for weight in matrices)
    if quantization == "none":
        packed = linear * width
    else:
        packed = sum(_packed(len(weight), weight.shape[1], quantization, group) for weight in matrices)
    return Weights(total, linear, packed + (total - linear) * width, linear * width)


def _packed(rows: int, columns: int, quantization: str, group: int) -> int:
    """Bytes of one quantised matrix with its scales."""
    count = rows * columns
    if quantization == "gptq":
        # Four bits; a group has a float16 scale and a 4-bit zero point; an int32 names each input's group.
        return count // 2 + count // group * 5 // 2 + columns * 4
    if quantization == "nf4":
        return count // 2 + count // BLOCK * 4
    return count + rows * 4


def activation_bytes(
    config: Any, rows: int, tokens: int, prefix: int = 0, dtype: str = "float16", checkpointing: bool = False
) -> int:
    """Bytes that the forward pass keeps for the gradient of the soft tokens.

    Args:
        config: of a model of Llama's kind.
        rows: prompts in a batch.
        tokens: of each, behind the shared prefix.
        prefix: tokens that every prompt begins with; their keys and values are copied for every row.
        dtype: of the computation.
        checkpointing: keep the input of each layer only, and work out one layer at a time again.
    """
    width, hidden, heads = DTYPES[dtype].itemsize, config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or hidden // heads
    # A mask goes with a prefix, and with a mask sdpa is given the keys of each head apart.
    key_heads = heads if prefix else getattr(config, "num_key_value_heads", None) or heads
    norm = hidden * 4 + 4  # what it reads in float32, and its root mean square
    attention = 2 * heads * size * width + heads * 4  # queries, what comes out, the sum of each softmax
    mlp = 3 * config.intermediate_size * width  # the gate before and after its SiLU, what it multiplies
    seen = prefix + tokens
    layer = tokens * (2 * norm + attention + mlp) + seen * 2 * key_heads * size * width
    layer += tokens * seen * width if prefix else 0
    if checkpointing:
        return rows * (config.num_hidden_layers * tokens * hidden * width + layer + tokens * norm)
    return rows * (config.num_hidden_layers * layer + tokens * norm)


def cache_bytes(config: Any, rows: int, tokens: int, dtype: str = "float16") -> int:
    """Bytes of keys and values of so many tokens in every layer, as a stream of prompts holds them."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * rows * tokens * heads * size * DTYPES[dtype].itemsize


def read_config(llm: str) -> Any:
    """A model's configuration without its weights, and without asking the hub.

    Args:
        llm: a folder with a ``config.json``, or a hub id of which the hub's local cache has one.

    Raises:
        UserError: there is none, or it is of no model that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(llm, local_files_only=True)
    except LOAD_ERRORS as error:
        if llm in shipped_models():
            reason = "it is made on the spot and has no config.json; of those, only embedded can be looked at here"
        elif not Path(llm).exists() and is_hub_id(llm) and ("/" in llm or not _near(llm)):
            reason = f"the hub's cache has no config.json of it; fetch it first: hf download {llm} config.json"
        else:
            reason = f"it is no folder with a config.json of a model that transformers knows{_near(llm)}"
            reason += f" ({type(error).__name__})"
        raise UserError(f"llm '{llm}': {reason}") from None


def _near(llm: str) -> str:
    return did_you_mean(llm, shipped_models())


def describe(llm: str, config: Any, dtype: str, quantization: str, rows: int, tokens: int, prefix: int) -> str:
    """The arithmetic of a model in lines of text.

    Args:
        llm: its name.
        config: its configuration.
        dtype: of the computation.
        quantization: of the weights.
        rows: prompts in a batch.
        tokens: of each, behind the shared prefix.
        prefix: tokens that every prompt begins with.

    Raises:
        UserError: it is of no model that transformers has a decoder for.
    """
    try:
        weights = count_weights(config, dtype, quantization)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"llm '{llm}': transformers makes no model of its config.json ({reason})") from None
    head = config.vocab_size * config.hidden_size
    lines = [
        f"{llm}: a {config.model_type}, {weights.parameters:,} parameters without its head ({head:,})",
        f"  weights in {dtype}, quantization {quantization}{_gib(weights.size)}",
    ]
    if quantization == "gptq":
        lines.append(f"    its matrices unpacked, where a kernel keeps them{_gib(weights.unpacked)}")
    lines.append(f"  keys and values of {rows} streams{_gib(cache_bytes(config, rows, prefix + tokens, dtype))}")
    if getattr(config, "intermediate_size", None):
        for checkpointing, text in ((False, "kept for the gradient"), (True, "the same with gradient checkpointing")):
            size = activation_bytes(config, rows, tokens, prefix, dtype, checkpointing)
            lines.append(f"  {text}, {rows} prompts of {prefix} shared and {tokens} own tokens{_gib(size)}")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f": {size / 2**30:.2f} GiB"
