"""Prefix sharing and soft tokens give what the plain full prompt gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_lm import VOCABULARY, gpt2, llama
from transformers import AutoModel

from recbole_llm.backbone.soft_tokens import SoftPromptDecoder, embed_with_soft_tokens

STORIES = Path(__file__).parents[1] / ".." / "shared" / "data" / "lm" / "stories260K"
PREFIX = [5, 9, 14, 3, 77, 21]


def stories() -> torch.nn.Module:
    if not STORIES.is_dir():
        pytest.skip(f"the pretrained model {STORIES} is not here")
    return AutoModel.from_pretrained(STORIES).eval().requires_grad_(False)


@pytest.fixture(params=[llama, gpt2, stories], ids=["llama", "gpt2", "stories260K"])
def decoder(request: pytest.FixtureRequest) -> torch.nn.Module:
    return request.param()


def batch(width: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of three prompts of lengths 9, 6 and 4 with soft tokens among them, the soft tokens, lengths, slot places."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=generator)
    ids[0, 0], ids[0, 4], ids[1, 2], ids[2, 3] = -1, -3, -2, -3
    soft = torch.randn(3, width, generator=generator).requires_grad_()
    lengths = torch.tensor([9, 6, 4])
    for row, length in enumerate(lengths):
        ids[row, length:] = 2
    places = lengths.unsqueeze(1) - 2 + torch.arange(2)
    return ids, soft, lengths, places


def plain(
    decoder: torch.nn.Module, ids: torch.Tensor, soft: torch.Tensor, lengths: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """Row by row, token by token, the whole prompt each time."""
    embed = decoder.get_input_embeddings()
    rows = []
    for row, length in enumerate(lengths):
        vectors = [embed.weight[one] for one in PREFIX]
        vectors += [soft[-1 - one] if one < 0 else embed.weight[one] for one in ids[row, :length].tolist()]
        hidden = decoder(inputs_embeds=torch.stack(vectors)[None], use_cache=False).last_hidden_state[0]
        rows.append(hidden[len(PREFIX) + places[row]])
    return torch.stack(rows)


def test_equals_the_plain_full_prompt_forward_and_backward(decoder: torch.nn.Module) -> None:
    width = decoder.get_input_embeddings().embedding_dim
    ids, soft, lengths, places = batch(width)
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), PREFIX)
    for _ in range(2):  # the second time the shared states must be as they were
        soft.grad = None
        states = reader.states(ids, soft, places)
        states.square().sum().backward()
        ours, soft.grad = soft.grad, None
        wanted = plain(decoder, ids, soft, lengths, places)
        wanted.square().sum().backward()
        torch.testing.assert_close(states, wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours, soft.grad, atol=1e-4, rtol=1e-4)
    assert all(weight.grad is None for weight in decoder.parameters())


def test_without_a_prefix(decoder: torch.nn.Module) -> None:
    ids, soft, lengths, places = batch(decoder.get_input_embeddings().embedding_dim)
    table = decoder.get_input_embeddings().weight
    both = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), ())
    head = torch.tensor(PREFIX).expand(3, -1)
    states = both.states(torch.cat([head, ids], 1), soft, places + len(PREFIX))
    torch.testing.assert_close(states, plain(decoder, ids, soft, lengths, places), atol=1e-5, rtol=1e-5)
    assert not table.requires_grad


def test_stream_goes_on_like_the_whole_prompt_read_again(decoder: torch.nn.Module) -> None:
    width = decoder.get_input_embeddings().embedding_dim
    ids, soft, lengths, _ = batch(width)
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), PREFIX)
    stream = reader.stream(ids, soft, lengths)
    more = torch.randn(2, 3, width)
    got = [stream.state, stream.step(more[0]), stream.step(more[1])]
    for steps, state in enumerate(got):
        longer = torch.cat([ids, torch.full((3, steps), 2)], 1)
        for step in range(steps):
            longer[torch.arange(3), lengths + step] = -4 - 3 * step - torch.arange(3)
        everything = torch.cat([soft, more.flatten(0, 1)])
        wanted = reader.states(longer, everything, (lengths + steps - 1).unsqueeze(1))[:, 0]
        torch.testing.assert_close(state, wanted, atol=1e-5, rtol=1e-5)


def test_the_prefix_runs_once_with_one_row() -> None:
    decoder = llama()
    seen: list[tuple[int, ...]] = []
    decoder.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), PREFIX)
    ids, soft, _, places = batch(32)
    for _ in range(3):
        reader.states(ids, soft, places)
    assert seen == [(1, len(PREFIX)), (3, 9), (3, 9), (3, 9)]


def test_shared_states_hold_no_graph_and_one_row() -> None:
    decoder = llama()
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), PREFIX)
    ids, soft, _, places = batch(32)
    reader.states(ids, soft, places).sum().backward()
    [shared] = reader._shared.values()
    assert all(keys.shape[0] == 1 and keys.shape[2] == len(PREFIX) and not keys.requires_grad for keys, _ in shared)


def test_filling_is_never_seen() -> None:
    decoder = llama()
    reader = SoftPromptDecoder(decoder, decoder.get_input_embeddings(), PREFIX)
    ids, soft, lengths, places = batch(32)
    other = ids.clone()
    other[torch.arange(9) >= lengths.unsqueeze(1)] = 55
    torch.testing.assert_close(reader.states(ids, soft, places), reader.states(other, soft, places))


def test_soft_rows_take_the_language_models_type() -> None:
    embed = torch.nn.Embedding(10, 4).to(torch.bfloat16).requires_grad_(False)
    soft = torch.randn(2, 4, requires_grad=True)
    embeds = embed_with_soft_tokens(embed, torch.tensor([[-2, 3], [4, -1]]), soft)
    assert embeds.dtype == torch.bfloat16
    torch.testing.assert_close(embeds[0, 0].float(), soft[1].detach(), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(embeds[1, 0], embed.weight[4])
    embeds.sum().backward()
    assert soft.grad is not None and embed.weight.grad is None


def test_no_vocabulary_head_is_part_of_it() -> None:
    reader = SoftPromptDecoder(llama(), llama().get_input_embeddings(), PREFIX)
    wide = [name for name, module in reader.decoder.named_modules() if getattr(module, "out_features", 0) == VOCABULARY]
    assert not wide
