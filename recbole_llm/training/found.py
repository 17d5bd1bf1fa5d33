"""A run found again: its settings and its stages, with nothing trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from recbole_llm import registry
from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.keys import known_keys
from recbole_llm.training.run_files import cache_of, read_result
from recbole_llm.training.store import Stage, StageStore, damage

# What a Config works out by itself, and what says where a run's files go: no settings to hand on.
_DERIVED = frozenset({
    "model", "dataset", "config_files", "MODEL_TYPE", "MODEL_INPUT_TYPE", "eval_type", "device", "single_spec",
    "local_rank", "tensorboard_dir", "checkpoint_dir", "data_path", "valid_neg_sample_args", "test_neg_sample_args",
    "repeatable", "result_file",
})  # fmt: skip
# A setting that names others (a recipe, a language model) moves defaults; theirs name none.
_ROUNDS = 4
SCHEDULE = "schedule_epochs"
# Settings that came later, and what runs that say nothing of them did.
_LATER = {"score_end": False}


class FoundStages(StageStore):
    """A stage cache that is looked at and never changed, so that it may be another's, or for reading only.

    Args:
        root: the cache folder.
        stages: fingerprints of the run that is looked for.
    """

    def __init__(self, root: Path, stages: Collection[str] = ()) -> None:
        super().__init__(root)
        self._stages = stages

    def _known_by(
        self, name: str, version: int, inputs: Mapping[str, Any], formerly: Mapping[str, Any] | None
    ) -> Mapping[str, Any]:
        """The cache may have both, and the run is of one."""
        if formerly is not None and self.place(name, version, formerly)[0] in self._stages:
            return formerly
        return super()._known_by(name, version, inputs, formerly)

    def _find_or_make(
        self, name: str, version: int, inputs: Mapping[str, Any], make: Callable[[Path], dict[str, Any]]
    ) -> Stage:
        mark, final = self.place(name, version, inputs)
        if not final.exists():
            raise UserError(
                f"{name} of this run is not in the cache {self.root}, or data, settings or the code have changed since "
                "then; run it again"
            )
        found = damage(final, mark)
        if found:
            raise UserError(f"{name} of this run is damaged in the cache ({final}: {found}); run it again")
        return self.stage_at(name, mark, final)


def config_of(result: Mapping[str, Any], **settings: Any) -> Config:
    """The Config of a run, from the settings in its result.

    Args:
        result: the content of its ``result.json``.
        settings: others than the run's, such as ``gpu_id`` or ``data_path``.

    Raises:
        UserError: the run's model, or one of its settings, is not known any more.
    """
    try:
        model, dataset, saved = result["model"], result["dataset"], dict(result["config"])
        data_path = str(Path(saved["data_path"]).parent)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"a result.json that says nothing of {error} is no run's") from None
    model_class = registry.class_of(model, saved)
    parts = tuple(f"{part}." for part in registry.parts_of(model_class))
    wanted = {key: value for key, value in saved.items() if key not in _DERIVED and key not in settings}
    there = known_keys(model, model_class)
    fixed: dict[str, Any] = {key: value for key, value in _LATER.items() if key in there and key not in saved}
    fixed |= {"data_path": data_path, **settings}
    given: dict[str, Any] = {}
    for _ in range(_ROUNDS):
        config = Config(model, dataset, config_dict=given | fixed, command_line=[])
        known, now = known_keys(model, model_class) | set(config.specs), config.as_dict()
        # Only what differs from the defaults, as what is given reaches the parts too, whose defaults are others.
        more = {
            key: value
            for key, value in wanted.items()
            if key not in given and (key in known or key.startswith(parts)) and (key not in now or now[key] != value)
        }
        if not more:
            break
        given |= more
    if SCHEDULE in wanted:
        # The second training of refit_on_valid has it of every model, those with no such setting too.
        config[SCHEDULE] = wanted[SCHEDULE]
    return config


def find_run(path: str | Path, **settings: Any) -> tuple[dict[str, Any], Config, FoundStages]:
    """A run's result, its settings and the cache that its stages are in.

    Args:
        path: its folder or ``result.json``.
        settings: see :func:`config_of`.

    Raises:
        UserError: there is no such run.
    """
    result = read_result(path)
    config = config_of(result, **settings)
    return (
        result,
        config,
        FoundStages(
            cache_of(config, Path(path), settings.get("output_dir")),
            {stage["fingerprint"] for stage in result["stages"]},
        ),
    )
