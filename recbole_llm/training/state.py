"""Training state as one safetensors file: tensors as tensors, the rest as JSON in its header.

RecBole pickles its whole Config into every checkpoint with a protocol that torch's safe loader cannot read
(trainer.py:308). Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recbole_llm.errors import UserError


def save_state(path: Path, state: Any) -> None:
    """Write a state whole or not at all.

    Args:
        path: the file; its folder exists.
        state: nested dicts, lists and tuples of tensors, arrays, SciPy sparse matrices, numbers, strings and ``None``.

    Raises:
        TypeError: it holds anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors)
    part = path.with_name(path.name + ".part")
    # An empty file cannot carry a header's tensors; one dummy keeps the format the same for every state.
    save_file(tensors or {"none": torch.zeros(1)}, str(part), metadata={"tree": json.dumps(tree)})
    with part.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(part, path)


def load_state(path: Path, device: str | torch.device = "cpu") -> Any:
    """Read what :func:`save_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            tree = json.loads(file.metadata()["tree"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error})") from None
    return _decode(tree, tensors)


def _encode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | np.floating | np.integer):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"kind": "tensor", "name": name}
    if isinstance(value, np.ndarray) and value.dtype != object:
        return {"kind": "array", "value": _encode(torch.from_numpy(np.ascontiguousarray(value)), tensors)}
    if sp.issparse(value):
        csr = value.tocsr()
        parts = [_encode(np.asarray(part), tensors) for part in (csr.data, csr.indices, csr.indptr)]
        return {"kind": "sparse", "value": parts, "shape": list(csr.shape)}
    if isinstance(value, Mapping):
        return {
            "kind": "dict",
            "value": [[_encode(key, tensors), _encode(inner, tensors)] for key, inner in value.items()],
        }
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"kind": kind, "value": [_encode(inner, tensors) for inner in value]}
    raise TypeError(f"a {type(value).__name__} cannot be saved in a checkpoint")


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    kind = tree["kind"]
    if kind == "tensor":
        return tensors[tree["name"]]
    if kind == "array":
        return _decode(tree["value"], tensors).cpu().numpy()
    if kind == "sparse":
        data, indices, indptr = (_decode(part, tensors) for part in tree["value"])
        return sp.csr_matrix((data, indices, indptr), shape=tuple(tree["shape"]))
    if kind == "dict":
        return {_decode(key, tensors): _decode(value, tensors) for key, value in tree["value"]}
    values = [_decode(value, tensors) for value in tree["value"]]
    return values if kind == "list" else tuple(values)


Generator = torch.Generator | np.random.Generator | None


def rng_state(*generators: Generator) -> dict[str, Any]:
    """Every random stream a training run draws from: Python's, NumPy's, torch's, and given generators'."""
    state = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "generators": [_generator_state(generator) for generator in generators],
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _generator_state(generator: Generator) -> Any:
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    return None if generator is None else generator.get_state()


def set_rng_state(state: Mapping[str, Any], *generators: Generator) -> None:
    """Put the streams of :func:`rng_state` back."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for generator, saved in zip(generators, state["generators"], strict=True):
        if isinstance(generator, np.random.Generator):
            generator.bit_generator.state = saved
        elif generator is not None and saved is not None:
            generator.set_state(saved)
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
