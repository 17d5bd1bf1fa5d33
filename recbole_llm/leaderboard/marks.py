"""Marks of runs: a hash of all that a run's figures depend on, so that a finished run is found as long as it holds."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config import INPUT_KEYS, NEUTRAL_KEYS, Config
from recbole_llm.data.templates import file_of
from recbole_llm.named_files import hash_of, weights_of
from recbole_llm.training.pipeline import code_mark, validations
from recbole_llm.training.store import fingerprint_of

# What moves a run beside the settings of its stages.
MOVING = (*INPUT_KEYS, "refit_on_valid", "merge_valid", "continue_from")
# What moves how it is measured.
_MEASURING = ("metrics", "topk", "metric_decimal_place", "tail_ratio")

# Code that no figure depends on: it runs after a run has them, or makes data sets, whose bytes are in the mark.
_APART = ("leaderboard/", "sources/", "cli.py", "inspection.py", "evaluation/alignment.py", "evaluation/pictures.py")


def mark_of(config: Config, data: str, code: str) -> str:
    """The mark of a run.

    It is of the settings as they finally stand, those of the model's parts among them, of the files that settings name
    (wordings of prompts, item tokens, a run to go on from, a language model's folder), of the data set's files, and of
    the code of this package or of a model from elsewhere.

    Args:
        config: the run's.
        data: of :func:`bytes_of`, the data set's folder.
        code: of :func:`code_of_package`.
    """
    counts = {*MOVING, *_MEASURING}
    final = {key: value for key, value in config.as_dict().items() if key not in NEUTRAL_KEYS or key in counts}
    # A part has shipped settings of its own.
    parts = [config.part(part) for part in config.parts()]
    beneath: list[Any] = [part.stage_keys() for part in parts]
    beneath += [beneath_settings(one) for one in (config, *parts)]
    return fingerprint_of([config["model"], config["dataset"], final, data, code, beneath])


def training_of(config: Config) -> str:
    """What runs share whose model is trained alike and searched otherwise: one of them trains, the others find it.

    Args:
        config: the run's.

    Returns:
        A hash of it; empty for a model of which no such settings are known, and where validations pick among epochs by
        what a search finds.
    """
    told = getattr(config.model_class, "search_settings", None)
    if told is None or validations(config) > 1:
        return ""
    searched = told()
    own = {key: value for key, value in config.stage_keys().items() if key not in searched}
    parts = [config.part(part).stage_keys() for part in config.parts() if part not in searched]
    return fingerprint_of([config["model"], config["dataset"], own, [config[key] for key in MOVING], parts])


def beneath_settings(config: Config) -> list[Any]:
    """What a model's figures depend on that its settings only name: files, and code from elsewhere.

    Args:
        config: of a run, or of a part of one.
    """
    return [_named_by(config), code_mark(config.model_class)]


def code_of_package() -> str:
    """The code of this package that figures depend on, as a hash."""
    return bytes_of(Path(__file__).parent.parent, "**/*.py", leave_out=_APART)


def bytes_of(folder: Path, pattern: str = "*", leave_out: Sequence[str] = ()) -> str:
    """SHA-256 of a folder's files.

    Args:
        folder: with the files.
        pattern: of their paths inside it.
        leave_out: how the paths of those begin that do not count.
    """
    digest = hashlib.sha256()
    for file in sorted(folder.glob(pattern)):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and not name.startswith(tuple(leave_out)):
            digest.update(f"{name} {hash_of(file)}\n".encode())
    return digest.hexdigest()


def _named_by(config: Config) -> dict[str, Any]:
    """What is in the files that settings name: they may be written anew, and no setting tells of it."""
    final = config.final_config_dict
    prompts = [str(final[key]) for key in ("prompts", "text_prompts", "profile_prompts") if final.get(key)]
    files = [file_of(name) for given in prompts for name in (given, f"{given}-official")]
    found: dict[str, Any] = {file.name: hash_of(file) for file in files if file.is_file()}
    found |= {key: hash_of(file) for key, file in weights_of(final).items()}
    for path in (Path(str(final[key])) for key in ("code_tokens", "continue_from") if final.get(key)):
        found[str(path)] = bytes_of(path) if path.is_dir() else hash_of(path) if path.is_file() else None
    return found | {key: _stamps_of(str(final.get(key))) for key in ("llm", "text_llm")}


def _stamps_of(llm: str) -> list[list[Any]]:
    """Names, sizes and times of the files of a language model's folder, whose bytes are too many; none for a name."""
    files = sorted(path for path in Path(llm).glob("*") if path.is_file()) if Path(llm).is_dir() else []
    return [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
