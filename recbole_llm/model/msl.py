"""MSL: a language model that generates titles, trained by a softmax over the tokens that a title can go on with.

A token that no title has behind the tokens so far is no competitor in the loss, as it is none in the search; and the
softmax has a temperature, without which few tokens beside the label are left to learn from.

Source: Wang et al., "MSL: Not All Tokens Are What You Need for Tuning LLM as a Recommender", SIGIR 2025, and the
authors' public code. The prompt is TCA4Rec's, which has MSL among its bases; the authors' own differs in words and puts
titles into quotes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm import processes
from recbole_llm.data.counted_batch import counting
from recbole_llm.data.instructions import TokenBatch
from recbole_llm.data.prompts import Ragged
from recbole_llm.errors import UserError
from recbole_llm.model.titles import TitleRecommender
from recbole_llm.objectives.adaptive_temperature import SHARE, adaptive_temperature
from recbole_llm.objectives.soft_labels import CollaborativeTokenizer, SoftLabels
from recbole_llm.objectives.soft_loss import SoftLabelLoss

if TYPE_CHECKING:
    from recbole_llm.itemid.item_tokens import ItemTokens

ADAPTIVE = "ats"
# All mass on the label: the cross-entropy over the legal tokens.
HARD = SoftLabelLoss("log_mixture", 0.0, legal_only=True)


class MSL(TitleRecommender):
    """MSL (SIGIR 2025) as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Raises:
        UserError: ``temperature: ats`` with batches that are read in parts.

    Attributes:
        forced_in_mean: whether labels that only one token can stand for, whose loss is 0, count in the mean.
        running_temperature: float64 scalar, part of the state, of ``temperature: ats``: the mean over the steps so far;
            0 before the first.
    """

    legal_only = True
    running_temperature: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.forced_in_mean: bool = config["forced_in_mean"]
        self._adapts = config["temperature"] == ADAPTIVE
        if self._adapts:
            # Of a part of a batch's rows it is another temperature, and the steps would be others.
            if processes.count() > 1 or config["gradient_accumulation_steps"] > 1:
                raise UserError(
                    f"temperature: {ADAPTIVE} is taken from a whole batch, and here there are several processes or "
                    "gradient_accumulation_steps; set a number, e.g. 4.5"
                )
            self.register_buffer("running_temperature", torch.zeros((), dtype=torch.float64))

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Note what the tokens of every item are."""
        super().take_item_tokens(tokens)
        self._answers = tokens if self.forced_in_mean else tokens.unique_prefixes()
        self._legal = CollaborativeTokenizer(self._answers.to(self.device), tokens.lm_ids)

    @property
    def answer_tokens(self) -> ItemTokens:
        """What of every item's tokens is among the labels of an answer.

        Behind what tells a title from all others a single token is legal at every place: nothing is lost there, and
        unless such labels count in the mean they need not be read.
        """
        return self._answers

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples, and which of their labels are in the mean."""
        batch = super().training_batch(interaction)
        if self.forced_in_mean or not len(batch.labels):
            return batch
        targets = self._train_items[batch.moments]
        batch = _cut(batch, self._answers.lengths[targets])
        nodes = self._legal.positions(targets.to(self.device)).nodes
        return counting(batch, (self._legal.children_count(nodes) > 1).cpu())

    def label_loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy of the labels over the tokens that are legal at their places.

        Args:
            logits: float ``[L, V]``, those of the batch's labels.
            batch: which labels.

        Returns:
            float32 scalar; 0 where no label counts.
        """
        soft, counted, loss = self.told_labels(batch)
        return self.mean_loss(logits, soft, loss, counted)

    def told_labels(self, batch: TokenBatch) -> tuple[SoftLabels, Tensor | None, SoftLabelLoss]:
        """The labels of a batch, which of them count, bool ``[L]`` (``None``: all), and the loss of each."""
        return self.legal_labels(batch), None, HARD

    def _loss_of(self, states: Tensor, which: Tensor | None, batch: TokenBatch) -> Tensor:
        """:meth:`label_loss`, for which the head reads the states and the tokens alone that anything hangs on."""
        if _owner(type(self), "label_loss") is not _owner(type(self), "told_labels"):
            # A subclass has a loss of its own.
            return super()._loss_of(states, which, batch)
        soft, counted, loss = self.told_labels(batch)
        if not self.forced_in_mean:
            read = ~soft.forced if counted is None else counted & ~soft.forced
            if self._adapts:
                read = read | _begins(soft)
            kept = read.nonzero().squeeze(1)
            soft, counted = soft.at(kept), None if counted is None else counted[kept]
            which = kept if which is None else which[kept]
        tokens, soft = soft.compact()
        states = states if which is None else states.index_select(0, which)
        return self.mean_loss(self.head.logits_of(tokens, states), soft, loss, counted)

    @torch.no_grad()
    def legal_labels(self, batch: TokenBatch) -> SoftLabels:
        """The labels of a batch with the tokens that are legal at their places, none of which has a share.

        Args:
            batch: of training; its labels are the tokens of next items.
        """
        targets = self._train_items[batch.moments].to(self.device)
        positions = self._legal.positions(targets)
        children = self._legal.children(positions.nodes)
        return self._legal.labels(positions, children, torch.zeros(len(children.nodes), device=self.device))

    def mean_loss(self, logits: Tensor, soft: SoftLabels, loss: SoftLabelLoss, counted: Tensor | None = None) -> Tensor:
        """The mean over labels at the temperature of this step, forced ones in it or not.

        Under ``temperature: ats`` it is multiplied by the temperature, as in the authors' code, so that gradients stay
        of one size.

        Args:
            logits: float ``[L, V]``, those of the labels.
            soft: the labels, with the tokens that are legal at their places, in numbers of the logits' columns.
            loss: of each.
            counted: bool ``[L]``, which of them count; ``None``, all.

        Returns:
            float32 scalar; 0 where no label counts.
        """
        tau = self._temperature(logits, soft)
        if not self.forced_in_mean:
            counted = ~soft.forced if counted is None else counted & ~soft.forced
        mean = super().mean_loss(logits, soft, replace(loss, tau=loss.tau * tau), counted)
        return mean * tau if self._adapts else mean

    @torch.no_grad()
    def _temperature(self, logits: Tensor, soft: SoftLabels) -> float:
        if not self._adapts:
            return float(self.config["temperature"])
        before = float(self.running_temperature)
        rows = _begins(soft).nonzero().squeeze(1)
        if not len(rows):
            return before or 1.0
        # The tokens that titles begin with are the same for all.
        legal = soft.tokens[soft.offsets[rows[0]] : soft.offsets[rows[0] + 1]]
        now = adaptive_temperature(
            logits[rows.unsqueeze(1), legal], torch.searchsorted(legal, soft.labels[rows]), self.config["ats_eta"]
        )
        running = (1 - SHARE) * before + SHARE * now if before else now
        if self.training:
            self.running_temperature.fill_(running)
        return running


def _begins(soft: SoftLabels) -> Tensor:
    """Positions of the first tokens of answers, bool [M]."""
    first = soft.samples >= 0
    first[1:] &= soft.samples[1:] != soft.samples[:-1]
    return first


def _cut(batch: TokenBatch, lengths: Tensor) -> TokenBatch:
    """A batch of which labels are the answers' tokens, with the first labels of each prompt alone.

    Args:
        batch: nothing behind a prompt's last label is read of it.
        lengths: how many, at least one, int64 ``[B]``.
    """
    labels = Ragged.from_lengths(batch.labels, torch.bincount(batch.rows, minlength=len(lengths)))
    kept = labels.positions < lengths[batch.rows]
    places = batch.places[kept]
    return replace(
        batch, ids=batch.ids[:, : int(places.max()) + 1], rows=batch.rows[kept], places=places,
        labels=batch.labels[kept], answers=batch.answers[kept], origins=batch.origins[kept],
    )  # fmt: skip


def _owner(kind: type, name: str) -> type:
    """The class that a method is of."""
    return next(one for one in kind.__mro__ if name in vars(one))
