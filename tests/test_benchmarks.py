"""The benchmarks' own machinery, and that each runs, compares like with like and ends in one JSON line."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_harness", FOLDER / "_harness.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestHarness:
    def test_sides_take_turns_and_places_belong_together(
        self, harness: ModuleType, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[str] = []
        now = [0.0]
        monkeypatch.setattr(harness.time, "perf_counter", lambda: now[0])

        def side(name: str, seconds: float) -> Any:
            def run() -> None:
                calls.append(name)
                now[0] += seconds

            return run

        ours, reference = harness.measure_pairs(side("ours", 1.0), side("reference", 3.0), pairs=3, warmup=2)
        assert calls[:4] == ["reference", "ours"] * 2
        assert calls[4:] == ["reference", "ours", "ours", "reference", "reference", "ours"]
        assert ours == pytest.approx([1.0] * 3) and reference == pytest.approx([3.0] * 3)

    def test_the_collector_is_off_while_timed_and_on_again(self, harness: ModuleType) -> None:
        seen = []
        harness.once(lambda: seen.append(harness.gc.isenabled()))
        assert seen == [False] and harness.gc.isenabled()
        with pytest.raises(ZeroDivisionError):
            harness.once(lambda: 1 / 0)
        assert harness.gc.isenabled()

    def test_report_ends_in_one_json_line(self, harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
        harness.report("x", [1.0, 2.0, 4.0], [10.0, 8.0, 8.0], equal=True, max_error=1e-7, detail={"rows": 3})
        result = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert list(result) == ["name", "ratio", "ratios", "equal", "max_error", "detail"]
        assert result["ratios"] == [10.0, 4.0, 2.0] and result["ratio"] == 4.0
        assert result["equal"] is True and result["detail"]["rows"] == 3
        assert result["detail"]["fastest"] == [1.0, 8.0]
        assert result["detail"]["machine"]["cores"] >= 1 and len(result["detail"]["machine"]["load_average"]) == 3

    def test_quick_is_an_option(self, harness: ModuleType) -> None:
        assert harness.parser("x").parse_args([]).quick is False
        assert harness.parser("x").parse_args(["--quick"]).quick is True


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_what_it_imports_is_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Also of those that only run with the slow tests.
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert callable(module.main)


def quick(name: str, folder: Path) -> dict[str, Any]:
    """What a benchmark in small says at its end."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), "--quick", "--threads", "1"],
        capture_output=True, text=True, cwd=folder, timeout=600, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    assert result["name"] == name
    return result


NO_FORK = pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU no run is forked")


@pytest.mark.parametrize(
    "name",
    [
        "codebook",
        "spectral_ids",
        "trie",
        pytest.param("beam_search", marks=pytest.mark.slow),
        pytest.param("fine_tuning", marks=pytest.mark.slow),
        pytest.param("free_search", marks=pytest.mark.slow),
        pytest.param("title_search", marks=pytest.mark.slow),
        pytest.param("lightgcn_epoch", marks=pytest.mark.slow),
        pytest.param("run_start", marks=[pytest.mark.slow, NO_FORK]),
        pytest.param("sasrec_step", marks=pytest.mark.slow),
        pytest.param("search_modes", marks=pytest.mark.slow),
        pytest.param("shared_cores", marks=pytest.mark.slow),
        pytest.param("tca_soft_labels", marks=pytest.mark.slow),
        pytest.param("title_training", marks=pytest.mark.slow),
        pytest.param("token_table", marks=pytest.mark.slow),
    ],
)
def test_quick_run(name: str, tmp_path: Path) -> None:
    result = quick(name, tmp_path)
    assert result["equal"] is True
    # Of the fastest runs of both sides: those of a pair meet other work alike only on the average.
    ours, reference = result["detail"]["fastest"]
    assert reference > 1.5 * ours


@pytest.mark.parametrize(
    "name",
    ["on_paper", pytest.param("hot_paths", marks=pytest.mark.slow), pytest.param("scaling", marks=pytest.mark.slow)],
)
def test_quick_run_of_what_compares_with_no_other(name: str, tmp_path: Path) -> None:
    for path in quick(name, tmp_path).get("paths", []):
        assert path["seconds"] > 0 and path["bytes"] > 0 and path["bound"] > 0


@pytest.mark.slow
def test_quick_run_of_products(tmp_path: Path) -> None:
    result = quick("cpu_products", tmp_path)
    assert result["equal"] is True and len(result["detail"]["ratios"]) == 8
    # On other processors there is nothing to gain.
    assert result["ratio"] > 1.1 or not result["detail"]["auto_takes_it"]
