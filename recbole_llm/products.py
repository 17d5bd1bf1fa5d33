"""Products of float32 matrices on a CPU, by the faster of the two libraries that are there (``cpu_products``).

torch multiplies by MKL, which on AMD's processors stays at AVX2; numpy's OpenBLAS has AVX-512 kernels that run there,
about twice as fast where 512 bits go through at once (``docs/performance.md``), and no faster where as two halves.
Where that is chosen, torch's own kernels of ``mm`` and ``addmm`` on the CPU hand large products to it, in torch's own
way of replacing a kernel (:func:`torch.library.get_kernel`). So every linear layer gains in both directions,
whoever's it is, and automatic differentiation, adapters, autocast, compiling and counters of operations see what they
always see. Sums come in another order: products move in their last bits, each choice repeats its own, and what is
trained for long ends as with another seed.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import ThreadpoolController
from torch import Tensor

from recbole_llm.errors import UserError

CHOICES = ("auto", "torch", "openblas")
CPUINFO = Path("/proc/cpuinfo")
# AMD's family of processors from which on (Zen 5) an operation of 512 bits is no longer two of 256.
FULL_WIDTH = 26
# OpenBLAS's names of its kernels for AVX-512, which it takes where the processor can (or OPENBLAS_CORETYPE says so).
WIDE = frozenset({"SkylakeX", "Cooperlake", "SapphireRapids"})
# Below these OpenBLAS is slower, as it copies one of the factors first: rows, the other two sizes, multiplications.
LEAST_ROWS, LEAST_SIDE, LEAST_WORK = 48, 8, 2**19

# What holds the replaced kernels in torch while they are in use.
_library: Any = None


def use(choice: str) -> None:
    """Settle how this process multiplies from now on.

    Args:
        choice: ``torch``, as it comes; ``openblas``; or ``auto``, the latter where it is known to be faster: on one
            thread of a processor that MKL holds back, with the kernels that gain there.

    Raises:
        UserError: ``openblas`` is not to be had.
    """
    global _library
    lacking = _lacking() if choice == "openblas" else ""
    if lacking:
        raise UserError(f"cpu_products: openblas needs {lacking}; cpu_products: torch needs nothing")
    wanted = choice == "openblas" or (choice == "auto" and _gains())
    if wanted:
        # Both libraries have threads of their own, which should not be more than asked for.
        _openblas().limit(limits=torch.get_num_threads())
    if wanted and _library is None:
        _library = _replace()
    elif not wanted and _library is not None:
        _library._destroy()
        _library = None


def in_use() -> str:
    """``openblas`` or ``torch``, as it stands."""
    return "torch" if _library is None else "openblas"


def _lacking() -> str:
    if not hasattr(torch.library, "get_kernel"):
        return f"a torch that has library.get_kernel, not {torch.__version__}"
    return "" if kernels() else "a numpy that multiplies by OpenBLAS, as those of PyPI do"


def _gains() -> bool:
    return torch.get_num_threads() == 1 and _held_back() and not _lacking() and kernels() in WIDE


@functools.cache
def _held_back() -> bool:
    """Whether the processor is AMD's, on which MKL leaves AVX-512 alone, and has it in full width."""
    try:
        text = CPUINFO.read_text(errors="replace")
    except OSError:
        return False
    # Of the first of them.
    parts = [line.partition(":") for line in text.partition("\n\n")[0].splitlines()]
    told = {key.strip(): value.strip() for key, _, value in parts}
    family = told.get("cpu family", "")
    return told.get("vendor_id") == "AuthenticAMD" and family.isdecimal() and int(family) >= FULL_WIDTH


@functools.cache
def _openblas() -> Any:
    return ThreadpoolController().select(filepath=_file())


@functools.cache
def _file() -> str:
    """The library of the OpenBLAS inside numpy; those of other packages lie beside it."""
    if "openblas" not in np.show_config(mode="dicts")["Build Dependencies"]["blas"]["name"]:
        return ""
    files = [library["filepath"] for library in ThreadpoolController().select(internal_api="openblas").info()]
    own = [file for file in files if Path(file).parent.name in ("numpy.libs", ".dylibs")]
    shared = [file for file in files if not Path(file).parent.name.endswith(".libs")]
    return next(iter([*own, *shared]), "")


@functools.cache
def kernels() -> str:
    """The name of the kernels that numpy's OpenBLAS takes; empty where numpy has another library."""
    return str(_openblas().info()[0]["architecture"]) if _file() else ""


def _replace() -> Any:
    """Put OpenBLAS into torch's place for what is worth it."""
    plain = {name: torch.library.get_kernel(f"aten::{name}", "CPU") for name in ("mm", "addmm")}

    def mm(keys: Any, left: Tensor, right: Tensor) -> Tensor:
        if _worth_it(left, right):
            return _product(left, right)
        return plain["mm"].call_boxed(keys, left, right)

    def addmm(keys: Any, added: Tensor, left: Tensor, right: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
        if beta == 1 and alpha == 1 and added.dtype == torch.float32 and _worth_it(left, right):
            return _product(left, right).add_(added)
        return plain["addmm"].call_boxed(keys, added, left, right, beta=beta, alpha=alpha)

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # That a kernel is replaced is what is meant.
        warnings.filterwarnings("ignore", message=".*[Oo]verrid.*", category=UserWarning)
        library.impl("mm", mm, "CPU", with_keyset=True)
        library.impl("addmm", addmm, "CPU", with_keyset=True)
    return library


def _worth_it(left: Tensor, right: Tensor) -> bool:
    if left.dtype is not torch.float32 or right.dtype is not torch.float32 or left.dim() != 2 or right.dim() != 2:
        return False
    rows, inner = left.shape
    columns = right.shape[1]
    if inner != right.shape[0]:
        # Refused in torch's words.
        return False
    return rows >= LEAST_ROWS and min(inner, columns) >= LEAST_SIDE and rows * inner * columns >= LEAST_WORK


def _product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right``, float32 ``[M, K]`` and ``[K, N]``, whatever their strides."""
    out = left.new_empty((left.shape[0], right.shape[1]))
    # Of numbers out of range torch does not warn.
    with np.errstate(all="ignore"):
        np.dot(left.detach().numpy(), right.detach().numpy(), out=out.numpy())
    return out
