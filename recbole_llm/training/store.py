"""The stage cache: named steps with declared inputs, made once, put in place whole, checked when read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import resource
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from recbole_llm import processes
from recbole_llm.disk import PART, remove, sync, write_whole
from recbole_llm.errors import UserError
from recbole_llm.progress import clock
from recbole_llm.training.run_files import CARD, stage_folder
from recbole_llm.training.state import RESUME_FILE

logger = logging.getLogger("recbole_llm")

SECONDS = ".seconds"
LOCK_NOTE_SECONDS = 2.0


@dataclass(frozen=True)
class Stage:
    """A finished stage.

    Attributes:
        name: e.g. ``train-LightGCN``.
        fingerprint: hash of its name, version and inputs.
        folder: its artefacts.
        seconds: what it cost when it was made.
        cached: whether it was found rather than made.
        peak_memory_mb: most memory the process held while making it.
        facts: what its maker wants remembered (plain data).
    """

    name: str
    fingerprint: str
    folder: Path
    seconds: float
    cached: bool
    peak_memory_mb: float
    facts: dict[str, Any] = field(default_factory=dict)

    def as_dict(self, name: str | None = None) -> dict[str, Any]:
        """The stage's line in ``result.json``."""
        return {
            "name": name or self.name,
            "fingerprint": self.fingerprint,
            "seconds": round(self.seconds, 3),
            "cached": self.cached,
            "peak_memory_mb": round(self.peak_memory_mb, 1),
            # Read by a language model while the stage was made; None in a cache of before they were counted.
            "tokens": self.facts.get("tokens", None if "losses" in self.facts else 0),
        }


class StageStore:
    """Finished stages under one folder, keyed by fingerprint.

    Two runs may share it: a lock a fingerprint makes the second wait and then find the stage. A stage is made in a
    work folder whose name is its fingerprint, so that an interrupted one goes on from what it saved there, and is moved
    into place in one step.

    Of the processes of one run the main one keeps the cache: it alone holds locks and puts stages in place.

    Args:
        root: the cache folder.
        refresh: make every stage again.
    """

    def __init__(self, root: Path, refresh: bool = False) -> None:
        self.root, self.refresh = Path(root), refresh

    def run(
        self,
        name: str,
        version: int,
        inputs: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        together: bool = False,
        formerly: Mapping[str, Any] | None = None,
    ) -> Stage:
        """Find a stage or make it.

        Args:
            name: what it is.
            version: raised whenever the code that makes it changes what it makes.
            inputs: everything else that its artefacts depend on, as plain data.
            make: fills the folder it is given and returns facts (plain data). What it finds there is its own, from an
                attempt that was cut off. ``seconds_before`` among them is what went before and counts as the stage's.
            together: every process of the run makes it, and the main one alone writes; else the main one makes it
                while the others wait.
            formerly: inputs by which a cache may have it too, where less is told of them than once was.

        Returns:
            The stage, from the cache when its files are whole.
        """
        if not together or processes.count() == 1:
            return processes.on_main(
                lambda: self._find_or_make(name, version, self._known_by(name, version, inputs, formerly), make)
            )
        if not processes.is_main():
            return _help_to_make(make)
        begun = False

        def make_together(folder: Path) -> dict[str, Any]:
            nonlocal begun
            begun = True
            processes.from_main(folder)
            return make(folder)

        try:
            known = self._known_by(name, version, inputs, formerly)
            stage = self._find_or_make(name, version, known, make_together)
        except UserError:
            if begun:
                processes.from_main(None)
            raise
        if not begun:
            processes.from_main(None)
        return processes.from_main(stage)

    def _known_by(
        self, name: str, version: int, inputs: Mapping[str, Any], formerly: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """By which inputs a stage is to be looked for."""
        if formerly is None or self.refresh or self.place(name, version, inputs)[1].exists():
            return inputs
        old = self.place(name, version, formerly)[1]
        return formerly if old.exists() or (self.root / ".work" / old.name).exists() else inputs

    def _find_or_make(
        self, name: str, version: int, inputs: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]
    ) -> Stage:
        mark, final = self.place(name, version, inputs)
        entry = final.name
        work = self.root / ".work" / entry
        (self.root / ".locks").mkdir(parents=True, exist_ok=True)
        lock = FileLock(str(self.root / ".locks" / f"{entry}.lock"))
        try:
            lock.acquire(timeout=LOCK_NOTE_SECONDS)
        except Timeout:
            logger.info("%s: another run is making it; waiting", name)
            lock.acquire()
        try:
            if self.refresh:
                shutil.rmtree(final, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
            found = self._find(name, mark, final)
            return found or self._make(name, version, mark, inputs, make, work, final)
        finally:
            lock.release()

    def place(self, name: str, version: int, inputs: Mapping[str, Any]) -> tuple[str, Path]:
        """A stage's fingerprint and its folder."""
        mark = fingerprint_of({"stage": name, "version": version, "inputs": inputs})
        return mark, stage_folder(self.root, {"name": name, "fingerprint": mark})

    def _find(self, name: str, mark: str, final: Path) -> Stage | None:
        if not final.exists():
            return None
        found = damage(final, mark)
        if found:
            logger.warning("%s: the cache entry %s is damaged (%s); it is made again", name, final, found)
            shutil.rmtree(final)
            return None
        return self.stage_at(name, mark, final)

    @staticmethod
    def stage_at(name: str, mark: str, final: Path) -> Stage:
        """A finished stage that is whole."""
        card = json.loads((final / CARD).read_text(encoding="utf-8"))
        logger.info("%s: found in the cache (%s when it was made)", name, clock(card["seconds"]))
        return Stage(name, mark, final, card["seconds"], True, card["peak_memory_mb"], card["facts"])

    def _make(
        self,
        name: str,
        version: int,
        mark: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        work: Path,
        final: Path,
    ) -> Stage:
        work.mkdir(parents=True, exist_ok=True)
        # A card is the last thing written, so with a whole one nothing but the move is missing.
        if damage(work, mark):
            remove(work / CARD)
            self._fill(name, version, mark, inputs, make, work)
        for path in _unfinished(work):
            remove(path)
        os.replace(work, final)
        sync(final.parent)
        card = json.loads((final / CARD).read_text(encoding="utf-8"))
        logger.info("%s: done in %s", name, clock(card["seconds"]))
        return Stage(name, mark, final, card["seconds"], False, card["peak_memory_mb"], card["facts"])

    def _fill(
        self,
        name: str,
        version: int,
        mark: str,
        inputs: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]],
        work: Path,
    ) -> None:
        """Have the stage made in its work folder, and write the card that says it is whole."""
        before = _spent(work)
        start = time.monotonic()
        reset_peak_memory()
        logger.info("%s: %s", name, "going on where it was cut off" if any(work.iterdir()) else "starting")
        _note(work, before)
        try:
            facts = make(work)
        finally:
            _note(work, before + time.monotonic() - start)
        seconds = before + time.monotonic() - start + facts.pop("seconds_before", 0.0)
        peak = peak_memory_mb()
        extra = _unfinished(work)
        files = {}
        for path in sorted(work.rglob("*")):
            if path.is_dir():
                sync(path)
            elif extra.isdisjoint((path, *path.parents)):
                sync(path)
                files[str(path.relative_to(work))] = _sha256(path)
        card = {
            "schema": 1, "name": name, "version": version, "fingerprint": mark, "inputs": inputs, "seconds": seconds,
            "peak_memory_mb": peak, "facts": facts, "files": files,
        }  # fmt: skip
        card = json.loads(json.dumps(card))
        card["seal"] = fingerprint_of(card)
        text = json.dumps(card, indent=1, sort_keys=True)
        write_whole(work / CARD, lambda part: part.write_text(text, encoding="utf-8"))


def _unfinished(work: Path) -> set[Path]:
    """What only an attempt that was cut off needs, or has left."""
    return {work / RESUME_FILE, work / SECONDS, *work.rglob(f"*{PART}")}


def _note(work: Path, seconds: float) -> None:
    # On a full disk the figure is lost; the error that matters is on its way or will come.
    with contextlib.suppress(OSError):
        (work / SECONDS).write_text(str(seconds), encoding="utf-8")


def _help_to_make(make: Callable[[Path], dict[str, Any]]) -> Stage:
    """The part of every process but the main one in a stage that is made together."""
    folder = processes.from_main(None)
    if folder is not None:
        try:
            make(folder)
        except UserError:
            # It stops training in every process; the main one is heard out before any leaves.
            processes.from_main(None)
            raise
    stage = processes.from_main(None)
    if stage is None:
        raise SystemExit(2)
    return stage


def _spent(work: Path) -> float:
    """Seconds that earlier attempts took; of a killed one those up to the last file it saved."""
    note = work / SECONDS
    try:
        saved = max(path.stat().st_mtime for path in work.rglob("*"))
        return float(note.read_text(encoding="utf-8")) + saved - note.stat().st_mtime
    except (OSError, ValueError):
        return 0.0


def damage(folder: Path, mark: str) -> str:
    """What is wrong with a stage's folder; empty when nothing is."""
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        if card["fingerprint"] != mark:
            return "it belongs to another stage"
        if card.pop("seal") != fingerprint_of(card):
            return f"{CARD} has changed"
        files = dict(card["files"])
        _ = card["seconds"], card["facts"], card["peak_memory_mb"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{CARD} cannot be read"
    for name, digest in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} has changed"
    return ""


def fingerprint_of(value: Any) -> str:
    """SHA-256 of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def reset_peak_memory() -> None:
    """Start counting the process's peak memory anew, where the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory_mb() -> float:
    """Most memory that the process has held since :func:`reset_peak_memory` (or its start), in MiB."""
    try:
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
