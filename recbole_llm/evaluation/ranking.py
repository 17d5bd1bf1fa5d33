"""Rank every user's catalogue with any model and measure the ranking."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from recbole.evaluator import metrics_dict
from recbole.evaluator.collector import DataStruct
from recbole.evaluator.register import metric_information

from recbole_llm import processes
from recbole_llm.data.ties import leaders, top_items
from recbole_llm.errors import UserError
from recbole_llm.evaluation.metrics import USER_METRICS
from recbole_llm.progress import progress

# Pairs that a model which only scores pairs is given at once.
PAIRS_AT_ONCE = 200_000


@dataclass
class Measured:
    """What one evaluation found.

    Attributes:
        metrics: name to value, e.g. ``ndcg@10``.
        per_user: name to float64 [U], for the metrics that are means over users.
        users: int64 [U], internal user ids in the arrays' order.
        items: int64 [U, K], the ranked items; 0, the padding item, where fewer may be recommended to a user.
        counts_as: int64 [n_items], the item as which each was ranked and met; ``None``, itself.
        tied_targets: targets with the score of another item that may be recommended, where that is high enough to be
            among the K best: not the model says which of the two comes first. ``None`` where nothing was counted.
        prompts: how many evaluations, each with a prompt of its own, the metrics are the mean of; the ranked items are
            the first one's, and so is the count of ties.
    """

    metrics: OrderedDict[str, float] = field(default_factory=OrderedDict)
    per_user: dict[str, np.ndarray] = field(default_factory=dict)
    users: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    items: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    counts_as: np.ndarray | None = None
    tied_targets: int | None = None
    prompts: int = 1


def mean_of(parts: Sequence[Measured]) -> Measured:
    """The mean over several evaluations of the same users; the ranked items are the first one's."""
    first = parts[0]
    metrics = OrderedDict((name, float(np.mean([part.metrics[name] for part in parts]))) for name in first.metrics)
    per_user = {name: np.mean([part.per_user[name] for part in parts], axis=0) for name in first.per_user}
    return replace(first, metrics=metrics, per_user=per_user, prompts=len(parts))


@torch.no_grad()
def measure(
    model: Any,
    loader: Any,
    config: Any,
    train_data: Any,
    show: bool = False,
    what: str = "ranking",
    shared: bool = False,
) -> Measured:
    """Rank and measure one phase.

    Args:
        model: scores the catalogue through ``full_sort_predict`` (or, where it searches, through
            ``full_sort_predict_excluding``, which learns what to exclude and so returns K legal items). Where it has
            ``counts_as``, int64 [n_items], items are ranked, and targets are met, as the item that each counts as.
        loader: yields RecBole's full-sort tuples; ours or RecBole's.
        config: ``metrics``, ``topk`` and ``device``.
        train_data: the training loader, for metrics that need popularity; ``None`` when none does.
        show: tell progress.
        what: the step's name in progress.
        shared: each process of the run ranks its share of the rows; all of them get the whole.

    Returns:
        The metrics, each user's values, the ranked items.

    Raises:
        UserError: the model's scores hold NaN, or the largest K exceeds the candidates.
    """
    model.eval()
    n_items = loader._dataset.item_num
    largest = max(config["topk"])
    candidates = getattr(loader, "candidates", None)
    available = int(candidates.sum()) if candidates is not None else n_items - 1
    if largest > available:
        raise UserError(f"topk asks for {largest} items, but only {available} can be recommended")
    needs = {need for metric in config["metrics"] for need in metric_information[metric.lower()]}
    found = _Found(largest, "rec.meanrank" in needs, getattr(loader, "tie_order", None))
    shared = shared and processes.count() > 1
    counts_as = getattr(model, "counts_as", None)
    batches = loader.share(processes.rank(), processes.count()) if shared else loader
    for batch in progress(batches, what, total=len(batches), show=show):
        interaction, excluded, rows, items = batch
        scores = catalogue_scores(model, interaction.to(config["device"]), excluded, candidates, loader._dataset)
        if counts_as is not None:
            scores, items = as_counted(scores, counts_as.to(scores.device)), counts_as[items.cpu()]
        found.add(interaction[loader.uid_field], scores, rows.to(scores.device), items.to(scores.device))
    if shared:
        found.merge(processes.gathered(found))
    measured = found.measured(config, needs, train_data)
    measured.counts_as = None if counts_as is None else counts_as.cpu().numpy()
    return measured


def catalogue_scores(
    model: Any, interaction: Any, excluded: Any, candidates: torch.Tensor | None, dataset: Any
) -> torch.Tensor:
    """Scores of a batch over the whole catalogue, as every ranking is made from.

    Args:
        model: see :func:`measure`.
        interaction: what the model is told of each row.
        excluded: (rows, items) that may not be recommended, int64 each; ``None`` for none.
        candidates: bool [n_items]; ``None`` for all.
        dataset: says how many items there are where there are no candidates, and has the features of a model that
            scores pairs only.

    Returns:
        [B, n_items], -inf at the padding item, at items that are no candidates and at excluded ones.

    Raises:
        UserError: a score is NaN.
    """
    device = interaction[next(iter(interaction))].device
    if not len(interaction):
        # Not every model can be asked for nothing.
        return torch.zeros(0, dataset.item_num if candidates is None else len(candidates), device=device)
    if hasattr(model, "full_sort_predict_excluding") and candidates is not None:
        empty = torch.zeros(0, dtype=torch.long, device=device)
        row, item = (empty, empty) if excluded is None else (part.to(device) for part in excluded)
        scores = model.full_sort_predict_excluding(interaction, row, item, candidates.to(device))
    else:
        scores = _full_sort(model, interaction, dataset)
    scores = scores.view(-1, dataset.item_num if candidates is None else len(candidates))
    if torch.isnan(scores).any():
        raise UserError(
            f"{type(model).__name__} gives NaN scores; its weights have diverged, try a lower learning_rate"
        )
    scores[:, 0] = -torch.inf
    if candidates is not None and not bool(candidates[1:].all()):
        scores[:, ~candidates.to(device)] = -torch.inf
    if excluded is not None:
        scores[excluded[0].to(device), excluded[1].to(device)] = -torch.inf
    return scores


def as_counted(scores: torch.Tensor, counts_as: torch.Tensor) -> torch.Tensor:
    """Scores [B, n_items] in which an item has the best of those that count as it, and these have none."""
    return torch.full_like(scores, -torch.inf).scatter_reduce(1, counts_as.expand_as(scores), scores, "amax")


def shown_for(scores: torch.Tensor, counts_as: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """The item to show for what several items count as: the best one, which that may be shown, first of equal ones.

    Args:
        scores: [B, n_items], -inf for what may not be shown.
        counts_as: see :func:`as_counted`.
        order: all items in the order of ties, int64 [n_items].

    Returns:
        int64 [B, n_items], by the item that they count as; 0 for those that no item counts as.
    """
    items = torch.arange(len(order), device=order.device)
    rank = torch.empty_like(order).scatter_(0, order, items)
    shown = torch.where(leaders(scores, counts_as, rank), items, 0)
    return torch.zeros_like(shown).scatter_reduce(1, counts_as.expand_as(shown), shown, "amax")


def _full_sort(model: Any, interaction: Any, dataset: Any) -> torch.Tensor:
    """``full_sort_predict``, or every pair through ``predict`` for models that only score pairs (trainer.py:526)."""
    try:
        return model.full_sort_predict(interaction)
    except NotImplementedError:
        pass
    features = dataset.get_item_feature().to(interaction[next(iter(interaction))].device)
    rows = max(1, PAIRS_AT_ONCE // len(features))
    scores = []
    for start in range(0, len(interaction), rows):
        part = type(interaction)({name: interaction[name][start : start + rows] for name in interaction})
        pairs = part.repeat_interleave(len(features))
        pairs.update(features.repeat(len(part)))
        scores.append(model.predict(pairs).view(len(part), len(features)))
    return torch.cat(scores)


class _Found:
    """Collects hits and ranked items batch by batch."""

    def __init__(self, largest: int, ranks: bool, order: torch.Tensor | None) -> None:
        self.largest, self.ranks, self.order = largest, ranks, order
        self.users: list[torch.Tensor] = []
        self.items: list[torch.Tensor] = []
        self.hits: list[torch.Tensor] = []
        self.targets: list[torch.Tensor] = []
        self.tied: list[torch.Tensor] = []
        self.mean_ranks: list[torch.Tensor] = []

    def add(self, users: torch.Tensor, scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor) -> None:
        """Take one batch: users [B], scores [B, n_items], targets as (row, item) pairs."""
        top = top_items(scores, self.largest, self.order)
        last = scores.gather(1, top[:, -1:])
        # Behind the last that may be recommended stands nothing, and no item that was excluded.
        top = top.masked_fill(scores.gather(1, top).isneginf(), 0)
        is_target = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        is_target[rows, items] = True
        self.users.append(users.cpu())
        self.items.append(top.cpu())
        self.hits.append(is_target.gather(1, top).cpu())
        # Repeated targets count once, so the matrix is summed, not the pairs.
        row, item = is_target.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(scores))
        self.targets.append(counts.cpu())
        self.tied.append(_tied(scores, row, item, last).cpu())
        if self.ranks:
            self.mean_ranks.append(_mean_ranks(scores, row, item, counts).cpu())

    def merge(self, parts: list[_Found]) -> None:
        """Take together what the processes found, in the order in which one process would have found it."""
        counts = [sum(len(users) for users in part.users) for part in parts]
        places = [torch.arange(count) * len(parts) + rank for rank, count in enumerate(counts)]
        order = torch.cat(places).argsort()
        for name in ("users", "items", "hits", "targets", "tied", "mean_ranks"):
            tensors = [tensor for part in parts for tensor in getattr(part, name)]
            setattr(self, name, [torch.cat(tensors)[order]] if tensors else [])

    def measured(self, config: Any, needs: set[str], train_data: Any) -> Measured:
        """Turn what was collected into metrics."""
        hits = torch.cat(self.hits).numpy()
        targets = torch.cat(self.targets).numpy()
        result = Measured(users=torch.cat(self.users).numpy(), items=torch.cat(self.items).numpy())
        result.tied_targets = int(torch.cat(self.tied).sum())
        _check_full(result.items, config)
        struct = DataStruct()
        struct.set("rec.items", torch.cat(self.items))
        struct.set("rec.topk", torch.cat([torch.cat(self.hits).int(), torch.cat(self.targets).int()[:, None]], dim=1))
        if self.ranks:
            struct.set("rec.meanrank", torch.cat(self.mean_ranks))
        _data_needs(struct, needs, train_data)
        for metric in (name.lower() for name in config["metrics"]):
            if metric in USER_METRICS:
                values = USER_METRICS[metric](hits, targets)
                for k in config["topk"]:
                    result.per_user[f"{metric}@{k}"] = values[:, k - 1]
                    result.metrics[f"{metric}@{k}"] = float(values[:, k - 1].mean())
            else:
                for name, value in metrics_dict[metric](config).calculate_metric(struct).items():
                    result.metrics[name] = float(value)
        return result


def _check_full(items: np.ndarray, config: Any) -> None:
    """Refuse metrics that count what is recommended where nothing is: to them the padding item is an item too."""
    counting = [name for name in config["metrics"] if "rec.items" in metric_information[name.lower()]]
    if not counting:
        return
    short = int((items[:, : max(config["topk"])] == 0).any(axis=1).sum())
    if short:
        raise UserError(
            f"{', '.join(counting)} count what is recommended, and {short} users have fewer than {max(config['topk'])} "
            "items left; lower topk or leave them out of metrics"
        )


def _tied(scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """How many targets of each row share their score with another item, at or above the last of the K best.

    Args:
        scores: [B, n_items], -inf where nothing may be recommended.
        rows: int64 [T], of the targets.
        items: int64 [T], the targets.
        last: [B, 1], the score of the Kth item.

    Returns:
        int64 [B].
    """
    own = scores[rows, items]
    near = (own >= last[rows, 0]) & torch.isfinite(own)
    rows, own = rows[near], own[near]
    tied = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        equal = (scores[rows[part]] == own[part, None]).sum(dim=1)
        tied.index_add_(0, rows[part], (equal > 1).long())
    return tied


def _mean_ranks(scores: torch.Tensor, rows: torch.Tensor, items: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """What RecBole's GAUC needs (collector.py:165-184) without sorting the catalogue.

    Returns:
        float [B, 3]: sum of the targets' average descending ranks, number of finite scores, number of targets.
    """
    own = scores[rows, items]
    sums = torch.zeros(len(scores), dtype=torch.float64, device=scores.device)
    for start in range(0, len(rows), 1024):
        part = slice(start, start + 1024)
        table = scores[rows[part]]
        above = (table > own[part, None]).sum(dim=1)
        equal = (table == own[part, None]).sum(dim=1)
        sums.index_add_(0, rows[part], above.double() + (equal.double() + 1) / 2)
    finite = torch.isfinite(scores).sum(dim=1)
    return torch.stack([sums, finite.double(), counts.double()], dim=1)


def _data_needs(struct: DataStruct, needs: set[str], train_data: Any) -> None:
    wanted = {need for need in needs if need.startswith("data.")}
    if not wanted:
        return
    data = train_data._dataset
    values = {
        "data.num_items": lambda: data.item_num,
        "data.num_users": lambda: data.user_num,
        # A sequential view has no row for a user's first item; the split has.
        "data.count_items": lambda: (
            Counter(data.train_histories.items.tolist()) if hasattr(data, "split") else data.item_counter
        ),
        "data.count_users": lambda: data.user_counter,
    }
    for need in wanted & set(values):
        struct.set(need, values[need]())
