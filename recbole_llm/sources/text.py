"""Raw text to what an atomic file can hold: one line, no tabs, no HTML, UTF-8."""

from __future__ import annotations

import html
import re
from typing import Any

# Fragments of pages: whole scripts and style sheets go, of other elements the tags. "<3" and "a <b and c> d" are text.
_INVISIBLE = re.compile(r"<(script|style)\b[^>]*>.*?(</\1\s*>|$)|<!--.*?(-->|$)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"""</?[A-Za-z][A-Za-z0-9]*(\s+[\w:-]+\s*=\s*("[^"]*"|'[^']*'|[^\s"'<>]+))*\s*/?>""")
# Those that str.split() does not take for white space.
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# What the pages of Amazon 2018 left in place of a title.
_JUNK = ("getTime", "var aPageStart", "var ue_t0")


def clean(text: str) -> str:
    """A text as it stands in an atomic file, where :func:`recbole_llm.data.item_text.read_columns` finds it again.

    Entities are resolved and tags taken out; every run of white space and control characters is one space; half a
    surrogate pair, which is no character, is U+FFFD. Quotes and everything else stay.
    """
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(" ", _INVISIBLE.sub(" ", text))
    if not text.isprintable():
        text = _CONTROL.sub(" ", text)
    text = " ".join(text.split())
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def cut(text: str, length: int | None) -> str:
    """The first characters of a cleaned text."""
    return text if length is None else text[:length].rstrip()


def is_page_junk(title: str) -> bool:
    """Whether a title is a piece of a page's script, as in rows of Amazon 2018 that were not parsed."""
    return any(mark in title for mark in _JUNK)


def flat(value: Any, separator: str = " ") -> str:
    """A JSON value as text: lists are joined, whatever is no text or number is empty."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return separator.join(filter(None, (flat(part, separator).strip() for part in value)))
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else ""


def headed(head: str, body: str) -> str:
    """A review with its heading in front, as one text."""
    head, body = head.strip(), body.strip()
    if not head or body.startswith(head):
        return body
    return f"{head}{'' if head[-1] in '.!?:' else '.'} {body}".strip() if body else head


def is_id(raw_id: Any) -> bool:
    """Whether a raw id can stand in an atomic file, where it is read as it is; ``[PAD]`` is RecBole's own."""
    return isinstance(raw_id, str) and bool(raw_id) and raw_id.isprintable() and raw_id == raw_id.strip() != "[PAD]"
