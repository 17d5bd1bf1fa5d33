"""Recommendations from a trained run: for its users, or for somebody of whom only a history is known."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from recbole_llm.data.item_text import item_file, read_titles
from recbole_llm.data.ties import tie_order, top_items
from recbole_llm.errors import UserError, did_you_mean
from recbole_llm.evaluation.ranking import as_counted, catalogue_scores, shown_for
from recbole_llm.itemid.index_file import entries_of, read_index
from recbole_llm.search_keys import SEARCH_KEYS
from recbole_llm.serving.identity import PHASES, identity
from recbole_llm.serving.requests import RequestLoader
from recbole_llm.training.found import find_run
from recbole_llm.training.pipeline import Fit, fit_found

logger = logging.getLogger("recbole_llm")

# RecBole's models that score a history by a table of items, and what they call the table.
ITEM_TABLES = {"EASE": "item_similarity", "ItemKNN": "w", "SLIMElastic": "item_similarity"}
# Of more ids than these, a wrong one is compared with those of its own length and beginning only.
COMPARED = 20_000


@dataclass(frozen=True)
class Ranked:
    """The best items of some users.

    Attributes:
        items: int64 [B, k], internal ids, best first; -1 where a user has fewer.
        scores: float32 [B, k].
    """

    items: np.ndarray
    scores: np.ndarray


@dataclass
class Pool:
    """The items that can be recommended.

    Attributes:
        raw_ids: by internal id, the padding item's first; the data set's, then those that came later.
        titles: by internal id; an empty text where there is none.
        candidates: bool [n_items].
        ties: int64 [n_items], from :func:`~recbole_llm.data.ties.tie_order`.
        number: internal id by raw id.
    """

    raw_ids: list[str]
    titles: list[str]
    candidates: torch.Tensor
    ties: torch.Tensor
    number: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.number = {raw: item for item, raw in enumerate(self.raw_ids) if item}


class Recommender:
    """A trained model and the users of its data set.

    Rankings are those of the evaluation: the same scores, exclusions, candidates and order of ties. Users are ranked in
    batches that are always the same, as the last bit of a score may hang on who is ranked beside him. A recommender
    that searches ranks one who is asked about alone by himself (``search_mode``): what takes a batch's time otherwise.

    Args:
        fit: the trained recommender.
        phases: see :class:`~recbole_llm.serving.requests.RequestLoader`.
        pool: the items.
        built_for: what the recommendations depend on, see :func:`~recbole_llm.serving.identity.identity`.
    """

    def __init__(self, fit: Fit, phases: Sequence[str], pool: Pool, built_for: dict[str, Any]) -> None:
        self.fit, self.model, self.config, self.pool, self.built_for = fit, fit.model, fit.config, pool, built_for
        self.loader = RequestLoader.of(fit, phases)
        self.phases = tuple(phases)
        self.batch = self.loader.step
        names = fit.dataset.field2id_token[fit.dataset.uid_field]
        self.users: list[str] = [str(name) for name in names[self.loader.users]]
        self._row = {raw: row for row, raw in enumerate(self.users)}
        self._all_users = names
        self.model.eval()
        if getattr(self.model, "guidance", None) is not None:
            self.model.guidance.rank_with(RequestLoader.of(self.model.guidance.fit, phases))

    @classmethod
    def of_run(
        cls,
        path: str | Path,
        phases: Sequence[str] = PHASES,
        index_file: Path | None = None,
        new_items: Path | None = None,
        **settings: Any,
    ) -> Recommender:
        """Load a run: its data set and its trained stages, none of which is trained again.

        Args:
            path: its folder or ``result.json``.
            phases: whose rows are a user's history.
            index_file: codes of the data set's items and of those that came later.
            new_items: atomic file with the titles of the latter.
            settings: of where and how it computes, such as ``gpu_id``, ``data_path``, ``eval_batch_size``.

        Raises:
            UserError: settings of another search, there is no such run, a stage is not in the cache any more, data or
                settings have changed, or the model takes no new items.
        """
        result, config, store = find_run(path, **settings)
        moved = sorted(key for key in settings if key.partition(".")[0] in SEARCH_KEYS)
        if moved:
            raise UserError(
                f"{', '.join(moved)}: a run is served as it was evaluated; run it again with another search"
            )
        built_for = identity(result, Path(path), phases, index_file, settings)
        fit = fit_found(config, store)
        if fit.fingerprint != result["stages"][-1]["fingerprint"]:
            raise UserError(
                f"{path}: data or settings have changed since the run, whose weights are others; run it again"
            )
        pool = _pool_of(fit, index_file, new_items)
        return cls(fit, phases, pool, built_for)

    # --- users of the data set ---------------------------------------------------------------------------------------
    def row_of(self, user: str) -> int:
        """The row of a user among those that are served.

        Raises:
            UserError: the data set does not know him, or he has no history.
        """
        row = self._row.get(user)
        if row is not None:
            return row
        if user in self.fit.dataset.field2token_id[self.fit.dataset.uid_field]:
            raise UserError(f"user '{user}' has no {' or '.join(self.phases)} interaction to recommend by")
        raise UserError(unknown("user", user, self.users))

    def check(self, k: int) -> None:
        """Refuse, before anything is ranked, what cannot be answered for every user.

        Raises:
            UserError: k is below 1, above the items, or (of a search) above the beams; or the beams above the items
                that are left to a user.
        """
        if k < 1 or k > int(self.pool.candidates.sum()):
            raise UserError(f"k should be 1 to {int(self.pool.candidates.sum())}, the items there are, but is {k}")
        if getattr(self.model, "ranking", "full") == "full":
            return
        beams = self.config["beams"]
        if k > beams:
            raise UserError(f"k {k} is above the {beams} beams of the run's search; a run with beams: {k} can give it")
        if self.loader.excludes:
            had = self.loader.history.distinct(self.fit.dataset.item_num)[self.loader.users]
            left = int(self.pool.candidates.sum()) - had
            if beams > left.min():
                raise UserError(
                    f"user '{self.users[int(left.argmin())]}' has {max(int(left.min()), 0)} items left to recommend, "
                    f"fewer than the {beams} beams of the run's search; take fewer history_phases"
                )

    def rank_batch(self, number: int, k: int) -> Ranked:
        """The best items of the users of a batch.

        Args:
            number: of the batch: the users from ``number * batch`` on.
            k: how many items.
        """
        return self._rank_seeded(*self.loader.batch(number), k)

    def rank_alone(self, row: int, k: int) -> Ranked:
        """The best items of one user, nobody else being ranked.

        Args:
            row: his.
            k: how many items.
        """
        return self._rank_seeded(*self.loader.some([row]), k)

    def _rank_seeded(self, interaction: Any, excluded: Any, k: int) -> Ranked:
        # A model that draws numbers when it ranks draws the same for a batch, whatever was ranked before.
        with torch.random.fork_rng():
            torch.manual_seed(self.config["seed"])
            return self._rank(interaction, excluded, k)

    @torch.no_grad()
    def _rank(self, interaction: Any, excluded: Any, k: int) -> Ranked:
        scores = catalogue_scores(
            self.model, interaction.to(self.config["device"]), excluded, self.pool.candidates, self.loader._dataset
        )
        return self._best(scores, k)

    def _best(self, scores: torch.Tensor, k: int) -> Ranked:
        counts_as, counted = getattr(self.model, "counts_as", None), scores
        if counts_as is not None:
            # As they were measured: items of one title are one.
            counts_as = counts_as.to(scores.device)
            counted = as_counted(scores, counts_as)
        top = top_items(counted, k, self.pool.ties)
        values = counted.gather(1, top)
        if counts_as is not None:
            # Of a title the copy that the user has not had.
            top = shown_for(scores, counts_as, self.pool.ties.to(scores.device)).gather(1, top)
        items = torch.where(torch.isneginf(values), -1, top)
        return Ranked(items.cpu().numpy(), values.float().cpu().numpy())

    def recommend(self, users: Sequence[str], k: int = 10) -> list[list[tuple[str, str, float]]]:
        """What users of the data set are recommended, best first.

        Args:
            users: raw ids.
            k: how many items each.

        Returns:
            Raw item id, title and score of each; fewer than k where a user has had nearly everything.

        Raises:
            UserError: one is not there, or see :meth:`check`.
        """
        rows = [self.row_of(user) for user in users]
        self.check(k)
        asks_alone = getattr(self.model, "asks_alone", None)
        if asks_alone is not None and asks_alone(len(rows)):
            return [self._named(self.rank_alone(row, k), 0) for row in rows]
        batches = {number: self.rank_batch(number, k) for number in sorted({row // self.batch for row in rows})}
        return [self._named(batches[row // self.batch], row % self.batch) for row in rows]

    # --- somebody else -----------------------------------------------------------------------------------------------
    def recommend_history(self, items: Sequence[str], k: int = 10) -> list[tuple[str, str, float]]:
        """What somebody with this history is recommended, whether or not the data set knows him.

        Args:
            items: raw item ids, oldest first.
            k: how many items.

        Returns:
            Raw item id, title and score of each.

        Raises:
            UserError: an item is not there, or the model needs more of a user than his history.
        """
        self.check(k)
        if not items:
            raise UserError("the history has no items")
        wrong = [item for item in items if item not in self.pool.number]
        if wrong:
            raise UserError(unknown("item", wrong[0], self.pool.raw_ids[1:]))
        shown = [self.pool.number[item] for item in items]
        excluded = None
        if self.loader.excludes:
            excluded = torch.zeros(len(set(shown)), dtype=torch.long), torch.tensor(sorted(set(shown)))
        if not self.loader.is_sequential:
            ranked = self._by_item_table(shown, excluded, k)
        else:
            try:
                ranked = self._rank(self.loader.stranger(shown), excluded, k)
            except KeyError as error:
                if error.args != (self.loader.uid_field,):
                    raise
                raise UserError(self._needs_users()) from None
        return self._named(ranked, 0)

    def _needs_users(self) -> str:
        if getattr(self.model, "guidance", None) is not None:
            return (
                f"the search of this run is guided by {self.config['cf_model']} (cf_guidance), which is asked about "
                "users of the data set, so a history alone is not enough; --user=ID serves those"
            )
        return (
            f"{self.config['model']} knows users by what it has learned of each, so a history alone is not enough; "
            "--user=ID serves those it knows, and sequential models such as SASRec take a history"
        )

    def _by_item_table(self, shown: list[int], excluded: Any, k: int) -> Ranked:
        """Models whose scores are a history times a table of items."""
        name = self.config["model"]
        if name not in ITEM_TABLES or self.config["knn_method"] == "user":
            raise UserError(self._needs_users())
        had = sorted(set(shown))
        row = sp.csr_matrix((np.ones(len(had), dtype=np.float32), had, [0, len(had)]), (1, len(self.pool.raw_ids)))
        made = row @ getattr(self.model, ITEM_TABLES[name])
        scores = torch.from_numpy(np.asarray(made.todense() if sp.issparse(made) else made).copy()).view(1, -1)
        scores[:, ~self.pool.candidates] = -torch.inf
        if excluded is not None:
            scores[excluded] = -torch.inf
        return self._best(scores, k)

    def _named(self, ranked: Ranked, row: int) -> list[tuple[str, str, float]]:
        return [
            (self.pool.raw_ids[item], self.pool.titles[item], float(score))
            for item, score in zip(ranked.items[row].tolist(), ranked.scores[row])
            if item >= 0
        ]


def unknown(what: str, raw: str, known: Sequence[str]) -> str:
    """Say that there is no such user or item, with the nearest that there is.

    Args:
        what: ``user`` or ``item``.
        raw: the id that was asked for.
        known: those that there are.
    """
    near = known
    for count in (0, 1, 2):
        if len(near) > COMPARED:
            near = [one for one in near if len(one) == len(raw) and one[:count] == raw[:count]]
    hint = did_you_mean(raw, near[:COMPARED])
    own = "" if what == "item" else "; --history=ITEM,ITEM serves a user that the data set does not know"
    return f"there is no {what} '{raw}' among the {len(known)} of the data set{hint}{'' if hint else own}"


def _pool_of(fit: Fit, index_file: Path | None, new_items: Path | None) -> Pool:
    """The items of a run, and those of an index file that came after it; the model gets to know them."""
    dataset, config = fit.dataset, fit.config
    raw_ids = [str(raw) for raw in dataset.field2id_token[dataset.iid_field]]
    candidates = torch.from_numpy(fit.test_data._dataset.split.candidates)
    if index_file is not None:
        known = set(raw_ids)
        new = sorted(raw for raw in entries_of(index_file) if raw not in known)
        if not new:
            raise UserError(
                f"{index_file} has no item that '{config['dataset']}' does not have; leave --index_file out"
            )
        raw_ids = [*raw_ids, *new]
        candidates = torch.cat([candidates, torch.ones(len(new), dtype=torch.bool)])
        _enter(fit, index_file, raw_ids)
        logger.info("%d items entered from %s", len(new), index_file)
    titles = _titles(config, new_items)
    return Pool(raw_ids, [titles.get(raw, "") for raw in raw_ids], candidates, tie_order(raw_ids))


def _enter(fit: Fit, index_file: Path, raw_ids: list[str]) -> None:
    """Have the model take the codes of new items; those of the others must be what it was trained with."""
    trained = getattr(fit.trainer, "item_tokens", None)
    if trained is None or not hasattr(fit.model, "enter_items"):
        raise UserError(
            f"{fit.config['model']} does not read items as codes, so a new item means nothing to it before it is "
            "trained again; AlignTokenRec, LCRec and SASRecCodes take new ones"
        )
    if getattr(fit.model, "guidance", None) is not None:
        raise UserError(
            f"the search of this run is guided by {fit.config['cf_model']} (cf_guidance), which knows no new items"
        )
    if trained.kind == "titles":
        raise UserError(f"the items of {fit.config['model']} are titles, and an index file has codes")
    if trained.kind != "codes":
        raise UserError(f"the items of this run are {trained.kind} tokens, of which a new item has none")
    tokens = read_index(index_file, raw_ids, trained.level_sizes)
    moved = (tokens.codes[: trained.n_items] != trained.codes).any(dim=1).nonzero()
    if len(moved):
        raise UserError(
            f"{index_file}: item '{raw_ids[int(moved[0])]}' has other codes than the run was trained with; make the "
            "file with recbole-llm prepare and the run's own settings"
        )
    fit.model.enter_items(tokens, tie_order(raw_ids))


def _titles(config: Any, new_items: Path | None) -> dict[str, str]:
    own = item_file(config)
    titles: dict[str, str] = {}
    if not config["item_text"]:
        return titles
    for file in [path for path in (own, new_items) if path is not None and (path.is_file() or path is new_items)]:
        try:
            found = read_titles(
                file, config["ITEM_ID_FIELD"], config["item_text"], config["field_separator"],
                config["encoding"] or "utf-8",
            )  # fmt: skip
        except UserError as error:
            # They are only shown, and a model that reads no text runs without.
            if file is new_items:
                raise
            logger.warning("items are shown by their ids: %s", error)
            continue
        titles = found | titles
    return titles


__all__ = ["Pool", "Ranked", "Recommender", "unknown"]
