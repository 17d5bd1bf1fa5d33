"""A frozen language model whose weights are spread over the processes, by accelerate's own FSDP or DeepSpeed settings.

The language model is no submodule of a recommender, so it is sharded by itself: every call of it, in training, in
ranking or for the prompts' shared opening, gathers a layer's weights, runs it and lets go of them. What a recommender
trains beside it is small, stays whole in every process and is :mod:`~recbole_llm.training.loop`'s business, which
knows nothing of sharding.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.utils import fsdp2_prepare_model, is_deepspeed_available, parse_flag_from_env
from torch import nn

from recbole_llm import processes
from recbole_llm.errors import UserError
from recbole_llm.training.loop import new_accelerator

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"


def sharding() -> str | None:
    """What the launcher was told to shard with: :data:`FSDP`, :data:`DEEPSPEED` or nothing."""
    if processes.count() == 1:
        return None
    switches = {FSDP: "ACCELERATE_USE_FSDP", DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}
    return next((name for name, switch in switches.items() if parse_flag_from_env(switch)), None)


def check_sharding(config: Any) -> None:
    """Refuse what cannot be sharded, before any work.

    Raises:
        UserError: FSDP's first version, a ZeRO stage below 3, a missing package, quantised weights, FlashAttention.
    """
    kind = sharding()
    if kind is None:
        return
    if kind == FSDP and FullyShardedDataParallelPlugin().fsdp_version != 2:
        raise UserError("FSDP's first version is not supported; set fsdp_version: 2 (properties/accelerate/fsdp.yaml)")
    if kind == DEEPSPEED and not is_deepspeed_available():
        raise UserError("DeepSpeed is not installed; pip install deepspeed, or take properties/accelerate/fsdp.yaml")
    if kind == DEEPSPEED and DeepSpeedPlugin().zero_stage != 3:
        raise UserError(
            "ZeRO stages 1 and 2 divide the state of optimizers, of which a frozen language model has none; set "
            "zero_stage: 3 (properties/accelerate/zero3.yaml), or train whole copies (properties/accelerate/ddp.yaml)"
        )
    for key, plain in (("llm_quantization", ("none",)), ("llm_attention", ("sdpa", "eager"))):
        if config[key] not in plain:
            raise UserError(f"{key}: {config[key]} does not go with {kind}, which takes {' or '.join(plain)}")


def shard(config: Any, decoder: nn.Module) -> None:
    """Spread a decoder's weights over the processes, in place; nothing where no sharding was asked for.

    Args:
        config: ``mixed_precision`` and ``device``.
        decoder: a Hugging Face base model, the same in every process, on any device.
    """
    kind = sharding()
    if kind == FSDP:
        _fsdp(config, decoder)
    elif kind == DEEPSPEED:
        _zero3(config, decoder)


def _fsdp(config: Any, decoder: nn.Module) -> None:
    accelerator = new_accelerator(config)
    plugin = FullyShardedDataParallelPlugin()
    # Every process has read the weights already. The type to compute in is autocast's business, as everywhere else, so
    # that rankings are in the type of the weights.
    plugin.cpu_ram_efficient_loading = False
    accelerator.state.fsdp_plugin = plugin
    fsdp2_prepare_model(accelerator, decoder)
    # The first call must be the whole decoder's: it makes the embeddings, which are called alone later, a part of it.
    with torch.no_grad():
        decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=accelerator.device), use_cache=False)


def _zero3(config: Any, decoder: nn.Module) -> None:
    import deepspeed

    # DeepSpeed casts every buffer with the weights; rotary frequencies need their float32.
    buffers = {name: buffer.clone() for name, buffer in decoder.named_buffers()}
    dtype = next(decoder.parameters()).dtype
    settings = {
        # Asked for by DeepSpeed, and of no meaning without an optimizer.
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": _without_auto(DeepSpeedPlugin().deepspeed_config["zero_optimization"]),
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
    }
    deepspeed.initialize(model=decoder, config=settings, dist_init_required=False)
    for name, buffer in buffers.items():
        owner, _, last = name.rpartition(".")
        setattr(decoder.get_submodule(owner), last, buffer.to(config["device"]))


def _without_auto(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's own defaults where accelerate would have filled in a value."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in settings.items()
        if value not in ("auto", None)
    }
