"""TCA4Rec: a generative recommender that learns from a collaborative one, token by token.

It wraps a recommender that generates items (``base_model``) and changes the labels of its loss and nothing else. Where
the base learns the tokens of a user's next item, another recommender's scores over the catalogue (``cf_model``, trained
first and frozen) become a distribution over the tokens that could stand at each place, and the label is a mixture of
the item's own token with it. Prompts, tasks, what trains and how items are found are the base's, under its own keys.

Source: Lin et al., "TCA4Rec: Token-level Collaborative Alignment for LLM-based Generative Recommendation", WWW 2026,
arXiv 2601.18457, and the authors' public code; the parts are in :mod:`recbole_llm.objectives`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm import registry
from recbole_llm.data.counted_batch import counting
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.model.aligntokenrec import AlignTokenRec
from recbole_llm.objectives.quirks import behaviour
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer, SoftLabels, check_beta
from recbole_llm.objectives.soft_loss import SoftLabelLoss
from recbole_llm.objectives.teacher_cache import TeacherCache

if TYPE_CHECKING:
    from recbole_llm.itemid.item_tokens import ItemTokens
    from recbole_llm.training.teacher import FoldedTeacher, Teacher


ALL_DROPPED = (
    "official_quirks leaves out an item's last token, and no item here has more than one: nothing would be learned; "
    "set official_quirks: false"
)
# Settings and what each is where it means nothing.
_OFF = {"cf_folds": 1, "teacher_cache_mib": 0, "soft_history": False}


class CollaborativeLabels:
    """What a generative recommender becomes TCA4Rec by: to stand before it among a class's bases.

    The base has ``label_loss(logits, batch)``, its mean over labels, and ``mean_loss``, the same against soft ones; it
    calls ``take_item_tokens``.
    """

    # The registered name of the base, and its class.
    wraps = ""
    wrapped: type
    teachers = ("cf_model",)

    config: Any
    device: Any
    item_tokens: ItemTokens
    answer_tokens: ItemTokens
    teacher: Teacher | FoldedTeacher
    legal_only: bool
    forced_in_mean: bool
    mean_loss: Callable[..., Tensor]
    _lm_ids: Tensor
    _train_items: Tensor
    _tokenizer: CollaborativeTokenizer | None = None
    # Labels that were made before, and the number there of each train interaction, -1 for none.
    _made: tuple[TeacherCache, Tensor] | None = None

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)  # type: ignore[call-arg]
        self._quirks = behaviour(config["official_quirks"])
        _check_choices(config)
        check_beta(config["beta"])
        if not self._quirks.skip_forced and self.legal_only:
            self.forced_in_mean = True
        self.soft_loss = SoftLabelLoss(
            config["tca_loss"], config["alpha"], config["tau"], legal_only=self.legal_only
        )  # fmt: skip
        self._train_histories = dataset.train_histories

    @classmethod
    def idle_settings(cls, config: Any) -> tuple[str, ...]:
        """Settings that mean nothing as the others stand; whoever guides the search or not, he teaches."""
        told = getattr(super(), "idle_settings", lambda _: ())(config)
        return (
            *(key for key in told if key not in cls.teachers),
            *(key for key, off in _OFF.items() if config[key] == off),
        )

    def check_language_model(self, encodes: bool) -> None:
        """See the base; refuses ``soft_history`` where no item of a history is told."""
        if encodes and self.config["soft_history"]:
            raise UserError(
                "soft_history mixes labels of the items shown, and a language model with an encoder has none; set "
                "soft_history: false"
            )
        super().check_language_model(encodes)  # type: ignore[misc]

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Note what the tokens of every item are."""
        super().take_item_tokens(tokens)  # type: ignore[misc]
        if tokens.longest <= self._dropped_of_item:
            raise UserError(ALL_DROPPED)
        self._tokenizer = self._made = None

    def take_teacher(self, teacher: Teacher | FoldedTeacher) -> None:
        """Note whose scores the labels are made of."""
        # Not a submodule: nothing of it trains, and its weights are its own stage's.
        self.__dict__["teacher"] = teacher

    def take_labels(self, labels: TeacherCache, moments: Tensor) -> None:
        """Read labels there from now on instead of asking the teacher.

        Args:
            labels: made with :attr:`tokenizer` of :meth:`teacher_scores`.
            moments: which train interactions they are of, int64 ``[S]``.
        """
        numbers = torch.full_like(self._train_items, -1)
        numbers[moments] = torch.arange(len(moments))
        self.__dict__["_made"] = labels, numbers

    @property
    def tokenizer(self) -> CollaborativeTokenizer:
        """What makes distributions over tokens of scores over items."""
        if self._tokenizer is None:
            config, quirks = self.config, self._quirks
            self._tokenizer = CollaborativeTokenizer(
                self.answer_tokens, self._lm_ids, beta=config["beta"], standardise=config["standardise"],
                drop_last=self._dropped_of_item, dtype=quirks.dtype,
            ).to(self.device)  # fmt: skip
        return self._tokenizer

    @property
    def _dropped_of_item(self) -> int:
        """Last tokens of an item that are no labels; titles bring their end token, of codes it is the answer's."""
        return max(self._quirks.drop_last - (self.item_tokens.kind != "titles"), 0)

    def _searched(self) -> tuple[ItemTokens, Tensor]:
        """As of the base; an end token that is no label is nothing to rank by."""
        if self._quirks.drop_last:
            return self.item_tokens, self._lm_ids
        searched: tuple[ItemTokens, Tensor] = super()._searched()  # type: ignore[misc]
        return searched

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples, and which of their labels are in the mean."""
        batch: TokenBatch = super().training_batch(interaction)  # type: ignore[misc]
        if not (self._quirks.drop_last or self.config["skip_forced"]):
            return batch
        return counting(batch, self._of_items(batch)[2])

    def label_loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """The mean over labels, those of the next item's tokens mixed with what the teacher expects there.

        Args:
            logits: float ``[L, V]``, those of the batch's labels.
            batch: which labels.

        Returns:
            float32 scalar; 0 where no label counts.
        """
        soft, counted, loss = self.told_labels(batch)
        return self.mean_loss(logits, soft, loss, counted)

    def told_labels(self, batch: TokenBatch) -> tuple[SoftLabels, Tensor | None, SoftLabelLoss]:
        """The labels of a batch, which of them count (see :meth:`soft_labels`), and the loss of each."""
        return *self.soft_labels(batch), self.soft_loss

    @torch.no_grad()
    def soft_labels(self, batch: TokenBatch) -> tuple[SoftLabels, Tensor | None]:
        """The labels of a batch: what the teacher says at the tokens of next items, one-hot anywhere else.

        Args:
            batch: of training.

        Returns:
            Of all labels; and which of them count, bool ``[L]``, ``None`` where all do.
        """
        places, moments, counted = self._of_items(batch)
        labels, places = batch.labels.to(self.device), places.to(self.device)
        if self.config["soft_history"]:
            # Prompts of one user show the same items.
            moments, back = moments.unique(return_inverse=True)
            found = self._expected(moments).take(back.to(self.device))
        else:
            found = self._expected(moments)
        return found.among(labels, places), None if bool(counted.all()) else counted.to(self.device)

    def _of_items(self, batch: TokenBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Which labels of a batch the teacher is asked about, and which of all labels count.

        Returns:
            Their places, int64; the train interactions that they are tokens of, int64 ``[S]``, in the places' order;
            bool ``[L]``.
        """
        of_items = batch.origins >= 0
        if not self.config["soft_history"]:
            of_items &= batch.answers
        places = of_items.nonzero().squeeze(1)
        moments = _items_of(batch, places)
        targets = self._train_items[moments]
        counted = torch.ones(len(batch.labels), dtype=torch.bool)
        if self._quirks.drop_last:
            places = self._undropped(batch, places, targets, counted)
        elif self.config["skip_forced"]:
            nodes = self.tokenizer.positions(targets.to(self.device)).nodes
            forced = (self.tokenizer.children_count(nodes) == 1).cpu()
            # Shown items are no answers, soft labels or not.
            counted[places[forced & batch.answers[places]]] = False
        return places, moments, counted

    def _expected(self, moments: Tensor) -> SoftLabels:
        """What the teacher expects along the items of train interactions, int64 ``[S]``."""
        if self._made is not None:
            cache, numbers = self._made
            return cache.labels(numbers[moments])
        targets = self._train_items[moments].to(self.device)
        if not len(moments):
            return self.tokenizer(torch.zeros(0, self.item_tokens.n_items, device=self.device), targets)
        logits, history = self.teacher_scores(moments)
        return self.tokenizer(logits, targets, history)

    @torch.no_grad()
    def teacher_scores(self, moments: Tensor) -> tuple[Tensor, Tensor | None]:
        """What the teacher says right before train interactions, and what gets no share of a label.

        Args:
            moments: int64 ``[S]``, at least one.

        Returns:
            Scores float32 ``[S, n_items]``; items int64 ``[S, H]``, filled up with 0, or ``None``.
        """
        logits = self.teacher.logits(moments).to(self.device)
        return logits, self._histories(moments).to(self.device) if self.config["mask_history"] else None

    def _undropped(self, batch: TokenBatch, places: Tensor, targets: Tensor, counted: Tensor) -> Tensor:
        """The places of item tokens without the last ones, which, as the end token behind them, do not count."""
        lengths = self.answer_tokens.lengths[targets]
        left = lengths.cumsum(0).repeat_interleave(lengths) - torch.arange(len(places))
        dropped = left <= self._dropped_of_item
        counted[places[dropped]] = False
        if self.item_tokens.kind != "titles":
            counted[places[left == 1] + 1] = False
        return places[~dropped]

    def _histories(self, moments: Tensor) -> Tensor:
        """Items that users had before train interactions, int64 ``[S, H]``, filled up with 0."""
        begins = torch.from_numpy(self._train_histories.begins(moments.numpy()))
        return Ragged.from_slices(self._train_items, begins, moments).padded(0)


def _items_of(batch: TokenBatch, places: Tensor) -> Tensor:
    """The train interactions of the items whose tokens stand at places among the labels: int64 ``[S]``, in order."""
    rows, moments = batch.rows[places], batch.origins[places]
    # An item's tokens are neighbours among the labels.
    begins = torch.ones_like(rows, dtype=torch.bool)
    begins[1:] = (rows.diff() != 0) | (moments.diff() != 0)
    return moments[begins]


def _check_choices(config: Any) -> None:
    if config["official_quirks"] and config["skip_forced"]:
        raise UserError("official_quirks is the release, where forced tokens count: set skip_forced: false")
    if config["official_quirks"] and "item_tokens" in config and config["item_tokens"] == "raw":
        raise UserError(ALL_DROPPED)
    if config["tasks"] and "sequential" not in config["tasks"]:
        raise UserError(
            f"tasks: {config['tasks']} has no next item, whose labels TCA4Rec changes; add sequential, or train "
            f"{config['base_model']} itself"
        )
    if not config["soft_history"]:
        return
    if config["train_positions"] != "all":
        raise UserError("soft_history mixes labels of the items shown, which train_positions: response has none of")
    if config["official_quirks"]:
        raise UserError("official_quirks is the release, which learns no item shown: set soft_history: false")


class TCA4Rec(CollaborativeLabels, AlignTokenRec):
    """TCA4Rec (arXiv 2601.18457) as a RecBole recommender; around AlignTokenRec, or what ``base_model`` names.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    wraps, wrapped = "AlignTokenRec", AlignTokenRec
    parts: tuple[str, ...] = tuple(dict.fromkeys((*AlignTokenRec.parts, *CollaborativeLabels.teachers)))

    def __new__(cls, config: Any, dataset: Any) -> Any:
        """RecBole's way names the model alone: the base is in its settings."""
        wanted = cls.over(config["base_model"])
        return super().__new__(cls) if wanted is cls else wanted(config, dataset)

    @staticmethod
    def over(base: str) -> Any:
        """The class around a base.

        Args:
            base: a registered name.

        Raises:
            UserError: there is no such model, or it does not generate items.
        """
        if base == TCA4Rec.wraps:
            return TCA4Rec
        found = registry.get_model(base)
        if hasattr(found, "over") or not hasattr(found, "label_loss"):
            why = "is what wraps one" if hasattr(found, "over") else "does not"
            raise UserError(f"base_model should generate items, as {', '.join(registry.generative())} do; {base} {why}")
        return _around(found, base)


@functools.cache
def _around(base: Any, name: str) -> Any:
    class Around(CollaborativeLabels, base):  # type: ignore[misc]
        """TCA4Rec (arXiv 2601.18457) around another recommender."""

        wraps, wrapped = name, base
        parts = tuple(dict.fromkeys((*base.parts, *CollaborativeLabels.teachers)))

    Around.__name__ = TCA4Rec.__name__
    return Around
