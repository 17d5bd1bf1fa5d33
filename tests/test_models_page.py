"""docs/models.md lists what is registered."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from conftest import ROOT

from recbole_llm import limits, registry


def test_the_page_lists_every_registered_model() -> None:
    spec = importlib.util.spec_from_file_location("make_models", ROOT / "docs" / "make_models.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    text = Path(made.PAGE).read_text(encoding="utf-8")
    assert made.page(text) == text, (
        "the registry has changed: run `python docs/make_models.py` and look at docs/models.md"
    )
    lines = text.partition(made.BEGIN)[2].splitlines()
    for name, entry in registry.entries().items():
        (line,) = (line for line in lines if line.startswith(f"| {name} | {entry.kind} |"))
        assert ("does not run here" in line) == (name in limits.REFUSED)
