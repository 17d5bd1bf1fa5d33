"""RecBole's models that do not run here, or not on this data: said in one line, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole.utils import ModelType

from recbole_llm.atomic import open_atomic
from recbole_llm.config_checks import one_of
from recbole_llm.data.item_text import item_file
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.limits import PACKAGES, REFUSED, packages_missing

_WITHOUT = "RippleNet and KGCN learn from a graph without it"


def check_runs(model: str, policy: Any) -> None:
    """A model that can be run here.

    Args:
        model: its name.
        policy: ``unified`` or ``recbole``.

    Raises:
        UserError: it cannot, under this policy; with the nearest that can.
    """
    if model in REFUSED and policy != "recbole":
        why, instead = REFUSED[model]
        raise UserError(f"{model} does not run under policy: unified ({why}); {instead}")
    if packages_missing(model):
        raise UserError(f"{model} needs the package '{PACKAGES[model]}', which is not installed; {_WITHOUT}")


_POOLING: dict[str, tuple[str, ...]] = {"pooling_mode": ("max", "mean", "sum")}
# Words that RecBole's models choose between, by model and setting: of others some trained as something else unasked, or
# ended in a traceback.
_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "CFKG": {"loss_function": ("inner_product", "transe")},
    "DIEN": _POOLING,
    "DIN": _POOLING,
    "FDSA": _POOLING,
    "GCMC": {"accum": ("sum", "stack")},
    "GRU4RecF": _POOLING,
    "HRM": {"pooling_type_layer_1": ("max", "average"), "pooling_type_layer_2": ("max", "average")},
    # It evaluates the name of its teacher as Python.
    "KD_DAGFM": {"teacher": ("CIN", "CINComp", "CrossNet", "DAGFM")},
    "KGAT": {"aggregator_type": ("gcn", "graphsage", "bi")},
    "NAIS": {"algorithm": ("prod", "concat")},
    "NNCF": {"neigh_info_method": ("random", "knn", "louvain")},
    "SASRecF": _POOLING,
    "SGL": {"type": ("ED", "ND", "RW")},
}
# Settings of RecBole's that nothing here reads, and what does what they promise.
_UNREAD = {
    "device": "say gpu_id, or gpu_id= and nothing for the CPU",
    "checkpoint_dir": "say output_dir, under which a run has its folder",
    "nproc": "start the run with accelerate launch --num_processes=N",
    "save_dataset": "a run keeps its split's fingerprint, and its data are not pickled",
    "dataset_save_path": "a run keeps its split's fingerprint, and its data are not pickled",
    "save_dataloaders": "a run keeps its split's fingerprint, and its data are not pickled",
    "dataloaders_save_path": "a run keeps its split's fingerprint, and its data are not pickled",
}


def check_unread(given: Mapping[str, Any]) -> None:
    """Refuse settings that would be ignored.

    Args:
        given: what the user has set.

    Raises:
        UserError: one of them is set, to something.
    """
    for key, instead in _UNREAD.items():
        one_process = key == "nproc" and given.get(key) == 1
        if given.get(key) and not one_process:
            raise UserError(f"{key} is not read here; {instead}")


def check_models_own(model: str, final: Mapping[str, Any]) -> None:
    """Refuse what a model of RecBole would run as code, take for something else, or cannot do without another package.

    Args:
        model: its name.
        final: the run's settings.

    Raises:
        UserError: there is such a setting.
    """
    if final.get("learner") == "sparse_adam":
        raise UserError("learner: sparse_adam steps on sparse gradients, and no model here has any; take adam")
    for key, choices in _CHOICES.get(model, {}).items():
        one_of(key, final.get(key), choices)
    if model == "LDiffRec" and (final.get("n_cate") or 1) > 1:
        raise UserError(
            "n_cate above 1 needs the package 'kmeans_pytorch' and reads item embeddings from a pickle, which may run "
            "anything; set n_cate: 1"
        )


def with_columns(model_class: Any, settings: Mapping[str, Any], load_col: Any) -> Any:
    """``load_col`` with what a model reads beyond interactions, where a data set's shipped settings leave it out.

    Args:
        model_class: the model's class.
        settings: its ``selected_features``, and the names of a knowledge graph's fields.
        load_col: as shipped; ``None`` loads everything.
    """
    if not isinstance(load_col, Mapping):
        return load_col
    more: dict[str, list[str]] = {}
    if model_class.type == ModelType.KNOWLEDGE:
        head, relation, tail, item, entity = (settings[key] for key in _GRAPH_FIELDS)
        more = {"kg": [head, relation, tail], "link": [item, entity]}
    elif model_class.type == ModelType.SEQUENTIAL and settings.get("selected_features"):
        more = {"item": [settings["ITEM_ID_FIELD"], *settings["selected_features"]]}
    return more | dict(load_col)


_GRAPH_FIELDS = (
    "HEAD_ENTITY_ID_FIELD", "RELATION_ID_FIELD", "TAIL_ENTITY_ID_FIELD", "ITEM_ID_FIELD", "ENTITY_ID_FIELD",
)  # fmt: skip


def check_data(config: Any) -> None:
    """A data set that has what the model reads beyond interactions.

    Args:
        config: a :class:`recbole_llm.config.Config`.

    Raises:
        UserError: a file or a column is not there, or not loaded.
    """
    model, folder, name = config["model"], Path(config["data_path"]), config["dataset"]
    loaded = config["load_col"]
    if config.model_class.type == ModelType.KNOWLEDGE:
        for suffix in ("kg", "link"):
            if not (folder / f"{name}.{suffix}").is_file():
                raise UserError(
                    f"{model} learns from a knowledge graph (.kg, .link), and there is no {folder / name}.{suffix}; "
                    "BPR and LightGCN need interactions alone"
                )
            if loaded is not None and not loaded.get(suffix):
                raise UserError(
                    f"{model} learns from a knowledge graph; add {suffix} to load_col, or leave load_col out"
                )
    if config.model_class.type != ModelType.SEQUENTIAL or not config["selected_features"]:
        return
    file = item_file(config)
    if not file.is_file():
        raise UserError(f"{model} reads item features, and there is no {file}; SASRec and GRU4Rec need none")
    names = open_atomic(file, config["field_separator"], config["encoding"] or "utf-8").names
    for feature in config["selected_features"]:
        if feature not in names:
            raise UserError(
                f"{model}: selected_features names '{feature}', which is no column of {file}"
                f"{did_you_mean(feature, names)}; its columns: {', '.join(names)}"
            )
        if loaded is not None and feature not in (loaded.get("item") or ()):
            raise UserError(f"{model}: selected_features names '{feature}'; add it to load_col.item")


def check_sizes(model: Any, config: Any) -> None:
    """A catalogue that is large enough for what a model draws from it at once.

    Args:
        model: as built.
        config: its settings.

    Raises:
        UserError: it is too small; with the setting that helps.
    """
    name = config["model"]
    if name == "DGCF" and model.cor_batch_size > min(model.n_users, model.n_items):
        raise UserError(
            f"DGCF draws {model.cor_batch_size} users and as many items a step, and there are {model.n_users} and "
            f"{model.n_items}; set a lower train_batch_size (now {config['train_batch_size']})"
        )
    if name == "NCL" and model.k > min(model.n_users, model.n_items):
        raise UserError(
            f"NCL makes num_clusters: {model.k} of {model.n_users} users and of {model.n_items} items; set a lower one"
        )
