"""The embedded language model: small, trained on the spot, and nothing to download.

A compact Llama-architecture causal LM with its own byte-level BPE tokenizer, trained for a fixed short budget on a data
set's own texts. It is written as an ordinary Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recbole_llm.backbone.load import quiet_transformers
from recbole_llm.disk import naming
from recbole_llm.errors import UserError
from recbole_llm.progress import progress

if TYPE_CHECKING:
    from recbole_llm.training.state import ResumeFile

SPECIAL_TOKENS = BOS, EOS, PAD = ("<s>", "</s>", "<pad>")
# They are the first tokens that the tokenizer is given, so these are their ids.
BOS_ID, EOS_ID, PAD_ID = range(3)
# Every byte is a token of its own, so that any text can be spelled and no unknown token is needed.
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)

# How many item texts stand in one place of a filled template, and what separates them.
TEXTS_PER_PLACE = 5
SEPARATOR = "; "
# The tokenizer learns from at most this many documents: more would take minutes and move few merges.
TOKENIZER_DOCUMENTS = 100_000
# Encoded at a time, until there are tokens enough: what goes beyond is work for nothing.
ENCODE_DOCUMENTS = 64

WARM_UP = 0.1  # share of the steps in which the learning rate rises
LAST_RATE = 0.1  # share of the learning rate that the cosine ends at
WEIGHT_DECAY = 0.01
MAX_NORM = 1.0
MEASURED_BLOCKS = 16
IGNORED = -100

PLACE = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class EmbeddedSettings:
    """Sizes and training budget of the embedded language model; the YAML says what each is for.

    Attributes:
        layers: transformer layers.
        hidden_size: width.
        heads: attention heads; they divide the width into even parts.
        vocab_size: tokens at most, bytes and special ones included.
        context: tokens it is trained to look back on; also the length of a training block.
        train_steps: optimizer steps; 0 leaves the weights as they were initialised.
        train_batch_size: blocks a step.
        learning_rate: the highest one.
    """

    layers: int = 2
    hidden_size: int = 128
    heads: int = 4
    vocab_size: int = 2000
    context: int = 512
    train_steps: int = 200
    train_batch_size: int = 2
    learning_rate: float = 5e-3

    def __post_init__(self) -> None:
        if self.hidden_size % (2 * self.heads):
            near = max(1, round(self.hidden_size / (2 * self.heads))) * 2 * self.heads
            raise UserError(
                f"llm_hidden_size {self.hidden_size} is not {self.heads} heads (llm_heads) of even width; "
                f"the nearest that can is {near}"
            )
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise UserError(f"llm_vocab_size is {self.vocab_size}; the bytes alone need {SMALLEST_VOCABULARY}")

    @classmethod
    def from_config(cls, config: Any) -> EmbeddedSettings:
        """The settings of a RecBole-style config, whose keys are these names after ``llm_``."""
        return cls(**{name: config[f"llm_{name}"] for name in cls.__dataclass_fields__})

    def model_config(self, vocabulary: int) -> LlamaConfig:
        """The configuration that transformers makes a model from, for so many tokens."""
        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.hidden_size,
            # Llama's own proportion, 8/3 of the width, in whole multiples of 32.
            intermediate_size=32 * round(self.hidden_size * 8 / 3 / 32) or 32,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=BOS_ID,
            eos_token_id=EOS_ID,
            pad_token_id=PAD_ID,
        )


def build_corpus(item_texts: Sequence[str], templates: Sequence[str], seed: int) -> list[str]:
    """The documents to train on: every item text once, and the prompts filled with item texts.

    Each template is filled often enough that each of its places has had every item about once. The result does not
    depend on the order of the texts, so that how a data set numbers its items cannot move the model.

    Args:
        item_texts: texts of the items that may be looked at (those in train); empty ones are left out.
        templates: prompts; each ``{NAME}`` is a place.
        seed: of the order and of the texts drawn for the places.

    Returns:
        The documents, shuffled.

    Raises:
        UserError: there is no text at all.
    """
    texts = sorted({text for text in item_texts if text.strip()})
    if not texts:
        raise UserError("the embedded language model has no item text to learn from (see item_text)")
    draw = random.Random(seed)
    documents = list(texts)
    for template in templates:
        for _ in range(math.ceil(len(texts) / TEXTS_PER_PLACE)):
            # A function as the replacement, so that what a text holds is never read as a pattern or a place.
            documents.append(PLACE.sub(lambda _: SEPARATOR.join(draw.choices(texts, k=TEXTS_PER_PLACE)), template))
    draw.shuffle(documents)
    return documents


def train_embedded(
    corpus: Sequence[str],
    settings: EmbeddedSettings,
    seed: int,
    folder: Path,
    device: str = "cpu",
    resume: ResumeFile | None = None,
) -> dict[str, float]:
    """Train tokenizer and language model, and write them as a Hugging Face folder.

    Args:
        corpus: documents, shuffled (as :func:`build_corpus` returns them).
        settings: sizes and budget.
        seed: of the initial weights and of the order of the blocks.
        folder: where to write config.json, model.safetensors and the tokenizer's files.
        device: where to train.
        resume: where to keep what is needed to go on, and to find what an attempt that was cut off kept.

    Returns:
        Figures: ``steps``; ``tokens`` trained on (with repeats); ``corpus_tokens`` there were; ``vocabulary``;
        ``parameters``; ``seconds``; ``loss``, nats a token on the corpus's first blocks after training; and
        ``unigram_loss``, the same of a model that knows how frequent each token is and nothing else.
    """
    start = time.perf_counter()
    tokenizer = _train_tokenizer(corpus[:TOKENIZER_DOCUMENTS], settings)
    blocks = _pack(tokenizer, corpus, settings).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(settings.model_config(tokenizer.get_vocab_size()))
    model.to(device)
    _train(model, blocks, settings, seed, resume)
    measured = blocks[:MEASURED_BLOCKS]
    with torch.no_grad():
        loss = torch.stack([_loss(model, block[None]) for block in measured]).mean().item()
    with quiet_transformers(), naming(folder):
        model.save_pretrained(folder)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token=BOS,
            eos_token=EOS,
            pad_token=PAD,
            model_max_length=settings.context,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
    return {
        "steps": settings.train_steps,
        "tokens": settings.train_steps * settings.train_batch_size * settings.context,
        "corpus_tokens": int((blocks != PAD_ID).sum().item()),
        "vocabulary": tokenizer.get_vocab_size(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds": time.perf_counter() - start,
        "loss": loss,
        "unigram_loss": _unigram_loss(measured, blocks, tokenizer.get_vocab_size()),
    }


def byte_tokenizer(corpus: Sequence[str], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that knows the words of a corpus and can spell any text.

    Args:
        corpus: documents.
        vocab_size: tokens at most.
        specials: the special tokens; their ids are the first.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    # What a title spells is text, here as in use.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _train_tokenizer(corpus: Sequence[str], settings: EmbeddedSettings) -> Tokenizer:
    tokenizer = byte_tokenizer(corpus, settings.vocab_size, SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def _pack(tokenizer: Tokenizer, corpus: Sequence[str], settings: EmbeddedSettings) -> torch.Tensor:
    """Token ids, int64 [blocks, context]: the documents, each with its BOS and EOS, one after the other.

    It stops once there is a block for each that the budget takes. The last block is padded.
    """
    needed = max(settings.train_steps * settings.train_batch_size, MEASURED_BLOCKS) * settings.context
    stream: list[int] = []
    for first in range(0, len(corpus), ENCODE_DOCUMENTS):
        for encoding in tokenizer.encode_batch_fast(list(corpus[first : first + ENCODE_DOCUMENTS])):
            stream += encoding.ids
            stream.append(EOS_ID)
        if len(stream) >= needed:
            stream = stream[:needed]
            break
    if len(stream) % settings.context == 1:
        # Alone in a block it would be no target, and the block's loss none.
        stream.pop()
    stream += [PAD_ID] * (-len(stream) % settings.context)
    return torch.tensor(stream).view(-1, settings.context)


def _train(
    model: LlamaForCausalLM, blocks: torch.Tensor, settings: EmbeddedSettings, seed: int, resume: ResumeFile | None
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _rate(settings.train_steps))
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.empty(0, dtype=torch.long)
    first, mark = 0, hashlib.sha256(blocks.cpu().numpy().data).hexdigest()
    state = resume.take_up() if resume is not None else None
    # Another version of the tokenizer's library may cut the same texts into other blocks.
    if state is not None and state["blocks"] == mark:
        first, waiting = state["step"], state["waiting"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        generator.set_state(state["generator"])
    model.train()
    for step in progress(range(first, settings.train_steps), "training the embedded language model"):
        while len(waiting) < settings.train_batch_size:
            waiting = torch.cat((waiting, torch.randperm(len(blocks), generator=generator)))
        chosen, waiting = waiting[: settings.train_batch_size], waiting[settings.train_batch_size :]
        loss = _loss(model, blocks[chosen.to(blocks.device)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        if resume is not None and resume.due():
            resume.save({
                "blocks": mark,
                "step": step + 1,
                "waiting": waiting,
                "model": dict(model.state_dict()),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "generator": generator.get_state(),
            })  # fmt: skip
    model.eval()


def _rate(steps: int) -> Callable[[int], float]:
    """The learning rate's factor by step: up in a line, then down along half a cosine."""
    rise = max(1, round(WARM_UP * steps))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        done = min(1.0, (step - rise) / max(1, steps - rise))
        return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2

    return factor


def _loss(model: LlamaForCausalLM, blocks: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token, nats; padding is no target."""
    logits = model(input_ids=blocks[:, :-1], use_cache=False).logits
    targets = blocks[:, 1:].masked_fill(blocks[:, 1:] == PAD_ID, IGNORED)
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)


def _unigram_loss(measured: torch.Tensor, blocks: torch.Tensor, vocabulary: int) -> float:
    """Cross-entropy, nats a token, of the measured targets under the corpus's own token frequencies."""
    tokens = blocks[blocks != PAD_ID]
    log_frequency = (torch.bincount(tokens, minlength=vocabulary).double() / len(tokens)).log()
    targets = measured[:, 1:]
    return -log_frequency[targets[targets != PAD_ID]].mean().item()
