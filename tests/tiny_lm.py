"""Tiny causal language models and a stand-in backbone for tests."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel

VOCABULARY = 300


def llama(seed: int = 0, hidden: int = 32) -> LlamaModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2,
    )  # fmt: skip
    return LlamaModel(config).eval().requires_grad_(False)


def gpt2(seed: int = 0) -> GPT2Model:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, initializer_range=0.2)
    return GPT2Model(config).eval().requires_grad_(False)


@dataclass
class TinyBackbone:
    """What the recommenders read of a backbone; words are hashed to ids, so no tokenizer file is needed."""

    decoder: torch.nn.Module
    bos_id: int | None = 0
    eos_id: int = 1
    pad_id: int = 2
    tokens_read: int = 0

    @property
    def embed_tokens(self) -> torch.nn.Module:
        return self.decoder.get_input_embeddings()

    @property
    def hidden_size(self) -> int:
        return self.embed_tokens.embedding_dim

    def encode(self, text: str) -> list[int]:
        return [3 + sum(map(ord, word)) * 31 % (VOCABULARY - 3) for word in re.findall(r"\w+|\s|[^\w\s]", text)]
