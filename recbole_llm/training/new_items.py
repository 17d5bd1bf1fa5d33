"""Tokens for items that came after training: the trained codebook reads them, and nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp

from recbole_llm.atomic import open_atomic
from recbole_llm.data.item_text import load_item_text, read_columns
from recbole_llm.errors import UserError
from recbole_llm.itemid.collisions import place_new
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.new_items import from_neighbours, from_text
from recbole_llm.training.codebooks import Quantiser
from recbole_llm.training.embeddings import text_embeddings
from recbole_llm.training.item_tokens import Tokenized, read_texts
from recbole_llm.training.language import named_backbone, read_item_text
from recbole_llm.training.store import StageStore


@dataclass(frozen=True)
class NewItems:
    """Items with tokens that the data set does not have.

    Attributes:
        raw_ids: of the data set's items (the padding item's first), then of the new ones.
        tokens: of all of them; those of the data set's items are what they were.
        texts: of the new items; empty strings where none was read.
        placed: how many of the new items were placed by their ``interactions`` and by their ``text``.
    """

    raw_ids: list[str]
    tokens: ItemTokens
    texts: list[str]
    placed: dict[str, int]


def tokenize_new_items(
    config: Any, dataset: Any, store: StageStore, made: Tokenized, item_file: Path, inter_file: Path | None
) -> NewItems:
    """Codes for the items of a file that the data set does not have.

    With interactions an item is placed among the items that its users have had in train; without, by its text. All
    tokens exist from the start, so a model that was trained with them can read and name the new items.

    Args:
        config: the run's.
        dataset: the train data set.
        store: the stage cache.
        made: the tokens of the data set's items.
        item_file: atomic file with the new items, in the columns of the data set's own.
        inter_file: atomic file of interactions; those of new items with users of the data set count.

    Returns:
        The tokens of old and new items.

    Raises:
        UserError: no file, no new item in it, or the tokens are raw ids, of which a new item has none.
    """
    known = dataset.field2id_token[dataset.iid_field].tolist()
    listed = read_columns(
        item_file, config["ITEM_ID_FIELD"], (), config["field_separator"], config["encoding"] or "utf-8"
    )
    new = sorted(set(listed) - set(known))
    if not new:
        raise UserError(f"{item_file} has no item that '{config['dataset']}' does not have")
    if made.sources.points is None:
        raise UserError("a new item has no token among raw ids, nor among tokens that were given; make a codebook")
    points, texts, by_interactions = _points(config, dataset, store, made, new, item_file, inter_file)
    quantiser = Quantiser.load(made.stage.folder)
    latent = quantiser.latent(points)
    chosen, _ = quantiser.codebook.encode(latent)
    old = made.tokens.codes
    policy = config["code_collisions"]
    final = place_new(policy, quantiser.codebook, latent, chosen, old[1:].numpy(), np.array(new))
    raw_ids = [*known, *new]
    try:
        tokens = ItemTokens.from_codes(np.concatenate([old.numpy(), final]), made.tokens.level_sizes, raw_ids)
    except ValueError as error:
        raise UserError(f"the extra token has no number left for a new item ({error}); make the tokens anew") from None
    return NewItems(raw_ids, tokens, texts, {"interactions": by_interactions, "text": len(new) - by_interactions})


def _points(
    config: Any, dataset: Any, store: StageStore, made: Tokenized, new: Sequence[str], item_file: Path,
    inter_file: Path | None,
) -> tuple[np.ndarray, list[str], int]:  # fmt: skip
    """Where the new items stand, their texts, and how many were placed by their interactions."""
    sources = made.sources
    assert sources.points is not None
    points = np.zeros((len(new), sources.points.shape[1]), dtype=np.float32)
    placed = np.zeros(len(new), dtype=bool)
    if inter_file is not None and config["code_input"] == "behaviour":
        users = _users_of(config, dataset, new, inter_file)
        histories = dataset.train_histories
        history = sp.csr_matrix(
            (np.ones(len(histories.items)), histories.items, histories.offsets),
            shape=(dataset.user_num, dataset.item_num),
        )
        points = from_neighbours(sources.points, history, users)
        placed = (points != 0).any(axis=1)
    texts = [""] * len(new)
    rest = np.flatnonzero(~placed)
    if len(rest):
        if sources.item_text is None:
            sources.item_text = read_item_text(config, dataset)
            read_texts(config, dataset, store, sources, named_backbone(config))
        assert sources.backbone is not None and sources.texts is not None
        texts = _texts(config, new, item_file)
        made_of = text_embeddings(sources.backbone, texts, config["text_embedding"], config["text_embedding_tokens"])
        if config["code_input"] == "text":
            points[rest] = made_of[rest]
        else:
            both = np.concatenate([sources.texts, made_of])
            points[rest] = from_text(
                np.concatenate([sources.points, points]), both, np.append(sources.seen, np.zeros(len(new), dtype=bool)),
                len(sources.texts) + rest,
            )  # fmt: skip
    return points, texts, int(placed.sum())


def _users_of(config: Any, dataset: Any, new: Sequence[str], inter_file: Path) -> sp.csr_matrix:
    """Who had each new item: ``[n_new, n_users]``, a row of a user the data set does not know left out."""
    file = open_atomic(inter_file, config["field_separator"], config["encoding"] or "utf-8")
    columns = [config["USER_ID_FIELD"], config["ITEM_ID_FIELD"]]
    missing = [column for column in columns if column not in file.names]
    if missing:
        raise UserError(f"{inter_file} has no column '{missing[0]}' (it has {', '.join(file.names)})")
    frame = file.frame(columns)
    item_of = {raw: row for row, raw in enumerate(new)}
    user_of = dataset.field2token_id[dataset.uid_field]
    frame = frame[frame[columns[1]].isin(item_of) & frame[columns[0]].isin(user_of)].drop_duplicates()
    rows, users = frame[columns[1]].map(item_of).to_numpy(), frame[columns[0]].map(user_of).to_numpy()
    ones = np.ones(len(frame))
    return sp.csr_matrix((ones, (rows.astype(np.int64), users.astype(np.int64))), shape=(len(new), dataset.user_num))


def _texts(config: Any, new: Sequence[str], item_file: Path) -> list[str]:
    made = load_item_text(
        item_file, id_field=config["ITEM_ID_FIELD"], template=config["item_text"],
        fallback=config["item_text_fallback"], id_tokens=["", *new], max_words=config["item_text_max_words"],
        separator=config["field_separator"], encoding=config["encoding"] or "utf-8",
    )  # fmt: skip
    return list(made.texts[1:])
