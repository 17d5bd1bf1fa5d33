"""What hot paths have to compute and to move, as formulas of sizes; no time of any machine is in them.

Counted are multiplications of matrices: two FLOPs for a multiplication and an addition, and of bytes what each reads
and writes once, its two factors and its product. Attention is one step that reads queries, keys and values and writes
what comes out; its FLOPs are of all pairs of a query and a key that stand in one table, also where a mask hides one.
Norms, softmax, rotations and sums of rows are left out: a share of a bound counted so can only be too small.
A pass backward to inputs costs what the pass forward does, one to weights again; of attention both are one, of twice
the cost. ``Counted`` counts the same of a call that runs, by torch's own formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

FORWARD, TO_INPUTS, TO_WEIGHTS = 1, 2, 3  # passes: forward; and backward to inputs; and to weights


@dataclass(frozen=True)
class Cost:
    """Work.

    Attributes:
        flops: of multiplications of matrices.
        moved: bytes, each operand once.
    """

    flops: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.moved + other.moved)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.flops * times, self.moved * times)

    def seconds(self, peak: float, bandwidth: float) -> float:
        """The least that it takes at so many FLOPs and bytes a second (Williams et al. 2009, the roofline)."""
        return max(self.flops / peak, self.moved / bandwidth)


@dataclass(frozen=True)
class Sizes:
    """A decoder of Llama's kind, with a gated feed-forward part.

    Attributes:
        layers, width, inner, heads, key_heads, head_size, vocabulary: its sizes.
        number: bytes of one number.
    """

    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    number: int = 4

    @classmethod
    def of(cls, config: Any, number: int = 4) -> Sizes:
        """The sizes of a Hugging Face configuration."""
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers, config.hidden_size, config.intermediate_size, heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads, config.vocab_size, number,
        )  # fmt: skip

    @property
    def projections(self) -> list[tuple[int, int]]:
        """Inputs and outputs of attention's four matrices."""
        asked, shared = self.heads * self.head_size, self.key_heads * self.head_size
        return [(self.width, asked), (self.width, shared), (self.width, shared), (asked, self.width)]

    @property
    def feed_forward(self) -> list[tuple[int, int]]:
        """Inputs and outputs of the feed-forward part's three."""
        return [(self.width, self.inner)] * 2 + [(self.inner, self.width)]

    @property
    def weights(self) -> int:
        """Numbers in the matrices of all layers: the parameters that are no embeddings, but for a few vectors."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.projections + self.feed_forward)


# Touvron et al. 2023, arXiv 2307.09288; Qwen2.5-1.5B's config.json (arXiv 2412.15115, table 1). In 16 bits.
LLAMA_2_7B = Sizes(32, 4096, 11_008, 32, 32, 128, 32_000, number=2)
QWEN_2_5_1_5B = Sizes(28, 1536, 8960, 12, 2, 128, 151_936, number=2)


def linear(rows: float, inputs: int, outputs: int, number: int = 4, passes: int = FORWARD) -> Cost:
    """``rows`` vectors times a matrix [inputs, outputs]."""
    moved = number * (rows * inputs + inputs * outputs + rows * outputs)
    return Cost(2 * rows * inputs * outputs, moved) * passes


def matrices(sizes: Sizes, shapes: list[tuple[int, int]], tokens: float, passes: int = FORWARD) -> Cost:
    """Tokens through some matrices of one layer."""
    return sum((linear(tokens, *shape, sizes.number, passes) for shape in shapes), Cost())


def attention(sizes: Sizes, tables: float, queries: float, keys: float, passes: int = FORWARD) -> Cost:
    """One layer's: in each of so many tables every query meets every key.

    The pass backward reads and multiplies twice what that forward does; scores that a kernel makes again are no work.
    """
    flops = 4 * tables * queries * keys * sizes.heads * sizes.head_size
    moved = 2 * tables * sizes.head_size * (queries * sizes.heads + keys * sizes.key_heads) * sizes.number
    return Cost(flops, moved) * (1 if passes == FORWARD else 3)


def decoder(sizes: Sizes, tokens: float, attends: Cost, passes: int = FORWARD, read: float | None = None) -> Cost:
    """All layers.

    Args:
        sizes: the model's.
        tokens: how many go through it at once.
        attends: one layer's attention.
        passes: forward alone or also backward.
        read: tokens whose last states are wanted, where the last layer's feed-forward part runs for these only.
    """
    feeds = matrices(sizes, sizes.feed_forward, tokens, passes) * (sizes.layers - 1)
    feeds += matrices(sizes, sizes.feed_forward, tokens if read is None else read, passes)
    return (matrices(sizes, sizes.projections, tokens, passes) + attends) * sizes.layers + feeds


def prompts(sizes: Sizes, rows: int, length: float) -> Cost:
    """Prompts of a batch, each read once."""
    return decoder(sizes, rows * length, attention(sizes, rows, length, length))


def continued(sizes: Sizes, rows: int, count: float, prompt: float, path: float) -> Cost:
    """``count`` tokens behind each prompt, each of which sees the prompt and a path of its own.

    Of a beam search these are the beams of one step; of a full ranking the nodes of one piece. A prompt's keys and
    values are read once, those of the paths once a token.
    """
    own = attention(sizes, rows * count, 1, path)
    asked = replace(attention(sizes, rows, count, prompt), moved=_keys(sizes, rows * prompt))
    return decoder(sizes, rows * count, asked + own)


def _keys(sizes: Sizes, tokens: float) -> float:
    """Bytes of one layer's keys and values of tokens."""
    return 2 * tokens * sizes.key_heads * sizes.head_size * sizes.number


def normaliser(sizes: Sizes, rows: float, tokens: int, number: int | None = None) -> Cost:
    """The log of the sum over tokens of the vocabulary, of which no logits are kept."""
    number = sizes.number if number is None else number
    made = linear(rows, sizes.width, tokens, number)
    return replace(made, moved=made.moved - number * rows * tokens + 4 * rows)


def beam_search(sizes: Sizes, rows: int, prompt: float, beams: int, levels: int, vocabulary: int) -> Cost:
    """A whole search; ``vocabulary`` tokens are normalised over at each level."""
    whole = prompts(sizes, rows, prompt) + normaliser(sizes, rows, vocabulary)
    for path in range(1, levels):
        whole += continued(sizes, rows, beams, prompt, path) + normaliser(sizes, rows * beams, vocabulary)
    return whole


def generated(sizes: Sizes, rows: int, prompt: float, beams: int, levels: int) -> Cost:
    """The same by ``generate``: the prompt stands in a row of its own for each beam, all logits are made."""
    lines = rows * beams
    whole = decoder(sizes, lines * prompt, attention(sizes, lines, prompt, prompt))
    for level in range(levels):
        whole += linear(lines, sizes.width, sizes.vocabulary, sizes.number)
        if level:
            whole += decoder(sizes, lines, attention(sizes, lines, 1, prompt + level))
    return whole


def full_ranking(
    sizes: Sizes, prompt: float, nodes: float, piece: int, levels: int, vocabulary: int, rows: int = 1
) -> Cost:
    """Every item of a catalogue scored for prompts: the inner nodes of the trie, in pieces."""
    pieces = -(-nodes // piece)
    tree = continued(sizes, rows, nodes / pieces, prompt, levels - 1) + normaliser(
        sizes, rows * nodes / pieces, vocabulary
    )
    return prompts(sizes, rows, prompt) + normaliser(sizes, rows, vocabulary) + tree * pieces


def reread(sizes: Sizes, prompt: float, items: int, levels: int, at_once: int = 32) -> Cost:
    """The same with the prompt read again for every item, and logits of the vocabulary."""
    length, batches = prompt + levels - 1, items / at_once
    whole = decoder(sizes, at_once * length, attention(sizes, at_once, length, length))
    return (whole + linear(at_once * levels, sizes.width, sizes.vocabulary, sizes.number)) * batches


def lora(sizes: Sizes, tokens: float, rank: int, read: float | None = None) -> Cost:
    """What LoRA beside every matrix adds to a step, all of it trained."""

    def beside(shapes: list[tuple[int, int]], count: float) -> Cost:
        pairs = [pair for inputs, outputs in shapes for pair in ((inputs, rank), (rank, outputs))]
        return matrices(sizes, pairs, count, TO_WEIGHTS)

    feeds = beside(sizes.feed_forward, tokens) * (sizes.layers - 1)
    feeds += beside(sizes.feed_forward, tokens if read is None else read)
    return beside(sizes.projections, tokens) * sizes.layers + feeds


@dataclass(frozen=True)
class Read:
    """How the prompts of a training batch are read.

    Attributes:
        tokens: that go through the decoder.
        tables: in which they attend.
        side: tokens of each of these.
        states: of the last layer that the loss reads; ``None`` for all.
        labels: states that the vocabulary head reads.
        chunk: queries that attend at once, to what stands before the end of their chunk; ``None``, all to all.
    """

    tokens: float
    tables: float
    side: int
    states: float | None
    labels: float
    chunk: int | None = None

    def attention(self, sizes: Sizes, passes: int = FORWARD) -> Cost:
        """One layer's."""
        chunk = self.chunk or self.side
        stops = [min(start + chunk, self.side) for start in range(0, self.side, chunk)]
        starts = [0, *stops[:-1]]
        parts = (attention(sizes, self.tables, stop - start, stop, passes) for start, stop in zip(starts, stops))
        return sum(parts, Cost())


def training(sizes: Sizes, read: Read, rank: int | None = None, codes: int = 0) -> Cost:
    """A step's pass forward and backward.

    Args:
        sizes: the model's; its vocabulary without the codes.
        read: what it reads.
        rank: LoRA's, behind a frozen model whose codes' rows train; ``None``, everything trains.
        codes: rows behind the vocabulary.
    """
    passes = TO_WEIGHTS if rank is None else TO_INPUTS
    whole = decoder(sizes, read.tokens, read.attention(sizes, passes), passes, read.states)
    whole += linear(read.labels, sizes.width, sizes.vocabulary, sizes.number, passes)
    if codes:
        whole += linear(read.labels, sizes.width, codes, sizes.number, TO_WEIGHTS)
    return whole if rank is None else whole + lora(sizes, read.tokens, rank, read.states)


def optimizer(weights: int) -> Cost:
    """AdamW over float32 weights: weight, gradient and two moments are read, all but the gradient written."""
    return Cost(0, 7 * 4 * weights)


class Counted(TorchDispatchMode):
    """Counts what runs inside: FLOPs by torch's formulas, bytes of the same operations' operands, and all calls.

    Attributes:
        flops, moved: see :class:`Cost`.
        calls: operations of torch, views among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.moved, self.calls = 0.0, 0.0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        self.calls += 1
        packet = func._overloadpacket
        if packet in ATTENTION_ON_CPU:
            count, operands = ATTENTION_ON_CPU[packet]
            self.flops += count(*[tensor.shape for tensor in args[:operands]])
            # Forward it also returns each softmax's sum, which is no factor and no product.
            products = _tensors(made)[:1] if operands == 3 else _tensors(made)
            self.moved += sum(_bytes(tensor) for tensor in (*args[:operands], *products))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=made)
            self.moved += sum(_bytes(tensor) for tensor in (*_tensors(args), *_tensors(made)))
        return made

    @property
    def cost(self) -> Cost:
        """What has been counted."""
        return Cost(self.flops, self.moved)


# torch's counter knows the kernels of GPUs only.
ATTENTION_ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (sdpa_flop_count, 3),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (sdpa_backward_flop_count, 4),
}


def _tensors(found: Any) -> list[torch.Tensor]:
    return [one for one in (found if isinstance(found, tuple | list) else [found]) if isinstance(one, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
