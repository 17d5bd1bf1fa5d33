"""What recommendations depend on, so that a store knows the run that it may answer for.

Nothing here imports torch: a look-up in a store should take no longer than reading it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError
from recbole_llm.training.run_files import CARD, cache_of, stage_folder

PHASES = ("train", "valid", "test")
# What a store of other values is told by: the field of the identity, and the words for it.
TOLD = {
    "model": "of a {0} run, and this one is of {1}",
    "dataset": "of a run on {0}, and this one is on {1}",
    "split": "of another split ({0:.16}) than this run's ({1:.16})",
    "stages": "of another run: its stages are not this run's",
    "search": "of another search than this run's: beams, or another setting that moves rankings alone",
    "item_tokens": "of other item tokens than this run's",
    "weights": "of other weights than this run has now",
    "new_items": "of another item pool: it was built {0}, and what is asked for is {1}",
    "history_phases": "of history_phases {0}, and what is asked for is {1}",
}
# A store of before there was a "search" has the run's settings in its "stages".
_MAY_LACK = ("weights", "search")


def identity(
    result: Mapping[str, Any],
    run: Path,
    phases: Sequence[str],
    index_file: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    seen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a user's recommendations from a run depend on, as plain data.

    Args:
        result: the content of the run's ``result.json``.
        run: its folder or that file.
        phases: the phases whose rows are a user's history.
        index_file: codes of the items, those that came after training among them.
        settings: others than the run's; ``output_dir`` says where its cache is now.
        seen: ``weight_files`` of an identity made before. A file that looks as it did then is not read again.

    Returns:
        Values by the names of :data:`TOLD`, and ``weight_files``: size and time of each file of the last stage.
        ``weights`` is ``None`` where the stage is not in the cache any more: a store serves without it. ``search`` is
        ``None`` of a model that does not search, and of a run whose result says nothing of it.

    Raises:
        UserError: the run is none that can be served.
    """
    try:
        split, last = result["split"]["fingerprint"], result["stages"][-1]
        stages = [stage["fingerprint"] for stage in result["stages"]]
        last_folder = stage_folder(cache_of(result["config"], run, (settings or {}).get("output_dir")), last)
        names = {"model": result["model"], "dataset": result["dataset"]}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"the result.json of {run} says nothing of {error}; it is no run's") from None
    if not split:
        raise UserError(f"{run} was made with policy: recbole; recommend serves runs of policy: unified")
    weights, files = _weights(last_folder, seen)
    return {
        **names,
        "split": split,
        "stages": hashlib.sha256(json.dumps(stages).encode()).hexdigest(),
        "search": _search(result),
        "item_tokens": _item_tokens(run),
        "weights": weights,
        "weight_files": files,
        "new_items": _pool(index_file),
        "history_phases": ",".join(phases),
    }


def difference(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """In words, the first thing that a store was built for and that is not asked for; empty where there is none."""
    for name, words in TOLD.items():
        values = stored.get(name), asked[name]
        if values[0] != values[1] and not (name in _MAY_LACK and None in values):
            return words.format(*values)
    return ""


def _search(result: Mapping[str, Any]) -> str | None:
    """How a run searches for items, as a hash: of those with the same stages each may do so in a way of its own."""
    told = result.get("search")
    if told is None:
        return None
    # Who is served is asked about with the first prompt, whatever the figures are the mean over.
    counts = {key: value for key, value in told.items() if key != "inference_prompts"}
    return hashlib.sha256(json.dumps(counts, sort_keys=True).encode()).hexdigest()


def _item_tokens(run: Path) -> str | None:
    """The fingerprint of the tokens that the run keeps of its items."""
    file = (run if run.is_dir() else run.parent) / "item_tokens.json"
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["fingerprint"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r})") from None


def _weights(folder: Path, seen: Mapping[str, Any] | None) -> tuple[str | None, dict[str, list[int]]]:
    """SHA-256 of a stage's files, by its card where they look as when they were read last, and how they look now."""
    try:
        files: dict[str, str] = json.loads((folder / CARD).read_text(encoding="utf-8"))["files"]
        looks = {}
        for name in files:
            found = (folder / name).stat()
            looks[name] = [found.st_size, found.st_mtime_ns]
            if seen is not None and seen.get(name) != looks[name]:
                with (folder / name).open("rb") as file:
                    files[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest(), looks
    except FileNotFoundError:
        return None, {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "unreadable", {}


def _pool(index_file: Path | None) -> str:
    if index_file is None:
        return "without new items"
    try:
        return f"with new items ({hashlib.sha256(index_file.read_bytes()).hexdigest()[:16]})"
    except OSError:
        raise UserError(f"there is no index file {index_file}") from None


def phases_of(text: str) -> tuple[str, ...]:
    """The phases of a user's history as they are typed, e.g. ``train,valid``; in their own order, each once.

    Raises:
        UserError: another word, or none.
    """
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in PHASES]
    if wrong:
        raise UserError(f"history_phases should name some of {', '.join(PHASES)}, but has '{wrong[0]}'")
    return tuple(phase for phase in PHASES if phase in words)


__all__ = ["PHASES", "difference", "identity", "phases_of"]
