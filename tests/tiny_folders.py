"""Folders of tiny, randomly initialised language models of many architectures, each with a tokenizer of its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

TEXTS = [
    "Based on the user's profile and prediction, and the items given, what does this user like? [INST] [/INST]",
    *(
        f"The {colour} {thing} number {number}, a film of 1995"
        for colour in ("red", "blue")
        for thing in ("ship", "robot")
        for number in range(9)
    ),
]
LETTERS = sorted(set("".join(TEXTS)) - {" "})


def _bytes(specials: list[str]) -> Tokenizer:
    """Byte-level BPE, as GPT-2 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def _metaspace_bpe(specials: list[str]) -> Tokenizer:
    """A SentencePiece BPE with byte fallback in the form that Llama 2's conversion has: blanks as U+2581."""
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *LETTERS, "th", "\u2581th", "\u2581the"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary["the"] = len(vocabulary)
    merges = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e")]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer


def _unigram(specials: list[str]) -> Tokenizer:
    """A SentencePiece unigram model with byte fallback."""
    pieces = [(special, 0.0) for special in specials]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    pieces += [("\u2581", -2.0), ("\u2581the", -1.5), ("number", -1.5), *((letter, -4.0) for letter in LETTERS)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=specials.index("<unk>"), byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    tokenizer.add_special_tokens(specials)
    return tokenizer


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
# Far shorter than GLTA's prompts, so that a window that is counted wrongly shows.
WINDOW = 8


@dataclass(frozen=True)
class Kind:
    """A model and its tokenizer.

    Attributes:
        config: its configuration, from the vocabulary's size and further settings.
        tokenizer: made for the special tokens.
        specials: in the order of their ids.
        named: which of them are BOS, EOS and padding; a model may lack the first and the last.
        tied: whether the head is the embedding table.
        side: the tokenizer's ``padding_side``.
    """

    config: Callable[..., Any]
    tokenizer: Callable[[list[str]], Tokenizer]
    specials: list[str]
    named: dict[str, str]
    tied: bool = False
    side: str = "right"


def _sized(config_class: type, **more: Any) -> Callable[..., Any]:
    return lambda **given: config_class(**SIZES, **more, **given)


LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
GEMMA_IDS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"]
QWEN_IDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GPT2 = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}

KINDS: dict[str, Kind] = {
    "llama": Kind(_sized(LlamaConfig), _metaspace_bpe, ["<unk>", "<s>", "</s>"], LLAMA, side="left"),
    "llama-tied": Kind(_sized(LlamaConfig), _bytes, ["<s>", "</s>", "<pad>"], LLAMA | {"unk_token": "<s>"}, tied=True),
    "qwen2": Kind(_sized(Qwen2Config), _bytes, QWEN_IDS, QWEN, side="left"),
    "qwen3": Kind(_sized(Qwen3Config, head_dim=8), _bytes, QWEN_IDS, QWEN, tied=True),
    "gemma": Kind(_sized(GemmaConfig, head_dim=8), _unigram, GEMMA_IDS, GEMMA, tied=True, side="left"),
    "gemma2": Kind(
        _sized(Gemma2Config, head_dim=8, sliding_window=WINDOW), _metaspace_bpe, GEMMA_IDS, GEMMA, tied=True
    ),
    "gemma3": Kind(
        _sized(
            Gemma3TextConfig,
            head_dim=8,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention"],
        ),
        _unigram,
        GEMMA_IDS,
        GEMMA,
        tied=True,
        side="left",
    ),
    "mistral": Kind(_sized(MistralConfig, sliding_window=WINDOW), _metaspace_bpe, ["<unk>", "<s>", "</s>"], LLAMA),
    "granite": Kind(_sized(GraniteConfig, embedding_multiplier=12.0), _bytes, QWEN_IDS, QWEN, tied=True),
    "lfm2": Kind(
        _sized(Lfm2Config, layer_types=["conv", "full_attention"], conv_L_cache=3), _bytes, QWEN_IDS, QWEN, tied=True
    ),
    "mamba": Kind(
        lambda **given: MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **given), _bytes, QWEN_IDS, QWEN
    ),
    "gpt2": Kind(
        lambda **given: GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=2048, initializer_range=0.2, **given),
        _bytes,
        ["<|endoftext|>"],
        GPT2,
        tied=True,
        side="left",
    ),
}


def write(kind: Kind, folder: Path, seed: int = 0) -> Path:
    """Write a model with random weights and its tokenizer as ``save_pretrained`` does."""
    backend = kind.tokenizer(kind.specials)
    bos = kind.named.get("bos_token")
    if bos is not None and bos != kind.named["eos_token"]:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, padding_side=kind.side, **kind.named)
    ids = {f"{name}_id": backend.token_to_id(token) for name, token in kind.named.items() if name != "unk_token"}
    absent = {"bos_token_id": None, "pad_token_id": None}
    config = kind.config(vocab_size=backend.get_vocab_size() + 3, tie_word_embeddings=kind.tied, **absent | ids)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
