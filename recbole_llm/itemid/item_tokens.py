"""Every item as a sequence of tokens, and back: semantic codes, title tokens with an end token, raw ids, other ids.

Tokens are numbered in a small vocabulary of the scheme's own, 0..size - 1. Item ids are internal ones: item 0 is
padding and never has tokens, and other items may be without them too.
"""

from __future__ import annotations

import hashlib
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.itemid.trie import Trie

ARRAYS, CARD, SCHEMA = "item_tokens.safetensors", "item_tokens.json", 1
# The letter of a level in a code's token, as LC-Rec writes them: <a_12><b_3><c_255><d_0>.
LETTERS = string.ascii_lowercase


def pool_of(raw_ids: Sequence[str]) -> str:
    """The mark of a set of items and their numbering: tokens made for one pool say nothing about another.

    Args:
        raw_ids: by internal id, the padding item's first.

    Returns:
        SHA-256, hexadecimal.
    """
    mark = hashlib.sha256()
    for raw in raw_ids:
        mark.update(json.dumps(str(raw)).encode() + b"\n")
    return mark.hexdigest()


def code_strings(sizes: Sequence[int]) -> tuple[str, ...]:
    """What the codes of all levels are called, level after level.

    Args:
        sizes: codes of each level.
    """
    return tuple(f"<{LETTERS[level]}_{code}>" for level, size in enumerate(sizes) for code in range(size))


@dataclass(frozen=True, eq=False)
class ItemTokens:
    """The token sequence of every item. Made by :meth:`from_codes`, :meth:`from_sequences`, :meth:`named`, :meth:`raw`.

    Attributes:
        kind: ``codes``, ``titles``, ``ids`` or ``raw``.
        offsets: where an item's tokens begin, int64 [n_items + 1].
        tokens: of all items one after the other, int64 [offsets[-1]].
        size: of the vocabulary.
        level_sizes: codes of each level; empty where the tokens are not codes.
        lm_ids: the language model's id of each token of the vocabulary, ascending, int64 [size]; titles, and ids that
            are spelled in its own tokens.
        names: what each token of the vocabulary is called; ids only.
        pool: from :func:`pool_of`, the items they were made for; ``None`` where that was not said.
    """

    kind: str
    offsets: torch.Tensor
    tokens: torch.Tensor
    size: int
    level_sizes: tuple[int, ...] = ()
    lm_ids: torch.Tensor | None = None
    pool: str | None = None
    names: tuple[str, ...] = ()

    @classmethod
    def from_codes(
        cls, codes: torch.Tensor | np.ndarray, sizes: Sequence[int], raw_ids: Sequence[str] | None = None
    ) -> ItemTokens:
        """Tokens of semantic codes; token = codes of the levels before + code.

        The token that a collision policy adds is simply one more level.

        Args:
            codes: one code a level, int64 [n_items, N]; row 0 and items without tokens are -1 throughout.
            sizes: codes of each level, N; all of them are in the vocabulary, used or not.
            raw_ids: by internal id, to tell the pool of items by.

        Raises:
            ValueError: a code is out of its level's range, or a row is -1 in part.
        """
        codes, sizes = torch.as_tensor(codes).to("cpu", torch.int64), tuple(int(size) for size in sizes)
        if codes.dim() != 2 or codes.size(1) != len(sizes) or not 0 < len(sizes) <= len(LETTERS):
            raise ValueError(f"codes {tuple(codes.shape)} do not fit {len(sizes)} levels of at most {len(LETTERS)}")
        has = (codes >= 0).all(dim=1)
        wrong = torch.where(has.unsqueeze(1), codes >= torch.tensor(sizes), codes != -1).any(dim=1)
        wrong[:1] |= has[:1]
        if wrong.any():
            row = int(wrong.nonzero()[0])
            raise ValueError(f"item {row} cannot have the codes {codes[row].tolist()} of levels of {list(sizes)}")
        bases = torch.tensor([0, *accumulate(sizes)])
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), (has * len(sizes)).cumsum(0)))
        tokens = (codes[has] + bases[:-1]).reshape(-1)
        return cls("codes", offsets, tokens, int(bases[-1]), sizes, pool=_pool(raw_ids, len(codes)))

    @classmethod
    def from_sequences(
        cls, sequences: Sequence[Sequence[int]], end: int, raw_ids: Sequence[str] | None = None
    ) -> ItemTokens:
        """Tokens of titles: the language model's own, then its end token.

        The end token keeps a title apart from another that it begins. The vocabulary is what the titles hold.

        Args:
            sequences: the language model's token ids of each item, without its end token; an empty sequence leaves the
                item without tokens. The padding item's comes first and is empty.
            end: the language model's end token.
            raw_ids: by internal id, to tell the pool of items by.

        Raises:
            UserError: a sequence holds the end token itself.
            ValueError: the padding item has tokens, or an id is negative.
        """
        lengths = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
        flat = np.fromiter(chain.from_iterable(sequences), dtype=np.int64, count=int(lengths.sum()))
        if len(lengths) and lengths[0]:
            raise ValueError("item 0 is padding and cannot have tokens")
        if flat.min(initial=0) < 0:
            raise ValueError(f"{flat.min()} is no language model's token id")
        if (flat == end).any():
            item = int(np.searchsorted(lengths.cumsum(), np.flatnonzero(flat == end)[0], side="right"))
            raise UserError(f"the title of item {item} (internal id) holds the end token {end} within")
        whole = np.insert(flat, lengths.cumsum()[lengths > 0], end)
        # A table of the ids that occur, not a sort: they are a language model's, so it is small.
        occurs = np.zeros(int(whole.max(initial=-1)) + 1, dtype=bool)
        occurs[whole] = True
        lm_ids, tokens = np.flatnonzero(occurs), (np.cumsum(occurs) - 1)[whole]
        offsets = np.concatenate(([0], np.cumsum(lengths + (lengths > 0))))
        pool = _pool(raw_ids, len(lengths))
        return cls(
            "titles", torch.from_numpy(offsets), torch.from_numpy(tokens.astype(np.int64)), len(lm_ids),
            lm_ids=torch.from_numpy(lm_ids), pool=pool,
        )  # fmt: skip

    @classmethod
    def named(
        cls, sequences: Sequence[Sequence[int]], names: Sequence[str], raw_ids: Sequence[str] | None = None,
        lm_ids: torch.Tensor | None = None,
    ) -> ItemTokens:  # fmt: skip
        """Tokens of ids, of any lengths, in a vocabulary of their own.

        Args:
            sequences: tokens of each item, none of them the beginning of another; the padding item's comes first and
                is empty.
            names: what the tokens of the vocabulary are called.
            raw_ids: by internal id, to tell the pool of items by.
            lm_ids: the language model's id of each of them, ascending, where they are its own.

        Raises:
            ValueError: the padding item has tokens, or a token is none of the vocabulary.
        """
        lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
        tokens = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.int64)
        if len(lengths) and lengths[0]:
            raise ValueError("item 0 is padding and cannot have tokens")
        if len(tokens) and not 0 <= int(tokens.min()) <= int(tokens.max()) < len(names):
            raise ValueError(f"tokens {int(tokens.min())} to {int(tokens.max())} are not among {len(names)}")
        offsets = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        pool = _pool(raw_ids, len(lengths))
        return cls("ids", offsets, tokens, len(names), lm_ids=lm_ids, pool=pool, names=tuple(names))

    @classmethod
    def raw(cls, n_items: int, raw_ids: Sequence[str] | None = None) -> ItemTokens:
        """One token an item, that of item i being i - 1.

        Args:
            n_items: number of internal item ids, the padding item 0 included.
            raw_ids: by internal id, to tell the pool of items by.
        """
        offsets = (torch.arange(n_items + 1) - 1).clamp(min=0)
        return cls("raw", offsets, torch.arange(n_items - 1), n_items - 1, pool=_pool(raw_ids, n_items))

    def ended(self) -> ItemTokens:
        """The same sequences with an end token behind each, the last of the vocabulary; of codes it is a level more.

        Returns:
            Tokens without ``lm_ids``.

        Raises:
            ValueError: titles have their end token.
        """
        if self.kind == "titles":
            raise ValueError("titles end in the language model's end token already")
        has = (self.lengths > 0).long()
        offsets = self.offsets + torch.cat((has.new_zeros(1), has.cumsum(0)))
        tokens = self.tokens.new_full((len(self.tokens) + int(has.sum()),), self.size)
        own = torch.ones_like(tokens, dtype=torch.bool)
        own[offsets[1:][has > 0] - 1] = False
        tokens[own] = self.tokens
        codes = self.kind == "codes"
        return replace(
            self, kind="codes" if codes else "ids", offsets=offsets, tokens=tokens, size=self.size + 1, lm_ids=None,
            level_sizes=(*self.level_sizes, 1) if codes else (), names=(*self.names, "<end>") if self.names else (),
        )  # fmt: skip

    def unique_prefixes(self) -> ItemTokens:
        """The shortest beginning of each sequence that no other begins with, of at least one token.

        Each token behind it is the only one that can follow and has all the probability among legal tokens, so that
        what is relative to those need not read it.

        Returns:
            Tokens of no levels, of the same vocabulary; items of equal tokens have equal ones.
        """
        trie = self.trie
        firsts = trie.starts[trie.leaf_nodes]
        told = torch.searchsorted(firsts, trie.ends) - torch.searchsorted(firsts, trie.starts) == 1
        nodes = torch.arange(1, len(trie), device=trie.device)
        above = trie.parents[nodes]
        nodes = nodes[told[nodes] & (~told[above] | (above == 0))]
        nodes = nodes[trie.starts[nodes].argsort()]
        kept = torch.zeros_like(self.lengths)
        kept[trie.order] = trie.depths(nodes).repeat_interleave(trie.ends[nodes] - trie.starts[nodes])
        place = torch.arange(len(self.tokens), device=kept.device)
        place = place - self.offsets[:-1].repeat_interleave(self.lengths)
        tokens = self.tokens[place < kept.repeat_interleave(self.lengths)]
        offsets = torch.cat((kept.new_zeros(1), kept.cumsum(0)))
        return replace(self, kind="ids", offsets=offsets, tokens=tokens, level_sizes=(), names=())

    @property
    def n_items(self) -> int:
        """Number of internal item ids, the padding item 0 included."""
        return len(self.offsets) - 1

    @cached_property
    def lengths(self) -> torch.Tensor:
        """Tokens of each item, int64 [n_items]; 0 where it has none."""
        return self.offsets.diff()

    @cached_property
    def longest(self) -> int:
        """Tokens of the item that has most."""
        return int(self.lengths.max()) if self.n_items else 0

    @cached_property
    def vocabulary(self) -> tuple[str, ...] | None:
        """What each token is called; ``None`` for titles, whose tokens are the language model's."""
        if self.kind == "codes":
            return code_strings(self.level_sizes)
        if self.kind == "ids":
            return self.names
        return tuple(f"<i_{item}>" for item in range(1, self.n_items)) if self.kind == "raw" else None

    def strings(self, item: int) -> list[str]:
        """What an item's tokens are called, e.g. ``["<a_12>", "<b_3>"]``.

        Args:
            item: its internal id.

        Raises:
            ValueError: titles have no strings of ours.
        """
        if self.vocabulary is None:
            raise ValueError("the tokens of titles are called what the language model's tokenizer calls them")
        return [self.vocabulary[token] for token in self.of(item)]

    def of(self, item: int) -> list[int]:
        """An item's tokens.

        Args:
            item: its internal id.
        """
        return self.tokens[self.offsets[item] : self.offsets[item + 1]].tolist()

    @property
    def level_offsets(self) -> tuple[int, ...]:
        """The first token of each level of codes, and behind them the size: N + 1."""
        return (0, *accumulate(self.level_sizes))

    @property
    def codes(self) -> torch.Tensor:
        """The codes that the tokens stand for, int64 [n_items, N]; -1 for items without.

        Raises:
            ValueError: the tokens are not codes.
        """
        if self.kind != "codes":
            raise ValueError(f"{self.kind} are not codes")
        found = self.tokens.new_full((self.n_items, len(self.level_sizes)), -1)
        bases = torch.tensor(self.level_offsets[:-1], device=self.tokens.device)
        found[self.lengths > 0] = self.tokens.view(-1, len(self.level_sizes)) - bases
        return found

    def padded(self, items: torch.Tensor, width: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens of a batch of items.

        Args:
            items: internal ids, int64 [B].
            width: columns; that of the longest among them if ``None`` (which waits for the device).

        Returns:
            Tokens int64 [B, width] filled up with -1, and their number int64 [B].
        """
        lengths = self.lengths[items]
        if width is None:
            width = int(lengths.max()) if len(items) else 0
        column = torch.arange(width, device=items.device)
        there = column < lengths.unsqueeze(1)
        places = torch.where(there, self.offsets[items].unsqueeze(1) + column, 0)
        return (self.tokens[places] if len(self.tokens) else places).masked_fill(~there, -1), lengths

    def own(self, lm_tokens: torch.Tensor) -> torch.Tensor:
        """Our ids of the language model's tokens.

        Args:
            lm_tokens: int64 [...].

        Returns:
            int64 [...]; -1 for a token that no item has.

        Raises:
            ValueError: these are not titles, whose tokens alone are the language model's.
        """
        if self.lm_ids is None:
            raise ValueError(f"the tokens of {self.kind} are not the language model's own")
        if not self.size:
            return torch.full_like(lm_tokens, -1)
        found = torch.searchsorted(self.lm_ids, lm_tokens.contiguous()).clamp(max=self.size - 1)
        return torch.where(self.lm_ids[found] == lm_tokens, found, -1)

    @cached_property
    def trie(self) -> Trie:
        """The sorted map, equal items in the order of their ids; made when first asked for."""
        return Trie(self)

    def items_of(self, tokens: torch.Tensor) -> torch.Tensor:
        """The item that each sequence of tokens stands for; of several equal ones the first by id.

        Args:
            tokens: int64 [..., L], filled up with -1.

        Returns:
            Internal ids, int64 [...]; -1 where no item has just these tokens.
        """
        return self.trie.items_of(tokens)

    def groups(self) -> list[list[int]]:
        """The items that share their tokens with others: each group by id, groups in the order of their tokens."""
        starts, ends = self.trie.ranges(self.trie.leaf_nodes)
        shared = ends - starts > 1
        order = self.trie.order.tolist()
        return [order[start:end] for start, end in zip(starts[shared].tolist(), ends[shared].tolist())]

    def collision_rate(self) -> float:
        """1 - different sequences / items that have tokens: LC-Rec's definition. 0 where no item has any."""
        items = len(self.trie.order)
        return 1 - len(self.trie.leaf_nodes) / items if items else 0.0

    def duplicate_share(self) -> float:
        """The share of items that share their tokens with another, of those that have tokens."""
        items = len(self.trie.order)
        return sum(map(len, self.groups())) / items if items else 0.0

    def fingerprint(self) -> str:
        """SHA-256 of what every item's tokens are, whatever way they were made; the pool is not part of it."""
        card = [self.kind, self.n_items, self.size, *self.level_sizes, *self.names]
        mark = hashlib.sha256(json.dumps(card).encode())
        for tensor in (self.offsets, self.tokens, self.lm_ids):
            mark.update(b"-" if tensor is None else tensor.cpu().numpy().astype("<i8").tobytes())
        return mark.hexdigest()

    def to(self, device: torch.device | str) -> ItemTokens:
        """A copy whose tensors are on a device."""
        lm_ids = None if self.lm_ids is None else self.lm_ids.to(device)
        return replace(self, offsets=self.offsets.to(device), tokens=self.tokens.to(device), lm_ids=lm_ids)

    def save(self, folder: Path) -> None:
        """Write ``item_tokens.safetensors`` and ``item_tokens.json``.

        Args:
            folder: where; it exists.
        """
        tensors = {"offsets": self.offsets.cpu(), "tokens": self.tokens.cpu()}
        if self.lm_ids is not None:
            tensors["lm_ids"] = self.lm_ids.cpu()
        card = {
            "schema": SCHEMA, "kind": self.kind, "size": self.size, "level_sizes": list(self.level_sizes),
            "items": self.n_items, "pool": self.pool, "fingerprint": self.fingerprint(),
            **({"names": list(self.names)} if self.names else {}),
        }  # fmt: skip
        write_whole(Path(folder) / ARRAYS, lambda path: save_file(tensors, path))
        write_whole(Path(folder) / CARD, lambda path: path.write_text(json.dumps(card, indent=1) + "\n", "utf-8"))

    @classmethod
    def load(cls, folder: Path, raw_ids: Sequence[str] | None = None) -> ItemTokens:
        """Read what :meth:`save` wrote.

        Args:
            folder: where it is.
            raw_ids: by internal id, the items they are wanted for.

        Raises:
            UserError: the files are not there or damaged, or were made for other items.
        """
        folder = Path(folder)
        missing = [name for name in (CARD, ARRAYS) if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder} holds no item tokens: {missing[0]} is missing")
        try:
            card: dict[str, Any] = json.loads((folder / CARD).read_text("utf-8"))
            tensors = load_file(folder / ARRAYS)
            found = cls(
                card["kind"], tensors["offsets"], tensors["tokens"], card["size"], tuple(card["level_sizes"]),
                tensors.get("lm_ids"), card["pool"], tuple(card.get("names", ())),
            )  # fmt: skip
            whole = card["schema"] == SCHEMA and found.fingerprint() == card["fingerprint"]
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"the item tokens in {folder} cannot be read: {error}") from None
        if not whole:
            raise UserError(f"the item tokens in {folder} are damaged, or of another version; make them again")
        if raw_ids is not None and found.pool is not None and found.pool != pool_of(raw_ids):
            raise UserError(
                f"the item tokens in {folder} were made for another data set or item pool ({found.n_items - 1} items; "
                f"{len(raw_ids) - 1} here, or others, or in another order); make them for this one"
            )
        if raw_ids is not None and found.n_items != len(raw_ids):
            raise UserError(f"the item tokens in {folder} are of {found.n_items - 1} items, not {len(raw_ids) - 1}")
        return found


def _pool(raw_ids: Sequence[str] | None, n_items: int) -> str | None:
    if raw_ids is not None and len(raw_ids) != n_items:
        raise ValueError(f"{len(raw_ids)} raw ids for {n_items} items")
    return None if raw_ids is None else pool_of(raw_ids)
