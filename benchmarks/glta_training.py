"""One training step of GLTA's user-item alignment: ours against the plain way, behind a frozen Llama.

The language model has random weights, 4 layers, a width of 256 and a vocabulary head of 32,000. Reference: what one
writes with ``transformers`` alone, the whole prompt of every row put together from embedded pieces, padded, and run
through ``LlamaForCausalLM``, whose head gives logits over the vocabulary at every position, and then the item logits at
every position (the paper: "Z in R^{L x |I|}"), of which the loss reads k. Its samples are drawn and its texts tokenised
beforehand; ours draws its samples while timed. That both have the same loss and the same gradients is checked first, on
equal samples. The detail says by part where the difference comes from, and what it would be at the
sizes of Llama-2-7B.
"""

from __future__ import annotations

import re
import zlib
from itertools import pairwise
from statistics import median
from types import SimpleNamespace
from typing import Any

import _harness
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY, WIDTH, LAYERS, FEED_FORWARD = 32_000, 256, 4, 688
N_USERS, N_ITEMS, GRAPH_WIDTH = 6041, 3707, 64  # ml-1m's, with the padding ids
TOLERANCE = 1e-5
STAGE = "user_item_alignment"
WORDS = ("drama comedy action thriller romance adventure crime sci-fi horror war mystery musical "
         "animation western fantasy documentary children noir history biography").split()  # fmt: skip
LLAMA_2_7B = {"layers": 32, "width": 4096, "feed_forward": 11_008, "vocabulary": 32_000}


def encode(text: str) -> list[int]:
    """Stands in for a tokenizer: a word with the blank before it is one piece, as it mostly is in Llama's."""
    return [3 + zlib.crc32(piece.encode()) % (VOCABULARY - 3) for piece in re.findall(r" ?\w+| ?[^\w\s]|\s", text)]


class Plain(nn.Module):
    """Stage 3 written down plainly, row by row.

    Args:
        glta: whose weights it starts from.
        causal: the whole language model, with its head.
        texts: tokenised profile tags and predicted interests by user.
    """

    def __init__(self, glta: Any, causal: nn.Module, texts: tuple[list[list[int]], list[list[int]]]) -> None:
        super().__init__()
        self.user_projector = nn.Linear(GRAPH_WIDTH, WIDTH)
        self.item_projector = nn.Linear(GRAPH_WIDTH, WIDTH)
        self.gllm = nn.Linear(WIDTH, N_ITEMS)
        self.load_state_dict(glta.state_dict())
        self.item_projector.requires_grad_(False)
        self.users, self.items = glta.user_embeddings, glta.item_embeddings
        self.causal, self.texts = [causal], texts  # in a list: no part of the state
        opening = "[INST] <<SYS>> Select items interacted by the user from given items. <</SYS>>\nUser token: "
        pieces = (opening, "\nItem tokens: ", " \nUser tags: ", "\nUser's potential interest:", "[/INST]")
        self.fixed = [encode(piece) for piece in pieces]
        self.fixed[0].insert(0, 0)

    def forward(
        self, samples: list[tuple[int, list[int], list[int]]], slots: int, head: bool = True, everywhere: bool = True
    ) -> Tensor:
        """Mean cross-entropy over samples of (user, items shown, targets).

        Without ``head`` no vocabulary head runs; without ``everywhere`` item logits are computed at the slots only.
        """
        [causal] = self.causal
        embed = causal.get_input_embeddings()
        rows, ends = [], []
        for user, shown, _ in samples:
            text = [embed(torch.tensor(piece)) for piece in self.fixed]
            tags, interests = (embed(torch.tensor(texts[user])) for texts in self.texts)
            user_token = self.user_projector(self.users[user]).unsqueeze(0)
            item_tokens = self.item_projector(self.items[torch.tensor(shown)])
            row = [text[0], user_token, text[1], item_tokens, text[2], tags, text[3], interests, text[4]]
            row.append(embed(torch.full((slots - 1,), 2)))
            rows.append(torch.cat(row))
            ends.append(len(rows[-1]))
        inputs = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = nn.utils.rnn.pad_sequence([torch.ones(end, dtype=torch.long) for end in ends], batch_first=True)
        if head:
            out = causal(inputs_embeds=inputs, attention_mask=mask, output_hidden_states=True, use_cache=False)
            hidden = out.hidden_states[-1]
        else:
            hidden = causal.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        slots_of = [slice(end - slots, end) for end in ends]
        if everywhere:
            item_logits = self.gllm(hidden)
            logits = torch.stack([item_logits[row, places] for row, places in enumerate(slots_of)])
        else:
            logits = self.gllm(torch.stack([hidden[row, places] for row, places in enumerate(slots_of)]))
        logits[..., 0] = -torch.inf
        targets = torch.tensor([wanted for _, _, wanted in samples])
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def build() -> tuple[Any, nn.Module, tuple[list[list[int]], list[list[int]]]]:
    """GLTA on synthetic data of ml-1m's size, its language model, and the tokenised texts of users."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from recbole_llm.model.glta import GLTA
    from recbole_llm.schema import properties_dir, read_yaml

    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    causal = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=FEED_FORWARD, num_hidden_layers=LAYERS,
            num_attention_heads=4, max_position_embeddings=1024,
        )
    )  # fmt: skip
    causal.eval().requires_grad_(False)
    lengths = np.r_[0, np.full(N_USERS - 1, 100)]
    items = np.concatenate([1 + draw.permutation(N_ITEMS - 1)[:100] for _ in range(N_USERS - 1)])
    histories = SimpleNamespace(offsets=np.r_[0, np.cumsum(lengths)], items=items)
    sizes = {"user_id": N_USERS, "item_id": N_ITEMS}
    dataset = SimpleNamespace(num=sizes.get, train_histories=histories, field2id_token={"user_id": np.arange(N_USERS)})
    config = {
        **read_yaml(properties_dir() / "model" / "GLTA.yaml"), "USER_ID_FIELD": "user_id", "ITEM_ID_FIELD": "item_id",
        "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length", "NEG_PREFIX": "neg_", "device": "cpu",
        "seed": 0, "eval_args": {"order": "RO"}, "gllm": "free", "gllm_dropout": 0.0, "history_dropout": 0.0,
        "train_item_projector": False, "targets": "random", "slot_input": "pad",
        "item_alignment": True, "user_alignment": True,
    }  # fmt: skip
    glta = GLTA(config, dataset)
    backbone: Any = SimpleNamespace(
        decoder=causal.model, embed_tokens=causal.get_input_embeddings(), hidden_size=WIDTH, encode=encode,
        bos_id=0, eos_id=1, pad_id=2,
    )  # fmt: skip
    texts = [[", ".join(draw.choice(WORDS, 10, replace=False)) for _ in range(N_USERS)] for _ in range(2)]
    glta.prepare(
        user_embeddings=torch.randn(N_USERS, GRAPH_WIDTH),
        item_embeddings=torch.randn(N_ITEMS, GRAPH_WIDTH),
        backbone=backbone,
        item_texts=["", *(" ".join(draw.choice(WORDS, 6)) for _ in range(N_ITEMS - 1))],
        profiles=texts[0],
        predictions=texts[1],
    )
    limit = config["text_tokens"]
    tokens = [[encode(text)[:limit] for text in kind] for kind in texts]
    return glta, causal, (tokens[0], tokens[1])


def samples_of(batch: Any) -> list[tuple[int, list[int], list[int]]]:
    """What a batch of ours holds, as plain lists."""
    found = []
    for row, user in enumerate(batch.users.tolist()):
        soft = -1 - batch.ids[row][batch.ids[row] < 0][1:]  # the first soft token is the user's
        found.append((user, batch.items[soft - len(batch.users)].tolist(), batch.targets[row].tolist()))
    return found


def flops(tokens: int, sizes: dict[str, int], logits_at: int, head: int, context: int) -> float:
    """Multiply-adds times two of one row's step: forward, and backward to the inputs (no weight of the LM trains).

    The head runs forward only: its logits are in no loss.
    """
    width, layers = sizes["width"], sizes["layers"]
    layer = 4 * width**2 + 3 * width * sizes["feed_forward"]
    attention = 2 * width * (context - tokens / 2)  # keys seen by the mean token, for scores and for values
    return 4 * tokens * layers * (layer + attention) + 2 * logits_at * head * width


def seven_billion(prefix: int, suffix: int, batch: int) -> dict[str, Any]:
    """Arithmetic for Llama-2-7B at these prompts; no time of any machine is in it."""
    sizes, whole = LLAMA_2_7B, prefix + suffix
    plain = flops(whole, sizes, whole, sizes["vocabulary"], whole)
    no_head = flops(whole, sizes, 0, 0, whole)
    ours = flops(suffix, sizes, 0, 0, whole)
    return {
        "ratio_of_arithmetic": round(plain / ours, 3),
        "from_the_head": round(plain / no_head, 3),
        "from_the_prefix": round(no_head / ours, 3),
        "tflop_a_row": {"plain": round(plain / 1e12, 3), "ours": round(ours / 1e12, 3)},
        "logits_not_held_mib": round(batch * whole * sizes["vocabulary"] * 4 / 2**20, 1),
    }


def largest_difference(glta: Any, plain: Plain, drawn: list[Any]) -> float:
    """Of the losses and of every gradient, over the batches."""
    error = 0.0
    theirs = dict(plain.named_parameters())
    for batch in drawn:
        glta.zero_grad()
        plain.zero_grad()
        ours, reference = glta.stage_loss(STAGE, batch), plain(samples_of(batch), glta.slots)
        ours.backward()
        reference.backward()
        pairs = [(ours.detach(), reference.detach())]
        pairs += [(one.grad, theirs[name].grad) for name, one in glta.named_parameters() if one.requires_grad]
        error = max(error, *(float((one - other).abs().max()) for one, other in pairs))
    return error


def main() -> None:
    """Check, then time."""
    from recbole_llm.backbone.soft_tokens import SoftPromptDecoder

    arguments = _harness.parser(__doc__ or "").parse_args()
    torch.set_num_threads(arguments.threads)
    batch_size, steps, pairs = (16, 2, 4) if arguments.quick else (32, 5, 9)
    glta, causal, texts = build()
    parameters = glta.begin_stage(STAGE)
    plain = Plain(glta, causal, texts)
    users = 1 + torch.randperm(N_USERS - 1)[: batch_size * steps].view(steps, batch_size)
    drawn = [glta.user_batch(row, torch.Generator().manual_seed(step)) for step, row in enumerate(users)]
    samples = [samples_of(batch) for batch in drawn]
    error = largest_difference(glta, plain, drawn)

    shared = glta._readers[STAGE]
    prefix = torch.tensor(shared.prefix)
    whole_prompt = SoftPromptDecoder(shared.decoder, shared.embed_tokens, ())
    optimizer = torch.optim.Adam(parameters, lr=1e-3)
    plain_optimizer = torch.optim.Adam([weight for weight in plain.parameters() if weight.requires_grad], lr=1e-3)

    def step(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ours() -> None:
        generator = torch.Generator().manual_seed(0)
        for row in users:
            step(glta.stage_loss(STAGE, glta.user_batch(row, generator)), optimizer)

    def without_prefix() -> None:
        for batch in drawn:
            ids = torch.cat([prefix.expand(len(batch.ids), -1), batch.ids], 1)
            soft = glta._soft_tokens(batch.users, batch.items)
            logits = glta.item_logits(whole_prompt.states(ids, soft, batch.places + len(prefix)))
            step(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten()), optimizer)

    def reference(**less: bool) -> None:
        for rows in samples:
            step(plain(rows, glta.slots, **less), plain_optimizer)

    ours_times, reference_times = _harness.measure_pairs(ours, reference, pairs)
    few = max(2, pairs // 2)
    # The same work with one thing after another taken away, to tell the parts apart.
    no_head = [_harness.once(lambda: reference(head=False)) for _ in range(few)]
    slots_only = [_harness.once(lambda: reference(head=False, everywhere=False)) for _ in range(few)]
    no_prefix = [_harness.once(without_prefix) for _ in range(few)]
    parts = {
        "plain": reference_times,
        "no vocabulary head": no_head,
        "item logits at slots": slots_only,
        "ours, prefix not shared": no_prefix,
        "ours": ours_times,
    }
    seconds = {name: median(times) / steps for name, times in parts.items()}
    reasons = (
        "no logits over the vocabulary",
        "item logits at the slots only",
        "prompts by array operations",
        "the shared prefix",
    )
    in_order = list(seconds.values())
    suffix = int(median(batch.ids.shape[1] for batch in drawn))
    detail = {
        "rows_a_step": batch_size,
        "prompt_tokens": {"shared_prefix": len(prefix), "after_it": suffix, "slots": glta.slots},
        "seconds_a_step": {name: round(value, 4) for name, value in seconds.items()},
        "from": {
            reason: round(slower / faster, 2)
            for reason, (slower, faster) in zip(reasons, pairwise(in_order), strict=True)
        },
        "llama-2-7b": seven_billion(len(prefix), suffix, batch_size),
    }
    for name, value in seconds.items():
        print(f"  {name:<24}{value:>10.4f} s a step")
    _harness.report(
        "glta_training", ours_times, reference_times, equal=error <= TOLERANCE, max_error=error, detail=detail
    )


if __name__ == "__main__":
    main()
