"""The hot paths of the language models, each as a call on random small models and what it has to compute and move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import _counts as counts
import torch
from _counts import Cost, Read, Sizes
from beam_search import BEAMS, CODES, LEVELS, WORDS, catalogue, language_model
from torch import Tensor, nn

from recbole_llm.backbone.adapter import adapt
from recbole_llm.backbone.code_tokens import ExtendedEmbedding, ExtendedHead
from recbole_llm.backbone.packed import PackedReader, Tree, lengths_of
from recbole_llm.backbone.tree_attention import CHUNK, laid_out
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.full_ranking import FullRanking
from recbole_llm.decoding.head import Head, decoder_of
from recbole_llm.decoding.path_attention import PathView, attend
from recbole_llm.decoding.shared_cache import SharedPrompts
from recbole_llm.schema import properties_dir, read_yaml

LLAMA_WORDS = 32_000


@dataclass(frozen=True)
class Path:
    """A hot path.

    Attributes:
        name: what it is, in words.
        call: it; given what ``prepare`` returns, if there is one.
        cost: counted.
        prepare: untimed, before each call.
        kind: what multiplies, as :class:`~_ceilings.Ceilings` has it in ``gemm``; ``float32`` where that is several or
            nothing.
        each: users, samples or whatever a call is of, and their name.
        countable: whether torch shows its operations to who counts them; those of oneDNN's own tensors it does not.
    """

    name: str
    call: Callable[..., Any]
    cost: Cost
    prepare: Callable[[], Any] | None = None
    kind: str = "float32 as it is"
    each: tuple[int, str] = (1, "call")
    countable: bool = True


def decoding(users: int, prompt: int, items: int, nodes: int, words: int = WORDS) -> Iterator[Path]:
    """Prompts, a beam step by its parts, the whole search, and the full ranking.

    Args:
        users: at once.
        prompt: tokens.
        items: of the ranked catalogue.
        nodes: of the tree that are read at once.
        words: of the vocabulary, the codes apart.
    """
    model = language_model(words + LEVELS * CODES)
    decoder, sizes = decoder_of(model), Sizes.of(model.config)
    ids = torch.randint(3, words, (users, prompt), generator=torch.Generator().manual_seed(0))
    lengths, rows = torch.full((users,), prompt), users * BEAMS
    tokens = torch.randint(words, words + CODES, (users, BEAMS))
    parents = torch.arange(BEAMS).expand(users, -1)

    def read() -> SharedPrompts:
        return SharedPrompts(decoder, ids, lengths, LEVELS * BEAMS)

    def before_last() -> SharedPrompts:
        reader = read()
        reader.step(tokens, torch.zeros_like(parents))
        reader.step(tokens, parents)
        return reader

    path = LEVELS - 1
    each = (users, "user")
    yield Path(f"prompts of {prompt}", read, counts.prompts(sizes, users, prompt), each=each)
    yield Path(
        "beam step, decoder", lambda reader: reader.step(tokens, parents),
        counts.continued(sizes, users, BEAMS, prompt, path), before_last, each=each,
    )  # fmt: skip
    yield _path_attention(sizes, users, prompt, path)
    made = catalogue()
    lm_ids = words + torch.arange(made.size)
    exact, half = Head.of(model), Head.of(model, torch.bfloat16)
    states, level = torch.randn(users, BEAMS, sizes.width), exact.tokens(lm_ids[:CODES])
    largest = torch.full((users, BEAMS), 4.0)
    for head, kind, number in ((exact, "float32", 4), (half, "bfloat16", 2)):
        yield Path(
            f"beam step, vocabulary, {kind}",
            partial(head.log_sum_of_rest, states, head.tokens(lm_ids[:CODES]), largest),
            counts.normaliser(sizes, rows, sizes.vocabulary, number), kind=kind, each=each, countable=False,
        )  # fmt: skip
    yield Path(
        "beam step, level's rows", lambda: exact.logits(states, level), counts.linear(rows, sizes.width, CODES),
        each=each,
    )  # fmt: skip
    search = BeamSearch(decoder, exact, made, beams=BEAMS, lm_ids=lm_ids)
    prompts = ids.tolist()
    whole = counts.beam_search(sizes, users, prompt, BEAMS, LEVELS, sizes.vocabulary)
    yield Path("beam search, vocabulary", lambda: search(prompts), whole, kind="float32", each=each, countable=False)
    narrow = BeamSearch(decoder, exact, made, beams=BEAMS, lm_ids=lm_ids, normaliser="level")
    whole = counts.beam_search(sizes, users, prompt, BEAMS, LEVELS, CODES)
    yield Path("beam search, level", lambda: narrow(prompts), whole, each=each)
    yield _full_ranking(items, prompt, nodes)


def _path_attention(sizes: Sizes, users: int, prompt: int, path: int) -> Path:
    """One layer's attention of the last beam step over the shared cache."""
    asked = torch.randn(users, sizes.heads, BEAMS, sizes.head_size)
    keys, values = torch.randn(2, users, sizes.key_heads, prompt + path * BEAMS, sizes.head_size)
    own = torch.arange(BEAMS).view(1, -1, 1) + BEAMS * torch.arange(path)
    view = PathView(prompt, torch.full((users,), prompt), torch.full((1, BEAMS), path), own.expand(users, -1, -1))
    cost = counts.continued(sizes, users, BEAMS, prompt, path) + counts.decoder(sizes, users * BEAMS, Cost()) * -1
    return Path(
        "beam step, attention of one layer",
        lambda: attend(nn.Identity(), asked, keys, values, None, path_view=view),
        cost * (1 / sizes.layers), each=(users, "user"),
    )  # fmt: skip


def _full_ranking(items: int, prompt: int, nodes: int) -> Path:
    """With the model and the vocabulary of ``exact_ranking.py``."""
    words = 3_072
    model = language_model(words + LEVELS * CODES)
    sizes = Sizes.of(model.config)
    search = BeamSearch(
        decoder_of(model), Head.of(model), catalogue(items), beams=BEAMS, lm_ids=words + torch.arange(LEVELS * CODES)
    )
    ranking = FullRanking(search, nodes)
    ids = torch.randint(3, words, (1, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    cost = counts.full_ranking(sizes, prompt, ranking.reads, nodes, LEVELS, sizes.vocabulary)
    name = f"full ranking of {items:,} items, {ranking.reads:,} nodes"
    return Path(name, lambda: ranking(ids), cost, kind="float32", each=(1, "user"), countable=False)


@dataclass(frozen=True)
class Batch:
    """Prompts with answers.

    Attributes:
        ids: int64 [B, T], filled up on the right.
        rows, places: int64 [L], where the states are that tell the labels.
        labels: int64 [L].
    """

    ids: Tensor
    rows: Tensor
    places: Tensor
    labels: Tensor

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt that are read."""
        return lengths_of(self.ids, self.rows, self.places)

    def read(self) -> Read:
        """How :class:`PackedReader` reads it."""
        tree = Tree.of(self.ids, self.lengths)
        layout = laid_out(tree, self.lengths)
        tables, side = layout.nodes.shape
        states = len(tree.nodes[self.rows, self.places].unique())
        return Read(len(tree.places), tables, side, states, states, None if layout.ends is None else CHUNK)


def fine_tuning_batch(samples: int, items: int = 8, words: int = LLAMA_WORDS) -> Batch:
    """Pairs of samples of one history, worded alike but for their closing, as a shuffled epoch has them.

    By default 96 tokens a sample, 27.5 of them in the tree of 8: about what ``fine_tuning.py`` counts of its own.

    Args:
        samples: even.
        items: of each history.
        words: of the vocabulary, the codes apart.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randint(3, words, (60,), generator=draw)
    prompts = []
    for _ in range(samples // 2):
        history = torch.randint(words, words + CODES, (items * LEVELS,), generator=draw)
        for _ in range(2):
            prompts.append(torch.cat((start, history, torch.randint(3, words, (1,), generator=draw))))
    return _answered(prompts, words, draw)


def packed_batch(prefixes: int, words: int = LLAMA_WORDS) -> Batch:
    """All prefixes of one user, as ``packing: user`` has them.

    Args:
        prefixes: as many as he has items.
        words: of the vocabulary, the codes apart.
    """
    draw = torch.Generator().manual_seed(0)
    start, end = (torch.randint(3, words, (count,), generator=draw) for count in (48, 8))
    items = torch.randint(words, words + CODES, (prefixes, LEVELS), generator=draw)
    prompts = [torch.cat((start, items[: 1 + last].flatten(), end)) for last in range(prefixes)]
    return _answered(prompts, words, draw)


def _answered(prompts: list[Tensor], words: int, draw: torch.Generator) -> Batch:
    answers = torch.randint(words, words + CODES, (len(prompts), LEVELS), generator=draw)
    whole = [torch.cat((prompt, answer[:-1])) for prompt, answer in zip(prompts, answers)]
    ends = torch.tensor([len(one) for one in whole])
    places = (ends.unsqueeze(1) - LEVELS + torch.arange(LEVELS)).flatten()
    ids = nn.utils.rnn.pad_sequence(whole, batch_first=True)
    return Batch(ids, torch.arange(len(whole)).repeat_interleave(LEVELS), places, answers.flatten())


def llama(layers: int, width: int, words: int = LLAMA_WORDS) -> Any:
    """With heads of 64 and a feed-forward part as wide as Llama's is to its width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval().requires_grad_(False)


class FineTuning:
    """A training step of a Llama with codes behind its vocabulary, of the package's own parts.

    Args:
        model: with its head.
        batch: to train on.
        adapter: ``full`` or ``lora``.
    """

    def __init__(self, model: Any, batch: Batch, adapter: str = "full") -> None:
        self.batch, self.sizes = batch, Sizes.of(model.config)
        decoder, count = decoder_of(model), LEVELS * CODES
        shipped = read_yaml(properties_dir() / "model" / "AlignTokenRec.yaml")
        settings = shipped | {"adapter": adapter, "llm_quantization": "none", "lora_dropout": 0.0}
        self.rank = settings["lora_rank"] if adapter == "lora" else None
        head, weight = Head.of(model), model.get_output_embeddings().weight
        trained = adapt(decoder, settings)
        rows = [nn.Parameter(0.02 * torch.randn(count, self.sizes.width)) for _ in range(2)]
        own = [] if adapter == "lora" else [weight.requires_grad_(True)]
        model.set_input_embeddings(ExtendedEmbedding(model.get_input_embeddings(), rows[0], count))
        self.head = ExtendedHead(head, weight, rows[1])
        self.reader = PackedReader(decoder)
        self.weights = [*rows, *own, *([] if trained is None else trained.parameters())]
        self.optimizer = torch.optim.AdamW(self.weights, lr=1e-4, fused=True)

    def loss(self) -> Tensor:
        """Forward, as ``GenerativeRecommender`` has it."""
        batch = self.batch
        states, which = self.reader.read(batch.ids, batch.rows, batch.places)
        logits = self.head.logits(states)
        return (logits.logsumexp(1)[which] - logits[which, batch.labels]).mean()

    def step(self) -> None:
        """All of it."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    @property
    def cost(self) -> Cost:
        """Of the passes forward and backward."""
        return counts.training(self.sizes, self.batch.read(), self.rank, LEVELS * CODES)

    @property
    def forward(self) -> Cost:
        """Of the pass forward, LoRA left out."""
        read, sizes = self.batch.read(), self.sizes
        made = counts.decoder(sizes, read.tokens, read.attention(sizes), read=read.states)
        rows = (sizes.vocabulary, LEVELS * CODES)
        return sum((counts.linear(read.labels, sizes.width, count) for count in rows), made)

    @property
    def update(self) -> Cost:
        """Of the optimizer."""
        return counts.optimizer(sum(weight.numel() for weight in self.weights))


def training(samples: int, items: int, prefixes: int, layers: int = 4, width: int = 256) -> Iterator[Path]:
    """Fine-tuning steps, by their parts, by adapter, and of a packed user.

    Args:
        samples: in a batch.
        items: in a history.
        prefixes: of the packed user.
        layers, width: of the model.
    """
    full = FineTuning(llama(layers, width), fine_tuning_batch(samples, items))
    each = (samples, "sample")
    yield Path("fine-tuning, forward", full.loss, full.forward, each=each)
    yield Path(
        "fine-tuning, backward", lambda loss: loss.backward(), full.cost + full.forward * -1,
        lambda: (full.optimizer.zero_grad(), full.loss())[1], each=each,
    )  # fmt: skip
    full.step()
    yield Path("fine-tuning, optimizer", full.optimizer.step, full.update, full.step, kind="float32", each=each)
    yield Path("fine-tuning, whole step", full.step, full.cost + full.update, each=each)
    light = FineTuning(llama(layers, width), full.batch, "lora")
    yield Path("fine-tuning with LoRA, whole step", light.step, light.cost + light.update, each=each)
    packed = FineTuning(llama(layers, width), packed_batch(prefixes))
    name = f"packed step, {prefixes} prefixes of a user"
    yield Path(name, packed.step, packed.cost + packed.update, each=(prefixes, "sample"))
