"""``Config``: RecBole's, with our shipped settings, strict keys, YAML values and prefixed keys for parts.

Precedence is RecBole's: shipped YAML < files < dict < command line. Flat keys belong to the named model; ``part.key``
belongs to the recommender that trains as that part, e.g. ``graph_model.epochs`` behind GLTA.
"""

from __future__ import annotations

import copy
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm import compat

compat.install()

from recbole.config import Config as RecBoleConfig  # noqa: E402
from recbole.utils import ModelType  # noqa: E402
from recbole.utils.argument_list import dataset_arguments  # noqa: E402

from recbole_llm import processes, products, registry  # noqa: E402
from recbole_llm.config_checks import (  # noqa: E402
    check_columns,
    check_eval_args,
    check_intervals,
    check_metrics,
    check_training,
)
from recbole_llm.config_strict import StrictSettings  # noqa: E402
from recbole_llm.data.split import SplitProtocol  # noqa: E402
from recbole_llm.errors import UserError, did_you_mean  # noqa: E402
from recbole_llm.evaluation.metrics import USER_METRICS  # noqa: E402
from recbole_llm.keys import RECBOLE_PROPERTIES, base_specs, known_keys, model_files, part_specs  # noqa: E402
from recbole_llm.named_files import check_weights  # noqa: E402
from recbole_llm.refusals import check_models_own, check_runs, check_unread, with_columns  # noqa: E402
from recbole_llm.schema import Spec, load_yaml, parse_value, properties_dir, read_specs, read_yaml  # noqa: E402

# What a part takes from the model it serves: the protocol as it finally stands, and whatever else the user set below.
PROTOCOL_KEYS = (
    "policy", "eval_args", "split_seed", "short_users", "exclude_history", "eval_unit", "refit_on_valid", "metrics",
    "topk", "valid_metric", "metric_decimal_place", "tail_ratio", "eval_max_cells", "seed", "reproducibility",
    "output_dir", "cache", "show_progress", "state", "gpu_id", "use_gpu", "worker", "tensorboard", "log_wandb",
    "wandb_project", "fast_baselines", "train_share", "cold_item_share", "cold_item_choice", "tuned", "cpu_products",
)  # fmt: skip

# RecBole says only "(int)" or "(float)" of them, and a value out of range ends a run somewhere in torch, or not at all.
_RANGES = {
    **dict.fromkeys(
        ("embedding_size", "hidden_size", "inner_size", "n_heads", "num_layers", "n_layers", "MAX_ITEM_LIST_LENGTH"),
        "int >= 1",
    ),
    **dict.fromkeys(
        (
            "hidden_dropout_prob",
            "attn_dropout_prob",
            "dropout_prob",
            "message_dropout",
            "node_dropout",
            "mask_ratio",
            "ft_ratio",
        ),
        "float 0..1",
    ),
    "drop_ratio": "float 0..0.99",
    **dict.fromkeys(("initializer_range", "layer_norm_eps", "ssl_tau"), "float > 0"),
}

# Settings that change no trained number: they stay out of a stage's fingerprint.
NEUTRAL_KEYS = frozenset({
    "gpu_id", "use_gpu", "state", "show_progress", "data_path", "checkpoint_dir", "save_dataset",
    "dataset_save_path", "save_dataloaders", "dataloaders_save_path", "log_wandb", "wandb_project", "tensorboard",
    "output_dir", "result_file", "cache", "evaluate_parts", "metrics", "topk", "metric_decimal_place", "tail_ratio",
    "eval_max_cells", "eval_batch_size", "loss_decimal_place", "device", "config_files", "eval_neg_sample_args",
    "refit_on_valid", "item_text", "item_text_fallback", "item_text_max_words", "time_scope", "tensorboard_dir",
    "train_share", "text_drop", "text_shuffle", "text_noise_seed", "gradient_checkpointing", "cold_item_share",
    "cold_item_choice", "tuned", "merge_valid", "continue_from", "train_fold", "search_mode",
    "inference_tokens", "inference_batch_size", "tree_nodes", "cpu_products",
})  # fmt: skip

# The fold of train rows that a part is trained without, (number, of how many): whoever asks for the part sets it.
FOLD = "train_fold"

# Those whose effect is in the rows and texts that a stage reads: no settings of the stage, but they move a result.
INPUT_KEYS = (
    "train_share", "cold_item_share", "cold_item_choice", "text_drop", "text_shuffle", "text_noise_seed", "item_text",
    "item_text_fallback", "item_text_max_words",
)  # fmt: skip


def _command_line() -> list[str]:
    """``sys.argv``'s settings, unless the process belongs to pytest or a notebook, whose flags are not ours."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    foreign = program in {"-c", "", "-m", "pytest", "py.test", "ipykernel_launcher.py"} or "pytest" in sys.argv[0]
    return [] if foreign else [argument for argument in sys.argv[1:] if argument.startswith("--")]


def _names_of_files(text: str) -> list[str]:
    """``config_files`` as words between blanks, which quotes may hold; a path with blanks as it is; or a YAML list."""
    plain_words = text.split()
    # Not Path.is_file, which raises where many names are longer than one may be.
    if os.path.isfile(text):
        return [text]
    if all(map(os.path.isfile, plain_words)):
        return plain_words
    if text.startswith("["):
        return list(parse_value(text, None))
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"config_files: {text!r} cannot be read ({error})") from None


class Config(StrictSettings, RecBoleConfig):
    """RecBole's ``Config``: same arguments, same reading of values.

    Args:
        model: name or class; else the key ``model`` of a file, the dict or the command line.
        dataset: name of the data set; else the key ``dataset``.
        config_file_list: YAML files, later ones win.
        config_dict: settings; a string is parsed as YAML where the key is no text.
        command_line: ``--key=value`` arguments; by default the process's own.

    Raises:
        UserError: an unknown model, key or metric (with the nearest known ones), a value of the wrong type or out of
            range, a missing or broken file; always before any work starts.
    """

    final_config_dict: dict[str, Any]
    parameters: dict[str, list[str]]

    def __init__(
        self,
        model: str | type | None = None,
        dataset: str | None = None,
        config_file_list: Sequence[str | Path] | None = None,
        config_dict: Mapping[str, Any] | None = None,
        command_line: Sequence[str] | None = None,
    ) -> None:
        self._arguments = list(_command_line() if command_line is None else command_line)
        self._specs: dict[str, Spec] = dict(base_specs())
        self.tuned_file: Path | None = None
        with compat.recbole_says():
            super().__init__(model, dataset, [str(file) for file in config_file_list or ()], dict(config_dict or {}))
        for part in self.parts():
            try:
                # Much of what may be wrong with a part's settings is seen there, and is to be told before any work.
                self.part(part)
            except UserError as error:
                raise UserError(f"{part}: {error}") from None

    # --- reading -----------------------------------------------------------------------------------------------------
    def compatibility_settings(self) -> None:
        """configurator.py:625-635 fails on NumPy 2; :func:`recbole_llm.compat.install` has set what is missing."""

    def _load_config_files(self, file_list: Iterable[str] | None) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for file in file_list or ():
            # Not through the cache of shipped files: a user edits his between two runs of one process.
            merged.update(load_yaml(Path(file)))
        return merged

    def _load_variable_config_dict(self, config_dict: Mapping[str, Any] | None) -> dict[str, Any]:
        return dict(config_dict or {})

    def _load_cmd_line(self) -> dict[str, Any]:
        read: dict[str, Any] = {}
        for argument in self._arguments:
            key, equals, value = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or not equals:
                raise UserError(f"{argument!r} is not understood; settings read --key=value, e.g. --model=BPR")
            if key in read and read[key] != value:
                raise UserError(f"--{key} is given twice, as {read[key]!r} and {value!r}")
            read[key] = value
        return read

    def _merge_external_config_dict(self) -> None:
        super()._merge_external_config_dict()
        files = self.external_config_dict.pop("config_files", None)
        if files:
            # Files named on the command line lie below the dict, as in RecBole's run_recbole.py.
            names = _names_of_files(files) if isinstance(files, str) else files
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise UserError(f"config_files should be a list of files, but is {files!r}")
            self.file_config_dict.update(self._load_config_files(names))
            self.external_config_dict = self.file_config_dict | self.variable_config_dict | self.cmd_config_dict
            self.external_config_dict.pop("config_files", None)

    def _get_model_and_dataset(self, model: Any, dataset: str | None) -> tuple[str, type, str]:
        given = self.external_config_dict
        model = model if model is not None else given.get("model")
        dataset = dataset if dataset is not None else given.get("dataset")
        if model is None or dataset is None:
            missing, where = "model", "recbole-llm models lists them"
            if model is not None:
                missing, where = "dataset", "a folder in dataset/ or in data_path, e.g. ml-100k"
            raise UserError(f"no {missing} is named; add --{missing}=NAME ({where})")
        if not isinstance(dataset, str) or not dataset or "/" in dataset:
            raise UserError(f"dataset should be a folder's name, whose place data_path says, but is {dataset!r}")
        if isinstance(model, type):
            return model.__name__, model, dataset
        if not isinstance(model, str):
            raise UserError(f"model should be a name or a class, but is {model!r}")
        model = registry.variant_of(model, given)
        check_runs(model, given.get("policy"))
        model_class = registry.class_of(model, given)
        if hasattr(model_class, "wraps"):
            self._take_base_keys()
        return model, model_class, dataset

    def _take_base_keys(self) -> None:
        """A wrapper's settings are those of its base and its own, so ``base_model.key`` is ``key``."""
        given = self.external_config_dict
        for key in [key for key in given if key.startswith("base_model.")]:
            flat, value = key.partition(".")[2], given.pop(key)
            if given.setdefault(flat, value) != value:
                raise UserError(f"{key} and {flat} are one setting, given as {value!r} and as {given[flat]!r}")
            if key in self.cmd_config_dict:
                self.cmd_config_dict[flat] = value

    def _load_internal_config_dict(self, model: str, model_class: Any, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        # RecBole keeps the dataset keys of every Config in one shared list; ours must not grow it.
        self.parameters = {category: list(keys) for category, keys in self.parameters.items()}
        stock = set(self.internal_config_dict)
        own = properties_dir()
        training = [own / "training.yaml"] if hasattr(model_class, "stage_loss") else []
        data = own / "dataset" / f"{dataset}.yaml"
        codes = hasattr(model_class, "take_item_tokens") and getattr(model_class, "item_kind", "codes") == "codes"
        tokens = [own / "item_tokens" / "overall.yaml"] if codes else []
        files = [own / "overall.yaml", *training, data, *tokens, *model_files(model, model_class)]
        for file in files:
            if file.is_file():
                self._specs.update(read_specs(file))
                self.internal_config_dict.update(self._shipped(file, stock, registry.is_recboles(model)))
        beside, settings = self._data_folder() / f"{dataset}.yaml", dict[str, Any]()
        if beside.is_file():
            # As `prepare --source` writes it, and may write it anew.
            settings = load_yaml(beside)
            self.internal_config_dict.update(settings)
        if tokens:
            self._load_recipe(own / "item_tokens", registry.parts_of(model_class))
        llm = self.external_config_dict.get("llm", self.internal_config_dict.get("llm"))
        if llm is not None:
            self._load_backbone_keys(str(llm))
        for name in dict.fromkeys((getattr(model_class, "wraps", model), model)):
            self._load_tuned(name, dataset)
        for key, text in _RANGES.items():
            if key in self._specs and self._specs[key].text in ("int", "float"):
                self._specs[key] = Spec(text, self._specs[key].help)
        self._check_beside(beside, settings, model, model_class)
        self._check_keys(model, model_class)
        self._check_model(model, model_class)
        self._fit_model_type(model, model_class)

    def _shipped(self, file: Path, stock: set[str], recboles_model: bool) -> dict[str, Any]:
        """A shipped file's settings; under ``policy: recbole`` what RecBole ships for its own models and data wins.

        Args:
            file: the shipped file.
            stock: keys that RecBole has a value for, for this model and data set.
            recboles_model: whether the model is RecBole's own.
        """
        values = copy.deepcopy(read_yaml(file))
        kind = file.parent.name
        ours = (kind == "model" and not recboles_model) or (
            kind == "dataset" and not (RECBOLE_PROPERTIES / "dataset" / file.name).is_file()
        )
        if ours or self._setting("policy") != "recbole":
            return values
        return {key: value for key, value in values.items() if key not in stock or key == "metric_decimal_place"}

    def _load_backbone_keys(self, llm: str) -> None:
        embedded = properties_dir() / "llm" / "embedded.yaml"
        named = properties_dir() / "llm" / f"{llm}.yaml"
        for file in dict.fromkeys((embedded, named)):
            # The name of a shipped file only: of any other path the file beside it is none of ours.
            if file.is_file() and file.parent == embedded.parent:
                self._specs.update(read_specs(file))
                values = copy.deepcopy(read_yaml(file))
                if "llm" in values:
                    # The name stands for the model that the file names.
                    self.external_config_dict["llm"] = values["llm"]
                self.internal_config_dict.update(values)

    def _load_recipe(self, folder: Path, parts: tuple[str, ...]) -> None:
        """The settings of the recipe for item tokens that is asked for, above their defaults.

        Those of a part are left out where the recommender that is this part has no such setting.

        Args:
            folder: of the recipes.
            parts: the model's.
        """
        recipes = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "overall")
        name = self._setting("item_tokens")
        if name not in recipes:
            raise UserError(
                f"item_tokens: there is no recipe '{name}'{did_you_mean(str(name), recipes)} ({', '.join(recipes)})"
            )
        recipe = copy.deepcopy(read_yaml(folder / f"{name}.yaml"))
        self.internal_config_dict.update({key: value for key, value in recipe.items() if "." not in key})
        for key in [key for key in recipe if "." in key]:
            part, _, rest = key.partition(".")
            named = self._setting(part)
            if part in parts and rest in known_keys(named, registry.get_model(named)):
                self.internal_config_dict[key] = recipe[key]

    def _load_tuned(self, model: str, dataset: str) -> None:
        """What the project's own search found for this model and data set, above all that is shipped otherwise.

        Another ``loss_type`` than the shipped one makes another model to search: it has a file of its own.
        """
        tuned = self._setting("tuned")
        tuned = parse_value(tuned, self._specs["tuned"]) if isinstance(tuned, str) else tuned
        loss, shipped = self._setting("loss_type"), self.internal_config_dict.get("loss_type")
        name = model if loss == shipped else f"{model}-{loss}"
        file = properties_dir() / "tuned" / dataset / f"{name}.yaml"
        if tuned is True and file.is_file():
            self.tuned_file = file
            self.internal_config_dict.update(copy.deepcopy(read_yaml(file)))

    def _fit_model_type(self, model: str, model_class: Any) -> None:
        """Defaults that depend on the kind of model, as RecBole's quick_start_config files set them."""
        if self._setting("policy") == "recbole":
            self.internal_config_dict["fast_baselines"] = False
        settings = self.internal_config_dict | self.external_config_dict
        columns = with_columns(model_class, settings, self.internal_config_dict.get("load_col"))
        self.internal_config_dict["load_col"] = columns
        if model_class.type == ModelType.SEQUENTIAL:
            # configurator.py:427 demands it; which items are masked is exclude_history's business here.
            self.internal_config_dict["repeatable"] = True
            # configurator.py:345 refuses negatives with a softmax over all items, at every such model's own defaults.
            # A model that reads windows draws its own at every position.
            softmax = self._setting("loss_type") == "CE" or getattr(model_class, "train_view", "") == "windows"
            negatives = read_yaml(properties_dir() / "overall.yaml")["train_neg_sample_args"]
            self.internal_config_dict["train_neg_sample_args"] = None if softmax else copy.deepcopy(negatives)

    def _init_device(self) -> None:
        """One of several processes gets its device from the launcher; ``gpu_id`` only says whether it is a GPU."""
        if processes.count() == 1:
            super()._init_device()
            return
        final = self.final_config_dict
        final["gpu_id"] = str(final["gpu_id"])
        # Not RecBole's own way with several processes, which wants NCCL and splits batches by rank.
        final["single_spec"], final["local_rank"] = True, 0
        final["device"] = processes.join(cpu=final["gpu_id"] == "" or not final["use_gpu"])
        if not processes.is_main():
            final["show_progress"] = final["tensorboard"] = final["log_wandb"] = False

    def _set_default_parameters(self) -> None:
        final = self.final_config_dict
        folder = self._data_folder()
        final["data_path"] = str(folder.parent)
        check_metrics(self.final_config_dict)
        check_eval_args(self.final_config_dict, self.dataset)
        check_intervals(self.final_config_dict)
        check_training(self.final_config_dict)
        check_columns(self.final_config_dict)
        check_unread(self.external_config_dict)
        check_models_own(self.model, self.final_config_dict)
        check_weights(self.final_config_dict)
        products.use(final["cpu_products"])
        super()._set_default_parameters()
        if folder.is_dir():
            # RecBole takes its own copy of ml-100k, whatever there is.
            final["data_path"] = str(folder)
        final["checkpoint_dir"] = str(final["output_dir"])

    def _data_folder(self) -> Path:
        """``dataset/``, then ``data_path``; the last one when neither has the data set."""
        path = Path(self._setting("data_path"))
        roots = [Path("dataset"), Path(__file__).parent.parent / "dataset", path]
        if "data_path" in self.external_config_dict:
            roots.insert(0, path)
        for root in roots:
            if (root / self.dataset).is_dir():
                return root / self.dataset
        return path / self.dataset

    # --- use ---------------------------------------------------------------------------------------------------------
    @property
    def specs(self) -> dict[str, Spec]:
        """Types and explanations of the settings, by key."""
        return self._specs

    def split_protocol(self) -> SplitProtocol:
        """How this run divides its interactions."""
        args = self.final_config_dict["eval_args"]
        kind, value = next(iter(args["split"].items()))
        shares = tuple(value) if kind != "LS" else (0.8, 0.1, 0.1)
        return SplitProtocol(
            kind=kind,
            ratios=(shares[0], shares[1], shares[2]),
            leave_one_mode=value if kind == "LS" else "valid_and_test",
            by_time=args["order"] == "TO" or kind == "TS",
            group_by_user=args["group_by"] == "user",
            seed=self.final_config_dict["split_seed"],
            short_users=self.final_config_dict["short_users"],
            drop_repeats=self.final_config_dict["exclude_history"] is True,
            train_share=self.final_config_dict["train_share"],
            cold_item_share=self.final_config_dict["cold_item_share"],
            cold_item_choice=self.final_config_dict["cold_item_choice"],
            fold=self.final_config_dict.get(FOLD),
        )

    def part(self, name: str) -> Config:
        """The Config of the recommender that trains as a part of this model.

        It has the protocol of this run and the part's own defaults, so it is the Config that ``--model=<part>`` alone
        would have, and their stages share one cache entry.

        Args:
            name: the part's key, e.g. ``graph_model``.
        """
        inner = {
            key: copy.deepcopy(self.final_config_dict[key]) for key in PROTOCOL_KEYS if key in self.final_config_dict
        }
        shared = set(dataset_arguments) | {"data_path", "split_seed", "encoding"} | set(self._dataset_keys())
        # How much of a history a model reads is no part of the data.
        shared -= {"MAX_ITEM_LIST_LENGTH"}
        # What texts say, controls of the study included: a part that reads them is told the same.
        shared |= {"item_text", "item_text_fallback", "item_text_max_words"}
        shared |= {"text_drop", "text_shuffle", "text_noise_seed"}
        inner |= {key: value for key, value in self.external_config_dict.items() if key in shared}
        # Only tuned files and recipes have such keys among what is shipped.
        inner |= {
            key.partition(".")[2]: value
            for key, value in (self.internal_config_dict | self.external_config_dict).items()
            if key.startswith(f"{name}.")
        }
        kind = registry.get_model(self[name])
        known = {*part_specs(self[name], kind), *self._specs, *shared, *known_keys(self[name], kind)}
        own_parts = registry.parts_of(kind)
        inner = {key: value for key, value in inner.items() if key in known or key.partition(".")[0] in own_parts}
        return Config(self[name], self.dataset, config_dict=inner, command_line=[])

    def _dataset_keys(self) -> list[str]:
        file = properties_dir() / "dataset" / f"{self.dataset}.yaml"
        return list(read_yaml(file)) if file.is_file() else []

    def stage_keys(self) -> dict[str, Any]:
        """The settings that can change a trained number of this model, as plain data for a fingerprint.

        A model may say of some that they mean nothing as the others stand (``idle_settings``): they are left out.
        """
        idle, neutral = self._idle(), NEUTRAL_KEYS
        if self["valid_metric"].partition("@")[0].lower() not in USER_METRICS:
            # RecBole's own classes read these, which so decide on which epoch is the best one.
            neutral = NEUTRAL_KEYS - {"metric_decimal_place", "tail_ratio"}
        return {
            key: plain(value)
            for key, value in sorted(self.final_config_dict.items())
            if key not in neutral and key not in idle and "." not in key
        }

    def parts(self) -> list[str]:
        """The keys of the model's parts, but for those that mean nothing as the other settings stand."""
        idle = self._idle()
        return [part for part in registry.parts_of(self.model_class) if part not in idle]

    def _idle(self) -> set[str]:
        told = getattr(self.model_class, "idle_settings", None)
        return set(told(self)) if told else set()

    def tuned_note(self) -> str:
        """What ``tuned`` came to, for the log; empty where it is off."""
        if not self.final_config_dict["tuned"]:
            return ""
        name, data = self.final_config_dict["model"], self.final_config_dict["dataset"]
        if self.tuned_file is None:
            return f"tuned: no search of {name} on {data} is shipped; it has its usual settings"
        return f"tuned: {name} has the settings of {self.tuned_file}"

    def as_dict(self) -> dict[str, Any]:
        """Every setting as plain data, for ``result.json``."""
        return {key: plain(value) for key, value in sorted(self.final_config_dict.items())}


def plain(value: Any) -> Any:
    """A setting as JSON can hold it."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
