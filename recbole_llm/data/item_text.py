"""The text of every item, from any columns of a RecBole ``.item`` file, exactly as it stands there.

RecBole splits a ``token_seq`` column into words and remaps each to an id, which loses repeated spaces, quotes, and
titles such as ``NA``. The text that language models read is therefore taken out of band: the file's own characters,
put together by a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from recbole_llm.atomic import open_atomic
from recbole_llm.errors import UserError, did_you_mean

# What the fallback's template may name: the raw id, whatever the file calls its id column.
FALLBACK_COLUMN = "item_id"


# Doubled characters come first; a column's name holds none of the four.
TOKEN = re.compile(r"\[\[|\]\]|\{\{|\}\}|\{[^\[\]{}]*\}|[\[\]{}]|[^\[\]{}]+")
DOUBLED = ("[[", "]]", "{{", "}}")


@dataclass(frozen=True)
class Part:
    """A run of a template that is inserted, or left out, as a whole.

    Attributes:
        pieces: in order, a column's name with ``True`` or a literal with ``False``.
        optional: left out when any of its columns is empty.
    """

    pieces: tuple[tuple[str, bool], ...]
    optional: bool

    def render(self, values: Mapping[str, str]) -> str:
        """The part's text for one item."""
        if self.optional and any(is_empty(values[text]) for text, is_column in self.pieces if is_column):
            return ""
        return "".join(values[text] if is_column else text for text, is_column in self.pieces)


@dataclass(frozen=True)
class Template:
    """A parsed template.

    Attributes:
        parts: its parts in order.
        columns: the columns it names, each once, in order of first use.
    """

    parts: tuple[Part, ...]
    columns: tuple[str, ...]

    def render(self, values: Mapping[str, str]) -> str:
        """The text for one item; what stands in a column is inserted as it is and never read as template."""
        return "".join(part.render(values) for part in self.parts)


@dataclass(frozen=True)
class ItemText:
    """One text for every item.

    Attributes:
        texts: by internal item id; ``texts[0]``, the padding item's, is empty.
        missing: how many items have the fallback text.
        template: the template the texts were made with.
        fallback: the template of the other texts.
        named: by internal item id, whether the text is the item's own (not the fallback's); the padding item's is not.
        dropped: how many of the missing had a text that :func:`recbole_llm.data.text_noise.with_noise` took.
        shuffled: how many have another item's.
    """

    texts: list[str]
    missing: int
    template: str
    fallback: str
    named: tuple[bool, ...] = ()
    dropped: int = 0
    shuffled: int = 0


def item_file(config: Any) -> Path:
    """The file of a run's items."""
    return Path(config["data_path"]) / f"{config['dataset']}.item"


def is_empty(value: str) -> bool:
    """Whether a column says nothing: no character but white space."""
    return not value.strip()


def parse_template(template: str, setting: str = "item_text") -> Template:
    """Parse a template such as ``{movie_title}[ ({release_year})][. Genres: {class}]``.

    ``{column}`` inserts a column. ``[...]`` is left out when any column in it is empty. ``[[``, ``]]``, ``{{`` and
    ``}}`` stand for the single character; doubled characters are read from the left.

    Args:
        template: the template.
        setting: the key it came from, for the message.

    Raises:
        UserError: an unpaired or nested bracket or brace, an empty column name, or an optional part without a column.
    """
    parts: list[Part] = []
    pieces: list[tuple[str, bool]] = []
    opened: int | None = None  # where the optional part being read began
    for match in TOKEN.finditer(template):
        token = match[0]
        problem = _problem(token, opened is not None, pieces)
        if problem:
            raise UserError(f"{setting} {template!r}, character {match.start() + 1}: {problem}")
        if token in ("[", "]"):
            parts.append(Part(tuple(pieces), optional=token == "]"))
            pieces = []
            opened = match.start() if token == "[" else None
        elif token in DOUBLED:
            pieces.append((token[0], False))
        elif token[0] == "{":
            pieces.append((token[1:-1], True))
        else:
            pieces.append((token, False))
    if opened is not None:
        raise UserError(
            f"{setting} {template!r}, character {opened + 1}: '[' without its ']' (write '[[' for a plain bracket)"
        )
    parts.append(Part(tuple(pieces), optional=False))
    columns = dict.fromkeys(text for part in parts for text, is_column in part.pieces if is_column)
    return Template(tuple(parts), tuple(columns))


def _problem(token: str, inside: bool, pieces: Sequence[tuple[str, bool]]) -> str | None:
    """What is wrong with a token after these pieces, inside or outside an optional part."""
    if token == "{":
        return "'{' without its '}' (write '{{' for a plain brace)"
    if token == "}":
        return "'}' without its '{' (write '}}' for a plain brace)"
    if token == "{}":
        return "'{}' names no column"
    if token == "[" and inside:
        return "an optional part inside another (write '[[' for a plain bracket)"
    if token == "]" and not inside:
        return "']' without its '[' (write ']]' for a plain bracket)"
    if token == "]" and not any(is_column for _, is_column in pieces):
        return "an optional part that names no column (write '[[' and ']]' for plain brackets)"
    return None


def read_columns(
    path: Path, id_field: str, columns: Sequence[str], separator: str = "\t", encoding: str = "utf-8"
) -> dict[str, tuple[str, ...]]:
    """Read columns of an atomic file as text, character by character as they stand there.

    Args:
        path: the file; its first line reads ``name:type`` for every column.
        id_field: the column that names the row.
        columns: the columns to read.
        separator: between fields; nothing quotes or escapes it.
        encoding: of the file.

    Returns:
        The columns' texts by raw id. Where an id stands twice its first row counts, as in RecBole.

    Raises:
        UserError: no such file or column, or a file that is broken (line named).
    """
    rows: dict[str, tuple[str, ...]] = {}
    for number, (raw_id, *texts) in read_rows(path, (id_field, *columns), separator, encoding):
        if not raw_id:
            raise UserError(f"{path}, line {number}: column '{id_field}' is empty")
        rows.setdefault(raw_id, tuple(texts))
    return rows


def read_rows(
    path: Path, columns: Sequence[str], separator: str = "\t", encoding: str = "utf-8"
) -> Iterator[tuple[int, list[str]]]:
    """Columns of every row of an atomic file as text, character by character as they stand there.

    Args:
        path: the file; its first line reads ``name:type`` for every column.
        columns: the columns to read.
        separator: between fields; nothing quotes or escapes it.
        encoding: of the file.

    Yields:
        The line's number and its columns' texts.

    Raises:
        UserError: no such file or column, or a file that is broken (line named).
    """
    path = Path(path)
    file = open_atomic(path, separator, encoding)
    places = []
    for column in columns:
        if column not in file.names:
            raise UserError(
                f"{path} has no column '{column}'{did_you_mean(column, file.names)} (it has {', '.join(file.names)})"
            )
        places.append(file.names.index(column))

    # Only "\n" ends a line: str.splitlines would also cut titles at U+2028 and its like.
    for number, line in enumerate(file.data.decode().split("\n")[1:], start=2):
        if line:
            fields = line.split(separator)
            yield number, [fields[place] for place in places]


def read_titles(
    path: Path, id_field: str, template: str, separator: str = "\t", encoding: str = "utf-8"
) -> dict[str, str]:
    """The titles of items: the first column that their text's template names, as it stands in the file.

    Args:
        path: an atomic file of items.
        id_field: its column of raw item ids.
        template: see :func:`parse_template`.
        separator: between fields.
        encoding: of the file.

    Returns:
        Title by raw item id; an item without one is not among them.

    Raises:
        UserError: no such file or column, a broken file, or a template that names no column.
    """
    parsed = parse_template(template)
    if not parsed.columns:
        raise UserError(f"item_text {template!r} names no column, so items have no titles")
    rows = read_columns(path, id_field, parsed.columns[:1], separator, encoding)
    return {name: text for name, (text,) in rows.items() if not is_empty(text)}


def first_words(text: str, count: int) -> str:
    """The text up to the end of its ``count``-th word, its white space kept; the whole text where it has no more."""
    last = next(islice(re.finditer(r"\S+", text), count - 1, None), None)
    if last is None or is_empty(text[last.end() :]):
        return text
    return text[: last.end()]


def load_item_text(
    item_file: Path,
    id_field: str,
    template: str,
    fallback: str,
    id_tokens: Sequence[str],
    max_words: int | None = None,
    separator: str = "\t",
    encoding: str = "utf-8",
) -> ItemText:
    """Make every item's text.

    Args:
        item_file: the data set's ``.item`` file.
        id_field: its column of raw item ids.
        template: how the columns make a text; see :func:`parse_template`.
        fallback: the text of an item that the file does not have, or of which it has nothing but white space in every
            column the template names; ``{item_id}`` is its raw id.
        id_tokens: raw item ids by internal id; the first is the padding item's and gets no text.
        max_words: how many words of a text to keep; ``None`` keeps all.
        separator: between the file's fields.
        encoding: of the file.

    Raises:
        UserError: no such file or column, a broken file, or a template that cannot be read.
    """
    item_file = Path(item_file)
    parsed = parse_template(template)
    if not parsed.columns:
        raise UserError(f"item_text {template!r} names no column: all items would have the same text")
    parsed_fallback = parse_template(fallback, "item_text_fallback")
    for column in parsed_fallback.columns:
        if column != FALLBACK_COLUMN:
            raise UserError(f"item_text_fallback {fallback!r} may name {{{FALLBACK_COLUMN}}} only, not {{{column}}}")
    if not item_file.is_file():
        raise UserError(
            f"data set '{item_file.stem}' has no item text: there is no file {item_file}. Put one there with the "
            f"columns {id_field}:token and {', '.join(parsed.columns)}, or name its own in item_text"
        )
    rows = read_columns(item_file, id_field, parsed.columns, separator, encoding)

    texts, named = [""], [False]
    for raw_id in map(str, id_tokens[1:]):
        row = rows.get(raw_id)
        text = ""
        if row is not None and not all(map(is_empty, row)):
            text = parsed.render(dict(zip(parsed.columns, row, strict=True)))
            if max_words is not None:
                text = first_words(text, max_words)
        if is_empty(text):
            texts.append(parsed_fallback.render({FALLBACK_COLUMN: raw_id}))
            named.append(False)
        else:
            texts.append(text)
            named.append(True)
    return ItemText(texts, len(texts) - 1 - sum(named), template, fallback, tuple(named))
