"""Next-token distributions of a collaborative model: TCA4Rec's collaborative tokenizer on the sorted trie.

A teacher's logits over items become, at every token of a target item, a distribution over the tokens that could stand
there: p(v | prefix) is the softmax mass of the items that go on with v over that of all items that begin so. Items with
one beginning are neighbours in the trie's order, so all of these masses are differences of one cumulative sum. They
chain: the product along an item's tokens is the item's own softmax (with that of items of equal tokens).

Nothing here has a row of the vocabulary: a distribution is listed token by token, position after position.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens

# A node whose share of the whole is below this has its items summed by themselves: a difference of two sums is as good
# as the whole, 1e-16 of it a term, which leaves ten digits of a share of this size.
SMALL = 1e-6
# So has a child whose own share is below this: seven digits are left of it, as many as the result has.
FEW = 1e-9


@dataclass(frozen=True, eq=False)
class Positions:
    """The label positions of a batch of target items, target after target.

    M is the number of positions.

    Attributes:
        samples: whose position it is, int64 [M], ascending.
        nodes: the trie's node of the tokens before it, int64 [M].
        labels: the token that stands there, of the item tokens' own vocabulary, int64 [M].
    """

    samples: Tensor
    nodes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.nodes)


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """A distribution over the next token at each of M label positions, listed token by token.

    Those of position m are the entries ``offsets[m]`` to ``offsets[m + 1] - 1``, one for every child of its node: they
    are the legal tokens too. E is the number of entries.

    Attributes:
        offsets: int64 [M + 1].
        positions: the position of each entry, int64 [E], ascending.
        tokens: the language model's id of each entry's token, int64 [E], ascending within a position.
        probs: float32 [E]; sum to 1 in each position, and need no gradient.
        labels: the language model's id of the token that stands there, int64 [M].
        samples: whose position it is, int64 [M].
    """

    offsets: Tensor
    positions: Tensor
    tokens: Tensor
    probs: Tensor
    labels: Tensor
    samples: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def forced(self) -> Tensor:
        """Positions where but one token is legal, bool [M]."""
        return self.offsets.diff() == 1

    def to(self, device: torch.device | str) -> SoftLabels:
        """A copy whose tensors are on a device."""
        return SoftLabels(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))

    def among(self, labels: Tensor, places: Tensor) -> SoftLabels:
        """These labels among others that are hard: all the mass of each of those is on itself.

        Args:
            labels: of all L positions, the language model's ids, int64 [L]; at ``places`` those of these.
            places: which of them these are, int64 [M], ascending.

        Returns:
            Of L positions; ``samples`` is -1 where the label is hard.
        """
        soft = torch.zeros_like(labels, dtype=torch.bool)
        soft[places] = True
        counts = torch.ones_like(labels)
        counts[places] = self.offsets.diff()
        positions = torch.arange(len(labels), device=labels.device).repeat_interleave(counts)
        of_these = soft[positions]
        tokens, probs = labels[positions], self.probs.new_ones(len(positions))
        tokens[of_these], probs[of_these] = self.tokens, self.probs
        samples = torch.full_like(labels, -1)
        samples[places] = self.samples
        return SoftLabels(functional.pad(counts.cumsum(0), (1, 0)), positions, tokens, probs, labels, samples)

    def take(self, samples: Tensor) -> SoftLabels:
        """Those of some samples, any number of times.

        Args:
            samples: numbers of samples that have positions, int64 [B].
        """
        owned = torch.bincount(self.samples, minlength=int(samples.max()) + 1 if len(samples) else 0)
        positions = _runs((owned.cumsum(0) - owned)[samples], owned[samples])
        mine = torch.arange(len(samples), device=samples.device).repeat_interleave(owned[samples])
        return replace(self.at(positions), samples=mine)

    def at(self, positions: Tensor) -> SoftLabels:
        """Those of some positions, in any order, with the samples that they are of.

        Args:
            positions: int64 [P].
        """
        counts = self.offsets.diff()[positions]
        entries = _runs(self.offsets[positions], counts)
        numbers = torch.arange(len(positions), device=counts.device).repeat_interleave(counts)
        return SoftLabels(
            functional.pad(counts.cumsum(0), (1, 0)), numbers, self.tokens[entries], self.probs[entries],
            self.labels[positions], self.samples[positions],
        )  # fmt: skip

    def compact(self) -> tuple[Tensor, SoftLabels]:
        """The tokens that stand anywhere here, and these labels in numbers of them.

        Returns:
            The language model's ids, int64 [U], ascending; and labels whose ``tokens`` and ``labels`` are places among
            them.
        """
        tokens, numbers = torch.cat((self.tokens, self.labels)).unique(return_inverse=True)
        entries, labels = numbers.split((len(self.tokens), len(self.labels)))
        return tokens, replace(self, tokens=entries, labels=labels)

    def dense(self, size: int) -> Tensor:
        """Whole rows of a vocabulary, for a look and for tests.

        Args:
            size: of the vocabulary.

        Returns:
            float32 [M, size].
        """
        rows = self.probs.new_zeros(len(self), size)
        return rows.index_put_((self.positions, self.tokens), self.probs)


def _runs(starts: Tensor, counts: Tensor) -> Tensor:
    """Numbers from each start on, so many, one run after the other: int64 [counts.sum()]."""
    shift = (starts - (counts.cumsum(0) - counts)).repeat_interleave(counts)
    return shift + torch.arange(len(shift), device=shift.device)


@dataclass(frozen=True, eq=False)
class Children:
    """The children of the nodes of M positions, one after the other; made by :meth:`CollaborativeTokenizer.children`.

    Attributes:
        offsets: int64 [M + 1].
        positions: int64 [E].
        nodes: the child, int64 [E].
    """

    offsets: Tensor
    positions: Tensor
    nodes: Tensor


def check_beta(beta: float) -> None:
    """Refuse a temperature of items that is none.

    Raises:
        UserError: it is not above 0, or infinite.
    """
    # Of a number that is too small the inverse, which is what logits are multiplied by, is infinite.
    if not 0 < beta < float("inf") or 1 / beta / math.log(2) == float("inf"):
        raise UserError(f"beta is the temperature of a softmax over items and must be above 0, not {beta}")


class CollaborativeTokenizer:
    """Turns logits over items into next-token distributions along target items.

    It lives on the device of the item tokens.

    Args:
        item_tokens: of every item: codes, titles with their end token, or raw ids. Equal sequences add up.
        lm_ids: the language model's id of each token of their vocabulary, int64 [V]; ``None`` for the titles' own, and
            the tokens themselves where there are none.
        beta: the softmax temperature over items.
        standardise: divide every row by its deviation first, over the items that have tokens and a finite logit: models
            trained with other losses have logits of other scales. (Their mean is nothing to a softmax.)
        drop_last: so many last tokens of an item are no label positions.
        dtype: that logits are rounded to; the released code has them from products of bfloat16.

    Raises:
        UserError: ``beta`` is not above 0.
    """

    def __init__(
        self, item_tokens: ItemTokens, lm_ids: Tensor | None = None, *, beta: float = 1.0, standardise: bool = False,
        drop_last: int = 0, dtype: torch.dtype = torch.float32,
    ) -> None:  # fmt: skip
        check_beta(beta)
        self.item_tokens, self.trie = item_tokens, item_tokens.trie
        self.beta, self.standardise, self.drop_last, self.dtype = beta, standardise, drop_last, dtype
        given = item_tokens.lm_ids if lm_ids is None else lm_ids
        device = item_tokens.tokens.device
        self.lm_ids = torch.arange(item_tokens.size, device=device) if given is None else given.to(device)
        self._children_of = self.trie.child_offsets.diff()
        self._items_of = self.trie.ends - self.trie.starts
        self._lm_ids_of = functional.pad(self.lm_ids[self.trie.tokens[1:]], (1, 0))
        self._before = self._nodes_before()
        self._room = torch.empty(2, 0, dtype=torch.float64, device=device)

    def _nodes_before(self) -> Tensor:
        """The node of the tokens before each token of every item, int64 [all tokens]: climbed from the leaves."""
        trie, offsets = self.trie, self.item_tokens.offsets
        parents, before = trie.parents, torch.zeros_like(self.item_tokens.tokens)
        nodes, places = trie.leaves[trie.order], offsets[trie.order + 1] - 1
        while len(nodes):
            nodes = parents[nodes]
            before[places] = nodes
            on = nodes > 0
            nodes, places = nodes[on], places[on] - 1
        return before

    def fingerprint(self) -> str:
        """SHA-256 of all that the distributions depend on but for logits, targets and histories."""
        facts = [self.item_tokens.fingerprint(), self.beta, self.standardise, self.drop_last, str(self.dtype)]
        return hashlib.sha256(
            json.dumps(facts).encode() + self.lm_ids.cpu().numpy().astype("<i8").tobytes()
        ).hexdigest()

    # Where.

    def positions(self, targets: Tensor) -> Positions:
        """The label positions of target items; an item without tokens has none.

        Args:
            targets: internal ids, int64 [B].
        """
        tokens = self.item_tokens
        counts = (tokens.lengths[targets] - self.drop_last).clamp(min=0)
        samples = torch.arange(len(targets), device=targets.device).repeat_interleave(counts)
        within = torch.arange(len(samples), device=targets.device) - (counts.cumsum(0) - counts)[samples]
        places = tokens.offsets[targets][samples] + within
        return Positions(samples, self._before[places], tokens.tokens[places])

    def children(self, nodes: Tensor) -> Children:
        """The children of nodes that are no leaves, one after the other.

        Args:
            nodes: int64 [M].
        """
        counts = self.children_count(nodes)
        offsets = functional.pad(counts.cumsum(0), (1, 0))
        positions = torch.arange(len(nodes), device=nodes.device).repeat_interleave(counts)
        shift = self.trie.child_offsets[nodes] - offsets[:-1]
        children = shift.index_select(0, positions).add_(torch.arange(len(positions), device=nodes.device))
        return Children(offsets, positions, children)

    def children_count(self, nodes: Tensor) -> Tensor:
        """How many children each node has, int64 [M].

        Args:
            nodes: int64 [M].
        """
        return self._children_of[nodes]

    # How much.

    @torch.no_grad()
    def __call__(self, logits: Tensor, targets: Tensor, history: Tensor | None = None) -> SoftLabels:
        """The distributions along a batch of target items.

        Args:
            logits: of every item by internal id, float [B, n_items]; the higher the better, -inf rules an item out.
                They are not differentiated.
            targets: internal ids, int64 [B].
            history: items that get no mass, int64 [B, H], filled up with 0 (``mask_history``); the target keeps its
                own. ``None`` leaves them in, as the paper does.

        Returns:
            Of all positions, target after target. Where no item with the prefix has any mass the label has all of it.

        Raises:
            ValueError: the logits are not of these items.
        """
        positions = self.positions(targets)
        children = self.children(positions.nodes)
        return self.labels(positions, children, self.probs(logits, targets, positions, children, history))

    def labels(self, positions: Positions, children: Children, probs: Tensor) -> SoftLabels:
        """Soft labels of probabilities that are already there.

        Args:
            positions: M of them.
            children: of their nodes, E.
            probs: float [E].
        """
        tokens = self._lm_ids_of.index_select(0, children.nodes)
        labels = self.lm_ids[positions.labels]
        return SoftLabels(
            children.offsets, children.positions, tokens, probs.to(torch.float32), labels, positions.samples
        )

    @torch.no_grad()
    def probs(
        self, logits: Tensor, targets: Tensor, positions: Positions, children: Children, history: Tensor | None = None
    ) -> Tensor:
        """The probability of every child given its parent, float64 [E]; arguments as for calling it.

        Raises:
            ValueError: the logits are not of these items.
        """
        if logits.shape != (len(targets), self.item_tokens.n_items):
            raise ValueError(f"logits {tuple(logits.shape)} for {len(targets)} x {self.item_tokens.n_items} items")
        scores = _Scores.of(self._allowed(logits, targets, history), self.trie.order, self.beta, self.standardise)
        trie, width = self.trie, len(self.trie.order) + 1
        room = self._buffers(len(scores.ordered), width)
        of_items = scores.masses(room[0])
        sums = torch.cumsum(of_items, 1, out=room[1]).view(-1)
        rows = positions.samples * width
        low, high = (sums[rows + ends[positions.nodes]] for ends in (trie.starts, trie.ends))
        masses = high - low
        places = trie.starts.index_select(0, children.nodes).add_(rows.index_select(0, children.positions))
        below = sums.index_select(0, places)
        # Children are neighbours: where one ends the next begins, and the last ends with its parent.
        found = torch.empty_like(below)
        torch.sub(below[1:], below[:-1], out=found[:-1])
        last = children.offsets[1:] - 1
        found[last] = high - below[last]
        wholes = sums[rows + (width - 1)]
        few = (found <= (FEW * wholes).index_select(0, children.positions)).nonzero().squeeze(1)
        if len(few):
            found[few] = self._summed(of_items.view(-1), children.nodes[few], places[few])
        found.div_(masses.clamp(min=1e-300).index_select(0, children.positions))
        forced = children.offsets.diff() == 1
        found[children.offsets[:-1][forced]] = 1.0
        small = ((masses <= SMALL * wholes) & ~forced).nonzero().squeeze(1)
        if len(small):
            entries = _runs(children.offsets[small], children.offsets.diff()[small])
            found[entries] = self._small(scores, positions, children, entries)
        return found

    def _buffers(self, rows: int, width: int) -> Tensor:
        """Room for a batch's masses and their sums, float64 [2, rows, width]: fresh memory costs as much as they do."""
        if self._room.shape[1] < rows * width:
            self._room = self._room.new_empty(2, rows * width)
        return self._room[:, : rows * width].view(2, rows, width)

    def _allowed(self, logits: Tensor, targets: Tensor, history: Tensor | None) -> Tensor:
        """Rounded logits with -inf for the history's items, float32 [B, n_items]."""
        logits = logits.detach().to(self.dtype).float()
        if history is None:
            return logits
        own = logits.gather(1, targets.unsqueeze(1))
        return logits.scatter(1, history, -torch.inf).scatter_(1, targets.unsqueeze(1), own)

    def _summed(self, masses: Tensor, nodes: Tensor, places: Tensor) -> Tensor:
        """Masses of some nodes, summed over their items alone.

        Args:
            masses: of the items of all samples, float64 [n].
            nodes: int64 [e].
            places: right before the first item of each among the masses, int64 [e].

        Returns:
            float64 [e].
        """
        first, counts = places + 1, self._items_of[nodes]
        # Most have one item: nothing is to be added up.
        found = masses.index_select(0, first)
        several = (counts > 1).nonzero().squeeze(1)
        if len(several):
            counts = counts[several]
            owner = torch.arange(len(several), device=nodes.device).repeat_interleave(counts)
            below = masses.index_select(0, _runs(first[several], counts))
            found[several] = below.new_zeros(len(several)).index_add_(0, owner, below)
        return found

    def _small(self, scores: _Scores, positions: Positions, children: Children, entries: Tensor) -> Tensor:
        """Probabilities by log-sum-exp over the items themselves, for all children of some positions.

        Args:
            scores: of the batch.
            positions, children: all of them.
            entries: the children to do, int64 [e].

        Returns:
            float64 [e].
        """
        nodes, at = children.nodes[entries], children.positions[entries]
        counts = self._items_of[nodes]
        owner = torch.arange(len(entries), device=entries.device).repeat_interleave(counts)
        values = scores.at(positions.samples[at][owner], _runs(self.trie.starts[nodes], counts))
        most = values.new_full((len(positions),), -torch.inf).scatter_reduce_(0, at[owner], values, "amax")
        base = most.where(most > -torch.inf, 0)
        masses = values.new_zeros(len(entries)).index_add_(0, owner, (values - base[at[owner]]).exp())
        wholes = values.new_zeros(len(positions)).index_add_(0, at, masses)[at]
        label = (self.trie.tokens[nodes] == positions.labels[at]).double()
        return torch.where(wholes > 0, masses / wholes.where(wholes > 0, 1), label)

    def to(self, device: torch.device | str) -> CollaborativeTokenizer:
        """One on another device."""
        return CollaborativeTokenizer(
            replace(self.item_tokens.to(device)), self.lm_ids, beta=self.beta, standardise=self.standardise,
            drop_last=self.drop_last, dtype=self.dtype,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class _Scores:
    """Logits of a batch as exponents over beta: ``(ordered - shift) * scale``, at most 0.

    Attributes:
        ordered: logits of the items in the trie's order, and before them one of no item, -inf; float32 [B, 1 + I].
        shift, scale: float64 [B, 1].
    """

    ordered: Tensor
    shift: Tensor
    scale: Tensor

    @classmethod
    def of(cls, logits: Tensor, order: Tensor, beta: float, standardise: bool) -> _Scores:
        """For items in an order: logits float32 [B, n_items], order int64 [I]."""
        ordered = logits.index_select(1, functional.pad(order, (1, 0)))
        ordered[:, 0] = -torch.inf
        # Relative to a row's largest, so that nothing overflows.
        most = ordered.amax(1, keepdim=True).double()
        scale = torch.full_like(most, 1 / beta)
        if standardise:
            # As far as it goes: of rows that are all but constant the inverse is no number.
            scale = (scale / deviations(ordered)).clamp(max=torch.finfo(scale.dtype).max / 2)
        return cls(ordered, most.where(most > -torch.inf, 0), scale)

    def masses(self, out: Tensor) -> Tensor:
        """Exp of the exponents, written to ``out``, float64 [B, 1 + I]."""
        # exp2 takes torch half the time of exp.
        return out.copy_(self.ordered).sub_(self.shift).mul_(self.scale / math.log(2)).exp2_()

    def at(self, rows: Tensor, places: Tensor) -> Tensor:
        """Exponents of items by their places in the order: float64 of the arguments' shape."""
        return (self.ordered[rows, places + 1].double() - self.shift[rows, 0]) * self.scale[rows, 0]


def deviations(logits: Tensor) -> Tensor:
    """The standard deviation of what is finite in each row; 1 where that is constant.

    Args:
        logits: float [B, I].

    Returns:
        float64 [B, 1].
    """
    finite = logits > -torch.inf
    count = finite.sum(1, keepdim=True).clamp(min=1)
    centred = logits.double().where(finite, 0)
    centred = (centred - centred.sum(1, keepdim=True) / count).where(finite, 0)
    deviation = (centred.square().sum(1, keepdim=True) / count).sqrt()
    return deviation.where(deviation > 0, 1)
