"""Random catalogues of every kind of item tokens, and the dictionary trie that they are compared with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

from recbole_llm.itemid.item_tokens import ItemTokens

END = 2


@st.composite
def codes(draw: st.DrawFn) -> ItemTokens:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    row = st.tuples(*(st.integers(0, size - 1) for size in sizes)) | st.just((-1,) * len(sizes))
    rows = draw(st.lists(row, max_size=12))
    return ItemTokens.from_codes(np.array([(-1,) * len(sizes), *rows]), sizes)


@st.composite
def titles(draw: st.DrawFn) -> ItemTokens:
    word = st.sampled_from([0, 1, 5, 7, 900, 32_000])
    sequences = draw(st.lists(st.lists(word, max_size=5), max_size=12))
    return ItemTokens.from_sequences([[], *sequences], END)


raw = st.integers(1, 10).map(ItemTokens.raw)
catalogues = codes() | titles() | raw


@dataclass
class Node:
    """A node of nested dictionaries; ``items`` are those below it."""

    children: dict[int, Node] = field(default_factory=dict)
    items: list[int] = field(default_factory=list)


def dictionary(item_tokens: ItemTokens) -> dict[tuple[int, ...], Node]:
    """The nodes by their prefixes."""
    nodes = {(): Node()}
    for item in range(item_tokens.n_items):
        tokens = tuple(item_tokens.of(item))
        for length in range(len(tokens) + 1) if tokens else ():
            prefix = tokens[:length]
            if prefix not in nodes:
                nodes[prefix] = nodes[prefix[:-1]].children[prefix[-1]] = Node()
            nodes[prefix].items.append(item)
    return nodes
