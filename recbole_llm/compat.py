"""RecBole 1.2.1 on today's NumPy, SciPy, pandas and torch: the only place that mends it.

Each piece names the RecBole line it mends. Nothing in site-packages is edited, and neither ``ray`` nor
``recbole.quick_start`` (the only module of RecBole that imports ray) is ever imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from recbole_llm.errors import UserError

RECBOLE_VERSION = "1.2.1"

# config/configurator.py:625-635 sets these from np.float_, np.complex_ and np.unicode_, which NumPy 2 removed; RecBole
# reads np.float (evaluator/metrics.py, data/interaction.py:31, dataset.py:652) and np.str (hyper_tuning.py:386).
_NUMPY_ALIASES = {
    "bool": np.bool_,
    "int": np.int_,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int_,
    "unicode": np.str_,
}


def install() -> None:
    """Make RecBole 1.2.1 importable and runnable here; calling it again changes nothing.

    Raises:
        UserError: when another version of RecBole is installed.
    """
    found = importlib.metadata.version("recbole")
    if found != RECBOLE_VERSION:
        raise UserError(f"recbole {found} is installed; recbole_llm mends exactly recbole {RECBOLE_VERSION}")
    for name, target in _NUMPY_ALIASES.items():
        if name not in np.__dict__:
            setattr(np, name, target)
    # lightgcn.py:111, ngcf.py:110, ncl.py:131, gcmc.py:174, spectralcf.py:123: SciPy 1.13 dropped dok_matrix._update.
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda self, data: self._dict.update(data)
    # trainer.py:235 torch.cuda.amp, lightgcn.py:125 torch.sparse.FloatTensor: deprecated spellings that still work.
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.(GradScaler|autocast).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.sparse\.SparseTensor.*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*(Sparse CSR|sparse csr).*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*Sparse invariant checks.*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*non-writable.*", category=UserWarning)


@contextlib.contextmanager
def anomaly_mode_kept() -> Iterator[None]:
    """Leave torch's anomaly mode as it was found.

    sequential_recommender/sine.py:25 turns it on for the whole process, and importing any sequential model imports it:
    every later training step of any model then costs about twice its time.
    """
    import torch

    before = torch.is_anomaly_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before)


@contextlib.contextmanager
def recbole_says() -> Iterator[None]:
    """Pass on what RecBole itself refuses while it loads data as the user's mistake that it is.

    dataset.py raises ValueError for a field that does not exist, a bad interval and their like; one from anywhere but
    RecBole's own code stays what it is.
    """
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "recbole" not in Path(last).parts or isinstance(error, UserError):
            raise
        raise UserError(f"RecBole refuses the data: {error}") from error


@contextlib.contextmanager
def tensorboard_in(folder: Path | None) -> Iterator[None]:
    """Give the trainers built inside the block a tensorboard folder of their own.

    trainer.py:120 calls utils.get_tensorboard, which always writes to ``./log_tensorboard`` and names the folder after
    the first log file of the process, so two runs in one process share it.

    Args:
        folder: where the events go; ``None`` writes none.
    """
    import recbole.trainer.trainer as recbole_trainer

    def writer(_logger: Any) -> Any:
        if folder is None:
            return _NoTensorboard()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))

    before = recbole_trainer.get_tensorboard
    recbole_trainer.get_tensorboard = writer
    try:
        yield
    finally:
        recbole_trainer.get_tensorboard = before


class _NoTensorboard:
    """Stands where a SummaryWriter is expected and writes nothing."""

    def add_scalar(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignore a scalar."""

    def add_hparams(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignore a row of hyper-parameters."""

    def close(self) -> None:
        """Nothing is open."""
