"""The stage that gives every item the tokens of its title."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.item_text import parse_template
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.training.item_tokens import Sources, Tokenized, tokenize_items, write_tokens
from recbole_llm.training.language import named_backbone, read_item_text, take_backbone
from recbole_llm.training.store import StageStore, fingerprint_of

logger = logging.getLogger("recbole_llm")

# Raised when the code of the stage changes what it makes.
TITLES_VERSION = 2


def tokenize(
    config: Any, dataset: Any, store: StageStore, fit_part: Callable[..., Any], named: Backbone | None = None
) -> Tokenized:
    """Run (or find) every stage up to the items' tokens, of whatever kind the model reads.

    Args:
        config: the run's; its model class may say ``item_kind``.
        dataset: the train data set.
        store: the stage cache.
        fit_part: trains the recommender that a config key names and returns its fit.
        named: the language model that ``llm`` names, where it is loaded already.

    Raises:
        UserError: see :func:`tokenize_titles` and :func:`~recbole_llm.training.item_tokens.tokenize_items`.
    """
    if getattr(config.model_class, "item_kind", "codes") == "titles":
        return tokenize_titles(config, dataset, store, named)
    return tokenize_items(config, dataset, store, fit_part, named)


def tokenize_titles(config: Any, dataset: Any, store: StageStore, named: Backbone | None = None) -> Tokenized:
    """Give every item its title's tokens and the language model's end token.

    Items of equal titles have equal tokens; how many there are is told.

    Args:
        config: the run's: ``item_title``, ``title_tokens`` and ``long_titles``.
        dataset: the train data set.
        store: the stage cache.
        named: the language model that ``llm`` names, where it is loaded already.

    Raises:
        UserError: the data has no titles, a title is longer than ``title_tokens`` and ``long_titles`` is ``refuse``, or
            the language model has no token for a title.
    """
    text = read_item_text(config, dataset)
    template = "{" + parse_template(config["item_text"]).columns[0] + "}"
    titles = [title.strip() for title in read_item_text(config, dataset, "item_title", template).texts]
    raw_ids = dataset.field2id_token[dataset.iid_field].tolist()
    named = named or named_backbone(config)
    backbone, mark, lines = take_backbone(config, dataset, text, store, named)
    limit, cut = config["title_tokens"], config["long_titles"] == "truncate"
    sequences = [[], *backbone.encode_batch(titles[1:])]
    _check(sequences, titles, raw_ids, limit, cut)
    inputs = {
        "titles": fingerprint_of(titles), "tokenizer": backbone.tokenizer_fingerprint(), "end": backbone.eos_id,
        "limit": limit if cut else None, "items": raw_ids,
    }  # fmt: skip

    def make(folder: Path) -> dict[str, Any]:
        tokens = ItemTokens.from_sequences([one[:limit] for one in sequences], backbone.eos_id, raw_ids)
        write_tokens(tokens, raw_ids, folder)
        return {"method": "titles", "vocabulary": tokens.size, "tokens": 0}

    stage = store.run("item_tokens", TITLES_VERSION, inputs, make)
    tokens = ItemTokens.load(stage.folder, raw_ids)
    if shared := sum(map(len, tokens.groups())):
        logger.info(
            "item tokens: %d of %d items share their title with another, and so their scores", shared, len(raw_ids) - 1
        )
    seen = dataset.train_histories.seen(dataset.item_num)
    sources = Sources(seen, lines=lines, item_text=text, backbone=backbone, backbone_mark=mark)
    return Tokenized(tokens, stage, sources)


def _check(
    sequences: Sequence[Sequence[int]], titles: Sequence[str], raw_ids: Sequence[str], limit: int, cut: bool
) -> None:
    lengths = np.fromiter(map(len, sequences), dtype=np.int64)
    if len(lengths) > 1 and not lengths[1:].all():
        item = 1 + int(lengths[1:].argmin())
        raise UserError(
            f"the title of item '{raw_ids[item]}', {titles[item]!r}, has no token of the language model; give it "
            "another by item_title"
        )
    longest, long = int(lengths.argmax()), int((lengths > limit).sum())
    if long and not cut:
        raise UserError(
            f"the title of item '{raw_ids[longest]}' has {lengths[longest]} tokens, above title_tokens {limit} (as "
            f"{long} titles are); set title_tokens: {lengths[longest]} or long_titles: truncate"
        )
    if long:
        logger.info("item tokens: %d titles are longer than %d tokens and cut (long_titles)", long, limit)
