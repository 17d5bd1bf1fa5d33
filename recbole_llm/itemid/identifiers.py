"""Items as ids that no codebook makes: numbers in digits, and paths through a tree with a number at their end.

Source: Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, arXiv 2305.06569. The
order in which items are numbered is always given from outside: internal ids follow the data file, its test rows too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens

DIGITS = tuple(f"<{digit}>" for digit in range(10))


def met_first(items: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Items in the order in which a walk meets them, then those that it does not meet.

    Args:
        items: int64 ``[n]``, the walk, with repeats.
        others: int64 ``[m]``, items that may be missing in it, in the order in which they are to follow.

    Returns:
        int64, each item once.
    """
    unique, first = np.unique(items, return_index=True)
    met = unique[first.argsort(kind="stable")]
    return np.concatenate([met, others[~np.isin(others, met)]])


def spelled(order: np.ndarray) -> list[str]:
    """The numbers of items, all of as many digits, so that none is the beginning of another.

    Args:
        order: every item but the padding one, int64 ``[n_items - 1]``, the one that gets number 0 first.

    Returns:
        By internal id; the padding item's is empty.
    """
    width = len(str(max(len(order) - 1, 0)))
    numbers = [""] * (len(order) + 1)
    for number, item in enumerate(order.tolist()):
        numbers[item] = f"{number:0{width}d}"
    return numbers


def of_digits(numbers: Sequence[str], raw_ids: Sequence[str] | None = None) -> ItemTokens:
    """One token a digit, the same ten wherever in a number they stand.

    Args:
        numbers: of :func:`spelled`.
        raw_ids: by internal id, to tell the pool of items by.
    """
    return ItemTokens.named([[int(digit) for digit in number] for number in numbers], DIGITS, raw_ids)


def of_pieces(
    numbers: Sequence[str],
    encode: Callable[[list[str]], list[list[int]]],
    pieces: Callable[[list[int]], list[str]],
    raw_ids: Sequence[str] | None = None,
) -> ItemTokens:
    """The language model's own tokens of the numbers.

    Args:
        numbers: of :func:`spelled`.
        encode: many texts to their token ids, without special tokens.
        pieces: token ids to what they are called.
        raw_ids: by internal id, to tell the pool of items by.

    Raises:
        UserError: a number has no token of the language model.
    """
    spelling = encode(list(numbers))
    # An item without tokens is one that no search finds; the padding item has no number.
    empty = next((item for item, row in enumerate(spelling) if item and not row), None)
    if empty is not None:
        item = empty if raw_ids is None else f"'{raw_ids[empty]}'"
        raise UserError(
            f"id_spelling: pieces: the language model has no token for {numbers[empty]!r}, the number of item {item}; "
            "set id_spelling: digits"
        )
    used = sorted({token for row in spelling for token in row})
    place = {token: own for own, token in enumerate(used)}
    sequences = [[place[token] for token in row] for row in spelling]
    return ItemTokens.named(sequences, pieces(used), raw_ids, torch.tensor(used, dtype=torch.int64))


def of_paths(paths: Sequence[Sequence[str]], order: np.ndarray, raw_ids: Sequence[str] | None = None) -> ItemTokens:
    """One token a step of an item's path, and one that numbers the items at the end of the same path.

    Numbers are other tokens than steps, so that no item's tokens are the beginning of another's.

    Args:
        paths: by internal id, the names of the steps; may be empty. The padding item's counts for nothing.
        order: every item but the padding one, int64 ``[n_items - 1]``: how items of one path are numbered.
        raw_ids: by internal id, to tell the pool of items by.
    """
    steps = sorted({step for path in paths[1:] for step in path})
    token_of = {step: token for token, step in enumerate(steps)}
    counts: defaultdict[tuple[str, ...], int] = defaultdict(int)
    sequences: list[list[int]] = [[] for _ in paths]
    for item in order.tolist():
        path = tuple(paths[item])
        sequences[item] = [*(token_of[step] for step in path), len(steps) + counts[path]]
        counts[path] += 1
    most = max(counts.values(), default=0)
    names = [*(f"<{step}>" for step in steps), *(f"<n_{number}>" for number in range(most))]
    return ItemTokens.named(sequences, names, raw_ids)
