"""What recommenders share that generate an item's tokens with a language model, whatever the tokens are.

Histories are read, and the next item is written, as tokens; which, a subclass says: new ones of its own
(:class:`~recbole_llm.model.aligntokenrec.AlignTokenRec`), or those of titles
(:class:`~recbole_llm.model.titles.TitleRecommender`). Here are the prompts of tasks and training on them; how items are
ranked is in :mod:`recbole_llm.model.token_ranking`. A causal language model goes on behind the prompt; of
one with an encoder (T5) that reads the prompt, and the decoder writes the answer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.adapter import Adapter, adapt, check_adapter
from recbole_llm.backbone.encoder_decoder import AnswerReader
from recbole_llm.backbone.packed import PackedReader
from recbole_llm.data.instructions import InstructionWriter, TokenBatch
from recbole_llm.data.prompts import Ragged, check_history_length
from recbole_llm.data.task_loader import groups_of, packs
from recbole_llm.data.templates import INFERENCE, Templates, templates_of
from recbole_llm.data.token_table import TokenTable
from recbole_llm.errors import UserError
from recbole_llm.model.token_ranking import TokenRanking
from recbole_llm.tasks import active_tasks, known_tasks, number
from recbole_llm.tasks.base import DRAW, TARGET, USER
from recbole_llm.tasks.behaviour import SEQUENTIAL

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone
    from recbole_llm.itemid.item_tokens import ItemTokens
    from recbole_llm.objectives.soft_labels import SoftLabels
    from recbole_llm.objectives.soft_loss import SoftLabelLoss

logger = logging.getLogger("recbole_llm")

FINE_TUNING = "fine_tuning"


class GenerativeRecommender(TokenRanking, SequentialRecommender):
    """A recommender that generates items as tokens.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Attributes:
        item_kind: what the items' tokens are: ``codes`` (or raw ids), made by the stages of
            ``properties/item_tokens``, or ``titles``.
        head: the vocabulary's, with ``logits`` and ``for_search``; set by :meth:`_take_tokens`.
    """

    input_type = InputType.POINTWISE
    train_view = "tasks"
    parts: tuple[str, ...] = TokenRanking.guides
    stages: tuple[str, ...] = (FINE_TUNING,)
    item_kind = "codes"
    # Whether the loss is over the tokens that an item can go on with rather than over the vocabulary.
    legal_only = False

    head_weight: nn.Parameter | None
    _reader: Any
    # Batches that the training will have; its trainer tells.
    batches_planned = 0
    # Whether the language model has to be a causal one.
    causal_only = False

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        check_adapter(config)
        self.history_length: int = config["history_length"]
        check_history_length(self.history_length, self.max_seq_length)
        self.tasks = active_tasks(config)
        # Asked with all its templates, whether or not it is trained.
        asked = [known_tasks()[SEQUENTIAL]] if config["inference_prompts"] == "all" else []
        self.templates = templates_of(config, list(dict.fromkeys([*self.tasks, *asked])))
        told = [USER in wording.places for wordings in self.templates.tasks.values() for wording in wordings]
        if any(told) > self.tells_user or self.tells_user > all(told):
            raise UserError(
                f"prompts: {config['model']} tells of {'the user in every template' if self.tells_user else 'no user'} "
                f"({{{USER}}} in '{config['prompts']}')"
            )
        self._train_items = torch.from_numpy(dataset.train_histories.items).long()
        self._moments = torch.arange(len(self._train_items))
        self._packs = packs(config)

    def check_language_model(self, encodes: bool) -> None:
        """Say or refuse before any work what a language model of this kind makes of the settings.

        Args:
            encodes: whether an encoder reads the prompts.

        Raises:
            UserError: ``ranking`` or ``packing`` asks for what only a causal one does.
        """
        if encodes and self._packs:
            raise UserError(
                "packing: user needs a causal language model, and this one has an encoder; set packing: none"
            )
        if encodes and self.ranking != "beam":
            raise UserError(
                f"ranking: {self.ranking} needs a causal language model, and this one has an encoder; set ranking: beam"
            )
        if encodes and self.config["train_positions"] == "all":
            logger.info("train_positions: all learns answers alone here, as an encoder reads the whole history")

    def prepare(
        self,
        *,
        item_tokens: ItemTokens,
        backbone: Backbone,
        head_model: Any,
        tie_order: Tensor,
        texts: Mapping[str, Sequence[str] | TokenTable],
        codebook: Tensor | None = None,
    ) -> None:
        """Take in what the stages before made, and build what trains.

        Args:
            item_tokens: of every item.
            backbone: the frozen language model; it learns to read the new tokens' ids, in place.
            head_model: the same language model with its vocabulary head.
            tie_order: all item ids, int64 ``[n_items]``: how equal scores are ranked.
            texts: for each place of the tasks' templates that holds a text what can stand there, or its tokens:
                ``title`` and ``description`` by item id, ``query`` and others by number. A task that needs some and has
                none is left out.
            codebook: float32 ``[N, C, d]``, the codes' vectors; of ``code_embedding`` other than none.

        Raises:
            UserError: a prompt does not fit the language model, and ``long_prompts`` does not say what then.
        """
        config = self.config
        # Not a submodule: of the language model only what trains is part of the model's state and parameters.
        self.__dict__["backbone"] = backbone
        self._tie_order = tie_order
        self.adapter: Adapter | None = adapt(backbone.decoder, config, head_model.get_output_embeddings())
        self._take_tokens(item_tokens, head_model, codebook)
        self.take_item_tokens(item_tokens)
        self.to(self.device)
        self._reader = AnswerReader(backbone.decoder) if backbone.encodes else PackedReader(backbone.decoder)
        if self._packs and not self._reader.packs:
            logger.info("packing: user puts samples of a user side by side; this language model reads each by itself")
        prompts = {
            task.name: self.templates.instructions(task.name, list(texts), only_first=config["prompt_set"] == "first")
            for task in self.tasks
            if not task.reads or set(task.reads) & set(texts)
        }
        asked = SEQUENTIAL if config["inference_prompts"] == "all" else INFERENCE
        wordings = self.templates.instructions(asked, {USER} & set(texts))
        prompts[INFERENCE] = [wording._replace(answer="") for wording in wordings]
        self.prompts_asked = len(prompts[INFERENCE])
        fills = {
            place: own if isinstance(own, TokenTable) else TokenTable.of(self._encode(own), config["text_tokens"])
            for place, own in texts.items()
        }
        self._write_for = partial(
            InstructionWriter,
            prompts,
            self._encode,
            bos_id=backbone.bos_id,
            eos_id=backbone.eos_id,
            separator=self.templates.separator,
            texts=fills,
            # An encoder reads the history whole, so nothing of it is told.
            label_history=config["train_positions"] == "all" and not backbone.encodes,
            prompt_end=backbone.eos_id if backbone.encodes else None,
            title_separator=self.templates.title_separator,
            **({"title_tokens": config["history_title_tokens"]} if "title" in texts else {}),
        )
        self._make_writer()

    def _check_answers(self, templates: Templates, reason: str, alone: bool = False) -> None:
        """Refuse answers of the sequential task in which something stands behind the item, or, if alone, before it."""
        for wording in templates.tasks.get(SEQUENTIAL, ()):
            before, _, behind = wording.answer.partition(f"{{{TARGET}}}")
            if behind or (before and alone):
                raise UserError(
                    f"prompts: the answer of {SEQUENTIAL} should {'be' if alone else 'end with'} {{{TARGET}}} for "
                    f"{self.config['model']}, as {reason}, but is {wording.answer!r}"
                )

    def _encode(self, texts: Sequence[str]) -> list[list[int]]:
        """What texts that prompts hold are read as."""
        return self.backbone.encode_batch(texts)

    def _take_tokens(self, item_tokens: ItemTokens, head_model: Any, codebook: Tensor | None) -> None:
        """Set ``head``, ``head_weight`` (what of the head trains) and ``_lm_ids`` for the items' vocabulary."""
        raise NotImplementedError

    def _shown(self) -> Ragged:
        """What an item is shown as in a prompt: the language model's ids, one row an item."""
        return Ragged(self._lm_ids[self.item_tokens.tokens], self.item_tokens.offsets)

    def _told(self) -> Ragged | None:
        """What an item is answered with, its end token with it; ``None``, as it is shown, with one behind."""
        return None

    def _make_writer(self) -> None:
        """Prompts of the items that there are; what does not fit is left out or made shorter."""
        self.writer = self._write_for(items=self._shown(), answers=self._told())
        config, longest = self.config, self.writer.longest(self.history_length)
        context = getattr(self.backbone.decoder.config, "max_position_embeddings", None)
        rooms = {"prompt_tokens allows": config["prompt_tokens"], "the language model has": context}
        given = {name: room for name, room in rooms.items() if room is not None}
        if not given or longest <= min(given.values()):
            return
        name, room = min(given.items(), key=lambda pair: pair[1])
        if config["long_prompts"] == "refuse":
            wider = ", raise llm_context" if room == context and config["llm"] == "embedded" else ""
            raise UserError(
                f"prompts take up to {longest} tokens, {name} {room}; lower history_length or text_tokens{wider}, or "
                "set long_prompts: truncate or drop"
            )
        if self.writer.shortest() > room:
            raise UserError(f"prompts of one item take {self.writer.shortest()} tokens, {name} {room}")
        self.writer.leave_room(room, drop=config["long_prompts"] == "drop")

    def tell_long_prompts(self) -> None:
        """Log how many prompts were left out or made shorter since this was last told."""
        for task, count in self.writer.too_long.items():
            done = "left out" if self.config["long_prompts"] == "drop" and task != INFERENCE else "made shorter"
            logger.info("%s: %d prompts were too long and %s (long_prompts)", task, count, done)
        self.writer.too_long.clear()

    def take_item_tokens(self, tokens: ItemTokens) -> None:
        """Note what the tokens of every item are."""
        self.item_tokens = tokens

    @property
    def answer_tokens(self) -> ItemTokens:
        """What of every item's tokens is among the labels of an answer."""
        return self.item_tokens

    def enter_items(self, tokens: ItemTokens, tie_order: Tensor) -> None:
        """Let items that came after training be shown and found; nothing that was learned changes.

        Args:
            tokens: of every item, those that were there first under the ids they had; of the vocabulary that was
                trained.
            tie_order: all item ids, int64 ``[n_items]``.
        """
        self.take_item_tokens(tokens)
        self.n_items, self._tie_order = tokens.n_items, tie_order
        self.forget_search()
        self._make_writer()

    def wording(self, searched: bool = True) -> list[Any]:
        """What the prompts are made of, for a fingerprint.

        Args:
            searched: with what it says of the search.
        """
        return [self.templates.wrapper, self.templates.separator, self.templates.title_separator, self.templates.tasks]

    # Training

    def begin_stage(self, stage: str) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Free what trains: all parameters, of the language model those that ``adapter`` says.

        Returns:
            The parameters, as an optimizer takes them; an adapter's are a group with a learning rate of its own.
        """
        self.requires_grad_(True)
        trained = list(self.parameters())
        return trained if self.adapter is None else self.adapter.groups(trained, self.head_weight)

    def sample_lengths(self, samples: Any) -> Tensor:
        """About how many tokens each sample of the train loader will have: int64 ``[B]``."""
        return self.writer.lengths(samples["task"], samples["stop"] - samples["start"], samples["source"])

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples; templates by torch's own generator, or as they were drawn.

        Of ``packing: user`` all prefixes in a batch that begin alike have one template and lose the same items.
        """
        starts, stops = interaction["start"], interaction["stop"]
        groups = groups_of(starts, stops, self._packs)
        draws = interaction[DRAW] if self._packs else None
        templates = self.writer.draw(interaction["task"], torch.default_generator, stops > starts, groups, draws)
        shown = Ragged.from_slices(self._moments, starts, stops)
        if self.config["history_dropout"]:
            # The last item stays: a history is never empty, and it says most of what comes next. Samples of one history
            # lose the same items.
            draws = torch.rand(int(groups.max()) + 1, self.history_length)
            kept = draws[groups[shown.rows], shown.positions] >= self.config["history_dropout"]
            shown = shown.keep(kept | (shown.positions == shown.lengths[shown.rows] - 1))
        histories = Ragged(self._train_items[shown.values], shown.offsets)
        moments = torch.where(interaction["task"] == number(SEQUENTIAL), stops, -1)
        return self.writer.write(templates, histories, interaction["source"], interaction["target"], moments, shown)

    def stage_loss(self, stage: str, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy of the labels; the head reads their states only."""
        if not len(batch.labels):
            # Every prompt was too long.
            return torch.stack([weight.sum() * 0 for weight in self.parameters()]).sum()
        if self._packs:
            # Prefixes of one user share most of their labels' states, with train_positions: all.
            states, which = self._reader.read(batch.ids, batch.rows, batch.places, self.device)
            return self._loss_of(states, which, batch)
        return self._loss_of(self._reader.states(batch.ids, batch.rows, batch.places, self.device), None, batch)

    def _loss_of(self, states: Tensor, which: Tensor | None, batch: TokenBatch) -> Tensor:
        """The loss of a batch whose labels' states are ``[R, H]``: each its own, or those that ``which`` says."""
        logits = self.head.logits(states)
        return self.label_loss(logits, batch) if which is None else self.shared_loss(logits, which, batch)

    def shared_loss(self, logits: Tensor, which: Tensor, batch: TokenBatch) -> Tensor:
        """:meth:`label_loss` where labels share states.

        Args:
            logits: float ``[R, V]``, of each state once.
            which: int64 ``[L]``, the state of each label.
            batch: which labels.

        Returns:
            float32 scalar.
        """
        if type(self).label_loss is not GenerativeRecommender.label_loss:
            return self.label_loss(logits.index_select(0, which), batch)
        # A state's labels are but a few: what all tokens have in common is summed up once a state.
        told = logits[which, batch.labels.to(self.device)].float()
        return (logits.float().logsumexp(1)[which] - told).mean()

    def mean_loss(self, logits: Tensor, soft: SoftLabels, loss: SoftLabelLoss, counted: Tensor | None = None) -> Tensor:
        """The mean over labels of a loss against soft ones: with all mass on the labels, :meth:`label_loss`'s.

        Args:
            logits: float ``[L, V]``, those of the labels.
            soft: the labels, in numbers of the logits' columns.
            loss: of each; over the legal tokens where :attr:`legal_only` says so.
            counted: bool ``[L]``, which of them count; ``None``, all.

        Returns:
            float32 scalar; 0 where no label counts.
        """
        losses = loss.of_positions(logits, soft)
        if counted is None:
            return losses.mean()
        return losses.where(counted, 0).sum() / counted.sum().clamp(min=1)

    def label_loss(self, logits: Tensor, batch: TokenBatch) -> Tensor:
        """Mean cross-entropy of the labels; where a wrapper (TCA4Rec) puts labels of its own.

        Args:
            logits: float ``[L, V]``, those of the batch's labels.
            batch: which labels.

        Returns:
            float32 scalar.
        """
        return F.cross_entropy(logits, batch.labels.to(self.device))

    def calculate_loss(self, interaction: Any) -> Tensor:
        """The loss of a batch of the train loader."""
        return self.stage_loss(FINE_TUNING, self.training_batch(interaction))
