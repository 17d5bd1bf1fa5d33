"""Training state as one safetensors file: tensors as tensors, the rest as JSON in its header.

RecBole pickles its whole Config into every checkpoint with a protocol that torch's safe loader cannot read
(trainer.py:308). Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError

logger = logging.getLogger("recbole_llm")

# A recommender's weights, in the folder of the stage that trained it.
WEIGHTS = "weights.safetensors"
# The state of a stage that is not finished; the stage cache takes it away when the stage is.
RESUME_FILE = "resume.safetensors"
# It is written no more often than this.
RESUME_SECONDS = 20.0


def save_state(path: Path, state: Any) -> None:
    """Write a state whole or not at all.

    Args:
        path: the file; its folder exists.
        state: nested dicts, lists and tuples of tensors, arrays, SciPy sparse matrices, numbers, strings and ``None``.

    Raises:
        TypeError: it holds anything else.
        OSError: it cannot be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_encode(state, tensors))
    # An empty file cannot carry a header's tensors; one dummy keeps the format the same for every state.
    tensors = tensors or {"none": torch.zeros(1)}
    header = {"tree": tree, "sha256": _digest(tree, tensors)}
    write_whole(path, lambda part: save_file(tensors, str(part), metadata=header))


def load_state(path: Path, device: str | torch.device = "cpu") -> Any:
    """Read what :func:`save_state` wrote.

    Raises:
        UserError: the file is missing or damaged; one flipped bit is noticed.
    """
    if not Path(path).is_file():
        raise UserError(f"checkpoint {path} does not exist")
    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata())
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        # Files of the first release carry no checksum; any other header is a damaged one.
        if header.keys() != {"tree"} and header != {"tree": header["tree"], "sha256": _digest(header["tree"], tensors)}:
            raise ValueError("its checksum does not fit")
        tree = json.loads(header["tree"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint {path} is damaged ({error})") from None
    return _decode(tree, {name: tensor.to(device) for name, tensor in tensors.items()})


def _digest(tree: str, tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(tree.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ResumeFile:
    """Where a long stage keeps what it needs to go on after it was cut off.

    Args:
        path: the file, in the stage's own folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    def take_up(self) -> Any | None:
        """The state that an earlier attempt left; ``None`` where there is none, or (told in one line) a damaged one."""
        if not self.path.is_file():
            return None
        try:
            return load_state(self.path)
        except UserError as error:
            self.refuse(str(error))
            return None

    def refuse(self, reason: str) -> None:
        """Say why the state is of no use; the next one takes its place."""
        logger.warning("%s; this stage starts over", reason)

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= RESUME_SECONDS

    def save(self, state: Any) -> None:
        """Keep a state instead of the one before; see :func:`save_state`."""
        save_state(self.path, state)
        self._last = time.monotonic()


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
