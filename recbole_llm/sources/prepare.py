"""``recbole-llm prepare --source``: published raw data to a data set's folder."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm import __version__
from recbole_llm.disk import FULL, PART, naming, remove, sync
from recbole_llm.errors import DiskFullError, UserError
from recbole_llm.sources.base import RawFiles, Source
from recbole_llm.sources.card import card_lines, figures, filter_lines, held_against
from recbole_llm.sources.filters import NO_METADATA, Rows, filtered
from recbole_llm.sources.lines import Tally
from recbole_llm.sources.reading import Read, read_interactions, read_metadata
from recbole_llm.sources.registry import get_source
from recbole_llm.sources.settings import Settings, read_settings
from recbole_llm.sources.writing import (
    ITEM,
    USER,
    readme_text,
    settings_text,
    write_described,
    write_interactions,
)

STATS, README = "stats.json", "README.md"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def prepare_source(arguments: Sequence[str]) -> str:
    """Turn raw files into a data set's folder, whole or not at all.

    Args:
        arguments: ``--key=value`` of ``properties/sources/overall.yaml``.

    Returns:
        What to print.

    Raises:
        UserError: a mistake in the settings, a missing, foreign or broken file, nothing left after filtering, or a
            folder that is there already; nothing has been written then.
    """
    settings = read_settings(arguments)
    source = get_source(settings["source"] or "")
    name = settings["name"] or _default_name(settings)
    output = Path(settings["output"]) / name
    with _files_told(output):
        folder = _input(settings)
        files = source.files(folder, settings["category"] or "")
        _check_output(name, output, settings["overwrite"])
    if files.items is None and settings["item_metadata"] != "none":
        raise UserError(
            f"{folder} has no metadata of {settings['category']} ({source.title}, {source.download}); without it "
            "--item_metadata=none keeps all items"
        )
    with _files_told(output), _told(), _made_whole(output) as part:
        return _prepare(settings, source, files, name, part, output)


@contextlib.contextmanager
def _files_told(output: Path) -> Iterator[None]:
    """What the system says of a file that cannot be read or written, in one line."""
    try:
        with naming(output):
            yield
    except OSError as error:
        told = f"{os.fsdecode(error.filename)}: {os.strerror(error.errno or 0).lower()}"
        if error.errno in FULL:
            raise DiskFullError(f"{told}; make room or set --output to another disk") from None
        raise UserError(told) from None


def _input(settings: Settings) -> Path:
    if settings["input"] is None:
        raise UserError("--input=DIR says where the raw files are")
    folder = Path(settings["input"])
    if not folder.is_dir():
        raise UserError(f"--input: {folder} is no folder")
    return folder


def _default_name(settings: Settings) -> str:
    parts = [settings["source"].rpartition(":")[2], settings["category"], settings["preset"]]
    name = "-".join(part for part in parts if part).lower()
    return re.sub(r"[^a-z0-9.]+", "-", name).strip("-.")


def _check_output(name: str, output: Path, overwrite: bool) -> None:
    if not _NAME.fullmatch(name):
        raise UserError(f"name should be letters, digits, '.', '_' and '-', but is {name!r}")
    if name == "ml-100k":
        raise UserError("RecBole reads its own copy for the name ml-100k, whatever is in dataset/; say another --name")
    if output.is_symlink():
        raise UserError(f"{output} is a link, and would be replaced by a folder; name the place that it points to")
    if output.exists() and not output.is_dir():
        raise UserError(f"{output} is a file")
    if not output.exists():
        return
    if not overwrite:
        raise UserError(f"{output} is there already; --overwrite=true replaces it, --name=... makes another")
    foreign = sorted({path.name for path in output.iterdir()} - _own_files(name))
    if foreign:
        raise UserError(f"{output} holds {foreign[0]}, which prepare has not written; it is not replaced")


def _own_files(name: str) -> set[str]:
    return {STATS, README, *(f"{name}.{suffix}" for suffix in ("inter", "item", "user", "yaml"))}


@contextlib.contextmanager
def _made_whole(output: Path) -> Iterator[Path]:
    """A folder beside the output that takes its place when the block has ended well, and goes when it has not."""
    part = output.with_name(f".{output.name}{PART}")
    output.parent.mkdir(parents=True, exist_ok=True)
    part.mkdir(exist_ok=True)
    descriptor = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another prepare is writing {output}") from None
        try:
            for left in part.iterdir():
                remove(left)
            yield part
            _move(part, output)
        finally:
            remove(part)
    finally:
        os.close(descriptor)


def _move(part: Path, output: Path) -> None:
    for file in part.iterdir():
        sync(file)
    sync(part)
    before = output.with_name(f".{output.name}.before")
    remove(before)
    with naming(output):
        if output.exists():
            os.replace(output, before)
        os.replace(part, output)
    sync(output.parent)
    remove(before)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Progress and broken lines on stderr, where no run has set up logging."""
    logger = logging.getLogger("recbole_llm")
    handler, before = logging.StreamHandler(sys.stderr), logger.level
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class _Tallies:
    """The account of every file that is read; a later pass over a file is accounted for where it finds other things."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.made: dict[str, Tally] = {}

    @contextlib.contextmanager
    def of(self, path: Path) -> Iterator[Tally]:
        """Count a file, and refuse it where too much of it is broken."""
        tally = Tally(path.name)
        yield tally
        before = self.made.get(tally.name)
        if before is not None:
            if tally.reasons in ({}, before.reasons):
                return
            tally.name += ", reviews"
        self.made[tally.name] = tally
        tally.check(self.most)
        if tally.broken:
            logging.getLogger("recbole_llm").warning("%s; left out", tally.told())


def _prepare(settings: Settings, source: Source, files: RawFiles, name: str, part: Path, output: Path) -> str:
    tallies = _Tallies(settings["broken_share"])
    with tallies.of(files.interactions.path) as tally:
        read = read_interactions(files.interactions, tally, show=True)
    metadata = np.full(len(read.items), NO_METADATA, dtype=np.int8)
    if files.items is not None:
        with tallies.of(files.items.path) as tally:
            metadata, read.taken_for = read_metadata(
                files.items, read.items, source.columns, settings["title_length"], settings["merge_titles"], tally, True
            )
    read.rows.items = read.taken_for[read.rows.items]
    rows, steps = filtered(read.rows, metadata, settings.values)
    texts = _write_data(settings, source, files, name, part, read, rows, tallies)
    made = figures(rows)
    card: dict[str, Any] = {
        "title": source.title,
        "category": settings["category"],
        "licence": source.licence,
        "version": __version__,
        "files": {path.name: path.stat().st_size for path in _paths(files, settings)},
        "settings": {key: value for key, value in settings.values.items() if key not in _PLACES},
        **made,
        "first_time": float(rows.times.min()),
        "last_time": float(rows.times.max()),
        "texts": texts,
        "filters": steps,
        "lines": {file: tally.as_dict() for file, tally in tallies.made.items()},
    }
    if settings.published:
        card["published"] = held_against(made, settings.published)
    shown = [*filter_lines(steps), "", *card_lines(card)]
    filled = {key for key, value in texts.items() if value["filled"]}
    yaml = settings_text(
        name,
        [
            f"{source.title}, {settings['category']}: {made['users']:,} users, {made['items']:,} items, "
            f"{made['interactions']:,} interactions.",
            f"Licence: {source.licence}.",
        ],
        source.columns,
        not np.isnan(rows.ratings).all(),
        files.items is not None,
        filled,
    )
    (part / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    (part / STATS).write_text(json.dumps(card, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    left_out = [tally.told() for tally in tallies.made.values() if tally.broken]
    (part / README).write_text(
        readme_text(name, card | {"left_out": left_out, "settings_text": _settings_lines(settings)}, shown),
        encoding="utf-8",
    )
    how = f"--dataset={name}" if output.parent == Path("dataset") else f"--dataset={name} --data_path={output.parent}"
    return "\n".join([f"{source.title}, {settings['category']}", "", *shown, "", f"data        {output}",
                      f"use         recbole-llm run --model=BPR {how}"])  # fmt: skip


# Settings that say where things are, not what is made of them.
_PLACES = ("input", "output", "overwrite", "name")


def _settings_lines(settings: Settings) -> str:
    kept = {key: value for key, value in settings.values.items() if key not in _PLACES}
    return "".join(f"{key}: {'~' if value is None else json.dumps(value)}\n" for key, value in kept.items())


def _paths(files: RawFiles, settings: Settings) -> list[Path]:
    found = [files.interactions, files.items, files.users, files.reviews if settings["reviews"] else None]
    return list(dict.fromkeys(file.path for file in found if file is not None))


def _write_data(
    settings: Settings,
    source: Source,
    files: RawFiles,
    name: str,
    part: Path,
    read: Read,
    rows: Rows,
    tallies: _Tallies,
) -> dict[str, Any]:
    """Write the atomic files.

    Returns:
        How much of each text column is filled.
    """
    reviews = files.reviews if settings["reviews"] else None
    same_file = reviews is not None and reviews.path == files.interactions.path
    with tallies.of((reviews or files.interactions).path) as tally:
        said = write_interactions(part / f"{name}.inter", rows, read, reviews, same_file, tally, show=True)
    texts: dict[str, Any] = {}
    if files.items is not None:
        raw = list(read.items)
        stays = {raw[item] for item in np.unique(rows.items).tolist()}
        title = source.columns.title, settings["title_length"]
        with tallies.of(files.items.path) as tally:
            filled = write_described(
                part / f"{name}.item", files.items, ITEM, source.columns.item, stays, title, tally, show=True
            )
        texts |= {column: made.as_dict(of=len(stays)) for column, made in filled.items()}
    if files.users is not None:
        stays = {read.users[user] for user in np.unique(rows.users).tolist()}
        with tallies.of(files.users.path) as tally:
            write_described(
                part / f"{name}.user", files.users, USER, source.columns.user, stays, ("", None), tally, show=True
            )
    if said is not None:
        texts["review"] = said.as_dict()
    return texts
