"""The hot paths beside the language models' own, as :mod:`_paths` has those."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import _counts as counts
import glta_training
import numpy as np
import torch
from _counts import Cost, Counted, Sizes
from _paths import Path
from recbole.data.interaction import Interaction
from trie import CODES, LEVELS, random_codes

from recbole_llm.evaluation.ranking import measure
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.itemid.trie import Trie
from recbole_llm.model.graph import MeanOfPowers, csr_tensor, normalised_adjacency
from recbole_llm.model.sasrec_all_positions import SASRecAllPositions
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer

METRICS = ["NDCG", "Recall", "Hit", "MRR"]
TOPK = [5, 10, 20, 50]
# RecBole's SASRec.yaml, without dropout so that what runs twice is counted alike.
SASREC: dict[str, Any] = {
    "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "device": "cpu", "n_layers": 2, "n_heads": 2, "hidden_size": 64,
    "inner_size": 256, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0, "hidden_act": "gelu",
    "layer_norm_eps": 1e-12, "initializer_range": 0.02, "loss_type": "CE", "seed": 0,
}  # fmt: skip


def glta(rows: int) -> Path:
    """Stage 3 behind the frozen Llama of ``glta_training.py``: passes forward and backward of a batch."""
    model, causal, _ = glta_training.build()
    model.begin_stage(glta_training.STAGE)
    batch = model.user_batch(1 + torch.randperm(glta_training.N_USERS - 1)[:rows], torch.Generator().manual_seed(0))
    prefix = len(model._readers[glta_training.STAGE].prefix)
    cost = glta_cost(Sizes.of(causal.config), rows, batch.ids.shape[1], prefix, model.slots)
    soft = int((batch.ids < 0).sum())
    # Users and items through their projectors; those of items do not train here.
    cost += counts.linear(rows, glta_training.GRAPH_WIDTH, glta_training.WIDTH, passes=2)
    cost += counts.linear(soft - rows, glta_training.GRAPH_WIDTH, glta_training.WIDTH)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.stage_loss(glta_training.STAGE, batch).backward()

    step()
    return Path(f"GLTA stage 3, {batch.ids.shape[1]} tokens", step, cost, each=(rows, "user"))


def glta_cost(
    sizes: Sizes, rows: int, tokens: int, prefix: int, slots: int, items: int = glta_training.N_ITEMS
) -> Cost:
    """Passes forward and backward to the soft tokens; item logits at the slots, whose head trains."""
    seen = counts.attention(sizes, rows, tokens, prefix + tokens, counts.TO_INPUTS)
    logits = counts.linear(rows * slots, sizes.width, items, sizes.number, counts.TO_WEIGHTS)
    return counts.decoder(sizes, rows * tokens, seen, counts.TO_INPUTS) + logits


def sasrec(rows: int, items: int, length: int = 50) -> Path:
    """A step of SASRecAllPositions without its optimizer, as counted by torch while it runs."""
    torch.manual_seed(0)
    dataset = SimpleNamespace(num=lambda field: items)
    model = SASRecAllPositions(ChainMap({"MAX_ITEM_LIST_LENGTH": length}, SASREC), dataset)
    lengths = torch.randint(length // 4, length + 1, (rows,))
    inside = torch.arange(length) < lengths.unsqueeze(1)
    shown, targets = (torch.randint(1, items, (rows, length)) * inside for _ in range(2))
    batch = Interaction({"item_id_list": shown, "item_length": lengths, model.TARGETS: targets})

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.calculate_loss(batch).backward()

    with Counted() as counted:
        step()
    return Path(f"SASRec at all positions, {rows} x {length}", step, counted.cost, each=(rows, "user"))


def lightgcn(users: int, items: int, edges: int, width: int = 64, layers: int = 3) -> Path:
    """The graph convolution of one step, forward and backward."""
    rng = np.random.default_rng(0)
    popular = (np.arange(items) + 20.0) ** -0.8
    ends = rng.integers(0, users, edges), rng.choice(items, edges, p=popular / popular.sum())
    matrix = normalised_adjacency(*ends, users, items)
    graph, nodes = csr_tensor(matrix), torch.randn(users + items, width, requires_grad=True)
    gradient = torch.randn(users + items, width)
    product = Cost(2.0 * matrix.nnz * width, 8.0 * matrix.nnz + 2 * 4 * (users + items) * width)
    return Path(
        f"LightGCN, {layers} layers, {matrix.nnz:,} edges",
        lambda: MeanOfPowers.apply(graph, nodes, layers).backward(gradient), product * (2 * layers),
        kind="float32", each=(1, "step"), countable=False,
    )  # fmt: skip


class _Scores:
    """A recommender whose scores are products of vectors."""

    def __init__(self, users: int, items: int, width: int) -> None:
        draw = torch.Generator().manual_seed(0)
        self.users, self.items = (torch.randn(count, width, generator=draw) for count in (users, items))

    def eval(self) -> None:
        """Nothing changes with the mode."""

    def full_sort_predict(self, interaction: Any) -> torch.Tensor:
        """[B, n_items]."""
        return self.users[interaction["user_id"]] @ self.items.T


class _Rows:
    """Batches of users with one target and some excluded items each, as the evaluation's loaders yield them."""

    uid_field = "user_id"

    def __init__(self, users: int, items: int, batch: int = 256, excluded: int = 50) -> None:
        rng = np.random.default_rng(0)
        self._dataset = SimpleNamespace(item_num=items)
        self.candidates, self.tie_order = torch.arange(items) > 0, torch.from_numpy(rng.permutation(items))
        self._batches = []
        for start in range(0, users, batch):
            who = torch.arange(start, min(start + batch, users))
            rows = torch.arange(len(who))
            seen = torch.from_numpy(rng.integers(1, items, len(who) * excluded))
            wanted = torch.from_numpy(rng.integers(1, items, len(who)))
            held = rows.repeat_interleave(excluded), seen
            self._batches.append((Interaction({"user_id": who}), held, rows, wanted))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def evaluator(users: int, items: int, width: int = 64) -> Path:
    """Every user's catalogue ranked and measured; the scores are read once more than they are written."""
    model, loader = _Scores(users, items, width), _Rows(users, items)
    config = {"metrics": METRICS, "topk": TOPK, "device": "cpu"}
    cost = counts.linear(users, width, items)
    batches = len(loader)
    # The items' vectors are read for every batch.
    cost += Cost(0, 4 * ((batches - 1) * items * width + users * items))
    return Path(
        f"evaluation, {users:,} x {items:,}", lambda: measure(model, loader, config, None), cost,
        each=(users, "user"), countable=False,
    )  # fmt: skip


def mask(items: int, rows: int = 160, depth: int = 1) -> Path:
    """The legal tokens of a step's rows, written as they are."""
    made = ItemTokens.from_codes(random_codes(items), [CODES] * LEVELS)
    trie = Trie(made)
    chosen = torch.from_numpy(np.random.default_rng(1).integers(1, items + 1, rows))
    nodes = trie.walk(made.padded(chosen)[0][:, :depth])[:, -1]
    return Path(
        f"mask after {depth} of {LEVELS} tokens, {items:,} items", lambda: trie.mask(nodes, depth=depth),
        Cost(0, rows * trie.size), kind="float32", each=(rows, "row"),
    )  # fmt: skip


def soft_labels(items: int, samples: int = 16) -> Path:
    """TCA4Rec's labels of items of 4 codes; a teacher's logits are read once."""
    made = ItemTokens.from_codes(random_codes(items), [CODES] * LEVELS)
    tokenizer = CollaborativeTokenizer(made)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.standard_normal((samples, items + 1), dtype=np.float32))
    targets = torch.from_numpy(rng.integers(1, items + 1, samples))
    return Path(
        f"soft labels of {samples} samples, {items:,} items", lambda: tokenizer(logits, targets),
        Cost(0, 4 * samples * items), kind="float32", each=(samples, "sample"),
    )  # fmt: skip
