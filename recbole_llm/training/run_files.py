"""What a finished run says of itself, read without importing anything that trains."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, nearest

# The card of a finished stage, in its folder of the cache.
CARD = "stage.json"


def result_file(path: str | Path) -> Path:
    """The ``result.json`` of a run that is named by its folder or by that file."""
    return Path(path) if Path(path).suffix == ".json" else Path(path) / "result.json"


def read_result(path: str | Path) -> dict[str, Any]:
    """The ``result.json`` of a run.

    Args:
        path: the run's folder or its ``result.json``.

    Raises:
        UserError: there is no result there (with the nearest), or it cannot be read.
    """
    folder, file = Path(path), result_file(path)
    if not file.is_file():
        runs = sorted(str(run.parent) for run in folder.glob("*/result.json"))
        others = [other.name for other in folder.parent.glob("*/") if other.name != folder.name]
        near = runs or [str(folder.parent / name) for name in nearest(folder.name, others)]
        hint = f"; did you mean {' or '.join(near[:3])}?" if near else ""
        raise UserError(f"no result.json in {folder}{hint}")
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error})") from None


def cache_of(settings: Mapping[str, Any], run: Path, given: str | None = None) -> Path:
    """The stage cache of a run: beside it, as they are written, or by its settings where it was moved away alone.

    Args:
        settings: the run's, its ``cache`` and ``output_dir``; the latter is read from where one stands.
        run: its folder or ``result.json``.
        given: an ``output_dir`` that was asked for now, and goes before both.
    """
    folder = run if run.is_dir() else run.parent
    if settings["cache"] == "off":
        return folder / "stages"
    beside = folder.resolve().parent / "cache"
    if given is not None and (Path(given) / "cache").is_dir():
        return Path(given) / "cache"
    named = Path(settings["output_dir"]) / "cache"
    return named if named.is_dir() and not beside.is_dir() else beside


def stage_folder(cache: Path, line: Mapping[str, Any]) -> Path:
    """Where a cache keeps a stage.

    Args:
        cache: its folder.
        line: the stage's in ``result.json``.
    """
    return cache / f"{line['name']}-{line['fingerprint'][:16]}"
