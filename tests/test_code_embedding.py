"""Rows of code tokens made of the codebooks' vectors: their values, gradients, and what is recommended by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small_models import SMALL
from test_aligntokenrec import FINE_TUNING, N_ITEMS, OPTIONS, SETTINGS, batch, dataset, shipped, users
from tiny_folders import KINDS
from transformers import AutoModelForCausalLM

from recbole_llm.backbone.codebook_rows import CodebookRows
from recbole_llm.backbone.load import load_backbone, load_with_head
from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens
from recbole_llm.model.aligntokenrec import AlignTokenRec
from recbole_llm.training.codebooks import CODEBOOK
from recbole_llm.training.pipeline import fit, store_of

LEVELS, CODES, WIDTH, NUMBERS = 2, 6, 5, 3


def tokens(numbered: bool) -> ItemTokens:
    """Codes of two levels; ``numbered``, five items share them and a third token numbers these."""
    items = torch.arange(N_ITEMS)
    codes = torch.stack([items % CODES, items // CODES % CODES], dim=1)
    if numbered:
        codes = torch.cat([codes % 4, (items % NUMBERS)[:, None]], dim=1)
    codes[0] = -1
    return ItemTokens.from_codes(codes, [CODES] * LEVELS + [NUMBERS] * numbered)


def vectors() -> torch.Tensor:
    return torch.randn(LEVELS, CODES, WIDTH, generator=torch.Generator().manual_seed(4))


def build(folder: Path, kind: str, numbered: bool = False, **settings: Any) -> AlignTokenRec:
    torch.manual_seed(0)
    own = {"code_embedding": kind, "code_embedding_widths": [7] if kind == "mlp2" else [7, 9]}
    made = AlignTokenRec({**shipped(), **SETTINGS, **own, **settings}, dataset())
    made.prepare(
        item_tokens=tokens(numbered), backbone=load_backbone(folder, **OPTIONS),
        head_model=load_with_head(folder, **OPTIONS), tie_order=torch.arange(N_ITEMS), texts={}, codebook=vectors(),
    )  # fmt: skip
    made.begin_stage(FINE_TUNING)
    return made.eval()


def layers(rows: CodebookRows) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weight and bias of each linear layer, in double precision."""
    state = rows.network.state_dict()
    numbers = sorted({int(name.partition(".")[0]) for name in state})
    return [(state[f"{number}.weight"].double(), state[f"{number}.bias"].double()) for number in numbers]


def forward(rows: CodebookRows) -> list[torch.Tensor]:
    """What goes into each layer, and the rows, each vector on its own."""
    seen = [rows.vectors.detach().double()]
    every = layers(rows)
    for number, (weight, bias) in enumerate(every):
        made = torch.stack([weight @ vector + bias for vector in seen[-1]])
        seen.append(made.clamp(min=0) if number + 1 < len(every) else made)
    return seen


@pytest.mark.parametrize("kind", ["mlp2", "mlp3"])
@pytest.mark.parametrize("folder", ["llama", "qwen3", "gemma"])
def test_rows_are_what_the_network_makes_of_the_codes_vectors(kind: str, folder: str, folders: Any) -> None:
    model = build(folders(folder), kind)
    rows, table = model.code_tokens.inputs, model.backbone.decoder.get_input_embeddings()
    assert isinstance(rows, CodebookRows) and len(layers(rows)) == int(kind[-1])
    torch.testing.assert_close(rows.vectors.detach(), vectors().flatten(0, 1))
    made = forward(rows)[-1].float()
    torch.testing.assert_close(rows().detach(), made, rtol=1e-4, atol=1e-5)
    first = table.table.num_embeddings
    ids = first + torch.arange(LEVELS * CODES)
    scale = WIDE**0.5 if folder == "gemma" else 1.0
    torch.testing.assert_close(table(ids).detach(), made * scale, rtol=1e-4, atol=1e-4)
    usual = table.table.weight.square().mean().sqrt()
    torch.testing.assert_close(made.square().mean().sqrt(), usual.detach(), rtol=1e-4, atol=0)
    # A tied head has the same rows, another one rows of its own.
    states = torch.randn(3, WIDE)
    logits = model.head.logits(states)[:, first:]
    tied = KINDS[folder].tied
    assert (model.code_tokens.own_outputs is None) == tied
    expected = made if tied else model.code_tokens.own_outputs
    torch.testing.assert_close(logits, states @ expected.detach().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head.for_search().weight[first:], expected.detach(), rtol=1e-4, atol=1e-5)


WIDE = 32


@pytest.mark.parametrize("kind", ["mlp2", "mlp3"])
@pytest.mark.parametrize("folder", ["llama", "qwen3"])
def test_gradients_are_those_of_a_plain_table_through_the_network(kind: str, folder: str, folders: Any) -> None:
    model = build(folders(folder), kind, numbered=True)
    rows = model.code_tokens.inputs
    assert rows.extra.shape == (NUMBERS, WIDE), "tokens that have no codebook have rows of their own"
    made = batch(model)
    whole = AutoModelForCausalLM.from_pretrained(folders(folder))
    first = whole.get_input_embeddings().num_embeddings
    whole.resize_token_embeddings(first + LEVELS * CODES + NUMBERS, mean_resizing=False)
    with torch.no_grad():
        if model.code_tokens.own_outputs is not None:
            whole.get_output_embeddings().weight[first:] = model.code_tokens.own_outputs
        whole.get_input_embeddings().weight[first:] = rows()
    labels = torch.full_like(made.ids, -100)
    labels[made.rows, made.places] = made.labels
    logits = whole.eval()(input_ids=made.ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    expected.backward()
    loss = model.stage_loss(FINE_TUNING, made)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    of_rows = whole.get_input_embeddings().weight.grad[first:].double()
    torch.testing.assert_close(rows.extra.grad.double(), of_rows[LEVELS * CODES :], rtol=1e-3, atol=1e-5)
    back, seen, every = of_rows[: LEVELS * CODES], forward(rows), layers(rows)
    grads = {name: value.grad.double() for name, value in rows.network.named_parameters()}
    names = sorted({name.partition(".")[0] for name in grads}, key=int)
    for number in reversed(range(len(every))):
        if number + 1 < len(every):
            back = back * (seen[number + 1] > 0)
        torch.testing.assert_close(grads[f"{names[number]}.weight"], back.T @ seen[number], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(grads[f"{names[number]}.bias"], back.sum(0), rtol=1e-3, atol=1e-5)
        back = back @ every[number][0]
    assert back.abs().max() > 0
    torch.testing.assert_close(rows.vectors.grad.double(), back, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora", "full"])
def test_what_is_learned_is_kept_and_recommended_by(adapter: str, folders: Any) -> None:
    model = build(folders("qwen3"), "mlp2", numbered=True, adapter=adapter)
    before = {name: value.clone() for name, value in model.code_tokens.state_dict().items()}
    assert set(before) == {f"inputs.{name}" for name in (
        "vectors", "extra", "network.0.weight", "network.0.bias", "network.2.weight", "network.2.bias"
    )}  # fmt: skip
    asked = model.full_sort_predict(users(1, 2))
    optimizer = torch.optim.Adam(model.begin_stage(FINE_TUNING), lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model.train().stage_loss(FINE_TUNING, batch(model)).backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in model.code_tokens.state_dict().items())
    found = model.eval().full_sort_predict(users(1, 2))
    assert not torch.allclose(found, asked)
    # The same model with the rows as plain weights.
    plain = build(folders("qwen3"), "mlp2", numbered=True, adapter=adapter)
    plain.load_state_dict(model.state_dict())
    rows = torch.nn.Parameter(model.code_tokens.inputs().detach())
    plain.head._rows = rows
    table = plain.backbone.decoder.get_input_embeddings()
    del table.rows
    table.rows = rows
    torch.testing.assert_close(plain.eval().full_sort_predict(users(1, 2)), found)


@pytest.mark.parametrize(
    ("kind", "widths", "words"),
    [("mlp3", [8], "should be 2 width"), ("mlp2", [8, 8], "should be 1 width"), ("mlp2", [0], "should be 1 width")],
)
def test_widths_that_do_not_fit_are_refused(kind: str, widths: list[int], words: str, folders: Any) -> None:
    with pytest.raises(UserError, match=words):
        build(folders("llama"), kind, code_embedding_widths=widths)


def quick(folder: Path, **more: Any) -> Config:
    base = {
        "output_dir": str(folder), "show_progress": False, "tensorboard": False, "gpu_id": "", "epochs": 1,
        "data_path": str(ROOT / "dataset"),
    }  # fmt: skip
    return Config("AlignTokenRec", "tiny", config_dict={**base, **SMALL["AlignTokenRec"], **more}, command_line=[])


@pytest.mark.parametrize("more", [{"item_tokens": "raw"}, {"code_levels": 1}, {"code_tokens": "elsewhere"}])
def test_tokens_without_a_codebook_are_refused_before_any_work(more: dict[str, Any], tmp_path: Path) -> None:
    config = quick(tmp_path, code_embedding="mlp2", **more)
    with pytest.raises(UserError, match="there is none behind raw ids or tokens that were given"):
        fit(config, store_of(config))
    assert not list(tmp_path.rglob("stage.json"))


@pytest.mark.parametrize("more", [{}, {"code_collisions": "extra_token"}, {"item_tokens": "ed"}])
def test_a_run_starts_from_its_own_codebook(more: dict[str, Any], tmp_path: Path) -> None:
    made = fit(quick(tmp_path, code_embedding="mlp2", epochs=0, **more), store_of(quick(tmp_path)))
    rows = made.model.code_tokens.inputs
    (stage,) = (line for line in made.stages if line["name"] == "item_tokens")
    (file,) = tmp_path.rglob(f"item_tokens-{stage['fingerprint'][:16]}/{CODEBOOK}")
    torch.testing.assert_close(rows.vectors.detach(), load_file(file)["levels"].flatten(0, 1))
    assert (rows.extra is None) == ("code_collisions" not in more)
    # What reads the tokens makes no other tokens.
    plain = fit(quick(tmp_path, epochs=0, **more), store_of(quick(tmp_path)))
    assert stage["fingerprint"] in {line["fingerprint"] for line in plain.stages}
    assert plain.fingerprint != made.fingerprint
