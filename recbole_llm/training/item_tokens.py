"""The stage that gives every item its tokens, and what it needs first: item embeddings, texts."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.utils import init_seed

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.item_text import ItemText
from recbole_llm.data.phases import TRAIN, VALID
from recbole_llm.disk import write_whole
from recbole_llm.errors import UserError
from recbole_llm.itemid import quality
from recbole_llm.itemid.collisions import check_room, resolve
from recbole_llm.itemid.even import encode_evenly
from recbole_llm.itemid.index_file import read_index, write_index
from recbole_llm.itemid.item_tokens import ARRAYS, ItemTokens, pool_of
from recbole_llm.itemid.item_tokens import CARD as TOKENS
from recbole_llm.itemid.kmeans import check_count
from recbole_llm.itemid.new_items import from_text
from recbole_llm.training.codebooks import check_settings, train_quantiser
from recbole_llm.training.embeddings import item_embeddings, item_width, text_embeddings
from recbole_llm.training.identifiers import LEAKING, METHODS, check_ids, has_ids, in_pieces, inputs_of, leaks, make_ids
from recbole_llm.training.language import (
    named_backbone,
    named_reader,
    read_item_text,
    take_backbone,
    take_reader,
)  # fmt: skip
from recbole_llm.training.state import RESUME_FILE, ResumeFile
from recbole_llm.training.store import Stage, StageStore, fingerprint_of

logger = logging.getLogger("recbole_llm")

# Raised when the code of a stage changes what it makes.
TEXTS_VERSION = 1
TOKENS_VERSION = 2
VECTORS = "vectors.npz"
# Where the items stand that codes were made from; what places items that come later.
POINTS = "points.npz"
CARD, INDEX, ORIGIN = "codebook.json", "items.index.json", "train_rows.json"
# What a run keeps of the stage: its folder can be handed to another run (code_tokens).
KEPT = (TOKENS, ARRAYS, INDEX, CARD, ORIGIN)
# Settings that say how tokens are made; `item_tokens` itself only names a set of them.
PREFIX = "code_"
# Of those that begin so, the ones that say how a language model reads them.
READING = ("code_embedding", "code_embedding_widths")


@dataclass
class Sources:
    """What codes are made from.

    Attributes:
        points: float32 ``[n_items, d]``, what is quantised; ``None`` for raw ids.
        texts: float32 ``[n_items, H]``, the items' texts in the language model; ``None`` where they have no part.
        behaviour: float32 ``[n_items, d]``, item embeddings of ``embedding_model`` that codes are drawn to; NaN for
            items that training has not seen; ``None`` where they have no part.
        seen: bool ``[n_items]``, items with a train interaction.
        marks: fingerprints of what the two were made by.
        lines: of ``result.json``, for the stages that were run.
        parts: fits of recommenders, by config key.
        item_text: the texts themselves.
        reader: the language model that reads the texts, where they have a part.
        reader_mark: its fingerprint.
        backbone, backbone_mark: the same where it is the one that generates.
    """

    seen: np.ndarray
    points: np.ndarray | None = None
    texts: np.ndarray | None = None
    behaviour: np.ndarray | None = None
    marks: list[str] = field(default_factory=list)
    lines: list[dict[str, Any]] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    item_text: ItemText | None = None
    reader: Backbone | None = None
    reader_mark: str = ""
    backbone: Backbone | None = None
    backbone_mark: str = ""


@dataclass
class Tokenized:
    """Items with tokens: the tokens, the stage that made them, and what they were made from."""

    tokens: ItemTokens
    stage: Stage
    sources: Sources


def has_codebook(config: Any) -> bool:
    """Whether a codebook is made; one level of tokens is raw ids (the paper's table 5, first row)."""
    without = config["code_tokens"] is not None or config["code_method"] in ("raw", *METHODS)
    return not without and config["code_levels"] > 1


def tokenize_items(
    config: Any, dataset: Any, store: StageStore, fit_part: Callable[..., Any], named: Backbone | None = None
) -> Tokenized:
    """Run (or find) every stage up to the items' tokens.

    Args:
        config: the run's; the keys of ``properties/item_tokens``.
        dataset: the train data set.
        store: the stage cache.
        fit_part: trains the recommender that a config key names and returns its fit.
        named: the language model that ``llm`` names, where it is loaded already.

    Raises:
        UserError: see :func:`gather` and :func:`~recbole_llm.training.identifiers.check_ids`, tokens are given that
            this run cannot take, or the codebook collapsed.
    """
    check_ids(config)
    raw_ids = dataset.field2id_token[dataset.iid_field].tolist()
    origin = origin_of(config, dataset)
    given = known = None
    if config["code_tokens"] is not None:
        given, known = _given(Path(config["code_tokens"]), raw_ids, origin)
        if known and config["refit_on_valid"] and dataset.split.count(VALID):
            # The second training has other train rows; it would refuse them once the first is done.
            raise UserError(
                f"refit_on_valid: true trains again on train + valid rows, and the item tokens in "
                f"{config['code_tokens']} were made from train rows alone; leave code_tokens out, so that they are "
                "made anew, or set refit_on_valid: false"
            )
    sources = gather(config, dataset, store, fit_part, named)
    if has_codebook(config):
        keys = {
            key: value for key, value in config.stage_keys().items() if key.startswith(PREFIX) and key not in READING
        }
        keys |= {"unseen_items": config["unseen_items"], "seed": config["seed"]}
    elif has_ids(config):
        if in_pieces(config):
            sources.item_text = read_item_text(config, dataset)
            _take_backbone(config, dataset, store, sources, named)
        keys = inputs_of(config, dataset, sources.backbone)
    else:
        keys = {"code_tokens": given.fingerprint() if given else None, "known": known}
    inputs = {
        "config": keys,
        "upstream": sources.marks,
        "seen": hashlib.sha256(np.packbits(sources.seen).tobytes()).hexdigest(),
        "pool": pool_of(raw_ids),
        # Of tokens from elsewhere nothing is claimed that is not known. What is claimed is part of the stage: equal
        # tokens of other rows are another stage, or a run would hand on what was written of another's rows.
        "rows": origin if given is None or known else None,
    }

    def make(folder: Path) -> dict[str, Any]:
        if inputs["rows"] is not None:
            write_origin(origin, folder)
        if sources.points is not None:
            return _make(config, sources, raw_ids, folder)
        if has_ids(config):
            tokens, method = make_ids(config, dataset, raw_ids, sources.backbone), config["code_method"]
        else:
            tokens, method = given or ItemTokens.raw(len(raw_ids), raw_ids), "given" if given else "raw"
        write_tokens(tokens, raw_ids, folder)
        return {"method": method, "vocabulary": tokens.size}

    stage = store.run("item_tokens", TOKENS_VERSION, inputs, make)
    return Tokenized(ItemTokens.load(stage.folder, raw_ids), stage, sources)


def _given(path: Path, raw_ids: list[str], origin: dict[str, Any]) -> tuple[ItemTokens, bool]:
    """Tokens that are there already, and whether they are known to be made from this run's train rows.

    Raises:
        UserError: no tokens are there, or they are of other items, or a language model's own, or made from other rows,
            which may be test rows, or of test rows and that was not asked for.
    """
    tokens = ItemTokens.load(path, raw_ids) if path.is_dir() else read_index(path, raw_ids)
    if tokens.lm_ids is not None or tokens.kind == "titles":
        # They are numbers in its vocabulary, which another's has for other words, and nothing here says whose it was.
        raise UserError(
            f"the item tokens in {path} are tokens of the language model that they were made with, which need not be "
            "this run's; leave code_tokens out and have them made in this run (item_tokens, id_spelling: pieces)"
        )
    file = path / ORIGIN
    if not file.is_file():
        logger.warning(
            "item tokens of %s: nothing says from which rows they were made; if from test rows, they leak", path
        )
        return tokens, False
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{file} is damaged; make the item tokens again") from None
    if found.get(LEAKING) and not origin.get(LEAKING):
        raise UserError(
            f"the item tokens in {path} are numbered by test rows too (id_rows: all), so they tell what is asked for; "
            "make others, or set leaking_ids: true to measure the leak"
        )
    if origin.get(LEAKING) and not found.get(LEAKING):
        raise UserError(f"{LEAKING}: true, and the item tokens in {path} do not leak; leave it out")
    if found != origin:
        raise UserError(
            f"the item tokens in {path} were made from other train rows than this run's (another split, or train + "
            "valid); make them for this one"
        )
    return tokens, True


def write_tokens(tokens: ItemTokens, raw_ids: list[str], folder: Path, points: np.ndarray | None = None) -> None:
    """Write what the stage leaves of the tokens.

    Args:
        tokens: of every item.
        raw_ids: by internal id.
        folder: the stage's.
        points: float32 ``[n_items, d]`` that the codes were made of, where it is by them that new items are placed.
    """
    tokens.save(folder)
    if tokens.kind == "codes":
        write_index(folder / INDEX, tokens, raw_ids)
    if points is not None:
        np.savez(folder / POINTS, points=points)


def origin_of(config: Any, dataset: Any) -> dict[str, Any]:
    """Which rows tokens are made from, as a run that takes them checks it.

    Args:
        config: the run's.
        dataset: the train data set.
    """
    origin = {"split": dataset.split.fingerprint, "train": dataset.split.count(TRAIN)}
    return origin | {LEAKING: True} if leaks(config) else origin


def write_origin(origin: Mapping[str, Any], folder: Path) -> None:
    """Write what :func:`origin_of` says into a stage's folder."""
    text = json.dumps(origin)
    write_whole(folder / ORIGIN, lambda part: part.write_text(text, encoding="utf-8"))


def load_points(folder: Path) -> np.ndarray | None:
    """The points that :func:`write_tokens` wrote; ``None`` where there are none."""
    if not (folder / POINTS).is_file():
        return None
    with np.load(folder / POINTS, allow_pickle=False) as arrays:
        return np.asarray(arrays["points"])


def gather(
    config: Any, dataset: Any, store: StageStore, fit_part: Callable[..., Any], named: Backbone | None = None
) -> Sources:
    """Item embeddings and texts as the settings ask for them, with points for items that training has not seen.

    Args:
        config: the run's.
        dataset: the train data set.
        store: the stage cache.
        fit_part: trains the recommender that a config key names.
        named: the language model that ``llm`` names, where it is loaded already.

    Raises:
        UserError: texts are asked for and there are none, there are fewer items than codes, too many for the collision
            policy, a control that has no codes to swap, or settings that cannot be; all of them before anything is
            trained.
    """
    seen = dataset.train_histories.seen(dataset.item_num)
    sources = Sources(seen)
    if not has_codebook(config):
        if config["code_shuffle"]:
            raise UserError("code_shuffle swaps the codes of a codebook, and none is made: leave it out")
        return sources
    behaviour = config["code_input"] == "behaviour"
    check_room(config["code_collisions"], len(seen) - 1, config["code_size"], config["code_levels"])
    check_count(int(seen.sum()) if behaviour else len(seen) - 1, config["code_size"])
    unseen = np.flatnonzero(~seen[1:]) + 1 if behaviour else np.array([], dtype=np.int64)
    # What the user may have got wrong comes first: a graph model is minutes of training.
    check_settings(config, projected=len(unseen) > 0 and config["unseen_items"] == "projection")
    if _needs_texts(config, len(unseen)):
        sources.item_text = _texts_of(config, dataset)
        named = named_reader(config) if config["text_llm"] else named or named_backbone(config)
    if behaviour or config["code_cf_weight"]:
        fit = fit_part("embedding_model", look=partial(_check_width, config))
        sources.parts["embedding_model"] = fit
        sources.lines += fit.stages_as("embedding_model")
        embeddings = item_embeddings(fit.model, config["embedding_model"], config["embedding_layer"])
        sources.marks += [fit.fingerprint, config["embedding_layer"]]
        sources.points = embeddings if behaviour else None
        if config["code_cf_weight"]:
            # Of an item without train rows they say nothing.
            sources.behaviour = np.where(seen[:, None], embeddings, np.float32(np.nan))
    if sources.item_text is not None:
        read_texts(config, dataset, store, sources, named)
    if not behaviour:
        sources.points = sources.texts
    elif len(unseen) and config["unseen_items"] == "text":
        _place_unseen(sources, unseen)
    return sources


def _check_width(config: Any, model: Any) -> None:
    """Refuse an ``embedding_model``, trained or not, without item embeddings or that ``code_cf_weight`` cannot take."""
    width, wanted = item_width(model, config["embedding_model"], config["embedding_layer"]), config["code_dim"]
    if config["code_cf_weight"] and width != wanted:
        raise UserError(
            f"code_cf_weight multiplies codes (code_dim {wanted}) with the item embeddings of "
            f"{config['embedding_model']} ({width}): set embedding_model.hidden_size or .embedding_size to {wanted}, "
            f"or code_dim to {width}"
        )


def _place_unseen(sources: Sources, unseen: np.ndarray) -> None:
    assert sources.points is not None
    counts = len(unseen), len(sources.seen) - 1
    if sources.texts is None:
        logger.info("items without train interactions: %d of %d have codes that say nothing: no item_text", *counts)
        return
    sources.points = sources.points.copy()
    sources.points[unseen] = from_text(sources.points, sources.texts, sources.seen, unseen)
    logger.info("items without train interactions: %d of %d get a point from their text", *counts)


def read_texts(config: Any, dataset: Any, store: StageStore, sources: Sources, named: Backbone | None) -> None:
    """Put the language model, where none is there yet, and what it makes of ``sources.item_text`` into the sources.

    Args:
        config: the run's.
        dataset: the train data set.
        store: the stage cache.
        sources: with the texts.
        named: what :func:`~recbole_llm.training.language.named_reader` gave.
    """
    assert sources.item_text is not None
    if sources.reader is None:
        sources.reader, sources.reader_mark, lines = take_reader(config, dataset, sources.item_text, store, named)
        sources.lines += lines
        if not config["text_llm"]:
            sources.backbone, sources.backbone_mark = sources.reader, sources.reader_mark
    sources.texts = vectors_of(config, store, sources, sources.item_text.texts)


def vectors_of(
    config: Any, store: StageStore, sources: Sources, texts: list[str], name: str = "item_texts"
) -> np.ndarray:
    """What the language model that reads texts makes of some: a stage, which is added to the sources.

    Args:
        config: the run's.
        store: the stage cache.
        sources: with that language model.
        texts: of any kind.
        name: the stage's.

    Returns:
        float32 ``[len(texts), H]``; zero for a text without tokens.
    """
    backbone, mark = sources.reader, sources.reader_mark
    assert backbone is not None
    kind, limit = config["text_embedding"], config["text_embedding_tokens"]
    inputs = {"backbone": mark, "texts": fingerprint_of(texts), "kind": kind, "limit": limit}

    def make(folder: Path) -> dict[str, Any]:
        before = backbone.tokens_read
        vectors = text_embeddings(backbone, texts, kind, limit, ResumeFile(folder / RESUME_FILE))
        np.savez(folder / VECTORS, vectors=vectors)
        return {"tokens": backbone.tokens_read - before}

    stage = store.run(name, TEXTS_VERSION, inputs, make)
    sources.lines.append(stage.as_dict())
    sources.marks.append(stage.fingerprint)
    with np.load(stage.folder / VECTORS, allow_pickle=False) as arrays:
        return np.asarray(arrays["vectors"])


def _take_backbone(config: Any, dataset: Any, store: StageStore, sources: Sources, named: Backbone | None) -> Backbone:
    """The language model that generates, put into the sources where none was."""
    assert sources.item_text is not None
    if sources.backbone is None:
        sources.backbone, sources.backbone_mark, lines = take_backbone(config, dataset, sources.item_text, store, named)
        sources.lines += lines
    return sources.backbone


def _needs_texts(config: Any, unseen: int) -> bool:
    if config["code_input"] == "text" or config["code_text_weight"] > 0:
        return True
    return bool(unseen) and config["unseen_items"] == "text" and bool(config["item_text"])


def _texts_of(config: Any, dataset: Any) -> ItemText:
    try:
        return read_item_text(config, dataset)
    except UserError as error:
        if config["code_input"] == "text":
            raise
        ways = ["code_text_weight=0"] if config["code_text_weight"] else []
        if config["unseen_items"] == "text" and config["item_text"]:
            ways.append("unseen_items=embedding")
        raise UserError(f"{error}; or leave texts out: {' '.join(ways)}") from None


def _make(config: Any, sources: Sources, raw_ids: list[str], folder: Path) -> dict[str, Any]:
    """Train the codebook on the items that training has seen, and give every item its codes."""
    assert sources.points is not None
    init_seed(config["seed"], config["reproducibility"])
    points, texts, seen = sources.points, sources.texts, sources.seen
    rows = np.flatnonzero(seen if config["code_input"] == "behaviour" else np.arange(len(seen)) > 0)
    quantiser = train_quantiser(
        config, points[rows], None if texts is None else texts[rows], ResumeFile(folder / RESUME_FILE),
        None if sources.behaviour is None else sources.behaviour[rows],
    )  # fmt: skip
    latent = quantiser.latent(points[1:])
    if config["unseen_items"] == "projection" and config["code_input"] == "behaviour" and not seen[1:].all():
        assert texts is not None
        # It shares the points' memory, and those the embedding model's own table.
        latent = latent.clone()
        latent[~seen[1:]] = quantiser.project(texts[~seen][1:])
    codebook = quantiser.codebook
    chosen = encode_evenly(
        codebook,
        latent,
        config["code_even_levels"],
        config["code_sinkhorn_epsilon"],
        config["code_sinkhorn_iterations"],
    )
    if config["code_shuffle"]:
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(config["seed"]))
        chosen, latent = chosen[order], latent[order]
    policy = config["code_collisions"]
    final = resolve(policy, codebook, latent, chosen, keys=np.array(raw_ids[1:]))
    codes = with_padding(final.codes)
    tokens = ItemTokens.from_codes(codes, final.sizes, raw_ids)
    write_tokens(tokens, raw_ids, folder, points if config["code_input"] == "behaviour" else None)
    quantiser.save(folder)
    card = quality.card(
        with_padding(chosen.numpy()), [codebook.size] * codebook.depth, final_codes=codes, policy=policy,
        embeddings=points, texts=texts, names=raw_ids,
        codebook=None if quantiser.autoencoder or config["code_shuffle"] else codebook,
        titles=None if sources.item_text is None else sources.item_text.texts,
        neighbours=config["code_neighbours"], seed=config["seed"],
    )  # fmt: skip
    write_whole(folder / CARD, lambda part: part.write_text(json.dumps(card, indent=1), encoding="utf-8"))
    if final.colliding:
        logger.info("item tokens: %d items share theirs with another (code_collisions: %s)", final.colliding, policy)
    figures = quantiser.autoencoder.figures if quantiser.autoencoder else {}
    return {
        "method": config["code_method"], "vocabulary": tokens.size, "losses": quantiser.losses, "figures": figures,
        "tokens": 0,
    }  # fmt: skip


def with_padding(table: np.ndarray, fill: int = -1) -> np.ndarray:
    """A table of items ``[n_items - 1, ...]`` with the padding item's row before it."""
    return np.concatenate([np.full_like(table[:1], fill), table])
