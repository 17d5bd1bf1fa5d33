"""GLTA's prompts: the four templates, and batches of them put together from token ids by array operations.

A prompt is fixed text with placeholders. The fixed text is tokenised once, a user's or an item's own text once into a
:class:`Ragged` array, and a batch is then laid out by copying runs: no Python loop over rows or tokens. A placeholder
that holds soft tokens (projected graph embeddings) is filled with negative ids: ``-1 - r`` is row ``r`` of the batch's
soft-token table (see :mod:`recbole_llm.backbone.soft_tokens`).

Templates: GLTA (WWW 2025 Companion, arXiv 2502.18757), figures "framework" and "generation".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.errors import UserError

DESCRIPTIONS = "{DESCRIPTION_TOKEN}"
USER = "{USER_TOKEN}"
ITEMS = "{ITEM_TOKEN}"
PROFILE = "{PROFILE_TOKEN}"
PREDICTION = "{PREDICT_TOKEN}"
PLACEHOLDERS = (DESCRIPTIONS, USER, ITEMS, PROFILE, PREDICTION)

# Template (a), item-text alignment.
ITEM_TEXT_ALIGNMENT = (
    "[INST] <<SYS>> Reorder the randomly shuffled descriptions of items in align with item tokens. <</SYS>>\n"
    f"Randomly shuffled descriptions: {DESCRIPTIONS}\n"
    f"Item tokens: {ITEMS} [/INST]"
)

# Between two descriptions; the figure of template (a) prints none, templates (c) and (d) print this one.
SEPARATOR = "; "


def user_item_template(*, items: bool = True, profile: bool = True, prediction: bool = True) -> str:
    """Template (b), user-item alignment and inference, byte for byte as the paper's figure prints it.

    Args:
        items: keep the line of item tokens.
        profile: keep the line of profile tags; the ablation without them leaves the whole line out.
        prediction: keep the line of predicted interests; likewise.

    Returns:
        The template, ending in ``[/INST]``.
    """
    lines = ["[INST] <<SYS>> Select items interacted by the user from given items. <</SYS>>", f"User token: {USER}"]
    if items:
        lines.append(f"Item tokens: {ITEMS} ")  # the blank before the line's end is the figure's own
    if profile:
        lines.append(f"User tags: {PROFILE}")
    if prediction:
        lines.append(f"User's potential interest:{PREDICTION}")
    return "\n".join(lines) + "[/INST]"


def profile_prompt(descriptions: Sequence[str], count: int) -> str:
    """Template (c): asks a language model for ``count`` tags that sum up a user's items."""
    head = f"Use {count} tags to summarize descriptions of the user's interacted items as user profile: "
    return head + SEPARATOR.join(descriptions)


def prediction_prompt(descriptions: Sequence[str], count: int) -> str:
    """Template (d): asks a language model for ``count`` words on what the user may want next.

    The figure prints ``{Desc_1};{Desc_2}; ...``, a separator with and without a blank; with one is used throughout.
    """
    head = f"Use {count} words to predict the user's interests based on descriptions of items interacted: "
    return head + SEPARATOR.join(descriptions)


# All four, for whoever needs their wording (the embedded language model learns from it).
TEMPLATES = (
    ITEM_TEXT_ALIGNMENT,
    user_item_template(),
    profile_prompt([DESCRIPTIONS], 10),
    prediction_prompt([DESCRIPTIONS], 10),
)


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array (CSR).

    Attributes:
        values: int64 ``[N]``, the rows one after the other.
        offsets: int64 ``[R + 1]``; row ``r`` is ``values[offsets[r]:offsets[r + 1]]``.
    """

    values: Tensor
    offsets: Tensor

    @classmethod
    def from_lengths(cls, values: Tensor, lengths: Tensor) -> Ragged:
        """Rows of the given ``lengths`` ``[R]`` over flat ``values`` ``[N]``."""
        return cls(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    @classmethod
    def from_lists(cls, rows: Sequence[Sequence[int]], limit: int | None = None) -> Ragged:
        """Rows from Python lists, each cut to its first ``limit`` values."""
        rows = [row[:limit] for row in rows]
        values = torch.tensor([value for row in rows for value in row], dtype=torch.long)
        return cls.from_lengths(values, torch.tensor([len(row) for row in rows], dtype=torch.long))

    @classmethod
    def from_padded(cls, padded: Tensor, keep: Tensor) -> Ragged:
        """The values of ``padded`` ``[R, T]`` where the boolean ``keep`` ``[R, T]`` holds, in order."""
        return cls.from_lengths(padded[keep], keep.sum(1))

    @classmethod
    def from_slices(cls, values: Tensor, starts: Tensor, stops: Tensor) -> Ragged:
        """Rows ``values[starts[r]:stops[r]]`` of flat ``values``; ``starts`` and ``stops`` are int64 ``[R]``."""
        cut = cls.from_lengths(values, stops - starts)  # only its offsets are of use: they are the result's
        shift = (starts - cut.offsets[:-1]).repeat_interleave(stops - starts)
        return cls(values[torch.arange(len(shift)) + shift], cut.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 ``[R]``."""
        return self.offsets.diff()

    @property
    def rows(self) -> Tensor:
        """int64 ``[N]``: the row that each value belongs to."""
        return torch.repeat_interleave(self.lengths)

    @property
    def positions(self) -> Tensor:
        """int64 ``[N]``: each value's place within its row, from 0."""
        return torch.arange(len(self.values)) - self.offsets[:-1].repeat_interleave(self.lengths)

    def take(self, rows: Tensor) -> Ragged:
        """The given rows (int64 ``[B]``, repeats allowed), in that order."""
        return Ragged.from_slices(self.values, self.offsets[rows], self.offsets[rows + 1])

    def keep(self, mask: Tensor) -> Ragged:
        """The values where ``mask`` (bool ``[N]``) holds; as many rows as before."""
        return Ragged.from_lengths(self.values[mask], torch.bincount(self.rows[mask], minlength=len(self)))

    def padded(self, value: int) -> Tensor:
        """int64 ``[R, longest]``, filled up with ``value`` on the right."""
        width = int(self.lengths.max()) if len(self) else 0
        table = torch.full((len(self), width), value, dtype=torch.long)
        table[self.rows, self.positions] = self.values
        return table


def join(parts: Sequence[Ragged]) -> Ragged:
    """Row by row concatenation of ragged arrays with equally many rows."""
    lengths = torch.stack([part.lengths for part in parts])  # [parts, R]
    whole = Ragged.from_lengths(torch.empty(int(lengths.sum()), dtype=torch.long), lengths.sum(0))
    starts = whole.offsets[:-1] + lengths.cumsum(0) - lengths
    for part, start in zip(parts, starts, strict=True):
        whole.values[part.positions + start.repeat_interleave(part.lengths)] = part.values
    return whole


def soft_ids(rows: Tensor) -> Tensor:
    """The ids that stand for rows of the batch's soft-token table: negative, so that no text can ever be one."""
    return -1 - rows


class Prompt:
    """A template with its fixed text tokenised.

    Args:
        template: text with placeholders out of :data:`PLACEHOLDERS`.
        encode: text to token ids, adding no special token.
        bos_id: opens the prompt when the language model has one.

    Attributes:
        prefix: the token ids before the first placeholder, the same in every prompt of this template.
        names: the placeholders, in order.
    """

    def __init__(self, template: str, encode: Callable[[str], list[int]], bos_id: int | None) -> None:
        pattern = "|".join(re.escape(name) for name in PLACEHOLDERS)
        texts = re.split(pattern, template)
        self.template = template
        self.names: list[str] = re.findall(pattern, template)
        opening = [] if bos_id is None else [bos_id]
        self.prefix: list[int] = opening + encode(texts[0])
        self._after = [torch.tensor(encode(text) if text else [], dtype=torch.long) for text in texts[1:]]

    @property
    def fixed_length(self) -> int:
        """Tokens of fixed text after :attr:`prefix`."""
        return sum(len(piece) for piece in self._after)

    def suffix(self, fills: Mapping[str, Ragged]) -> Ragged:
        """Everything after :attr:`prefix`, for a batch.

        Args:
            fills: for each placeholder the ids that take its place, one row a prompt.

        Returns:
            Token ids, one row a prompt; nothing is cut.
        """
        parts: list[Ragged] = []
        for name, fixed in zip(self.names, self._after, strict=True):
            fill = fills[name]
            parts += [fill, repeated(fixed, len(fill))]
        return join(parts)


def repeated(values: Tensor, rows: int) -> Ragged:
    """The same ``values`` ``[n]`` in each of ``rows`` rows."""
    return Ragged.from_lengths(values.repeat(rows), torch.full((rows,), len(values), dtype=torch.long))


def check_history_length(asked: int, handed_over: int) -> None:
    """Refuse prompts that would show more items than evaluation hands over.

    Args:
        asked: ``history_length``.
        handed_over: ``MAX_ITEM_LIST_LENGTH``.

    Raises:
        UserError: it asks for more.
    """
    if asked > handed_over:
        raise UserError(
            f"history_length {asked} is above MAX_ITEM_LIST_LENGTH {handed_over}; "
            f"set MAX_ITEM_LIST_LENGTH to {asked} as well"
        )
