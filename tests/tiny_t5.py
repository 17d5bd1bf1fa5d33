"""Folders of tiny, randomly initialised T5 models, with a tokenizer of T5's kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_folders import _unigram
from torch import nn
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

SPECIALS = ["<pad>", "</s>", "<unk>"]
# As in T5, and as in T5 1.1: a head of its own, whose logits are not scaled, and gated layers.
KINDS = ("t5", "t5-v1.1")


def model(kind: str, size: int) -> Any:
    """A T5 with a buckets' table small enough that a wrong distance shows."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=size, d_model=32, d_kv=6, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
        relative_attention_num_buckets=8, relative_attention_max_distance=6, decoder_start_token_id=0,
        feed_forward_proj="relu" if kind == "t5" else "gated-gelu",
    )  # fmt: skip
    made = T5ForConditionalGeneration(config)
    with torch.no_grad():
        for half in (made.encoder, made.decoder):
            half.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    if kind != "t5":
        made.lm_head.weight = nn.Parameter(torch.randn(size, 32))
        made.config.scale_decoder_outputs = False
    return made.eval().requires_grad_(False)


def write(kind: str, folder: Path) -> Path:
    """Write a model and its tokenizer as ``save_pretrained`` does."""
    backend = _unigram(SPECIALS)
    named = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **named).save_pretrained(folder)
    model(kind, backend.get_vocab_size()).save_pretrained(folder)
    return folder
