"""What the settings of the measuring, and of what a model learns from, must be; refused before any work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from recbole.evaluator import metric_types, smaller_metrics
from recbole.evaluator.register import metric_information
from recbole.utils import EvaluatorType, InputType, ModelType

from recbole_llm.errors import UserError, did_you_mean

# Settings that divide interactions, or number items: a part has those of the model that it serves.
_SPLITTING = frozenset({
    "policy", "eval_args", "split_seed", "short_users", "exclude_history", "train_share", "cold_item_share",
    "cold_item_choice", "merge_valid", "refit_on_valid", "load_col", "user_inter_num_interval",
    "item_inter_num_interval", "val_interval", "rm_dup_inter", "time_scope",
})  # fmt: skip
# What a part shares with the run that it is a part of.
_SHARED = frozenset({"dataset", "data_path", "output_dir"})

_NUMBER = r"[-+]?(?:inf|\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)"
_INTERVAL = re.compile(rf"[\[(]\s*{_NUMBER}\s*,\s*{_NUMBER}\s*[\])]")


def check_metrics(final: dict[str, Any]) -> None:
    """Metrics and Ks that there are, ``valid_metric`` among them; makes lists of single ones."""
    final["metrics"] = [final["metrics"]] if isinstance(final["metrics"], str) else list(final["metrics"])
    final["topk"] = [final["topk"]] if isinstance(final["topk"], int) else list(final["topk"])
    for metric in final["metrics"]:
        if str(metric).lower() not in metric_types:
            raise UserError(f"unknown metric '{metric}'{did_you_mean(str(metric), metric_types)}")
        if final["policy"] == "unified" and metric_types[metric.lower()] != EvaluatorType.RANKING:
            raise UserError(f"metric '{metric}' judges ratings, not rankings; it works under policy: recbole only")
    if not final["topk"]:
        raise UserError("topk is empty; a run keeps the first K items of every user, e.g. topk: [10]")
    for k in final["topk"]:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise UserError(f"topk should hold whole numbers of 1 or more, but has {k!r}")
    name, _, cut = str(final["valid_metric"]).partition("@")
    if name.lower() not in metric_types:
        raise UserError(f"unknown valid_metric '{final['valid_metric']}'{did_you_mean(name, metric_types)}")
    # Those that count what is recommended have a K too, though they are no TopkMetric of RecBole's.
    at_k = not {"rec.topk", "rec.items"}.isdisjoint(metric_information[name.lower()])
    wanted = list(map(str, final["topk"])) if at_k else [""]
    if name.lower() not in [metric.lower() for metric in final["metrics"]] or cut not in wanted:
        raise UserError(
            f"valid_metric '{final['valid_metric']}' is not among the metrics {final['metrics']} at {final['topk']}"
        )
    final["valid_metric_bigger"] = name.lower() not in smaller_metrics


def check_negatives(model: str, kind: Any, given: Mapping[str, Any], loss: Any) -> None:
    """``train_neg_sample_args`` is for models that have a negative beside an item, and leaves them one.

    Args:
        model: its name.
        kind: its class.
        given: the settings that the user gave.
        loss: ``loss_type``.
    """
    if "train_neg_sample_args" not in given:
        return
    asked = given["train_neg_sample_args"]
    if getattr(kind, "train_view", "") == "windows" and asked is not None:
        raise UserError(
            f"{model} does not take train_neg_sample_args: its negatives are drawn at every position; say negatives"
        )
    # RecBole goes by the loss where a class says nothing (configurator.py:342).
    by_loss = InputType.PAIRWISE if loss == "BPR" else None
    pairwise = loss != "CE" and getattr(kind, "input_type", by_loss) == InputType.PAIRWISE
    if pairwise and (asked is None or asked.get("distribution") == "none"):
        raise UserError(f"{model} learns from negatives, and train_neg_sample_args would draw none")
    if asked and asked.get("dynamic") and not asked.get("candidate_num"):
        raise UserError("train_neg_sample_args: dynamic takes the hardest of candidate_num negatives; set that above 0")


def check_columns(final: Mapping[str, Any]) -> None:
    """``load_col`` and ``unload_col`` are lists of columns by a file's suffix, ``seq_len`` and ``seq_separator`` sound.

    Args:
        final: the run's settings.

    Raises:
        UserError: they are not.
    """
    more = final.get("additional_feat_suffix") or ()
    suffixes = ("inter", "user", "item", "kg", "link", "net", *([more] if isinstance(more, str) else more))
    for key in ("load_col", "unload_col"):
        for suffix, columns in (final.get(key) or {}).items():
            if suffix not in suffixes:
                raise UserError(f"{key}: no file is read as '{suffix}'{did_you_mean(str(suffix), suffixes)}")
            named = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
            if columns != "*" and not named:
                raise UserError(f"{key}.{suffix} should be a list of columns, but is {columns!r}")
            if key == "unload_col" and columns and (final.get("load_col") or {}).get(suffix, "*") != "*":
                raise UserError(
                    f"unload_col.{suffix} leaves columns out of all, but load_col.{suffix} names some; set that to '*'"
                )
    separator = final.get("seq_separator")
    if not isinstance(separator, str) or not separator:
        raise UserError(f"seq_separator should be what stands between the parts of a field, but is {separator!r}")
    for column, length in (final.get("seq_len") or {}).items():
        if not isinstance(length, int) or isinstance(length, bool) or length < 1:
            raise UserError(f"seq_len.{column} should be a whole number of 1 or more, but is {length!r}")


def check_table(part: str, name: str, kind: Any, items_only: bool) -> None:
    """A part whose embeddings are read has some.

    Args:
        part: its key.
        name: of its model.
        kind: the model's class.
        items_only: whether those of users are not read.
    """
    fits = kind.type == ModelType.GENERAL or (items_only and kind.type == ModelType.SEQUENTIAL)
    if not fits or hasattr(kind, "stages"):
        wanted = "recommender with item" if items_only else "general recommender with user and item"
        raise UserError(f"{part} should be a {wanted} embeddings, not {name}")


def check_split(part: str, name: str, given: Iterable[str]) -> None:
    """A part is trained on the run's own train rows: on others it may learn from what are valid and test rows there.

    Args:
        part: its key.
        name: of its model.
        given: the settings that the user gave.
    """
    for key in given:
        prefix, _, rest = key.partition(".")
        if prefix == part and rest in _SPLITTING:
            raise UserError(f"{key} would train {name} on another split than the run's; set {rest} for the run")
        if prefix == part and rest in _SHARED:
            raise UserError(f"{key}: {name} has the run's {rest}; set {rest} for the run")


def check_teacher(part: str, name: str, kind: Any) -> None:
    """A part that teaches scores the whole catalogue.

    Args:
        part: its key.
        name: of its model.
        kind: the model's class; ``None`` for one that cannot be ranked with.
    """
    # One that has item tokens of its own would need their settings too.
    tokens = hasattr(kind, "item_kind") or hasattr(kind, "take_item_tokens")
    types = (ModelType.GENERAL, ModelType.TRADITIONAL, ModelType.SEQUENTIAL, ModelType.CONTEXT, ModelType.KNOWLEDGE)
    if kind is None or kind.type not in types or tokens:
        raise UserError(
            f"{part} should be a recommender that scores every item, such as SASRec, LightGCN or EASE, not {name}"
        )


def check_intervals(final: dict[str, Any]) -> None:
    """Filters can be read: RecBole only warns of an interval that it cannot read, and drops the last row but one.

    Args:
        final: the run's settings. Values that ``val_interval`` lists become texts, as which columns of tokens are read.

    Raises:
        UserError: they cannot.
    """
    named = {key: final.get(key) for key in ("user_inter_num_interval", "item_inter_num_interval")}
    values = {}
    for field, value in (final.get("val_interval") or {}).items():
        values[field] = [str(one) for one in value] if isinstance(value, list) else value
        if not isinstance(value, list):
            named[f"val_interval.{field}"] = value
    for key, value in named.items():
        # What is left empty is no filter of RecBole's own two, and a mistake where a column is named.
        if value is None and not key.startswith("val_interval"):
            continue
        if not all(_INTERVAL.fullmatch(part.strip()) for part in str(value).split(";")):
            lists = ", or a list of values where the column holds tokens" if key.startswith("val_interval") else ""
            raise UserError(f"{key} should be an interval such as [5,inf) or (0,1];[3,4){lists}, but is {value!r}")
    if values:
        final["val_interval"] = values
    for field, value in (final.get("threshold") or {}).items():
        if not _is_number(value):
            raise UserError(f"threshold.{field} should be a number, but is {value!r}")


def clip_of(setting: Any) -> dict[str, float] | None:
    """Arguments of ``clip_grad_norm_``.

    Args:
        setting: ``clip_grad_norm``: a number, RecBole's dict, or nothing.

    Raises:
        UserError: it is none of them.
    """
    if setting is None:
        return None
    clip = setting if isinstance(setting, dict) else {"max_norm": setting}
    numbers = all(_is_number(value) and value > 0 for value in clip.values())
    if "max_norm" not in clip or not numbers or set(clip) - {"max_norm", "norm_type"}:
        raise UserError(f"clip_grad_norm should be a number or {{max_norm: 1.0, norm_type: 2}}, but is {setting!r}")
    return clip


def check_training(final: dict[str, Any]) -> None:
    """What stands inside the settings of training that are dicts.

    Args:
        final: the run's settings. A number for ``clip_grad_norm`` becomes the dict that RecBole's trainers want.
    """
    final["clip_grad_norm"] = clip_of(final.get("clip_grad_norm"))
    negatives = final.get("train_neg_sample_args") or {}
    known = ("distribution", "sample_num", "alpha", "dynamic", "candidate_num")
    for key in negatives:
        if key not in known:
            raise UserError(f"unknown setting 'train_neg_sample_args.{key}'{did_you_mean(key, known)}")
    candidates, dynamic = negatives.get("candidate_num", 0), negatives.get("dynamic", False)
    if not isinstance(candidates, int) or isinstance(candidates, bool) or candidates < 0:
        raise UserError(f"train_neg_sample_args.candidate_num should be int >= 0, but is {candidates!r}")
    if not isinstance(dynamic, bool):
        raise UserError(f"train_neg_sample_args.dynamic should be true or false, but is {dynamic!r}")
    samples, alpha = negatives.get("sample_num", 1), negatives.get("alpha", 1.0)
    if not isinstance(samples, int) or samples < 1:
        raise UserError(f"train_neg_sample_args.sample_num should be int >= 1, but is {samples!r}")
    if not _is_number(alpha) or alpha < 0:
        raise UserError(f"train_neg_sample_args.alpha should be a number of 0 or more, but is {alpha!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_eval_args(final: dict[str, Any], dataset: str) -> None:
    """``eval_args`` that the one split can follow, with what they leave out filled in."""
    defaults = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    given = final["eval_args"]
    if not isinstance(given, dict):
        raise UserError(f"eval_args should be a mapping with split, order, group_by and mode, but is {given!r}")
    for key in given:
        if key not in defaults:
            raise UserError(f"unknown setting 'eval_args.{key}'{did_you_mean(key, defaults)}")
    if final["policy"] == "unified":
        _check_unified(final, defaults | given)
        _check_times_between_users(final, final["eval_args"], dataset)
    else:
        # What RecBole itself fills in, which it has not done yet.
        _check_times_between_users(final, {"order": "RO", "group_by": "user"} | given, dataset)


def _check_unified(final: dict[str, Any], args: dict[str, Any]) -> None:
    final["eval_args"] = args
    split = args["split"]
    if not isinstance(split, dict) or len(split) != 1 or next(iter(split)) not in ("LS", "RS", "TS"):
        raise UserError(
            "eval_args.split should be one of {LS: valid_and_test}, {RS: [0.8, 0.1, 0.1]}, {TS: [0.8, 0.1, 0.1]}, "
            f"but is {split!r}"
        )
    one_of("eval_args.order", args["order"], ("TO", "RO"))
    args["group_by"] = args["group_by"] or "none"
    one_of("eval_args.group_by", args["group_by"], ("user", "none"))
    modes = list(args["mode"].values()) if isinstance(args["mode"], dict) else [args["mode"]]
    if any(mode != "full" for mode in modes):
        raise UserError(
            "eval_args.mode should be full: everything is ranked on the whole catalogue "
            f"(sampled candidates, {args['mode']!r}, work under policy: recbole)"
        )
    kind, value = next(iter(split.items()))
    if kind == "LS":
        one_of("eval_args.split.LS", value, ("valid_and_test", "valid_only", "test_only"))
    elif not _is_ratios(value):
        raise UserError(f"eval_args.split.{kind} should be three shares such as [0.8, 0.1, 0.1], but is {value!r}")
    if _across_users(args) and final["short_users"] == "train":
        raise UserError("short_users: train would train on what came after the time of this split; set drop or refuse")


def _across_users(args: Mapping[str, Any]) -> bool:
    """Whether ``eval_args`` divide everybody's interactions at one time."""
    split = args.get("split")
    if not isinstance(split, Mapping):
        return False
    return "TS" in split or ("RS" in split and args.get("order") == "TO" and args.get("group_by") in (None, "none"))


def _check_times_between_users(final: Mapping[str, Any], args: Mapping[str, Any], dataset: str) -> None:
    """Refuse what compares times of different users where they mean nothing."""
    if final.get("time_scope") != "user":
        return
    wanted = ""
    if _across_users(args):
        wanted = "no split at one time for all (TS, or RS without group_by: user); use LS, or RS with group_by: user"
    elif final["cold_item_share"] > 0 and final["cold_item_choice"] == "newest":
        wanted = "no item is newer than another; take cold_item_choice: random"
    if wanted:
        raise UserError(
            f"the timestamps of {dataset} are positions inside a user and mean nothing between users: "
            f"{wanted}, or set time_scope: global if your copy has real times"
        )


def one_of(key: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse what is none of the words of a setting.

    Raises:
        UserError: with the nearest of them.
    """
    if value not in choices:
        raise UserError(
            f"{key} should be one of {', '.join(choices)}, but is {value!r}{did_you_mean(str(value), choices)}"
        )


def _is_ratios(value: Any) -> bool:
    numbers = isinstance(value, list | tuple) and len(value) == 3
    return numbers and all(isinstance(share, int | float) and 0 <= share < math.inf for share in value) and value[0] > 0
