"""What is said of items and users in words: how it is asked for, what stands in for an answer, and of which items.

Source: RLMRec (Ren et al., WWW 2024, arXiv 2310.15950), section on the generation of user and item profiles.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.data.histories import Histories
from recbole_llm.data.item_text import Template, first_words, parse_template
from recbole_llm.data.templates import file_of
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.schema import load_yaml

# What each template may name.
PLACES = {
    "shown": ("text", "review"),
    "item": ("text", "reviews", "words"),
    "user": ("items", "words"),
    "item_template": ("text", "reviews"),
    "user_template": ("items", "keywords"),
}
# An answer in JSON may be cut off before its end; one that goes on where the question opened it has no key.
SUMMARY = re.compile(r'"summarization"\s*:\s*"((?:[^"\\]|\\.)*)', re.DOTALL)
OPENED = re.compile(r'^((?:[^"\\]|\\.)*)"\s*[,}]', re.DOTALL)


def profile_source(config: Any) -> str:
    """``generated`` or ``template``: ``auto`` has any language model write but the embedded one."""
    if config["profiles"] != "auto":
        return str(config["profiles"])
    return "template" if config["llm"] == "embedded" else "generated"


@dataclass(frozen=True)
class ProfileWording:
    """How profiles are asked for and made.

    Attributes:
        separator: between items, reviews and keywords.
        templates: by the names of :data:`PLACES`.
        source: the same as they stand in the file, for a fingerprint.
    """

    separator: str
    templates: Mapping[str, Template]
    source: Mapping[str, str]

    def render(self, name: str, **texts: str) -> str:
        """A template with its places filled."""
        return self.templates[name].render(texts)


def read_wording(name: str) -> ProfileWording:
    """The wording of a file of ``properties/prompts``, or of a file of the user's.

    Args:
        name: the shipped file's name without its ending, or a path that ends in ``.yaml``.

    Raises:
        UserError: there is no such file, or it lacks a text, or has one that names a place that is not there.
    """
    file = file_of(name)
    if not file.is_file():
        raise UserError(f"profile_prompts: there is no '{name}' (rlmrec, or a .yaml file)")
    values = load_yaml(file)
    for key in ("separator", *PLACES):
        if key not in values:
            raise UserError(f"{file} says nothing for '{key}'{did_you_mean(key, values)}")
        if not isinstance(values[key], str):
            raise UserError(f"{file}, {key}: {values[key]!r} should be a text")
    templates = {}
    for key, places in PLACES.items():
        templates[key] = parse_template(values[key], f"{file}, {key}:")
        wrong = [column for column in templates[key].columns if column not in places]
        if wrong or not templates[key].columns:
            wanted = ", ".join(f"{{{place}}}" for place in places)
            raise UserError(f"{file}, {key}: {values[key]!r} should name some of {wanted}, and no other place")
    return ProfileWording(values["separator"], templates, {key: values[key] for key in ("separator", *PLACES)})


def profile_of(answer: str, words: int) -> str:
    """The profile in a language model's answer: its ``summarization`` where it is JSON, else all of it.

    Args:
        answer: what it wrote; also one that is cut off, or goes on with the text that the question opened.
        words: kept at most.

    Returns:
        One line; empty where the answer has no letter or digit.
    """
    found = SUMMARY.search(answer) or OPENED.search(answer)
    text = answer
    if found:
        try:
            text = str(json.loads(f'"{found[1]}"', strict=False))
        except ValueError:
            # Cut off within an escape, or with one that JSON does not have.
            text = found[1].replace("\\", " ")
    line = first_words(" ".join(text.split()), words)
    return line if any(map(str.isalnum, line)) else ""


@dataclass(frozen=True)
class Reviews:
    """What users wrote in train rows.

    Attributes:
        texts: not empty.
        places: int64, of each text's row among the train histories' items.
    """

    texts: Sequence[str]
    places: np.ndarray

    def of_items(self, histories: Histories, n_items: int, count: int, seed: int) -> list[list[str]]:
        """By internal item id, a sample of at most ``count`` reviews, in their order."""
        found: list[list[str]] = [[] for _ in range(n_items)]
        for text, item in zip(self.texts, histories.items[self.places].tolist(), strict=True):
            found[item].append(text)
        return [sampled(texts, count, seed, item) for item, texts in enumerate(found)]

    def by_pair(self, histories: Histories) -> dict[tuple[int, int], str]:
        """By internal user and item id."""
        users, items = histories.owners(self.places).tolist(), histories.items[self.places].tolist()
        return dict(zip(zip(users, items, strict=True), self.texts, strict=True))


def sampled(values: Sequence, count: int, seed: int, number: int) -> list:
    """At most ``count`` of the values, in their order; drawn by the seed and a number, whatever else is drawn."""
    if len(values) <= count:
        return list(values)
    kept = np.random.default_rng([seed, number]).choice(len(values), count, replace=False)
    return [values[place] for place in np.sort(kept)]


def items_of_users(histories: Histories, told: Sequence[bool], count: int, seed: int) -> list[list[int]]:
    """By internal user id, a sample of the user's distinct train items that something is told of, oldest first.

    Args:
        histories: the train rows.
        told: by internal item id.
        count: items a user, at most.
        seed: of the sample.
    """
    found = []
    for user, (first, end) in enumerate(zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist())):
        own = [item for item in dict.fromkeys(histories.items[first:end].tolist()) if told[item]]
        found.append(sampled(own, count, seed, user))
    return found
