"""A recommender that trains first is looked at before it does: nobody waits for what cannot be used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import SMALL

from recbole_llm.config import Config
from recbole_llm.errors import UserError
from recbole_llm.training import pipeline
from recbole_llm.training.pipeline import fit, store_of
from recbole_llm.training.store import StageStore


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("GLTA", {"graph_model": "MultiVAE"}, "graph_model: MultiVAE has no user and item embeddings; take one such"),
        ("AlignTokenRec", {"embedding_model": "MultiVAE"}, "embedding_model: MultiVAE has no"),
        ("AlignTokenRec", {"embedding_model": "SASRec", "embedding_layer": "e0"}, None),
        ("LETTER", {"code_dim": 16}, r"code_dim 16\) with the item embeddings of SASRec \(8\): set embedding_model"),
        ("LLaRA", {"embedding_model": "MultiVAE"}, "embedding_model: MultiVAE has no"),
        ("CoLLM", {"embedding_model": "MultiVAE"}, "embedding_model: MultiVAE has no"),
        ("CoLLM", {"embedding_model": "BERT4Rec"}, "embedding_model: BERT4Rec makes no one vector of a history"),
        ("LLaRA", {"embedding_model": "BERT4Rec"}, None),
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused_before_it_is_trained(
    model: str, more: dict[str, Any], message: str | None, settings_of: Callable[..., dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    small = {key: value for key, value in SMALL[model].items() if "_model." not in key}
    if model == "LETTER":
        small |= {"embedding_model": "SASRec", "embedding_model.hidden_size": 8}
    config = Config(model, "small", config_dict=settings_of(item_text="{movie_title}", **(small | more)))

    def train(name: str, *_: Any) -> None:
        raise RuntimeError(f"{name} was begun")

    monkeypatch.setattr(pipeline, "_train", train)
    # Where nothing is wrong, training is what comes next.
    with pytest.raises(UserError if message else RuntimeError, match=message or "was begun"):
        fit(config, store_of(config))


@pytest.mark.parametrize("model", ["NGCF", "SASRec"])
def test_a_look_moves_no_number(model: str, settings_of: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    def look(shown: Any) -> None:
        shown.eval()
        torch.rand(3)
        np.random.random(3)

    config = Config(model, "small", config_dict=settings_of(epochs=1, **SMALL.get(model, {})))
    plain, looked = (
        fit(config, StageStore(tmp_path / name), look=one) for name, one in (("plain", None), ("looked", look))
    )
    for (name, weight), other in zip(plain.model.state_dict().items(), looked.model.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name
