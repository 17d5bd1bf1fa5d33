"""Instruction prompts in which items stand as tokens: templates from a file, laid out over token ids.

Whatever a prompt can hold (fixed text, an item's tokens, an item's title) is a segment, tokenised once. Segments
have one numbering and a prompt is a run of numbers, so a batch is one gather: no loop over rows, items or tokens.
Tokens of items are pasted as ids and text is encoded as plain text, so nothing that a title or a review spells can
become one. A token that the model is to learn carries :data:`LABEL` until the batch is padded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Generator, Tensor

from recbole_llm.data.prompt_room import PromptRoom
from recbole_llm.data.prompts import Ragged, join
from recbole_llm.data.token_table import Segments, TokenTable
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.schema import properties_dir, read_yaml

LABEL = 1 << 40
PLACE = re.compile(r"\{(\w+)\}")
HISTORY, INSTRUCTION = "history", "instruction"
SEQUENTIAL, NEGATIVE, TEXT, QUERY, INFERENCE = "sequential", "negative", "text", "query", "inference"
# What a task's templates can speak of; each must name one at least.
PLACES = {
    SEQUENTIAL: (HISTORY,), NEGATIVE: (HISTORY,), TEXT: ("title", "description"), QUERY: ("query",),
    INFERENCE: (HISTORY,),
}  # fmt: skip
TASKS = tuple(PLACES)


@dataclass(frozen=True)
class Templates:
    """The wording of all tasks.

    Attributes:
        wrapper: around every instruction.
        separator: between two items of a history.
        tasks: the templates of each task, that of inference among them.
    """

    wrapper: str
    separator: str
    tasks: dict[str, tuple[str, ...]]

    def instructions(self, task: str, given: Sequence[str], only_first: bool = False) -> list[str]:
        """The whole prompts of a task, with their places.

        Args:
            task: one of :data:`TASKS`.
            given: places that there is something for; a template that needs another is left out.
            only_first: the first of them alone.

        Raises:
            UserError: nothing is left.
        """
        usable = [text for text in self.tasks[task] if set(PLACE.findall(text)) <= set(given)]
        if not usable:
            raise UserError(f"prompts: no template of the task {task} does with {', '.join(given) or 'nothing'}")
        return [self.wrapper.replace("{instruction}", text) for text in (usable[:1] if only_first else usable)]


def read_templates(name: str) -> Templates:
    """Templates from a file of ``properties/prompts`` or a file of the user's.

    Args:
        name: the shipped file's name without its ending, or a path that ends in ``.yaml``.

    Raises:
        UserError: there is no such file, a task is missing, or a template names a place that its task does not have.
    """
    folder = properties_dir() / "prompts"
    file = Path(name) if name.endswith(".yaml") else folder / f"{name}.yaml"
    if not file.is_file():
        known = [path.stem for path in folder.glob("*.yaml")]
        raise UserError(
            f"prompts: there is no '{name}'{did_you_mean(name, known)} ({', '.join(known)} or a .yaml file)"
        )
    values = read_yaml(file)
    tasks = {}
    for key in ("wrapper", "separator", *TASKS):
        if key not in values:
            raise UserError(f"{file} says nothing for '{key}'")
    for task in TASKS:
        texts = values[task] if isinstance(values[task], list) else [values[task]]
        for text in texts:
            _check(file, task, str(text), PLACES[task])
        tasks[task] = tuple(str(text) for text in texts)
    _check(file, "wrapper", values["wrapper"], (INSTRUCTION,))
    return Templates(values["wrapper"], values["separator"], tasks)


def _check(file: Path, key: str, text: str, places: Sequence[str]) -> None:
    named = PLACE.findall(text)
    wrong = [place for place in named if place not in places]
    if wrong or not named or len(set(named)) < len(named):
        wanted = ", ".join(f"{{{place}}}" for place in places)
        raise UserError(f"{file}, {key}: {text!r} should name {wanted} once at most, and no other place")


@dataclass(frozen=True)
class TokenBatch:
    """Prompts with their answers, and where the loss is read.

    Attributes:
        ids: int64 ``[B, T]``, filled up on the right with any token.
        rows: int64 ``[L]``, ascending; the prompt of each label.
        places: int64 ``[L]``, the position within the prompt from whose state the label is told.
        labels: int64 ``[L]``, token ids.
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    labels: Tensor

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same on a device."""
        parts = (self.ids, self.rows, self.places, self.labels)
        return TokenBatch(*(part.to(device, non_blocking=True) for part in parts))

    def targets_count(self) -> int:
        """How many labels there are."""
        return len(self.labels)

    def share(self, rank: int, count: int) -> TokenBatch:
        """The prompts of one of ``count`` processes."""
        mine = self.rows % count == rank
        return TokenBatch(
            self.ids[rank::count], self.rows[mine] // count, self.places[mine], self.labels[mine]
        )  # fmt: skip


class InstructionWriter:
    """Lays out prompts of several templates at once.

    Args:
        prompts: whole templates by task, from :meth:`Templates.instructions`.
        encode: many texts to their token ids, without special tokens.
        bos_id: opens every prompt where the language model has one.
        eos_id: ends every answer.
        items: the language model's ids of each item's tokens, one row an item.
        separator: between two items of a history.
        texts: what stands for each other place: token ids, one row a source.
        label_history: whether the tokens of shown items, but the first, are labels too in the sequential task.

    Attributes:
        too_long: how many prompts were left out or made shorter (:meth:`leave_room`), by task; to be cleared by its
            reader.
    """

    def __init__(
        self,
        prompts: Mapping[str, Sequence[str]],
        encode: Callable[[list[str]], list[list[int]]],
        *,
        bos_id: int | None,
        eos_id: int,
        items: Ragged,
        separator: str,
        texts: Mapping[str, TokenTable],
        label_history: bool = False,
    ) -> None:
        self._first: dict[str, int] = {}
        self._count: dict[str, int] = {}
        self.too_long: Counter[str] = Counter()
        self._room: PromptRoom | None = None
        flat: list[str] = []
        for task, templates in prompts.items():
            self._first[task], self._count[task] = len(flat), len(templates)
            flat += templates
        self._task_of = [task for task, templates in prompts.items() for _ in templates]
        names = [PLACE.findall(text) for text in flat]
        width = max(map(len, names))
        fixed = [PLACE.split(text)[::2] for text in flat]
        pieces = encode([text for texts in fixed for text in texts])
        opens = 0
        self._pieces = torch.zeros(len(flat), width + 1, dtype=torch.long)
        self._kinds = torch.zeros(len(flat), width, dtype=torch.long)
        kinds = [HISTORY, *texts]
        for row, (parts, places) in enumerate(zip(fixed, names)):
            if bos_id is not None:
                pieces[opens] = [bos_id, *pieces[opens]]
            # Segment 0 is empty: what a shorter template has in the places that it lacks.
            self._pieces[row, : len(parts)] = torch.arange(opens, opens + len(parts)) + 1
            self._kinds[row, : len(places)] = torch.tensor([kinds.index(place) + 1 for place in places])
            opens += len(parts)
        count, gap = len(items), encode([separator])[0]
        between = Ragged.from_lengths(torch.tensor(gap, dtype=torch.long).repeat(count), torch.full((count,), len(gap)))
        end = Ragged.from_lengths(torch.full((count,), eos_id), torch.ones(count, dtype=torch.long))
        labels = Ragged(items.values + LABEL, items.offsets)
        tables = [
            Ragged.from_lists([[], *pieces]),
            items,
            join([between, items]),
            join([between, labels]),
            join([labels, Ragged(end.values + LABEL, end.offsets)]),
        ]
        self._segments = Segments([*tables, *texts.values()])
        bases = self._segments.bases
        self._bare, self._answer = int(bases[1]), int(bases[4])
        labelled = torch.zeros(len(flat), dtype=torch.long)
        if label_history and SEQUENTIAL in self._first:
            labelled[self._first[SEQUENTIAL] :][: self._count[SEQUENTIAL]] = 1
        # Every item of a history but the first, by template.
        self._next = bases[2:4][labelled]
        # By kind of place: nothing, a history, and the texts.
        self._bases = torch.cat([torch.zeros(2, dtype=torch.long), bases[5:-1]])
        self._per_item = int(tables[2].lengths.max())
        self._fixed = self._segments.lengths_of(self._pieces).sum(1) + int(tables[4].lengths.max())
        widest = [0, 0, *(table.longest for table in texts.values())]
        self._filled = torch.tensor(widest)[self._kinds].sum(1)
        self._answer_length = int(tables[4].lengths.max())
        ranges = list(pairwise(bases.tolist()))
        self._shown = [(*ends, self._bare) for ends in ranges[1:4]]
        self._of_texts = ranges[5:]

    def longest(self, history_length: int) -> int:
        """Tokens of the longest prompt with its answer that there can be."""
        shown = (self._kinds == 1).any(1).long() * (history_length * self._per_item)
        return int((self._fixed + self._filled + shown).max())

    def shortest(self) -> int:
        """Tokens of the longest prompt with its answer when all has gone that can: all items but one, all text."""
        return int((self._fixed + (self._kinds == 1).any(1).long() * self._per_item).max())

    def leave_room(self, tokens: int, drop: bool) -> None:
        """Let no prompt with its answer have more tokens than this.

        Args:
            tokens: at least :meth:`shortest`.
            drop: whether samples of training are left out rather than made shorter; what is asked at inference is made
                shorter in any case.
        """
        self._room = PromptRoom(tokens, self._segments, self._shown, self._of_texts, drop)

    def draw(self, tasks: Tensor, generator: Generator) -> Tensor:
        """A template for each sample: int64 ``[B]``.

        Args:
            tasks: places in :data:`TASKS`, int64 ``[B]``; all of them have templates.
            generator: the source of all randomness.
        """
        first = torch.tensor([self._first.get(task, 0) for task in TASKS])[tasks]
        count = torch.tensor([self._count.get(task, 1) for task in TASKS])[tasks]
        return first + (torch.rand(len(tasks), generator=generator, dtype=torch.double) * count).long()

    def lengths(self, tasks: Tensor, counts: Tensor, sources: Tensor) -> Tensor:
        """About how many tokens samples will have: int64 ``[B]``.

        Args:
            tasks: int64 ``[B]``.
            counts: items of each history.
            sources: as for :meth:`write`.
        """
        templates = torch.tensor([self._first.get(task, 0) for task in TASKS])[tasks]
        kinds = self._kinds[templates]
        # What is no text is segment 0, which is empty.
        texts = self._segments.lengths_of(self._bases[kinds] + sources.unsqueeze(1) * (kinds > 1))
        return self._fixed[templates] + texts.sum(1) + (kinds == 1).any(1) * counts * self._per_item

    def write(self, templates: Tensor, histories: Ragged, sources: Tensor, targets: Tensor) -> TokenBatch:
        """Prompts with their answers.

        Args:
            templates: int64 ``[B]``, from :meth:`draw`.
            histories: items, oldest first, one row a prompt; read by templates with a history.
            sources: int64 ``[B]``, the row of the texts, for templates with one.
            targets: int64 ``[B]``, the items to answer with.

        Returns:
            A batch of these rows, or of those that there is room for.
        """
        runs = join([self._runs(templates, histories, sources), _column(self._answer + targets)])
        padded = self._fitted(runs, templates, self._room is not None and self._room.drop).padded(0)
        rows, places = (padded[:, 1:] >= LABEL).nonzero(as_tuple=True)
        ids = padded & (LABEL - 1)
        # The end token itself is read from nowhere.
        return TokenBatch(ids[:, :-1], rows, places, ids[rows, places + 1])

    def ask(self, histories: Ragged) -> Ragged:
        """The prompts of inference: token ids, one row a history."""
        templates = torch.full((len(histories),), self._first[INFERENCE])
        asked = self._fitted(self._runs(templates, histories, torch.zeros_like(templates)), templates, answered=False)
        return Ragged(asked.values & (LABEL - 1), asked.offsets)

    def _fitted(self, runs: Ragged, templates: Tensor, drop: bool = False, answered: bool = True) -> Ragged:
        """Tokens of prompts, those that are too long left out or made shorter."""
        if self._room is None:
            return self._tokens(self._segments.take(runs.values), runs)
        tokens = self._room.tokens - (0 if answered else self._answer_length)
        long = self._room.too_long(runs, tokens) > 0
        if long.any():
            self.too_long.update(self._task_of[template] for template in templates[long].tolist())
        if drop:
            runs = runs.take((~long).nonzero().squeeze(1))
            return self._tokens(self._segments.take(runs.values), runs)
        runs, cuts = self._room.shorten(runs, tokens)
        taken = self._segments.take(runs.values)
        return self._tokens(taken.keep(taken.positions < (taken.lengths - cuts)[taken.rows]), runs)

    @staticmethod
    def _tokens(taken: Ragged, runs: Ragged) -> Ragged:
        """Tokens by prompt from tokens by segment."""
        return Ragged(taken.values, taken.offsets[runs.offsets])

    def _runs(self, templates: Tensor, histories: Ragged, sources: Tensor) -> Ragged:
        """Segment numbers, one row a prompt."""
        parts = [_column(self._pieces[templates, 0])]
        bases = torch.where(histories.positions == 0, self._bare, self._next[templates][histories.rows])
        shown = Ragged(histories.values + bases, histories.offsets)
        for slot in range(self._kinds.shape[1]):
            kinds = self._kinds[templates, slot]
            parts.append(shown.keep((kinds == 1)[shown.rows]))
            text = kinds > 1
            parts.append(Ragged.from_lengths((self._bases[kinds] + sources)[text], text.long()))
            parts.append(_column(self._pieces[templates, slot + 1]))
        return join(parts)


def _column(values: Tensor) -> Ragged:
    """One value a row."""
    return Ragged.from_lengths(values, torch.ones_like(values))
