"""``recbole-llm inspect``: look at a data set, a run, settings or a language model without training anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from recbole_llm.errors import UserError, did_you_mean

LONG = 20


def inspect(arguments: Sequence[str]) -> str:
    """What the verb prints.

    Args:
        arguments: ``dataset NAME [--key=value ...]``, ``run FOLDER``, ``alignment FOLDER``, ``codebook FOLDER``,
            ``settings MODEL`` or ``backbone LLM [--key=value ...]``.

    Raises:
        UserError: anything else.
    """
    if len(arguments) < 2:
        raise UserError(
            f"inspect takes one of {', '.join(_VIEWS)} and a name, e.g. recbole-llm inspect dataset ml-100k"
        )
    what, name, *rest = arguments
    if what not in _VIEWS:
        raise UserError(f"cannot inspect '{what}'{did_you_mean(what, _VIEWS)} ({', '.join(_VIEWS)})")
    return _VIEWS[what](name, list(rest))


def _dataset(name: str, arguments: list[str]) -> str:
    from recbole_llm.config import Config
    from recbole_llm.data import create_dataset
    from recbole_llm.data.phases import TEST, TRAIN, VALID, WITHHELD

    config = Config("BPR", name, command_line=arguments)
    if config["policy"] != "unified":
        raise UserError("inspect dataset shows the one split of policy: unified; RecBole's own is made by its run")
    dataset = create_dataset(config)
    split = dataset.make_split(config.split_protocol())
    lines = [f"{name} in {config['data_path']}"]
    lines += [f"  {key:16}{value}" for key, value in split.as_dict().items()]
    lines.append(_lengths_line("items a user", split.histories(TRAIN, VALID, TEST, WITHHELD).lengths))
    lines.append(_lengths_line("train items a user", split.histories(TRAIN).lengths))
    lines += _text_lines(config, dataset)
    return "\n".join(lines)


def _lengths_line(what: str, lengths: np.ndarray) -> str:
    """How long histories are; "long" is what "Semantic Convergence" (table 2) counts so."""
    lengths = lengths[lengths > 0]
    if not len(lengths):
        return f"  {what}: none"
    return (
        f"  {what}: {lengths.sum()} of {len(lengths)} users; mean {lengths.mean():.3f}, min {lengths.min()}, "
        f"median {np.median(lengths):g}, max {lengths.max()}; {(lengths > LONG).mean():.2%} have more than {LONG}"
    )


def _text_lines(config: Any, dataset: Any) -> list[str]:
    from recbole_llm.training.language import read_item_text

    if not config["item_text"]:
        return ["  item text: no template (item_text) for this data set"]
    text = read_item_text(config, dataset)
    shown = [f"    {text.texts[item]}" for item in range(1, min(4, len(text.texts)))]
    return [
        f"  item text {text.template!r}: {text.missing} of {len(text.texts) - 1} items have none; the first are",
        *shown,
    ]


def _run(path: str, arguments: list[str]) -> str:
    from recbole_llm.evaluation.results import read_run
    from recbole_llm.training.runs import table

    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood here; inspect run takes a folder only")
    result, _ = read_run(path)
    lines = [
        f"{result['model']} on {result['dataset']}, seed {result['seed']}, best epoch {result['best_epoch']}",
        table([result]),
        "",
    ]
    for stage in result["stages"]:
        state = "cached" if stage["cached"] else "made"
        lines.append(
            f"  {stage['name']:22}{stage['seconds']:9.1f} s  {stage['peak_memory_mb']:8.0f} MiB  {state}  "
            f"{stage['fingerprint'][:16]}"
        )
    lines.append(f"  split {result['split']['fingerprint']}")
    lines.append(f"  evaluation {json.dumps(result['evaluation'])}")
    return "\n".join(lines)


def _settings(model: str, arguments: list[str]) -> str:
    from recbole_llm.config import Config

    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood here; inspect settings takes a model only")
    config = Config(model, "ml-100k", command_line=[])
    lines = []
    for key, spec in sorted(config.specs.items()):
        if key in config.final_config_dict:
            lines.append(f"{key} = {json.dumps(config.as_dict()[key])}\n    ({spec.text}) {spec.help}")
    return "\n".join(lines)


def _alignment(path: str, arguments: list[str]) -> str:
    from recbole_llm.evaluation.alignment import inspect_alignment

    return inspect_alignment(path, arguments)


def _codebook(path: str, arguments: list[str]) -> str:
    """The quality card of the codebook that a run's items have tokens of, and its picture."""
    from recbole_llm.evaluation.pictures import MISSING_PLOTS, can_draw, draw_codebook
    from recbole_llm.evaluation.results import read_run, result_file
    from recbole_llm.itemid.quality_text import as_text
    from recbole_llm.training.item_tokens import CARD, TOKENS

    if arguments:
        raise UserError(f"{arguments[0]!r} is not understood here; inspect codebook takes a run's folder only")
    file = result_file(path).with_name(CARD)
    if not file.is_file():
        if file.with_name(TOKENS).is_file() and not result_file(path).is_file():
            raise UserError(f"{path} has no codebook: its tokens are ids, titles, or were given")
        result, _ = read_run(path)
        why = "its items are titles" if "title_tokens" in result["config"] else "it reads no item tokens"
        why = _what_tokens(result["config"]) if "code_method" in result["config"] else why
        raise UserError(f"{path} has no codebook: {result['model']}, {why}")
    picture = file.with_suffix(".png")
    drawn = str(picture) if can_draw() else MISSING_PLOTS
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
        text = as_text(card)
        if can_draw():
            try:
                draw_codebook(card, picture)
            except OSError as error:  # another's folder may be for reading only; the card is there all the same
                drawn = f"{picture} cannot be written ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error!r})") from None
    return f"{text}\n\ncard        {file}\npicture     {drawn}"


def _what_tokens(config: Mapping[str, Any]) -> str:
    """Why a run whose items have tokens has no codebook."""
    from recbole_llm.training.identifiers import METHODS

    if config["code_tokens"] is not None:
        return "its tokens were given"
    return f"its tokens are {config['code_method'] if config['code_method'] in METHODS else 'raw'} ids"


def _backbone(llm: str, arguments: list[str]) -> str:
    """Parameters and memory of a language model, from its configuration alone.

    The arguments are settings of GLTA's, and the prompts to count for: ``--rows``, ``--tokens``, ``--prefix``.
    """
    from recbole_llm.backbone.embedded import EmbeddedSettings
    from recbole_llm.backbone.memory import describe, read_config
    from recbole_llm.config import Config

    shape = {"rows": 8, "tokens": 347, "prefix": 38}
    settings = [f"--llm={llm}"]
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in shape:
            settings.append(argument)
        elif not value.isdecimal():
            raise UserError(f"--{key} should be a whole number, but is {value!r}")
        else:
            shape[key] = int(value)
    config = Config("GLTA", "ml-100k", command_line=settings)
    if config["llm"] == "embedded":
        read = EmbeddedSettings.from_config(config).model_config(config["llm_vocab_size"])
    else:
        read = read_config(config["llm"])
    return describe(config["llm"], read, config["llm_dtype"], config["llm_quantization"], **shape)


_VIEWS: dict[str, Callable[[str, list[str]], str]] = {
    "dataset": _dataset,
    "run": _run,
    "alignment": _alignment,
    "codebook": _codebook,
    "settings": _settings,
    "backbone": _backbone,
}
