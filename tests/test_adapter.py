"""Adapters: LoRA or the whole language model trains, is kept and comes back; nothing else of it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SMALL
from test_glta import generator, model
from tiny_folders import KINDS, write
from tiny_lm import gpt2, llama
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM
from transformers.quantizers.auto import AutoHfQuantizer

from recbole_llm.backbone import load
from recbole_llm.backbone.adapter import adapt
from recbole_llm.backbone.encoder_decoder import base_of
from recbole_llm.backbone.live_head import live_head
from recbole_llm.backbone.load import load_backbone
from recbole_llm.errors import UserError
from recbole_llm.model.glta import GLTA
from recbole_llm.training import staged as staged_module
from recbole_llm.training import trainer as trainer_module
from recbole_llm.training.runs import run
from recbole_llm.training.state import load_state

LORA = {"adapter": "lora", "lora_dropout": 0.0, "adapter_learning_rate": 0.01}
MAKERS = pytest.mark.parametrize("make", [llama, gpt2])


def step(made: GLTA, stage: str, optimizer: torch.optim.Optimizer, seed: int = 0) -> float:
    batch = next(iter(made.stage_batches(stage, generator(seed))))
    loss = made.stage_loss(stage, batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def snapshot(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


@MAKERS
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_what_trains_in_which_stage(make: Any, adapter: str) -> None:
    made = model(make(), **LORA | {"adapter": adapter})
    decoder = made.backbone.decoder
    rest = set(model(make()).state_dict())
    own = {name for name in made.state_dict() if name.startswith("adapter.")}
    assert set(made.state_dict()) == rest | own
    assert len(own) == sum(weight.requires_grad for weight in decoder.parameters()) > 0
    for stage in made.stages:
        before = snapshot(decoder)
        groups = made.begin_stage(stage)
        optimizer = torch.optim.Adam(groups, lr=0.005)
        assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.01]
        assert len(optimizer.param_groups[1]["params"]) == len(own)
        made.train()
        for seed in range(3):
            step(made, stage, optimizer, seed)
        moved = {name for name, weight in decoder.named_parameters() if not torch.equal(weight, before[name])}
        expected = {name for name in before if "lora_" in name} if adapter == "lora" else set(before)
        assert moved == expected


def test_the_prefix_has_its_share_of_the_gradient_and_is_never_out_of_date() -> None:
    """States and slopes of LoRA's weights are those of the plain whole prompt, before and after a step."""
    made = model(**LORA)
    reader = made._readers["user_item_alignment"]
    assert len(reader.prefix) > 3
    batch = made.user_batch(torch.tensor([1, 2, 5]), generator())
    soft = made._soft_tokens(batch.users, batch.items).detach()
    weights = list(made.adapter.parameters())
    with torch.no_grad():
        for weight in weights:  # B starts at zero, behind which A has no slope
            weight.add_(torch.randn(weight.shape, generator=generator()) * 0.1)
    for _ in range(2):
        states = reader.states(batch.ids, soft, batch.places)
        slopes = torch.autograd.grad(states.square().mean(), weights)
        opening = reader.embed_tokens(torch.tensor(reader.prefix)).expand(len(batch.ids), -1, -1)
        text = reader.embed_tokens(batch.ids.clamp_min(0))
        text[batch.ids < 0] = soft[-1 - batch.ids[batch.ids < 0]]
        hidden = reader.decoder(inputs_embeds=torch.cat([opening, text], 1), use_cache=False).last_hidden_state
        places = (batch.places + len(reader.prefix)).unsqueeze(-1).expand(-1, -1, hidden.shape[-1])
        wanted = hidden.gather(1, places)
        wanted_slopes = torch.autograd.grad(wanted.square().mean(), weights)
        with torch.no_grad():
            ranked = reader.states(batch.ids, soft, batch.places)
        torch.testing.assert_close(states, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ranked, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(slopes, wanted_slopes, atol=1e-5, rtol=1e-3)
        with torch.no_grad():
            for weight, slope in zip(weights, slopes, strict=True):
                weight -= 0.5 * slope


@MAKERS
def test_lora_starts_at_the_frozen_model(make: Any) -> None:
    frozen, adapted = model(make()), model(make(), **LORA)
    adapted.load_state_dict(frozen.state_dict(), strict=False)
    batch = frozen.user_batch(torch.tensor([1, 2, 5]), generator())
    losses = [made.stage_loss("user_item_alignment", batch) for made in (frozen, adapted)]
    torch.testing.assert_close(losses[0], losses[1])


def losses_of(made: GLTA) -> list[float]:
    batch = made.user_batch(torch.tensor([1, 2, 5]), generator())
    return [made.stage_loss("user_item_alignment", batch).item() for _ in range(2)]


def test_dropout_is_on_in_training_only() -> None:
    made = model(**LORA | {"lora_dropout": 0.5})
    with torch.no_grad():
        for weight in made.adapter.parameters():
            weight.add_(0.1)
        made.train()
        first, second = losses_of(made)
        assert first != second
        made.eval()
        third, fourth = losses_of(made)
    assert third == fourth
    without = model(**LORA)
    without.load_state_dict(made.state_dict())
    assert losses_of(without)[0] == third


@pytest.mark.parametrize("adapter", ["none", "lora", "full"])
def test_the_language_models_own_dropout_stays_off(adapter: str) -> None:
    made = model(gpt2(), **LORA | {"adapter": adapter})
    assert made.backbone.decoder.config.resid_pdrop > 0
    made.train()
    first, second = losses_of(made)
    assert first == second


def test_lora_beside_half_precision_is_float32() -> None:
    made = model(llama().to(torch.bfloat16), **LORA)
    assert {weight.dtype for weight in made.adapter.parameters()} == {torch.float32}
    assert {weight.dtype for weight in made.backbone.decoder.parameters()} == {torch.float32, torch.bfloat16}
    made.train()
    optimizer = torch.optim.Adam(made.begin_stage("user_item_alignment"), lr=0.01)
    before = snapshot(made.adapter)
    step(made, "user_item_alignment", optimizer)
    assert any(not torch.equal(weight, before[name]) for name, weight in made.adapter.named_parameters())


def test_targets_by_name() -> None:
    made = model(**LORA | {"lora_target_modules": ["q_proj", "mlp.down_proj"]})
    layers = {name.partition("/lora_")[0] for name, _ in made.adapter.named_parameters()}
    assert layers == {f"layers/{layer}/{name}" for layer in (0, 1) for name in ("self_attn/q_proj", "mlp/down_proj")}
    with pytest.raises(UserError, match=r"ends in 'q_porj'; did you mean 'q_proj'"):
        model(**LORA | {"lora_target_modules": "q_porj"})


# --- whole runs ------------------------------------------------------------------------------------------------------

Settings = Callable[..., dict[str, Any]]


def quick(settings_of: Settings, **more: Any) -> dict[str, Any]:
    return settings_of(item_text="{movie_title} {class}", **SMALL["GLTA"]) | {"adapter": "lora"} | more


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_run_keeps_what_trained_and_finds_it_again(settings_of: Settings, adapter: str) -> None:
    settings = quick(settings_of, adapter=adapter, adapter_learning_rate=0.01)
    first = run("GLTA", "small", config_dict=settings)
    again = run("GLTA", "small", config_dict=settings)
    assert all(stage["cached"] for stage in again["stages"]) and again["test"] == first["test"]
    anew = run("GLTA", "small", config_dict=settings | {"cache": "refresh"})
    assert not any(stage["cached"] for stage in anew["stages"]) and anew["test"] == first["test"]

    state = load_state(Path(first["checkpoint"]) / "weights.safetensors")["state_dict"]
    kept = [name for name in state if name.startswith("adapter.")]
    assert kept and (adapter == "full" or all("lora_" in name for name in kept))
    assert adapter == "lora" or sum(state[name].numel() for name in kept) > 16 * 300
    # The trained weights matter: without them the ranking is another.
    frozen = run("GLTA", "small", config_dict=settings | {"adapter": "none"})
    assert frozen["test"] != first["test"]


def test_adapter_settings_are_part_of_both_stages(settings_of: Settings) -> None:
    marks = []
    for more in ({}, {"lora_rank": 2}, {"adapter_learning_rate": 0.01}, {"adapter": "none"}):
        stages = run("GLTA", "small", config_dict=quick(settings_of, evaluate_parts=False, **more))["stages"]
        marks.append([stage["fingerprint"] for stage in stages])
    graph, language_model, alignment, last = (set(column) for column in zip(*marks, strict=True))
    assert [len(column) for column in (graph, language_model, alignment, last)] == [1, 1, 4, 4]


@pytest.mark.parametrize("stage", ["item_text_alignment", "user_item_alignment"])
def test_a_run_that_was_cut_off_ends_with_the_same_numbers(
    settings_of: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setattr(trainer_module, "RESUME_SECONDS", 0.0)
    monkeypatch.setattr(staged_module, "RESUME_SECONDS", 0.0)
    settings = quick(settings_of, epochs=3, alignment_epochs=3, eval_step=1, lora_dropout=0.3)
    whole = run("GLTA", "small", config_dict=settings | {"output_dir": str(tmp_path / "whole")})

    calls, honest = {"left": 0}, GLTA.stage_loss

    def cut_off(self: GLTA, now: str, batch: Any) -> torch.Tensor:
        calls["left"] += now == stage
        # In the last of the three epochs, past two states that were saved.
        if now == stage and calls["left"] == 2 * len(self.stage_batches(stage, generator())) + 1:
            raise KeyboardInterrupt
        return honest(self, now, batch)

    monkeypatch.setattr(GLTA, "stage_loss", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run("GLTA", "small", config_dict=settings)
    monkeypatch.setattr(GLTA, "stage_loss", honest)
    assert list(Path(settings["output_dir"]).rglob("resume.safetensors"))
    resumed = run("GLTA", "small", config_dict=settings)
    assert "going on where it was cut off" in Path(resumed["log_file"]).read_text(encoding="utf-8")
    assert resumed["test"] == whole["test"]


# --- what is refused, and quantisation -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"adapter": "full", "llm_quantization": "gptq"}, r"cannot train weights that are quantised.*adapter: lora"),
        ({"adapter": "full", "llm_quantization": "nf4"}, r"cannot train weights that are quantised.*adapter: lora"),
        ({"adapter": "full", "llm_dtype": "float16"}, r"float16.*bfloat16"),
        ({"adapter": "lora", "lora_target_modules": ["c_attn"]}, r"no linear layer.*'c_attn'.*q_proj"),
        ({"adapter": "lorra"}, r"adapter.*lorra"),
        ({"adapter": "lora", "lora_rank": 0}, r"lora_rank"),
    ],
)
def test_refused_before_any_work(settings_of: Settings, settings: dict[str, Any], says: str) -> None:
    made = quick(settings_of, **settings)
    with pytest.raises(UserError, match=says):
        run("GLTA", "small", config_dict=made)
    assert not list(Path(made["output_dir"]).rglob("stage.json"))


def test_what_peft_refuses_ends_in_one_line(settings_of: Settings, tmp_path: Path) -> None:
    folder = write(KINDS["mamba"], tmp_path / "mamba")
    made = quick(settings_of, llm=str(folder))
    with pytest.raises(UserError, match=r"lora_target_modules: .*out_proj.*mamba") as error:
        run("GLTA", "small", config_dict=made)
    assert "\n" not in str(error.value) and not list(Path(made["output_dir"]).rglob("stage.json"))


@pytest.mark.parametrize(("quantization", "becomes"), [("nf4", torch.float32), ("gptq", torch.bfloat16)])
def test_a_quantised_model_is_prepared_where_peft_would(quantization: str, becomes: torch.dtype) -> None:
    decoder = llama().to(torch.bfloat16)
    settings = {
        **LORA, "llm_quantization": quantization, "lora_rank": 2, "lora_alpha": 4, "lora_target_modules": "all-linear",
    }  # fmt: skip
    adapter = adapt(decoder, settings)
    assert decoder.get_input_embeddings().weight.dtype == decoder.norm.weight.dtype == becomes
    trained = {id(weight) for weight in adapter.parameters()}
    assert all(weight.requires_grad == (id(weight) in trained) for weight in decoder.parameters())


class AskedError(Exception):
    """Carries what transformers was asked to load."""


@pytest.mark.parametrize("quantization", ["gptq", "int8", "nf4"])
def test_what_transformers_is_asked_for(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(KINDS["llama"], tmp_path / "llama")
    if quantization == "gptq":
        config = json.loads((folder / "config.json").read_text())
        stored = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False}
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))

    def from_pretrained(source: str, **options: Any) -> Any:
        raise AskedError(source, options)

    monkeypatch.setattr(load, "check_options", lambda *_: None)
    monkeypatch.setattr(
        load.AutoModelForCausalLM if quantization == "gptq" else load.AutoModel, "from_pretrained", from_pretrained
    )
    with pytest.raises(AskedError) as caught:
        load_backbone(folder, dtype="bfloat16", quantization=quantization, device="cuda:0")
    options = caught.value.args[1]
    assert options["device_map"] == {"": "cuda:0"} and options["dtype"] == torch.bfloat16
    made = options["quantization_config"].to_dict()
    if quantization == "gptq":
        # Exllama and Marlin are faster and pass no gradient on.
        with pytest.warns(UserWarning, match="You passed"):
            merged = AutoHfQuantizer.merge_quantization_configs(stored, options["quantization_config"])
        assert (merged.backend, merged.bits, merged.group_size) == ("auto_trainable", 4, 64)
        return
    assert made["load_in_8bit"] is (quantization == "int8") and made["load_in_4bit"] is (quantization == "nf4")
    if quantization == "nf4":
        assert made["bnb_4bit_quant_type"] == "nf4" and made["bnb_4bit_compute_dtype"] == "bfloat16"


def test_a_gptq_model_is_loaded_whole_and_its_head_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """optimum knows the layers as model.layers, a name that a model without its head does not have."""
    folder = write(KINDS["llama"], tmp_path / "llama")
    plain = AutoModel.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    honest = load.AutoModelForCausalLM.from_pretrained

    def unquantised(source: str, **options: Any) -> Any:
        del options["config"].quantization_config
        return honest(source, **{key: options[key] for key in ("config", "dtype", "output_loading_info")})

    monkeypatch.setattr(load, "check_options", lambda *_: None)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", unquantised)
    decoder = load_backbone(folder, quantization="gptq").decoder
    assert type(decoder) is type(plain)
    for name, weight in decoder.state_dict().items():
        assert torch.equal(weight, plain.state_dict()[name]), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_reads_what_lora_over_packed_weights_makes_float32(tied: bool) -> None:
    sizes = LlamaConfig(
        vocab_size=50,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    causal = LlamaForCausalLM(sizes).to(torch.bfloat16).eval().requires_grad_(False)
    wanted = LORA | {"llm_quantization": "int8", "lora_rank": 2, "lora_alpha": 4, "lora_target_modules": "all-linear"}
    assert adapt(base_of(causal), wanted, causal.get_output_embeddings())
    with torch.no_grad():
        assert causal(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32
    live_head(causal, causal.get_input_embeddings().weight)
