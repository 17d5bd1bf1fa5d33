"""The guides' commands: each is known here, and the quick ones run."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
GUIDES = (
    "README.md", "CONTRIBUTING.md", "docs/install.md", "docs/item-tokens.md", "docs/generative.md",
    "docs/titles.md", "docs/rlmrec.md", "docs/serving.md", "dataset/README.md",
)  # fmt: skip
BIN = Path(sys.executable).parent

# What happens here to a command of a guide; one that none of these matches whole, or more than one, fails the test.
KINDS = {
    # Runs as it stands, in an empty folder.
    "quick": (
        r"\S+/bin/recbole-llm models",
        r"\S+/bin/recbole-llm run --model=LightGCN --dataset=tiny --epochs=\d",
        r"\S+/bin/recbole-llm run --model=BPR --dataset=ml-100k --epochs=1",
        r"\S+/bin/recbole-llm leaderboard --models=\S+ --dataset=tiny --epochs=\d",
    ),
    # The same with the slow tests; the quick ones only check the settings.
    "slow": (
        r"\S+/bin/recbole-llm run"
        r" --model=(GLTA|SASRec(AllPositions|Codes)|AlignTokenRec|LCRec|P5|TIGER|LETTER|MSL|LLaRA|TCA4Rec"
        r"|RLMRec(Con|Gen)) .*",
        r"\.venv/bin/python run_recbole_llm\.py --model=GLTA .*",
    ),
    # Runs, and the file that it names is there.
    "prepare": (r"\S+/bin/recbole-llm prepare --model=SASRecCodes --dataset=tiny .*--index_file=\S+",),
    # The target has to exist. What runs these tests is itself one of them.
    "make": (r"make [a-z-]+",),
    # Would test these tests, or has run before them.
    "checks": (r"\.venv/bin/ruff check \.", r"\.venv/bin/mypy", r"\.venv/bin/python -m pytest -q .*"),
    # Makes an environment, from the network. The files and packages it names have to be there.
    "install": (
        r"python3\.1\d -m venv \S+",
        r"\S+/bin/pip (un)?install .*",
    ),
}


def blocks(language: str) -> list[tuple[str, str]]:
    """Every fenced block of a language, with the guide it stands in."""
    found = []
    for guide in GUIDES:
        text = (ROOT / guide).read_text(encoding="utf-8")
        found += [(guide, block) for block in re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)]
    return found


def commands() -> list[str]:
    """Every command of every guide, once."""
    found: dict[str, None] = {}
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                found[" ".join(line.split())] = None
    return list(found)


def kinds_of(command: str) -> list[str]:
    return [kind for kind, patterns in KINDS.items() if any(re.fullmatch(pattern, command) for pattern in patterns)]


def of_kind(*kinds: str) -> list[str]:
    return [command for command in commands() if kinds_of(command)[:1] and kinds_of(command)[0] in kinds]


def run_settings(command: str) -> list[str]:
    """The ``--key=value`` part of a run."""
    return [word for word in shlex.split(command) if word.startswith("--")]


def run_here(command: str, folder: Path, timeout: float) -> str:
    """Run a command of a guide with this environment's programs, in ``folder``."""
    words = shlex.split(command)
    words[0] = str(BIN / Path(words[0]).name)
    words = [str(ROOT / word) if word == "run_recbole_llm.py" else word for word in words]
    done = subprocess.run(
        words, cwd=folder, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def check_run(command: str, folder: Path, timeout: float) -> None:
    output = run_here(command, folder, timeout)
    if "--model=" in command:
        assert "ndcg@10" in output.lower()
        assert "result.json" in output and list(folder.glob("saved/**/result.json"))


def test_every_command_is_known() -> None:
    assert len(commands()) > 10, "the guides' commands were not found"
    assert {command: kinds_of(command) for command in commands() if len(kinds_of(command)) != 1} == {}


def test_the_two_commands_come_first() -> None:
    assert commands()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("command", of_kind("quick"))
def test_quick_command(command: str, tmp_path: Path) -> None:
    check_run(command, tmp_path, timeout=300)


@pytest.mark.parametrize("command", of_kind("prepare"))
def test_prepare_command(command: str, tmp_path: Path) -> None:
    run_here(command, tmp_path, timeout=300)
    assert (tmp_path / command.rpartition("--index_file=")[2]).is_file()


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_of_a_guide(number: int, tmp_path: Path) -> None:
    guide, block = blocks("python")[number]
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{guide}\n{done.stderr}"
    # What a line prints stands in its comment.
    said = re.findall(r"print.*# what may follow: (.*)", block)
    assert said == ([done.stdout.strip()] if said else [])


@pytest.mark.slow
@pytest.mark.parametrize("command", of_kind("slow"))
def test_slow_command(command: str, tmp_path: Path) -> None:
    check_run(command, tmp_path, timeout=3600)


@pytest.mark.parametrize("command", [command for command in of_kind("quick", "slow") if "--model=" in command])
def test_settings_of_a_run(command: str) -> None:
    from recbole_llm.config import Config

    settings = run_settings(command)
    config = Config(command_line=settings)
    model = next(word.partition("=")[2] for word in settings if word.startswith("--model="))
    assert config["model"] == model


@pytest.mark.parametrize("command", of_kind("make"))
def test_make_target(command: str) -> None:
    done = subprocess.run([*shlex.split(command), "-n"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", of_kind("install"))
def test_install_line(command: str) -> None:
    words = shlex.split(command)
    setup = (ROOT / "setup.cfg").read_text()
    pins = (ROOT / "constraints.txt").read_text()
    if "-c" in words:
        assert (ROOT / words[words.index("-c") + 1]).is_file()
    for word in words:
        extra = re.fullmatch(r"\.\[(\w+)\]", word)
        assert extra is None or f"\n{extra[1]} =\n" in setup
        assert "==" not in word or f"{word}\n" in pins, f"{word} is not what constraints.txt says"


def test_settings_file_of_the_readme(tmp_path: Path) -> None:
    from recbole_llm.config import Config

    found = [block for guide, block in blocks("yaml") if guide == "README.md"]
    assert len(found) == 1
    file = tmp_path / "mine.yaml"
    file.write_text(found[0])
    config = Config("GLTA", "tiny", config_file_list=[str(file)], command_line=[])
    for key, value in yaml.safe_load(found[0]).items():
        assert config[key] == value


def test_links_inside_the_repository_lead_somewhere() -> None:
    pages = [path.relative_to(ROOT) for path in sorted((ROOT / "docs").rglob("*.md"))]
    for guide in (*GUIDES, *pages):
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / guide).read_text(encoding="utf-8")):
            if not re.match(r"https?:", link):
                assert ((ROOT / guide).parent / link).exists(), f"{guide} links to {link}"
