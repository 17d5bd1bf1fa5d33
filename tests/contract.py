"""What the tests over the registry share: names by the registry itself, data for every kind, settings that are quick.

A model of ours that is registered stands in every test over these names, and in none of their files.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from conftest import ML100K, small_ml100k
from small_models import SMALL

from recbole_llm import registry

# Eight of RecBole's own, of every kind that it has: pairs, points, whole catalogues, closed forms, prefixes, features,
# a knowledge graph.
EIGHT = ("BPR", "NeuMF", "EASE", "ItemKNN", "GRU4Rec", "FPMC", "FM", "CKE")
# Models that draw noise while they rank.
DRAW = ("ADMMSLIM", "KTUP")
UNSEEN = "9999"  # an item whose only row is some user's last one
_ROWS = {"inter": ["user_id", "item_id", "timestamp"]}
_GRAPH = {"kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}
_CLASS = {"load_col": _ROWS | {"item": ["item_id", "class"]}}
_VECTORS: dict[str, Any] = {
    "load_col": _ROWS | _GRAPH | {"ent": ["ent_id", "ent_emb"]}, "additional_feat_suffix": ["ent"],
    "alias_of_entity_id": ["ent_id"], "preload_weight": {"ent_id": "ent_emb"},
}  # fmt: skip
_RELATIONS = {
    "load_col": _VECTORS["load_col"] | {"rel": ["rel_id", "rel_emb"]}, "additional_feat_suffix": ["ent", "rel"],
    "alias_of_relation_id": ["rel_id"], "preload_weight": {"ent_id": "ent_emb", "rel_id": "rel_emb"},
}  # fmt: skip
_SHORT = {"MAX_ITEM_LIST_LENGTH": 8}
# What some of RecBole's models need of the data, or of so little of it.
_OWN: dict[str, dict[str, Any]] = {
    "FDSA": _CLASS, "GRU4RecF": _CLASS, "SASRecF": _CLASS, "GRU4RecKG": _VECTORS, "KSR": _VECTORS | _RELATIONS,
    "NCL": {"num_clusters": 4}, "DGCF": {"train_batch_size": 64},
}  # fmt: skip


def ours() -> list[str]:
    """Every model whose class is ours."""
    return [entry.name for entry in registry.entries().values() if entry.module.startswith("recbole_llm.")]


def recboles() -> list[str]:
    """Every model whose class is RecBole's."""
    return [entry.name for entry in registry.entries().values() if entry.module.startswith("recbole.")]


def settings_for(model: str) -> dict[str, Any]:
    """Settings with which a model trains in seconds on :func:`write_data`'s data.

    Raises:
        AssertionError: it reads a language model, and nothing says how that is made small.
    """
    entry = registry.entries()[model]
    assert model in SMALL or (entry.kind != "language" and "backbone" not in entry.stages), (
        f"{model} is registered and SMALL in tests/small_models.py has no row for it: add the settings with which it "
        "trains in seconds (llm_train_steps: 2, ...)"
    )
    kinds = {
        "context": {"load_col": _ROWS | {"user": ["user_id", "age", "gender"], "item": ["item_id", "class"]}},
        "knowledge": {"load_col": _ROWS | _GRAPH}, "sequential": {"load_col": _ROWS} | _SHORT,
    }  # fmt: skip
    return kinds.get(entry.kind, {"load_col": _ROWS}) | _OWN.get(model, {}) | SMALL.get(model, {})


def write_data(folder: Path) -> Path:
    """A ``data_path`` with the data set ``small``: 40 users and 300 items of ml-100k, with all that models may read."""
    small = small_ml100k(folder, users=40, items=300) / "small"
    shutil.copy(ML100K / "ml-100k.user", small / "small.user")
    rows = (small / "small.inter").read_text(encoding="utf-8").splitlines()
    clock = max(float(row.split("\t")[3]) for row in rows[1:])
    user = rows[1].split("\t")[0]
    _append(small / "small.inter", f"{user}\t{UNSEEN}\t5\t{clock + 1:.0f}")
    _append(small / "small.item", f"{UNSEEN}\tA film that nobody has seen\t1998\tDrama")
    items = {row.split("\t")[1] for row in rows[1:]} | {UNSEEN}
    drawn = random.Random(0)
    entities = {item: f"m.{item}" for item in items}
    links = ["item_id:token\tentity_id:token", *(f"{item}\t{entities[item]}" for item in sorted(items))]
    triples = ["head_id:token\trelation_id:token\ttail_id:token"]
    vectors = ["ent_id:token\tent_emb:float_seq"]
    for item in sorted(items):
        triples += [
            f"{entities[item]}\tgenre\tg.{drawn.randrange(5)}",
            f"{entities[item]}\tmaker\tp.{drawn.randrange(9)}",
        ]
        vectors.append(f"{entities[item]}\t{_vector(drawn)}")
    relations = ["rel_id:token\trel_emb:float_seq", *(f"{name}\t{_vector(drawn)}" for name in ("genre", "maker"))]
    for suffix, lines in (("link", links), ("kg", triples), ("ent", vectors), ("rel", relations)):
        (small / f"small.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _vector(drawn: random.Random) -> str:
    return " ".join(f"{drawn.gauss(0, 1):.3f}" for _ in range(64))


def _append(file: Path, line: str) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
