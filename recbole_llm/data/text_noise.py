"""Item texts made worse on purpose: a share left out, a share exchanged; what a model loses then, its texts gave it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace

from recbole_llm.data.item_text import FALLBACK_COLUMN, ItemText, parse_template

logger = logging.getLogger("recbole_llm")


def with_noise(text: ItemText, id_tokens: Sequence[str], drop: float, shuffle: float, seed: int) -> ItemText:
    """Leave texts out and exchange texts, by items' raw ids.

    Only items that have a text of their own count. Each has a place in two orders that depend on the seed and the raw
    ids alone: the first ``drop`` of one lose their text (after the exchange), the first ``shuffle`` of the other hand
    theirs round, each taking its successor's. A larger share therefore touches the same items and more, and no share
    moves the items that the other one touches.

    Args:
        text: the texts as they are.
        id_tokens: raw item ids by internal id; the first is the padding item's.
        drop: share of the items, 0 to 1, that read the fallback.
        shuffle: share that have another item's text. Where that is one item nobody has anything to swap.
        seed: of both orders.

    Returns:
        The same object when nothing changes; ``missing`` counts the dropped as well.
    """
    owners = [item for item, named in enumerate(text.named) if named]
    exchanged = _first(owners, id_tokens, shuffle, f"shuffle {seed}")
    dropped = _first(owners, id_tokens, drop, f"drop {seed}")
    if len(exchanged) < 2:
        exchanged = []
    if not exchanged and not dropped:
        return text
    texts, named = list(text.texts), list(text.named)
    for item, giver in zip(exchanged, exchanged[1:] + exchanged[:1], strict=True):
        texts[item] = text.texts[giver]
    fallback = parse_template(text.fallback, "item_text_fallback")
    for item in dropped:
        texts[item], named[item] = fallback.render({FALLBACK_COLUMN: str(id_tokens[item])}), False
    logger.info(
        "item text: of %d texts %d are exchanged (text_shuffle %g) and %d left out (text_drop %g), text_noise_seed %d",
        len(owners), len(exchanged), shuffle, len(dropped), drop, seed,
    )  # fmt: skip
    return replace(
        text, texts=texts, missing=text.missing + len(dropped), named=tuple(named), dropped=len(dropped),
        shuffled=len(exchanged),
    )  # fmt: skip


def _first(items: Sequence[int], id_tokens: Sequence[str], share: float, label: str) -> list[int]:
    """The first share of some items in the order of a hash of their raw ids."""

    def key(item: int) -> bytes:
        return hashlib.sha256(f"{label}\t{id_tokens[item]}".encode()).digest()

    count = int(len(items) * share + 0.5)
    return sorted(items, key=key)[:count] if count else []
