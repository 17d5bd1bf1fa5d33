"""GLTA's prompts of one batch as index tensors: templates, soft tokens and response slots laid out over token ids.

Templates: GLTA (WWW 2025 Companion, arXiv 2502.18757), figures "framework" and "generation".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor

from recbole_llm.data import prompts
from recbole_llm.data.prompts import Prompt, Ragged, soft_ids
from recbole_llm.model import glta_sampling as sampling

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone

ALIGN_ITEMS = "item_text_alignment"
ALIGN_USERS = "user_item_alignment"


@dataclass(frozen=True)
class PromptBatch:
    """The index tensors of one training step; soft tokens are rows of ``[users ; items]``.

    Attributes:
        ids: int64 ``[B, T]``, the prompts after the shared prefix, then the slots, filled up on the right.
        places: int64 ``[B, S]``, where the states are read: the slots, and shown items that name the one after them.
        users: int64 ``[U]``, users whose projected embedding is a soft token.
        items: int64 ``[M]``, items likewise.
        targets: int64 ``[B, S]``, an item id or -100.
    """

    ids: Tensor
    places: Tensor
    users: Tensor
    items: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same on a device."""
        parts = (self.ids, self.places, self.users, self.items, self.targets)
        return PromptBatch(*(part.to(device, non_blocking=True) for part in parts))

    def targets_count(self) -> int:
        """How many places have a target."""
        return int((self.targets != sampling.IGNORE).sum())

    def share(self, rank: int, count: int) -> PromptBatch:
        """The prompts of one of ``count`` processes; soft tokens keep their rows, so all of them stay."""
        mine = slice(rank, None, count)
        return replace(self, ids=self.ids[mine], places=self.places[mine], targets=self.targets[mine])


@dataclass(frozen=True)
class UserPrompts:
    """Template (b)'s prompts before their slots; soft tokens are rows of ``[users ; items]``.

    Attributes:
        suffix: token ids after the shared prefix, one row a prompt.
        users: int64 ``[U]``, users whose projected embedding is a soft token.
        items: int64 ``[M]``, items likewise, prompt after prompt.
        item_places: int64 ``[M]``, where each of them stands within its row of ``suffix``.
        own: int64 ``[B]``, the id of each prompt's user token; ``None`` without user tokens.
        last: int64 ``[B]``, the id of the last item shown; padding where none is.
    """

    suffix: Ragged
    users: Tensor
    items: Tensor
    item_places: Tensor
    own: Tensor | None
    last: Tensor

    @property
    def soft_rows(self) -> int:
        """How many soft tokens there are."""
        return len(self.users) + len(self.items)


class PromptWriter:
    """Lays out a model's prompts; templates and texts are tokenised once.

    Args:
        config: the run's configuration.
        backbone: the language model, for its tokens.
        slots: response slots of template (b).
        slot_input: what they read; see properties/model/GLTA.yaml.
        history_length: items shown at most.
        user_names: the data set's own user ids, for prompts without user tokens.
        item_texts: descriptions by internal item id; ``None`` without item-text alignment.
        items_per_prompt: items of one prompt of template (a).
        profiles: profile tags by internal user id, one string each; ``None`` leaves their line out.
        predictions: predicted interests likewise.

    Attributes:
        prompts: the templates by stage.
        slot_id: the token that fills up rows, and slots that read nothing.
    """

    def __init__(
        self,
        config: Any,
        backbone: Backbone,
        *,
        slots: int,
        slot_input: str,
        history_length: int,
        user_names: Sequence[str],
        item_texts: Sequence[str] | None,
        items_per_prompt: int,
        profiles: Sequence[str] | None,
        predictions: Sequence[str] | None,
    ) -> None:
        self.config, self.slots, self.slot_input = config, slots, slot_input
        # Some models keep their padding row at zero, which says nothing to attention or normalisation.
        padded = bool(backbone.embed_tokens.weight[backbone.pad_id].any())
        self.slot_id = backbone.pad_id if padded else backbone.eos_id
        template = prompts.user_item_template(
            items=config["history_input"] == "history",
            profile=profiles is not None,
            prediction=predictions is not None,
        )
        self._fills: dict[str, Ragged] = {}
        for name, texts in ((prompts.PROFILE, profiles), (prompts.PREDICTION, predictions)):
            if texts is not None:
                self._fills[name] = Ragged.from_lists([backbone.encode(text) for text in texts], config["text_tokens"])
        if not config["user_alignment"]:
            ids = [backbone.encode(f"user_{token}") for token in user_names]
            self._fills[prompts.USER] = Ragged.from_lists(ids)
        self.prompts = {ALIGN_USERS: Prompt(template, backbone.encode, backbone.bos_id)}
        fills = sum(int(fill.lengths.max()) for fill in self._fills.values())
        self._filled = {ALIGN_USERS: history_length + 1 + slots + fills}
        if item_texts is not None:
            cut = config["alignment_description_tokens"]
            self.descriptions = Ragged.from_lists([backbone.encode(text) for text in item_texts], cut)
            self._separator = torch.tensor(backbone.encode(prompts.SEPARATOR), dtype=torch.long)
            self.prompts[ALIGN_ITEMS] = Prompt(prompts.ITEM_TEXT_ALIGNMENT, backbone.encode, backbone.bos_id)
            each = int(self.descriptions.lengths.max()) + len(self._separator) + 2
            self._filled[ALIGN_ITEMS] = items_per_prompt * each

    def longest(self, stage: str) -> int:
        """Most tokens that a prompt of a stage can take, its slots included."""
        prompt = self.prompts[stage]
        return len(prompt.prefix) + prompt.fixed_length + self._filled[stage]

    def alignment_batch(self, items: Tensor, generator: Generator) -> PromptBatch:
        """Template (a) for items int64 ``[B, m]``: their descriptions shuffled, then their soft tokens."""
        batch, size = items.shape
        order = torch.rand(batch, size, generator=generator).argsort(1)
        described = items.gather(1, order)
        separator = prompts.repeated(self._separator, batch)
        runs: list[Ragged] = []
        for column in described.unbind(1):
            runs += [self.descriptions.take(column), separator]
        rows = torch.arange(batch * size).view(batch, size)
        soft = Ragged.from_lengths(soft_ids(rows).flatten(), torch.full((batch,), size))
        fills = {prompts.DESCRIPTIONS: prompts.join(runs[:-1]), prompts.ITEMS: soft}
        targets, target_rows = items, rows
        if self.config["target_order"] == "description":
            targets, target_rows = described, rows.gather(1, order)
        suffix = self.prompts[ALIGN_ITEMS].suffix(fills)
        ids, places = self.with_slots(suffix, self.slot_ids(batch, size, None, target_rows, batch * size), size)
        return PromptBatch(ids, places, items.new_empty(0), items.flatten(), targets)

    def user_batch(self, users: Tensor, sample: sampling.Sample, hidden: Tensor | None, following: bool) -> PromptBatch:
        """Template (b).

        Args:
            users: int64 ``[B]``.
            sample: what they are shown and asked for.
            hidden: bool ``[B]``, whose user token is not shown; ``None`` shows all.
            following: whether each shown item also names the one after it.
        """
        targets = sampling.slot_targets(sample.targets, self.slots, self.config["target_fill"] == "repeat")
        prompt = self.user_prompts(users, sample.shown, hidden)
        soft_items, named = prompt.items, None
        if self.slot_input == "item":
            # Teacher forcing: a slot reads the target of the slot before it; what a slot without one reads is idle.
            named = prompt.soft_rows + torch.arange(targets.numel()).view(targets.shape)
            soft_items = torch.cat([soft_items, targets.clamp_min(0).flatten()])
        inputs = self.slot_ids(len(users), self.slots, prompt, named)
        ids, places = self.with_slots(prompt.suffix, inputs, self.slots)
        if following and sample.following is not None:
            after = sample.following
            places = torch.cat([places, Ragged(prompt.item_places, after.offsets).padded(0)], 1)
            targets = torch.cat([targets, after.padded(sampling.IGNORE)], 1)
        return PromptBatch(ids, places, prompt.users, soft_items, targets)

    def user_prompts(self, users: Tensor, history: Ragged, hidden: Tensor | None = None) -> UserPrompts:
        """Template (b) for users int64 ``[B]`` and what they are shown; no user token where bool ``[B]`` ``hidden``."""
        if self.config["history_order"] == "random":
            history = sampling.scatter(history, users)
        fills = {name: fill.take(users) for name, fill in self._fills.items()}
        soft_users, own = users.new_empty(0), None
        if self.config["user_alignment"]:
            soft_users, own = users, soft_ids(torch.arange(len(users)))
            if hidden is not None:
                own = own.masked_fill(hidden, self.slot_id)
            fills[prompts.USER] = Ragged.from_lengths(own, torch.ones_like(users))
        rows = torch.arange(len(history.values)) + len(soft_users)
        fills[prompts.ITEMS] = Ragged(soft_ids(rows), history.offsets)
        suffix = self.prompts[ALIGN_USERS].suffix(fills)
        last = torch.full((len(users),), self.slot_id)
        some = history.lengths > 0
        last[some] = soft_ids(rows)[history.offsets[1:][some] - 1]
        # Items are the soft tokens behind the users; the prompts hold them in their own order.
        item_places = suffix.positions[suffix.values < soft_ids(torch.tensor(len(soft_users) - 1))]
        return UserPrompts(suffix, soft_users, history.values, item_places, own, last)

    def slot_ids(
        self, rows: int, slots: int, prompt: UserPrompts | None, named: Tensor | None = None, soft_rows: int = 0
    ) -> Tensor:
        """What the slots of each prompt read.

        Slot 0 is the prompt's own last token and reads nothing more, but where the slots read the user or the last item
        all are alike.

        Args:
            rows: prompts.
            slots: response slots.
            prompt: template (b)'s prompts, if it is these.
            named: int64 ``[rows, slots]``, soft tokens of the items that the slots must name, for ``slot_input: item``.
            soft_rows: soft tokens before the learned slot inputs, if there are any, where there is no ``prompt``.

        Returns:
            int64 ``[rows, slots - 1]``, or ``[rows, slots]`` where slot 0 reads one as well.
        """
        kind = self.slot_input
        if kind == "learned":
            first = soft_rows if prompt is None else prompt.soft_rows
            return soft_ids(first + torch.arange(slots - 1)).expand(rows, -1)
        if kind == "item" and named is not None:
            return soft_ids(named[:, : slots - 1])
        if kind == "user" and prompt is not None and prompt.own is not None:
            return prompt.own.unsqueeze(1).expand(-1, slots)
        if kind == "last" and prompt is not None:
            return prompt.last.unsqueeze(1).expand(-1, slots)
        return torch.full((rows, slots - 1), self.slot_id)

    def with_slots(self, prompt: Ragged, inputs: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The prompts with the slots' inputs behind them: padded ids ``[B, T]``, and places ``[B, slots]``."""
        tail = Ragged.from_padded(inputs, torch.ones_like(inputs, dtype=torch.bool))
        first = prompt.lengths - (slots - inputs.shape[1])
        return prompts.join([prompt, tail]).padded(self.slot_id), first.unsqueeze(1) + torch.arange(slots)
