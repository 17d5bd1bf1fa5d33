"""What a task of fine-tuning is, and the registry of all tasks.

A task asks the language model one kind of question about the train rows. It says what the templates of its questions
may name, what answers them, and which samples an epoch has; its wording stands in ``properties/prompts``, and a
model's ``tasks`` names those that it trains on. One of the user's own::

    from recbole_llm.tasks import Task, register

    @register
    class Genre(Task):
        name = "genre"
        places = ("item",)
        answers = ("genre",)
        reads = ("genre",)

        def own_texts(self): ...      # {"genre": one text an item}
        def __len__(self): ...        # samples of an epoch
        def draw(self, chosen): ...   # Samples(starts, stops, sources, targets)

His file of templates then has ``genre: [{ask: "Of what genre is {item}?", answer: "{genre}"}]``, and he runs with
``prompts: FILE.yaml`` and ``tasks: [sequential, genre]``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from recbole_llm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from recbole_llm.data.task_loader import TaskLoader

# Places of templates that hold items; all others hold texts.
HISTORY, ITEM, TARGET, TITLES = "history", "item", "target", "titles"
# The vector of the user, or his id, of models that have one.
USER = "user"
# The column of what a sample's template is drawn by, float64 in 0..1; with ``packing: user``.
DRAW = "draw"
ITEM_PLACES = (HISTORY, ITEM, TARGET, TITLES)


@dataclass(frozen=True)
class Samples:
    """Samples of a task; all of them int64 ``[n]``.

    Attributes:
        starts, stops: the history shown is ``items[start:stop]`` of the loader's; equal where there is none.
        sources: the row of the texts that question and answer may name.
        targets: the item asked about or for.
    """

    starts: Tensor
    stops: Tensor
    sources: Tensor
    targets: Tensor

    @classmethod
    def of_items(cls, items: Tensor) -> Samples:
        """A sample an item (int64 ``[n]``), without a history, with the item's own texts."""
        none = torch.zeros_like(items)
        return cls(none, none, items, items)


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.long)


@dataclass
class TaskTexts:
    """What the tasks with text have to go by.

    Attributes:
        texts: by place of a template: ``title`` and ``description`` by internal item id, ``query`` and ``preference``
            by number.
        text_items: items whose texts are all their own, int64.
        query_places: of each query the place of its row among the train histories' items, int64.
        preference_stops: of each preference the end of the history that it was said of, int64.
    """

    texts: dict[str, list[str]] = field(default_factory=dict)
    text_items: Tensor = field(default_factory=_none)
    query_places: Tensor = field(default_factory=_none)
    preference_stops: Tensor = field(default_factory=_none)


class Task:
    """One kind of question; see the module's text.

    Args:
        loader: whose samples they are; it has the train data, the settings and the source of randomness.

    Attributes:
        name: as ``tasks`` and the templates' file name it.
        places: what its questions may name, one at least: ``history`` (a user's items as tokens), ``titles`` (a user's
            items as titles), ``item`` (the tokens of the item asked about), and texts.
        answers: what its answers may name, one at least: ``target`` (the tokens of the item asked for) and texts.
        answer: the answer of a template that gives none.
        reads: texts of which there must be one kind at least; without any the task is left out.
        switch: a setting that leaves the task out where it is false, though ``tasks`` names it.
        sampler: a source of randomness beside the loader's, kept with the state of a run.
    """

    name: ClassVar[str] = ""
    places: ClassVar[tuple[str, ...]] = (HISTORY,)
    answers: ClassVar[tuple[str, ...]] = (TARGET,)
    answer: ClassVar[str] = "{target}"
    reads: ClassVar[tuple[str, ...]] = ()
    switch: ClassVar[str] = ""
    sampler: Any = None

    def __init__(self, loader: TaskLoader) -> None:
        self.loader = loader

    def own_texts(self) -> dict[str, list[str]]:
        """Texts of places that no other task knows, by place; samples name them by their number."""
        return {}

    def __len__(self) -> int:
        """Samples of an epoch, once the loader has its texts; the same in each."""
        raise NotImplementedError

    def draw(self, chosen: Tensor) -> Samples:
        """The samples of an epoch, as many as :meth:`__len__` says.

        Args:
            chosen: the prefixes that this epoch is about, int64 ``[P]``: rows of the loader's ``users``, ``starts`` and
                ``stops``.
        """
        raise NotImplementedError

    @classmethod
    def texts_named(cls) -> set[str]:
        """Places of its questions and answers that hold texts."""
        return {*cls.places, *cls.answers} - set(ITEM_PLACES)


_TASKS: dict[str, type[Task]] = {}


def register(task: type[Task]) -> type[Task]:
    """Make a task known by its name; use it as a decorator.

    Raises:
        ValueError: it has no name, or another class has it.
    """
    if not task.name:
        raise ValueError(f"the task {task.__qualname__} has no name")
    known = _TASKS.get(task.name)
    # A notebook's cell that is run again defines the same class again.
    if known is not None and (known.__module__, known.__qualname__) != (task.__module__, task.__qualname__):
        raise ValueError(f"there is a task '{task.name}' already: {known.__module__}.{known.__qualname__}")
    _TASKS[task.name] = task
    return task


def known_tasks() -> dict[str, type[Task]]:
    """All tasks by name, in the order in which they were registered."""
    return dict(_TASKS)


def number(name: str) -> int:
    """How a task's samples are marked: its place among all tasks."""
    return list(_TASKS).index(name)


def active_tasks(config: Any) -> list[type[Task]]:
    """The tasks that a run trains on.

    Args:
        config: ``tasks``, and the switches that tasks have beside it.

    Raises:
        UserError: a task that nobody registered, or none at all.
    """
    names: Sequence[str] = config["tasks"]
    for name in names:
        if name not in _TASKS:
            raise UserError(f"tasks: there is no '{name}'{did_you_mean(str(name), _TASKS)} ({', '.join(_TASKS)})")
    listed = [_TASKS[name] for name in dict.fromkeys(names)]
    active = [task for task in listed if not task.switch or config[task.switch]]
    if not active:
        raise UserError("tasks: there is nothing to train on; name one at least, such as sequential")
    return active


def check_no_texts(tasks: Sequence[Any]) -> None:
    """Refuse tasks of texts where every prompt tells of the user whose item it asks for.

    Args:
        tasks: that are trained.

    Raises:
        UserError: one reads texts.
    """
    for task in tasks:
        if task.reads:
            raise UserError(f"tasks: {task.name} asks of texts and not of a user, of whom every prompt tells here")


def of_users(samples: Mapping[str, Any], histories: Any) -> dict[str, Any]:
    """Samples of behaviour whose texts are those of the users that the samples are of.

    Args:
        samples: what the train loader yields.
        histories: the train rows.
    """
    names = ("task", "start", "stop", "target", DRAW)
    taken = {name: samples[name] for name in names if name in samples}
    return taken | {"source": torch.from_numpy(histories.owners(taken["stop"].numpy()))}
