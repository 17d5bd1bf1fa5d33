"""A recommender that generates items has its language model in memory once, head and all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import SMALL
from tiny_folders import KINDS, write
from transformers import AutoModel, AutoModelForCausalLM

from recbole_llm.backbone.load import load_backbone
from recbole_llm.config import Config
from recbole_llm.training.pipeline import fit, store_of

OPTIONS: dict[str, Any] = {
    "dtype": "float32", "attention": "sdpa", "quantization": "none", "trust_remote_code": False, "device": "cpu",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_with_its_head_is_the_same_model(kind: str, tmp_path: Path) -> None:
    folder = write(KINDS[kind], tmp_path)
    plain, backbone = load_backbone(folder, **OPTIONS), load_backbone(folder, **OPTIONS, with_head=True)
    assert plain.causal is None and plain.fingerprint() == backbone.fingerprint()
    ids = torch.tensor([[1, 2, 3, 4]])
    expected = AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids).logits
    assert torch.equal(backbone.causal(input_ids=ids).logits, expected)
    assert {id(weight) for weight in backbone.decoder.parameters()} <= {
        id(weight) for weight in backbone.causal.parameters()
    }
    assert not any(weight.requires_grad for weight in backbone.causal.parameters()) and not backbone.causal.training


@pytest.mark.parametrize("code_text_weight", [0.0, 0.1])
def test_a_run_loads_its_language_model_once(
    code_text_weight: float, small_data: Path, settings_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(KINDS["llama"], tmp_path / "llm")
    loads: list[str] = []
    for kind in (AutoModel, AutoModelForCausalLM):
        load = kind.from_pretrained

        def counted(*args: Any, load: Any = load, **kwargs: Any) -> Any:
            loads.append(str(args[0]))
            return load(*args, **kwargs)

        monkeypatch.setattr(kind, "from_pretrained", counted)
    more = {"llm": str(folder), "item_text": "{movie_title}", "epochs": 0, "code_text_weight": code_text_weight}
    config = Config("AlignTokenRec", "small", config_dict=settings_of(**SMALL["AlignTokenRec"] | more))
    fit(config, store_of(config))
    assert loads == [str(folder)]
