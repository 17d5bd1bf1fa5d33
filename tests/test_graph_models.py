"""Any graph model behind GLTA: each that RecBole has trains, hands over its embeddings, and GLTA ranks with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm import Config, run
from recbole_llm.errors import UserError
from recbole_llm.training.embeddings import graph_embeddings
from recbole_llm.training.pipeline import fit, store_of

TINY: dict[str, Any] = {
    "epochs": 1, "alignment_epochs": 1, "llm_layers": 1, "llm_hidden_size": 16, "llm_heads": 2, "llm_vocab_size": 320,
    "llm_train_steps": 1, "history_length": 5, "graph_model.epochs": 1, "graph_model.eval_step": 0,
    "show_progress": False, "tensorboard": False, "metrics": ["NDCG"], "topk": [10],
}  # fmt: skip
QUICK = ["NGCF", "SGL", "BPR", "DCCF"]
MORE = ["LightGCN", "DGCF", "GCMC", "NCL", "SpectralCF", "LINE", "ENMF"]
# Sizes that a data set of 120 users needs: NCL has 1,000 clusters, DGCF samples as many users as items.
OWN = {"NCL": {"graph_model.num_clusters": 5}, "DGCF": {"graph_model.train_batch_size": 128}}


@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_glta_stands_on_any_graph_model(name: str, tmp_path: Path) -> None:
    settings = {**TINY, "graph_model": name, "output_dir": str(tmp_path), **OWN.get(name, {})}
    result = run("GLTA", "tiny", config_dict=settings)
    assert np.isfinite(result["test"]["ndcg@10"])
    assert result["parts"]["graph_model"]["model"] == name
    config = Config("GLTA", "tiny", config_dict=settings).part("graph_model")
    users, items = graph_embeddings(fit(config, store_of(config)).model, name)
    assert users.shape[1] == items.shape[1] and len(users) == 121
    assert np.isfinite(users[1:]).all() and users[1:].std() > 0 and items[1:].std() > 0


@pytest.mark.parametrize("name", ["Pop", "EASE", "ItemKNN"])
def test_a_model_without_embeddings_is_no_graph_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"graph_model should be .* user and item embeddings, not {name}"):
        run("GLTA", "tiny", config_dict={**TINY, "graph_model": name, "output_dir": str(tmp_path)})
