"""Profiles of items and users, made from train rows: by the language model, or from templates of texts.

Source: RLMRec (Ren et al., WWW 2024, arXiv 2310.15950): items first, then users from the profiles of a sample of the
items that they had, and from what they wrote about them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.generation import DONE, answer_prompts
from recbole_llm.backbone.load import load_with_head
from recbole_llm.data.histories import Histories
from recbole_llm.data.item_text import ItemText, first_words
from recbole_llm.data.keywords import profile_keywords
from recbole_llm.data.profiles import ProfileWording, Reviews, items_of_users, profile_of, profile_source
from recbole_llm.errors import UserError
from recbole_llm.training.language import backbone_options
from recbole_llm.training.store import Stage, StageStore, fingerprint_of
from recbole_llm.training.task_texts import reviews_in_train

# Raised when the code here changes what the stages make.
PROFILES_VERSION = 2
ITEMS, USERS = "item_profiles", "user_profiles"


@dataclass
class Profiles:
    """Profiles by internal id; an empty one where nothing is known.

    Attributes:
        items: the padding item's first.
        users: the padding user's first.
        stages: that they were made in.
    """

    items: list[str] = field(default_factory=list)
    users: list[str] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)


def make_profiles(
    config: Any,
    dataset: Any,
    wording: ProfileWording,
    item_text: ItemText,
    store: StageStore,
    backbone: Backbone | None,
    mark: str,
) -> Profiles:
    """Make (or find) the profiles of all items, and from them those of all users.

    Args:
        config: the run's; the keys ``profile_...`` and ``review_column``.
        dataset: the train data set.
        wording: what the language model is asked, and profiles of templates.
        item_text: the items' texts.
        store: the stage cache.
        backbone: the language model that writes.
        mark: what it is, for the stages' fingerprints.

    Raises:
        UserError: a prompt is too long for the language model.
    """
    histories = dataset.train_histories
    own = [text if named else "" for text, named in zip(item_text.texts, item_text.named, strict=True)]
    reviews = _reviews(config, dataset)
    writer = _Writer(config, wording, store, backbone, mark)
    said = _reviews_of_items(config, wording, histories, reviews, len(own))
    made = Profiles()
    made.items = writer.profiles(
        made, ITEMS, "item", [dict(text=text, reviews=about) for text, about in zip(own, said, strict=True)],
        "the language model writes each item's profile",
    )  # fmt: skip
    shown = _shown_items(config, wording, histories, reviews, made.items)
    made.users = writer.profiles(
        made, USERS, "user", [dict(items=items) for items in shown], "the language model writes each user's profile",
        more={"keywords": config["profile_keywords"], "texts": fingerprint_of(own), "rows": _mark_of(histories)},
        keywords=lambda: _keywords(config, wording, own, histories),
    )  # fmt: skip
    return made


class _Writer:
    """Turns what is known of each row into its profile, one stage a kind of row."""

    def __init__(
        self, config: Any, wording: ProfileWording, store: StageStore, backbone: Backbone | None, mark: str
    ) -> None:
        self.config, self.wording, self.store, self.backbone, self.mark = config, wording, store, backbone, mark
        self.generated = profile_source(config) == "generated"

    def profiles(
        self,
        made: Profiles,
        stage_name: str,
        template: str,
        known: list[dict[str, str]],
        what: str,
        more: dict[str, Any] | None = None,
        keywords: Callable[[], list[str]] | None = None,
    ) -> list[str]:
        """The rows' profiles; an empty one for a row of which nothing is known.

        Args:
            made: gets the stage.
            stage_name: of the stage.
            template: ``item`` or ``user``.
            known: what the template's places say, row by row.
            what: the progress bar's words.
            more: what the keywords are made of, for the fingerprint.
            keywords: makes them.
        """
        asked = self._asked(template, known) if self.generated else []
        standing = f"{template}_template"
        # What stands in for an answer is needed where the language model has none, too.
        inputs: dict[str, Any] = {
            "known": fingerprint_of(known),
            "template": [self.wording.source[standing], self.wording.separator],
            "keywords": more,
        }
        if self.generated:
            inputs |= {
                "asked": fingerprint_of(asked),
                "backbone": self.mark,
                "words": self.config["profile_words"],
                "new_tokens": self.config["profile_new_tokens"],
                "batch_size": self.config["profile_batch_size"],
            }

        def make(folder: Path) -> dict[str, Any]:
            words = keywords() if keywords else [""] * len(known)
            texts = [
                self.wording.render(standing, **row, **({"keywords": word} if keywords else {})).strip()
                if any(row.values())
                else ""
                for row, word in zip(known, words, strict=True)
            ]
            facts: dict[str, Any] = {"rows": sum(map(bool, texts))}
            if self.generated:
                written = self._written(asked, folder, what)
                # Many were read, and nobody has counted them: unknown, not none.
                facts |= {"empty": sum(bool(text) and not one for text, one in zip(texts, written)), "tokens": None}
                texts = [one or text for one, text in zip(written, texts, strict=True)]
            (folder / f"{stage_name}.json").write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")
            return facts

        stage = self.store.run(stage_name, PROFILES_VERSION, inputs, make)
        made.stages.append(stage)
        found: list[str] = json.loads((stage.folder / f"{stage_name}.json").read_text(encoding="utf-8"))
        return found

    def _asked(self, template: str, known: list[dict[str, str]]) -> list[str]:
        """The questions, refused if one leaves the language model no room to answer."""
        words = str(self.config["profile_words"])
        asked = [self.wording.render(template, **row, words=words) if any(row.values()) else "" for row in known]
        assert self.backbone is not None
        room = getattr(self.backbone.decoder.config, "max_position_embeddings", None)
        longest = max(map(len, self._ids(asked)), default=0) + self.config["profile_new_tokens"]
        if room is not None and longest > room:
            raise UserError(
                f"the prompts that have the language model write profiles take up to {longest} tokens, it has {room}; "
                "lower profile_items, profile_text_words, profile_reviews or profile_new_tokens, or set "
                "profiles: template"
            )
        return asked

    def _ids(self, asked: Sequence[str]) -> list[list[int]]:
        assert self.backbone is not None
        opening = [] if self.backbone.bos_id is None else [self.backbone.bos_id]
        return [opening + ids if ids else [] for ids in self.backbone.encode_batch(list(asked))]

    def _written(self, asked: list[str], folder: Path, what: str) -> list[str]:
        assert self.backbone is not None
        answers = answer_prompts(
            load_with_head(self.backbone.name, **backbone_options(self.config)),
            self.backbone,
            self._ids(asked),
            new_tokens=self.config["profile_new_tokens"],
            batch_size=self.config["profile_batch_size"],
            folder=folder,
            what=what,
        )
        (folder / DONE).unlink()
        return [profile_of(answer, self.config["profile_words"]) for answer in answers]


def _reviews(config: Any, dataset: Any) -> Reviews | None:
    column = config["review_column"]
    found = reviews_in_train(config, dataset, column, "profiles", "review_column") if column else None
    return None if found is None else Reviews(found[0], found[1].numpy())


def _reviews_of_items(
    config: Any, wording: ProfileWording, histories: Histories, reviews: Reviews | None, n_items: int
) -> list[str]:
    if reviews is None:
        return [""] * n_items
    of_items = reviews.of_items(histories, n_items, config["profile_reviews"], config["profile_seed"])
    return [
        wording.separator.join(first_words(text, config["profile_text_words"]) for text in said) for said in of_items
    ]


def _shown_items(
    config: Any, wording: ProfileWording, histories: Histories, reviews: Reviews | None, profiles: list[str]
) -> list[str]:
    """Each user's sample of train items as a text, each item by its profile and what the user wrote about it."""
    pairs = reviews.by_pair(histories) if reviews else {}
    count, words = config["profile_items"], config["profile_text_words"]
    short = [first_words(text, words) for text in profiles]
    samples = items_of_users(histories, list(map(bool, profiles)), count, config["profile_seed"])
    return [
        wording.separator.join(
            wording.render("shown", text=short[item], review=first_words(pairs.get((user, item), ""), words))
            for item in items
        )
        for user, items in enumerate(samples)
    ]


def _keywords(config: Any, wording: ProfileWording, texts: list[str], histories: Histories) -> list[str]:
    count = config["profile_keywords"]
    if not count:
        return [""] * (len(histories.offsets) - 1)
    return [words.replace(", ", wording.separator) for words in profile_keywords(texts, histories, count)]


def _mark_of(histories: Histories) -> str:
    digest = hashlib.sha256(histories.offsets.astype("<i8").tobytes())
    digest.update(histories.items.astype("<i8").tobytes())
    return digest.hexdigest()
