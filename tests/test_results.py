"""Reading what a run has left: the nearest name where it is not there, one line where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from recbole_llm.errors import UserError
from recbole_llm.evaluation.results import read_run
from recbole_llm.inspection import inspect
from recbole_llm.leaderboard.compare import compare
from recbole_llm.training.runs import run


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({"model": "A", "per_user": "per_user.npz"}), encoding="utf-8")
    np.savez_compressed(folder / "per_user.npz", user_id=np.array(["u1", "u2"]), **{"ndcg@10": np.array([0.5, 1.0])})
    return folder


def test_a_run_is_read_by_its_folder_or_its_file(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one")
    for path in (folder, folder / "result.json", str(folder)):
        result, arrays = read_run(path)
        assert result["model"] == "A" and arrays["ndcg@10"].tolist() == [0.5, 1.0]


def test_a_folder_without_a_result_names_the_nearest(tmp_path: Path) -> None:
    write_run(tmp_path / "GLTA-tiny-1")
    with pytest.raises(UserError, match="GLTA-tiny-1"):
        read_run(tmp_path / "GLTA-tiny-2")
    with pytest.raises(UserError, match="GLTA-tiny-1"):
        read_run(tmp_path)


def test_a_run_whose_test_has_no_rankings_is_shown_and_not_compared(tmp_path: Path) -> None:
    for seed, split in ((1, "{LS: valid_only}"), (2, "{LS: valid_only}")):
        words = [
            "--model=Pop",
            "--dataset=tiny",
            "--metrics=[NDCG]",
            f"--eval_args={{split: {split}}}",
            f"--seed={seed}",
        ]
        run(command_line=[*words, f"--output_dir={tmp_path}", f"--result_file={tmp_path}/{seed}/result.json"])
    files = [str(tmp_path / str(seed) / "result.json") for seed in (1, 2)]
    assert json.loads(Path(files[0]).read_text())["per_user"] is None
    assert "Pop on tiny, seed 1" in inspect(["run", files[0]])
    with pytest.raises(UserError, match=r"no metric in common|no values of users to compare"):
        compare(files)


def test_sampled_candidates_are_told_and_no_ones_values(tmp_path: Path) -> None:
    split = "{split: {LS: valid_and_test}, order: RO, group_by: user, mode: {valid: full, test: pop20}}"
    words = ["--model=Pop", "--dataset=tiny", "--policy=recbole", f"--eval_args={split}", f"--output_dir={tmp_path}"]
    result = run(command_line=words)
    assert result["per_user"] is None and result["evaluation"]["ranking"] == "pop20"
    assert result["test"]["hit@10"] > result["valid"]["hit@10"]
    assert "Pop on tiny" in inspect(["run", result["result_file"]])


@pytest.mark.parametrize("name", ["result.json", "per_user.npz"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.97])
def test_a_cut_file_is_told_in_one_line(tmp_path: Path, name: str, kept: float) -> None:
    file = write_run(tmp_path / "one") / name
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match="cannot be read") as caught:
        read_run(tmp_path / "one")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["[]", '"text"', "{}", '{"per_user": null}'])
def test_a_file_that_holds_something_else_is_told_in_one_line(tmp_path: Path, content: str) -> None:
    (write_run(tmp_path / "one") / "result.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match="cannot be read"):
        read_run(tmp_path / "one")
