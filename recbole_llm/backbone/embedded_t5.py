"""The embedded encoder-decoder: a T5 of given sizes with fresh weights, and nothing to download.

It is written as an ordinary Hugging Face folder. Nothing trains it beforehand: whoever generates with it trains all of
it (``adapter: full``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from recbole_llm.backbone.embedded import TOKENIZER_DOCUMENTS, byte_tokenizer
from recbole_llm.backbone.load import quiet_transformers
from recbole_llm.disk import naming
from recbole_llm.errors import UserError

NAME = "embedded-t5"
# Padding also begins an answer, and the end token closes a prompt as it does an answer; T5's own ids.
SPECIAL_TOKENS = PAD, EOS = ("<pad>", "</s>")
PAD_ID, EOS_ID = range(2)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


@dataclass(frozen=True)
class EmbeddedT5Settings:
    """Sizes of the embedded T5; the YAML says what each is for.

    Attributes:
        layers: of the encoder, and of the decoder.
        hidden_size: width.
        inner_size: of the feed-forward layers.
        heads: attention heads.
        head_size: of each.
        feed_forward: ``relu`` or ``gated-gelu``.
        dropout: share, in training.
        vocab_size: tokens at most, bytes and special ones included.
    """

    layers: int = 4
    hidden_size: int = 128
    inner_size: int = 1024
    heads: int = 6
    head_size: int = 64
    feed_forward: str = "relu"
    dropout: float = 0.1
    vocab_size: int = 2000

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"t5_vocab_size is {self.vocab_size}; the bytes alone need {SMALLEST_VOCABULARY}")

    @classmethod
    def from_config(cls, config: Any) -> EmbeddedT5Settings:
        """The settings of a RecBole-style config, whose keys are these names after ``t5_``."""
        return cls(**{name: config[f"t5_{name}"] for name in cls.__dataclass_fields__})

    def model_config(self, vocabulary: int) -> T5Config:
        """The configuration that transformers makes a model from, for so many tokens."""
        return T5Config(
            vocab_size=vocabulary,
            d_model=self.hidden_size,
            d_kv=self.head_size,
            d_ff=self.inner_size,
            num_layers=self.layers,
            num_heads=self.heads,
            feed_forward_proj=self.feed_forward,
            dropout_rate=self.dropout,
            pad_token_id=PAD_ID,
            eos_token_id=EOS_ID,
            decoder_start_token_id=PAD_ID,
        )


def make_embedded_t5(corpus: Sequence[str], settings: EmbeddedT5Settings, seed: int, folder: Path) -> dict[str, Any]:
    """Train the tokenizer, draw the weights, and write both as a Hugging Face folder.

    Args:
        corpus: documents that the tokenizer learns its words from; of none it has special tokens alone and can spell
            nothing.
        settings: sizes.
        seed: of the weights.
        folder: where to write config.json, model.safetensors and the tokenizer's files.

    Returns:
        Figures: ``vocabulary``, ``parameters``, ``seconds``, and ``tokens`` trained on, none.
    """
    start = time.perf_counter()
    tokenizer = _tokenizer(corpus, settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = T5ForConditionalGeneration(settings.model_config(tokenizer.get_vocab_size()))
    with quiet_transformers(), naming(folder):
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
        ).save_pretrained(folder)
    return {
        "vocabulary": tokenizer.get_vocab_size(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": time.perf_counter() - start,
        "tokens": 0,
    }


def _tokenizer(corpus: Sequence[str], settings: EmbeddedT5Settings) -> Tokenizer:
    if corpus:
        return byte_tokenizer(corpus[:TOKENIZER_DOCUMENTS], settings.vocab_size, SPECIAL_TOKENS)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
