"""``recbole-llm prepare``: every stage before a model's last one, and tokens for items that come later."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.config import Config
from recbole_llm.disk import full_disk_told
from recbole_llm.errors import TrainingStoppedError, UserError
from recbole_llm.itemid.index_file import write_index
from recbole_llm.progress import clock
from recbole_llm.training.continuation import Continued
from recbole_llm.training.item_tokens import KEPT
from recbole_llm.training.language import named_backbone, read_item_text
from recbole_llm.training.logs import run_logging
from recbole_llm.training.new_items import read_new_items, tokenize_new_items
from recbole_llm.training.pipeline import fit_parts_of, prepared, store_of
from recbole_llm.training.runs import new_run_folder, tidy, writable
from recbole_llm.training.titles import tokenize

SHOWN = 5
_OWN = ("index_file", "new_items", "new_interactions")


def prepare(arguments: Sequence[str]) -> str:
    """Give a model's items their tokens, without training the model.

    Args:
        arguments: settings as for a run, and ``--index_file=PATH`` (LC-Rec's form), ``--new_items=FILE.item``,
            ``--new_interactions=FILE.inter``.

    Returns:
        What to print.

    Raises:
        UserError: the model reads no item tokens, or see the stages.
    """
    own, settings = _divided(arguments)
    config = Config(command_line=settings)
    if not hasattr(config.model_class, "take_item_tokens"):
        raise UserError(f"{config['model']} reads no item tokens, so there is nothing to prepare; SASRecCodes does")
    if own.get("index_file") and getattr(config.model_class, "item_kind", "codes") == "titles":
        raise UserError(f"--index_file has codes, and the items of {config['model']} are titles; leave it out")
    if own.get("new_items") and not own.get("index_file"):
        raise UserError("--new_items needs --index_file=PATH, where the tokens of old and new items go")
    if own.get("new_interactions") and not own.get("new_items"):
        raise UserError("--new_interactions needs --new_items=FILE.item, which says what the new items are")
    for key in ("new_items", "new_interactions"):
        if own.get(key) and not own[key].is_file():
            raise UserError(f"--{key}: {own[key]} does not exist")
    if own.get("index_file"):
        writable(own["index_file"], "index_file")
    config["tensorboard_dir"] = None
    folder = new_run_folder(config)
    try:
        with full_disk_told(folder.parent), run_logging(folder / "run.log", config["state"]):
            return _prepare(config, own, folder)
    except BaseException as error:
        tidy(folder, keep_log=isinstance(error, TrainingStoppedError) or not isinstance(error, UserError))
        raise


def _prepare(config: Config, own: dict[str, Path], folder: Path) -> str:
    _, train_data, _, _ = prepared(config)
    dataset, store = train_data._dataset, store_of(config, folder)
    arrivals = None
    if own.get("new_items"):
        arrivals = read_new_items(config, dataset, own["new_items"], own.get("new_interactions"))
    before = Continued.read(config, dataset)
    if before is None:
        made = tokenize(config, dataset, store, fit_parts_of(config, store))
    else:
        texts = read_item_text(config, dataset).texts
        made = before.tokenize(config, dataset, store, list(texts), named_backbone(config))
    lines = [_stage_line(line) for line in (*made.sources.lines, made.stage.as_dict())]
    tokens, raw_ids = made.tokens, dataset.field2id_token[dataset.iid_field].tolist()
    lines += ["", f"{tokens.n_items - 1} items, {tokens.size} tokens; {tokens.collision_rate():.4f} collide"]
    if arrivals is not None:
        first, count, placed = len(raw_ids), len(arrivals.raw_ids), int(arrivals.placed.sum())
        new = tokenize_new_items(config, dataset, store, made, arrivals)
        tokens, raw_ids = new.tokens, new.raw_ids
        lines.append(f"{count} new items: {placed} placed by their interactions, {count - placed} by their text")
        for item, text in enumerate(arrivals.texts[:SHOWN], first):
            lines.append(f"  {raw_ids[item]}  {''.join(tokens.strings(item))}  {text}".rstrip())
    if own.get("index_file"):
        if tokens.kind != "codes":
            raise UserError(f"--index_file has codes, and these tokens are {tokens.kind}")
        write_index(own["index_file"], tokens, raw_ids)
        lines.append(f"index       {own['index_file']}")
    for name in KEPT:
        if (made.stage.folder / name).is_file():
            shutil.copyfile(made.stage.folder / name, folder / name)
    lines.append(f"tokens      {folder}")
    return "\n".join(lines)


def _stage_line(line: dict[str, Any]) -> str:
    state = "found" if line["cached"] else "made"
    return f"{line['name']:18}{clock(line['seconds']):>9}  {state}  {line['fingerprint'][:16]}"


def _divided(arguments: Sequence[str]) -> tuple[dict[str, Path], list[str]]:
    """What belongs to this verb, and the settings of the model."""
    own, settings = {}, []
    for argument in arguments:
        key, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--") and equals and key in _OWN:
            own[key] = Path(value)
        else:
            settings.append(argument)
    return own, settings
