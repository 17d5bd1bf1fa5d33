"""Metrics over a setting: which rows make a line, what its points are, and the picture of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from board_runs import write_run

from recbole_llm.cli import main
from recbole_llm.errors import UserError
from recbole_llm.evaluation.pictures import can_draw
from recbole_llm.leaderboard.assemble import table_of
from recbole_llm.leaderboard.board import leaderboard
from recbole_llm.leaderboard.curve import _names, curve_of, picture_lines, write_curves
from recbole_llm.leaderboard.rows import RowRuns
from recbole_llm.leaderboard.suite import suite_of

METRICS = ["ndcg@10", "consistency@10"]


def taught(folder: Path, seed: int, alpha: Any, quality: float, agreement: float, valid: float, **more: Any) -> Path:
    rng = np.random.default_rng([seed, round(1000 * quality)])
    values, shared = (mean + rng.normal(0, 0.05, 40) for mean in (quality, agreement))
    config = {"base_model": "AlignTokenRec", "cf_model": "SASRec", "alpha": alpha, **more}
    run = write_run(folder, "TCA4Rec", seed, values, valid=valid, config=config)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    result["consistency"] = {"cf_model": {"overlap@10": float(shared.mean()), "rbo@10": 0.1}}
    (run / "result.json").write_text(json.dumps(result), encoding="utf-8")
    with np.load(run / "per_user.npz") as arrays:
        content = dict(arrays)
    np.savez(run / "per_user.npz", **content, **{"cf_model.overlap@10": shared})
    return run


SWEPT = {0.0: (0.30, 0.2, 0.31), 0.05: (0.36, 0.4, 0.35), 0.3: (0.33, 0.6, 0.36), 1.0: (0.2, 0.8, 0.2)}


def rows_of(folder: Path, teachers: tuple[str, ...] = ("SASRec", "LightGCN"), **more: Any) -> list[RowRuns]:
    return [
        RowRuns(
            f"AlignTokenRec + {teacher}, alpha {alpha:g}",
            [
                taught(folder / f"{teacher}{alpha}{seed}", seed, alpha, own, shared, valid, cf_model=teacher)
                for seed in (1, 2)
            ],
            settings={"cf_model": teacher, "alpha": alpha, **more},
        )
        for teacher in teachers
        for alpha, (own, shared, valid) in SWEPT.items()
    ]


def table(rows: list[RowRuns]) -> dict[str, Any]:
    return table_of(rows, "toy", "by time", "", "ndcg@10", METRICS, None, None, 0.05)


def test_rows_that_differ_in_the_setting_alone_are_a_line(tmp_path: Path) -> None:
    rows = rows_of(tmp_path)
    odd = taught(tmp_path / "odd", 1, 0.1, 0.3, 0.3, 0.9)
    other = RowRuns("AlignTokenRec + SASRec, kl", [odd], settings={"cf_model": "SASRec", "tca_loss": "kl"})
    chosen = RowRuns("chosen", rows[1].files, settings=rows[1].settings, choice={"tried": [], "values": {}})
    plain = RowRuns("plain", [write_run(tmp_path / "plain", "AlignTokenRec", 1, np.full(40, 0.3))])
    made = table([*rows, other, chosen, plain])
    curve = curve_of(made, "alpha", ["NDCG@10", "consistency@10"], "NDCG@10")
    assert curve is not None and curve["metrics"] == METRICS
    assert {line["name"] for line in curve["lines"]} == {"AlignTokenRec + SASRec", "AlignTokenRec + LightGCN"}
    by_name = {row["name"]: row for row in made["rows"]}
    for line in curve["lines"]:
        assert [point["value"] for point in line["points"]] == [0.0, 0.05, 0.3, 1.0]
        # On valid .3 is best, on test .05: the mark goes by valid.
        assert [point["value"] for point in line["points"] if point["best"]] == [0.3]
        for point in line["points"]:
            for metric in METRICS:
                figure, found = by_name[point["row"]]["metrics"][metric], point["metrics"][metric]
                assert {key: found[key] for key in ("mean", "low", "high")} == {
                    key: figure[key] for key in ("mean", "low", "high")
                }
                assert len(found["seeds"]) == 2 and np.mean(found["seeds"]) == pytest.approx(figure["mean"])
    assert curve_of(made, "beta", METRICS, "ndcg@10") is None
    assert curve_of(made, "cf_model", METRICS, "ndcg@10") is None, "no number"


def test_far_apart_values_stand_closer_the_larger_they_are_and_zero_has_a_place(tmp_path: Path) -> None:
    def ticks(values: list[float]) -> tuple[list[float], bool]:
        rows = [
            RowRuns(f"r {x}", [taught(tmp_path / f"{values}{x}", 1, x, 0.3, 0.3, 0.1)], settings={"alpha": x})
            for x in values
        ]
        curve = curve_of(table(rows), "alpha", METRICS, "ndcg@10")
        assert curve is not None and [tick["value"] for tick in curve["ticks"]] == sorted(values)
        return [tick["at"] for tick in curve["ticks"]], curve["scaled"]

    assert ticks([0.0, 2.0, 1.0]) == ([0.0, 1.0, 2.0], False)
    found, scaled = ticks([1.0, 0.0, 0.01])
    assert scaled and found == pytest.approx([0, math.asinh(1), math.asinh(100)])


def test_a_row_without_agreement_is_missing_from_that_panel_alone(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, ("SASRec",))
    plain = write_run(tmp_path / "plain", "TCA4Rec", 1, np.full(40, 0.3), config={"alpha": 0.5})
    made = table([*rows, RowRuns("x", [plain], settings=dict(rows[0].settings) | {"alpha": 0.5})])
    curve = curve_of(made, "alpha", METRICS, "ndcg@10")
    assert curve is not None
    point = next(point for point in curve["lines"][0]["points"] if point["value"] == 0.5)
    assert set(point["metrics"]) == {"ndcg@10"}


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_the_picture_shows_every_line_in_every_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    drawn: list[Any] = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw))
    )
    made = table(rows_of(tmp_path))
    made["curve"] = curve_of(made, "alpha", METRICS, "ndcg@10")
    both, out = [made, made | {"curve": None}], tmp_path / "out"
    write_curves(both, out)
    file = out / "curve-alpha-toy-by-time.png"
    assert file.read_bytes().startswith(b"\x89PNG") and made["curve"]["picture"] == file.name
    assert picture_lines(both, "alpha", out) == [f"picture     {file}"]
    assert picture_lines(both[1:], "alpha", out) == ["picture     none: no two rows differ in alpha alone"]
    (figure,) = drawn
    assert [axis.get_ylabel() for axis in figure.axes] == [f"{metric} on test" for metric in METRICS]
    for axis, metric in zip(figure.axes, METRICS, strict=True):
        assert [label.get_text() for label in axis.get_xticklabels()] == ["0", "0.05", "0.3", "1"]
        shown = {bars.get_label(): bars.lines[0].get_ydata() for bars in axis.containers}
        for own in made["curve"]["lines"]:
            expected = [point["metrics"][metric]["mean"] for point in own["points"]]
            assert shown[own["name"]] == pytest.approx(expected)


@pytest.mark.skipif(not can_draw(), reason="matplotlib is not installed")
def test_a_picture_that_fails_halfway_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib.figure

    made = table(rows_of(tmp_path, ("SASRec",)))
    made["curve"] = curve_of(made, "alpha", METRICS, "ndcg@10")
    write_curves([made], tmp_path / "out")
    (file,) = (tmp_path / "out").iterdir()
    before = file.read_bytes()

    def fails(self: Any, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fails)
    with pytest.raises(KeyboardInterrupt):
        write_curves([made], tmp_path / "out")
    assert file.read_bytes() == before and list((tmp_path / "out").iterdir()) == [file]


def test_where_nothing_can_draw_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recbole_llm.leaderboard.curve.can_draw", lambda: False)
    made = table(rows_of(tmp_path, ("SASRec",)))
    made["curve"] = curve_of(made, "alpha", METRICS, "ndcg@10")
    write_curves([made], tmp_path / "out")
    (line,) = picture_lines([made], "alpha", tmp_path / "out")
    assert "matplotlib is not installed" in line and made["curve"]["picture"] is None


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("TCA4Rec (A, S, alpha {}, beta 2.0)", "TCA4Rec (A, S, alpha {}, beta 1.0)"),
         ["TCA4Rec (A, S, beta 2.0)", "TCA4Rec (A, S, beta 1.0)"]),
        (("K 10, {}", "K 20, {}"), ["K 10", "K 20"]),
        (("Llama-3.1, alpha {}", "Llama-3.2, alpha {}"), ["Llama-3.1", "Llama-3.2"]),
        (("TCA4Rec (alpha {})", "alpha={} of B"), ["TCA4Rec", "of B"]),
        (("A (alpha {}, beta 1)", "{} of 0.33"), ["A (beta 1)", "of 0.33"]),
        (("same", "same {}"), ["same", "same 0.1"]),
    ],
)  # fmt: skip
def test_a_line_is_called_what_its_rows_are_without_the_setting(names: tuple[str, ...], expected: list[str]) -> None:
    lines = [[{"row": name.format(value), "value": value} for value in (0.1, 0.3)] for name in names]
    assert _names(lines, "alpha") == expected
    whole = [[{"row": names[0].format(form), "value": value} for form, value in (("0", 0.0), ("1", 1.0))]]
    assert _names(whole, "alpha") == expected[:1]


def test_compare_draws_runs_over_a_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(run) for row in rows_of(tmp_path, ("SASRec",)) for run in row.files]
    out = tmp_path / "out"
    assert main(["compare", *runs, "--curve=alpha", f"--output={out}"]) == 0
    said = capsys.readouterr().out
    assert "consistency@10" in said and "picture     " in said
    (made,) = json.loads((out / "leaderboard.json").read_text(encoding="utf-8"))["tables"]
    (line,) = made["curve"]["lines"]
    assert line["name"] == "TCA4Rec (AlignTokenRec, SASRec)" and len(line["points"]) == 4
    told = (out / "leaderboard.md").read_text(encoding="utf-8")
    assert "over alpha; *: best ndcg@10 on valid" in told and "| TCA4Rec (AlignTokenRec, SASRec) | 0.3* |" in told
    if can_draw():
        assert f"]({made['curve']['picture']})" in told and (out / made["curve"]["picture"]).is_file()
    for words, wrong in (
        (["--curve=alpha"], "--output=DIR"),
        (["--curve=beta", f"--output={out}"], "no two rows differ"),
        ([f"--output={runs[0]}/result.json"], "--output: "),
    ):
        assert main(["compare", *runs, *words]) == 2
        assert wrong in capsys.readouterr().err


def test_a_suite_draws_its_curve(tmp_path: Path) -> None:
    rows = {f"EASE, {weight:g}": {"model": "EASE", "reg_weight": weight} for weight in (1.0, 50.0, 250.0)}
    study = {
        "datasets": ["tiny"], "seeds": [1], "rows": rows, "settings": {"gpu_id": "", "topk": [5, 10]},
        "curve": {"setting": "reg_weight", "metrics": ["NDCG@10", "Recall@5"]},
    }  # fmt: skip
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    text, failed = leaderboard(
        [f"--suite={tmp_path / 's.yaml'}", f"--output={tmp_path / 'out'}", "--cores=1"], lambda line: None
    )
    (made,) = json.loads((tmp_path / "out" / "leaderboard.json").read_text(encoding="utf-8"))["tables"]
    assert not failed and made["curve"]["metrics"] == ["ndcg@10", "recall@5"]
    (line,) = made["curve"]["lines"]
    means = {row["settings"]["reg_weight"]: row["metrics"]["recall@5"]["mean"] for row in made["rows"]}
    assert {point["value"]: point["metrics"]["recall@5"]["mean"] for point in line["points"]} == means
    if can_draw():
        assert str(tmp_path / "out" / made["curve"]["picture"]) in text


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        (3, "curve should read"),
        ({"setting": "alpha", "metrics": ["NDCG@10"], "of": 1}, "unknown key 'curve.of'"),
        ({"metrics": ["NDCG@10"]}, "curve.setting should be the name of a setting"),
        ({"setting": "alpha"}, "curve.metrics should be a list"),
        ({"setting": "alpha", "metrics": []}, "curve.metrics should be a list"),
    ],
)
def test_a_curve_that_cannot_be_drawn_is_refused(curve: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        suite_of({"datasets": ["tiny"], "rows": {"EASE": {"model": "EASE"}}, "curve": curve}, "s.yaml")


@pytest.mark.parametrize(
    ("curve", "words"),
    [
        ({"setting": "reg_weigth", "metrics": ["NDCG@10"]}, "no row has 'reg_weigth'; did you mean 'reg_weight'"),
        ({"setting": "reg_weight", "metrics": ["NGCD@10"]}, "no row measures 'NGCD@10'; did you mean 'ndcg@10'"),
        ({"setting": "reg_weight", "metrics": ["consistency@20"]}, "no row measures 'consistency@20'"),
        ({"setting": "reg_weight", "metrics": ["consistency@10"]}, "no row measures 'consistency@10'"),
        ({"setting": "seed", "metrics": ["NDCG@10"]}, "no two rows have different numbers for seed"),
        ({"setting": "model", "metrics": ["NDCG@10"]}, "no two rows have different numbers for model"),
    ],
)
def test_a_curve_of_what_no_row_has_is_refused_before_any_work(
    curve: dict[str, Any], words: str, tmp_path: Path
) -> None:
    rows = {f"EASE, {weight:g}": {"model": "EASE", "reg_weight": weight} for weight in (1.0, 50.0)}
    study = {"datasets": ["tiny"], "rows": rows, "settings": {"gpu_id": "", "topk": [5, 10]}, "curve": curve}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        leaderboard([f"--suite={tmp_path / 's.yaml'}", f"--output={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()
