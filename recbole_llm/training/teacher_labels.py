"""A teacher's labels of all train interactions, made once before training instead of batch by batch within it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.objectives.teacher_cache import Batch, TeacherCache, keep_within, mark_of
from recbole_llm.progress import progress
from recbole_llm.training.store import StageStore, fingerprint_of

# Raised when the code of the stage changes what it makes.
LABELS_VERSION = 2

logger = logging.getLogger("recbole_llm")


def cached_labels(config: Any, dataset: Any, model: Any, store: StageStore) -> dict[str, Any]:
    """Make (or find) the labels and hand them to the model.

    They are of every train interaction that has another of its user before it: what a sample can ask for, and what a
    history can show behind its first item.

    Args:
        config: ``teacher_cache_mib``, ``mask_history`` and how many scores are held at once.
        dataset: the train data set.
        model: has its teacher and the items' tokens.
        store: the stage cache.

    Returns:
        The stage's line for ``result.json``: with its size and the mean and the most of the probability that a position
        lost to the budget.

    Raises:
        UserError: the budget is not enough for one token a position, or the teacher's scores are no numbers.
    """
    items = torch.from_numpy(dataset.train_histories.items).long()
    every = np.arange(len(items))
    moments = torch.from_numpy(np.flatnonzero(every > dataset.train_histories.begins(every)))
    tokenizer, targets = model.tokenizer, items[moments].to(model.device)
    rows = max(1, min(config["eval_max_cells"] // dataset.item_num, config["eval_batch_size"]))

    def batches() -> Iterator[Batch]:
        parts = torch.arange(len(moments)).split(rows)
        for samples in progress(parts, f"labels by {config['cf_model']}", show=bool(config["show_progress"])):
            yield samples, *model.teacher_scores(moments[samples])

    key = fingerprint_of([model.teacher.fingerprint, config["mask_history"], len(moments)])
    budget = config["teacher_cache_mib"] * 2**20

    def find_or_make(folder: Path) -> TeacherCache:
        return TeacherCache.find_or_make(folder, key, tokenizer, targets, batches, budget)

    # The mark knows how many tokens a position may keep: of two budgets that both hold everything it is the same.
    inputs = {"mark": mark_of(key, tokenizer, targets, keep_within(tokenizer, targets, budget))}
    stage = store.run("teacher_labels", LABELS_VERSION, inputs, lambda folder: asdict(find_or_make(folder).card))
    cache = find_or_make(stage.folder)
    model.take_labels(cache, moments)
    card, size = cache.card, cache.card.nbytes / 2**20
    if card.exact:
        logger.info("teacher_labels: %d interactions, %.1f MiB, nothing dropped", card.samples, size)
    else:
        logger.info(
            "teacher_labels: %d interactions, %.1f MiB; each position keeps its %d likeliest tokens and loses %.4f of "
            "its probability in the mean, %.4f at most (teacher_cache_mib)",
            card.samples, size, card.keep, card.dropped_mean, card.dropped_max,
        )  # fmt: skip
    lost = {"dropped_mean": card.dropped_mean, "dropped_max": card.dropped_max}
    return stage.as_dict() | {"mib": round(size, 3)} | lost
