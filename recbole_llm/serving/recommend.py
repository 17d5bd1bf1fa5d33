"""``recbole-llm recommend``: what a run recommends to whom, live or from a store.

A look-up in a store imports nothing heavy: the run and its model are loaded only where something has to be ranked.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.serving.identity import PHASES, identity, phases_of
from recbole_llm.serving.store import TopKStore
from recbole_llm.training.run_files import read_result

if TYPE_CHECKING:
    from recbole_llm.serving.recommender import Recommender

OWN = (
    "run", "user", "users", "history", "k", "build", "store", "shard", "history_phases", "index_file", "new_items",
    "format",
)  # fmt: skip
# Settings of the run that say where and how it computes, and change no recommendation.
PASSED = (
    "data_path", "output_dir", "gpu_id", "use_gpu", "eval_batch_size", "eval_max_cells", "show_progress", "search_mode",
    "inference_tokens", "inference_batch_size",
)  # fmt: skip
FORMATS = ("table", "json")
STORE = "topk"

# Kinds of characters that a terminal obeys, or that end a line.
_UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")

Items = list[tuple[str, str, float]]


@dataclass
class Asked:
    """What the command line asks for.

    Attributes:
        run: folder or ``result.json``.
        users: raw ids.
        history: raw item ids of somebody the data set need not know.
        k: items each.
        build: ``false``, ``true`` or ``anew``.
        store: its folder; ``None`` answers live.
        named: whether the store was named by the user.
        shard: which of how many.
        phases: whose rows are a user's history.
        index_file, new_items: of items that came later.
        format: ``table`` or ``json``.
        settings: others than the run's.
    """

    run: Path
    users: list[str] = field(default_factory=list)
    history: list[str] | None = None
    k: int = 10
    build: str = "false"
    store: Path | None = None
    named: bool = False
    shard: tuple[int, int] = (0, 1)
    phases: tuple[str, ...] = PHASES
    index_file: Path | None = None
    new_items: Path | None = None
    format: str = "table"
    settings: dict[str, str] = field(default_factory=dict)


def recommend(arguments: Sequence[str]) -> str:
    """What the verb prints.

    Args:
        arguments: ``--key=value`` with the keys of :data:`OWN` and :data:`PASSED`.

    Returns:
        A table a user, or with ``--format=json`` a line a user.

    Raises:
        UserError: what is asked for cannot be done; see :mod:`recbole_llm.serving`'s parts.
    """
    asked = parse(arguments)
    if asked.build != "false":
        return _build(asked)
    if asked.history is not None:
        return _shown(asked, [(None, _live(asked).recommend_history(asked.history, asked.k))], "live")
    wanted = _wanted(asked)
    if asked.store is not None and (asked.named or TopKStore.exists(asked.store)):
        store = TopKStore.open(asked.store, wanted, asked.k)
        return _shown(asked, [(user, _looked_up(store, user, asked)) for user in asked.users], str(asked.store))
    answers = _live(asked).recommend(asked.users, asked.k)
    return _shown(asked, list(zip(asked.users, answers)), "live")


def _wanted(asked: Asked) -> dict[str, Any]:
    """What the recommendations depend on, of the run as it is now."""
    seen = None
    # What is built anew may stand in the place of a store that cannot be read.
    if asked.store is not None and asked.build != "anew":
        seen = TopKStore.built_for(asked.store).get("weight_files")
    return identity(read_result(asked.run), asked.run, asked.phases, asked.index_file, asked.settings, seen)


def _looked_up(store: TopKStore, user: str, asked: Asked) -> Items:
    found = store.look_up(user, asked.k)
    if found is None:
        from recbole_llm.serving.recommender import unknown

        names = store.users.texts
        raise UserError(unknown("user", user, [names[number] for number in range(len(names))]))
    return found


def _live(asked: Asked) -> Recommender:
    from recbole_llm.serving.recommender import Recommender

    with _told(logging.WARNING):
        return Recommender.of_run(asked.run, asked.phases, asked.index_file, asked.new_items, **asked.settings)


def _build(asked: Asked) -> str:
    from recbole_llm.disk import full_disk_told
    from recbole_llm.serving.build import build_store

    assert asked.store is not None
    wanted = _wanted(asked)
    if asked.build == "true":
        TopKStore.refuse_other(asked.store, wanted, asked.k)
    show = asked.settings.get("show_progress", "true").lower() != "false"
    recommender = _live(asked)
    with _told(logging.INFO if show else logging.WARNING), full_disk_told(asked.store.parent):
        store = build_store(recommender, asked.store, asked.k, asked.shard, asked.build == "anew", show)
    missing = len(store.missing())
    state = f"{missing} of {store.n_blocks} blocks are still to come" if missing else "complete"
    return f"store       {asked.store}\n{store.n_users} users, the best {store.k} items of each; {state}"


@contextlib.contextmanager
def _told(level: int) -> Iterator[None]:
    """Lines of ours from a level on, on stderr."""
    ours, handler = logging.getLogger("recbole_llm"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(level)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)


# --- reading the command line ----------------------------------------------------------------------------------------
def parse(arguments: Sequence[str]) -> Asked:
    """Read the command line.

    Args:
        arguments: see :func:`recommend`.

    Raises:
        UserError: a word that is not understood, or words that do not go together.
    """
    given: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument!r} is not understood; recommend reads --key=value, e.g. --run=DIR --user=ID")
        if key not in OWN + PASSED:
            raise UserError(f"recommend knows no --{key}{did_you_mean(key, OWN + PASSED)} (it has {', '.join(OWN)})")
        if key in given:
            raise UserError(f"--{key} is given twice")
        given[key] = value
    if not given.get("run"):
        raise UserError("--run=DIR is missing: the folder of a finished run")
    asked = Asked(Path(given["run"]))
    asked.build = _one_of(given, "build", ("false", "true", "anew"))
    asked.format = _one_of(given, "format", FORMATS)
    asked.k = _count(given.get("k", "10"), "k")
    asked.shard = _shard(given.get("shard", "0/1"))
    asked.phases = phases_of(given.get("history_phases", ",".join(PHASES)))
    asked.index_file, asked.new_items = (
        Path(given[key]) if key in given else None for key in ("index_file", "new_items")
    )
    asked.settings = {key: given[key] for key in PASSED if key in given}
    asked.named = given.get("store", "off") not in ("off", "")
    if asked.new_items is not None and asked.index_file is None:
        raise UserError("--new_items gives the titles of items that --index_file=F lets in; add it")
    if given.get("store") != "off":
        folder = asked.run if asked.run.suffix != ".json" else asked.run.parent
        asked.store = Path(given["store"]) if asked.named else folder / STORE
    _take_whom(asked, given)
    return asked


def _take_whom(asked: Asked, given: dict[str, str]) -> None:
    whom = [key for key in ("user", "users", "history") if key in given]
    if asked.build != "false":
        if whom:
            raise UserError(f"--build ranks all users; leave --{whom[0]} out, and ask for it once the store is built")
        if asked.store is None:
            raise UserError("--build needs a store: leave --store=off out")
        return
    if "shard" in given:
        raise UserError("--shard divides a build; say --build=true with it")
    if len(whom) != 1:
        raise UserError(
            "whom to recommend to is said by one of --user=ID, --users=FILE (an id a line) and --history=ITEM,ITEM"
        )
    if "history" in given:
        asked.history = _listed(given["history"], "history")
        if asked.named:
            raise UserError("--history is answered live, as a store holds users of the data set; leave --store out")
    elif "users" in given:
        asked.users = _lines(Path(given["users"]))
    else:
        several = "," in given["user"] or given["user"].startswith("[")
        asked.users = _listed(given["user"], "user") if several else [given["user"]]
    if not (asked.users if asked.history is None else asked.history):
        raise UserError(f"--{whom[0]} names no {'item' if whom[0] == 'history' else 'user'}")


def _one_of(given: dict[str, str], key: str, words: Sequence[str]) -> str:
    value = given.get(key, words[0]).lower()
    if value not in words:
        raise UserError(
            f"--{key} should be one of {', '.join(words)}, but is '{given[key]}'{did_you_mean(value, words)}"
        )
    return value


def _count(text: str, key: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise UserError(f"--{key} should be a whole number above 0, but is {text!r}")
    return int(text)


def _shard(text: str) -> tuple[int, int]:
    first, slash, second = text.partition("/")
    numbers = slash and all(part.isascii() and part.isdecimal() for part in (first, second))
    if not numbers or int(first) >= int(second):
        raise UserError(f"--shard should be i/n with i from 0 to n - 1, such as 0/4, but is {text!r}")
    return int(first), int(second)


def _listed(text: str, key: str) -> list[str]:
    """Ids with commas between them, or a JSON list where ids have commas themselves."""
    if not text.startswith("["):
        return [part for part in text.split(",") if part]
    try:
        found = json.loads(text)
    except ValueError:
        return [part for part in text.split(",") if part]
    if not isinstance(found, list) or not all(isinstance(one, str | int) for one in found):
        raise UserError(f'--{key} should be ids with commas between them, or a JSON list such as ["a", "b"]')
    return [str(one) for one in found]


def _lines(path: Path) -> list[str]:
    try:
        found = [line for line in path.read_text(encoding="utf-8-sig").split("\n") if line]
    except OSError as error:
        raise UserError(f"--users: {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--users: {path} is no UTF-8 text") from None
    if not found:
        raise UserError(f"--users: {path} has no ids; it should have one a line")
    return [line.removesuffix("\r") for line in found]


# --- showing ---------------------------------------------------------------------------------------------------------
def _shown(asked: Asked, answers: Sequence[tuple[str | None, Items]], source: str) -> str:
    if asked.format == "json":
        return "\n".join(_as_json(user, items, source) for user, items in answers)
    return "\n\n".join(_as_table(user, items, source) for user, items in answers)


def _as_json(user: str | None, items: Items, source: str) -> str:
    rows = [
        {"rank": rank, "item": item, "title": title or None, "score": score}
        for rank, (item, title, score) in enumerate(items, 1)
    ]
    whole = {"user": user, "items": rows, "source": "live" if source == "live" else "store"}
    # In ASCII: some readers end a line at a title that holds U+2028.
    return json.dumps(whole)


def _as_table(user: str | None, items: Items, source: str) -> str:
    who = "a history" if user is None else f"user {plain_line(user)}"
    rows = [("rank", "item", "title", "score")]
    rows += [
        (str(rank), plain_line(item), plain_line(title), f"{score:.4f}")
        for rank, (item, title, score) in enumerate(items, 1)
    ]
    shown = [place for place in range(4) if place != 2 or any(row[2] for row in rows[1:])]
    widths = {place: max(len(row[place]) for row in rows) for place in shown}
    lines = [
        "  ".join(
            row[place].ljust(widths[place]) if place in (1, 2) else row[place].rjust(widths[place]) for place in shown
        ).rstrip()
        for row in rows
    ]
    answered = "live" if source == "live" else f"store {source}"
    return "\n".join([f"{who} ({answered})", lines[0], "-" * len(lines[0]), *lines[1:]])


def plain_line(text: str) -> str:
    """A text in one line that moves no cursor: control and format characters, and line ends, as a space."""
    return " ".join("".join(" " if unicodedata.category(one) in _UNSEEN else one for one in text).split())


__all__ = ["recommend"]
