"""Example users of a table: what they had, what they should have got, and what each row would have shown them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.data.item_text import read_titles
from recbole_llm.errors import UserError
from recbole_llm.evaluation.rankings import Rankings
from recbole_llm.leaderboard.aligned import align, user_values

# Items shown of each row's ranking.
SHOWN = 10
# What stands in a ranking where a user has no item left.
PADDING = "[PAD]"

logger = logging.getLogger("recbole_llm")


def examples(
    rankings: Mapping[str, Sequence[Rankings]],
    metric: str,
    titles: Mapping[str, str],
    count: int = 12,
    seed: int = 2020,
) -> list[dict[str, Any]]:
    """Choose users that tell something, and write down what a page shows of them.

    Half are those on whom the rows differ most, a quarter are some whom no row serves (all have the metric at 0), and
    the rest are drawn at random. Where one kind has too few, random ones take their place. The choice depends on the
    rankings and the seed only.

    Args:
        rankings: row name to the rankings of its seeds, all of one split; each row is shown by its first seed.
        metric: how well a user is served, e.g. ``ndcg@10``; hits among the first ten where it is no mean over users.
        titles: by raw item id; an item without one is shown by its id.
        count: users at most.
        seed: of what is drawn.

    Returns:
        For each user ``user``, ``why`` (``the rows differ``, ``nobody serves him`` or ``at random``), ``history``
        (oldest first), ``targets`` and, by row, ``top``; items are ``{"item": raw id, "title": ...}``, in ``top``
        with ``hit``.

    Raises:
        UserError: runs of one table were not judged on the same users and targets.
    """
    firsts = {name: seeds[0] for name, seeds in align(rankings).items()}
    if not firsts:
        return []
    facts = next(iter(firsts.values()))
    values = np.stack([_served(one, metric.lower()) for one in firsts.values()])
    hits = {name: one.hits()[0] for name, one in firsts.items()}
    item = _items(facts, titles)
    return [
        {
            "user": str(facts.user_id[user]),
            "why": why,
            "history": [item(place) for place in facts.recent[user].tolist() if place >= 0],
            "targets": [
                item(place)
                for place in facts.targets[facts.target_offsets[user] : facts.target_offsets[user + 1]].tolist()
            ],
            "top": {
                name: [
                    {**item(place), "hit": hit}
                    for place, hit in zip(one.top[user, :SHOWN].tolist(), hits[name][user].tolist(), strict=False)
                    if facts.item_id[place] != PADDING
                ]
                for name, one in firsts.items()
            },
        }
        for user, why in choose(values, count, seed)
    ]


def choose(values: np.ndarray, count: int, seed: int) -> list[tuple[int, str]]:
    """Which users, and why.

    Args:
        values: float64 [rows, U], how well each row serves each user.
        count: users at most.
        seed: of what is drawn, ties of the rows' difference among it.

    Returns:
        Places of distinct users and what each shows, in the order in which a page shows them.
    """
    drawn = np.random.Generator(np.random.PCG64(seed)).permutation(values.shape[1])
    spread = (values.max(axis=0) - values.min(axis=0))[drawn]
    # Where many differ as much, those of whom the rows are more divided.
    by_spread = drawn[np.lexsort((-values.std(axis=0)[drawn], -spread))]
    differing = by_spread[: int(np.count_nonzero(spread))]
    unserved = drawn[values.max(axis=0)[drawn] == 0]
    kinds = (
        (differing, "the rows differ", count - count // 2),
        (unserved, "nobody serves him", count // 4),
        (drawn, "at random", count),
    )
    chosen: dict[int, str] = {}
    for users, why, most in kinds:
        fresh = [user for user in users.tolist() if user not in chosen]
        chosen.update(dict.fromkeys(fresh[: min(most, count - len(chosen))], why))
    return list(chosen.items())


def _served(one: Rankings, metric: str) -> np.ndarray:
    values = user_values(one, metric)
    return one.hits()[0][:, :SHOWN].sum(axis=1).astype(np.float64) if values is None else values


def _items(facts: Rankings, titles: Mapping[str, str]) -> Any:
    names = facts.item_id.tolist()
    return lambda place: {"item": names[place], "title": titles.get(names[place], names[place])}


def titles(result: Mapping[str, Any]) -> dict[str, str]:
    """The items' titles of the data set that a run was on: the first column that its ``item_text`` names.

    Args:
        result: the content of a ``result.json``; its ``config`` says where the data set is.

    Returns:
        Title by raw item id; an item without a title is not among them. Empty, with a note in the log, where the data
        set or its texts are not at hand.
    """
    config = result["config"]
    try:
        file = _item_file(config)
        found = read_titles(
            file,
            config["ITEM_ID_FIELD"],
            config.get("item_text") or "",
            config.get("field_separator") or "\t",
            config.get("encoding") or "utf-8",
        )
    except (UserError, OSError, UnicodeDecodeError) as error:
        logger.info("items are shown by their ids: %s", error)
        return {}
    return {name: " ".join(text.split()) for name, text in found.items()}


def _item_file(config: Mapping[str, Any]) -> Path:
    """The data set's ``.item`` file, where the run had it or in this package's own ``dataset/``."""
    name = config["dataset"]
    folders = [Path(config["data_path"]), Path(__file__).parents[2] / "dataset" / name]
    for folder in folders:
        if (folder / f"{name}.item").is_file():
            return folder / f"{name}.item"
    raise UserError(f"there is no file {folders[0] / name}.item")
