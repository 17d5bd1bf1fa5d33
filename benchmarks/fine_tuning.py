"""Fine-tuning a language model to generate items: our training step against the ``transformers`` Trainer's.

A Llama of 4 layers, 256 wide, in float32, with a vocabulary of 32,000 and 1,024 codes, and AlignTokenRec's sequential
and negative tasks over generated histories. Reference: LC-Rec's recipe. The codes are added to the tokenizer and the
tables resized; samples are strings, which the collator tokenises; rows are filled up to the batch's longest; labels of
the prompt are -100; the Trainer does the rest at its own settings. Weights, samples, batches and their order are the
same on both sides, batches are of like length (as the package makes them), and the losses of all steps are compared.
Two ways to train: ``full``, everything; ``lora``, LoRA and the codes' rows (PEFT's ``trainable_token_indices``).
``ratio`` is that of ``full``, the default of both; ``detail`` has the other, where the time goes, what each part of
ours brings, what batches of like length bring by themselves, and the arithmetic of Llama-7B.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _fine_tuning_reference import Recipe
from _harness import of_processors, once, parser, ratios_of, report, timed_parts
from recbole.data.interaction import Interaction
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from recbole_llm.backbone import packed
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.data.prompts import Ragged
from recbole_llm.data.task_loader import TaskLoader, history_groups
from recbole_llm.data.templates import read_templates
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import FINE_TUNING, AlignTokenRec
from recbole_llm.schema import properties_dir, read_yaml
from recbole_llm.tasks.behaviour import NEGATIVE, SEQUENTIAL
from recbole_llm.training.loop import TrainingLoop

VOCABULARY, WIDTH, LAYERS, FEED_FORWARD, HEADS = 32_000, 256, 4, 688, 4
LEVELS, CODES, N_ITEMS, N_USERS, HISTORY_LENGTH = 4, 256, 3001, 2000, 20
RATE, CLIP = 1e-3, 1.0
TOLERANCE = 1e-4
LLAMA_7B = {"layers": 32, "width": 4096, "feed_forward": 11_008, "vocabulary": 32_000 + LEVELS * CODES}
HERE = {"layers": LAYERS, "width": WIDTH, "feed_forward": FEED_FORWARD, "vocabulary": VOCABULARY + LEVELS * CODES}
OPTIONS: dict[str, Any] = {
    "dtype": "float32", "attention": "sdpa", "quantization": "none", "trust_remote_code": False, "device": "cpu",
}  # fmt: skip


def write_language_model(folder: Path) -> None:
    """A random Llama and a byte-level BPE tokenizer of 32,000 pieces, learned from the prompts and made-up words."""
    rng = np.random.default_rng(0)
    parts = np.array([first + last for first in "bcdfghjklmnprstvwz" for last in ("a", "e", "i", "o", "u", "an", "er")])
    words = ["".join(rng.choice(parts, count)) for count in rng.integers(2, 6, 40_000)]
    templates = read_templates("aligntokenrec")
    texts = templates.whole() * 100
    texts += [" ".join(words[start : start + 20] * 2) for start in range(0, len(words), 20)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    assert tokenizer.get_vocab_size() == VOCABULARY
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right",
    ).save_pretrained(folder)  # fmt: skip
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=2048, bos_token_id=0, eos_token_id=1, pad_token_id=2,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def item_tokens() -> ItemTokens:
    codes = np.random.default_rng(1).integers(0, CODES, (N_ITEMS, LEVELS))
    codes[0] = -1
    return ItemTokens.from_codes(codes, [CODES] * LEVELS)


def settings(adapter: str, batch_size: int, models: Sequence[str] = ("AlignTokenRec",)) -> Any:
    """Shipped settings of a model, the more special file last, and what the benchmarks set."""

    class Settings(dict):  # type: ignore[type-arg]
        def __missing__(self, key: str) -> None:  # RecBole's Config has None for what it does not know
            return None

    shipped: dict[str, Any] = {}
    for file in ("training.yaml", *(f"model/{model}.yaml" for model in models)):
        shipped |= read_yaml(properties_dir() / file)
    return Settings({
        **shipped,
        "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id", "LIST_SUFFIX": "_list", "NEG_PREFIX": "neg_",
        "ITEM_LIST_LENGTH_FIELD": "item_length", "device": torch.device("cpu"), "seed": 0, "topk": [10],
        "llm_quantization": "none", "llm_dtype": "float32", "shuffle": True, "single_spec": True, "worker": 0,
        "train_positions": "response", "history_length": HISTORY_LENGTH, "train_batch_size": batch_size,
        "adapter": adapter, "lora_dropout": 0.0, "adapter_learning_rate": RATE, "lr_schedule": "cosine",
        "warmup_ratio": 0.0, "clip_grad_norm": CLIP,
    })  # fmt: skip


def dataset(lengths: np.ndarray | None = None) -> Any:
    """Users' items at random.

    Args:
        lengths: of their histories; by default 5 and on average 12 more.
    """
    rng = np.random.default_rng(2)
    lengths = np.r_[0, 5 + rng.geometric(1 / 12, N_USERS - 1) if lengths is None else lengths]
    histories = SimpleNamespace(offsets=np.r_[0, lengths.cumsum()], items=rng.integers(1, N_ITEMS, lengths.sum()))
    sizes = {"user_id": len(lengths), "item_id": N_ITEMS}
    return SimpleNamespace(
        num=sizes.get, train_histories=histories, item_num=N_ITEMS,
        split=SimpleNamespace(candidates=np.arange(N_ITEMS) > 0),
    )  # fmt: skip


class Ours:
    """The package's own way, from the samples of its train loader to the optimizer's step.

    Args:
        folder: the language model.
        config: see :func:`settings`.
        data: see :func:`dataset`.
        tokens: of its items.
        model: what is trained.
    """

    def __init__(
        self, folder: Path, config: Any, data: Any, tokens: ItemTokens, model: type[Any] = AlignTokenRec
    ) -> None:
        torch.manual_seed(0)
        self.config = config
        self.model = model(self.config, data)
        self.model.prepare(
            item_tokens=tokens, backbone=load_backbone(folder, **OPTIONS),
            head_model=load_with_head(folder, **OPTIONS), tie_order=torch.arange(N_ITEMS), texts={},
        )  # fmt: skip
        self.loader = TaskLoader(self.config, data)
        self.parameters = self.model.begin_stage(FINE_TUNING)

    def drawn(self, count: int, like_length: bool = True) -> list[Any]:
        """The first batches of an epoch."""
        self.loader.length_of = self.model.sample_lengths if like_length else None
        self.loader.generator.manual_seed(0)
        batches = iter(self.loader)
        return [next(batches) for _ in range(count)]

    def batches(self, rows: Sequence[Any]) -> Iterator[Any]:
        for step, samples in enumerate(rows):
            torch.manual_seed(step)  # templates are drawn by torch's own generator
            yield self.model.training_batch(samples)

    def loop(self, steps: int) -> TrainingLoop:
        """With the optimizer as FineTuningTrainer makes it."""
        optimizer = torch.optim.AdamW(self.parameters, lr=RATE, weight_decay=0.0, fused=True)
        return TrainingLoop(self.config, self.model, FINE_TUNING, optimizer, steps, 1)

    def run(self, loop: TrainingLoop, rows: Sequence[Any]) -> list[float]:
        return list(loop.epoch(self.batches(rows), lambda loss: None))

    def seconds(self, rows: Sequence[Any]) -> float:
        """Of processors, for one step a batch; the clock begins behind the optimizer."""
        loop = self.loop(len(rows))
        return of_processors(lambda: self.run(loop, rows))

    def texts(self, rows: Sequence[Any]) -> list[tuple[str, str]]:
        """The samples as LC-Rec has them: prompt and answer."""
        templates = read_templates("aligntokenrec")
        # The writer has those of a task in the order of their words.
        flat = [one.ask for task in (SEQUENTIAL, NEGATIVE) for one in sorted(templates.instructions(task, []))]
        named = ["".join(self.model.item_tokens.strings(item)) if item else "" for item in range(N_ITEMS)]
        found = []
        for step, samples in enumerate(rows):
            torch.manual_seed(step)
            groups = history_groups(samples["start"], samples["stop"])
            drawn = self.model.writer.draw(samples["task"], torch.default_generator, groups=groups)
            shown = Ragged.from_slices(self.loader.items, samples["start"], samples["stop"])
            for template, items, target in zip(
                drawn.tolist(), shown.values.split(shown.lengths.tolist()), samples["target"].tolist(), strict=True
            ):
                history = templates.separator.join(named[item] for item in items.tolist())
                found.append((flat[template].replace("{history}", history), named[target]))
        return found

    def parts(self, rows: Sequence[Any]) -> dict[str, float]:
        """Milliseconds of processors a step, by part."""
        loop, model = self.loop(len(rows)), self.model
        seconds: dict[str, float] = {}
        places = [
            (model, "training_batch", "prompts"), (model._reader, "read", "decoder"),
            (model._reader, "states", "decoder"), (model.head, "logits", "head"), (model.head, "logits_of", "head"),
            (loop.accelerator, "backward", "backward"), (loop.accelerator, "clip_grad_norm_", "optimizer"),
            (loop.optimizer, "step", "optimizer"), (loop.optimizer, "zero_grad", "optimizer"),
        ]  # fmt: skip
        with timed_parts(places, seconds):
            self.run(loop, rows)
        return {part: round(1e3 * value / len(rows), 1) for part, value in seconds.items()}


@contextmanager
def without(ours: Ours, *, packing: bool = True, sharing: bool = True, last: bool = True) -> Iterator[None]:
    """Take parts of ours away."""
    tree, init, packs = packed.Tree.__dict__["of"], packed.Packed.__init__, ours.model._reader.packs

    def apart(cls: Any, ids: Tensor, lengths: Tensor) -> Any:
        inside = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
        nodes = (inside.flatten().cumsum(0) - 1).view_as(ids).clamp(min=0)
        return cls(nodes, inside.nonzero()[:, 1], inside.flatten().nonzero().squeeze(1))

    def whole(self: Any, *given: Any) -> None:
        init(self, *given)
        self._mlp = None

    try:
        ours.model._reader.packs = packing
        if not sharing:
            packed.Tree.of = classmethod(apart)  # type: ignore[method-assign, assignment]
        if not last:
            packed.Packed.__init__ = whole  # type: ignore[method-assign]
        yield
    finally:
        ours.model._reader.packs, packed.Tree.of, packed.Packed.__init__ = packs, tree, init  # type: ignore[method-assign]


def counts(ours: Ours, rows: Sequence[Any]) -> dict[str, float]:
    """Positions a sample: with filling, without, in the tree; and those whose states are read."""
    total, samples = np.zeros(5), 0
    for batch in ours.batches(rows):
        samples += len(batch.ids)
        lengths = packed.lengths_of(batch.ids, batch.rows, batch.places)
        tree = packed.Tree.of(batch.ids, lengths)
        read = tree.nodes[batch.rows, batch.places].unique()
        filled = (batch.ids.shape[1] + 1) * len(batch.ids)  # the reference reads the end token too
        total += filled, int(lengths.sum()), len(tree.places), len(read), len(batch.labels)
    names = ("with filling", "without", "in the tree", "read", "labels")
    return dict(zip(names, (total / samples).round(1).tolist(), strict=True))


def arithmetic(sizes: dict[str, int], positions: dict[str, float], full: bool) -> dict[str, Any]:
    """Multiplications by weights a sample, in GFLOP: forward, backward to the inputs, and to weights where they train.

    Attention among positions is left out on both sides.
    """
    width, passes = sizes["width"], 3 if full else 2
    feed = 3 * width * sizes["feed_forward"]
    layer, head = 4 * width**2 + feed, width * sizes["vocabulary"]
    layers = sizes["layers"] * layer
    plain = passes * positions["with filling"] * (layers + head)
    label_head = passes * positions["labels"] * head
    row = passes * (positions["without"] * layers)
    last = passes * (positions["without"] - positions["read"]) * feed
    ours = passes * (positions["in the tree"] * (layers - feed) + positions["read"] * feed) + label_head
    steps = {
        "head at labels": plain / (plain - passes * positions["with filling"] * head + label_head),
        "no filling": (passes * positions["with filling"] * layers + label_head) / (row + label_head),
        "last layer where read": (row + label_head) / (row - last + label_head),
        "shared openings": (row - last + label_head) / ours,
    }
    return {
        "ratio": round(plain / ours, 2),
        "from": {name: round(value, 2) for name, value in steps.items()},
        "gflop_a_sample": {"reference": round(2e-9 * plain, 3), "ours": round(2e-9 * ours, 3)},
        "share_of_the_head": {
            "reference": round(head / (layers + head), 3), "ours": round(label_head / ours, 3),
        },
    }  # fmt: skip


def like_length(ours: Ours, recipe: Recipe, batch_size: int, mixed: Sequence[Any]) -> dict[str, float]:
    """What sorting the same samples by length brings: time in batches of any lengths over time in sorted ones."""
    samples = {name: torch.cat([batch[name] for batch in mixed]) for name in mixed[0].interaction}
    order = ours.model.sample_lengths(samples).argsort(stable=True)
    alike = [Interaction({name: values[rows] for name, values in samples.items()}) for rows in order.split(batch_size)]

    def trainer_of(rows: Sequence[Any]) -> float:
        trainer = recipe.trainer(ours.texts(rows), batch_size)
        return of_processors(lambda: recipe.run(trainer))

    def by_row(rows: Sequence[Any]) -> float:
        with without(ours, packing=False):
            return in_tree(rows)

    def in_tree(rows: Sequence[Any]) -> float:
        loop = ours.loop(len(rows))
        return of_processors(lambda: ours.run(loop, rows))

    ways = {"reference": trainer_of, "row by row, head at labels": by_row, "ours": in_tree}
    return {name: round(way(mixed) / way(alike), 2) for name, way in ways.items()}


def side(folder: Path, adapter: str, quick: bool, tokens: ItemTokens) -> dict[str, Any]:
    """Compare and time one way to train."""
    batch_size, steps, timed_steps, pairs = (4, 3, 2, 2) if quick else (8, 30, 5, 5)
    ours = Ours(folder, settings(adapter, batch_size), dataset(), tokens)
    recipe = Recipe(folder, ours.model, adapter, RATE, CLIP)
    rows = ours.drawn(steps)
    samples = ours.texts(rows)
    for number, batch in enumerate(ours.batches(rows)):
        given = recipe.collate(samples[number * batch_size : (number + 1) * batch_size])
        labels = torch.full_like(given["labels"], -100)
        labels[batch.rows, batch.places + 1] = batch.labels
        inside = given["attention_mask"][:, :-1].bool()
        assert torch.equal(labels, given["labels"])
        assert torch.equal((batch.ids * inside)[:, :-1], (given["input_ids"][:, :-1] * inside)[:, :-1])
    losses = ours.run(ours.loop(steps), rows), recipe.run(recipe.trainer(samples, batch_size))
    error = max(abs(one - other) for one, other in zip(*losses, strict=True))

    few, texts = rows[:timed_steps], samples[: timed_steps * batch_size]
    clock: tuple[list[float], list[float]] = ([], [])
    processors: tuple[list[float], list[float]] = ([], [])

    def ours_once(place: int = 0) -> None:
        loop = ours.loop(timed_steps)
        clock[place].append(once(lambda: processors[place].append(of_processors(lambda: ours.run(loop, few)))))

    def reference_once(place: int = 1) -> None:
        trainer = recipe.trainer(texts, batch_size)
        clock[place].append(once(lambda: processors[place].append(of_processors(lambda: recipe.run(trainer)))))

    for pair in range(pairs):
        for call in (ours_once, reference_once) if pair % 2 else (reference_once, ours_once):
            call()
    parts = {"ours": ours.parts(few), "reference": recipe.parts(texts, batch_size)}
    ladder = {}
    for name, less in (
        ("row by row, head at labels", {"packing": False}),
        ("no filling", {"sharing": False, "last": False}),
        ("last layer where read", {"sharing": False}),
        ("shared openings", {}),
    ):
        with without(ours, **less):
            found = [of_processors(lambda: ours.run(ours.loop(timed_steps), few)) for _ in range(1 if quick else 3)]
        ladder[name] = round(1e3 * min(found) / timed_steps, 1)
    positions = counts(ours, rows)
    return {
        "seconds": (list(clock[0]), list(clock[1])), "losses": losses, "error": error,
        "detail": {
            "ratio": round(median(ratios_of(*clock)), 2),
            "processor_ratio": round(median(ratios_of(*processors)), 2),
            "milliseconds_a_step": {
                name: round(1e3 * median(found) / timed_steps, 1) for name, found in zip(("ours", "reference"), clock)
            },
            "losses_compared": steps, "largest_difference_of_losses": error,
            "first_and_last_loss": [round(losses[0][0], 5), round(losses[0][-1], 5)],
            "processor_milliseconds_a_step": parts,
            "processor_milliseconds_a_step_by_what_ours_does": ladder,
            "positions_a_sample": positions,
            "like_length": like_length(ours, recipe, batch_size, ours.drawn(timed_steps, like_length=False)),
            "arithmetic_here": arithmetic(HERE, positions, adapter == "full"),
            "arithmetic_7b": arithmetic(LLAMA_7B, positions, adapter == "full"),
            "trained_weights": sum(weight.numel() for weight in ours.model.parameters() if weight.requires_grad),
            "batch_size": batch_size,
        },
    }  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.set_defaults(threads=1)
    arguments = made.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_language_model(folder)
        tokens = item_tokens()
        found = {adapter: side(folder, adapter, arguments.quick, tokens) for adapter in ("full", "lora")}
    for adapter, result in found.items():
        detail = result["detail"]
        print(f"{adapter:<6}{detail['ratio']:>7.2f}x, of processors' time {detail['processor_ratio']:.2f}x")
        for key in ("processor_milliseconds_a_step", "processor_milliseconds_a_step_by_what_ours_does", "like_length"):
            print(f"       {key}: {detail[key]}")
    error = max(result["error"] for result in found.values())
    report(
        "fine_tuning", *found["full"]["seconds"], equal=error <= TOLERANCE, max_error=error,
        detail={adapter: result["detail"] for adapter, result in found.items()},
    )  # fmt: skip


if __name__ == "__main__":
    main()
