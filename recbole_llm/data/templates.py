"""The wording of tasks: templates of questions and answers, read from a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.schema import properties_dir, read_yaml
from recbole_llm.tasks.base import HISTORY, ITEM_PLACES, TARGET, TITLES, USER, Task, known_tasks
from recbole_llm.tasks.behaviour import SEQUENTIAL

PLACE = re.compile(r"\{(\w+)\}")
# What an item of a history is shown as, of models that show more of it than its tokens.
SHOWN_PLACES = ("title", "vector")
INSTRUCTION, INFERENCE, DOMAIN = "instruction", "inference", "domain"


class Wording(NamedTuple):
    """A template of a question and of what answers it; the question that is only asked has an empty answer."""

    ask: str
    answer: str

    @property
    def places(self) -> list[str]:
        """What the two name."""
        return PLACE.findall(self.ask) + PLACE.findall(self.answer)


@dataclass(frozen=True)
class Templates:
    """The wording of tasks.

    Attributes:
        wrapper: around every instruction.
        separator: between two items of a history.
        title_separator: between two titles of one.
        tasks: the templates of each task, that of inference among them.
        shown: an item of a history: the text before its title, between that and its vector, and behind; ``None`` where
            the file says nothing of it.
    """

    wrapper: str
    separator: str
    title_separator: str
    tasks: dict[str, tuple[Wording, ...]]
    shown: tuple[str, str, str] | None = None

    def instructions(self, task: str, given: Collection[str], only_first: bool = False) -> list[Wording]:
        """The whole prompts of a task, with their places.

        Args:
            task: one of :attr:`tasks`.
            given: texts that there are; a template that needs another is left out.
            only_first: the first of them alone.

        Raises:
            UserError: nothing is left.
        """
        there = {*ITEM_PLACES, *given} if "title" in given else {*ITEM_PLACES, *given} - {TITLES}
        usable = [wording for wording in self.tasks[task] if set(wording.places) <= there]
        if not usable:
            raise UserError(f"prompts: no template of the task {task} does with {', '.join(given) or 'no text'}")
        wrapped = [wording._replace(ask=self.wrapper.replace("{instruction}", wording.ask)) for wording in usable]
        return wrapped[:1] if only_first else wrapped

    def whole(self) -> list[str]:
        """The questions of all tasks in their wrapper, each once, with their places."""
        asked = dict.fromkeys(wording.ask for wordings in self.tasks.values() for wording in wordings)
        return [self.wrapper.replace("{instruction}", text) for text in asked]


def templates_of(config: Any, tasks: Sequence[type[Task]] | None = None) -> Templates:
    """The templates that a run asks for.

    Args:
        config: ``prompts``, ``None`` for prompts without words; and of models that have them ``user_tokens``, which of
            prompts without words puts the user first, ``domain``, which stands for ``{domain}`` in a template, and
            ``official_prompt``, which takes the file's counterpart that ends in ``-official``.
        tasks: see :func:`read_templates`.

    Raises:
        UserError: see :func:`read_templates`.
    """
    if config["prompts"] is None:
        return _without_words(list(known_tasks().values()) if tasks is None else tasks, bool(config["user_tokens"]))
    official = "official_prompt" in config and config["official_prompt"]
    name = f"{config['prompts']}-official" if official else config["prompts"]
    return read_templates(name, tasks, {DOMAIN: config[DOMAIN]} if DOMAIN in config else {})


def _without_words(tasks: Sequence[type[Task]], user: bool) -> Templates:
    """Prompts that are the history and nothing else, or the user and the history.

    Raises:
        UserError: another task than the sequential one is asked for, which would look the same.
    """
    others = [task.name for task in tasks if task.name != SEQUENTIAL]
    if others:
        raise UserError(
            f"prompts: ~ has no words that tell the task {others[0]} from {SEQUENTIAL}; set tasks: [{SEQUENTIAL}], or "
            "name a file of prompts"
        )
    asked = f"{{{USER}}}{{{HISTORY}}}" if user else f"{{{HISTORY}}}"
    found: dict[str, tuple[Wording, ...]] = {
        INFERENCE: (Wording(asked, ""),),
        SEQUENTIAL: (Wording(asked, f"{{{TARGET}}}"),),
    }
    return Templates(f"{{{INSTRUCTION}}}", "", "", found)


def read_templates(
    name: str, tasks: Sequence[type[Task]] | None = None, words: Mapping[str, str] | None = None
) -> Templates:
    """Templates from a file of ``properties/prompts`` or a file of the user's.

    Args:
        name: the shipped file's name without its ending, or a path that ends in ``.yaml``.
        tasks: those whose wording is wanted; all that the file has if ``None``.
        words: what stands for further places, the same in every prompt.

    Raises:
        UserError: there is no such file, a task is missing, or a template names a place that its task does not have.
    """
    file = file_of(name)
    if not file.is_file():
        known = [path.stem for path in (properties_dir() / "prompts").glob("*.yaml")]
        raise UserError(
            f"prompts: there is no '{name}'{did_you_mean(name, known)} ({', '.join(known)} or a .yaml file)"
        )
    values = {key: _with_words(value, words or {}) for key, value in read_yaml(file).items()}
    tasks = [task for task in known_tasks().values() if task.name in values] if tasks is None else tasks
    for key in ("wrapper", "separator", INFERENCE, *(task.name for task in tasks)):
        if key not in values:
            raise UserError(f"{file} says nothing for '{key}'{did_you_mean(key, values)}")
    for key in ("wrapper", "separator", "title_separator", INFERENCE):
        if not isinstance(values.get(key, ""), str):
            raise UserError(f"{file}, {key}: {values[key]!r} should be a text")
    _check(file, "wrapper", values["wrapper"], (INSTRUCTION,))
    _check(file, INFERENCE, values[INFERENCE], (HISTORY, USER))
    found: dict[str, tuple[Wording, ...]] = {INFERENCE: (Wording(values[INFERENCE], ""),)}
    for task in tasks:
        entries = values[task.name] if isinstance(values[task.name], list) else [values[task.name]]
        found[task.name] = tuple(_wording(file, task, entry) for entry in entries)
    separator = values["separator"]
    titles = values.get("title_separator", separator)
    return Templates(values["wrapper"], separator, titles, found, _shown(file, values.get("shown")))


def file_of(name: str) -> Path:
    """Where templates stand: a file of ``properties/prompts``, or the path itself; see :func:`read_templates`."""
    return Path(name) if name.endswith(".yaml") else properties_dir() / "prompts" / f"{name}.yaml"


def _shown(file: Path, text: Any) -> tuple[str, str, str] | None:
    if text is None:
        return None
    if not isinstance(text, str) or PLACE.findall(text) != [*SHOWN_PLACES]:
        wanted = ", then ".join(f"{{{place}}}" for place in SHOWN_PLACES)
        raise UserError(f"{file}, shown: {text!r} should be a text that names {wanted}, and no other place")
    before, _, between, _, behind = PLACE.split(text)
    return before, between, behind


def _with_words(value: Any, words: Mapping[str, str]) -> Any:
    """A text, or all texts in lists and mappings, with words for places."""
    if isinstance(value, str):
        return PLACE.sub(lambda place: words.get(place[1], place[0]), value)
    if isinstance(value, list):
        return [_with_words(one, words) for one in value]
    return {key: _with_words(one, words) for key, one in value.items()} if isinstance(value, dict) else value


def _wording(file: Path, task: type[Task], entry: Any) -> Wording:
    """A template as it stands in a file: the question alone, or ``{ask: ..., answer: ...}``."""
    given = entry if isinstance(entry, dict) else {"ask": entry, "answer": task.answer}
    if set(given) != {"ask", "answer"} or not all(isinstance(text, str) for text in given.values()):
        raise UserError(f"{file}, {task.name}: {entry!r} should be a text, or have 'ask' and 'answer'")
    made = Wording(given["ask"], given["answer"])
    _check(file, task.name, made.ask, task.places)
    _check(file, task.name, made.answer, task.answers)
    return made


def _check(file: Path, key: str, text: str, places: Sequence[str]) -> None:
    named = PLACE.findall(text)
    wrong = [place for place in named if place not in places]
    if wrong or not named or len(set(named)) < len(named):
        wanted = ", ".join(f"{{{place}}}" for place in places)
        raise UserError(f"{file}, {key}: {text!r} should name {wanted} once at most, and no other place")
