"""Write the table of docs/models.md anew, from the registry: ``python docs/make_models.py``."""

from __future__ import annotations

from pathlib import Path

from recbole.utils import ModelType

from recbole_llm import registry
from recbole_llm.limits import AT_SOME_SETTINGS, NEEDS, PACKAGES, REFUSED

PAGE = Path(__file__).parent / "models.md"
BEGIN = "<!-- written by docs/make_models.py -->"
ORDER = ("language", "general", "sequential", "context", "knowledge", "exlib")


def table() -> str:
    """A line a model, in Markdown; those of other packages are not ours to list."""
    lines = ["| model | kind | from | needs beyond interactions | at test reads | notes |", "|---|---|---|---|---|---|"]
    known = [entry for entry in registry.entries().values() if entry.kind in ORDER]
    for entry in sorted(known, key=lambda entry: (ORDER.index(entry.kind), entry.name.lower())):
        home = "here, RecBole's numbers" if entry.fast_of else "here"
        home = home if entry.module.startswith("recbole_llm") else "RecBole"
        needs = entry.needs or NEEDS.get(entry.name) or NEEDS.get(entry.kind, ())
        cells = [entry.name, entry.kind, home, ", ".join(needs), reads(entry), notes(entry)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def reads(entry: registry.Entry) -> str:
    """What of a user's rows a model has before it when it ranks for the test; empty where it does not run."""
    if entry.name in REFUSED:
        return ""
    sequential = registry.get_model(entry.name).type == ModelType.SEQUENTIAL
    return "train and valid rows" if sequential else "train rows"


def notes(entry: registry.Entry) -> str:
    """Why it does not run, or what it asks for."""
    if entry.name in REFUSED:
        why, instead = REFUSED[entry.name]
        return f"**does not run here**: {why}; {instead}"
    if entry.name in PACKAGES:
        return f"needs the package `{PACKAGES[entry.name]}`, which nothing here installs"
    said = [AT_SOME_SETTINGS[entry.name]] if entry.name in AT_SOME_SETTINGS else []
    said += [f"settings on those of {entry.base}"] if entry.base else []
    said += [f"stages: {', '.join(entry.stages)}"] if len(entry.stages) > 1 else []
    return "; ".join(said)


def page(text: str) -> str:
    """The page with its table made anew; the words above it stay."""
    head, mark, _ = text.partition(BEGIN)
    return f"{head}{mark}\n\n{table()}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
