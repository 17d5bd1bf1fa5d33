"""AlignTokenRec: a causal language model that reads histories as item tokens and generates the next item's.

Items become tokens first (``properties/item_tokens``: alignment tokenization of a collaborative model's embeddings).
The tokens join the language model's vocabulary, untrained, and it is fine-tuned on instructions of several tasks. Items
are ranked by beam search among the tokens of items alone.

Source: Li et al., "Semantic Convergence: Harmonizing Recommender Systems via Two-Stage Alignment and Behavioral
Semantic Tokenization", AAAI 2025, arXiv 2412.13771; prompts and training as in LC-Rec (Zheng et al., ICDE 2024, arXiv
2311.09049), on which it builds. What the paper leaves open is a setting, explained in
``properties/model/AlignTokenRec.yaml``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.adapter import Adapter, adapt, check_adapter
from recbole_llm.backbone.code_tokens import extend
from recbole_llm.backbone.codebook_rows import hidden_widths
from recbole_llm.backbone.packed import PackedReader
from recbole_llm.data.instructions import (
    INFERENCE,
    InstructionWriter,
    TokenBatch,
    read_templates,
)
from recbole_llm.data.prompts import Ragged, check_history_length
from recbole_llm.data.task_loader import history_groups
from recbole_llm.data.token_table import TokenTable
from recbole_llm.decoding.beam_search import BeamSearch
from recbole_llm.decoding.level_search import LevelSearch
from recbole_llm.errors import UserError
from recbole_llm.itemid.exclusion import Exclusion
from recbole_llm.model.guided import GuidedSearch
from recbole_llm.tasks import active_tasks, known_tasks, number
from recbole_llm.tasks.behaviour import SEQUENTIAL

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone
    from recbole_llm.itemid.item_tokens import ItemTokens

logger = logging.getLogger("recbole_llm")

FINE_TUNING = "fine_tuning"


class AlignTokenRec(GuidedSearch, SequentialRecommender):
    """AlignTokenRec (arXiv 2412.13771) as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    input_type = InputType.POINTWISE
    train_view = "tasks"
    parts: tuple[str, ...] = ("embedding_model", *GuidedSearch.guides)
    item_parts = ("embedding_model",)
    stages = (FINE_TUNING,)
    ranking = "beam"

    backbone: Backbone
    item_tokens: ItemTokens
    # Which of the prompts of inference is asked.
    asked_with = 0

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        check_adapter(config)
        hidden_widths(config)
        self.config = config
        if max(config["topk"]) > config["beams"]:
            raise UserError(
                f"topk asks for {max(config['topk'])} items and the search keeps {config['beams']} beams; "
                f"set beams to {max(config['topk'])}"
            )
        self.history_length: int = config["history_length"]
        check_history_length(self.history_length, self.max_seq_length)
        self.tasks = active_tasks(config)
        # Asked with all its templates, whether or not it is trained.
        asked = [known_tasks()[SEQUENTIAL]] if config["inference_prompts"] == "all" else []
        self.templates = read_templates(config["prompts"], list(dict.fromkeys([*self.tasks, *asked])))
        self._train_items = torch.from_numpy(dataset.train_histories.items).long()
        self._moments = torch.arange(len(self._train_items))
        self._search: tuple[Tensor, BeamSearch] | None = None

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
        self.adapter: Adapter | None = adapt(backbone.decoder, config)
        first = backbone.embed_tokens.num_embeddings
        self.code_tokens, own, self.__dict__["head"] = extend(
            backbone, head_model, item_tokens.size, codebook, hidden_widths(config)
        )
        self.head_weight: nn.Parameter | None = own if config["adapter"] == "full" else None
        self.take_item_tokens(item_tokens)
        self._lm_ids = first + torch.arange(item_tokens.size)
        self.to(self.device)
        self._reader = PackedReader(backbone.decoder)
        prompts = {
            task.name: self.templates.instructions(task.name, list(texts), only_first=config["prompt_set"] == "first")
            for task in self.tasks
            if not task.reads or set(task.reads) & set(texts)
        }
        asked = SEQUENTIAL if config["inference_prompts"] == "all" else INFERENCE
        prompts[INFERENCE] = [wording._replace(answer="") for wording in self.templates.instructions(asked, [])]
        self.prompts_asked = len(prompts[INFERENCE])
        fills = {
            place: own
            if isinstance(own, TokenTable)
            else TokenTable.of(backbone.encode_batch(own), config["text_tokens"])
            for place, own in texts.items()
        }
        self._write_for = partial(
            InstructionWriter,
            prompts,
            backbone.encode_batch,
            bos_id=backbone.bos_id,
            eos_id=backbone.eos_id,
            separator=self.templates.separator,
            texts=fills,
            label_history=config["train_positions"] == "all",
            title_separator=self.templates.title_separator,
            title_tokens=config["history_title_tokens"],
        )
        self._make_writer()

    def _make_writer(self) -> None:
        """Prompts of the items that there are; what does not fit is left out or made shorter."""
        self.writer = self._write_for(items=self._lm_tokens())
        config, longest = self.config, self.writer.longest(self.history_length)
        context = getattr(self.backbone.decoder.config, "max_position_embeddings", None)
        rooms = {"prompt_tokens allows": config["prompt_tokens"], "the language model has": context}
        given = {name: room for name, room in rooms.items() if room is not None}
        if not given or longest <= min(given.values()):
            return
        name, room = min(given.items(), key=lambda pair: pair[1])
        if config["long_prompts"] == "refuse":
            raise UserError(
                f"prompts take up to {longest} tokens, {name} {room}; lower history_length or text_tokens, or set "
                "long_prompts: truncate or drop"
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

    def _lm_tokens(self) -> Ragged:
        """The language model's ids of every item's tokens."""
        return Ragged(self._lm_ids[self.item_tokens.tokens], self.item_tokens.offsets)

    def enter_items(self, tokens: ItemTokens, tie_order: Tensor) -> None:
        """Let items that came after training be shown and found; nothing that was learned changes.

        Args:
            tokens: of every item, those that were there first under the ids they had; of the vocabulary that was
                trained.
            tie_order: all item ids, int64 ``[n_items]``.
        """
        self.take_item_tokens(tokens)
        self.n_items, self._tie_order, self._search = tokens.n_items, tie_order, None
        self._make_writer()

    def wording(self) -> list[Any]:
        """What the prompts are made of, for a fingerprint."""
        return [self.templates.wrapper, self.templates.separator, self.templates.title_separator, self.templates.tasks]

    # Training

    def begin_stage(self, stage: str) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Free what trains: the new tokens' rows, and what ``adapter`` says of the language model.

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
        """Prompts and answers of the train loader's samples; templates by torch's own generator."""
        starts, stops = interaction["start"], interaction["stop"]
        groups = history_groups(starts, stops)
        templates = self.writer.draw(interaction["task"], torch.default_generator, stops > starts, groups)
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
        states = self._reader.states(batch.ids, batch.rows, batch.places, self.device)
        return self.label_loss(self.head.logits(states), batch)

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

    # Inference

    def train(self, mode: bool = True) -> AlignTokenRec:
        """Training or evaluation mode; the search is made anew, as weights may have changed."""
        self._search = None
        return super().train(mode)

    def searcher(self, candidates: Tensor) -> BeamSearch:
        """The search among some items, with the weights as they are.

        Args:
            candidates: bool ``[n_items]``, the items that may be found.
        """
        candidates = candidates.cpu()
        if self._search is None or not torch.equal(self._search[0], candidates):
            tokens = self.item_tokens
            kept = candidates.repeat_interleave(tokens.lengths)
            offsets = torch.cat([tokens.offsets[:1], (tokens.lengths * candidates).cumsum(0)])
            more = {"filter_items": self.config["filter_items"]} if self.config["constraint"] == "level" else {}
            search = (LevelSearch if more else BeamSearch)(
                self.backbone.decoder, self.head.for_search(),
                replace(tokens, offsets=offsets, tokens=tokens.tokens[kept]),
                beams=self.config["beams"], lm_ids=self._lm_ids, normaliser=self.config["normaliser"],
                tie_order=self._tie_order, **more,
            )  # fmt: skip
            self._search = candidates, search
        return self._search[1]

    @property
    def invalid_share(self) -> float | None:
        """Of the last evaluation, the share of sequences that no item has; ``None`` where the search allows none."""
        search = self._search[1] if self._search else None
        return search.invalid_share if isinstance(search, LevelSearch) else None

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores over the catalogue with nothing excluded but the padding item, ``[B, n_items]``."""
        none = torch.empty(0, dtype=torch.long)
        return self.full_sort_predict_excluding(interaction, none, none, torch.ones(self.n_items, dtype=torch.bool))

    @torch.no_grad()
    def full_sort_predict_excluding(self, interaction: Any, rows: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
        """Scores over the catalogue: log-probabilities of the items that were found, one value below them for others.

        Args:
            interaction: users' item lists (0-padded on the right, oldest first).
            rows: int64 ``[E]`` rows of the batch.
            items: int64 ``[E]``; ``items[e]`` may not be recommended in row ``rows[e]``.
            candidates: bool ``[n_items]``.

        Returns:
            ``[B, n_items]``: finite, but ``-inf`` for the padding item and what may not be recommended.
        """
        lists, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu().unsqueeze(1)
        places = torch.arange(lists.shape[1])
        history = Ragged.from_padded(lists, (places < lengths) & (places >= lengths - self.history_length))
        excluded = self._by_row(len(lists), rows.cpu(), items.cpu())
        candidates = candidates.cpu().clone()
        candidates[0] = False
        search = self.searcher(candidates)
        scores = torch.full((len(lists), self.n_items), -torch.inf, device=self.device)
        scores[:, candidates.to(self.device)] = 0.0
        for part in torch.arange(len(lists)).split(self.config["inference_batch_size"]):
            asked, barred = self.writer.ask(history.take(part), self.asked_with), excluded.take(part)
            prompts = asked.values.split(asked.lengths.tolist())
            exclude = Exclusion.from_lists(search.trie, barred.offsets, barred.values)
            found = search(prompts, exclude=exclude, guide=self.guide(interaction, part, search.trie))
            own = scores[part.to(self.device)]
            if isinstance(search, LevelSearch):
                legal = own.isfinite()
                legal[barred.rows.to(self.device), barred.values.to(self.device)] = False
                found = search.placed(found, legal)
            least = found.scores.masked_fill(found.items == 0, torch.inf).amin(1, keepdim=True)
            # Below the least of them by one; equal, so that the tie order alone ranks them.
            own = own + torch.where(least.isfinite(), least - 1.0, 0.0)
            scores[part.to(self.device)] = own.scatter(1, found.items, found.scores)
        scores[:, 0] = -torch.inf
        scores[rows.to(self.device), items.to(self.device)] = -torch.inf
        return scores

    @staticmethod
    def _by_row(count: int, rows: Tensor, items: Tensor) -> Ragged:
        order = rows.argsort(stable=True)
        return Ragged.from_lengths(items[order], torch.bincount(rows, minlength=count))

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of the items in the interaction, one a row."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID].to(scores.device).unsqueeze(1)).squeeze(1)
