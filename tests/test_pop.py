"""Pop counts interactions: each one, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from worlds import settings_of

from recbole_llm.config import Config
from recbole_llm.training.pipeline import fit, store_of


@pytest.mark.parametrize("batch", [16, 100_000])
def test_pop_has_each_items_train_interactions(batch: int, small_data: Path, tmp_path: Path) -> None:
    config = Config("Pop", "small", config_dict=settings_of(small_data, tmp_path, train_batch_size=batch))
    fitted = fit(config, store_of(config))
    counts = np.bincount(fitted.train_data._dataset.train_histories.items, minlength=fitted.dataset.item_num)
    assert counts.max() > 1 and np.array_equal(fitted.model.item_cnt[:, 0].cpu().numpy(), counts)


def test_recboles_own_is_there_under_its_policy(small_data: Path, tmp_path: Path) -> None:
    config = Config("Pop", "small", config_dict=settings_of(small_data, tmp_path, policy="recbole"))
    assert config["train_neg_sample_args"]["distribution"] == "uniform"
    assert type(fit(config, store_of(config)).model).__module__.startswith("recbole.")
