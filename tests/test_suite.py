"""Suites: their files, their cells, and the marks that results are found by."""

from __future__ import annotations

import shutil
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SHARED
from recbole.utils import url

from recbole_llm.compat import download
from recbole_llm.errors import UserError
from recbole_llm.leaderboard.marks import code_of_package
from recbole_llm.leaderboard.paper import beside_paper
from recbole_llm.leaderboard.suite import Cell, cells_of, marked, read_suite, suite_of
from recbole_llm.schema import properties_dir

SHIPPED = sorted((properties_dir() / "suite").glob("*.yaml"))
STUDY: dict[str, Any] = {
    "datasets": ["tiny"],
    "seeds": [1, 2],
    "reference": "BPR",
    "settings": {"epochs": 2, "eval_step": 0, "gpu_id": "", "topk": [5, 10]},
    "columns": {"whole": {}, "half": {"train_share": 0.5}},
    "rows": {"EASE": {"model": "EASE"}, "BPR": {"model": "BPR", "embedding_size": 8, "run_memory": 1.5}},
}


OF_T = {"source": "x", "beside": {"tiny": "T"}}
OF_B = OF_T | {"rows": {"BPR": "B"}}


def write(path: Path, **changes: Any) -> str:
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False), encoding="utf-8")
    return str(path)


def cells(path: Path, *command_line: str, of_row: dict[str, list[str]] | None = None, **changes: Any) -> list[Cell]:
    return marked(read_suite(write(path / "study.yaml", **changes)), path, list(command_line), of_row or {})


def test_a_suite_is_rows_by_columns_by_seeds_a_seed_at_a_time(tmp_path: Path) -> None:
    made = cells(tmp_path)
    assert [(cell.seed, cell.column, cell.row) for cell in made] == [
        (seed, column, row) for seed in (1, 2) for column in ("whole", "half") for row in ("EASE", "BPR")
    ]
    assert len({cell.mark for cell in made}) == len({cell.file for cell in made}) == 8
    assert all("run_memory" not in cell.settings for cell in made)
    assert str(made[0]) == "tiny, whole, EASE, seed 1"


def test_names_may_be_numbers_and_stand_twice(tmp_path: Path) -> None:
    rows = {1: {"model": "BPR"}, 2: {"model": "EASE"}}
    suite = read_suite(write(tmp_path / "s.yaml", rows=rows, reference=1, baselines=[2], datasets=["tiny", "tiny"]))
    assert (suite.reference, suite.baselines, suite.datasets) == ("1", ("2",), ("tiny",))


def test_a_long_name_makes_a_file_that_can_be_written(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, rows={"ü" * 300: {"model": "BPR"}}, reference=None, columns={}, seeds=[1])
    (tmp_path / cell.file).with_suffix(".rankings.npz.part").touch()


def test_an_edited_suite_is_read_anew(tmp_path: Path) -> None:
    assert read_suite(write(tmp_path / "s.yaml", seeds=[1])).seeds == (1,)
    assert read_suite(write(tmp_path / "s.yaml", seeds=[2])).seeds == (2,)


def test_a_later_setting_wins(tmp_path: Path) -> None:
    changes = {
        "columns": {"c": {"epochs": 3}},
        "rows": {"BPR": {"model": "BPR", "epochs": 4}, "EASE": {"model": "EASE"}},
    }
    bpr, ease = cells(tmp_path, seeds=[1], **changes)
    assert (bpr.settings["epochs"], ease.settings["epochs"]) == (4, 3)


def test_marks_tell_what_moves_a_result_from_what_does_not(tmp_path: Path) -> None:
    def mark(*command_line: str, of_row: dict[str, list[str]] | None = None, **changes: Any) -> str:
        made = cells(tmp_path, *command_line, of_row=of_row, seeds=[1], columns={}, **changes)
        return next(cell.mark for cell in made if cell.row == "BPR")

    plain = mark()
    assert mark() == plain == mark("--show_progress=true") == mark(of_row={"EASE": ["--reg_weight=3.0"]})
    moved = [
        mark("--epochs=3"),
        mark("--topk=[10]"),
        mark("--train_share=0.5"),
        mark("--epochs=4", of_row={"BPR": ["--epochs=3"]}),
    ]
    assert plain not in moved and moved[0] == moved[3] and len(set(moved)) == 3


def test_marks_follow_the_data(tmp_path: Path) -> None:
    source = Path(__file__).parent.parent / "dataset" / "tiny"
    copy = tmp_path / "data" / "copied"
    copy.mkdir(parents=True)
    for file in source.glob("tiny.*"):
        (copy / file.name.replace("tiny", "copied")).write_bytes(file.read_bytes())
    study = {"datasets": ["copied"], "columns": {}, "rows": {"BPR": {"model": "BPR"}}, "seeds": [1]}
    settings = STUDY["settings"] | {"data_path": str(copy.parent)}
    (before,) = cells(tmp_path, settings=settings, **study)
    lines = (copy / "copied.inter").read_text(encoding="utf-8").splitlines()
    (copy / "copied.inter").write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    (after,) = cells(tmp_path, settings=settings, **study)
    assert before.mark != after.mark


def test_marks_follow_what_ships_for_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "properties"
    shutil.copytree(properties_dir(), shipped)
    study = {"rows": {"GLTA": {"model": "GLTA"}, "BPR": {"model": "BPR"}}, "columns": {}, "seeds": [1]}

    def marks() -> list[str]:
        return [cell.mark for cell in cells(tmp_path, settings={"tuned": True}, **study)]

    with monkeypatch.context() as patched:
        patched.setattr("recbole_llm.config.properties_dir", lambda: shipped)
        glta, bpr = marks()
        (shipped / "tuned" / "tiny").mkdir(parents=True)
        (shipped / "tuned" / "tiny" / "LightGCN.yaml").write_text("n_layers: 1\n", encoding="utf-8")
        after = marks()
    assert after[0] != glta and after[1] == bpr


def test_marks_follow_the_files_of_a_language_model(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    study = {"rows": {"GLTA": {"model": "GLTA", "llm": str(llm)}}, "columns": {}, "seeds": [1], "settings": {}}
    (llm / "weights").write_text("a", encoding="utf-8")
    (before,) = cells(tmp_path, **study | {"reference": None})
    (llm / "weights").write_text("another", encoding="utf-8")
    (after,) = cells(tmp_path, **study | {"reference": None})
    assert before.mark != after.mark


def test_marks_follow_the_files_that_settings_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "properties"
    shutil.copytree(properties_dir() / "prompts", shipped / "prompts")
    monkeypatch.setattr("recbole_llm.data.templates.properties_dir", lambda: shipped)
    own, tokens, run = tmp_path / "own.yaml", tmp_path / "tiny.index.json", tmp_path / "run"
    profile, reader = tmp_path / "profile.yaml", tmp_path / "reader"
    run.mkdir()
    reader.mkdir()
    files = {
        "shipped": shipped / "prompts/lcrec.yaml", "own": own, "index": tokens, "folder": run / "items",
        "profile": profile, "reader": reader / "model.safetensors",
    }  # fmt: skip
    for file in files.values():
        file.touch()
    rows = {
        "shipped": {"model": "LCRec"}, "own": {"model": "LCRec", "prompts": str(own)},
        "index": {"model": "LCRec", "code_tokens": str(tokens), "prompts": str(own)},
        "folder": {"model": "LCRec", "code_tokens": str(run), "prompts": str(own)}, "BPR": {"model": "BPR"},
        "profile": {"model": "RLMRecCon", "profile_prompts": str(profile)},
        "reader": {"model": "TIGER", "text_llm": str(reader)},
    }  # fmt: skip

    def marks() -> dict[str, str]:
        return {cell.row: cell.mark for cell in cells(tmp_path, rows=rows, columns={}, seeds=[1], settings={})}

    before = marks()
    moves = {name: {name} for name in files} | {"own": {"own", "index", "folder"}}
    for changed, moved in moves.items():
        with open(files[changed], "a", encoding="utf-8") as file:
            file.write("# another\n")
        after = marks()
        assert {row for row in rows if after[row] != before[row]} == moved
        before = after


def test_data_that_are_missing_are_fetched_once_and_before_marks_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t1\t1\n")
    monkeypatch.setattr("recbole_llm.compat._urls", lambda: {"ml-1m": (tmp_path / "ml-1m.zip").as_uri()})
    fetched, fetch = [], url.download_url
    monkeypatch.setattr(url, "download_url", lambda *given: fetched.append(given) or fetch(*given))

    def marks(fetch: bool = True, **row: Any) -> list[str]:
        rows = {"EASE": {"model": "EASE"}, "BPR": {"model": "BPR", **row}}
        suite = suite_of({"datasets": ["ml-1m"], "rows": rows, "settings": {"data_path": str(tmp_path / "data")}}, "s")
        return [cell.mark for cell in marked(suite, tmp_path, [], {}, fetch=fetch)]

    nothing = marks(fetch=False)
    with pytest.raises(UserError, match="unknown setting 'epoch'"):
        marks(epoch=3)
    assert not fetched and not (tmp_path / "data").exists()
    first = marks()
    assert first == marks() != nothing and len(fetched) == 1
    assert [file.name for file in (tmp_path / "data" / "ml-1m").iterdir()] == ["ml-1m.inter"]
    # Runs side by side wait for whoever came first.
    shutil.rmtree(tmp_path / "data" / "ml-1m")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: download("ml-1m", tmp_path / "data" / "ml-1m"), range(4)))
    assert len(fetched) == 2 and first == marks()
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["ml-1m"]
    with pytest.raises(UserError, match="RecBole knows none of that name"):
        download("ml-2m", tmp_path / "data" / "ml-2m")
    (tmp_path / "ml-1m.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="could not be downloaded"):
        download("ml-1m", tmp_path / "other" / "ml-1m")
    assert not (tmp_path / "other").exists()


def test_marks_follow_the_code_that_figures_depend_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "recbole_llm"
    for name in ("leaderboard/marks.py", "sources/amazon.py", "inspection.py", "evaluation/consistency.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("1\n", encoding="utf-8")
    monkeypatch.setattr("recbole_llm.leaderboard.marks.__file__", str(package / "leaderboard/marks.py"))
    before = code_of_package()
    for name in ("leaderboard/marks.py", "sources/amazon.py", "inspection.py"):
        (package / name).write_text("2\n", encoding="utf-8")
    assert code_of_package() == before
    (package / "evaluation/consistency.py").write_text("2\n", encoding="utf-8")
    assert code_of_package() != before


def test_a_cell_names_the_models_that_it_trains_first(tmp_path: Path) -> None:
    rows = {
        "GLTA": {"model": "GLTA"},
        "GLTA on NGCF": {"model": "GLTA", "graph_model": "NGCF"},
        "BPR": {"model": "BPR"},
    }
    made = cells(tmp_path, rows=rows, columns={}, seeds=[1])
    assert [cell.parts for cell in made] == [("LightGCN",), ("NGCF",), ()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {"BPR": {"model": "BPR", "embeding_size": 8}}}, "BPR, seed 1: unknown setting 'embeding_size'"),
        ({"rows": {"BPR": {"embedding_size": 8}}}, "names no model"),
        ({"rows": {"BPR": {"model": "BPR", "run_memory": 0}}}, "rows.BPR.run_memory should be a number above 0"),
        ({"reference": "BRP"}, "reference 'BRP' is no row; did you mean 'BPR'"),
        ({"baselines": ["EASE", "BRP"]}, "baselines 'BRP' is no row; did you mean 'BPR'"),
        ({"colums": {}}, "unknown key 'colums'; did you mean 'columns'"),
        ({"metric": "NDCG@7"}, "metric NDCG@7 is not among"),
        ({"seeds": "1"}, "seeds should be a list"),
        ({"columns": [1]}, "columns should read"),
        ({"datasets": []}, "a suite needs datasets"),
        ({"datasets": [{"a": 1}]}, "datasets should be a name or a list of names"),
        ({"datasets": ["tinny"]}, "no data set .*tinny; did you mean 'tiny'"),
        ({"reference": ["BPR", "EASE"]}, "reference should be one row"),
        ({"baselines": 3}, "baselines '3' is no row"),
        ({"baselines": [["BPR"]]}, "baselines should be a name or a list of names"),
        ({"rows": {"BPR": {"model": 3}}}, "rows.BPR.model should be a name"),
        ({"rows": {"BPR": {"model": "BPR", "seed": 7}}}, "rows.BPR: seed cannot be set here; a suite has seeds"),
        ({"columns": {"a": {"dataset": "x"}}}, "columns.a: dataset cannot be set here; a suite has datasets"),
        ({"settings": {"result_file": "x.json"}}, "settings: result_file cannot be set here"),
        ({"settings": {"model": "BPR"}}, "settings cannot name a model"),
        ({"settings": {"policy": "recbole"}, "columns": {}}, "EASE, seed 1: under policy: recbole"),
        ({"settings": {"eval_args": {"split": {"LS": "valid_only"}}}, "columns": {}}, "a split without test rows"),
        ({"run_memory": float("nan")}, "run_memory should be a number above 0"),
        (
            {"metric": "GiniIndex@10", "settings": {"metrics": ["NDCG", "GiniIndex"]}},
            "GiniIndex@10 is better the smaller it is",
        ),
        ({"rows": {"a b": {"model": "BPR"}, "a_b": {"model": "BPR"}}, "reference": None}, "/a b' and 'whole/a_b'"),
        ({"paper": 3}, "paper should read"),
        ({"paper": OF_T | {"beside": ["tiny"], "rows": {"BPR": "B"}, "figures": {"T": {}}}}, "paper.beside should be"),
        ({"paper": OF_T | {"rows": {"BPR": "B"}, "figures": {"T": {}}, "gains": [3]}}, "pairs of rows, but has 3"),
        ({"paper": ["glta"]}, "names the suite 'glta', which has no paper's figures of a row here"),
        ({"paper": ["glto"]}, "glta"),
        ({"paper": ["all"]}, "names the suite 'all', which names others in its turn; name those"),
        ({"paper": OF_B | {"figures": {"T": None}}}, r"figures.T should read `row: \{metric"),
        ({"paper": OF_B | {"figures": {"T": {"B": 0.1}}}}, "T.B should read `metric: figure`"),
        ({"paper": OF_B | {"figures": {"T": {"B": {"ndcg@5": None}}}}}, "B.ndcg@5 should be a number"),
        ({"paper": OF_B | {"figures": {"T": {"B": {"ndcg@5": "0.1*"}}}}}, "a number, but is '0.1"),
        ({"paper": {"sorce": "x"}}, "unknown key 'paper.sorce'; did you mean 'source'"),
        ({"paper": OF_T | {"rows": {"BRP": "B"}, "figures": {"T": {}}}}, "names 'BRP', which is no row"),
        ({"paper": OF_T | {"rows": {"BPR": "B"}, "figures": {"U": {}}}}, "figures has no 'T'"),
    ],
)  # fmt: skip
def test_mistakes_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        cells(tmp_path, **changes)


def test_a_suite_that_is_not_there_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match="size-by-sparsity"):
        read_suite("size-by-sparsty")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_suites_have_settings_that_every_cell_takes(path: Path, tmp_path: Path) -> None:
    # Seeds differ in nothing else.
    suite = replace(read_suite(path.stem), seeds=read_suite(path.stem).seeds[:1])
    where = []
    for name in suite.datasets:
        if (SHARED / name).is_dir():
            where = [f"--data_path={SHARED}"]
        elif name.startswith("amazon"):
            pytest.skip(f"REAL DATA MISSING: no folder {SHARED / name}; the settings of {path.stem} are not checked")
    made = marked(suite, tmp_path, where, {})
    assert len({cell.mark for cell in made}) == len(made) == len(list(cells_of(suite)))
    assert path.read_text(encoding="utf-8").count(f"leaderboard --suite={path.stem} --output") == 1


PAPER = {
    "source": "A paper",
    "beside": {"tiny": "Large"},
    "rows": {"BPR": "MF", "EASE": "EASE", "not run": "X"},
    "gains": [["EASE", "BPR"]],
    "missing": {"Y": "not registered"},
    "figures": {"Large": {"MF": {"ndcg@10": 0.2}, "EASE": {"ndcg@10": 0.3, "mrr@10": 0.1}, "X": {"ndcg@10": 0.4}}},
}


def test_a_papers_figures_stand_beside_ours() -> None:
    rows = [{"name": name, "metrics": {"ndcg@10": {"mean": mean}}} for name, mean in (("EASE", 0.15), ("BPR", 0.1))]
    beside = beside_paper(PAPER, "tiny", {"rows": rows})
    assert beside is not None
    figures = {row["name"]: row["metrics"] for row in beside["rows"]}
    assert figures["BPR (paper: MF)"]["ndcg@10"] == {"paper": 0.2, "ours": 0.1, "deviation": pytest.approx(-0.5)}
    assert figures["EASE"]["mrr@10"] == {"paper": 0.1, "ours": None, "deviation": None}
    assert figures["not run (paper: X)"]["ndcg@10"]["ours"] is None
    (gain,) = beside["gains"]
    assert gain["paper"] == pytest.approx(0.5) and gain["ours"] == pytest.approx(0.5)
    assert beside["missing"] == [{"name": "Y", "why": "not registered"}]
    assert beside["orders"] == [], "two systems are always in one order or the other"
    assert beside_paper(PAPER, "another", {"rows": rows}) is None


def test_papers_of_other_suites_stand_beside_rows_of_the_same_names() -> None:
    rows = {"LightGCN": {"model": "LightGCN"}, "DCCF": {"model": "DCCF"}, "AlignTokenRec": {"model": "AlignTokenRec"}}
    suite = suite_of({"datasets": ["ml-100k"], "rows": rows, "paper": ["glta", "aligntokenrec"]}, "own.yaml")
    glta, aligned = suite.paper
    assert glta["rows"] == {"LightGCN": "LightGCN"} and glta["gains"] == []
    assert aligned["rows"] == {"DCCF": "DCCF", "AlignTokenRec": "Ours"}
    assert aligned["gains"] == [["AlignTokenRec", "DCCF"]]
    means = [{"name": name, "metrics": {"ndcg@10": {"mean": 0.1}}} for name in rows]
    beside = beside_paper(aligned, "ml-100k", {"rows": means})
    assert beside is not None
    assert {gain["metric"]: gain["ours"] for gain in beside["gains"]}["ndcg@10"] == pytest.approx(0)
