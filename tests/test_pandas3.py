"""pandas 3 gives the numbers of pandas 2.3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT

CODE = """
import json, sys
import pandas
from recbole_llm.training.runs import run

BASE = {"epochs": 1, "output_dir": sys.argv[1], "state": "ERROR", "show_progress": False, "tensorboard": False,
        "user_inter_num_interval": "[150,200]", "metrics": ["NDCG"], "topk": [20], "valid_metric": "NDCG@20",
        "gpu_id": ""}
INTER = ["user_id", "item_id", "rating", "timestamp"]
SHUFFLED = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "RO", "group_by": "user", "mode": "full"}
MODELS = {
    "LightGCN": {},
    "SASRecF": {"selected_features": ["class"], "load_col": {"inter": INTER, "item": ["item_id", "class"]},
                "hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "FM": {"load_col": {"inter": INTER, "item": ["item_id", "class", "release_year"]}},
}
found = {"pandas": pandas.__version__}
for model, settings in MODELS.items():
    for policy in ("unified", "recbole"):
        more = {"eval_args": SHUFFLED} if policy == "recbole" and model != "SASRecF" else {}
        settings = BASE | settings | more | {"policy": policy}
        found[f"{model} {policy}"] = run(model, "ml-100k", config_dict=settings)["test"]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_pandas_3_gives_the_same_numbers(tmp_path: Path) -> None:
    other = "pandas>=3,<4" if int(pd.__version__.split(".")[0]) < 3 else "pandas>=2.3,<3"
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), other]
    if subprocess.run(pip, capture_output=True, check=False).returncode:
        pytest.skip(f"LOUD: {other} could not be installed; the other pandas was not tested")
    found = []
    for number, path in enumerate(("", str(target))):
        done = subprocess.run(
            [sys.executable, "-c", CODE, str(tmp_path / str(number))], cwd=ROOT, capture_output=True, text=True,
            check=False, env=os.environ | {"PYTHONPATH": path},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout.splitlines()[-1]))
    assert found[0].pop("pandas").split(".")[0] != found[1].pop("pandas").split(".")[0]
    assert found[0] == found[1]
