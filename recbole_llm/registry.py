"""Names to model classes: ours, RecBole's, and those that other packages register.

Nothing is imported before a model is asked for, so listing names costs no torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.errors import UserError, did_you_mean

ENTRY_POINT = "recbole_llm.models"


@dataclass(frozen=True)
class Entry:
    """One registered model.

    Attributes:
        name: as the user types it.
        module: where the class is.
        kind: general, sequential, language, context or knowledge.
        stages: what it trains, in order.
        needs: what the data must have beyond interactions.
        base: the model whose settings lie below its own, for a named variant.
        fast_of: ``True`` where the class computes RecBole's own model faster, with the same numbers (Pop: with the
            right ones).
    """

    name: str
    module: str
    kind: str
    stages: tuple[str, ...] = ("train",)
    needs: tuple[str, ...] = ()
    base: str = ""
    fast_of: bool = False


_OF_TITLES = ("backbone", "item_tokens", "fine_tuning")
_PROFILED = ("backbone", "item_profiles", "user_profiles", "item_texts", "user_texts", "train")
_OURS = (
    Entry(
        "GLTA", "recbole_llm.model.glta", "language",
        ("graph_model", "backbone", "item_text_alignment", "user_item_alignment"), ("item text",),
    ),
    Entry(
        "AlignTokenRec", "recbole_llm.model.aligntokenrec", "language",
        ("embedding_model", "backbone", "item_texts", "item_tokens", "fine_tuning"), ("time", "item text"),
    ),
    Entry(
        "LCRec", "recbole_llm.model.lcrec", "language", ("backbone", "item_texts", "item_tokens", "fine_tuning"),
        ("time", "item text"), base="AlignTokenRec",
    ),
    Entry(
        "LETTER", "recbole_llm.model.letter", "language",
        ("embedding_model", "backbone", "item_texts", "item_tokens", "fine_tuning"), ("time", "item text"),
        base="AlignTokenRec",
    ),
    Entry(
        "P5", "recbole_llm.model.p5", "language", ("backbone", "item_tokens", "fine_tuning"), ("time", "item text"),
        base="AlignTokenRec",
    ),
    Entry(
        "TIGER", "recbole_llm.model.tiger", "language",
        ("text_backbone", "item_texts", "backbone", "item_tokens", "fine_tuning"),
        ("time", "item text"), base="AlignTokenRec",
    ),
    Entry("TALLRec", "recbole_llm.model.tallrec", "language", _OF_TITLES, ("time", "item text")),
    Entry("BIGRec", "recbole_llm.model.bigrec", "language", _OF_TITLES, ("time", "item text"), base="TALLRec"),
    Entry("MSL", "recbole_llm.model.msl", "language", _OF_TITLES, ("time", "item text"), base="TALLRec"),
    Entry(
        "LLaRA", "recbole_llm.model.llara", "language", ("backbone", "item_tokens", "embedding_model", "fine_tuning"),
        ("time", "item text"), base="TALLRec",
    ),
    Entry(
        "CoLLM", "recbole_llm.model.collm", "language",
        ("backbone", "item_tokens", "embedding_model", "text_tuning", "fine_tuning"), ("time", "item text"),
        base="TALLRec",
    ),
    Entry(
        "TCA4Rec", "recbole_llm.model.tca4rec", "language",
        ("embedding_model", "backbone", "item_texts", "item_tokens", "cf_model", "fine_tuning"), ("time", "item text"),
    ),
    Entry("BERT4RecWindows", "recbole_llm.model.bert4rec_windows", "sequential", needs=("time",), base="BERT4Rec"),
    Entry("DCCF", "recbole_llm.model.dccf", "general"),
    Entry("FMLP", "recbole_llm.model.fmlp", "sequential", needs=("time",)),
    Entry("FMLPAllPositions", "recbole_llm.model.fmlp_all_positions", "sequential", needs=("time",), base="FMLP"),
    Entry("HCCF", "recbole_llm.model.hccf", "general"),
    Entry(
        "LightGCNPlus", "recbole_llm.model.text_contrast", "general", ("backbone", "item_texts", "train"),
        ("item text",), base="LightGCN",
    ),
    Entry(
        "HCCFPlus", "recbole_llm.model.text_contrast", "general", ("backbone", "item_texts", "train"),
        ("item text",), base="HCCF",
    ),
    Entry("RLMRecCon", "recbole_llm.model.rlmrec", "general", _PROFILED, ("item text",), base="LightGCN"),
    Entry("RLMRecGen", "recbole_llm.model.rlmrec", "general", _PROFILED, ("item text",), base="LightGCN"),
    Entry(
        "SASRecCodes", "recbole_llm.model.sasrec_codes", "sequential",
        ("embedding_model", "backbone", "item_tokens", "train"), ("time", "item text"), base="SASRec",
    ),
    Entry("SASRecAllPositions", "recbole_llm.model.sasrec_all_positions", "sequential", needs=("time",), base="SASRec"),
)  # fmt: skip
_FAST = (
    Entry("Pop", "recbole_llm.model.pop", "general", fast_of=True),
    Entry("LightGCN", "recbole_llm.model.lightgcn", "general", fast_of=True),
    Entry("NGCF", "recbole_llm.model.ngcf", "general", fast_of=True),
    Entry("SGL", "recbole_llm.model.sgl", "general", fast_of=True),
    Entry("SASRec", "recbole_llm.model.sasrec", "sequential", fast_of=True),
    Entry("BERT4Rec", "recbole_llm.model.bert4rec", "sequential", fast_of=True),
)
_RECBOLE_KINDS = {
    "general_recommender": "general",
    "sequential_recommender": "sequential",
    "context_aware_recommender": "context",
    "knowledge_aware_recommender": "knowledge",
    "exlib_recommender": "exlib",
}


def recbole_folder() -> Path:
    """Where RecBole is installed, found without importing it."""
    spec = importlib.util.find_spec("recbole")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("recbole is not installed; pip install recbole==1.2.1")
    return Path(next(iter(spec.submodule_search_locations)))


def _recbole_entries() -> dict[str, Entry]:
    """RecBole's models, by its folders: a model's YAML gives the spelling of its name, its module the kind."""
    folder = recbole_folder()
    names = {path.stem.lower(): path.stem for path in (folder / "properties" / "model").glob("*.yaml")}
    entries = {}
    for package, kind in _RECBOLE_KINDS.items():
        for path in sorted((folder / "model" / package).glob("*.py")):
            name = names.get(path.stem)
            if name:
                entries[name] = Entry(name, f"recbole.model.{package}.{path.stem}", kind)
    return entries


@functools.cache
def _points() -> tuple[importlib.metadata.EntryPoint, ...]:
    """What other packages register, read once: that opens a file of every installed package."""
    return tuple(importlib.metadata.entry_points(group=ENTRY_POINT))


def entries() -> dict[str, Entry]:
    """Every registered model by name: ours, other packages' (entry points ``recbole_llm.models``), RecBole's."""
    found = _recbole_entries()
    for entry in (*_FAST, *_OURS):
        found[entry.name] = entry
    for point in _points():
        if point.name not in found:
            found[point.name] = Entry(point.name, point.value.partition(":")[0], "external")
    return found


def get_model(name: str, fast: bool = True) -> Any:
    """The class registered under a name; takes the argument of RecBole's ``get_model``.

    Args:
        name: e.g. ``GLTA`` or ``LightGCN``.
        fast: of RecBole's own models, our class with the same numbers where there is one.

    Raises:
        UserError: nothing has that name (with the nearest), or an optional package that the model needs is missing.
    """
    from recbole_llm import compat

    compat.install()
    known = entries()
    entry = known.get(name) if isinstance(name, str) else None
    if entry is None:
        raise UserError(f"unknown model '{name}'{did_you_mean(str(name), known) or '; recbole-llm models lists them'}")
    if entry.fast_of and not fast:
        entry = _recbole_entries()[name]
    with compat.anomaly_mode_kept():
        try:
            return getattr(importlib.import_module(entry.module), name)
        except ModuleNotFoundError as error:
            if error.name and error.name.startswith("recbole_llm"):
                raise
            raise UserError(f"{name} needs the package '{error.name}', which is not installed") from None


def class_of(name: str, settings: Mapping[str, Any]) -> Any:
    """The class that a run's model is of: :func:`get_model`'s, around another where it wraps one.

    Args:
        name: as for :func:`get_model`.
        settings: of the run; ``base_model`` of a wrapper, if not its own default.

    Raises:
        UserError: see :func:`get_model`, or the base is none that can be wrapped.
    """
    found = get_model(name)
    wrap = getattr(found, "over", None)
    return found if wrap is None else wrap(settings.get("base_model", found.wraps))


def generative() -> list[str]:
    """Names of our models that generate items, wrappers not among them."""
    languages = [name for name, entry in entries().items() if entry.kind == "language"]
    classes = {name: get_model(name) for name in languages}
    return [name for name, one in classes.items() if hasattr(one, "label_loss") and not hasattr(one, "over")]


def is_recboles(name: str) -> bool:
    """Whether a name is one of RecBole's own models (also where our faster class computes it)."""
    entry = entries().get(name)
    return entry is not None and (entry.fast_of or entry.module.startswith("recbole."))


def parts_of(model_class: type) -> tuple[str, ...]:
    """Config keys of a model that name another recommender, trained before it."""
    return tuple(getattr(model_class, "parts", ()))


def yaml_base(name: str) -> str:
    """The model whose settings a named variant starts from; the name itself for the rest."""
    entry = {entry.name: entry for entry in _OURS}.get(name)
    return entry.base or name if entry else name


def variant_of(name: str, settings: Mapping[str, Any]) -> str:
    """The registered name of a setting that makes another model out of one, so that its rows carry that name."""
    if name in ("SASRec", "FMLP") and settings.get("train_positions") == "all":
        return f"{name}AllPositions"
    return name
