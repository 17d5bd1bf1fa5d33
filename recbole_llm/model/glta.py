"""GLTA: graph-language token alignment.

A graph model's user and item embeddings are projected into the input space of a frozen causal LM, where they stand as
soft tokens in an instruction prompt; a linear head, the GLLM, turns the LM's last states at k response slots after the
prompt into logits over the item catalogue. Only the projectors and the GLLM are trained.

Source: Yang et al., "Training Large Recommendation Models via Graph-Language Token Alignment", WWW 2025 Companion,
arXiv 2502.18757. What the paper leaves open is a setting, explained in ``properties/model/GLTA.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.soft_tokens import SoftPromptDecoder, Stream
from recbole_llm.data import prompts
from recbole_llm.data.prompts import Prompt, Ragged, soft_ids
from recbole_llm.errors import UserError
from recbole_llm.model import glta_sampling as sampling
from recbole_llm.model.glta_ranking import first_k_scores, lift_picks, pick_best

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone

ALIGN_ITEMS = "item_text_alignment"
ALIGN_USERS = "user_item_alignment"


@dataclass(frozen=True)
class PromptBatch:
    """The index tensors of one training step; soft tokens are rows of ``[users ; items]``.

    Attributes:
        ids: int64 ``[B, T]``, the prompts after the shared prefix, then the slots, filled up on the right.
        places: int64 ``[B, S]``, where the slots stand.
        users: int64 ``[U]``, users whose projected embedding is a soft token.
        items: int64 ``[M]``, items likewise.
        targets: int64 ``[B, S]``, an item id or -100.
    """

    ids: Tensor
    places: Tensor
    users: Tensor
    items: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> PromptBatch:
        """The same on a device."""
        parts = (self.ids, self.places, self.users, self.items, self.targets)
        return PromptBatch(*(part.to(device, non_blocking=True) for part in parts))

    def targets_count(self) -> int:
        """How many slots have a target."""
        return int((self.targets != sampling.IGNORE).sum())

    def share(self, rank: int, count: int) -> PromptBatch:
        """The prompts of one of ``count`` processes; soft tokens keep their rows, so all of them stay."""
        mine = slice(rank, None, count)
        return replace(self, ids=self.ids[mine], places=self.places[mine], targets=self.targets[mine])


class StageBatches:
    """One epoch of a stage's batches, drawn as it is read.

    Args:
        model: whose samples they are.
        stage: the stage.
        generator: the source of all randomness; read on, the same state gives the same epoch.
    """

    def __init__(self, model: GLTA, stage: str, generator: Generator) -> None:
        self._model, self._stage, self._generator = model, stage, generator
        if stage == ALIGN_ITEMS:
            # Items in groups, the last one filled from the front: every prompt has the same number of slots.
            count, size = model.n_items - 1, model.items_per_prompt
            self._rows = torch.arange(-(-count // size) * size) % count + 1
            self._group, self._batch = size, model.config["alignment_batch_size"] * size
        else:
            self._rows = model.trainable_users.repeat(model.config["samples_per_user"])
            self._group, self._batch = 1, model.config["train_batch_size"]

    def __len__(self) -> int:
        return -(-len(self._rows) // self._batch)

    def __iter__(self) -> Iterator[PromptBatch]:
        order = torch.randperm(len(self._rows), generator=self._generator)
        for rows in self._rows[order].split(self._batch):
            if self._stage == ALIGN_ITEMS:
                yield self._model.alignment_batch(rows.view(-1, self._group), self._generator)
            else:
                yield self._model.user_batch(rows, self._generator)


def _split_by_time(eval_args: dict[str, Any]) -> bool:
    """Whether a split is by time; one at a global moment is, whatever its order says."""
    return eval_args["order"] == "TO" or "TS" in (eval_args.get("split") or {})


class GLTA(SequentialRecommender):
    """GLTA (arXiv 2502.18757) as a RecBole recommender.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.
    """

    input_type = InputType.POINTWISE
    train_view = "users"
    parts = ("graph_model",)
    needs_item_text = True
    stages: tuple[str, ...] = (ALIGN_ITEMS, ALIGN_USERS)

    backbone: Backbone
    user_embeddings: Tensor
    item_embeddings: Tensor
    padding_logits: Tensor

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.config = config
        self.n_users = dataset.num(self.USER_ID)
        if not config["item_alignment"]:
            self.stages = (ALIGN_USERS,)
        if config["slot_input"] == "item" and config["inference"] == "first_k":
            raise UserError("slot_input: item feeds each slot the item before it; it needs inference: ar or fl")
        if config["history_input"] == "history" and config["history_length"] > self.max_seq_length:
            raise UserError(
                f"history_length {config['history_length']} is above MAX_ITEM_LIST_LENGTH {self.max_seq_length}; "
                f"set MAX_ITEM_LIST_LENGTH to {config['history_length']} as well"
            )
        targets = config["targets"]
        self.by_time = targets == "next" or (targets == "auto" and _split_by_time(config["eval_args"]))
        self.slots: int = config["response_slots"]
        self.items_per_prompt = min(config["alignment_items_per_prompt"], self.n_items - 1)
        self.history_length: int = config["history_length"] if config["history_input"] == "history" else 0
        self.histories = sampling.unique_histories(dataset.train_histories.offsets, dataset.train_histories.items)
        self.trainable_users = self.histories.lengths.nonzero().squeeze(1)
        self._user_names = dataset.field2id_token[self.USER_ID]

    def prepare(
        self,
        *,
        user_embeddings: Tensor,
        item_embeddings: Tensor,
        backbone: Backbone,
        item_texts: Sequence[str],
        profiles: Sequence[str] | None,
        predictions: Sequence[str] | None,
    ) -> None:
        """Take in what the stages before made, and build the trainable layers.

        Args:
            user_embeddings: ``[n_users, d]``, the graph model's; kept as they are.
            item_embeddings: ``[n_items, d]``; likewise.
            backbone: the frozen language model.
            item_texts: descriptions by internal item id, ``""`` for the padding item.
            profiles: profile tags by internal user id, one string each; ``None`` leaves their line out.
            predictions: predicted interests likewise.

        Raises:
            UserError: the longest prompt does not fit the language model.
        """
        config, width = self.config, backbone.hidden_size
        # Not a submodule: the language model is no part of the model's state, parameters or device moves.
        self.__dict__["backbone"] = backbone
        self.register_buffer("user_embeddings", user_embeddings.detach().float(), persistent=False)
        self.register_buffer("item_embeddings", item_embeddings.detach().float(), persistent=False)
        padding = torch.zeros(self.n_items).index_fill_(0, torch.tensor(0), -torch.inf)
        self.register_buffer("padding_logits", padding, persistent=False)
        table = backbone.embed_tokens.weight
        self._token_scale = float(table.detach().float().square().mean().sqrt())
        self.user_projector = self._projector(self.user_embeddings, width) if config["user_alignment"] else None
        self.item_projector = self._projector(self.item_embeddings, width)
        self.gllm = nn.Linear(width, width if config["gllm"] == "tied" else self.n_items)
        self.item_bias = nn.Parameter(torch.zeros(self.n_items)) if config["gllm"] == "tied" else None
        self.dropout = nn.Dropout(config["gllm_dropout"])
        self.slot_inputs: nn.Parameter | None = None
        if config["slot_input"] == "learned":
            inputs = max(self.slots, self.items_per_prompt) - 1
            self.slot_inputs = nn.Parameter(torch.randn(inputs, width) * self._token_scale)
        # Some models keep their padding row at zero, which says nothing to attention or normalisation.
        self._slot_id = backbone.pad_id if bool(table[backbone.pad_id].any()) else backbone.eos_id
        self.to(self.device)
        self._tokenise(item_texts, profiles, predictions)

    def _projector(self, embeddings: Tensor, width: int) -> nn.Linear:
        """Equations 1 and 2: ``Linear(d -> H)``, starting at the size of the language model's own token embeddings.

        The paper prints ``W`` as d x d, which cannot reach the language model's space.
        """
        projector = nn.Linear(embeddings.shape[1], width)
        size = float(embeddings.square().sum(1).mean().sqrt()) or 1.0
        nn.init.normal_(projector.weight, std=self._token_scale / size)
        nn.init.zeros_(projector.bias)
        return projector

    def _tokenise(
        self, item_texts: Sequence[str], profiles: Sequence[str] | None, predictions: Sequence[str] | None
    ) -> None:
        """Tokenise templates and texts, and see that the longest prompt fits."""
        backbone, config = self.backbone, self.config
        template = prompts.user_item_template(
            items=config["history_input"] == "history",
            profile=profiles is not None,
            prediction=predictions is not None,
        )
        limit = config["text_tokens"]
        self._fills: dict[str, Ragged] = {}
        for name, texts in ((prompts.PROFILE, profiles), (prompts.PREDICTION, predictions)):
            if texts is not None:
                self._fills[name] = Ragged.from_lists([backbone.encode(text) for text in texts], limit)
        if not config["user_alignment"]:
            ids = [backbone.encode(f"user_{token}") for token in self._user_names]
            self._fills[prompts.USER] = Ragged.from_lists(ids)
        self._prompts = {ALIGN_USERS: Prompt(template, backbone.encode, backbone.bos_id)}
        longest = {ALIGN_USERS: self.history_length + 1 + self.slots}
        for fill in self._fills.values():
            longest[ALIGN_USERS] += int(fill.lengths.max())
        if ALIGN_ITEMS in self.stages:
            cut = config["alignment_description_tokens"]
            self._descriptions = Ragged.from_lists([backbone.encode(text) for text in item_texts], cut)
            self._separator = torch.tensor(backbone.encode(prompts.SEPARATOR), dtype=torch.long)
            self._prompts[ALIGN_ITEMS] = Prompt(prompts.ITEM_TEXT_ALIGNMENT, backbone.encode, backbone.bos_id)
            each = int(self._descriptions.lengths.max()) + len(self._separator) + 2
            longest[ALIGN_ITEMS] = self.items_per_prompt * each
        self._readers = {}
        room = getattr(backbone.decoder.config, "max_position_embeddings", None)
        for stage, prompt in self._prompts.items():
            fixed = len(prompt.prefix) + prompt.fixed_length
            if room is not None and fixed + longest[stage] > room:
                raise UserError(
                    f"the prompts of {stage} take up to {fixed + longest[stage]} tokens, the language model has "
                    f"{room}; lower history_length, text_tokens, alignment_items_per_prompt or "
                    "alignment_description_tokens"
                )
            self._readers[stage] = SoftPromptDecoder(backbone.decoder, backbone.embed_tokens, prompt.prefix)

    # Training

    def begin_stage(self, stage: str) -> list[nn.Parameter]:
        """Freeze and free parameters for a stage.

        Stage 2 (``item_text_alignment``) trains the item projector and the GLLM, stage 3 (``user_item_alignment``) the
        user projector and the GLLM, which is carried over; the item projector only without stage 2 or where asked.

        Returns:
            The parameters that the stage trains.
        """
        items = stage == ALIGN_ITEMS or not self.config["item_alignment"] or self.config["train_item_projector"]
        groups = [
            (self.item_projector, items),
            (self.user_projector, stage == ALIGN_USERS),
            (self.gllm, True),
        ]
        for module, trained in groups:
            if module is not None:
                module.requires_grad_(trained)
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def stage_batches(self, stage: str, generator: Generator) -> StageBatches:
        """One epoch of a stage's batches, with a length."""
        return StageBatches(self, stage, generator)

    def stage_loss(self, stage: str, batch: PromptBatch) -> Tensor:
        """Equation 3: mean cross-entropy of the target items at the slots that have one."""
        batch = batch.to(self.device)
        soft = self._soft_tokens(batch.users, batch.items)
        logits = self.item_logits(self._readers[stage].states(batch.ids, soft, batch.places).float())
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=sampling.IGNORE)

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Stage 3's loss for a batch of users."""
        return self.stage_loss(ALIGN_USERS, self.training_batch(interaction))

    def training_batch(self, interaction: Any) -> PromptBatch:
        """Samples for a batch of users, by torch's own generator, which a resumed run restores."""
        return self.user_batch(interaction[self.USER_ID].cpu(), torch.default_generator)

    def alignment_batch(self, items: Tensor, generator: Generator) -> PromptBatch:
        """Template (a) for items int64 ``[B, m]``: their descriptions shuffled, then their soft tokens."""
        batch, size = items.shape
        order = torch.rand(batch, size, generator=generator).argsort(1)
        described = items.gather(1, order)
        separator = prompts.repeated(self._separator, batch)
        runs: list[Ragged] = []
        for column in described.unbind(1):
            runs += [self._descriptions.take(column), separator]
        rows = torch.arange(batch * size).view(batch, size)
        soft = Ragged.from_lengths(soft_ids(rows).flatten(), torch.full((batch,), size))
        fills = {prompts.DESCRIPTIONS: prompts.join(runs[:-1]), prompts.ITEMS: soft}
        targets, target_rows = items, rows
        if self.config["target_order"] == "description":
            targets, target_rows = described, rows.gather(1, order)
        suffix = self._prompts[ALIGN_ITEMS].suffix(fills)
        ids, places = self._with_slots(suffix, self._slot_ids(batch, size, batch * size, named=target_rows), size)
        return PromptBatch(ids, places, items.new_empty(0), items.flatten(), targets)

    def user_batch(self, users: Tensor, generator: Generator) -> PromptBatch:
        """Template (b) for users int64 ``[B]``, with a sampled history and targets out of their train items."""
        own, config = self.histories.take(users), self.config
        if self.by_time:
            window = config["target_window"] or self.slots
            shown, wanted = sampling.next_sample(own, window, self.history_length, generator)
        else:
            shown, wanted = sampling.random_sample(own, self.slots, self.history_length, generator)
        shown = sampling.drop(shown, config["history_dropout"], generator)
        targets = sampling.slot_targets(wanted, self.slots, config["target_fill"] == "repeat")
        suffix, soft_users, soft_items = self._user_prompt(users, shown)
        soft_rows, named = len(soft_users) + len(soft_items), None
        if config["slot_input"] == "item":
            # Teacher forcing: a slot reads the target of the slot before it; what a slot without one reads is idle.
            named = soft_rows + torch.arange(targets.numel()).view(targets.shape)
            soft_items = torch.cat([soft_items, targets.clamp_min(0).flatten()])
        inputs = self._slot_ids(len(users), self.slots, soft_rows, named, users=config["user_alignment"])
        ids, places = self._with_slots(suffix, inputs, self.slots)
        return PromptBatch(ids, places, soft_users, soft_items, targets)

    def _user_prompt(self, users: Tensor, history: Ragged) -> tuple[Ragged, Tensor, Tensor]:
        """Template (b) after its prefix, and the users and items of its soft tokens."""
        fills = {name: fill.take(users) for name, fill in self._fills.items()}
        soft_users = users if self.config["user_alignment"] else users.new_empty(0)
        if self.config["user_alignment"]:
            one = torch.ones_like(users)
            fills[prompts.USER] = Ragged.from_lengths(soft_ids(torch.arange(len(users))), one)
        soft_items = history.values
        rows = torch.arange(len(soft_items)) + len(soft_users)
        fills[prompts.ITEMS] = Ragged(soft_ids(rows), history.offsets)
        return self._prompts[ALIGN_USERS].suffix(fills), soft_users, soft_items

    def _slot_ids(
        self, rows: int, slots: int, soft_rows: int, named: Tensor | None = None, users: bool = False
    ) -> Tensor:
        """What the slots of each prompt read.

        Slot 0 is the prompt's own last token and reads nothing more, but with ``slot_input: user`` all slots are alike.

        Args:
            rows: prompts.
            slots: response slots.
            soft_rows: soft tokens before the learned slot inputs, if there are any.
            named: int64 ``[rows, slots]``, soft tokens of the items that the slots must name, for ``slot_input: item``.
            users: whether the first ``rows`` soft tokens are the prompts' users, for ``slot_input: user``.

        Returns:
            int64 ``[rows, slots - 1]``, or ``[rows, slots]`` where slot 0 reads one as well.
        """
        kind = self.config["slot_input"]
        if kind == "learned":
            return soft_ids(soft_rows + torch.arange(slots - 1)).expand(rows, -1)
        if kind == "item" and named is not None:
            return soft_ids(named[:, : slots - 1])
        if kind == "user" and users:
            return soft_ids(torch.arange(rows)).unsqueeze(1).expand(-1, slots)
        return torch.full((rows, slots - 1), self._slot_id)

    def _with_slots(self, prompt: Ragged, inputs: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The prompts with the slots' inputs behind them: padded ids ``[B, T]``, and places ``[B, slots]``."""
        tail = Ragged.from_padded(inputs, torch.ones_like(inputs, dtype=torch.bool))
        first = prompt.lengths - (slots - inputs.shape[1])
        return prompts.join([prompt, tail]).padded(self._slot_id), first.unsqueeze(1) + torch.arange(slots)

    # The forward pass

    def _soft_tokens(self, users: Tensor, items: Tensor) -> Tensor:
        """``[U + M (+ learned slots), H]``: the projected users, the projected items, the learned slot inputs."""
        parts = [self.item_projector(self.item_embeddings[items])]
        if self.user_projector is not None:
            parts.insert(0, self.user_projector(self.user_embeddings[users]))
        if self.slot_inputs is not None:
            parts.append(self.slot_inputs)
        return torch.cat(parts)

    def item_logits(self, states: Tensor) -> Tensor:
        """GLLM: logits over the catalogue.

        Args:
            states: ``[..., H]`` slot states.

        Returns:
            ``[..., n_items]``; the padding item's are ``-inf``, so that it has no share in any probability.
        """
        logits = self.gllm(self.dropout(states))
        if self.item_bias is not None:
            # The factor is a reparametrisation that starts the logits at a size of about one.
            tokens = self.item_projector(self.item_embeddings) / (self._token_scale * states.shape[-1] ** 0.5)
            logits = F.linear(logits, tokens, self.item_bias)
        return logits + self.padding_logits

    # Inference

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores over the catalogue with nothing excluded but the padding item, ``[B, n_items]``."""
        none = torch.empty(0, dtype=torch.long)
        candidates = torch.ones(self.n_items, dtype=torch.bool)
        return self.full_sort_predict_excluding(interaction, none, none, candidates)

    @torch.no_grad()
    def full_sort_predict_excluding(self, interaction: Any, rows: Tensor, items: Tensor, candidates: Tensor) -> Tensor:
        """Scores over the catalogue, with exclusion inside the search so that every slot names a legal item.

        Args:
            interaction: users and their item lists (0-padded on the right, oldest first).
            rows: int64 ``[E]`` rows of the batch.
            items: int64 ``[E]``; ``items[e]`` may not be recommended in row ``rows[e]``.
            candidates: bool ``[n_items]``.

        Returns:
            ``[B, n_items]``, finite for every item that may be recommended, ``-inf`` for the others.
        """
        users = interaction[self.USER_ID].cpu()
        allowed = candidates.to(self.device).expand(len(users), -1).clone()
        allowed[:, 0] = False
        allowed[rows.to(self.device), items.to(self.device)] = False
        lists, lengths = interaction[self.ITEM_SEQ].cpu(), interaction[self.ITEM_SEQ_LEN].cpu().unsqueeze(1)
        places = torch.arange(lists.shape[1])
        history = Ragged.from_padded(lists, (places < lengths) & (places >= lengths - self.history_length))
        chunks = torch.arange(len(users)).split(self.config["inference_batch_size"])
        return torch.cat([self._scores(users[part], history.take(part), allowed[part]) for part in chunks])

    def _scores(self, users: Tensor, history: Ragged, allowed: Tensor) -> Tensor:
        """Scores of some users at once, by the mode of inference."""
        suffix, soft_users, soft_items = self._user_prompt(users, history)
        soft = self._soft_tokens(soft_users.to(self.device), soft_items.to(self.device))
        reader = self._readers[ALIGN_USERS]
        if self.config["inference"] == "ar":
            ids = suffix.padded(self._slot_id).to(self.device)
            return self._autoregressive_scores(reader.stream(ids, soft, suffix.lengths.to(self.device)), allowed)
        slots = 1 if self.config["inference"] == "fl" else self.slots
        soft_rows = len(soft_users) + len(soft_items)
        inputs = self._slot_ids(len(users), slots, soft_rows, users=self.config["user_alignment"])
        ids, slot_places = self._with_slots(suffix, inputs, slots)
        states = reader.states(ids.to(self.device), soft, slot_places.to(self.device))
        log_probs = self.item_logits(states.float()).log_softmax(-1)
        if slots == 1:
            return log_probs[:, 0].masked_fill(~allowed, -torch.inf)
        return first_k_scores(log_probs, allowed)

    def _autoregressive_scores(self, stream: Stream, allowed: Tensor) -> Tensor:
        """``inference: ar``: each slot reads the projected token of the item that the slot before it named."""
        remaining, total = allowed.clone(), torch.zeros_like(allowed, dtype=torch.float)
        picks: list[Tensor] = []
        for slot in range(self.slots):
            if slot:
                stream.step(self.item_projector(self.item_embeddings[picks[-1]]))
            log_probs = self.item_logits(stream.state.float()).log_softmax(-1)
            picks.append(pick_best(log_probs, remaining))
            total = total + log_probs
        return lift_picks(picks, total / self.slots, allowed)

    def predict(self, interaction: Any) -> Tensor:
        """Scores ``[B]`` of the items in the interaction, one a row."""
        scores = self.full_sort_predict(interaction)
        return scores.gather(1, interaction[self.ITEM_ID].to(scores.device).unsqueeze(1)).squeeze(1)
