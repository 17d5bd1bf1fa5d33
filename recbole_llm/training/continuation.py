"""Fine-tuning that goes on from a run when interactions have come: the items keep their tokens, the weights go on.

Items that the run did not know get codes by its trained codebook, as :mod:`recbole_llm.training.new_items` gives them:
by the interactions of their users, or by their text. The vocabulary stays as it is, so every weight fits.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.phases import TEST, VALID
from recbole_llm.errors import UserError
from recbole_llm.itemid.item_tokens import ItemTokens, pool_of
from recbole_llm.itemid.new_items import from_neighbours, from_text
from recbole_llm.training.codebooks import CODEBOOK, Quantiser
from recbole_llm.training.embeddings import text_embeddings
from recbole_llm.training.identifiers import LEAKING
from recbole_llm.training.identifiers import PREFIX as ID_PREFIX
from recbole_llm.training.item_tokens import (
    INDEX,
    PREFIX,
    Sources,
    Tokenized,
    load_points,
    origin_of,
    write_origin,
    write_tokens,
)
from recbole_llm.training.language import load_model, read_as
from recbole_llm.training.new_items import codes_of_new, had_by_users
from recbole_llm.training.run_files import CARD, cache_of, read_result, stage_folder
from recbole_llm.training.state import WEIGHTS, load_state
from recbole_llm.training.store import StageStore, fingerprint_of
from recbole_llm.training.trained_rows import read_trained_rows, row_hashes

logger = logging.getLogger("recbole_llm")

# Raised when the code of the stage changes what it makes.
CONTINUED_VERSION = 1

# Beside those that begin so: what has to be as it was, or the weights and tokens are of something else.
_PREFIXES = (PREFIX, ID_PREFIX, "llm", "t5_", "lora_")
_SAME = (
    LEAKING, "adapter", "embedding_model", "embedding_layer", "text_llm", "text_embedding", "text_embedding_tokens",
)  # fmt: skip


@dataclass(frozen=True)
class Continued:
    """A run that another goes on from.

    Attributes:
        run: its folder, or its ``result.json``.
        result: the latter's content.
        cache: the folder that its stages are in.
        raw_ids: of the items that have tokens.
        codes: of the same items, int64 ``[n, N]``; ``None`` for raw ids.
        tokens: all that it has, as it numbered the items.
    """

    run: Path
    result: Mapping[str, Any]
    cache: Path
    raw_ids: list[str]
    codes: np.ndarray | None
    tokens: ItemTokens

    @classmethod
    def read(cls, config: Any, dataset: Any) -> Continued | None:
        """The run that ``continue_from`` names, held against this one; ``None`` where it names none.

        Args:
            config: of the run that goes on.
            dataset: its train data set.

        Raises:
            UserError: no such run, or its stages are gone; it is of another model, language model or recipe for item
                tokens; it may have been trained on what are valid or test rows here; new items cannot have tokens.
        """
        if config["continue_from"] is None:
            return None
        run = Path(config["continue_from"])
        try:
            result = read_result(run)
        except UserError as error:
            raise UserError(f"continue_from: {error}") from None
        _check_alike(config, result, run)
        _check_rows(config, result, dataset, run)
        cache = cache_of(result["config"], run)
        made = _folder(cache, _line(result, "item_tokens", run), run)
        tokens = ItemTokens.load(made)
        raw_ids: list[str] = []
        codes = None
        if tokens.kind == "codes":
            raw_ids = list(json.loads((made / INDEX).read_text(encoding="utf-8")))
            codes = tokens.codes[tokens.lengths > 0].numpy()
        found = cls(run, result, cache, raw_ids, codes, tokens)
        found._check_items(config, dataset)
        # What is gone is told before any work.
        _folder(cache, result["stages"][-1], run)
        if result["split"]["fingerprint"] != dataset.split.fingerprint:
            found._check_unseen(dataset)
        return found

    @property
    def fingerprint(self) -> str:
        """Of its last stage."""
        return str(self.result["stages"][-1]["fingerprint"])

    @cached_property
    def trained(self) -> np.ndarray | None:
        """Hashes of the rows that it learned from, uint64; ``None`` of a run of before they were kept."""
        return read_trained_rows(_folder(self.cache, self.result["stages"][-1], self.run))

    def as_dict(self, dataset: Any) -> dict[str, Any]:
        """What ``result.json`` says of it.

        Args:
            dataset: the train data set of the run that goes on.
        """
        known = int(self._known(dataset).sum())
        return {
            "run": str(self.run), "fingerprint": self.fingerprint, "dataset": self.result["dataset"],
            "seed": self.result["seed"], "split": self.result["split"]["fingerprint"], "items": known,
            "new_items": dataset.item_num - 1 - known,
        }  # fmt: skip

    def _known(self, dataset: Any) -> np.ndarray:
        """Which items of a data set have tokens already, bool ``[n_items]``."""
        names = dataset.field2id_token[dataset.iid_field]
        known = np.isin(names, self.raw_ids) if self.codes is not None else np.ones(len(names), dtype=bool)
        known[0] = False
        return np.asarray(known)

    def _check_unseen(self, dataset: Any) -> None:
        """A filter of rows, or a data set without some, makes other rows a user's last: what was trained on is none."""
        if self.trained is None:
            raise UserError(
                f"continue_from: {self.run} has other interactions and keeps no list of those that it was trained on; "
                "run it again"
            )
        held_out = row_hashes(dataset, VALID, TEST)
        seen = int(np.isin(held_out, self.trained).sum())
        if seen:
            raise UserError(
                f"continue_from: {self.run} was trained on {seen} of the {len(held_out)} valid and test rows here; it "
                "takes interactions that it had not, and the same filters (val_interval, user_inter_num_interval, ...)"
            )

    def _check_items(self, config: Any, dataset: Any) -> None:
        raw_ids = dataset.field2id_token[dataset.iid_field].tolist()
        if self.codes is None:
            if self.tokens.pool != pool_of(raw_ids):
                raise UserError(
                    f"continue_from: the items of {self.run} have ids for tokens and no codes, and these are other "
                    "items or numbered otherwise; a new item has no token there, so train anew"
                )
            return
        known = self._known(dataset)
        if not known.any():
            raise UserError(f"continue_from: {self.run} knows none of the items of '{config['dataset']}'")
        new = len(known) - 1 - int(known.sum())
        made = _folder(self.cache, _line(self.result, "item_tokens", self.run), self.run)
        if not new:
            return
        if config["code_tokens"] is not None or config["code_shuffle"]:
            key = "code_tokens" if config["code_tokens"] is not None else "code_shuffle"
            raise UserError(
                f"continue_from: {new} items have no tokens in {self.run}, and with {key} no codebook gives them any"
            )
        if config["text_llm"]:
            raise UserError(
                f"continue_from: {new} items have no tokens in {self.run}, and text_llm: {config['text_llm']}, which "
                "read the texts of the others, is not kept; train anew"
            )
        if config["code_input"] == "behaviour" and load_points(made) is None:
            raise UserError(
                f"continue_from: {new} items have no tokens in {self.run}, which keeps no item embeddings to place "
                "them by; run it again with cache: refresh"
            )

    # --- what the run that goes on takes over ------------------------------------------------------------------------
    def backbone(
        self, config: Any, store: StageStore, named: Backbone | None
    ) -> tuple[Backbone, str, list[dict[str, Any]]]:
        """The run's language model, its fingerprint, and its line in ``result.json`` where it was trained.

        Args:
            config: of the run that goes on.
            store: its stage cache, which gets a copy of a model that was trained.
            named: the language model that ``llm`` names.

        Raises:
            UserError: it is not the one that the run had.
        """
        if named is None:
            trained = _folder(self.cache, _line(self.result, "backbone", self.run), self.run) / "model"
            inputs = {"continued": _line(self.result, "backbone", self.run)["fingerprint"]}

            def copy(folder: Path) -> dict[str, Any]:
                shutil.copytree(trained, folder / "model", dirs_exist_ok=True)
                return {"tokens": 0}

            stage = store.run("backbone", CONTINUED_VERSION, inputs, copy)
            made = load_model(config, stage.folder / "model")
            return made, read_as(stage.fingerprint, config), [stage.as_dict()]
        mark = read_as(named.fingerprint(), config)
        card = json.loads((_folder(self.cache, self.result["stages"][-1], self.run) / CARD).read_text("utf-8"))
        if mark not in card["inputs"]["upstream"]:
            raise UserError(f"continue_from: {config['llm']} is not the language model that {self.run} had there")
        return named, mark, []

    def tokenize(
        self, config: Any, dataset: Any, store: StageStore, texts: list[str], named: Backbone | None
    ) -> Tokenized:
        """The items' tokens: those of the run, and new ones for the items that it did not know.

        Args:
            config: of the run that goes on.
            dataset: its train data set.
            store: the stage cache.
            texts: of every item, by internal id.
            named: the language model that ``llm`` names.

        Raises:
            UserError: no codes are left for a new item, or see :meth:`backbone`.
        """
        backbone, mark, lines = self.backbone(config, store, named)
        raw_ids = dataset.field2id_token[dataset.iid_field].tolist()
        line = _line(self.result, "item_tokens", self.run)
        origin = origin_of(config, dataset)
        inputs = {
            "continued": line["fingerprint"], "pool": pool_of(raw_ids), "rows": origin, "backbone": mark,
            "texts": fingerprint_of(texts), "unseen_items": config["unseen_items"],
            "reading": [config["text_embedding"], config["text_embedding_tokens"]],
        }  # fmt: skip

        def make(folder: Path) -> dict[str, Any]:
            before = _folder(self.cache, line, self.run)
            write_origin(origin, folder)
            if self.codes is None:
                write_tokens(self.tokens, raw_ids, folder)
                return {"method": "continued", "vocabulary": self.tokens.size, "tokens": 0}
            read = backbone.tokens_read
            tokens, points = self._placed(config, dataset, before, backbone, texts)
            write_tokens(tokens, raw_ids, folder, points)
            if (before / CODEBOOK).is_file():
                Quantiser.load(before).save(folder)
            return {"method": "continued", "vocabulary": tokens.size, "tokens": backbone.tokens_read - read}

        stage = store.run("item_tokens", CONTINUED_VERSION, inputs, make)
        known = self._known(dataset)
        sources = Sources(known, load_points(stage.folder), lines=lines, backbone=backbone, backbone_mark=mark)
        if not config["text_llm"]:
            # Texts of further items are read by what read those that the codebook was made of, not by a fresh one.
            sources.reader, sources.reader_mark = backbone, mark
        logger.info(
            "continue_from: %d items keep their tokens, %d new ones get some", known.sum(), len(known) - 1 - known.sum()
        )
        return Tokenized(ItemTokens.load(stage.folder, raw_ids), stage, sources)

    def _placed(
        self, config: Any, dataset: Any, before: Path, backbone: Backbone, texts: list[str]
    ) -> tuple[ItemTokens, np.ndarray | None]:
        """Tokens of all items, and where they stand, float32 ``[n_items, d]``, where that is by behaviour."""
        assert self.codes is not None
        raw_ids = dataset.field2id_token[dataset.iid_field].tolist()
        known = self._known(dataset)
        row_of = {raw: row for row, raw in enumerate(self.raw_ids)}
        rows = [row_of[raw_ids[item]] for item in np.flatnonzero(known)]
        codes = np.full((len(raw_ids), self.codes.shape[1]), -1, dtype=np.int64)
        codes[known] = self.codes[rows]
        new = np.flatnonzero(~known)[1:]
        points = load_points(before)
        if points is not None:
            placed = np.zeros((len(raw_ids), points.shape[1]), dtype=np.float32)
            # The points begin with the padding item's.
            placed[known] = points[1:][rows]
            points = placed
        if len(new):
            placed_new = _placed_new(config, dataset, points, known, new, backbone, texts)
            names = [raw_ids[item] for item in new]
            codes[new] = codes_of_new(config, Quantiser.load(before), *placed_new, self.codes, names)
        try:
            return ItemTokens.from_codes(codes, self.tokens.level_sizes, raw_ids), points
        except ValueError as error:
            raise UserError(
                f"continue_from: the extra token has no number left for a new item ({error}); train anew"
            ) from None

    def load_into(self, model: Any, device: Any) -> None:
        """Put the run's trained weights into a model that has been prepared.

        Raises:
            UserError: they do not fit it, are damaged, or are of users who have other numbers.
        """
        state = load_state(_folder(self.cache, self.result["stages"][-1], self.run) / WEIGHTS, device)
        mark, then = getattr(model, "user_mark", None), state["state_dict"].get("user_mark")
        if mark is not None and then is not None and not torch.equal(mark.cpu(), then.cpu()):
            raise UserError(
                f"continue_from: users have other numbers than in {self.run} (other users, seed or user_ids), so what "
                "it learned of one would be taken for another's; train anew"
            )
        try:
            model.load_state_dict(state["state_dict"])
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"continue_from: the weights of {self.run} do not fit ({reason})") from None


def _placed_new(
    config: Any, dataset: Any, points: np.ndarray | None, known: np.ndarray, new: np.ndarray, backbone: Backbone,
    texts: list[str],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """Where the new items stand, float32 ``[n_new, d]``, which no interaction places, and the texts of these.

    ``points`` of all items get theirs.
    """

    def read(items: np.ndarray) -> np.ndarray:
        own = [texts[item] for item in items]
        return text_embeddings(backbone, own, config["text_embedding"], config["text_embedding_tokens"])

    none = np.zeros((0, 0), dtype=np.float32)
    if config["code_input"] == "text":
        return read(new), np.zeros(len(new), dtype=bool), none
    assert points is not None
    history = had_by_users(dataset)
    items = np.flatnonzero(known)
    points[new] = from_neighbours(points[items], history[:, items], history[:, new].T.tocsr())
    unplaced = ~points[new].any(axis=1)
    rest = new[unplaced]
    if len(rest) and config["unseen_items"] == "text":
        both = np.concatenate([items, rest])
        points[rest] = from_text(points[both], read(both), known[both], len(items) + np.arange(len(rest)))
    projected = len(rest) and config["unseen_items"] == "projection"
    return points[new], unplaced, read(rest) if projected else none


def _line(result: Mapping[str, Any], name: str, run: Path) -> dict[str, Any]:
    """The last stage of a name; a refit has two."""
    found = [line for line in result["stages"] if line["name"] == name]
    if not found:
        raise UserError(f"continue_from: {run} has no stage '{name}'")
    return dict(found[-1])


def _folder(cache: Path, line: Mapping[str, Any], run: Path) -> Path:
    folder = stage_folder(cache, line)
    if not folder.is_dir():
        raise UserError(f"continue_from: {line['name']} of {run} is no more in the cache {cache}; run it again")
    return folder


def _check_alike(config: Any, result: Mapping[str, Any], run: Path) -> None:
    """Refuse a run whose weights or tokens are of another kind, naming the first difference."""
    now, then = config.as_dict(), result["config"]
    if result["model"] != config["model"]:
        raise UserError(f"continue_from: {run} is a run of {result['model']}, and this one is of {config['model']}")
    keys = [key for key in now if key in _SAME or key.startswith(_PREFIXES)]
    if now["llm_random_init"]:
        # Fresh weights hang on it.
        keys.append("seed")
    for key in keys:
        # A run of before a setting existed is a run with what it is as shipped.
        if key in then and then[key] != now[key]:
            raise UserError(
                f"continue_from: {run} has {key}: {json.dumps(then[key])}, and this run {json.dumps(now[key])}; its "
                "weights and item tokens go on as they are"
            )


def _check_rows(config: Any, result: Mapping[str, Any], dataset: Any, run: Path) -> None:
    """Refuse a run that may have learned from rows that this one validates or tests on."""
    then = result["config"]
    if (then.get("merge_valid") or then.get("refit_on_valid")) and not config["merge_valid"]:
        key = "merge_valid" if then.get("merge_valid") else "refit_on_valid"
        raise UserError(f"continue_from: {run} was trained on its valid rows ({key}); set merge_valid: true here too")
    if result["split"]["fingerprint"] == dataset.split.fingerprint:
        return
    protocol = dataset.split.protocol
    withholds = protocol.train_share < 1 or protocol.cold_item_share > 0
    if protocol.kind != "LS" or not protocol.by_time or withholds or result["split"]["protocol"] != protocol.as_dict():
        raise UserError(
            f"continue_from: {run} was split otherwise, so it may have learned from what are test rows here; with new "
            "interactions it takes the same split of both, leave one out by time with nothing withheld"
        )
