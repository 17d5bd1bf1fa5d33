"""The memory arithmetic against parameters, packed tensors and saved tensors that are really there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from tiny_folders import KINDS, write
from transformers import AutoModel, LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3Config

from recbole_llm.backbone import load
from recbole_llm.backbone.memory import activation_bytes, cache_bytes, count_weights
from recbole_llm.backbone.soft_tokens import SoftPromptDecoder
from recbole_llm.cli import main
from recbole_llm.config import Config

SHIPPED = ROOT / "properties" / "llm" / "llama-2-7b-gptq.yaml"
GIB = 2**30
SIZES: dict[str, Any] = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
}  # fmt: skip


def llama_2_7b() -> LlamaConfig:
    """The sizes that Meta's config.json has (Touvron et al. 2023, arXiv 2307.09288), and transformers' defaults."""
    return LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )


def test_llama_2_7b_has_the_parameters_that_it_is_known_for() -> None:
    weights = count_weights(llama_2_7b(), "float16", "gptq")
    with torch.device("meta"):
        whole = LlamaForCausalLM(llama_2_7b())
    assert weights.parameters + whole.lm_head.weight.numel() == sum(one.numel() for one in whole.parameters())
    assert round(sum(one.numel() for one in whole.parameters()) / 1e9, 2) == 6.74
    # A layer by hand: four square matrices and three of the MLP.
    assert weights.linear == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert weights.unpacked == 2 * weights.linear
    rest = weights.parameters - weights.linear
    assert rest == 32000 * 4096 + (2 * 32 + 1) * 4096
    by_group = 64 + 2.5  # 128 weights of half a byte, a float16, half a byte
    group_index = 4 * 32 * (6 * 4096 + 11008)
    assert weights.size == weights.linear / 128 * by_group + group_index + 2 * rest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "qwen3"])
def test_weights_not_quantised_are_what_a_loaded_model_holds(tmp_path: Path, name: str, dtype: str) -> None:
    model = AutoModel.from_pretrained(write(KINDS[name], tmp_path), dtype=dtype)
    weights = count_weights(model.config, dtype)
    assert weights.size == sum(one.numel() * one.element_size() for one in model.parameters())


def saved_bytes(model: Any, rows: int, tokens: int, prefix: int) -> int:
    """Bytes of every storage that autograd keeps in one forward pass, the model's own left out."""
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in own:
            kept[address] = tensor  # which also keeps the address from being used again
        return tensor

    reader = SoftPromptDecoder(model, model.get_input_embeddings(), list(range(prefix)))
    ids = torch.randint(3, 90, (rows, tokens), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = -1
    soft = torch.randn(1, model.config.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        reader.states(ids, soft, torch.full((rows, 1), tokens - 1))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("prefix", [0, 9])
@pytest.mark.parametrize("heads", [4, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps(heads: int, prefix: int, dtype: str) -> None:
    config = LlamaConfig(**SIZES, num_key_value_heads=heads)
    model = LlamaModel(config).eval().requires_grad_(False).to(getattr(torch, dtype))
    found = saved_bytes(model, 4, 40, prefix)
    assert activation_bytes(config, 4, 40, prefix, dtype) == pytest.approx(found, rel=0.05)


def test_checkpointing_keeps_one_layer_and_the_inputs_of_the_others() -> None:
    config = LlamaConfig(**SIZES)
    whole, checkpointed = (activation_bytes(config, 4, 40, 0, "float32", checkpointing=on) for on in (False, True))
    final_norm = 4 * 40 * (64 + 1) * 4
    layer = (whole - final_norm) / 3
    assert checkpointed == layer + final_norm + 3 * 4 * 40 * 64 * 4


def test_keys_and_values_are_what_a_cache_holds() -> None:
    config = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=24)
    model = AutoModel.from_config(config)
    cache = model(torch.ones(5, 7, dtype=torch.long), use_cache=True).past_key_values
    held = sum(one.numel() * 4 for layer in cache.layers for one in (layer.keys, layer.values))
    assert cache_bytes(config, 5, 7, "float32") == held


def test_the_shipped_files_figures_are_the_arithmetics() -> None:
    text, config = SHIPPED.read_text(encoding="utf-8"), llama_2_7b()
    weights = count_weights(config, "float16", "gptq")
    prompts = {}
    for line in re.findall(r"#   stage \d .*", text):
        stage, rows, prefix, tokens = re.search(
            r"stage (\d).*?(\d+) prompts of (\d+) shared and (\d+) own", line
        ).groups()
        prompts[stage] = (int(rows), int(tokens), int(prefix))
    expected = {"weights": weights.size, "unpacked": weights.unpacked, "unpacked checkpointed": weights.unpacked // 32}
    for stage, shape in prompts.items():
        expected[f"stage {stage}"] = activation_bytes(config, *shape)
        expected[f"stage {stage} checkpointed"] = activation_bytes(config, *shape, checkpointing=True)
    expected["inference: ar"] = cache_bytes(config, 256, 100)
    stated: dict[str, float] = {}
    outer = ""
    for indent, name, figure in re.findall(r"^#   (  )?(\w[\w: ]*?) +(\d+\.\d\d)\b", text, re.MULTILINE):
        outer = outer if indent else name
        stated[f"{outer} {name}" if indent else name] = float(figure)
    assert stated == {name: round(size / GIB, 2) for name, size in expected.items()}
    low = (weights.size + expected["stage 2"]) / GIB
    high = low + weights.unpacked / GIB
    least = (weights.size + expected["stage 2 checkpointed"] + weights.unpacked / 32) / GIB
    assert f"{low:.1f} to {high:.1f} without checkpointing, {least:.1f} with" in text
    at_two = activation_bytes(config, 2, *prompts["2"][1:]) + weights.size + weights.unpacked
    assert at_two / GIB + 1 < 24


def test_a_shipped_file_is_picked_by_its_name_and_overridden() -> None:
    config = Config("GLTA", "ml-100k", command_line=["--llm=llama-2-7b-gptq"])
    assert (config["llm"], config["llm_quantization"]) == ("TheBloke/Llama-2-7B-GPTQ", "gptq")
    assert config["llm_dtype"] == "float16" and config["llm_hidden_size"] == 128
    flags = ["--llm=llama-2-7b-gptq", "--llm_dtype=bfloat16"]
    assert Config("GLTA", "ml-100k", command_line=flags)["llm_dtype"] == "bfloat16"
    given = {"llm": "llama-2-7b-gptq", "llm_attention": "eager"}
    made = Config("GLTA", "ml-100k", config_dict=given, command_line=[])
    assert (made["llm"], made["llm_attention"]) == ("TheBloke/Llama-2-7B-GPTQ", "eager")
    assert Config("GLTA", "ml-100k", command_line=[])["llm_quantization"] == "none"


def test_a_file_that_is_not_shipped_is_no_llm(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("epochs: 99")
    config = Config("GLTA", "ml-100k", command_line=[f"--llm={tmp_path / 'model'}"])
    assert config["llm"] == str(tmp_path / "model") and config["epochs"] != 99


def test_without_what_it_needs_it_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["run", "--model=GLTA", "--dataset=tiny", "--llm=llama-2-7b-gptq"]) == 2
    assert "llm_quantization: gptq needs the package gptqmodel" in capsys.readouterr().err
    monkeypatch.setattr(load, "HfApi", lambda: 1 / 0)  # whatever keeps the hub from answering
    assert main(["run", "--model=GLTA", "--dataset=tiny", "--llm=llama-2-7b-gtpq"]) == 2
    assert "did you mean 'llama-2-7b-gptq'" in capsys.readouterr().err


def test_inspecting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama_2_7b().save_pretrained(tmp_path / "llama")
    arguments = ["inspect", "backbone", str(tmp_path / "llama"), "--llm_quantization=gptq", "--llm_dtype=float16"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    weights = count_weights(llama_2_7b(), "float16", "gptq")
    assert f"{weights.parameters:,} parameters" in shown and f"gptq: {weights.size / GIB:.2f} GiB" in shown
    assert f"{activation_bytes(llama_2_7b(), 8, 347, 38) / GIB:.2f} GiB" in shown
    assert main([*arguments, "--rows=2"]) == 0
    assert f"{activation_bytes(llama_2_7b(), 2, 347, 38) / GIB:.2f} GiB" in capsys.readouterr().out
    assert main([*arguments, "--rows=two"]) == 2
    for name, words in (
        (str(tmp_path / "none"), "it is no folder with a config.json"),
        (
            "gpt2-not-here",
            "hub's cache has no config.json of it; fetch it first: hf download gpt2-not-here config.json",
        ),
        ("embedded-t5", "made on the spot"),
        ("llama-2-7b-gptq", "hf download TheBloke/Llama-2-7B-GPTQ config.json"),
        ("embeded", "did you mean 'embedded'"),
    ):
        assert main(["inspect", "backbone", name]) == 2
        assert words in capsys.readouterr().err


def test_inspecting_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "backbone", "embedded"]) == 0
    # Two layers of width 128 (four square matrices, three of 352) with their norms, a last one, and 2000 tokens.
    count = 2 * (4 * 128 * 128 + 3 * 128 * 352 + 2 * 128) + 128 + 2000 * 128
    assert f"{count:,} parameters" in capsys.readouterr().out
