"""The texts that tasks of fine-tuning speak of: titles and descriptions of items, reviews of users."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.atomic import open_atomic
from recbole_llm.data.item_text import ItemText, is_empty, read_columns, read_rows
from recbole_llm.data.phases import TRAIN
from recbole_llm.errors import UserError
from recbole_llm.tasks.base import TaskTexts, active_tasks
from recbole_llm.tasks.language import ITEM_TEXTS, QUERY
from recbole_llm.training.language import read_item_text

logger = logging.getLogger("recbole_llm")


def read_task_texts(config: Any, dataset: Any, item_text: ItemText) -> TaskTexts:
    """Read what the active tasks need.

    Args:
        config: ``tasks`` with their switches, ``item_title``, ``item_description``, ``query_column`` and
            ``preference_column``.
        dataset: the train data set.
        item_text: the texts of the items.

    Raises:
        UserError: a template that cannot be read, a broken file, or no such column where one was asked for.
    """
    made = TaskTexts()
    named = set().union(*(task.texts_named() for task in active_tasks(config)))
    if named & set(ITEM_TEXTS):
        _take_items(made, config, dataset, item_text)
    if QUERY in named:
        found = reviews_in_train(config, dataset, config["query_column"], "query task")
        if found is not None:
            made.texts["query"], made.query_places = found
    if "preference" in named:
        _take_preferences(made, config, dataset)
    return made


def _take_items(made: TaskTexts, config: Any, dataset: Any, item_text: ItemText) -> None:
    found = {"title": item_text}
    for key in ITEM_TEXTS:
        if config[f"item_{key}"]:
            found[key] = read_item_text(config, dataset, f"item_{key}")
    named = np.all([text.named for text in found.values()], axis=0)
    made.texts |= {place: text.texts for place, text in found.items()}
    made.text_items = torch.from_numpy(np.flatnonzero(named))
    if len(made.text_items) < len(named) - 1:
        logger.info("text task: %d of %d items have texts of their own", len(made.text_items), len(named) - 1)


def _take_preferences(made: TaskTexts, config: Any, dataset: Any) -> None:
    column = config["preference_column"]
    if column is not None and _user_file(config).is_file() and column in _names(config, _user_file(config)):
        return _take_user_texts(made, config, dataset, column)
    if column is not None and column not in _names(config, _inter_file(config)):
        raise UserError(
            f"preference_column: neither the .inter nor the .user file of '{config['dataset']}' has '{column}'"
        )
    found = reviews_in_train(config, dataset, column or config["query_column"], "preference task")
    if found is not None:
        made.texts["preference"], places = found
        made.preference_stops = places + 1
    return None


def _take_user_texts(made: TaskTexts, config: Any, dataset: Any, column: str) -> None:
    separator, encoding = config["field_separator"], config["encoding"] or "utf-8"
    rows = read_columns(_user_file(config), config["USER_ID_FIELD"], (column,), separator, encoding)
    offsets = dataset.train_histories.offsets
    names = dataset.field2id_token[dataset.uid_field].tolist()
    said = [rows.get(name, ("",))[0] for name in names]
    users = [user for user, text in enumerate(said) if offsets[user] < offsets[user + 1] and not is_empty(text)]
    logger.info("preference task: %d of %d users have a '%s'", len(users), len(names) - 1, column)
    if users:
        made.texts["preference"] = [said[user] for user in users]
        made.preference_stops = torch.from_numpy(offsets[1:][users]).long()


def _inter_file(config: Any) -> Path:
    return Path(config["data_path"]) / f"{config['dataset']}.inter"


def _user_file(config: Any) -> Path:
    return _inter_file(config).with_suffix(".user")


def _names(config: Any, file: Path) -> tuple[str, ...]:
    return open_atomic(file, config["field_separator"], config["encoding"] or "utf-8").names


def reviews_in_train(
    config: Any, dataset: Any, column: str, task: str, setting: str = "query_column"
) -> tuple[list[str], Tensor] | None:
    """What users say in a column of the ``.inter`` file, of train rows only.

    Args:
        config: the run's.
        dataset: the train data set.
        column: of the file.
        task: what it is for, in the log.
        setting: the key that names the column.

    Returns:
        The texts that are not empty, and the place of each one's row among the train histories' items, int64; ``None``
        where there is none, which is told.
    """
    file = _inter_file(config)
    split = getattr(dataset, "split", None)
    if split is None or not file.is_file() or column not in _names(config, file):
        logger.info("%s: left out, as %s has no column '%s' (%s)", task, file, column, setting)
        return None
    columns = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"], column)
    rows = [row for _, row in read_rows(file, columns, config["field_separator"], config["encoding"] or "utf-8")]
    # Of a pair that stands there twice one review may be of a row that training must not see.
    counts = Counter((user, item) for user, item, _ in rows)
    reviews = {(user, item): text for user, item, text in rows if counts[user, item] == 1 and not is_empty(text)}
    train = split.phases == TRAIN
    users = dataset.field2id_token[dataset.uid_field][split.users[train]].tolist()
    items = dataset.field2id_token[dataset.iid_field][split.items[train]].tolist()
    texts = [reviews.get(pair, "") for pair in zip(users, items)]
    kept = np.array([bool(text) for text in texts], dtype=bool)
    if not kept.any():
        logger.info("%s: left out, as no train interaction of %s has a review", task, file)
        return None
    logger.info("%s: %d of %d train interactions have a review", task, kept.sum(), len(kept))
    # The histories are by user, and within a user as the rows are.
    places = np.empty(len(kept), dtype=np.int64)
    places[np.argsort(split.users[train], kind="stable")] = np.arange(len(kept))
    return [text for text in texts if text], torch.from_numpy(places[kept])
