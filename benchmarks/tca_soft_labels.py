"""TCA4Rec's soft labels for 20,000 titled items and a vocabulary of 128,000: ours against loops over a dictionary trie.

Both start from a teacher's logits over items and a batch of targets. The reference walks a trie of nested dictionaries
sample by sample and token by token, takes the softmax of the items below and adds it up by next token in a dense row
of the vocabulary, ``[positions, V]`` in all, as TCA4Rec's public code does with lists of (token, item) at every node;
``ratio`` is against the one that makes tensors of these lists at each visit, ``kept_tensors`` against one that keeps
the tensors at the nodes. Ours lists the same distributions token by token. ``rows_kept`` gives both the rows of an
earlier batch to clear and fill again, so that they need no fresh memory from the system.

``step_seconds`` is a training step (forward, backward, no optimizer) of a small Qwen2 on the batch with the plain
cross-entropy; ``added_share`` is what ours adds to it, the labels' time and its loss's less the cross-entropy's.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from _harness import measure_pairs, once, parser, ratios_of, report, tell
from torch.nn import functional
from trie import END, random_titles

from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer, SoftLabels
from recbole_llm.objectives.soft_loss import SoftLabelLoss

ITEMS, SIZE, BATCH, PROMPT = 20_000, 128_000, 16, 160
LAYERS, WIDTH, INNER, HEADS, KEY_HEADS = 4, 512, 2048, 8, 2


class ListNode:
    """A node of the dictionary trie: for every item below, the token it goes on with, and the item."""

    __slots__ = ("children", "items", "tensors", "tokens")

    def __init__(self) -> None:
        self.children: dict[int, ListNode] = {}
        self.tokens: list[int] = []
        self.items: list[int] = []
        self.tensors: tuple[torch.Tensor, torch.Tensor] | None = None

    def lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(self.tokens), torch.tensor(self.items)

    def kept(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.tensors is None:
            self.tensors = self.lists()
        return self.tensors


def dictionary_trie(sequences: list[list[int]]) -> ListNode:
    root = ListNode()
    for item, sequence in enumerate(sequences):
        node = root
        for token in sequence:
            node.tokens.append(token)
            node.items.append(item)
            node = node.children.setdefault(token, ListNode())
    return root


def loop(
    root: ListNode, sequences: list[list[int]], logits: torch.Tensor, targets: list[int],
    read: Callable[[ListNode], tuple[torch.Tensor, torch.Tensor]], rows: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Dense soft labels [positions, V], of the logits' type."""
    if rows is None:
        rows = torch.zeros(sum(len(sequences[target]) for target in targets), SIZE, dtype=logits.dtype)
    else:
        rows.zero_()
    position = 0
    for sample, target in enumerate(targets):
        node = root
        for token in sequences[target]:
            tokens, items = read(node)
            rows[position].scatter_add_(0, tokens, logits[sample][items].softmax(0))
            node = node.children[token]
            position += 1
    return rows


def largest_error(soft: SoftLabels, rows: torch.Tensor) -> float:
    """Also of tokens that ours does not list."""
    rest = rows.clone()
    rest[soft.positions, soft.tokens] -= soft.probs.to(rows.dtype)
    return rest.abs().max().item()


def language_model(quick: bool) -> Any:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=SIZE, hidden_size=WIDTH // (2 if quick else 1), intermediate_size=INNER // (2 if quick else 1),
        num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")


def step_share(
    tokenizer: CollaborativeTokenizer, logits: torch.Tensor, targets: torch.Tensor, prompt: int, quick: bool
) -> dict[str, Any]:
    """Seconds of a training step with the plain loss, and of what ours puts in the place of it."""
    model, rounds = language_model(quick), 2 if quick else 7
    item_tokens, hard = tokenizer.item_tokens, torch.Generator().manual_seed(0)
    answers, lengths = item_tokens.padded(targets)
    ids = torch.randint(0, SIZE, (len(targets), prompt), generator=hard)
    ids = torch.cat((ids, tokenizer.lm_ids[answers.clamp(min=0)]), dim=1)[:, :-1]
    rows, within = (torch.arange(answers.shape[1]) < lengths.unsqueeze(1)).nonzero(as_tuple=True)
    soft, loss = tokenizer(logits, targets), SoftLabelLoss("log_mixture", alpha=0.1)
    by_form = {form: SoftLabelLoss(form, alpha=0.1) for form in ("soft_ce", "kl")}
    by_form["legal_only"] = SoftLabelLoss(legal_only=True, tau=4.5)

    def forward() -> torch.Tensor:
        hidden = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        return model.lm_head(hidden[rows, prompt - 1 + within])

    def step(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        of(forward()).backward()

    found = forward().detach().requires_grad_()

    def alone(of: Callable[[torch.Tensor], torch.Tensor]) -> None:
        found.grad = None
        of(found).backward()

    def plain(read: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(read.float(), soft.labels)

    def ours(read: torch.Tensor) -> torch.Tensor:
        return loss(read, tokenizer(logits, targets))

    whole = measure_pairs(lambda: step(ours), lambda: step(plain), rounds)
    calls: dict[str, Callable[[], Any]] = {
        "labels": lambda: tokenizer(logits, targets),
        "cross_entropy": lambda: alone(plain),
        "log_mixture": lambda: alone(lambda read: loss(read, soft)),
        **{name: lambda f=f: alone(lambda read: f(read, soft)) for name, f in by_form.items()},
    }
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds * 2):
        for name, call in calls.items():
            times[name].append(once(call))
    parts = {name: median(taken) for name, taken in times.items()}
    plain_step = median(whole[1])
    added = parts["labels"] + parts["log_mixture"] - parts["cross_entropy"]
    return {
        "step_seconds": round(plain_step, 4),
        "step_parameters_million": round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        "milliseconds": {name: round(1e3 * seconds, 2) for name, seconds in parts.items()},
        "added_share": round(added / plain_step, 4),
        "labels_share": round(parts["labels"] / plain_step, 4),
        # The difference of whole steps, which the machine's noise is larger than.
        "step_ratio": round(median(ratios_of(whole[1], whole[0])), 4),
    }


def main() -> None:
    arguments = parser(__doc__ or "").parse_args()
    torch.set_num_threads(arguments.threads)
    pairs, part, prompt = (3, 4, 64) if arguments.quick else (15, BATCH, PROMPT)
    titles = random_titles(ITEMS)
    # Ids up to the vocabulary's end, as a language model's are.
    titles = [[token * 6 % (SIZE - 3) + 3 for token in title] for title in titles]
    item_tokens = ItemTokens.from_sequences(titles, END)
    sequences = [[*title, END] if title else [] for title in titles]
    root = dictionary_trie(sequences)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(3 * rng.standard_normal((BATCH, len(titles)), dtype=np.float32))
    targets = torch.from_numpy(rng.integers(1, len(titles), BATCH))
    chosen = targets.tolist()
    prepared: list[CollaborativeTokenizer] = []
    seconds = once(lambda: prepared.append(CollaborativeTokenizer(item_tokens)))
    tokenizer = prepared[0]

    soft = tokenizer(logits, targets)
    # In float64, as float32 sums over 20,000 items are off by more than 1e-6 themselves.
    error = largest_error(soft, loop(root, sequences, logits.double(), chosen, ListNode.lists))
    error = max(error, largest_error(soft, loop(root, sequences, logits.double(), chosen, ListNode.kept)))
    rows = loop(root, sequences, logits, chosen, ListNode.lists)
    rounded = largest_error(soft, rows)

    def call() -> SoftLabels:
        return tokenizer(logits, targets)

    ours, reference = measure_pairs(call, lambda: loop(root, sequences, logits, chosen, ListNode.lists), pairs)
    against: dict[str, float] = {}
    for name, read, given in (
        ("kept_tensors", ListNode.kept, None),
        ("rows_kept", ListNode.lists, rows),
        ("kept_tensors_rows_kept", ListNode.kept, rows),
    ):
        other = measure_pairs(call, lambda r=read, g=given: loop(root, sequences, logits, chosen, r, g), pairs)
        against[name] = round(median(ratios_of(*other)), 2)
    # A teacher that is sure of itself: most children have next to nothing, and are summed by themselves.
    sure = 5 * logits
    other = measure_pairs(
        lambda: tokenizer(sure, targets), lambda: loop(root, sequences, sure, chosen, ListNode.kept), pairs
    )
    against["kept_tensors_five_times_the_deviation"] = round(median(ratios_of(*other)), 2)
    detail = {
        "largest_difference_in_float32": rounded,
        "items": ITEMS, "vocabulary": SIZE, "samples": BATCH, "positions": len(soft), "entries": len(soft.tokens),
        "first_tokens": int(soft.offsets[1]), "tokenizer_made_in_seconds": round(seconds, 4), **against,
        **step_share(tokenizer, logits[:part], targets[:part], prompt, arguments.quick),
    }  # fmt: skip
    tell(detail)
    report("tca_soft_labels", ours, reference, equal=error < 1e-6, max_error=error, detail=detail)


if __name__ == "__main__":
    main()
