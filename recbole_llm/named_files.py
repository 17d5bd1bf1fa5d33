"""Files that settings name, whose content moves a result though the setting stays the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError

# Weights that models of RecBole begin with.
WEIGHTS = ("pretrain_path", "mf_pretrain_path", "mlp_pretrain_path", "warm_up", "pre_model_path")


def check_weights(final: Mapping[str, Any]) -> None:
    """Refuse a file of weights that is not there.

    Args:
        final: a run's settings.

    Raises:
        UserError: it is not.
    """
    for key, path in weights_of(final).items():
        if not path.is_file():
            raise UserError(f"{key}: there is no file {path}")


def weights_of(final: Mapping[str, Any]) -> dict[str, Path]:
    """The files of weights that settings name, by key.

    Args:
        final: a run's settings.
    """
    return {key: Path(str(final[key])) for key in WEIGHTS if final.get(key)}


def hash_of(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
