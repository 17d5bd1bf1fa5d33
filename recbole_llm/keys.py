"""Which settings a model knows: from RecBole's YAML files, from ours, and from the code of the model's classes."""

from __future__ import annotations

import functools
import inspect
import re
from pathlib import Path

from recbole.utils.argument_list import (
    dataset_arguments,
    evaluation_arguments,
    general_arguments,
    training_arguments,
)

from recbole_llm import registry
from recbole_llm.schema import Spec, properties_dir, read_specs, read_yaml

RECBOLE_PROPERTIES = registry.recbole_folder() / "properties"

# Keys that RecBole reads but no YAML of its own lists.
UNLISTED = {
    "model", "dataset", "config_files", "encoding", "use_gpu", "nproc", "ip", "port", "world_size", "offset",
    "local_rank", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "single_spec", "device", "valid_neg_sample_args",
    "test_neg_sample_args", "kg_reverse_r", "pretrain_path", "numerical_features", "neg_sampling",
    "training_neg_sample_num",
}  # fmt: skip


def base_specs() -> dict[str, Spec]:
    """Types of the keys that every model has."""
    specs: dict[str, Spec] = {}
    for file in (
        RECBOLE_PROPERTIES / "overall.yaml",
        RECBOLE_PROPERTIES / "dataset" / "sample.yaml",
        properties_dir() / "overall.yaml",
    ):
        specs.update(read_specs(file))
    return specs


def model_files(model: str, model_class: type | None = None) -> list[Path]:
    """The settings files of a model, those of what it builds on first.

    Args:
        model: a registered name, or the name of a class of the user's own.
        model_class: where no file has its name, the nearest class it inherits from that has one stands in; where it
            wraps another model, that one's files come first.
    """
    names = list(dict.fromkeys((registry.yaml_base(model), model)))
    files = _named_files(names)
    for parent in model_class.__mro__ if model_class is not None else ():
        files = files or _named_files([parent.__name__])
    wrapped = getattr(model_class, "wrapped", None)
    return files if wrapped is None else [*model_files(getattr(model_class, "wraps", ""), wrapped), *files]


def _named_files(names: list[str]) -> list[Path]:
    paths = [folder / "model" / f"{name}.yaml" for name in names for folder in (RECBOLE_PROPERTIES, properties_dir())]
    return [path for path in paths if path.is_file()]


def model_specs(model: str, model_class: type | None = None) -> dict[str, Spec]:
    """Types of the keys that a model's own files name."""
    specs: dict[str, Spec] = {}
    for file in model_files(model, model_class):
        specs.update(read_specs(file))
    return specs


def part_specs(model: str, model_class: type) -> dict[str, Spec]:
    """Types of what can be set of a model that is a part of another: its own keys and those of its language model."""
    specs = base_specs() | model_specs(model)
    if hasattr(model_class, "stage_loss"):
        specs |= read_specs(properties_dir() / "training.yaml")
    return specs | read_specs(properties_dir() / "llm" / "embedded.yaml") if "llm" in specs else specs


def known_keys(model: str, model_class: type) -> set[str]:
    """Every key that a run of this model can mean something by.

    RecBole's YAML files name most; the rest are the ``config["..."]`` that the model's own classes read.
    """
    keys = set(base_specs()) | UNLISTED
    for listed in (general_arguments, training_arguments, evaluation_arguments, dataset_arguments):
        keys |= set(listed)
    for file in model_files(model, model_class):
        keys |= set(read_yaml(file))
    for cls in model_class.__mro__:
        if cls.__module__.startswith(("recbole.", "recbole_llm.")):
            keys |= _read_by(cls)
    return keys


@functools.cache
def other_models_keys() -> frozenset[str]:
    """Every key that some model, recipe for item tokens or language model has."""
    keys: set[str] = set()
    for folder in (
        RECBOLE_PROPERTIES / "model",
        *(properties_dir() / kind for kind in ("model", "item_tokens", "llm")),
    ):
        for file in folder.glob("*.yaml"):
            keys |= set(read_yaml(file))
    return frozenset(keys | set(read_yaml(properties_dir() / "training.yaml")))


@functools.cache
def _read_by(cls: type) -> frozenset[str]:
    """The settings that the source of a class reads; it takes longer to find than all else of a configuration."""
    return frozenset(re.findall(r"""config\[\s*["'](\w+)["']\s*\]""", inspect.getsource(cls)))
