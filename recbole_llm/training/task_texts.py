"""The texts that tasks of fine-tuning speak of: titles and descriptions of items, reviews of users."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.atomic import open_atomic
from recbole_llm.data.item_text import ItemText, is_empty, read_rows
from recbole_llm.data.split import TRAIN
from recbole_llm.training.language import read_item_text

logger = logging.getLogger("recbole_llm")


@dataclass
class TaskTexts:
    """What the tasks with text have to go by.

    Attributes:
        texts: by place of a template: ``title`` and ``description`` by internal item id, ``query`` by number.
        text_items: items whose texts are all their own, int64.
        query_items: the item of each query, int64.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    text_items: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    query_items: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    @classmethod
    def read(cls, config: Any, dataset: Any, item_text: ItemText) -> TaskTexts:
        """Read what the settings ask for.

        Args:
            config: ``text_task``, ``item_title``, ``item_description``, ``query_task`` and ``query_column``.
            dataset: the train data set.
            item_text: the texts of the items.

        Raises:
            UserError: a template that cannot be read, or a broken file.
        """
        made = cls()
        if config["text_task"]:
            made._take_items(config, dataset, item_text)
        if config["query_task"]:
            made._take_queries(config, dataset)
        return made

    def _take_items(self, config: Any, dataset: Any, item_text: ItemText) -> None:
        found = {"title": item_text}
        for key in ("title", "description"):
            if config[f"item_{key}"]:
                found[key] = read_item_text(config, dataset, f"item_{key}")
        named = np.all([text.named for text in found.values()], axis=0)
        self.texts |= {place: text.texts for place, text in found.items()}
        self.text_items = torch.from_numpy(np.flatnonzero(named))
        if len(self.text_items) < len(named) - 1:
            logger.info("text task: %d of %d items have texts of their own", len(self.text_items), len(named) - 1)

    def _take_queries(self, config: Any, dataset: Any) -> None:
        file, column = Path(config["data_path"]) / f"{config['dataset']}.inter", config["query_column"]
        separator, encoding = config["field_separator"], config["encoding"] or "utf-8"
        split = getattr(dataset, "split", None)
        if split is None or not file.is_file() or column not in open_atomic(file, separator, encoding).names:
            logger.info("query task: left out, as %s has no column '%s' (query_column)", file, column)
            return
        columns = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"], column)
        rows = [row for _, row in read_rows(file, columns, separator, encoding)]
        # Of a pair that stands there twice one review may be of a row that training must not see.
        counts = Counter((user, item) for user, item, _ in rows)
        reviews = {(user, item): text for user, item, text in rows if counts[user, item] == 1 and not is_empty(text)}
        train = split.phases == TRAIN
        users = dataset.field2id_token[dataset.uid_field][split.users[train]].tolist()
        items = dataset.field2id_token[dataset.iid_field][split.items[train]].tolist()
        texts = [reviews.get(pair, "") for pair in zip(users, items)]
        kept = np.array([bool(text) for text in texts], dtype=bool)
        if not kept.any():
            logger.info("query task: left out, as no train interaction of %s has a review", file)
            return
        self.texts["query"] = [text for text in texts if text]
        self.query_items = torch.from_numpy(split.items[train][kept]).long()
        logger.info("query task: %d of %d train interactions have a review", kept.sum(), len(kept))
