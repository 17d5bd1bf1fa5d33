"""Settings of ``prepare --source``: defaults, a paper's preset, the command line."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.schema import Spec, parse_value, properties_dir, read_specs, read_yaml
from recbole_llm.sources.filters import check_days

# What a preset has beside settings.
_OF_PRESETS = ("sources", "by_category", "published")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        values: by key, every key of ``properties/sources/overall.yaml``.
        published: figures of the preset's paper for this category; empty where it has none.
    """

    values: dict[str, Any]
    published: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.values[key]


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from the command line and what lies under them.

    Args:
        arguments: ``--key=value``.

    Raises:
        UserError: an unknown key or preset (with the nearest), a value that does not fit, a key given twice, or a
            preset of other data.
    """
    folder = properties_dir() / "sources"
    values, specs = copy.deepcopy(read_yaml(folder / "overall.yaml")), read_specs(folder / "overall.yaml")
    given: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not equals:
            raise UserError(f"{argument!r} is not understood; settings read --key=value, e.g. --source=amazon2018")
        if key not in values:
            raise UserError(f"unknown setting '{key}' of prepare --source{did_you_mean(key, values)}")
        if key in given:
            raise UserError(f"--{key} is given twice")
        given[key] = _checked(key, parse_value(text, specs[key]), specs[key])
    preset = _preset(given.get("preset"), given.get("source"), folder)
    category = given.get("category")
    values |= {key: value for key, value in preset.items() if key not in _OF_PRESETS}
    values |= preset.get("by_category", {}).get(category, {})
    values |= given
    check_days(values)
    return Settings(values, preset.get("published", {}).get(category, {}))


def _checked(key: str, value: Any, spec: Spec) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and spec.allows(float(value)):
        value = float(value)
    if not spec.allows(value):
        raise UserError(f"{key} should be {spec.text}, but is {value!r}")
    return value


def _preset(name: str | None, source: str | None, folder: Any) -> dict[str, Any]:
    if name is None:
        return {}
    known = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "overall")
    if name not in known:
        raise UserError(f"unknown preset '{name}'{did_you_mean(name, known) or '; presets: ' + ', '.join(known)}")
    preset = copy.deepcopy(read_yaml(folder / f"{name}.yaml"))
    if source not in preset["sources"]:
        raise UserError(f"the preset {name} is of --source={' or '.join(preset['sources'])}, not of {source}")
    return preset
