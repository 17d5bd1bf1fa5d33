"""What a setting may be: types, ranges and choices, read from the comments of the shipped YAML files.

A line ``epochs: 300  # (int >= 0) most training epochs.`` is the default, its check and its documentation at once, so
the three cannot drift apart. RecBole's own files follow the same habit with bare types.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.errors import UserError, did_you_mean

_LINE = re.compile(r"^(?P<key>[A-Za-z_][\w.]*)\s*:[^#]*?(?:\s|:)#\s*\((?P<spec>[^)]*)\)\s*(?P<text>.*)$")
_TYPE = re.compile(r"(int|float)( (>=|>|<=|<) \S+| \S+\.\.\S+)?|str(: .+)?|bool|list|dict|None")
_BASE = {
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "list": lambda value: isinstance(value, list | tuple),
    "dict": lambda value: isinstance(value, dict),
    "None": lambda value: value is None,
}
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt,
}  # fmt: skip


class Loader(yaml.SafeLoader):
    """YAML as RecBole reads it (``1e-3`` is a number), without its way of building Python objects.

    A key that stands twice in a mapping is refused: PyYAML would take the last one without a word.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        """PyYAML's, before ``<<`` is resolved, which may give a key that the mapping has as well."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"'{key.value}' stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return node


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+|\.[0-9_]+(?:[eE][-+]?[0-9]+)?|\.(?:inf|Inf|INF|nan|NaN|NAN))$"),
    list("-+0123456789."),
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """The allowed values of one key.

    Attributes:
        text: the type as written, e.g. ``int >= 1 or None``.
        help: what the key does.
    """

    text: str
    help: str = ""

    def allows(self, value: Any) -> bool:
        """Whether a value fits one of the alternatives."""
        return any(_fits(alternative.strip(), value) for alternative in self.text.split(" or "))

    def is_text_only(self) -> bool:
        """Whether only strings fit, so that a value from the command line needs no parsing."""
        return all(re.match(r"str\b|None\b", alternative.strip()) for alternative in self.text.split(" or "))


def _fits(alternative: str, value: Any) -> bool:
    kind, _, rest = alternative.partition(":")
    if rest:
        choices = [choice.strip() for choice in rest.split("|")]
        return _BASE["str"](value) and value in choices
    words = kind.split()
    base = words[0] if words else "str"
    if base not in _BASE or not _BASE[base](value):
        return False
    if len(words) == 2 and ".." in words[1]:
        low, high = (float(bound) for bound in words[1].split(".."))
        return low <= value <= high
    if len(words) == 3:
        return _COMPARE[words[1]](value, float(words[2]))
    return True


def properties_dir() -> Path:
    """The shipped ``properties/``: beside the package in a checkout, inside it when installed from a wheel."""
    inside = Path(__file__).parent / "properties"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "properties"


@functools.cache
def read_yaml(path: Path) -> dict[str, Any]:
    """:func:`load_yaml`, once a path: of files that nobody writes while a process runs."""
    return load_yaml(path)


def load_yaml(path: Path) -> dict[str, Any]:
    """A settings file as a dictionary.

    Args:
        path: the file.

    Raises:
        UserError: it is missing, broken (line named), or no mapping.
    """
    if path.is_dir():
        raise UserError(f"settings file {path} is a folder")
    if not path.is_file():
        near = sorted(other.name for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise UserError(f"settings file {path} does not exist{did_you_mean(path.name, near)}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path}: should be lines of `key: value`, but is a {type(content).__name__}")
    return {str(key): value for key, value in content.items()}


@functools.cache
def read_specs(path: Path) -> dict[str, Spec]:
    """The types of a shipped file's top-level keys, by its comments."""
    specs = {}
    values = read_yaml(path)
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.match(line)
        if match is None or match["key"] not in values:
            continue
        spec = Spec(_normal(match["spec"]), match["text"].strip())
        default = values[match["key"]]
        if default is None and not spec.allows(None):
            spec = Spec(f"{spec.text} or None", spec.help)
        # Some of RecBole's comments are wrong about their own line; such a key is not checked.
        if spec.allows(default):
            specs[match["key"]] = spec
    return specs


def _normal(spec: str) -> str:
    """RecBole's looser spellings (``list or str``, ``int or list or None``, ``list of str``) in ours."""
    parts = []
    for part in spec.split(" or "):
        base = re.match(r"[A-Za-z]+", part.strip())
        kind = base[0] if base and base[0] in _BASE else "str"
        parts.append(part.strip() if _TYPE.fullmatch(part.strip()) else kind)
    return " or ".join(parts)


def parse_value(text: str, spec: Spec | None) -> Any:
    """A value from the command line: YAML, never Python.

    Args:
        text: what stands behind ``--key=``.
        spec: the key's type, when known: a key that takes only text keeps it as typed.

    Raises:
        UserError: text that is no YAML.
    """
    if spec is not None and spec.is_text_only():
        return None if text in ("", "~", "null", "None") and spec.allows(None) else text
    if text == "" and spec is not None and spec.allows(""):
        return ""
    if text == "None":
        # RecBole's own commands write Python's None; YAML would read the word.
        return None
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        reason = getattr(error, "problem", None)
        raise UserError(f"{text!r} is not a YAML value{f' ({reason})' if reason else ''}") from None
