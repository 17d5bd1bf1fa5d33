"""Do projected items stand by their own texts? The alignment view of a run: scores, chance beside each, a picture.

A soft token is ``item_projector(item_embeddings)``, a row of the language model's input space. Its text is the mean of
the language model's input embeddings over the description's tokens, or the language model's last state after reading
it. Both are looked at before the alignment stage (the projector as it starts) and after it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes

from recbole_llm.errors import UserError
from recbole_llm.evaluation.pictures import MISSING_PLOTS, can_draw, draw_maps

RECALL_AT = (1, 10)
NEIGHBOURS = 10
SHUFFLES = 20
MAPPED_ITEMS = 1000
SCORED_ITEMS = 4000  # a similarity table of all pairs is held at once
READ_AT_ONCE = 64


@dataclass(frozen=True)
class Space:
    """Items and texts at one moment.

    Attributes:
        moment: e.g. ``before item_text_alignment``.
        items: float64 [n, H], the projected items.
    """

    moment: str
    items: np.ndarray


@dataclass(frozen=True)
class Aligned:
    """What the view of a run is computed from.

    Attributes:
        names: raw item ids, [n]: the items that stand in train and have a text of their own.
        texts: their texts, [n].
        spaces: the projected items, moment by moment.
        references: the texts' vectors by kind, each float64 [n, H].
        seed: of shuffled pairs, folds and the picture.
    """

    names: list[str]
    texts: list[str]
    spaces: list[Space]
    references: dict[str, np.ndarray]
    seed: int


def inspect_alignment(path: str, arguments: list[str]) -> str:
    """``recbole-llm inspect alignment RUN [--states=true]``: text; ``alignment.json`` and ``.png`` go into the run.

    Args:
        path: the folder of a finished run of GLTA.
        arguments: ``--states=true`` reads every description with the language model as well.

    Raises:
        UserError: no such run, one without an item projector, or one whose stages are not in the cache any more.
    """
    states = False
    for argument in arguments:
        if argument not in ("--states=true", "--states=false"):
            raise UserError(f"{argument!r} is not understood here; inspect alignment takes a folder and --states=true")
        states = argument.endswith("true")
    view = aligned(path, states)
    scores = score(view)
    # A result that was copied out of its run is one of several in its folder.
    beside = Path(path, "alignment") if Path(path).is_dir() else Path(path).with_suffix(".alignment")
    data, picture = (beside.with_name(beside.name + suffix) for suffix in (".json", ".png"))
    data.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    lines = [_text(scores), "", f"json        {data}"]
    if can_draw():
        _picture(view, picture)
        lines.append(f"picture     {picture}")
    else:
        lines.append(f"picture     none: {MISSING_PLOTS}")
    return "\n".join(lines)


# --- finding a run again ---------------------------------------------------------------------------------------------
def aligned(path: str | Path, states: bool = False) -> Aligned:
    """Rebuild the model of a run from its settings and the stage cache, and take its spaces.

    Args:
        path: the run's folder or ``result.json``.
        states: also let the language model read every description.

    Raises:
        UserError: see :func:`inspect_alignment`.
    """
    from recbole_llm.data import create_dataset, data_preparation
    from recbole_llm.training.found import find_run
    from recbole_llm.training.pipeline import fit_parts_of
    from recbole_llm.training.run_files import read_result, stage_folder
    from recbole_llm.training.staged import StagedTrainer
    from recbole_llm.training.state import WEIGHTS

    _check(read_result(path))
    result, config, store = find_run(path)
    dataset = create_dataset(config)
    train_data = data_preparation(config, dataset)[0]
    model = config.model_class(config, train_data._dataset).to(config["device"])
    trainer = StagedTrainer(config, model)
    made: dict[str, Any] = {}
    weights: list[torch.Tensor] = []
    prepare = model.prepare

    def prepare_and_look(**given: Any) -> None:
        prepare(**given)
        made.update(given)
        weights.append(_projected(model))

    model.prepare = prepare_and_look
    trainer.prepare(train_data, store, fit_parts_of(config, store))
    recorded = {stage["name"]: stage["fingerprint"] for stage in result["stages"]}
    for stage in trainer.stages:
        if recorded.get(stage["name"]) != stage["fingerprint"]:
            raise UserError(f"{path}: {stage['name']} is not the one of this run; data or settings have changed since")
    moments = [f"before {model.stages[0]}", *(f"after {stage}" for stage in model.stages[:-1])]
    if len(model.stages) > 1:
        weights.append(_projected(model))
    if config["train_item_projector"] or len(model.stages) == 1:
        last = result["stages"][-1]
        trainer.load_best(stage_folder(store.root, last) / WEIGHTS)
        moments.append(f"after {last['name']}")
        weights.append(_projected(model))
    chosen = _items_to_show(train_data._dataset, trainer.item_text, config["seed"])
    texts = [made["item_texts"][item] for item in chosen.tolist()]
    spaces = [Space(moment, table[chosen].numpy()) for moment, table in zip(moments, weights, strict=True)]
    references = _references(made["backbone"], texts, config["alignment_description_tokens"], states)
    names = dataset.field2id_token[dataset.iid_field][chosen].tolist()
    return Aligned(names, texts, spaces, references, config["seed"])


def _check(result: Mapping[str, Any]) -> None:
    from recbole_llm import registry

    if not getattr(registry.get_model(result["model"]), "needs_item_text", False):
        raise UserError(
            f"a run of {result['model']} has no items in a language model's space; inspect alignment is for GLTA"
        )
    for key in ("refit_on_valid", "merge_valid"):
        if result["config"].get(key):
            raise UserError(f"this run was made with {key}, whose stages saw valid rows; inspect one without it")


def _items_to_show(train: Any, text: Any, seed: int) -> np.ndarray:
    """int64 [n]: items in train (others' embeddings are untrained) that have a text (a fallback is nobody's).

    Of a large catalogue it is a sample.
    """
    seen = np.unique(train.train_histories.items)
    chosen = seen[np.asarray(text.named)[seen]]
    if len(chosen) < 3:
        raise UserError(f"only {len(chosen)} items stand in train and have a text; there is nothing to align")
    if len(chosen) > SCORED_ITEMS:
        chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:SCORED_ITEMS])
    return chosen


@torch.no_grad()
def _projected(model: Any) -> torch.Tensor:
    return model.item_projector(model.item_embeddings).double().cpu()


@torch.no_grad()
def _references(backbone: Any, texts: list[str], limit: int, states: bool) -> dict[str, np.ndarray]:
    """The texts in the language model's space, cut as the alignment stage cuts them."""
    ids = [backbone.encode(text)[:limit] or [backbone.eos_id] for text in texts]
    table = backbone.embed_tokens.weight
    means = [table[torch.tensor(row, device=table.device)].double().mean(0) for row in ids]
    found = {"mean of the text's token embeddings": torch.stack(means).cpu().numpy()}
    if states:
        found["last state after the text"] = _last_states(backbone, ids)
    return found


def _last_states(backbone: Any, ids: list[list[int]]) -> np.ndarray:
    """float64 [n, H]: the language model's last state at each text's last token."""
    start = [] if backbone.bos_id is None else [backbone.bos_id]
    rows = []
    for first in range(0, len(ids), READ_AT_ONCE):
        part = [torch.tensor([*start, *row]) for row in ids[first : first + READ_AT_ONCE]]
        lengths = torch.tensor([len(row) for row in part])
        tokens = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=backbone.pad_id)
        mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
        device = backbone.embed_tokens.weight.device
        states = backbone.decoder(input_ids=tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
        rows.append(states[torch.arange(len(part)), lengths - 1].double().cpu())
    return torch.cat(rows).numpy()


# --- scores ----------------------------------------------------------------------------------------------------------
def score(view: Aligned) -> dict[str, Any]:
    """Every score at every moment, with its chance level and the same score of shuffled pairs.

    Args:
        view: items and texts.

    Returns:
        Plain data: ``items``, ``distinct_texts``, and per reference and moment ``{score: {value, shuffled, chance}}``.
    """
    distinct = {text: number for number, text in enumerate(dict.fromkeys(view.texts))}
    owner = np.array([distinct[text] for text in view.texts])
    return {
        "schema": 1,
        "items": len(view.texts),
        "distinct_texts": len(distinct),
        "shuffles": SHUFFLES,
        "seed": view.seed,
        "references": {
            kind: {space.moment: _scores(space.items, texts, owner, view.seed) for space in view.spaces}
            for kind, texts in view.references.items()
        },
    }


def _scores(items: np.ndarray, texts: np.ndarray, owner: np.ndarray, seed: int) -> dict[str, dict[str, float | None]]:
    """The scores of one moment.

    Args:
        items, texts: float64 [n, H], pairwise.
        owner: int64 [n], which distinct text each item has.
        seed: of the shuffled pairs.
    """
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(items)) for _ in range(SHUFFLES)]

    def both(measure: Callable[[np.ndarray], float], chance: float | None) -> dict[str, float | None]:
        straight = measure(np.arange(len(items)))
        return {"value": straight, "shuffled": float(np.mean([measure(order) for order in orders])), "chance": chance}

    found = {"procrustes disparity": both(lambda order: disparity(items, texts[order]), None)}
    count = int(owner.max()) + 1
    for k in RECALL_AT:
        if k < count:
            found[f"recall@{k}"] = both(partial(_recall_of, items, texts, owner, k), k / count)
            found[f"recall@{k}, rotated"] = both(
                partial(_recall_of, items, texts, owner, k, seed=seed), rotated_chance(owner, k, seed)
            )
    near = min(NEIGHBOURS, len(items) - 2)
    if near > 0:
        left, right = neighbours(items, near), neighbours(texts, near)
        found[f"shared {near} neighbours"] = both(
            lambda order: overlap(left, _renamed(right, order)), near / (len(items) - 1)
        )
    return found


def _recall_of(
    items: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int, order: np.ndarray, seed: int | None = None
) -> float:
    """Recall when item ``i`` has text ``order[i]``; with a seed, rotated."""
    if seed is None:
        return recall(items, texts[order], owner[order], k)
    return rotated_recall(items, texts[order], owner[order], k, seed)


def disparity(items: np.ndarray, texts: np.ndarray) -> float:
    """What is left of the squared distance after the best shift, scaling and rotation: 0 the same shape, 1 none."""
    try:
        return float(procrustes(texts, items)[2])
    except ValueError:
        # All points of one side are one point: there is no shape.
        return 1.0


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows at length one, for cosines; a row of zeros stays."""
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def recall(items: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int) -> float:
    """Share of items whose own text is among the ``k`` distinct texts of the highest cosine.

    Args:
        items, texts: float64 [n, H], pairwise.
        owner: int64 [n], which distinct text each item has; items may share one.
        k: how many texts count.
    """
    own_texts, first = np.unique(owner, return_index=True)
    scores = unit(items) @ unit(texts[first]).T
    own = scores[np.arange(len(items)), np.searchsorted(own_texts, owner)]
    # A tie counts by half, so that a projector that sends every item to one point scores chance and no more.
    rank = (scores > own[:, None]).sum(1) + ((scores == own[:, None]).sum(1) - 1) / 2
    return float((rank < k).mean())


def rotated_recall(items: np.ndarray, texts: np.ndarray, owner: np.ndarray, k: int, seed: int) -> float:
    """:func:`recall` after the shift and rotation that fit best, learned on the other half of the items.

    Fitted on the items it is judged on, a rotation of many dimensions finds structure in noise; and it draws every item
    towards the texts it was fitted on, so only the texts of the judged half are in the list.
    """
    halves = _halves(len(items), seed)
    found = 0.0
    for judged, fitted in (halves, halves[::-1]):
        centre, target = items[fitted].mean(0), texts[fitted].mean(0)
        rotation, _ = orthogonal_procrustes(items[fitted] - centre, texts[fitted] - target)
        moved = (items[judged] - centre) @ rotation
        found += recall(moved, texts[judged] - target, owner[judged], k) * len(judged) / len(items)
    return found


def rotated_chance(owner: np.ndarray, k: int, seed: int) -> float:
    """What :func:`rotated_recall` is for items that know nothing of their texts."""
    halves = _halves(len(owner), seed)
    return sum(min(1.0, k / len(np.unique(owner[half]))) * len(half) for half in halves) / len(owner)


def _halves(count: int, seed: int) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(seed).permutation(count), 2)


def neighbours(rows: np.ndarray, k: int) -> np.ndarray:
    """int64 [n, k]: each row's nearest other rows by cosine, after centring."""
    scores = unit(rows - rows.mean(0))
    scores = scores @ scores.T
    np.fill_diagonal(scores, -np.inf)
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _renamed(near: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The neighbours among texts when item ``i`` has text ``order[i]``."""
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    return place[near[order]]


def overlap(left: np.ndarray, right: np.ndarray) -> float:
    """Mean share of neighbours that two tables [n, k] have in common, row by row."""
    return float((left[:, :, None] == right[:, None, :]).any(2).mean())


# --- showing ---------------------------------------------------------------------------------------------------------
def _text(scores: Mapping[str, Any]) -> str:
    lines = [
        f"{scores['items']} items in train with a text of their own, {scores['distinct_texts']} distinct texts; "
        f"shuffled: mean of {scores['shuffles']} random pairings of the same vectors, which is what chance is",
    ]
    for kind, moments in scores["references"].items():
        lines.append(f"\nprojected items against the {kind}")
        names = list(next(iter(moments.values())))
        width = max(map(len, moments)) + 2
        lines.append(f"  {'':24}" + "".join(f"{moment:>{width}}{'shuffled':>10}" for moment in moments) + "    chance")
        for name in names:
            cells = "".join(
                f"{moment[name]['value']:>{width}.4f}{moment[name]['shuffled']:>10.4f}" for moment in moments.values()
            )
            chance = next(iter(moments.values()))[name]["chance"]
            lines.append(f"  {name:24}{cells}{'' if chance is None else f'{chance:10.4f}'}")
    lines += [
        "",
        "disparity: 0 the same shape; near `shuffled`, no shape in common. recall@k: the own text among the k nearest",
        "texts by cosine; rotated: among half of the texts, after the rotation fitted on the other half. shared",
        "neighbours: of the nearest items by projection, how many are so by text. Better are a smaller disparity and",
        "larger values of the others.",
    ]
    return "\n".join(lines)


def _picture(view: Aligned, path: Path) -> None:
    """A t-SNE map a moment: texts and projected items together, a thin line from each item to its text."""
    from sklearn.manifold import TSNE

    kind, texts = next(iter(view.references.items()))
    rng = np.random.default_rng(view.seed)
    shown = np.sort(rng.permutation(len(texts))[:MAPPED_ITEMS])
    maps = {}
    for space in view.spaces:
        points = np.concatenate([space.items[shown], texts[shown]])
        perplexity = min(30.0, (len(points) - 1) / 3)
        flat = TSNE(metric="cosine", init="random", perplexity=perplexity, random_state=view.seed).fit_transform(points)
        maps[space.moment] = (flat[: len(shown)], flat[len(shown) :])
    title = f"t-SNE (cosine) of {len(shown)} projected items and the {kind}"
    draw_maps(maps, ("projected items", "their texts"), title, path)
