"""Tasks that tie the items' tokens to language: titles, descriptions, and what users say."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from recbole_llm.tasks.base import HISTORY, ITEM, TARGET, TITLES, Samples, Task, register

TEXT, INDEX_TO_ITEM, FUSION, QUERY, PREFERENCE = "text", "index2item", "fusionseqrec", "query", "preferenceobtain"
TITLE, DESCRIPTION = "title", "description"
ITEM_TEXTS = (TITLE, DESCRIPTION)


@register
class ItemOfText(Task):
    """The item that a text describes, once for every item with texts of its own; LC-Rec's item2index."""

    name = TEXT
    places: ClassVar[tuple[str, ...]] = ITEM_TEXTS
    reads = ITEM_TEXTS
    switch = "text_task"

    def __len__(self) -> int:
        return len(self.loader.texts.text_items)

    def draw(self, chosen: Tensor) -> Samples:
        """Every item with texts of its own."""
        return Samples.of_items(self.loader.texts.text_items)


@register
class TextOfItem(ItemOfText):
    """The text of an item; LC-Rec's index2item."""

    name = INDEX_TO_ITEM
    places = (ITEM,)
    answers = ITEM_TEXTS
    answer = "{title}"
    switch = ""


@register
class FusedSequential(Task):
    """The next item where either the history or the answer is text; LC-Rec's fusionseqrec.

    Samples are prefixes of users' train items whose next item has texts of its own, ``fusion_samples`` of them, drawn
    anew for each epoch; by default as many as the sequential task has.
    """

    name = FUSION
    places = (HISTORY, TITLES)
    answers = (TARGET, *ITEM_TEXTS)
    reads = ITEM_TEXTS

    def __len__(self) -> int:
        limit = self.loader.config["fusion_samples"]
        return min(len(self._eligible()), self.loader.prefixes if limit is None else limit)

    def _eligible(self) -> Tensor:
        named = torch.isin(self.loader.items[self.loader.stops], self.loader.texts.text_items)
        return named.nonzero().squeeze(1)

    def draw(self, chosen: Tensor) -> Samples:
        """Prefixes at random."""
        loader, eligible = self.loader, self._eligible()
        order = torch.randperm(len(eligible), generator=loader.generator)[: len(self)]
        starts, stops = loader.starts[eligible[order]], loader.stops[eligible[order]]
        targets = loader.items[stops]
        return Samples(starts, stops, targets, targets)


@register
class ItemOfQuery(Task):
    """The item that a user means, once for every train row with a review; LC-Rec's itemsearch.

    It is arXiv 2412.13771's task C. The history that a template may show beside the query is what the user had before
    that row.
    """

    name = QUERY
    places = (QUERY, HISTORY)
    reads = (QUERY,)
    switch = "query_task"

    def __len__(self) -> int:
        return len(self.loader.texts.query_places)

    def draw(self, chosen: Tensor) -> Samples:
        """Every train row with a review."""
        loader, stops = self.loader, self.loader.texts.query_places
        starts = loader.shown_before(loader.owners[stops], stops)
        return Samples(starts, stops, torch.arange(len(stops)), loader.items[stops])


@register
class Preference(Task):
    """What a user says of his taste, once for every user who says something; LC-Rec's preferenceobtain.

    Of a user who says several things one is drawn anew for each epoch. The history ends with the row that it was said
    of; with his last train item where it was said of none.
    """

    name = PREFERENCE
    places = (HISTORY,)
    answers = ("preference",)
    answer = "{preference}"
    reads = ("preference",)

    def __len__(self) -> int:
        return len(self._users().unique())

    def _users(self) -> Tensor:
        # A history ends behind its last item, so that it is the item before that tells the user.
        return self.loader.owners[self.loader.texts.preference_stops - 1]

    def draw(self, chosen: Tensor) -> Samples:
        """A text of every user who has one."""
        loader, users = self.loader, self._users()
        order = torch.randperm(len(users), generator=loader.generator)
        order = order[users[order].argsort(stable=True)]
        first = torch.ones(len(order), dtype=torch.bool)
        first[1:] = users[order][1:] != users[order][:-1]
        said = order[first]
        stops = loader.texts.preference_stops[said]
        return Samples(loader.shown_before(users[said], stops), stops, said, loader.items[stops - 1])
