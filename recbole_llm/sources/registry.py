"""Names to sources: ours, those that other packages register, and ``module:Class`` of one's own."""

from __future__ import annotations

import importlib
import importlib.metadata

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.sources.amazon import Amazon2018, Amazon2023
from recbole_llm.sources.base import Source
from recbole_llm.sources.goodreads import Goodreads
from recbole_llm.sources.movielens import MovieLens

ENTRY_POINT = "recbole_llm.sources"

SOURCES: dict[str, type[Source]] = {
    "amazon2018": Amazon2018,
    "amazon2023": Amazon2023,
    "goodreads": Goodreads,
    "movielens": MovieLens,
}


def get_source(name: str) -> Source:
    """The source registered under a name, or named as ``module:Class``.

    Args:
        name: as the user wrote it.

    Raises:
        UserError: there is none (with the nearest), or it is no :class:`~recbole_llm.sources.base.Source`.
    """
    points = {point.name: point.value for point in importlib.metadata.entry_points(group=ENTRY_POINT)}
    if name in SOURCES:
        return SOURCES[name]()
    module, colon, attribute = points.get(name, name).partition(":")
    if not (colon and module.strip(".") == module != ""):
        known = [*SOURCES, *points]
        raise UserError(f"unknown source '{name}'{did_you_mean(name, known) or '; sources: ' + ', '.join(known)}")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise UserError(f"source '{name}': there is no module '{error.name}' (is its folder in PYTHONPATH?)") from None
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise UserError(f"source '{name}': {module} has no class {attribute} of a recbole_llm.sources.base.Source")
    lacks = sorted(key for key in ("files", *Source.__annotations__) if _is_open(found, key))
    if lacks:
        raise UserError(f"source '{name}': {attribute} lacks {', '.join(lacks)}; see recbole_llm.sources.base.Source")
    return found()


def _is_open(source: type[Source], key: str) -> bool:
    return key in source.__abstractmethods__ or not hasattr(source, key)
