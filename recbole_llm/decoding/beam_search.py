"""Beam search for items: the best sequences of tokens that a language model gives a prompt, among those of items only.

Every prompt is read once and shared by its beams (``shared_cache.py``; ``encoded_prompts.py`` where an encoder reads),
legal tokens come from the trie of all items, and only the head's rows that count are multiplied (``head.py``). No loop
runs over batch, beam or item.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from recbole_llm.backbone.encoder_decoder import encodes
from recbole_llm.decoding.encoded_prompts import EncodedPrompts
from recbole_llm.decoding.guide import Guide
from recbole_llm.decoding.head import Head, TokenSet
from recbole_llm.decoding.one_user import OneUser
from recbole_llm.decoding.opening import Opening
from recbole_llm.decoding.shared_cache import Reader, SharedPrompts, WholePrompts, shares
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.trie import Trie

NORMALISERS = ("vocabulary", "level", "legal")


class Found(NamedTuple):
    """The best items of each prompt.

    Attributes:
        items: internal ids, best first, int64 [B, k]; no two of a row are alike.
        scores: log-probabilities of their tokens, float32 [B, k]; of a guided search what :class:`Guide` makes of them.
        leaked: 1 - exp(score over the whole vocabulary - score over the tokens of each level), or over the legal ones
            where these are the normaliser, of the tokens that are read, float32 [B, k]; ``None`` where it was not asked
            for.
    """

    items: Tensor
    scores: Tensor
    leaked: Tensor | None


class Added(NamedTuple):
    """What the legal tokens of nodes add to a score. All but the last [B, K, W].

    Attributes:
        scores: log-probabilities, float32; -inf where there is no child.
        children: where the tokens lead, int64; -1 for none.
        tokens: int64.
        kept: the logarithm of the mass that does not leak, float32 [B, K]; ``None`` where it has not been summed up.
    """

    scores: Tensor
    children: Tensor
    tokens: Tensor
    kept: Tensor | None


class _Beams(NamedTuple):
    """Prefixes of items under way. All [B, K]; a row's live ones ascend by node.

    Attributes:
        nodes: of the trie, int64; -1 where a row has fewer.
        scores: float32; -inf for -1.
        kept: the logarithm of the mass that did not leak, float32.
    """

    nodes: Tensor
    scores: Tensor
    kept: Tensor

    def of_rows(self, rows: Tensor) -> _Beams:
        """Those of some rows, int64 or bool."""
        return _Beams(*(part[rows] for part in self))


class BeamSearch(nn.Module):
    """Finds the k items whose tokens a language model thinks likeliest after a prompt.

    An item's score is the sum of the log-probabilities of its tokens, an end token among them if they have one, without
    normalisation by length. A log-probability is relative to the ``vocabulary``, to the tokens of the ``level`` (all
    codes of one; with titles all tokens that any item has at the place), or to the ``legal`` ones, those of the trie's
    children, whether or not they are excluded for a user. Hence what is excluded never moves another item's score.

    At every depth the best ``beams`` prefixes go on; items that end sooner than others wait apart and take no beam from
    those under way. That is transformers' ``generate`` with ``length_penalty=0``, but for the items that it drops where
    they end outside the best prefixes of a step. At a tie the earlier prefix goes on, by its tokens; items of equal
    score, such as those of equal tokens, come in the tie order. A token that is the only legal one is scored as any.
    Relative to the ``legal`` ones, though, nothing is added behind the token that tells an item from all others: there
    the item ends, and what follows is not read.

    Weights of the head and places of tensors are those of the moment it is made: make a new one after training.

    Args:
        decoder: a Hugging Face base model, in evaluation mode; with an encoder, the whole of it.
        head: its vocabulary head.
        item_tokens: the tokens of every item.
        beams: prefixes kept.
        lm_ids: the language model's id of each token of ``item_tokens``, int64 [size]; titles have their own.
        normaliser: ``vocabulary``, ``level`` or ``legal``.
        tie_order: all item ids in the order in which equal scores are ranked, int64 [n_items]; by id if ``None``.
        distinct: of items of equal tokens one is found alone, the best, the first in the tie order of those that a row
            may be shown. Where there are fewer than asked for the rest is item 0 with a score of -inf.

    Attributes:
        trie: of the items, under ``legal`` as far as there is a choice, on the decoder's device: what an
            :class:`Exclusion` and a :class:`Guide` are made with.
        shares_prompts: whether beams share the keys and values of their prompt. Models that remember anything else,
            and kinds of attention that take no mask of ours (``flash_attention_2``), read it once a beam and step.
        opening: what prompts begin with; ``None`` before :meth:`open_with`, and where prompts are read whole.
        one_user: reads the prompts that come one at a time, to be set by whom it pays; ``None``, they are read as any.

    Raises:
        UserError: an unknown normaliser, no beams or no items.
        ValueError: tokens that have no id, or share one.
    """

    def __init__(
        self, decoder: nn.Module, head: Head, item_tokens: ItemTokens, *, beams: int, lm_ids: Tensor | None = None,
        normaliser: str = "vocabulary", tie_order: Tensor | None = None, distinct: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        if normaliser not in NORMALISERS:
            known = ", ".join(NORMALISERS)
            raise UserError(f"normaliser is '{normaliser}'{did_you_mean(normaliser, NORMALISERS)} (one of {known})")
        if beams < 1:
            raise UserError(f"beams is {beams}; a search needs at least 1")
        lm_ids = item_tokens.lm_ids if lm_ids is None else lm_ids
        if lm_ids is None or len(lm_ids) != item_tokens.size:
            raise ValueError(f"the language model's ids of {item_tokens.size} tokens are needed")
        self.decoder, self.head, self.beams, self.normaliser = decoder, head, beams, normaliser
        self.distinct = distinct
        if normaliser == "legal":
            item_tokens = item_tokens.unique_prefixes()
        device = head.weight.device
        self.trie = Trie(item_tokens, tie_order).to(device)
        if not len(self.trie.order):
            raise UserError("no item has tokens; there is nothing to search for")
        self.lm_ids = lm_ids.to(device)
        order = torch.arange(item_tokens.n_items) if tie_order is None else tie_order.cpu()
        self.rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order))).to(device)
        self.levels = [self._level(item_tokens, depth) for depth in range(len(self.trie.widths) - 1)]
        # Known of the trie alone, so that no step has to ask the device: how many prefixes of each depth go on at most,
        # whether items end there, and the most items that end at one node.
        leaves = self.trie.is_leaf(torch.arange(len(self.trie), device=device))
        by_depth = leaves.split([high - low for low, high in zip(self.trie.level_bounds, self.trie.level_bounds[1:])])
        self._widths = [min(beams, int((~here).sum())) for here in by_depth]
        self._ends = [bool(here.any()) for here in by_depth]
        starts, ends = self.trie.ranges(self.trie.leaf_nodes)
        self._most_equal = int((ends - starts).max())
        self._reads: Callable[..., Reader] = EncodedPrompts if encodes(decoder) else SharedPrompts
        self.opening: Opening | None = None
        self.one_user: OneUser | None = None
        self.shares_prompts = encodes(decoder) or shares(decoder)
        if not self.shares_prompts:
            self._reads = WholePrompts

    def _level(self, item_tokens: ItemTokens, depth: int) -> tuple[TokenSet, Tensor]:
        """The head's rows that a depth's tokens need, and the column of each of our tokens among them."""
        if item_tokens.level_sizes:
            low, high = item_tokens.level_offsets[depth : depth + 2]
            tokens = torch.arange(low, high, device=self.trie.device)
        else:
            low, high = self.trie.level_bounds[depth + 1 : depth + 3]
            tokens = self.trie.tokens[low:high].unique()
        columns = torch.zeros(self.trie.size, dtype=torch.int64, device=self.trie.device)
        columns[tokens] = torch.arange(len(tokens), device=self.trie.device)
        return self.head.tokens(self.lm_ids[tokens]), columns

    def check(self, k: int, exclude: Exclusion | None = None) -> None:
        """Refuse what cannot be answered; :meth:`forward` does so before it reads anything.

        Args:
            k: items asked for.
            exclude: what each row is not to be shown.

        Raises:
            UserError: k is more than the beams, or the beams are more than the items that a row may be shown.
        """
        if not 1 <= k <= self.beams:
            raise UserError(f"{k} items are asked for and the search keeps {self.beams} beams; k is 1 to {self.beams}")
        items, where = len(self.trie.order), ""
        if exclude is not None and exclude.rows:
            left = exclude.left(torch.zeros(exclude.rows, dtype=torch.int64, device=self.trie.device))
            items, where = int(left.min()), f" to row {int(left.argmin())}, whose history is excluded"
        if items < self.beams:
            raise UserError(f"{self.beams} beams are more than the {items} items that can be recommended{where}")

    def lay_out(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Prompts as a table.

        Args:
            prompts: token ids of each row.

        Returns:
            int64 [B, P], filled up on the right, and the lengths, int64 [B].

        Raises:
            UserError: there are no prompts, one is empty, or one leaves no room for an item.
        """
        lengths = [len(prompt) for prompt in prompts]
        if not prompts or not min(lengths):
            raise UserError("a prompt has no tokens" if prompts else "there are no prompts")
        config: Any = self.decoder.config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        longest = max(lengths) + len(self.levels) - 1
        if most and longest > most:
            row = lengths.index(max(lengths))
            raise UserError(
                f"the prompt of row {row} has {max(lengths)} tokens and an item up to {len(self.levels)}; "
                f"the language model reads {most}"
            )
        ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
        for row, prompt in zip(ids, prompts):
            row[: len(prompt)] = torch.as_tensor(prompt)
        return ids.to(self.trie.device), torch.tensor(lengths, device=self.trie.device)

    @torch.no_grad()
    def forward(
        self, prompts: Sequence[Sequence[int]], k: int | None = None, exclude: Exclusion | None = None,
        leaked: bool = False, guide: Guide | None = None,
    ) -> Found:  # fmt: skip
        """Search.

        Args:
            prompts: the language model's token ids of each row, BOS included where it has one; of any lengths.
            k: items asked for; as many as beams if ``None``.
            exclude: made with :attr:`trie`, what each row is not to be shown.
            leaked: whether to tell the mass that leaked; it costs what ``normaliser: vocabulary`` does.
            guide: made with :attr:`trie`, a recommender that has a say; ``None``, the language model alone.

        Raises:
            UserError: see :meth:`check`; or a prompt is empty or too long, or the model's scores are no numbers.
        """
        k = self.beams if k is None else k
        self.check(k, exclude)
        if exclude is not None and exclude.rows != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and exclusions of {exclude.rows} rows")
        reader = self._read(prompts)
        zeros = torch.zeros(len(prompts), 1, device=self.trie.device)
        rows, beams, ended = torch.arange(len(prompts), device=zeros.device), _Beams(zeros.long(), zeros, zeros), None
        done: list[tuple[Tensor, _Beams]] = []
        asked = guide
        for depth in range(len(self.levels)):
            tokens, grown = self._grow(beams, reader.state, depth, exclude, rows, leaked, guide)
            ended = self._end(grown, ended, depth + 1)
            if not self._widths[depth + 1]:
                break
            beams, chosen = self._go_on(grown, depth + 1)
            # Of a guided search the items that end together differ in their scores, so no prefix's tells who is best.
            if ended is not None and ended.scores.shape[1] >= k and (guide is None or self._most_equal == 1):
                under_way = self._can_win(beams, ended, k)
                going = under_way.any(1)
                width, count = torch.stack((under_way.sum(1).amax(), going.sum())).tolist()
                if not width:
                    break
                beams, chosen = _narrowed(beams, chosen, under_way, width)
                # Rows in which nothing can change any more are left out, once they are half: that copies the others.
                if 2 * count <= len(rows):
                    done.append((rows[~going], ended.of_rows(~going)))
                    kept = going.nonzero().squeeze(1)
                    rows, beams, ended = rows[kept], beams.of_rows(kept), ended.of_rows(kept)
                    tokens, chosen = tokens[kept], chosen[kept]
                    guide = None if guide is None else guide.of_rows(kept)
                    reader.keep_rows(kept)
            chosen_tokens = tokens.flatten(1).gather(1, chosen).clamp(min=0)
            reader.step(self.lm_ids[chosen_tokens], chosen // tokens.shape[-1])
        assert ended is not None  # the deepest nodes are leaves
        return self._items(_together([*done, (rows, ended)]), k, exclude, leaked, asked)

    def _read(self, prompts: Sequence[Sequence[int]]) -> Reader:
        """Read the prompts, with room for the tokens of all their beams."""
        ids, lengths = self.lay_out(prompts)
        if self.one_user is not None and len(ids) == 1:
            return self.one_user.begin(ids, lengths)
        if self.opening is not None:
            return SharedPrompts(self.decoder, ids, lengths, self.behind, self.opening)
        return self._reads(self.decoder, ids, lengths, self.behind)

    @property
    def behind(self) -> int:
        """Tokens of beams that are read behind a prompt at most, over all steps."""
        return sum(self.steps)

    @property
    def steps(self) -> list[int]:
        """How many beams are read behind a prompt at each step, at most."""
        return [width for width in self._widths[1:] if width]

    @property
    def can_open(self) -> bool:
        """Whether what prompts begin with can be read once, which :meth:`open_with` does."""
        return self._reads is SharedPrompts

    def open_with(self, tokens: Sequence[int]) -> None:
        """Read, once, what prompts begin with; an encoder's, and those that beams do not share, are read whole.

        Args:
            tokens: the language model's ids; a prompt need not begin with all of them.
        """
        if self.can_open:
            self.opening = Opening(self.decoder, tokens)

    def _grow(
        self, beams: _Beams, states: Tensor, depth: int, exclude: Exclusion | None, rows: Tensor, leaked: bool,
        guide: Guide | None,
    ) -> tuple[Tensor, _Beams]:  # fmt: skip
        """Every legal token of every beam of some rows: tokens int64 [B, K, W], and the longer prefixes [B, K * W]."""
        added = self.added(states, beams.nodes, depth, guide, leaked)
        children, there = added.children, added.children >= 0
        if exclude is not None:
            there = exclude.left_of(rows.view(-1, 1, 1), children) > 0
            children = torch.where(there, children, -1)
        scores = (beams.scores.unsqueeze(-1) + added.scores).masked_fill_(~there, -torch.inf)
        kept = beams.kept if added.kept is None else beams.kept + added.kept
        kept = kept.unsqueeze(-1).expand_as(scores)
        return added.tokens, _Beams(children.flatten(1), scores.flatten(1), kept.flatten(1))

    def added(
        self, states: Tensor, nodes: Tensor, depth: int, guide: Guide | None = None, leaked: bool = False
    ) -> Added:
        """What the legal tokens of nodes add to a score.

        Args:
            states: the decoder's at the nodes, [B, K, hidden].
            nodes: of the trie, int64 [B, K]; -1 is none.
            depth: theirs.
            guide: see :meth:`forward`.
            leaked: whether to tell the mass that leaked.
        """
        level, columns = self.levels[depth]
        tokens, children = self.trie.legal_padded(nodes, depth)
        logits = self.head.logits(states, level)
        grown = logits.gather(-1, columns[tokens.clamp(min=0)]).masked_fill_(children < 0, -torch.inf)
        # Of a node that is none every token is illegal, and its sum -inf, which means nothing.
        base = (grown if self.normaliser == "legal" else logits).logsumexp(-1)
        kept = None
        if leaked or self.normaliser == "vocabulary":
            rest = self.head.log_sum_of_rest(states, level, logits.amax(-1))
            whole = torch.logaddexp(logits.logsumexp(-1) if self.normaliser == "legal" else base, rest)
            kept = base - whole
            base = whole if self.normaliser == "vocabulary" else base
        added = grown - base.unsqueeze(-1)
        if guide is not None:
            added = guide.mixed(added, nodes, children)
        return Added(added, children, tokens, kept)

    def _go_on(self, grown: _Beams, depth: int) -> tuple[_Beams, Tensor]:
        """The best prefixes of a depth that do not end there [B, K], and their places among all [B, K]."""
        if self._ends[depth]:
            ends = self.trie.is_leaf(grown.nodes)
            grown = grown._replace(
                nodes=grown.nodes.masked_fill(ends, -1), scores=grown.scores.masked_fill(ends, -torch.inf)
            )
        # Back in the order of places, which is that of nodes: the next tie is decided by it.
        width = min(self._widths[depth], grown.scores.shape[1])
        chosen = best(grown.scores, width).sort(dim=1).values
        return _Beams(*(part.gather(1, chosen) for part in grown)), chosen

    def _end(self, grown: _Beams, ended: _Beams | None, depth: int) -> _Beams | None:
        """The best of the items that have ended so far, [B, at most the beams], best first."""
        if not self._ends[depth]:
            return ended
        leaves = grown.nodes
        if self._widths[depth]:
            leaves = torch.where(self.trie.is_leaf(leaves), leaves, -1)
        new = grown._replace(nodes=leaves, scores=grown.scores.masked_fill(leaves < 0, -torch.inf))
        if ended is not None:
            new = _Beams(*(torch.cat(pair, dim=1) for pair in zip(ended, new)))
        first = self.rank[self.trie.order[self.trie.starts[new.nodes.clamp(min=0)]]]
        chosen = best(new.scores, min(self.beams, new.scores.shape[1]), first)
        return _Beams(*(part.gather(1, chosen) for part in new))

    def _can_win(self, beams: _Beams, ended: _Beams, k: int) -> Tensor:
        """Which prefixes may yet become one of the k best, bool [B, K]: scores only fall."""
        return (beams.nodes >= 0) & (beams.scores >= ended.scores[:, k - 1 : k])

    def _at(self, nodes: Tensor, exclude: Exclusion | None) -> tuple[Tensor, Tensor]:
        """Places of the items at nodes [B, K], int64 [B, K, most at one], and which there are and may be shown."""
        starts, ends = (bound.unsqueeze(-1) for bound in self.trie.ranges(nodes))
        places = starts + torch.arange(self._most_equal, device=starts.device)
        there = places < ends
        places = torch.where(there, places, 0)
        if exclude is not None:
            there &= ~exclude.contains(torch.arange(len(places), device=places.device).view(-1, 1, 1), places)
        return places, there

    def _items(self, ended: _Beams, k: int, exclude: Exclusion | None, leaked: bool, guide: Guide | None) -> Found:
        """The k best items that end at the leaves found."""
        places, there = self._at(ended.nodes, exclude)
        items = self.trie.order[places].flatten(1)
        scores = ended.scores.unsqueeze(-1)
        if guide is not None:
            scores = scores + guide.apart(ended.nodes, places)
        scores = torch.where(there, scores, -torch.inf)
        if self.distinct:
            first = best(scores.flatten(0, 1), 1, self.rank[items].view(-1, places.shape[-1]))
            scores = scores.where(
                torch.zeros_like(there).flatten(0, 1).scatter(1, first, True).view_as(there), -torch.inf
            )
        scores = scores.flatten(1)
        chosen = best(scores, k, self.rank[items])
        scores, items = scores.gather(1, chosen), items.gather(1, chosen)
        none = scores.isneginf() & self.distinct
        if not (scores.isfinite() | none).all():
            raise UserError(
                "the language model's scores are no numbers: its weights are damaged or their type too narrow"
            )
        leaks = None
        if leaked:
            leaks = -ended.kept.unsqueeze(-1).expand_as(there).flatten(1).gather(1, chosen).expm1()
        return Found(items.masked_fill(none, 0), scores, leaks)


def best(scores: Tensor, k: int, order: Tensor | None = None) -> Tensor:
    """The places of the k best scores of each row, best first, equal ones in a given order.

    ``torch.topk`` leaves ties open, so the order becomes part of what is compared, below the score's bits.

    Args:
        scores: float32 [B, N].
        k: at most N.
        order: int64 [B, N], smaller first and below 2**31; by place if ``None``.

    Returns:
        int64 [B, k].
    """
    bits = (scores + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    if order is None:
        order = torch.arange(scores.shape[1], device=scores.device)
    return ((ascending << 32) - order).topk(k, dim=1).indices


def _narrowed(beams: _Beams, places: Tensor, under_way: Tensor, width: int) -> tuple[_Beams, Tensor]:
    """Beams without those that can win nothing any more, as far as every row has some of them; their order stays.

    Args:
        beams: [B, K].
        places: of theirs, int64 [B, K].
        under_way: which can win, bool [B, K].
        width: the most of a row.
    """
    if width == under_way.shape[1]:
        return beams, places
    kept = best(beams.scores.masked_fill(~under_way, -torch.inf), width).sort(dim=1).values
    return _Beams(*(part.gather(1, kept) for part in beams)), places.gather(1, kept)


def _together(parts: list[tuple[Tensor, _Beams]]) -> _Beams:
    """What has ended in rows that were left out one after the other, in the order of the rows."""
    if len(parts) == 1:
        return parts[0][1]
    most = max(ended.scores.shape[1] for _, ended in parts)
    back = torch.cat([rows for rows, _ in parts]).argsort()
    columns = zip(*(ended for _, ended in parts), strict=True)
    return _Beams(
        *(
            torch.cat([functional.pad(part, (0, most - part.shape[1]), value=value) for part in column])[back]
            for column, value in zip(columns, (-1, -torch.inf, 0.0), strict=True)
        )
    )
