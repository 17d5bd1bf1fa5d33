"""Prompts that share what they open with are read as they would be one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_folders import KINDS
from torch import Tensor

from recbole_llm.backbone.checkpointing import checkpoint_layers
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.packed import PackedReader, Tree

# Architectures that cannot be read so: attention logits that sdpa cannot cap, states that are no keys and values.
ROW_BY_ROW = {"gemma2", "lfm2", "mamba"}
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16],
    [5, 6, 7, 8, 9, 10, 11, 3, 13],
    [5, 6, 7],
    [5, 6, 7, 8, 9, 10, 11, 12, 13, 14],
    [9, 6, 7, 8, 9, 10],
    [5, 6, 7],
]
# The last place of each, and some before: in what is shared, and in what is not.
ROWS = torch.tensor([0, 0, 0, 1, 1, 2, 3, 3, 4, 4, 5])
PLACES = torch.tensor([1, 8, 11, 1, 8, 2, 4, 9, 0, 5, 2])


def padded(prompts: list[list[int]]) -> Tensor:
    width = max(map(len, prompts)) + 1
    return torch.tensor([prompt + [1] * (width - len(prompt)) for prompt in prompts])


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_a_tree_has_every_opening_once(prompts: list[list[int]]) -> None:
    ids = padded(prompts)
    tree = Tree.of(ids, torch.tensor([len(prompt) for prompt in prompts]))
    openings = {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}
    assert len(tree.places) == len(openings)
    node_of: dict[tuple[int, ...], int] = {}
    for row, prompt in enumerate(prompts):
        for place in range(len(prompt)):
            node = int(tree.nodes[row, place])
            assert node_of.setdefault(tuple(prompt[: place + 1]), node) == node
            assert int(tree.places[node]) == place
    assert sorted(node_of.values()) == list(range(len(openings)))
    for node, owner in enumerate(tree.owners.tolist()):
        row, place = divmod(owner, ids.shape[1])
        assert node_of[tuple(prompts[row][: place + 1])] == node


def read_alone(decoder: Any, prompts: list[list[int]], rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """States [S, hidden] at places of prompts, each from a plain reading of its prompt."""
    return torch.stack([
        decoder(input_ids=torch.tensor([prompts[row]]), use_cache=False).last_hidden_state[0, place]
        for row, place in zip(rows.tolist(), places.tolist(), strict=True)
    ])  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "checkpointed"), [(kind, again) for kind in KINDS for again in {False, kind not in ROW_BY_ROW}]
)
def test_states_and_gradients_are_those_of_prompts_read_alone(kind: str, checkpointed: bool, folders: Any) -> None:
    decoder: Any = load_backbone(folders(kind)).decoder.requires_grad_(True)
    weights = dict(decoder.named_parameters())
    torch.manual_seed(0)
    wanted = torch.randn(len(ROWS), decoder.config.hidden_size)
    states = read_alone(decoder, PROMPTS, ROWS, PLACES)
    expected = torch.autograd.grad((states * wanted).sum(), list(weights.values()))
    if checkpointed:
        checkpoint_layers(decoder)
    before = decoder.config._attn_implementation
    reader = PackedReader(decoder)
    assert reader.packs == (kind not in ROW_BY_ROW)
    read: list[int] = []
    hook = decoder.register_forward_pre_hook(
        lambda *given: read.append(given[2]["input_ids"].numel()), with_kwargs=True
    )
    found = reader.states(padded(PROMPTS), ROWS, PLACES)
    hook.remove()
    openings = {tuple(prompt[: end + 1]) for prompt in PROMPTS for end in range(len(prompt))}
    assert read == [len(openings) if reader.packs else padded(PROMPTS).numel()]
    torch.testing.assert_close(found, states.detach(), rtol=1e-4, atol=1e-4)
    made = torch.autograd.grad((found * wanted).sum(), list(weights.values()))
    for name, one, other in zip(weights, made, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()) + 1e-6, msg=name)
    assert decoder.config._attn_implementation == before
    assert not any("forward" in vars(module) for name, module in decoder.named_modules() if name.endswith("mlp"))


def test_the_last_feed_forward_part_runs_where_states_are_read(folders: Any) -> None:
    decoder: Any = load_backbone(folders("llama")).decoder
    reader, counts = PackedReader(decoder), []
    for layer in decoder.layers:
        layer.mlp.gate_proj.register_forward_pre_hook(lambda _, given: counts.append(given[0].shape[1]))
    reader.states(padded(PROMPTS), ROWS, PLACES)
    openings = {tuple(prompt[: end + 1]) for prompt in PROMPTS for end in range(len(prompt))}
    asked = {tuple(PROMPTS[row][: place + 1]) for row, place in zip(ROWS.tolist(), PLACES.tolist(), strict=True)}
    assert counts == [len(openings), len(asked)]


def test_a_model_whose_layers_pass_nothing_on_is_read_row_by_row(folders: Any) -> None:
    decoder: Any = load_backbone(folders("llama")).decoder
    for layer in decoder.layers:
        forward = layer.forward
        layer.forward = lambda hidden, forward=forward, packed=None, **kwargs: forward(hidden, **kwargs)
    assert not PackedReader(decoder).packs
