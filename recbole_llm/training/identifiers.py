"""Ids of items that no codebook makes: which rows and columns they are made from, and which of them leak.

Source of the schemes: Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, arXiv
2305.06569.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from recbole_llm.atomic import open_atomic
from recbole_llm.backbone.base import Backbone
from recbole_llm.data.histories import Histories
from recbole_llm.data.item_text import is_empty, item_file, read_columns
from recbole_llm.data.phases import TEST, TRAIN, VALID
from recbole_llm.data.ties import tie_order
from recbole_llm.errors import UserError
from recbole_llm.itemid.identifiers import met_first, of_digits, of_paths, of_pieces, spelled
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.spectral import cluster_paths, co_occurrence

# What `code_method` names beside codebooks and raw ids.
METHODS = ("random", "sequential", "collaborative", "semantic")
PREFIX = "id_"
LEAKING = "leaking_ids"
# Those that are numbers, to be spelled.
_NUMBERS = ("random", "sequential")
# The step of items that no train row, or no category, places anywhere.
UNSEEN, NO_CATEGORY = "unseen", "no_category"


def has_ids(config: Any) -> bool:
    """Whether items get ids that no codebook makes."""
    return config["code_tokens"] is None and config["code_method"] in METHODS


def leaks(config: Any) -> bool:
    """Whether a run's items have ids that tell of valid and test rows, as it was asked for."""
    return LEAKING in config and bool(config[LEAKING])


def in_pieces(config: Any) -> bool:
    """Whether ids are spelled in the language model's own tokens."""
    return has_ids(config) and config["code_method"] in _NUMBERS and config["id_spelling"] == "pieces"


def check_ids(config: Any) -> None:
    """Refuse ids that cannot be, or that leak and were not asked for as such.

    Args:
        config: the run's.

    Raises:
        UserError: what is wrong.
    """
    if has_ids(config):
        _check_rows(config)
        _check_method(config)
    elif config[LEAKING] and config["code_tokens"] is None:
        raise UserError(
            f"{LEAKING}: true means nothing with code_method: {config['code_method']}, which reads train rows alone"
        )


def _check_rows(config: Any) -> None:
    method, rows = config["code_method"], config["id_rows"]
    if rows == "all" and method != "sequential":
        raise UserError(f"id_rows: all is for sequential ids; those of code_method: {method} have no use for it")
    if rows == "all" and not config[LEAKING]:
        raise UserError(
            "id_rows: all numbers items in the order in which users have them, test rows among them: the item after a "
            "history then has the next number, so ids tell what is asked for; set id_rows: train, or leaking_ids: true "
            "to measure the leak"
        )
    if rows == "train" and config[LEAKING]:
        raise UserError(f"{LEAKING}: true means nothing with id_rows: train, whose ids do not leak; leave it out")


def _check_method(config: Any) -> None:
    method = config["code_method"]
    if in_pieces(config):
        if "user_tokens" in config and config["user_tokens"] > 0:
            # Where no token joins the vocabulary there is no row behind it for a user's.
            raise UserError(
                f"user_tokens: {config['user_tokens']} adds tokens to the vocabulary, and id_spelling: pieces takes "
                "the language model's own alone; set user_tokens: 0 or id_spelling: digits"
            )
        if "constraint" in config and config["constraint"] == "level":
            raise UserError("constraint: level needs ids of one length, and id_spelling: pieces gives them several")
        if "adapter" in config and config["adapter"] == "none":
            raise UserError(
                "id_spelling: pieces adds no tokens, so with adapter: none nothing trains; set adapter: full"
            )
    elif config["id_spelling"] == "pieces":
        raise UserError(f"id_spelling: pieces is for numbers; ids of code_method: {method} are clusters or categories")
    if method not in _NUMBERS and "constraint" in config and config["constraint"] == "level":
        raise UserError(f"constraint: level needs ids of one length, and those of code_method: {method} have several")
    if method == "collaborative" and not 2 <= config["id_clusters"] <= config["id_leaf_items"]:
        raise UserError(
            f"id_clusters {config['id_clusters']} should be 2 at least and not above id_leaf_items "
            f"{config['id_leaf_items']}"
        )
    if method == "semantic":
        _check_categories(config)


def _check_categories(config: Any) -> None:
    file, column = item_file(config), config["id_categories"]
    if column is None:
        names = open_atomic(file, config["field_separator"], _encoding(config)).names if file.is_file() else []
        there = f"; columns of {file}: {', '.join(names)}" if names else f", and there is no {file}"
        raise UserError(
            f"semantic ids are made of categories: name their column in id_categories{there}; where there are none, "
            "item_tokens: rq makes codes of behaviour, item_tokens: tiger of texts"
        )


def inputs_of(config: Any, dataset: Any, backbone: Backbone | None = None) -> dict[str, Any]:
    """What the ids hang on beside the items and the train rows, for a fingerprint.

    Args:
        config: the run's.
        dataset: the train data set.
        backbone: the language model, where ids are spelled in its tokens.
    """
    keys = {key: config[key] for key in config.stage_keys() if key.startswith(PREFIX)}
    made: dict[str, Any] = {"method": config["code_method"], "seed": config["seed"], **keys}
    if config["code_method"] in ("sequential", "collaborative"):
        made["split"] = dataset.split.fingerprint, dataset.split.count(TRAIN)
        if config["code_method"] == "sequential":
            made["walk"] = _walk(config, dataset).tolist()
        else:
            made["solver"] = "largest"  # Of other eigenvectors, where several are as good, other clusters come.
    if config["code_method"] == "semantic":
        made["categories"] = _categories(config, dataset.field2id_token[dataset.iid_field].tolist())
    if backbone is not None:
        made["tokenizer"] = backbone.tokenizer_fingerprint()
    return made


def make_ids(config: Any, dataset: Any, raw_ids: list[str], backbone: Backbone | None = None) -> ItemTokens:
    """Tokens of every item's id.

    Args:
        config: the run's.
        dataset: the train data set.
        raw_ids: by internal id.
        backbone: the language model, where ids are spelled in its tokens.

    Raises:
        UserError: the data lacks the times or categories that are asked for.
    """
    order = tie_order(raw_ids).numpy()
    # Of names alone: internal ids are in the order of the data file, test rows and all.
    order = order[order > 0]
    method = config["code_method"]
    if method == "semantic":
        return of_paths(_categories(config, raw_ids), order, raw_ids)
    if method == "collaborative":
        return of_paths(_clustered(config, dataset, order), order, raw_ids)
    if method == "random":
        numbers = spelled(np.random.default_rng(config["seed"]).permutation(order))
    else:
        numbers = spelled(met_first(_walk(config, dataset), order))
    if backbone is None:
        return of_digits(numbers, raw_ids)
    return of_pieces(numbers, backbone.encode_batch, backbone.tokenizer.convert_ids_to_tokens, raw_ids)


# --- sequential ------------------------------------------------------------------------------------------------------
def _walk(config: Any, dataset: Any) -> np.ndarray:
    """The items that users have, one user after the other, each's in the order of time: int64 ``[n]``."""
    split = dataset.split
    phases = (TRAIN,) if config["id_rows"] == "train" else (TRAIN, VALID, TEST)
    return _in_order(split.histories(*phases), _users(config, dataset, phases))


def _users(config: Any, dataset: Any, phases: tuple[int, ...]) -> np.ndarray:
    """Users with rows in some phases, in the order in which they are walked through: int64 ``[m]``."""
    split = dataset.split
    there = np.isin(split.phases, phases)
    users, rows = split.users[there], split.rows[there]
    marks = rows.astype(np.float64)
    if config["id_order"] == "time":
        if dataset.exact_times is None:
            raise UserError("id_order: time needs times, and no column of them is loaded (TIME_FIELD, load_col)")
        marks = np.asarray(dataset.exact_times)[rows]
    # The first of each user's rows, in the file or in time; of equal ones the first in the file.
    order = np.lexsort((rows, marks))
    met, first = np.unique(users[order], return_index=True)
    met = met[first.argsort()]
    return np.random.default_rng(config["seed"]).permutation(met) if config["id_order"] == "random" else met


def _in_order(histories: Histories, users: np.ndarray) -> np.ndarray:
    return np.concatenate([histories.of(user) for user in users.tolist()] or [histories.items[:0]])


# --- collaborative ---------------------------------------------------------------------------------------------------
def _clustered(config: Any, dataset: Any, order: np.ndarray) -> list[tuple[str, ...]]:
    """The names of the clusters that lead to each item, by internal id."""
    histories = dataset.train_histories
    seen = order[histories.seen(dataset.item_num)[order]]
    affinity = co_occurrence(histories.items, histories.offsets, dataset.item_num)[seen][:, seen].tocsr()
    found = cluster_paths(affinity, config["id_clusters"], config["id_leaf_items"], config["seed"])
    paths: list[tuple[str, ...]] = [(UNSEEN,)] * dataset.item_num
    for item, path in zip(seen.tolist(), found, strict=True):
        paths[item] = tuple("c_" + "_".join(map(str, path[: depth + 1])) for depth in range(len(path)))
    return paths


# --- semantic --------------------------------------------------------------------------------------------------------
def _categories(config: Any, raw_ids: list[str]) -> list[tuple[str, ...]]:
    """The categories of each item, from the widest to the narrowest as the file has them, by internal id."""
    read: Mapping[str, tuple[str, ...]] = read_columns(
        item_file(config), config["ITEM_ID_FIELD"], [config["id_categories"]], config["field_separator"],
        _encoding(config),
    )  # fmt: skip
    separator = config["id_category_separator"]
    texts = [read.get(raw, ("",))[0] for raw in raw_ids]
    split = [[part.strip() for part in text.split(separator) if not is_empty(part)] for text in texts]
    paths = [tuple(parts) or (NO_CATEGORY,) for parts in split]
    if not any(split[1:]):
        raise UserError(f"id_categories: no item has any in column '{config['id_categories']}' of {item_file(config)}")
    return paths


def _encoding(config: Any) -> str:
    return config["encoding"] or "utf-8"
