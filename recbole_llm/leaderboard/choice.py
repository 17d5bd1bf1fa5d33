"""Settings of a row that are chosen on valid: every value runs with the first seed, the best one with all seeds.

That the first seed alone decides is a saving: it costs a run a value, not a run a value and seed. Test has no say.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError

# More than this are a search, which recbole-llm tune does better.
MOST = 64


def choices_of(where: str, choose: Any) -> list[dict[str, Any]]:
    """What a row's ``choose`` stands for.

    Args:
        where: to call it in errors.
        choose: setting to a list of values; ``None`` for a row that leaves nothing open.

    Returns:
        Every combination of values, by setting, in the order given; one without any where nothing is open.

    Raises:
        UserError: it is no mapping to lists of two different values or more, or has too many combinations.
    """
    if choose is None:
        return [{}]
    if not isinstance(choose, Mapping) or not choose:
        raise UserError(f"{where} should read `setting: [value, value]`, but is {choose!r}")
    for key, values in choose.items():
        several = isinstance(values, list) and len(values) > 1
        if not several or len({json.dumps(value) for value in values}) < len(values):
            raise UserError(f"{where}.{key} should be a list of two different values or more, but is {values!r}")
    made = [dict(zip(choose, values, strict=True)) for values in itertools.product(*choose.values())]
    if len(made) > MOST:
        raise UserError(f"{where} has {len(made)} combinations, more than {MOST}; search them with recbole-llm tune")
    return made


def label(values: Mapping[str, Any]) -> str:
    """``alpha 0.1, tau 2.0``."""
    return ", ".join(f"{key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def decide(
    tried: Sequence[tuple[Mapping[str, Any], Path | None, str]], metric: str, seed: int
) -> dict[str, Any] | None:
    """Choose by what the runs of the first seed have on valid.

    Args:
        tried: of every combination its values, its result where it ended well, and why it has none where it failed.
        metric: lower case, e.g. ``ndcg@10``.
        seed: the first.

    Returns:
        ``values`` (the best; of equal ones the first; ``None`` where no run has the metric on valid), ``metric``,
        ``seed`` and ``tried``: ``values``, ``valid`` and ``reason`` (empty, or why there is no figure) of each.
        ``None`` as long as a run has neither a result nor a reason.
    """
    if any(file is None and not reason for _, file, reason in tried):
        return None
    lines: list[dict[str, Any]] = []
    for values, file, reason in tried:
        valid = json.loads(file.read_text(encoding="utf-8"))["valid"].get(metric) if file else None
        why = reason if file is None else "" if valid is not None else f"it has no {metric} on valid"
        lines.append({"values": dict(values), "valid": valid, "reason": why})
    known = [line for line in lines if line["valid"] is not None]
    best = max(known, key=lambda line: line["valid"])["values"] if known else None
    return {"values": best, "metric": metric, "seed": seed, "tried": lines}


def sentence(name: str, choice: Mapping[str, Any], figure: Callable[[float | None], str]) -> str:
    """What was chosen for a row, among what, in words.

    Args:
        name: of the row.
        choice: from :func:`decide`.
        figure: how a value is written.
    """
    listed = ", ".join(
        f"{label(line['values'])}: {figure(line['valid']) if line['valid'] is not None else 'failed'}"
        for line in choice["tried"]
    )
    taken = "nothing" if choice["values"] is None else label(choice["values"])
    return (
        f"{name}: {taken}, chosen by {choice['metric']} on valid, never on test, with seed {choice['seed']} alone "
        f"({listed})."
    )
