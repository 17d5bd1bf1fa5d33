"""Training weights of the language model itself: LoRA through PEFT (``adapter: lora``), or all of it (``full``).

The weights that train are registered in an :class:`Adapter` by reference, so that they belong to the recommender's
parameters, state and checkpoints while the rest of the language model stays out of them.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685; on every linear
layer as in Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023, arXiv 2305.14314.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaModel, T5Model
from transformers.pytorch_utils import Conv1D

from recbole_llm.backbone.embedded_t5 import NAME as EMBEDDED_T5
from recbole_llm.backbone.embedded_t5 import EmbeddedT5Settings
from recbole_llm.backbone.encoder_decoder import encodes
from recbole_llm.errors import UserError, did_you_mean

ALL_LINEAR = "all-linear"
LORA_NAME = "default"


class Adapter(nn.Module):
    """The weights of a decoder that train, by reference: what happens to them here happens in the decoder.

    Args:
        decoder: whose weights with ``requires_grad`` these are. It stays in evaluation mode whatever the mode of the
            recommender is, so that no dropout of its own comes up; only LoRA's follows :meth:`train`.
        learning_rate: of these weights.
        own_dropout: its own dropout follows :meth:`train` too.
    """

    def __init__(self, decoder: nn.Module, learning_rate: float, own_dropout: bool = False) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        for name, weight in decoder.named_parameters():
            if weight.requires_grad:
                # A parameter's name may hold no dot.
                self.register_parameter(name.replace(".", "/"), weight)
        # In a tuple, so that they are no submodules.
        self._dropouts = tuple(_lora_dropouts(decoder))
        self.train()
        if own_dropout:
            # Only from the next change of mode on: what is made of a model before its training reads it as it is.
            self._dropouts = (decoder,)

    def train(self, mode: bool = True) -> Adapter:
        """Training mode: dropout is on, LoRA's or the model's own."""
        super().train(mode)
        for dropout in self._dropouts:
            dropout.train(mode)
        return self

    def groups(self, parameters: Sequence[nn.Parameter], head: nn.Parameter | None = None) -> list[dict[str, Any]]:
        """A recommender's parameters as two groups of an optimizer: the others, and these at their learning rate.

        Args:
            parameters: all that train.
            head: the language model's own head, where it trains too; it goes with these.
        """
        own = {id(weight) for weight in (*self.parameters(), head)}
        others = [weight for weight in parameters if id(weight) not in own]
        mine = [weight for weight in parameters if id(weight) in own]
        return [{"params": others}, {"params": mine, "lr": self.learning_rate}]


def check_adapter(config: Any) -> None:
    """Refuse settings that do not go together, before anything is loaded or trained.

    Args:
        config: with ``adapter``, ``llm_quantization`` and ``llm_dtype``.

    Raises:
        UserError: the whole of a model is to train whose weights take no training.
    """
    if config["adapter"] != "full":
        return
    if config["llm_quantization"] != "none":
        raise UserError(
            f"adapter: full cannot train weights that are quantised (llm_quantization: {config['llm_quantization']}); "
            "adapter: lora can stand beside them"
        )
    if config["llm_dtype"] == "float16":
        raise UserError("adapter: full cannot train float16 weights, whose steps underflow; set llm_dtype: bfloat16")


def check_targets(config: Any, decoder: nn.Module | None) -> None:
    """See before any training that LoRA can stand where it is asked for, in an empty model.

    Args:
        config: with ``adapter`` and the ``lora_...`` settings.
        decoder: the language model, or ``None`` for an embedded one, which is made later.

    Raises:
        UserError: a name in ``lora_target_modules`` that no linear layer has, or that PEFT refuses.
    """
    if config["adapter"] != "lora":
        return
    if decoder is None:
        sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        with torch.device("meta"):
            empty: nn.Module = (
                T5Model(EmbeddedT5Settings.from_config(config).model_config(8))
                if config["llm"] == EMBEDDED_T5
                else LlamaModel(LlamaConfig(num_hidden_layers=1, **sizes))
            )
    else:
        empty = _empty(decoder)
    try:
        _inject(empty, target_names(empty, config["lora_target_modules"]), config)
    except ValueError as error:
        raise UserError(f"lora_target_modules: {' '.join(str(error).split())}") from None


def adapt(decoder: nn.Module, config: Any, head: nn.Module | None = None) -> Adapter | None:
    """Make weights of a decoder trainable; LoRA's are drawn by torch's own generator.

    Args:
        decoder: a frozen Hugging Face base model in evaluation mode; LoRA is put into it in place. One with an encoder
            trains with the dropout of its configuration where all of it trains, as such models are made (T5).
        config: with ``adapter``, ``adapter_learning_rate`` and the ``lora_...`` settings.
        head: the vocabulary head that reads the decoder's states, if one does.

    Returns:
        The weights that train; ``None`` for ``adapter: none``.

    Raises:
        UserError: a name in ``lora_target_modules`` that no linear layer has.
    """
    if config["adapter"] == "none":
        return None
    if config["adapter"] == "full":
        decoder.requires_grad_(True)
    else:
        _put_lora(decoder, config, head)
    decoder.eval()
    own_dropout = config["adapter"] == "full" and encodes(decoder)
    return Adapter(decoder, config["adapter_learning_rate"], own_dropout)


def _put_lora(decoder: nn.Module, config: Any, head: nn.Module | None) -> None:
    # Not at the top: it takes a second, and most runs have no adapter.
    from peft import prepare_model_for_kbit_training
    from peft.tuners.tuners_utils import cast_adapter_dtype

    # In a quantised model the linear layers are of many kinds, of which PEFT's own all-linear does not know all.
    names = target_names(_empty(decoder), config["lora_target_modules"])
    if config["llm_quantization"] in ("int8", "nf4"):
        # Layer norms and embeddings in float32. Gradient checkpointing is a matter of its own.
        prepare_model_for_kbit_training(decoder, use_gradient_checkpointing=False)
        if head is not None:
            # One that is not tied to the embeddings reads their float32 states too; it is never quantised.
            head.float()
    _inject(decoder, names, config)
    # Adam's steps are lost in weights of half precision, and these are few.
    cast_adapter_dtype(decoder, LORA_NAME)


def _inject(model: nn.Module, names: list[str], config: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    settings = LoraConfig(
        r=config["lora_rank"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        target_modules=names,
    )
    with warnings.catch_warnings():
        # It remarks that GPT-2 keeps its weights the other way round, and heeds it.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
        inject_adapter_in_model(settings, model, LORA_NAME)


def _empty(decoder: Any) -> nn.Module:
    """A model of the same architecture that has no weights."""
    with torch.device("meta"):
        model: nn.Module = type(decoder)(decoder.config)
    return model


def target_names(model: nn.Module, wanted: str | Sequence[str]) -> list[str]:
    """Full names of the linear layers that LoRA goes beside.

    Args:
        model: not quantised.
        wanted: ``all-linear``, or ends of names.

    Raises:
        UserError: a name that no linear layer ends in.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    if wanted == ALL_LINEAR:
        return linear
    ends = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
    for end in ends or [""]:
        if not any(_ends_in(layer, end) for layer in linear):
            known = list(dict.fromkeys(layer.rpartition(".")[2] for layer in linear))
            raise UserError(
                f"lora_target_modules: no linear layer of a {type(model).__name__} ends in {end!r}"
                f"{did_you_mean(end, known)} (there are {', '.join(known)}; {ALL_LINEAR} takes all)"
            )
    return [layer for layer in linear if any(_ends_in(layer, end) for end in ends)]


def _ends_in(layer: str, name: str) -> bool:
    return layer == name or layer.endswith(f".{name}")


def _lora_dropouts(decoder: nn.Module) -> Iterator[nn.Module]:
    from peft.tuners.lora import LoraLayer

    for module in decoder.modules():
        if isinstance(module, LoraLayer):
            yield from module.lora_dropout.values()
