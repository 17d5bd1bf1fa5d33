"""What a prompt says about a user in words: profile tags and predicted interests, from train rows only.

Source: GLTA (WWW 2025 Companion, arXiv 2502.18757), figure "generation": templates (c) and (d).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.generation import DONE, answer_prompts, tags_of
from recbole_llm.data import prompts
from recbole_llm.data.keywords import prediction_keywords, profile_keywords
from recbole_llm.errors import UserError
from recbole_llm.training.store import Stage, StageStore, fingerprint_of

# Raised when the code here changes what the stage makes.
USER_TEXT_VERSION = 2
TEXTS = "user_text.json"

Texts = tuple[list[str] | None, list[str] | None]


def text_source(config: Any) -> str:
    """``llm``, ``keywords`` or ``none``: ``auto`` has any language model write but the embedded one."""
    if config["text_source"] != "auto":
        return str(config["text_source"])
    return "keywords" if config["llm"] == "embedded" else "llm"


def keyword_texts(
    config: Any, dataset: Any, texts: list[str], user_embeddings: np.ndarray, item_embeddings: np.ndarray
) -> Texts:
    """Profile tags and predicted interests of every user by TF-IDF; ``None`` leaves a prompt's line out."""
    histories = dataset.train_histories
    profiles = profile_keywords(texts, histories, config["profile_words"]) if config["profile_words"] else None
    predictions = None
    if config["prediction_words"]:
        predictions = prediction_keywords(
            texts,
            histories,
            user_embeddings,
            item_embeddings,
            config["prediction_words"],
            config["prediction_neighbours"],
        )
    return profiles, predictions


def generated_texts(
    config: Any,
    dataset: Any,
    texts: list[str],
    backbone: Backbone,
    mark: str,
    with_head: Callable[[], Any],
    store: StageStore,
) -> tuple[Texts, Stage]:
    """The same, written by the backbone itself; a stage of its own, as a large model takes hours for it.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
        texts: descriptions by internal item id.
        backbone: the frozen language model.
        mark: what the backbone is, for the stage's fingerprint.
        with_head: loads it with its vocabulary head.
        store: the stage cache.
    """
    asked = {
        "profile": (prompts.profile_prompt, config["profile_words"]),
        "prediction": (prompts.prediction_prompt, config["prediction_words"]),
    }
    ids = {
        name: _prompt_ids(config, dataset, texts, backbone, template([""], words))
        for name, (template, words) in asked.items()
        if words
    }
    inputs = {
        "prompts": fingerprint_of(ids),
        "backbone": mark,
        "words": {name: words for name, (_, words) in asked.items()},
        "new_tokens": config["text_new_tokens"],
        "batch_size": config["text_batch_size"],
    }

    def make(folder: Path) -> dict[str, Any]:
        model = with_head()
        made = {}
        for name, rows in ids.items():
            work = folder / name
            work.mkdir(exist_ok=True)
            answers = answer_prompts(
                model, backbone, rows, new_tokens=config["text_new_tokens"], batch_size=config["text_batch_size"],
                folder=work, what=f"the language model writes each user's {name}",
            )  # fmt: skip
            made[name] = [tags_of(answer, asked[name][1]) for answer in answers]
        (folder / TEXTS).write_text(json.dumps(made, ensure_ascii=False), encoding="utf-8")
        for name in ids:
            (folder / name / DONE).unlink()
            (folder / name).rmdir()
        told = {f"{name}_empty": sum(not text for text in rows[1:]) for name, rows in made.items()}
        # Many were read, and nobody has counted them: unknown, not none.
        return {**told, "users": len(dataset.train_histories.offsets) - 2, "tokens": None}

    stage = store.run("user_text", USER_TEXT_VERSION, inputs, make)
    made = json.loads((stage.folder / TEXTS).read_text(encoding="utf-8"))
    return (made.get("profile"), made.get("prediction")), stage


def _prompt_ids(config: Any, dataset: Any, texts: list[str], backbone: Backbone, head: str) -> list[list[int]]:
    """Template (c) or (d) for every user: descriptions of the latest train items, each cut to some tokens."""
    histories = dataset.train_histories
    opening = ([] if backbone.bos_id is None else [backbone.bos_id]) + backbone.encode(head)
    separator, cue = backbone.encode(prompts.SEPARATOR), backbone.encode(config["text_cue"])
    cut = config["alignment_description_tokens"]
    described = [ids[:cut] for ids in backbone.encode_batch(texts)]
    room = getattr(backbone.decoder.config, "max_position_embeddings", None)
    rows: list[list[int]] = []
    for first, end in zip(histories.offsets[:-1].tolist(), histories.offsets[1:].tolist(), strict=True):
        # Distinct items, the latest ones: what a person's interests are now.
        latest = list(dict.fromkeys(reversed(histories.items[first:end].tolist())))[: config["text_descriptions"]]
        shown = [described[item] for item in reversed(latest)]
        body = [token for number, ids in enumerate(shown) for token in ([*separator, *ids] if number else ids)]
        rows.append([*opening, *body, *cue] if shown else [])
    longest = max(map(len, rows)) + config["text_new_tokens"]
    if room is not None and longest > room:
        raise UserError(
            f"the prompts that have the language model write tags take up to {longest} tokens, it has {room}; lower "
            "text_descriptions, text_new_tokens or alignment_description_tokens, or set text_source: keywords"
        )
    return rows
