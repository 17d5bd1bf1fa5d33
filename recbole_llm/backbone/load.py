"""Load a Hugging Face language model, from a folder or the hub, as a :class:`Backbone`."""

from __future__ import annotations

import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    GPTQConfig,
)
from transformers.utils import logging as transformers_logging

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.encoder_decoder import KNOWN, base_of
from recbole_llm.errors import UserError, did_you_mean, nearest
from recbole_llm.schema import properties_dir

logger = logging.getLogger("recbole_llm")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ATTENTIONS = ("sdpa", "flash_attention_2", "eager")
# The packages that each way of quantisation needs.
QUANTIZATIONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "gptq": ("gptqmodel", "optimum"),
    "int8": ("bitsandbytes",),
    "nf4": ("bitsandbytes",),
}
# One request tells whether the hub can be reached; transformers itself would try six times for each file.
HUB_SECONDS = 10.0
# What transformers raises for a folder that is incomplete, damaged or of a kind that it does not know.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError)


def load_backbone(
    name_or_folder: str | Path,
    dtype: str = "float32",
    attention: str = "sdpa",
    quantization: str = "none",
    trust_remote_code: bool = False,
    device: str = "cpu",
    random_init: int | None = None,
    with_head: bool = False,
    causal_only: bool = True,
) -> Backbone:
    """Load a language model, frozen.

    Args:
        name_or_folder: a folder as ``save_pretrained`` writes it, or else a hub id; what the hub's local cache holds is
            used before the hub is asked.
        dtype: of the weights: ``float32``, ``bfloat16`` or ``float16``.
        attention: ``sdpa`` (``eager`` for the few models that have none), ``flash_attention_2`` or ``eager``.
        quantization: ``none``; ``int8`` or ``nf4`` (bitsandbytes, on the fly); ``gptq`` for weights that are so.
        trust_remote_code: whether code that comes with the model may run.
        device: where to put it.
        random_init: leave the weights behind and initialise the architecture anew from this seed: the control that
            tells what the weights have learned.
        with_head: keep its vocabulary head, as :attr:`Backbone.causal`.
        causal_only: refuse one with an encoder (T5).

    Raises:
        UserError: no such model, one that cannot be read, is no causal language model (or none that can write) or has
            weights missing; an unknown option; or a package or GPU that an option needs is missing.
    """
    if random_init is not None and quantization != "none":
        raise UserError("llm_random_init: true has no weights to quantise; set llm_quantization: none")
    check_options(dtype, attention, quantization, device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "random_init": random_init}
    options |= {"with_head": with_head, "causal_only": causal_only}
    name = str(name_or_folder)
    source = Path(name).expanduser()
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise UserError(f"llm '{name}': the folder has no config.json{_models_in(source)}")
        return _load(str(source), dtype, attention, quantization, device, options | {"local_files_only": True})
    if not is_hub_id(name):
        raise UserError(f"llm '{name}': no such folder{_siblings(source)}")
    try:
        return _load(name, dtype, attention, quantization, device, options | {"local_files_only": True})
    except UserError as error:
        # Only a model that the cache does not have (whole) is worth asking the hub for.
        if not isinstance(error.__cause__, OSError):
            raise
    _ask_hub(name, source)
    return _load(name, dtype, attention, quantization, device, options)


def load_with_head(name_or_folder: str | Path, **options: Any) -> Any:
    """Load the same model as :func:`load_backbone` with its vocabulary head, to have it write.

    Args:
        name_or_folder: one that :func:`load_backbone` has loaded.
        options: its options; ``random_init`` plays no part, as fresh weights have nothing to say.

    Returns:
        The Hugging Face language model, in evaluation mode, without gradients.
    """
    return load_backbone(name_or_folder, **(options | {"random_init": None}), with_head=True).causal


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' remarks off stderr, and its bars too where no terminal shows them.

    It remarks on the vocabulary head that is left behind on purpose; weights that are missing are our own check.
    """
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def check_options(dtype: str, attention: str, quantization: str, device: str) -> None:
    """Refuse how a model is to be loaded where that cannot be, before anything is read or trained."""
    for key, value, known in (
        ("llm_dtype", dtype, DTYPES),
        ("llm_attention", attention, ATTENTIONS),
        ("llm_quantization", quantization, QUANTIZATIONS),
    ):
        if value not in known:
            raise UserError(f"{key} is '{value}'{did_you_mean(str(value), known)} (it is one of {', '.join(known)})")
    needs = [(f"llm_quantization: {quantization}", package) for package in QUANTIZATIONS[quantization]]
    if attention == "flash_attention_2":
        needs.append((f"llm_attention: {attention}", "flash_attn"))
    for option, package in needs:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"{option} needs the package {package}, which is not installed")
        if not torch.cuda.is_available() or torch.device(device).type != "cuda":
            raise UserError(f"{option} needs a GPU; the model is to run on '{device}'")


def _load(source: str, dtype: str, attention: str, quantization: str, device: str, options: dict[str, Any]) -> Backbone:
    random_init, with_head = options.pop("random_init"), options.pop("with_head")
    causal_only = options.pop("causal_only")
    try:
        config = AutoConfig.from_pretrained(source, **options)
        stored = (getattr(config, "quantization_config", None) or {}).get("quant_method")
        if random_init is None and stored != (quantization if quantization == "gptq" else None):
            weights = stored or "not quantised"
            raise UserError(f"llm '{source}': its weights are {weights}, llm_quantization is {quantization}")
        _check_kind(source, config, causal_only, quantization)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        if quantization != "none":
            made = _quantization_config(quantization, DTYPES[dtype], config)
            options |= {"quantization_config": made, "device_map": {"": device}}
        if attention == "sdpa" and not _has_sdpa(config):
            logger.info("llm '%s': a %s has no sdpa attention; eager is used", source, config.model_type)
            attention = "eager"
        options |= {"config": config, "dtype": DTYPES[dtype], "attn_implementation": attention}
        with quiet_transformers(), warnings.catch_warnings():
            # That the model's own file says how its weights are packed is what it should say.
            warnings.filterwarnings("ignore", message="You passed `quantization_config`")
            model, report = _model(source, quantization, options, random_init, with_head)
    except LOAD_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"llm '{source}' cannot be loaded: {reason[:300]}") from error
    if report["missing_keys"]:
        raise UserError(f"llm '{source}' lacks weights, such as {sorted(report['missing_keys'])[0]}")
    if quantization == "none":
        model = model.to(device)
    causal = model.eval().requires_grad_(False) if with_head else None
    if causal is not None:
        # A checkpoint's own way to write (penalties, sampling) would stand in for all that is not said when it is asked
        # to, and is in no fingerprint.
        causal.generation_config = GenerationConfig.from_model_config(causal.config)
    backbone = Backbone(model if causal is None else base_of(causal), tokenizer, source, causal)
    if not backbone.encodes and not backbone.is_causal():
        raise UserError(f"llm '{source}': a {config.model_type} that looks ahead is no causal language model")
    return backbone


def _check_kind(source: str, config: Any, causal_only: bool, quantization: str) -> None:
    """Refuse what can write no answer, or not in the way that is asked for."""
    kind = config.model_type
    if not config.is_encoder_decoder:
        if not _is_causal_type(config):
            raise UserError(f"llm '{source}': a {kind} is no causal language model")
    elif causal_only:
        raise UserError(f"llm '{source}': a {kind} is no causal language model, as is needed here: it has an encoder")
    elif kind not in KNOWN:
        raise UserError(f"llm '{source}': of language models with an encoder {' and '.join(KNOWN)} run, not a {kind}")
    elif quantization == "gptq":
        raise UserError(f"llm_quantization: gptq is for causal language models; a {kind} takes int8, nf4 or none")


def _is_causal_type(config: Any) -> bool:
    # A model with code of its own registers itself in auto_map instead.
    custom = getattr(config, "auto_map", None) or {}
    return type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in custom


def _has_sdpa(config: Any) -> bool:
    known = type(config) in AutoModel._model_mapping
    return not known or AutoModel._model_mapping[type(config)]._supports_sdpa


def _model(
    source: str, quantization: str, options: dict[str, Any], random_init: int | None, with_head: bool
) -> tuple[Any, dict[str, Any]]:
    """The decoder, or the whole model with its vocabulary head, and what transformers reports of the loading."""
    whole_kind = AutoModelForSeq2SeqLM if options["config"].is_encoder_decoder else AutoModelForCausalLM
    kind = whole_kind if with_head else AutoModel
    if random_init is not None:
        config, dtype = options.pop("config"), options.pop("dtype")
        options.pop("local_files_only", None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(random_init)
            # Drawn in float32 and then rounded, so that every type starts from the same weights.
            return kind.from_config(config, dtype=torch.float32, **options).to(dtype), {"missing_keys": set()}
    if quantization != "gptq":
        return kind.from_pretrained(source, output_loading_info=True, **options)
    # optimum finds the layers to replace by their names in the whole model, so that is what has to be loaded.
    whole, report = AutoModelForCausalLM.from_pretrained(source, output_loading_info=True, **options)
    return (whole if with_head else whole.base_model), report


def _quantization_config(quantization: str, dtype: torch.dtype, config: Any) -> Any:
    if quantization == "gptq":
        # How the weights are packed is read from the model. Of the kernels only some pass gradients on.
        return GPTQConfig(bits=config.quantization_config["bits"], backend="auto_trainable")
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def is_hub_id(name: str) -> bool:
    """Whether a name that is no folder may be a hub id: ``name`` or ``owner/name``, and no path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def shipped_models() -> list[str]:
    """The names of the language models whose settings come with the package, e.g. ``embedded``."""
    return [file.stem for file in (properties_dir() / "llm").glob("*.yaml")]


def _ask_hub(name: str, source: Path) -> None:
    near = did_you_mean(name, shipped_models()) or _siblings(source)
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"llm '{name}': neither a folder nor a model of the hub{near}") from None
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"llm '{name}': no such folder, and the hub cannot be asked ({reason}){near}; "
            "'llm: embedded' needs no download"
        ) from None


def _siblings(source: Path) -> str:
    """What to say about the folders beside one that is not there, looked for from its nearest existing parent."""
    missing, parent = source.name, source.parent
    while not parent.is_dir() and parent != parent.parent:
        missing, parent = parent.name, parent.parent
    folders = _folders(parent)
    close = nearest(missing, folders) or ([] if parent == Path(".") else folders[:3])
    return f"; the nearest are {', '.join(str(parent / name) for name in close)}" if close else ""


def _models_in(folder: Path) -> str:
    """What to say about the models in a folder that is none itself, or else beside it."""
    for place in (folder, folder.parent):
        models = [str(place / name) for name in _folders(place) if (place / name / "config.json").is_file()]
        if models:
            return f"; the nearest that have one are {', '.join(models[:3])}"
    return ""


def _folders(parent: Path) -> list[str]:
    try:
        entries: Iterable[Path] = parent.iterdir()
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
