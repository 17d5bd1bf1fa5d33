"""Runs of several processes take the steps of one; they are really launched, on CPUs over the loopback."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from recbole_llm.config import Config
from recbole_llm.data import create_dataset, data_preparation
from recbole_llm.errors import UserError
from recbole_llm.training import sharding

ROOT = Path(__file__).parent.parent
FILES = ROOT / "properties" / "accelerate"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch"]
# Two alignment epochs of 2 steps and six epochs of 4.
TINY = [
    "--model=GLTA", "--dataset=tiny", "--llm_train_steps=3", "--llm_hidden_size=32", "--llm_heads=2", "--llm_layers=1",
    "--llm_vocab_size=400", "--train_batch_size=32", "--alignment_epochs=2", "--graph_model.epochs=1",
    "--epochs=6", "--eval_step=2", "--state=DEBUG", "--tensorboard=false", "--gpu_id=",
]  # fmt: skip
STEP = re.compile(r"DEBUG (\w+): step (\d+), loss (\S+)$", re.MULTILINE)


@dataclass
class Done:
    """What a command left behind."""

    status: int
    out: str
    err: str
    saved: Path

    def result(self) -> dict[str, Any]:
        (file,) = self.saved.glob("GLTA-tiny-*/result.json")
        return json.loads(file.read_text(encoding="utf-8"))

    def losses(self) -> dict[tuple[str, int], float]:
        (log,) = self.saved.glob("GLTA-tiny-*/run.log")
        return {(name, int(step)): float(loss) for name, step, loss in STEP.findall(log.read_text(encoding="utf-8"))}


def command(words: Sequence[str], saved: Path) -> Done:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("ACCELERATE_", "MASTER_"))}
    environment |= {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300, check=False)
    return Done(done.returncode, done.stdout, done.stderr, saved)


def run(saved: Path, *more: str, launcher: Sequence[str] | None = None) -> Done:
    start = [sys.executable] if launcher is None else [*LAUNCH, "--main_process_port", "0", *launcher]
    # A setting that is given twice is refused.
    given = {word.partition("=")[0] for word in more}
    words = [word for word in TINY if word.partition("=")[0] not in given]
    return command([*start, "run_recbole_llm.py", *words, f"--output_dir={saved}", *more], saved)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = run(tmp_path_factory.mktemp("alone"))
    assert done.status == 0, done.err
    assert len(done.losses()) == 28
    return done


def assert_the_same(several: Done, alone: Done) -> None:
    assert several.status == 0, several.err
    ours, expected = several.losses(), alone.losses()
    assert ours.keys() == expected.keys()
    assert max(abs(ours[step] - expected[step]) for step in expected) < 1e-5
    assert ours != expected, "sums in another order move the last bits: were there several processes?"
    result, plain = several.result(), alone.result()
    for phase in ("valid", "test"):
        assert result[phase] == pytest.approx(plain[phase], abs=0.01)
    assert result["best_epoch"] == plain["best_epoch"]
    marks = [[(stage["name"], stage["fingerprint"]) for stage in one["stages"]] for one in (result, plain)]
    assert marks[0] == marks[1]
    assert not any(stage["cached"] for stage in result["stages"])
    assert len(list(several.saved.glob("GLTA-*"))) == 1 and not list((several.saved / "cache" / ".work").iterdir())
    with np.load(next(several.saved.glob("GLTA-*/per_user.npz"))) as arrays:
        users = arrays["user_id"].tolist()
    with np.load(next(alone.saved.glob("GLTA-*/per_user.npz"))) as arrays:
        assert users == arrays["user_id"].tolist()


@pytest.mark.parametrize(
    "launcher",
    [
        ["--config_file", str(FILES / "ddp.yaml")],
        # accelerate's launcher for CPUs starts one process only; the run starts the other.
        pytest.param(["--cpu", "--num_processes", "2"], marks=pytest.mark.slow),
        pytest.param(["--config_file", str(FILES / "fsdp.yaml")], marks=pytest.mark.slow),
        pytest.param(
            ["--config_file", str(FILES / "zero3.yaml")],
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
            ],
        ),
    ],
    ids=["ddp", "cpu", "fsdp", "zero3"],
)
def test_two_processes_take_the_steps_of_one(launcher: list[str], alone: Done, tmp_path: Path) -> None:
    several = run(tmp_path, launcher=launcher)
    assert_the_same(several, alone)
    assert several.out.count("tiny: test, 120 rankings of the whole catalogue") == 1
    assert several.err.count("user_item_alignment: done in") == 1


@pytest.mark.slow
def test_shared_settings_mean_the_same_in_two_processes(tmp_path: Path) -> None:
    """Accumulated batches, clipping, a schedule and checkpointing; the last batch of an epoch has fewer rows."""
    more = [
        "--gradient_accumulation_steps=3", "--clip_grad_norm=0.5", "--lr_schedule=cosine", "--warmup_ratio=0.2",
        "--gradient_checkpointing=true", "--train_batch_size=17",
    ]  # fmt: skip
    plain = run(tmp_path / "alone", *more)
    several = run(tmp_path / "several", *more, launcher=["--multi_gpu", "--num_processes", "2"])
    assert_the_same(several, plain)


@pytest.mark.slow
def test_several_processes_find_what_one_made(alone: Done, tmp_path: Path) -> None:
    shutil.copytree(alone.saved / "cache", tmp_path / "cache")
    again = run(tmp_path, launcher=["--multi_gpu", "--num_processes", "2"])
    assert again.status == 0, again.err
    assert all(stage["cached"] for stage in again.result()["stages"])


def test_a_mistake_is_told_once_and_ends_every_process_with_2(tmp_path: Path) -> None:
    done = run(tmp_path, "--llm=no/such/folder", launcher=["--multi_gpu", "--num_processes", "2"])
    assert done.err.count("recbole-llm: llm 'no/such/folder'") == 1
    # torchrun's own report: the first process that ends with 2 has the other one stopped, if that still runs.
    assert set(re.findall(r"exitcode  : (-?\d+)", done.err)) in ({"2"}, {"2", "-15"})
    assert not list(tmp_path.glob("GLTA-*")), "a refused run leaves nothing behind"


@pytest.mark.parametrize("kind", ["fsdp", "zero3"])
def test_a_sharded_language_model_gives_what_a_whole_one_gives(kind: str, tmp_path: Path) -> None:
    if kind == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    launcher = [*LAUNCH, "--main_process_port", "0", "--config_file", str(FILES / f"{kind}.yaml")]
    done = command([*launcher, str(ROOT / "tests" / "sharded_states.py")], tmp_path)
    assert done.out.count("as the whole") == 2, done.err


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_its_files(file: Path) -> None:
    read = load_config_from_file(str(file))
    written = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert read.distributed_type == written["distributed_type"] and read.num_processes == 2
    inner = {"FSDP": "fsdp_config", "DEEPSPEED": "deepspeed_config"}.get(written["distributed_type"])
    assert inner is None or getattr(read, inner) == written[inner]
    assert f"--config_file properties/accelerate/{file.name}" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "fsdp_version: 2"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"llm_quantization": "nf4"},
            "nf4 does not go with FSDP",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, {"llm_attention": "flash_attention_2"},
            "flash_attention_2 does not go with FSDP, which takes sdpa or eager",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_sharded_is_refused(
    environment: dict[str, str], settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in ({"WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(UserError, match=words):
        sharding.check_sharding({"llm_quantization": "none", "llm_attention": "sdpa"} | settings)


def test_deepspeed_that_is_missing_or_divides_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"llm_quantization": "none", "llm_attention": "sdpa"}
    for key, value in {"WORLD_SIZE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: False)
    with pytest.raises(UserError, match="DeepSpeed is not installed"):
        sharding.check_sharding(settings)
    monkeypatch.setattr(sharding, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(sharding, "DeepSpeedPlugin", lambda: type("Plugin", (), {"zero_stage": 2}))
    with pytest.raises(UserError, match="zero_stage: 3"):
        sharding.check_sharding(settings)


@pytest.mark.parametrize("count", [2, 3, 200])
def test_the_processes_rank_every_row_once(count: int) -> None:
    config = Config("SASRec", "tiny", config_dict={"gpu_id": "", "eval_batch_size": 7}, command_line=[])
    _, valid, _ = data_preparation(config, create_dataset(config))
    shares = [valid.share(rank, count) for rank in range(count)]
    users = [[user for batch in share for user in batch[0]["user_id"].tolist()] for share in shares]
    assert sorted(user for part in users for user in part) == sorted(valid.users.tolist())
    assert [len(share) for share in shares] == [sum(1 for _ in share) for share in shares]
    assert max(map(len, users)) - min(map(len, users)) <= 1
