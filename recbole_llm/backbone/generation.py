"""Tags that a language model writes about users: batched greedy generation that goes on where it was cut off."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recbole_llm.backbone.base import Backbone
from recbole_llm.progress import progress

DONE = "generated.jsonl"
# What separates tags in an answer; a numbered or dotted list has its marks taken off.
SEPARATORS = re.compile(r"[,;\n\u2022|]+")
MARK = re.compile(r"^\s*(?:\d+[.)]|[-*])?\s*")
# An answer that goes on with prose: a tag of more words is no tag.
MOST_WORDS = 5


def tags_of(answer: str, count: int) -> str:
    """The first tags of a language model's answer.

    Args:
        answer: what it wrote.
        count: tags at most.

    Returns:
        Distinct tags (by case-folded spelling) of at most five words each, in order, joined by ``", "``.
    """
    tags: dict[str, str] = {}
    for part in SEPARATORS.split(answer):
        tag = " ".join(MARK.sub("", part, count=1).strip(" .\"'[]").split())
        if any(map(str.isalnum, tag)) and len(tag.split()) <= MOST_WORDS:
            tags.setdefault(tag.casefold(), tag)
    return ", ".join(list(tags.values())[:count])


def answer_prompts(
    model: Any,
    backbone: Backbone,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    batch_size: int,
    folder: Path,
    what: str,
) -> list[str]:
    """A language model's greedy answers to prompts.

    Prompts of like length run together, filled up on the left. Each finished batch is appended to a file in ``folder``,
    so that a run that was cut off goes on with the next one.

    Args:
        model: the causal language model with its vocabulary head.
        backbone: the same as a backbone, for its tokens.
        prompts: token ids, one prompt each, BOS included; an empty one gets an empty answer.
        new_tokens: length of an answer at most, in tokens.
        batch_size: prompts at once.
        folder: where answers are kept until all are there.
        what: what the progress bar says.

    Returns:
        One answer a prompt, in the order of the prompts.
    """
    order = sorted((row for row, prompt in enumerate(prompts) if prompt), key=lambda row: (len(prompts[row]), row))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    file = folder / DONE
    answers = _finished(file)
    with file.open("a", encoding="utf-8") as kept:
        for rows in progress(batches, what):
            if all(row in answers for row in rows):
                continue
            texts = _generate(model, backbone, [prompts[row] for row in rows], new_tokens)
            for row, text in zip(rows, texts, strict=True):
                answers[row] = text
                kept.write(json.dumps([row, text]) + "\n")
            kept.flush()
            os.fsync(kept.fileno())
    return [answers.get(row, "") for row in range(len(prompts))]


def _finished(file: Path) -> dict[int, str]:
    """Answers of an attempt that was cut off; a last line that was only half written is cut away."""
    if not file.is_file():
        return {}
    answers: dict[int, str] = {}
    whole = 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            row, text = json.loads(line)
        except ValueError:
            break
        if not line.endswith(b"\n"):
            break
        answers[int(row)] = text
        whole += len(line)
    os.truncate(file, whole)
    return answers


@torch.no_grad()
def _generate(model: Any, backbone: Backbone, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[str]:
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), backbone.pad_id)
    seen = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        seen[row, width - len(prompt) :] = 1
    device = backbone.embed_tokens.weight.device
    out = model.generate(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=backbone.pad_id,
        eos_token_id=backbone.eos_id,
    )
    return backbone.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
