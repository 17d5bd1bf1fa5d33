"""Building a trie as flat arrays: token sequences are sorted, and their common prefixes are the nodes.

Every step is an array operation over what is left of the sequences, so that time is that of sorting and memory is
linear in the number of tokens: nothing loops over items, and one very long sequence costs its own length only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recbole_llm.errors import UserError

# Of the 63 bits of a key that does not turn negative.
KEY_BITS = 62


@dataclass(frozen=True)
class TrieArrays:
    """The nodes of a trie, breadth first: depth by depth, within a depth by the items below.

    Attributes:
        order: items sorted by their tokens, int64 [I].
        starts: where a node's items begin in the order, int64 [N].
        ends: where they end, int64 [N].
        tokens: the token that leads to a node, int64 [N]; -1 at the root.
        parents: int64 [N]; -1 at the root.
        child_offsets: the children of node n are the nodes ``child_offsets[n]`` to ``child_offsets[n + 1]``, int64
            [N + 1].
        level_bounds: the nodes of depth d are those from ``level_bounds[d]`` to ``level_bounds[d + 1]``, int64 [D + 2].
    """

    order: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    child_offsets: np.ndarray
    level_bounds: np.ndarray


def build(offsets: np.ndarray, tokens: np.ndarray, size: int, items: np.ndarray) -> TrieArrays:
    """Sort items by their tokens and find the nodes.

    Args:
        offsets: where each item's tokens begin, int64 [n_items + 1].
        tokens: int64 [offsets[-1]], each within 0..size - 1.
        size: of the vocabulary.
        items: the items that have tokens, int64 [I]; equal ones keep the order they have here.

    Returns:
        The arrays; of N = 1 node where there are no items.

    Raises:
        UserError: the tokens of one item are the beginning of another's.
    """
    if not len(items):
        none = np.zeros(1, dtype=np.int64)
        return TrieArrays(items, none, none, none - 1, none - 1, np.array([1, 1]), np.array([0, 1]))
    order = sort_items(offsets, tokens, size, items)
    lengths = np.diff(offsets)[order]
    # The sequences one after the other in their new order: from here on memory is read from front to back.
    bounds = np.cumsum(lengths)
    begins = bounds - lengths
    places = np.repeat(offsets[order] - begins, lengths)
    places += np.arange(len(places))
    tokens = tokens.take(places)
    common = _common_with_previous(begins, lengths, tokens)
    _refuse_prefixes(order, lengths, common, begins, tokens)

    # An item adds to the trie the nodes below what it has in common with the one before it.
    added = lengths - common
    last = np.cumsum(added)
    owner = np.repeat(np.arange(len(order)), added)
    depth = np.arange(len(owner))
    depth -= np.repeat(last - lengths, added)  # of the parent
    longest = int(lengths.max())
    # Stable sorting of 16-bit numbers is linear.
    depth = depth.astype(np.uint16 if longest < 2**16 else np.int64)
    breadth_first = np.argsort(depth, kind="stable")
    starts, depth = owner.take(breadth_first), depth.take(breadth_first).astype(np.int64)
    level_bounds = np.concatenate(([0, 1], 1 + np.cumsum(np.bincount(depth, minlength=longest)[:longest])))

    # The first child of a node stands where the node does, and so is added by the same item. Inner nodes and first
    # children are the same in number and order, which gives every child its parent without a search.
    adders = np.flatnonzero(added)
    inner, first_child = np.ones((2, len(owner)), dtype=bool)
    inner[last[adders] - 1] = False
    first_child[(last - added)[adders[1:]]] = False
    inner, first_child = np.append(True, inner.take(breadth_first)), first_child.take(breadth_first)
    parents = np.flatnonzero(inner).take(np.cumsum(first_child) - 1)
    firsts = np.append(1 + np.flatnonzero(first_child), len(owner) + 1)
    child_offsets = firsts.take(np.append(0, np.cumsum(inner)))
    starts = np.concatenate(([0], starts))
    return TrieArrays(
        order,
        starts,
        _ends(starts, added, child_offsets, inner, level_bounds),
        np.concatenate(([-1], tokens[begins[starts[1:]] + depth])),
        np.concatenate(([-1], parents)),
        child_offsets,
        level_bounds.astype(np.int64),
    )


def sort_items(offsets: np.ndarray, tokens: np.ndarray, size: int, items: np.ndarray) -> np.ndarray:
    """Sort items by their token sequences, a beginning before what it begins; equal ones keep their order.

    Several tokens at a time go into one key, and only items that are still equal to another go on to their next tokens.

    Args:
        offsets: int64 [n_items + 1].
        tokens: int64 [offsets[-1]], each within 0..size - 1.
        size: of the vocabulary.
        items: int64 [I].

    Returns:
        The items in their new order, int64 [I].
    """
    order = items.copy()
    bits = int(size).bit_length()
    places = np.arange(len(order))  # that are not settled yet; those of one group are neighbours
    group = np.zeros(len(order), dtype=np.int64)
    done = 0
    while len(places):
        unsettled = order[places]
        begins = offsets[unsettled] + done
        left = offsets[unsettled + 1] - begins
        # Groups, tokens and places in one number, if they fit, are sorted several times as fast as one by the other.
        place_bits = len(places).bit_length()
        room = KEY_BITS - place_bits * (2 if done else 1)
        columns = min((room if room >= bits else KEY_BITS) // bits, int(left.max()))
        if not columns:
            break
        key = np.zeros(len(places), dtype=np.int64)
        for column in range(columns):
            key <<= bits
            there = left > column
            if there.all():
                key |= tokens.take(begins + column)
                key += 1  # a number below 2 ** bits, so that nothing is carried
            else:
                key[there] |= tokens[begins[there] + column] + 1
        if room >= bits:
            whole = (((group << bits * columns) | key) << place_bits) | np.arange(len(places))
            by_key = np.sort(whole) & ((1 << place_bits) - 1)
        else:
            by_key = np.lexsort((key, group))
        order[places], key, left = unsettled[by_key], key[by_key], left[by_key]
        # Sorted by group first, so the groups are where they were.
        begin = np.ones(len(places), dtype=bool)
        begin[1:] = (key[1:] != key[:-1]) | (group[1:] != group[:-1])
        group = np.cumsum(begin)
        done += columns
        tied = ~begin | ~np.append(begin[1:], True)
        # One that has just ended stays beside those that go on, to come before them.
        on = tied & (left >= columns)
        places, group = places[on], group[on]
        # Numbered anew, so that a group's number fits where the place of one of its items does.
        group = np.cumsum(np.diff(group, prepend=group[:1]) != 0)
    return order


def _common_with_previous(begins: np.ndarray, lengths: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """How many first tokens each place of the order has in common with the place before it, int64 [I]."""
    common = np.zeros(len(begins), dtype=np.int64)
    places, shorter, done = np.arange(1, len(begins)), np.minimum(lengths[1:], lengths[:-1]), 0
    here, before = begins[1:], begins[:-1]
    while len(places):
        same = np.flatnonzero(tokens[here + done] == tokens[before + done])
        places, shorter, here, before = places[same], shorter[same], here[same], before[same]
        done += 1
        common[places] = done
        on = np.flatnonzero(shorter > done)
        if len(on) < len(places):
            places, shorter, here, before = places[on], shorter[on], here[on], before[on]
    return common


def _refuse_prefixes(
    order: np.ndarray, lengths: np.ndarray, common: np.ndarray, begins: np.ndarray, tokens: np.ndarray
) -> None:
    """Everything between a sequence and one that it begins has it in common, so neighbours tell."""
    wrong = np.flatnonzero((common[1:] == lengths[:-1]) & (lengths[1:] > common[1:]))
    if len(wrong):
        place = int(wrong[0])
        shown = tokens[begins[place] : begins[place] + lengths[place]].tolist()
        raise UserError(
            f"the tokens of item {order[place]} (internal id; {_shortened(shown)}) are the beginning of those of item "
            f"{order[place + 1]}, so no search could end at it; append an end token to every item's tokens"
        )


def _shortened(tokens: list[int], most: int = 6) -> str:
    return " ".join(map(str, tokens[:most])) + (" ..." if len(tokens) > most else "")


def _ends(
    starts: np.ndarray, added: np.ndarray, child_offsets: np.ndarray, inner: np.ndarray, level_bounds: np.ndarray
) -> np.ndarray:
    """A node's items end where those of its last child do; a leaf's where the next item differs."""
    distinct = np.flatnonzero(added)
    following = np.zeros(len(added), dtype=np.int64)
    following[distinct] = np.append(distinct[1:], len(added))
    ends = following[starts]
    for low, high in zip(level_bounds[-2::-1], level_bounds[:0:-1]):
        nodes = low + np.flatnonzero(inner[low:high])
        ends[nodes] = ends[child_offsets[nodes + 1] - 1]
    return ends
