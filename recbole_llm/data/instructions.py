"""Instruction prompts in which items stand as tokens: templates laid out over token ids.

Whatever a prompt can hold (fixed text, an item's tokens, an item's title) is a segment, tokenised once. Segments
have one numbering and a prompt is a run of numbers, so a batch is one gather: no loop over rows, items or tokens.
Tokens of items are pasted as ids and text is encoded as plain text, so nothing that a title or a review spells can
become one. A token that the model is to learn carries :data:`LABEL` until the batch is padded, and one of the item that
answers :data:`ANSWER`, of one that is shown :data:`EARLIER` besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from recbole_llm.data.prompt_room import PromptRoom
from recbole_llm.data.prompts import Ragged, join
from recbole_llm.data.templates import INFERENCE, PLACE, Wording
from recbole_llm.data.token_table import Segments, TokenTable
from recbole_llm.tasks import behaviour
from recbole_llm.tasks.base import HISTORY, ITEM, TARGET, TITLES, known_tasks

LABEL, ANSWER, EARLIER = 1 << 40, 1 << 41, 1 << 42


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their answers, and where the loss is read.

    Attributes:
        ids: int64 ``[B, T]``, filled up on the right with any token.
        rows: int64 ``[L]``, ascending; the prompt of each label.
        places: int64 ``[L]``, the position within the prompt from whose state the label is told.
        labels: int64 ``[L]``, token ids.
        answers: bool ``[L]``, the tokens of an item that is the answer; those of a prompt stand in the item's order.
        moments: int64 ``[B]``, where among the train interactions the one is that the answer is of; -1 where none is.
        origins: int64 ``[L]``, the same of the item that a label is a token of, be it the answer or shown; -1 where it
            is of none, or none that is known. An item's labels are neighbours.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    labels: Tensor
    answers: Tensor
    moments: Tensor
    origins: Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same on a device."""
        parts = (self.ids, self.rows, self.places, self.labels, self.answers, self.moments, self.origins)
        return TokenBatch(*(part.to(device, non_blocking=True) for part in parts))

    def targets_count(self) -> int:
        """How many labels there are."""
        return len(self.labels)

    def share(self, rank: int, count: int) -> TokenBatch:
        """The prompts of one of ``count`` processes."""
        mine = self.rows % count == rank
        return TokenBatch(
            self.ids[rank::count], self.rows[mine] // count, self.places[mine], self.labels[mine], self.answers[mine],
            self.moments[rank::count], self.origins[mine],
        )  # fmt: skip


# What can stand in a template's place: nothing, a history, a history of titles; from SINGLE on, one segment.
NOTHING, SHOWN, SHOWN_TITLES, SINGLE = range(4)


class InstructionWriter:
    """Lays out prompts of several templates at once.

    Args:
        prompts: whole templates by task, from :meth:`Templates.instructions`; those of :data:`INFERENCE` for
            :meth:`ask`.
        encode: many texts to their token ids, without special tokens.
        bos_id: opens every prompt where the language model has one.
        eos_id: ends every answer.
        items: the language model's ids of each item's tokens, one row an item.
        separator: between two items of a history.
        texts: what stands for each place of text: token ids, one row a source.
        label_history: whether the tokens of shown items, but the first, are labels too in the sequential task.
        title_separator: between two titles of a history.
        title_tokens: each title of a history is cut to so many tokens.
        answers: tokens of every item as it answers, its end token with them; ``None``, as ``items``, and the language
            model's end token behind the answer.
        prompt_end: closes every prompt, where an encoder reads it; ``None``, the answer follows at once.

    Attributes:
        too_long: how many prompts were left out or made shorter (:meth:`leave_room`), by task; to be cleared by its
            reader.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[Wording]],
        encode: Callable[[list[str]], list[list[int]]],
        *,
        bos_id: int | None,
        eos_id: int,
        items: Ragged,
        separator: str,
        texts: Mapping[str, TokenTable],
        label_history: bool = False,
        title_separator: str = "; ",
        title_tokens: int = 16,
        answers: Ragged | None = None,
        prompt_end: int | None = None,
    ) -> None:
        self._first: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self._bare_count: dict[str, int] = {}
        self.too_long: Counter[str] = Counter()
        self._room: PromptRoom | None = None
        flat: list[Wording] = []
        for task, wordings in prompts.items():
            # A sample without a history is asked by templates without one, which come first. The others stand in the
            # order of their opening words, so that samples of one history that draw alike open alike.
            needs = [bool({HISTORY, TITLES} & set(wording.places)) for wording in wordings]
            self._first[task], self._count[task], self._bare_count[task] = len(flat), len(needs), needs.count(False)
            keys = zip(needs, wordings if task != INFERENCE else needs)
            flat += [wording for _, wording in sorted(zip(keys, wordings), key=lambda pair: pair[0])]

        self._task_of = [task for task, wordings in prompts.items() for _ in wordings]
        gaps = encode([separator, title_separator])
        labels = Ragged(items.values + LABEL, items.offsets)
        own_end = answers is not None
        answers = items if answers is None else answers
        self._item_lengths = items.lengths
        answered = {place for wording in flat for place in PLACE.findall(wording.answer)} - {TARGET}
        titles = Ragged.from_lengths(items.values[:0], torch.zeros_like(items.lengths))
        if any(TITLES in wording.places for wording in flat):
            titles = texts["title"].cut(title_tokens).take(torch.arange(len(texts["title"])))
        pieces = self._pieces_of(flat, encode, bos_id, eos_id, own_end, prompt_end)
        tables: dict[str, Ragged | TokenTable] = {
            "pieces": Ragged.from_lists([[], *(piece for row in pieces for piece in row)]),
            "opening": items,
            ITEM: items,
            "next": _behind(gaps[0], items),
            "next learned": _behind(gaps[0], Ragged(labels.values + EARLIER, labels.offsets)),
            TARGET: Ragged(answers.values + LABEL + ANSWER, answers.offsets),
            TITLES: titles,
            "next title": _behind(gaps[1], titles),
            **texts,
            **{f"answer {place}": texts[place].added(LABEL) for place in answered},
        }
        self._segments = Segments(list(tables.values()))
        bases = dict(zip(tables, self._segments.bases.tolist()))
        singles = [ITEM, TARGET, *texts, *(f"answer {place}" for place in answered)]
        kinds = {HISTORY: SHOWN, TITLES: SHOWN_TITLES} | {name: row for row, name in enumerate(singles, SINGLE)}

        width = max(len(wording.places) for wording in flat)
        self._pieces = torch.zeros(len(flat), width + 1, dtype=torch.long)
        self._kinds = torch.zeros(len(flat), width, dtype=torch.long)
        opens = 1  # segment 0 is empty: what a shorter template has in the places that it lacks
        for row, (parts, wording) in enumerate(zip(pieces, flat)):
            self._pieces[row, : len(parts)] = torch.arange(opens, opens + len(parts))
            asked, told = PLACE.findall(wording.ask), PLACE.findall(wording.answer)
            names = [*asked, *(place if place == TARGET else f"answer {place}" for place in told)]
            self._kinds[row, : len(names)] = torch.tensor([kinds[name] for name in names], dtype=torch.long)
            opens += len(parts)

        labelled = torch.zeros(len(flat), dtype=torch.bool)
        if label_history and behaviour.SEQUENTIAL in self._first:
            labelled[self._first[behaviour.SEQUENTIAL] :][: self._count[behaviour.SEQUENTIAL]] = True
        # The first and every other item of a history, by template and by kind of history.
        nexts = torch.where(labelled, bases["next learned"], bases["next"])
        self._shown = {
            SHOWN: (bases["opening"], nexts),
            SHOWN_TITLES: (bases[TITLES], torch.full_like(nexts, bases["next title"])),
        }
        # By kind of place: where its table begins, and whether its row is the item's rather than the text's.
        self._bases = torch.tensor([0] * SINGLE + [bases[name] for name in singles])
        self._by_item = torch.tensor([name in (ITEM, TARGET) for name in [""] * SINGLE + singles])
        widest = {name: _widest(table) for name, table in tables.items()}
        self._per_shown = torch.tensor([0, widest["next"], widest["next title"]] + [0] * len(singles))
        self._answer_length = widest[TARGET] + (not own_end)
        # By template: wording and single items; texts that answer; texts that are asked about, which can be cut.
        item = torch.tensor([0] * SINGLE + [widest[name] if name in (ITEM, TARGET) else 0 for name in singles])
        self._fixed = self._segments.lengths_of(self._pieces).sum(1) + item[self._kinds].sum(1)
        asked_only = torch.tensor([task == INFERENCE for task in self._task_of])
        self._fixed += asked_only.long() * self._answer_length
        most = {name: widest[name] for name in singles if name not in (ITEM, TARGET)}
        answering = torch.tensor([0] * SINGLE + [0 if name in texts else most.get(name, 0) for name in singles])
        filled = torch.tensor([0] * SINGLE + [most[name] if name in texts else 0 for name in singles])
        self._told, self._filled = answering[self._kinds].sum(1), filled[self._kinds].sum(1)
        ranges = {name: (base, base + len(table)) for (name, base), table in zip(bases.items(), tables.values())}
        openings = {
            "opening": "opening",
            "next": "opening",
            "next learned": "opening",
            TITLES: TITLES,
            "next title": TITLES,
        }
        self._histories = [(*ranges[name], bases[opening]) for name, opening in openings.items()]
        self._of_texts = [ranges[name] for name in texts]

    @staticmethod
    def _pieces_of(
        flat: Sequence[Wording], encode: Callable[[list[str]], list[list[int]]], bos_id: int | None, eos_id: int,
        ended: bool, prompt_end: int | None,
    ) -> list[list[list[int]]]:  # fmt: skip
        """The fixed text of each template between its places; what belongs to the answer is labelled.

        An answer ends with the end token; where items have ended themselves (``ended``) one that is an item has it.
        """
        texts = [(PLACE.split(wording.ask)[::2], PLACE.split(wording.answer)[::2]) for wording in flat]
        encoded = iter(encode([text for asked, told in texts for text in (*asked, *told)]))
        found = []
        for wording, (asked, told) in zip(flat, texts):
            question = [list(next(encoded)) for _ in asked]
            answer = [[token + LABEL for token in next(encoded)] for _ in told]
            if bos_id is not None:
                question[0].insert(0, bos_id)
            if prompt_end is not None:
                question[-1].append(prompt_end)
            if wording.answer and not (ended and wording.answer.endswith(f"{{{TARGET}}}")):
                answer[-1].append(eos_id + LABEL)
            found.append([*question[:-1], question[-1] + answer[0], *answer[1:]])
        return found

    def longest(self, history_length: int) -> int:
        """Tokens of the longest prompt with its answer that there can be."""
        return int(self._longest(history_length).max())

    def longest_asked(self, history_length: int, which: int = 0) -> int:
        """The same of a prompt of inference, at most.

        Args:
            history_length: items that it shows at most.
            which: see :meth:`ask`.
        """
        longest = int(self._longest(history_length)[self._first[INFERENCE] + which])
        return longest if self._room is None else min(longest, self._room.tokens)

    def _longest(self, history_length: int) -> Tensor:
        """By template."""
        shown = self._per_shown[self._kinds].sum(1) * history_length
        return self._fixed + self._told + self._filled + shown

    def shortest(self) -> int:
        """Tokens of the longest prompt with its answer when all has gone that can: all items but one, all text."""
        return int((self._fixed + self._told + self._per_shown[self._kinds].sum(1)).max())

    def leave_room(self, tokens: int, drop: bool) -> None:
        """Let no prompt with its answer have more tokens than this.

        Args:
            tokens: at least :meth:`shortest`.
            drop: whether samples of training are left out rather than made shorter; what is asked at inference is made
                shorter in any case.
        """
        self._room = PromptRoom(tokens, self._segments, self._histories, self._of_texts, drop)

    def draw(
        self, tasks: Tensor, generator: Generator, shown: Tensor | None = None, groups: Tensor | None = None,
        draws: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """A template for each sample: int64 ``[B]``.

        Args:
            tasks: numbers of tasks (:func:`recbole_llm.tasks.number`), int64 ``[B]``; all of them have templates.
            generator: the source of all randomness.
            shown: bool ``[B]``, samples with a history; the others get a template without, where their task has one.
            groups: int64 ``[B]`` from 0; samples of one group draw once.
            draws: float64 ``[B]`` in 0..1, what was drawn before; ``None``, it is drawn here.
        """
        counts = self._by_task(self._count, tasks)
        if shown is not None:
            bare = self._by_task(self._bare_count, tasks)
            counts = torch.where(shown | (bare == 0), counts, bare)
        if draws is None:
            groups = torch.arange(len(tasks)) if groups is None else groups
            draws = torch.rand(int(groups.max()) + 1, generator=generator, dtype=torch.double)[groups]
        return self._by_task(self._first, tasks) + (draws * counts).long()

    def _by_task(self, values: Mapping[str, int], tasks: Tensor) -> Tensor:
        return torch.tensor([values.get(name, 0) for name in known_tasks()])[tasks]

    def lengths(self, tasks: Tensor, counts: Tensor, sources: Tensor) -> Tensor:
        """About how many tokens samples will have: int64 ``[B]``.

        Args:
            tasks: int64 ``[B]``.
            counts: items of each history.
            sources: as for :meth:`write`.
        """
        templates = self._by_task(self._first, tasks)
        kinds = self._kinds[templates]
        # What is no text is segment 0, which is empty.
        text = (kinds >= SINGLE) & ~self._by_item[kinds]
        texts = self._segments.lengths_of(torch.where(text, self._bases[kinds] + sources.unsqueeze(1), 0))
        return self._fixed[templates] + texts.sum(1) + self._per_shown[kinds].sum(1) * counts

    def write(
        self, templates: Tensor, histories: Ragged, sources: Tensor, targets: Tensor, moments: Tensor | None = None,
        shown: Ragged | None = None,
    ) -> TokenBatch:  # fmt: skip
        """Prompts with their answers.

        Args:
            templates: int64 ``[B]``, from :meth:`draw`.
            histories: items, oldest first, one row a prompt; read by templates with a history.
            sources: int64 ``[B]``, the row of the texts, for templates with one.
            targets: int64 ``[B]``, the items asked about or to answer with.
            moments: int64 ``[B]``, what :attr:`TokenBatch.moments` says of them; ``None``, nothing.
            shown: the same of every item of the histories; ``None``, nothing.

        Returns:
            A batch of these rows, or of those that there is room for.
        """
        runs = self._runs(templates, histories, sources, targets)
        written, kept = self._fitted(runs, templates, self._room is not None and self._room.drop)
        padded = written.padded(0)
        rows, places = (padded[:, 1:] >= LABEL).nonzero(as_tuple=True)
        ids, told = padded & (LABEL - 1), padded[rows, places + 1]
        moments = torch.full_like(kept, -1) if moments is None else moments[kept]
        answers, earlier = (told & ANSWER) > 0, (told & EARLIER) > 0
        origins = torch.where(answers, moments[rows], -1)
        if shown is not None:
            counts = torch.bincount(rows[earlier], minlength=len(kept))
            origins[earlier] = self._origins(histories.take(kept), shown.take(kept), counts)
        # The end token itself is read from nowhere.
        return TokenBatch(ids[:, :-1], rows, places, told & (LABEL - 1), answers, moments, origins)

    def _origins(self, histories: Ragged, shown: Ragged, counts: Tensor) -> Tensor:
        """Where the items are from that history labels are tokens of, int64 ``[counts.sum()]``.

        Args:
            histories: items by prompt.
            shown: what is to be said of each.
            counts: labels that stand in each prompt's history, int64 ``[B]``: those of its last items, as what there is
                no room for goes from the front.
        """
        lengths = self._item_lengths[histories.values]
        through = lengths.cumsum(0)
        ends = torch.cat([through.new_zeros(1), through])[histories.offsets[1:]]
        learned = ends[histories.rows] - (through - lengths) <= counts[histories.rows]
        return shown.values[learned].repeat_interleave(lengths[learned])

    def ask(self, histories: Ragged, which: int = 0, sources: Tensor | None = None) -> Ragged:
        """The prompts of inference: token ids, one row a history.

        Args:
            histories: items, oldest first.
            which: of the templates of inference.
            sources: int64 ``[B]``, the row of the texts, for templates with one; ``None``, the first.
        """
        templates = torch.full((len(histories),), self._first[INFERENCE] + which)
        nothing = torch.zeros_like(templates)
        runs = self._runs(templates, histories, nothing if sources is None else sources, nothing)
        asked, _ = self._fitted(runs, templates, answered=False)
        return Ragged(asked.values & (LABEL - 1), asked.offsets)

    def _fitted(
        self, runs: Ragged, templates: Tensor, drop: bool = False, answered: bool = True
    ) -> tuple[Ragged, Tensor]:
        """Tokens of prompts, those that are too long left out or made shorter, and which prompts they are."""
        every = torch.arange(len(runs))
        if self._room is None:
            return self._tokens(self._segments.take(runs.values), runs), every
        tokens = self._room.tokens - (0 if answered else self._answer_length)
        long = self._room.too_long(runs, tokens) > 0
        if long.any():
            self.too_long.update(self._task_of[template] for template in templates[long].tolist())
        if drop:
            every = every[~long]
            runs = runs.take(every)
            return self._tokens(self._segments.take(runs.values), runs), every
        runs, cuts = self._room.shorten(runs, tokens)
        taken = self._segments.take(runs.values)
        return self._tokens(taken.keep(taken.positions < (taken.lengths - cuts)[taken.rows]), runs), every

    @staticmethod
    def _tokens(taken: Ragged, runs: Ragged) -> Ragged:
        """Tokens by prompt from tokens by segment."""
        return Ragged(taken.values, taken.offsets[runs.offsets])

    def _runs(self, templates: Tensor, histories: Ragged, sources: Tensor, targets: Tensor) -> Ragged:
        """Segment numbers, one row a prompt."""
        parts = [_column(self._pieces[templates, 0])]
        first, rows = histories.positions == 0, histories.rows
        for slot in range(self._kinds.shape[1]):
            kinds = self._kinds[templates, slot]
            for kind, (bare, nexts) in self._shown.items():
                there = kinds == kind
                if there.any():
                    bases = torch.where(first, bare, nexts[templates][rows])
                    parts.append(Ragged(histories.values + bases, histories.offsets).keep(there[rows]))
            found = self._bases[kinds] + torch.where(self._by_item[kinds], targets, sources)
            parts.append(_column(torch.where(kinds >= SINGLE, found, 0)))
            parts.append(_column(self._pieces[templates, slot + 1]))
        return join(parts)


def _widest(table: Ragged | TokenTable) -> int:
    """Tokens of a table's longest row; 0 where there is none."""
    if isinstance(table, TokenTable):
        return table.longest
    return int(table.lengths.max()) if len(table) else 0


def _column(values: Tensor) -> Ragged:
    """One value a row."""
    return Ragged.from_lengths(values, torch.ones_like(values))


def _behind(before: Sequence[int], table: Ragged) -> Ragged:
    """The rows of a table, each with the same tokens before it."""
    gap = torch.tensor(before, dtype=torch.long).repeat(len(table))
    return join([Ragged.from_lengths(gap, torch.full((len(table),), len(before))), table])
