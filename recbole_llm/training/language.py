"""The language model that a recommender asks for, and the texts of its items."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.embedded import EmbeddedSettings, build_corpus, train_embedded
from recbole_llm.backbone.embedded_t5 import NAME as EMBEDDED_T5
from recbole_llm.backbone.embedded_t5 import EmbeddedT5Settings, make_embedded_t5
from recbole_llm.backbone.load import check_options, load_backbone
from recbole_llm.data import prompts
from recbole_llm.data.item_text import ItemText, item_file, load_item_text
from recbole_llm.data.templates import templates_of
from recbole_llm.data.text_noise import with_noise
from recbole_llm.disk import remove
from recbole_llm.errors import UserError
from recbole_llm.training.sharding import sharding
from recbole_llm.training.state import RESUME_FILE, ResumeFile
from recbole_llm.training.store import Stage, StageStore, fingerprint_of

logger = logging.getLogger("recbole_llm")

# Raised when the code of the stage changes what it makes.
BACKBONE_VERSION = 1


def read_item_text(config: Any, dataset: Any, key: str = "item_text", template: str | None = None) -> ItemText:
    """The texts of a data set's items, by internal id, read out of band.

    Args:
        config: the run's.
        dataset: the train data set.
        key: the setting that says how columns make a text.
        template: what it says, where the setting leaves that open.

    Raises:
        UserError: the data set has no template or no item file.
    """
    name, template = config["dataset"], config[key] or template
    file = item_file(config)
    if not template:
        raise UserError(
            f"{config['model']} needs item text, but '{name}' has no template; "
            f"set {key}: '{{column}}' with columns of {file}"
        )
    tokens = dataset.field2id_token[dataset.iid_field].tolist()
    text = load_item_text(
        file,
        id_field=config["ITEM_ID_FIELD"],
        template=template,
        fallback=config["item_text_fallback"],
        id_tokens=tokens,
        max_words=config["item_text_max_words"],
        separator=config["field_separator"],
        encoding=config["encoding"] or "utf-8",
    )
    if text.missing == len(text.texts) - 1:
        raise UserError(
            f"{config['model']} needs item text, but no item of '{name}' has any under {template!r} in {file}"
        )
    if text.missing:
        logger.info("item text: %d of %d items have none and read %r", text.missing, len(text.texts) - 1, text.fallback)
    return with_noise(text, tokens, config["text_drop"], config["text_shuffle"], config["text_noise_seed"])


def backbone_options(config: Any) -> dict[str, Any]:
    """How a run wants a language model loaded, as :func:`~recbole_llm.backbone.load.load_backbone` takes it."""
    return {
        "dtype": config["llm_dtype"],
        "attention": config["llm_attention"],
        "quantization": config["llm_quantization"],
        "trust_remote_code": config["trust_remote_code"],
        # What no single GPU may hold is sharded from the CPU.
        "device": "cpu" if sharding() else str(config["device"]),
        "random_init": config["seed"] if config["llm_random_init"] else None,
    }


def read_as(fingerprint: str, config: Any) -> str:
    """The fingerprint of a language model as a run reads it: :func:`backbone_options` count but where it stands."""
    options = {key: value for key, value in backbone_options(config).items() if key != "device"}
    return fingerprint_of([fingerprint, options])


def load_model(config: Any, name: str | Path) -> Backbone:
    """A language model as a run wants it; with its vocabulary head for a recommender that generates items."""
    generates = getattr(getattr(config, "model_class", None), "ranking", None) == "beam"
    return load_backbone(name, **backbone_options(config), with_head=generates, causal_only=_causal_only(config))


def _causal_only(config: Any) -> bool:
    """Whether a run's recommender takes no language model with an encoder: one that does not say so takes none."""
    return bool(getattr(getattr(config, "model_class", None), "causal_only", True))


def named_backbone(config: Any) -> Backbone | None:
    """The language model that ``llm`` names, loaded; ``None`` for an embedded one, which is made first.

    Asked for before anything trains, so that a wrong name or option costs nobody a wait.

    Raises:
        UserError: there is no such model, or it cannot be loaded as asked, or the recommender cannot take it.
    """
    options = backbone_options(config)
    if config["llm"] not in ("embedded", EMBEDDED_T5):
        return load_model(config, config["llm"])
    check_options(options["dtype"], options["attention"], options["quantization"], options["device"])
    if config["llm"] == EMBEDDED_T5:
        if _causal_only(config):
            raise UserError(f"{config['model']} needs a causal language model, and llm: {EMBEDDED_T5} has an encoder")
        EmbeddedT5Settings.from_config(config)
    return None


def take_backbone(
    config: Any, dataset: Any, item_text: ItemText, store: StageStore, named: Backbone | None
) -> tuple[Backbone, str, list[dict[str, Any]]]:
    """The language model to work with.

    Args:
        config: of the run.
        dataset: the train data set.
        item_text: what an embedded one is made of.
        store: the stage cache.
        named: what :func:`named_backbone` gave.

    Returns:
        The model, its fingerprint, and the lines of ``result.json`` for what was trained.
    """
    if named is not None:
        return named, read_as(named.fingerprint(), config), []
    if config["llm"] == EMBEDDED_T5:
        stage = _embedded_t5_stage(config, dataset, item_text, store)
    else:
        stage = embedded_stage(config, dataset, item_text, EmbeddedSettings.from_config(config), store)
    backbone = load_model(config, stage.folder / "model")
    return backbone, read_as(stage.fingerprint, config), [stage.as_dict("backbone")]


def named_reader(config: Any) -> Backbone | None:
    """The language model that reads items' texts, ``text_llm`` or else ``llm``; see :func:`named_backbone`."""
    if not config["text_llm"]:
        return named_backbone(config)
    if config["text_llm"] == "embedded":
        return None
    return load_backbone(config["text_llm"], **backbone_options(config), causal_only=False)


def take_reader(
    config: Any, dataset: Any, item_text: ItemText, store: StageStore, named: Backbone | None
) -> tuple[Backbone, str, list[dict[str, Any]]]:
    """The language model that reads items' texts.

    Args:
        config, dataset, item_text, store: as for :func:`take_backbone`, which says what is returned.
        named: what :func:`named_reader` gave.
    """
    if not config["text_llm"] or named is not None:
        return take_backbone(config, dataset, item_text, store, named)
    stage = embedded_stage(config, dataset, item_text, EmbeddedSettings.from_config(config), store)
    backbone = load_backbone(stage.folder / "model", **backbone_options(config))
    return backbone, read_as(stage.fingerprint, config), [stage.as_dict("text_backbone")]


def embedded_stage(
    config: Any, dataset: Any, item_text: ItemText, settings: EmbeddedSettings, store: StageStore
) -> Stage:
    """Train (or find) the embedded LM on the texts of items that stand in train, and the run's prompt templates."""
    corpus = _corpus(config, dataset, item_text)
    inputs = {"settings": vars(settings), "corpus": fingerprint_of(corpus), "seed": config["seed"]}

    def make(folder: Path) -> dict[str, Any]:
        # A kill while they are written leaves files of random names among them.
        remove(folder / "model")
        resume = ResumeFile(folder / RESUME_FILE)
        return train_embedded(corpus, settings, seed=config["seed"], folder=folder / "model", resume=resume)

    return store.run("backbone", BACKBONE_VERSION, inputs, make)


def _embedded_t5_stage(config: Any, dataset: Any, item_text: ItemText, store: StageStore) -> Stage:
    """Make (or find) the embedded T5; it has no words where the run's prompts have none."""
    settings = EmbeddedT5Settings.from_config(config)
    corpus = _corpus(config, dataset, item_text) if config["prompts"] else []
    inputs = {"settings": vars(settings), "corpus": fingerprint_of(corpus), "seed": config["seed"], "kind": EMBEDDED_T5}

    def make(folder: Path) -> dict[str, Any]:
        remove(folder / "model")
        return make_embedded_t5(corpus, settings, config["seed"], folder / "model")

    return store.run("backbone", BACKBONE_VERSION, inputs, make)


def _corpus(config: Any, dataset: Any, item_text: ItemText) -> list[str]:
    """What an embedded language model learns its words from."""
    seen = np.unique(dataset.train_histories.items)
    # Words that the tokenizer has not met cost a token for every few letters, in every prompt.
    templates = templates_of(config).whole() if config["prompts"] else prompts.TEMPLATES
    return build_corpus([item_text.texts[item] for item in seen.tolist()], templates, config["seed"])
