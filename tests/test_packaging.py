"""What is shipped: the package's list, the settings inside the wheel, the pinned versions, the synthetic data set."""

from __future__ import annotations

import configparser
import csv
import importlib.metadata
import importlib.util
import itertools
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from recbole_llm.data.item_text import load_item_text, parse_template
from recbole_llm.schema import read_specs, read_yaml

ROOT = Path(__file__).parent.parent
DATASET_YAML = sorted((ROOT / "properties" / "dataset").glob("*.yaml"))
TINY = ROOT / "dataset" / "tiny"


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def requirements() -> list[Requirement]:
    setup = setup_cfg()
    # The extra gpu stands in for faiss-cpu on other machines; what is tested and pinned here is the rest.
    extras = [line for name, text in setup["options.extras_require"].items() for line in lines(text) if name != "gpu"]
    return [Requirement(line) for line in lines(setup["options"]["install_requires"]) + extras]


def constraints() -> dict[str, str]:
    pins = (line.split("==") for line in lines((ROOT / "constraints.txt").read_text()))
    return {canonicalize_name(name): version for name, version in pins}


def test_every_folder_with_code_is_in_the_package_list() -> None:
    listed = set(lines(setup_cfg()["options"]["packages"]))
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "recbole_llm").rglob("*.py")}
    assert listed == found | {"recbole_llm.properties"}
    for package in found:
        assert (ROOT / Path(*package.split(".")) / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_constraints_pin_every_requirement_at_a_version_it_allows() -> None:
    pins = constraints()
    for requirement in requirements():
        assert canonicalize_name(requirement.name) in pins, f"{requirement.name} is not in constraints.txt"
        assert Version(pins[canonicalize_name(requirement.name)]) in requirement.specifier
    assert pins["torch"] == "2.13.0" and pins["recbole"] == "1.2.1"
    assert not [version for version in pins.values() if "+" in version]


def test_recbole_is_required_only_where_its_ray_has_a_wheel() -> None:
    recbole = next(requirement for requirement in requirements() if requirement.name == "recbole")
    assert recbole.marker is not None
    assert recbole.marker.evaluate({"python_version": "3.11"})
    assert not recbole.marker.evaluate({"python_version": "3.12"})
    # What RecBole asks for and this code reaches must therefore stand on its own.
    unused = {"ray", "thop", "tabulate", "plotly", "hyperopt"}
    asked = {Requirement(line).name for line in importlib.metadata.requires("recbole") or ()}
    assert asked - unused <= {requirement.name for requirement in requirements()}


def test_the_extra_gpu_takes_faiss_gpu() -> None:
    assert lines(setup_cfg()["options.extras_require"]["gpu"]) == ["faiss-gpu"]


def test_installed_versions_are_allowed() -> None:
    for requirement in requirements():
        if requirement.marker is None or requirement.marker.evaluate():
            assert Version(importlib.metadata.version(requirement.name)) in requirement.specifier


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a copy, as a build leaves folders behind and a stale one would slip into the next."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "LICENSE", "README.md"):
        (copy / name).write_bytes((ROOT / name).read_bytes())
    for folder, pattern in (("recbole_llm", "*.py"), ("recbole_llm/leaderboard/page", "*"), ("properties", "*.yaml")):
        for path in (ROOT / folder).rglob(pattern):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "-w", str(out), str(copy)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.glob("recbole_llm-*.whl"))


def test_wheel_holds_code_and_settings_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    code = {str(path.relative_to(ROOT)) for path in (ROOT / "recbole_llm").rglob("*.py")}
    settings = {f"recbole_llm/{path.relative_to(ROOT)}" for path in (ROOT / "properties").rglob("*.yaml")}
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "recbole_llm" / "leaderboard" / "page").iterdir()}
    assert {Path(name).suffix for name in page} == {".html", ".css", ".js"}
    assert names == code | settings | page
    assert "recbole_llm/properties/dataset/tiny.yaml" in names


def test_wheel_finds_its_own_settings_and_has_the_command(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import recbole_llm, recbole_llm.schema as schema;"
        "print(recbole_llm.__version__, schema.properties_dir(), (schema.properties_dir() / 'overall.yaml').is_file())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    version, folder, found = done.stdout.split()
    assert Path(folder).resolve() == (tmp_path / "recbole_llm" / "properties").resolve() and found == "True"
    info = next(tmp_path.glob("*.dist-info"))
    assert f"recbole_llm-{version}.dist-info" == info.name
    assert "recbole-llm = recbole_llm.cli:main" in (info / "entry_points.txt").read_text()


def test_make_and_ci_run_what_the_readme_says() -> None:
    def plan(*arguments: str) -> str:
        command = ["make", "-n", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    fresh = plan("demo", "VENV=/nowhere/venv", "PYTHON=some-python")
    assert "some-python -m venv /nowhere/venv" in fresh
    assert '-c constraints.txt -e ".[test]"' in fresh
    assert "/nowhere/venv/bin/recbole-llm run --model=GLTA --dataset=ml-100k" in fresh
    test = plan("test")
    assert "ruff check ." in test and "mypy" in test and '-m "not slow"' in test
    assert "not slow" not in plan("test-full")
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text()


# --- the synthetic data set ------------------------------------------------------------------------------------------
def make_tiny(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_tiny", ROOT / "dataset" / "make_tiny.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make(folder)


def rows(path: Path) -> list[list[str]]:
    """The file's fields, header left out."""
    return [line.split("\t") for line in path.read_text(encoding="utf-8").split("\n")[1:-1]]


def test_tiny_is_what_its_script_makes(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    files = sorted(path.name for path in TINY.iterdir())
    assert files == ["tiny.inter", "tiny.item", "tiny.user"]
    for name in files:
        assert (tmp_path / name).read_bytes() == (TINY / name).read_bytes(), f"{name} is not what the script makes"


def test_tiny_has_what_its_guide_says() -> None:
    inter, items = rows(TINY / "tiny.inter"), rows(TINY / "tiny.item")
    pairs = [(user, item) for user, item, _, _ in inter]
    touched = {item for _, item in pairs}
    assert (len({user for user, _ in pairs}), len(touched), len(inter)) == (120, 80, 2215)
    assert len(set(pairs)) == len(pairs)
    assert min(Counter(user for user, _ in pairs).values()) >= 8
    listed = {item[0] for item in items}
    assert touched - listed == {"i71"} and listed - touched == {"i81"}
    assert [len(item) for item in items] == [4] * 80
    titles = {item[1] for item in items}
    assert {"NA", "null", "", '"Great Lanterns" Cats', "</s> The End", "The  Double   Space"} <= titles

    moments = [(user, int(time)) for user, _, _, time in inter]
    assert len(set(moments)) < len(moments), "no two rows of a user at one second"
    assert moments != sorted(moments), "the rows are in order"
    times = np.array(sorted({time for _, time in moments}))
    assert len(np.unique(times.astype(np.float32))) < len(times), "float32 tells all times apart"


def test_tiny_can_be_learned() -> None:
    """A plain first-order count on all but the last item of each user is far above chance (1/80) at the last one."""
    sequences: dict[str, list[tuple[int, str]]] = {}
    for user, item, _, time in rows(TINY / "tiny.inter"):
        sequences.setdefault(user, []).append((int(time), item))
    follows: Counter[tuple[str, str]] = Counter()
    ordered = [[item for _, item in sorted(sequence, key=lambda row: row[0])] for sequence in sequences.values()]
    for sequence in ordered:
        follows.update(itertools.pairwise(sequence[:-1]))
    hits = 0
    for sequence in ordered:
        counts = {item: count for (last, item), count in follows.items() if last == sequence[-2]}
        best = max((item for item in counts if item not in sequence[:-1]), key=counts.__getitem__, default=None)
        hits += best == sequence[-1]
    assert hits / len(ordered) > 0.2


# --- settings of data sets -------------------------------------------------------------------------------------------
def data_folder(name: str) -> Path:
    import recbole

    packaged = Path(recbole.__file__).parent / "dataset_example"
    for root in (ROOT / "dataset", ROOT.parent / "shared" / "data", packaged):
        if (root / name).is_dir():
            return root / name
    pytest.skip(f"REAL DATA MISSING: no folder ../shared/data/{name}; its settings are not checked against its files")


@pytest.mark.parametrize("path", DATASET_YAML, ids=lambda path: path.stem)
def test_dataset_settings_are_typed_and_commented(path: Path) -> None:
    values, specs = read_yaml(path), read_specs(path)
    assert values.keys() == specs.keys()
    for key, value in values.items():
        assert specs[key].allows(value), f"{key}: {value!r} is no {specs[key].text}"
        assert specs[key].help
    assert values["normalize_all"] is None
    assert "icence" in path.read_text().split("USER_ID_FIELD")[0]


def header(path: Path) -> list[str]:
    with path.open(encoding="utf-8", newline="") as file:
        return [field.rpartition(":")[0] for field in next(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))]


@pytest.mark.parametrize("path", DATASET_YAML, ids=lambda path: path.stem)
def test_dataset_settings_name_columns_that_are_there(path: Path) -> None:
    values, folder = read_yaml(path), data_folder(path.stem)
    assert set(values["load_col"]["inter"]) <= set(header(folder / f"{path.stem}.inter"))
    assert set(parse_template(values["item_text"]).columns) <= set(header(folder / f"{path.stem}.item"))


@pytest.mark.parametrize("path", DATASET_YAML, ids=lambda path: path.stem)
def test_time_scope_is_what_the_times_are(path: Path) -> None:
    """``user`` exactly where every user's times are 1, 2, 3, ..."""
    values, folder = read_yaml(path), data_folder(path.stem)
    frame = pd.read_csv(folder / f"{path.stem}.inter", sep="\t", quoting=csv.QUOTE_NONE)
    times = frame.sort_values(["user_id:token", "timestamp:float"])
    positions = (times.groupby("user_id:token").cumcount() + 1 == times["timestamp:float"]).all()
    assert values["time_scope"] == ("user" if positions else "global")


FIRST_TEXTS = {
    "amazon-beauty-tiger": "OPI Nail Lacquer, Simmer and Shimmer, 0.5-Fluid Ounce (OPI, Makeup, Nails, Nail Polish)",
    "amazon-games-lcrec": "Nintendo 3DS Compatible with 3DS / 3DS XL / 2DS AC Adapter",
    "amazon-scientific": "SUPCO SPP6 Relay/Capacitor Hard Start Kit with 500% Increase Starting Torque. "
    "Brand: Sealed Unit Parts Co., Inc.; categories: Industrial & Scientific,",
    "ml-100k": "Toy Story (1995), Animation Children's Comedy",
    "ml-1m": "Toy Story (1995), Animation Children's Comedy",
    "ml-latest-small-2016": "Toy Story (1995), Adventure Animation Children Comedy Fantasy",
    "steam-llara-reviews": "Ironbound",
    "tiny": "Copper Lantern 1 (Mystery): Part 1 of the Copper Lantern series, with a detective and a broken promise.",
}


@pytest.mark.parametrize("path", DATASET_YAML, ids=lambda path: path.stem)
def test_texts_of_a_data_set(path: Path) -> None:
    values, file = read_yaml(path), data_folder(path.stem) / f"{path.stem}.item"
    ids = ["[PAD]", *dict.fromkeys(row[0] for row in rows(file))]
    made = load_item_text(file, "item_id", values["item_text"], values["item_text_fallback"], ids)
    assert made.texts[1].startswith(FIRST_TEXTS[path.stem])
    assert len(made.texts) == len(ids) and all(text.strip() for text in made.texts[1:])
    assert made.missing == (1 if path.stem == "tiny" else 0)
