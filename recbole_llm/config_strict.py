"""What a ``Config`` refuses: keys that nothing knows, values that cannot be, and what does not go together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config_checks import check_negatives, check_split, check_table, check_teacher
from recbole_llm.errors import UserError, did_you_mean, nearest_setting
from recbole_llm.keys import known_keys, other_models_keys, part_specs
from recbole_llm.limits import REFUSED
from recbole_llm.schema import Spec, parse_value


class StrictSettings:
    """The checks of a ``Config``: to stand before RecBole's class among its bases."""

    external_config_dict: dict[str, Any]
    internal_config_dict: dict[str, Any]
    cmd_config_dict: dict[str, Any]
    _specs: dict[str, Spec]

    def _setting(self, key: str) -> Any:
        """As the user has it, else as shipped."""
        return self.external_config_dict.get(key, self.internal_config_dict.get(key))

    def _check_keys(self, model: str, model_class: Any) -> None:
        known = known_keys(model, model_class) | set(self.internal_config_dict) | set(self._specs)
        parts = registry.parts_of(model_class)
        for key in list(self.external_config_dict):
            prefix, dot, rest = key.partition(".")
            if dot:
                self._check_part_key(key, prefix, rest, parts, model)
                continue
            if key not in known:
                # A key of another model deserves a better word than the nearest spelling.
                raise UserError(f"unknown setting '{key}' for {model}{nearest_setting(key, known)}")
            self._check_value(key)

    def _check_beside(self, file: Path, given: Mapping[str, Any], model: str, model_class: Any) -> None:
        """Check the settings that stand beside a data set; they are for every model that reads it.

        Those that only other models have are left out here.
        """
        known = known_keys(model, model_class) | set(self._specs)
        parts = registry.parts_of(model_class)
        for key, value in given.items():
            prefix, dot, own = key.rpartition(".")
            specs, has = (self._part(prefix) if prefix in parts else ({}, set())) if dot else (self._specs, known)
            if own in has:
                _require(f"{file}: {key}", value, specs.get(own))
                continue
            others = known | other_models_keys()
            if own not in others or (dot and prefix not in others):
                near = did_you_mean(key, {f"{prefix}.{other}" for other in others} if prefix in others else others)
                raise UserError(f"{file}: unknown setting '{key}'{near}")
            del self.internal_config_dict[key]

    def _check_part_key(self, key: str, prefix: str, rest: str, parts: tuple[str, ...], model: str) -> None:
        if prefix not in parts:
            owned = f"; its parts: {', '.join(parts)}" if parts else ""
            raise UserError(f"unknown setting '{key}': {model} has no part '{prefix}'{owned}")
        specs, known = self._part(prefix)
        # What stands behind two dots is looked at when that part's own configuration is made.
        if rest not in known and rest.partition(".")[0] not in registry.parts_of(
            registry.get_model(self._setting(prefix))
        ):
            raise UserError(f"unknown setting '{key}' for {self._setting(prefix)}{nearest_setting(rest, known)}")
        if isinstance(self.external_config_dict[key], str):
            self.external_config_dict[key] = parse_value(self.external_config_dict[key], specs.get(rest))
        _require(key, self.external_config_dict[key], specs.get(rest))

    def _part(self, part: str) -> tuple[dict[str, Spec], set[str]]:
        """Types of the keys of the model that is this part, and all keys that it knows."""
        name = self._setting(part)
        kind = registry.get_model(name)
        specs = part_specs(name, kind)
        return specs, known_keys(name, kind) | set(specs)

    def _check_model(self, model: str, model_class: Any) -> None:
        """Refuse what cannot be run, before any work starts."""
        merges = self._merges()
        if self._setting("policy") == "recbole":
            view: str = getattr(model_class, "train_view", "")
            if view or hasattr(model_class, "stages"):
                raise UserError(f"{model} is no model of RecBole's; policy: recbole is for those")
            for own in (*merges, self._withholds()):
                if own:
                    raise UserError(f"{own} needs policy: unified; RecBole has no such protocol")
        elif self._withholds() and self._setting("eval_unit") == "row":
            raise UserError(
                f"{self._withholds()} needs eval_unit: user; a ranking by row may have lost all that stood before it"
            )
        check_negatives(model, model_class, self.external_config_dict, self._setting("loss_type"))
        self._check_parts(model_class)

    def _check_parts(self, model_class: Any) -> None:
        for part in registry.parts_of(model_class):
            name = self._setting(part)
            kind: Any = registry.get_model(name)
            check_split(part, name, self.external_config_dict)
            if part in (*getattr(model_class, "teachers", ()), *getattr(model_class, "guides", ())):
                kind = None if name in REFUSED else kind
                check_teacher(part, name, kind)
                continue
            check_table(part, name, kind, part in getattr(model_class, "item_parts", ()))

    def _merges(self) -> list[str]:
        """The setting that trains on valid rows, in a list; empty where none is set.

        Raises:
            UserError: both are set.
        """
        found = [key for key in ("refit_on_valid", "merge_valid") if self._setting(key)]
        if len(found) > 1:
            raise UserError(
                "refit_on_valid finds the number of epochs on valid rows, merge_valid takes `epochs` as it is: set one"
            )
        return found

    def _withholds(self) -> str:
        """The setting that keeps rows from training, for a message; empty where none does."""
        if self._setting("train_share") < 1:
            return "train_share below 1"
        return "cold_item_share above 0" if self._setting("cold_item_share") > 0 else ""

    def _check_value(self, key: str) -> None:
        value, spec = self.external_config_dict[key], self._specs.get(key)
        if isinstance(value, str):
            from_cli = key in self.cmd_config_dict
            if from_cli or (spec is not None and not spec.allows(value)):
                value = parse_value(value, spec)
                if (
                    isinstance(value, int | float)
                    and spec is not None
                    and not spec.allows(value)
                    and spec.allows(str(value))
                ):
                    value = self.external_config_dict[key]
        if (
            spec is not None
            and isinstance(value, int)
            and not isinstance(value, bool)
            and spec.text.startswith("float")
        ):
            value = float(value)
        _require(key, value, spec)
        self.external_config_dict[key] = value


def _require(key: str, value: Any, spec: Spec | None) -> None:
    if spec is not None and not spec.allows(value):
        raise UserError(f"{key} should be {spec.text}, but is {value!r}")
