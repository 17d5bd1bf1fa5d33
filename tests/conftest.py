"""Shared fixtures: small real data, and a clean process."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import compat

compat.install()

import recbole  # noqa: E402
import tokenizers  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
ML100K = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"

settings.register_profile("here", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("here")
torch.set_num_threads(1)


def small_ml100k(folder: Path, users: int = 60, name: str = "small", items: int | None = None) -> Path:
    """Real interactions of a few users, under a name of their own so that RecBole's packaged copy is not taken.

    Args:
        folder: gets ``<name>/<name>.inter`` and ``.item``.
        users: users with an id up to this.
        name: of the data set.
        items: items with an id up to this only.
    """
    target = folder / name
    target.mkdir(parents=True)
    lines = (ML100K / "ml-100k.inter").read_text(encoding="utf-8").splitlines()
    kept = [
        line
        for line in lines[1:]
        if int(line.split("\t")[0]) <= users and (items is None or int(line.split("\t")[1]) <= items)
    ]
    (target / f"{name}.inter").write_text("\n".join([lines[0], *kept]) + "\n", encoding="utf-8")
    shutil.copy(ML100K / "ml-100k.item", target / f"{name}.item")
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``data_path`` with the data set ``small``: 60 users of ml-100k."""
    return small_ml100k(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def worlds(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same train rows; the test items exchanged in the second, the valid items in the third, both in the last."""
    from worlds import worlds_of

    return worlds_of(small_data, tmp_path_factory)


@pytest.fixture
def settings_of(small_data: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings of a quick run on ``small``; keyword arguments are added."""

    def make(**more: Any) -> dict[str, Any]:
        base = {
            "data_path": str(small_data), "output_dir": str(tmp_path / "saved"), "epochs": 2, "show_progress": False,
            "tensorboard": False, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "gpu_id": "",
        }  # fmt: skip
        return base | more

    return make


@pytest.fixture(autouse=True)
def anomaly_mode_stays_off() -> Iterator[None]:
    """Anomaly mode doubles every training step; nothing of ours may leave it on."""
    yield
    assert not torch.is_anomaly_enabled()


@pytest.fixture(scope="session", autouse=True)
def a_tokenizer_is_learned_once() -> Iterator[None]:
    """A process learns a corpus's tokenizer once.

    A tokenizer hangs on nothing but the arguments (test_backbone shows it), and learning it is a quarter of a small run
    of a language model.
    """
    # A module that nobody has imported by now is left alone: its libraries take seconds to import.
    names = [f"recbole_llm.backbone.{name}" for name in ("embedded", "embedded_t5")]
    with pytest.MonkeyPatch.context() as patch:
        for module in filter(None, map(sys.modules.get, names)):
            patch.setattr(module, "byte_tokenizer", _learning_once(module.byte_tokenizer))
        yield


def _learning_once(learn: Callable[..., Any]) -> Callable[..., Any]:
    learned: dict[str, str] = {}

    def once(corpus: Sequence[str], vocab_size: int, specials: Sequence[str]) -> Any:
        mark = hashlib.sha256(repr((list(corpus), vocab_size, list(specials))).encode()).hexdigest()
        if mark not in learned:
            learned[mark] = learn(corpus, vocab_size, specials).to_str()
        tokenizer = tokenizers.Tokenizer.from_str(learned[mark])
        tokenizer.encode_special_tokens = True  # The text does not hold it.
        return tokenizer

    return once


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of tiny random language models, by the names of ``tiny_folders.KINDS``; each is written once."""
    from tiny_folders import KINDS, write

    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = write(KINDS[kind], tmp_path_factory.mktemp(kind))
        return made[kind]

    return folder


@pytest.fixture(scope="module")
def llama() -> Any:
    """A tiny Llama with its head, and room for codes behind its vocabulary."""
    from searches import language_model

    return language_model("llama")
