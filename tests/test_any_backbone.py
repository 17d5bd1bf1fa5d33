"""What every language model that can be loaded owes: one contract over many architectures and tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_folders import KINDS, write

from recbole_llm.backbone.base import Backbone
from recbole_llm.backbone.load import load_backbone
from recbole_llm.backbone.soft_tokens import SoftPromptDecoder, token_scale
from recbole_llm.data import prompts
from recbole_llm.training.runs import run

STORIES = Path(__file__).parents[1] / ".." / "shared" / "data" / "lm" / "stories260K"
STORIES_SPECIALS = ["<unk>", "<s>", "</s>"]
QUICK: dict[str, Any] = {
    "epochs": 1, "alignment_epochs": 1, "alignment_batch_size": 8, "train_batch_size": 60, "graph_model.epochs": 1,
    "graph_model.embedding_size": 16,
    "show_progress": False, "tensorboard": False, "gpu_id": "", "state": "ERROR", "evaluate_parts": False,
    "stopping_step": 1, "response_slots": 3, "train_item_projector": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write(kind, root / name) for name, kind in KINDS.items()}


@pytest.fixture(scope="module", params=[*KINDS, "stories260K"])
def model(request: pytest.FixtureRequest, folders: dict[str, Path]) -> tuple[str, Path, Backbone]:
    if request.param == "stories260K":
        if not STORIES.is_dir():
            pytest.skip(f"SKIPPED, NOT TESTED: no pretrained model at {STORIES}")
        return request.param, STORIES, load_backbone(STORIES)
    return request.param, folders[request.param], load_backbone(folders[request.param])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved")


def batch(backbone: Backbone) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids of three prompts of lengths 21, 6 and 13 with soft tokens among them, the soft tokens, the lengths."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, backbone.embed_tokens.num_embeddings, (3, 21), generator=generator)
    ids[0, 0], ids[0, 15], ids[1, 2], ids[2, 12] = -1, -3, -2, -3
    soft = torch.randn(3, backbone.hidden_size, generator=generator) * token_scale(backbone.embed_tokens)
    lengths = torch.tensor([21, 6, 13])
    for row, length in enumerate(lengths):
        ids[row, length:] = backbone.pad_id
    return ids, soft.requires_grad_(), lengths


def prefix_of(backbone: Backbone) -> list[int]:
    opening = backbone.encode(prompts.ITEM_TEXT_ALIGNMENT)[:30]
    return opening if backbone.bos_id is None else [backbone.bos_id, *opening]


def one_piece(backbone: Backbone, ids: torch.Tensor, soft: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """The states behind the prefix of each row, each row run alone and whole, in plain transformers."""
    rows = []
    opening = backbone.embed_tokens(torch.tensor(prefix_of(backbone)))
    for row, length in enumerate(lengths.tolist()):
        real = ids[row, :length]
        vectors = [soft[-1 - one] if one < 0 else backbone.embed_tokens(one) for one in real]
        whole = torch.cat([opening, torch.stack(vectors)])[None]
        rows.append(backbone.decoder(inputs_embeds=whole, use_cache=False).last_hidden_state[0, len(opening) :])
    return rows


def test_special_tokens(model: tuple[str, Path, Backbone]) -> None:
    name, _, backbone = model
    if name in KINDS:
        named, ids = KINDS[name].named, KINDS[name].specials.index
        assert backbone.eos_id == ids(named["eos_token"])
        assert backbone.bos_id == (ids(named["bos_token"]) if "bos_token" in named else None)
        assert backbone.pad_id == ids(named.get("pad_token", named["eos_token"]))
        assert backbone.tokenizer.padding_side == KINDS[name].side
    specials = KINDS[name].specials if name in KINDS else STORIES_SPECIALS
    texts = [*specials, *(f"a film {special} of{special}1995" for special in specials), "".join(specials)]
    forbidden = {backbone.tokenizer.convert_tokens_to_ids(special) for special in specials}
    for text, found in zip(texts, backbone.encode_batch(texts), strict=True):
        assert found and forbidden.isdisjoint(found)
        # Where a tokenizer writes blanks as U+2581 and has special tokens among its pieces, the cut shows as a blank.
        assert backbone.tokenizer.decode(found).replace(" ", "") == text.replace(" ", "")


def test_a_prefix_shared_is_the_prompt_in_one_piece(model: tuple[str, Path, Backbone]) -> None:
    backbone = model[2]
    ids, soft, lengths = batch(backbone)
    reader = SoftPromptDecoder(backbone.decoder, backbone.embed_tokens, prefix_of(backbone))
    places = (lengths - 4).unsqueeze(1) + torch.arange(4)
    for _ in range(2):  # the second time the shared states must be as they were
        states = reader.states(ids, soft, places)
        [slope] = torch.autograd.grad(states.square().mean(), soft)
        wanted = torch.stack([row[-4:] for row in one_piece(backbone, ids, soft, lengths)])
        [wanted_slope] = torch.autograd.grad(wanted.square().mean(), soft)
        torch.testing.assert_close(states, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(slope, wanted_slope, atol=1e-5, rtol=1e-3)


def test_a_stream_goes_on_like_the_prompt_in_one_piece(model: tuple[str, Path, Backbone]) -> None:
    """Also beyond a sliding window, where a shorter row's filling may not count as something read."""
    backbone = model[2]
    ids, soft, lengths = batch(backbone)
    reader = SoftPromptDecoder(backbone.decoder, backbone.embed_tokens, prefix_of(backbone))
    stream = reader.stream(ids, soft, lengths)
    more = torch.randn(3, 3, backbone.hidden_size) * token_scale(backbone.embed_tokens)
    got = [stream.state, *(stream.step(one) for one in more)]
    everything, longer = torch.cat([soft.detach(), more.flatten(0, 1)]), torch.cat([ids, ids.new_zeros(3, 3)], 1)
    for step in range(3):
        longer[torch.arange(3), lengths + step] = -4 - 3 * step - torch.arange(3)
    with torch.no_grad():
        wanted = one_piece(backbone, longer, everything, lengths + 3)
    for step, state in enumerate(got):
        expected = torch.stack([row[length - 1 + step] for row, length in zip(wanted, lengths.tolist(), strict=True)])
        torch.testing.assert_close(state, expected, atol=1e-4, rtol=1e-4)


def test_soft_tokens_are_as_large_as_tokens_where_the_layers_read_them(model: tuple[str, Path, Backbone]) -> None:
    """Gemma scales tokens in its embedding module, Granite whatever comes in; GLTA's soft tokens must fit both."""
    backbone = model[2]
    decoder: Any = backbone.decoder
    seen: list[torch.Tensor] = []
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    hook = layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    count = backbone.embed_tokens.num_embeddings
    noise = torch.randn(count, backbone.hidden_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        decoder(input_ids=torch.arange(count)[:, None])
        decoder(inputs_embeds=(noise * token_scale(backbone.embed_tokens))[:, None])
    hook.remove()
    tokens, soft = (states.square().mean().sqrt().item() for states in seen)
    assert soft == pytest.approx(tokens, rel=0.05)


def test_fingerprints_are_of_what_a_model_is(
    model: tuple[str, Path, Backbone], tmp_path: Path, folders: dict[str, Path]
) -> None:
    name, folder, backbone = model
    mark = backbone.fingerprint()
    assert load_backbone(folder).fingerprint() == mark
    if name in KINDS:
        assert load_backbone(write(KINDS[name], tmp_path / "other", seed=1)).fingerprint() != mark
        assert load_backbone(write(KINDS[name], tmp_path / "same", seed=0)).fingerprint() == mark
    weight = backbone.decoder.get_parameter(next(name for name, _ in backbone.decoder.named_parameters()))
    with torch.no_grad():
        weight.view(-1)[0] += 1
        assert backbone.fingerprint() != mark
        weight.view(-1)[0] -= 1


@pytest.mark.parametrize("settings", [{}, {"inference": "ar", "adapter": "lora"}], ids=["frozen", "lora-ar"])
def test_glta_trains_and_ranks_behind_it(
    model: tuple[str, Path, Backbone], saved: Path, settings: dict[str, str]
) -> None:
    name, folder, backbone = model
    room = {"alignment_items_per_prompt": 2, "alignment_description_tokens": 16, "history_length": 5}
    arguments = ["--model=GLTA", "--dataset=tiny", f"--llm={folder}", f"--output_dir={saved}"]
    arguments += [f"--{key}={value}" for key, value in settings.items()]
    if name == "mamba":
        # Its mixer reads the weight of out_proj past the layer, so PEFT refuses to put LoRA there.
        arguments.append("--lora_target_modules=[in_proj, x_proj]")
    result = run(config_dict=QUICK | room, command_line=arguments)
    assert result["config"]["llm"] == str(folder)
    assert [stage["cached"] for stage in result["stages"][-2:]] == [False, False]
    assert 0 <= result["test"]["ndcg@10"] <= 1 and result["evaluation"]["test_users"] > 0
    total, trainable = result["parameters"]["total"], result["parameters"]["trainable"]
    language_model = sum(weight.numel() for weight in backbone.decoder.parameters())
    item_projector = (QUICK["graph_model.embedding_size"] + 1) * backbone.hidden_size
    assert total - trainable == language_model + item_projector, "what LoRA adds trains, the model itself does not"
