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
from recbole_llm.itemid.collisions import check_room, place_new
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.new_items import from_neighbours, from_text
from recbole_llm.training.codebooks import Quantiser, check_settings
from recbole_llm.training.embeddings import text_embeddings
from recbole_llm.training.item_tokens import Tokenized, has_codebook, read_texts
from recbole_llm.training.language import named_reader, read_item_text
from recbole_llm.training.store import StageStore


@dataclass(frozen=True)
class Arrivals:
    """Items that the data set does not have, as their files tell of them.

    Attributes:
        raw_ids: sorted, so that no tokens hang on the order of a file.
        users: who had each, ``[n_new, n_users]``; a row of a user that the data set does not know is left out.
        placed: bool ``[n_new]``, whose users have train interactions to place them by.
        texts: of each; empty strings where all are placed by their interactions.
    """

    raw_ids: list[str]
    users: sp.csr_matrix
    placed: np.ndarray
    texts: list[str]


@dataclass(frozen=True)
class NewItems:
    """Items with tokens that the data set does not have.

    Attributes:
        raw_ids: of the data set's items (the padding item's first), then of the new ones.
        tokens: of all of them; those of the data set's items are what they were.
    """

    raw_ids: list[str]
    tokens: ItemTokens


def read_new_items(config: Any, dataset: Any, item_file: Path, inter_file: Path | None) -> Arrivals:
    """Read the items of a file that the data set does not have, before anything is trained for them.

    Args:
        config: the run's.
        dataset: the train data set.
        item_file: atomic file with the new items, in the columns of the data set's own.
        inter_file: atomic file of interactions; those of new items with users of the data set count.

    Raises:
        UserError: no file or column, no new item, no text where one is needed, the language model that reads texts is
            not kept by the run that this one goes on from, or the tokens are raw ids, of which a new item has none.
    """
    if not has_codebook(config):
        raise UserError("a new item has no token among raw ids or numbers, nor among given tokens; make a codebook")
    if config["code_shuffle"]:
        raise UserError("code_shuffle is a control, whose codes say nothing of an item: none are there for a new one")
    check_settings(config, projected=config["unseen_items"] == "projection")
    listed = read_columns(
        item_file, config["ITEM_ID_FIELD"], (), config["field_separator"], config["encoding"] or "utf-8"
    )
    new = sorted(set(listed) - set(dataset.field2id_token[dataset.iid_field].tolist()))
    if not new:
        raise UserError(f"{item_file} has no item that '{config['dataset']}' does not have")
    room = dataset.item_num - 1 + len(new), config["code_size"], config["code_levels"]
    check_room(config["code_collisions"], *room)
    users = sp.csr_matrix((len(new), dataset.user_num))
    if inter_file is not None and config["code_input"] == "behaviour":
        users = _users_of(config, dataset, new, inter_file)
    placed = users @ dataset.train_histories.lengths > 0
    if placed.all():
        return Arrivals(new, users, placed, [""] * len(new))
    if config["continue_from"] is not None and config["text_llm"]:
        raise UserError(
            f"{int((~placed).sum())} new items of {item_file} are placed by their text, and text_llm: "
            f"{config['text_llm']}, which read the texts of the others, is not kept by {config['continue_from']} "
            "(continue_from); leave continue_from out"
        )
    read_item_text(config, dataset)
    return Arrivals(new, users, placed, _texts(config, new, item_file))


def tokenize_new_items(config: Any, dataset: Any, store: StageStore, made: Tokenized, arrivals: Arrivals) -> NewItems:
    """Codes for items that the data set does not have.

    With interactions an item is placed among the items that its users have had in train; without, by its text. All
    tokens exist from the start, so a model that was trained with them can read and name the new items.

    Args:
        config: the run's.
        dataset: the train data set.
        store: the stage cache.
        made: the tokens of the data set's items.
        arrivals: the new items.

    Returns:
        The tokens of old and new items.

    Raises:
        UserError: no codes are left for a new item.
    """
    quantiser = Quantiser.load(made.stage.folder)
    points, texts = _points(config, dataset, store, made, arrivals)
    rest = ~arrivals.placed
    old = made.tokens.codes.numpy()
    final = codes_of_new(config, quantiser, points, rest, texts[rest], old[1:], arrivals.raw_ids)
    raw_ids = [*dataset.field2id_token[dataset.iid_field].tolist(), *arrivals.raw_ids]
    try:
        tokens = ItemTokens.from_codes(np.concatenate([old, final]), made.tokens.level_sizes, raw_ids)
    except ValueError as error:
        raise UserError(f"the extra token has no number left for a new item ({error}); make the tokens anew") from None
    return NewItems(raw_ids, tokens)


def codes_of_new(
    config: Any, quantiser: Quantiser, points: np.ndarray, rest: np.ndarray, texts: np.ndarray, taken: np.ndarray,
    raw_ids: Sequence[str],
) -> np.ndarray:  # fmt: skip
    """Codes for new items by a trained codebook.

    Args:
        config: the run's.
        quantiser: of the items that have codes.
        points: where the new ones stand, float32 ``[n_new, d]``.
        rest: bool ``[n_new]``, those that no interaction places.
        texts: of the rest, float32 ``[n_rest, H]``; read with ``unseen_items: projection``.
        taken: codes of the others, int64 ``[n, N]``.
        raw_ids: of the new ones.

    Returns:
        int64 ``[n_new, N]``.

    Raises:
        UserError: no codes are left for one.
    """
    latent = quantiser.latent(points)
    if config["unseen_items"] == "projection" and config["code_input"] == "behaviour" and rest.any():
        latent = latent.clone()
        latent[rest] = quantiser.project(texts)
    chosen, _ = quantiser.codebook.encode(latent)
    return place_new(config["code_collisions"], quantiser.codebook, latent, chosen, taken, np.array(raw_ids))


def _points(
    config: Any, dataset: Any, store: StageStore, made: Tokenized, arrivals: Arrivals
) -> tuple[np.ndarray, np.ndarray]:
    """Where the new items stand, float32 ``[n_new, d]``, and their texts ``[n_new, H]`` where some stand by these."""
    sources = made.sources
    rest = np.flatnonzero(~arrivals.placed)
    if len(rest) and sources.item_text is None:
        sources.item_text = read_item_text(config, dataset)
        read_texts(config, dataset, store, sources, None if sources.reader else named_reader(config))
    texts = np.zeros((len(arrivals.raw_ids), 0), dtype=np.float32)
    if len(rest):
        assert sources.reader is not None
        kind, limit = config["text_embedding"], config["text_embedding_tokens"]
        texts = text_embeddings(sources.reader, arrivals.texts, kind, limit)
    if config["code_input"] == "text":
        return texts, texts
    assert sources.points is not None
    points = from_neighbours(sources.points, had_by_users(dataset), arrivals.users)
    if not len(rest):
        return points, texts
    assert sources.texts is not None
    points[rest] = from_text(
        np.concatenate([sources.points, points]), np.concatenate([sources.texts, texts]),
        np.append(sources.seen, np.zeros(len(points), dtype=bool)), len(sources.texts) + rest,
    )  # fmt: skip
    return points, texts


def had_by_users(dataset: Any) -> sp.csr_matrix:
    """Which items users have had in train: ``[n_users, n_items]``, 1 for each, however often.

    Args:
        dataset: the train data set.
    """
    histories = dataset.train_histories
    shape = dataset.user_num, dataset.item_num
    # A copy, as what follows sorts the items of each user in place.
    history = sp.csr_matrix((np.ones(len(histories.items)), histories.items, histories.offsets), shape=shape, copy=True)
    history.sum_duplicates()
    history.data[:] = 1
    return history


def _users_of(config: Any, dataset: Any, new: Sequence[str], inter_file: Path) -> sp.csr_matrix:
    """Who had each new item: ``[n_new, n_users]``."""
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
