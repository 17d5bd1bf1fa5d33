"""GLTA: graph-language token alignment.

A graph model's user and item embeddings are projected into the input space of a frozen causal LM, where they stand as
soft tokens in an instruction prompt; a linear head, the GLLM, turns the LM's last states at k response slots after the
prompt into logits over the item catalogue. Only the projectors and the GLLM are trained, and an adapter if asked for.

Source: Yang et al., "Training Large Recommendation Models via Graph-Language Token Alignment", WWW 2025 Companion,
arXiv 2502.18757. What the paper leaves open is a setting, explained in ``properties/model/GLTA.yaml``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from recbole_llm.backbone.adapter import Adapter, adapt, check_adapter
from recbole_llm.backbone.soft_tokens import SoftPromptDecoder, SoftTokenMean, Stream, token_scale
from recbole_llm.data.prompts import Ragged, check_history_length
from recbole_llm.errors import UserError
from recbole_llm.model import glta_sampling as sampling
from recbole_llm.model.glta_prompts import ALIGN_ITEMS, ALIGN_USERS, PromptBatch, PromptWriter
from recbole_llm.model.glta_ranking import first_k_scores, lift_picks, pick_best

if TYPE_CHECKING:
    from recbole_llm.backbone.base import Backbone


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
        check_adapter(config)
        self.config = config
        self.n_users = dataset.num(self.USER_ID)
        if not config["item_alignment"]:
            self.stages = (ALIGN_USERS,)
        if config["slot_input"] == "item" and config["inference"] == "first_k":
            raise UserError("slot_input: item feeds each slot the item before it; it needs inference: ar or fl")
        if config["history_input"] == "history":
            check_history_length(config["history_length"], self.max_seq_length)
        targets, positions = config["targets"], config["loss_positions"]
        self.by_time = targets == "next" or (targets == "auto" and _split_by_time(config["eval_args"]))
        in_order = self.by_time and config["history_input"] == "history" and config["history_order"] == "time"
        if positions == "all" and not in_order:
            raise UserError(
                "loss_positions: all has each shown item name the one after it; it needs targets: next (or a split by "
                "time), history_input: history and history_order: time"
            )
        self.supervise_history = in_order and positions != "slots"
        self.slot_input: str = config["slot_input"]
        if self.slot_input == "auto":
            self.slot_input = "last" if in_order else "user"
        if config["reader"] == "mean" and config["inference"] == "ar":
            raise UserError("inference: ar reads items one by one through the language model; it needs reader: llm")
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
        # Not a submodule: the language model is no part of the model's state, parameters or device moves; what an
        # adapter trains of it is.
        self.__dict__["backbone"] = backbone
        self.register_buffer("user_embeddings", user_embeddings.detach().float(), persistent=False)
        self.register_buffer("item_embeddings", item_embeddings.detach().float(), persistent=False)
        padding = torch.zeros(self.n_items).index_fill_(0, torch.tensor(0), -torch.inf)
        self.register_buffer("padding_logits", padding, persistent=False)
        self._token_scale = token_scale(backbone.embed_tokens)
        self.user_projector = self._projector(self.user_embeddings, width) if config["user_alignment"] else None
        self.item_projector = self._projector(self.item_embeddings, width)
        self.gllm = nn.Linear(width, width if config["gllm"] == "tied" else self.n_items)
        self.item_bias = nn.Parameter(torch.zeros(self.n_items)) if config["gllm"] == "tied" else None
        self.dropout = nn.Dropout(config["gllm_dropout"])
        self.slot_inputs: nn.Parameter | None = None
        if config["slot_input"] == "learned":
            inputs = max(self.slots, self.items_per_prompt) - 1
            self.slot_inputs = nn.Parameter(torch.randn(inputs, width) * self._token_scale)
        self.adapter: Adapter | None = adapt(backbone.decoder, config)
        self.to(self.device)
        self._writer = PromptWriter(
            config,
            backbone,
            slots=self.slots,
            slot_input=self.slot_input,
            history_length=self.history_length,
            user_names=self._user_names,
            item_texts=item_texts if ALIGN_ITEMS in self.stages else None,
            items_per_prompt=self.items_per_prompt,
            profiles=profiles,
            predictions=predictions,
        )
        self._readers = self._read_with(self._writer)

    def _projector(self, embeddings: Tensor, width: int) -> nn.Linear:
        """Equations 1 and 2: ``Linear(d -> H)``, starting at the size of the language model's own token embeddings.

        The paper prints ``W`` as d x d, which cannot reach the language model's space.
        """
        projector = nn.Linear(embeddings.shape[1], width)
        size = float(embeddings.square().sum(1).mean().sqrt()) or 1.0
        nn.init.normal_(projector.weight, std=self._token_scale / size)
        nn.init.zeros_(projector.bias)
        return projector

    def _read_with(self, writer: PromptWriter) -> dict[str, Any]:
        """What turns each stage's prompts into states; sees first that the longest one fits the language model."""
        backbone = self.backbone
        if self.config["reader"] == "mean":
            return {stage: SoftTokenMean() for stage in writer.prompts}
        room = getattr(backbone.decoder.config, "max_position_embeddings", None)
        for stage in writer.prompts:
            if room is not None and writer.longest(stage) > room:
                raise UserError(
                    f"the prompts of {stage} take up to {writer.longest(stage)} tokens, the language model has {room}; "
                    "lower history_length, text_tokens, alignment_items_per_prompt or alignment_description_tokens"
                )
        trained = self.adapter is not None
        return {
            stage: SoftPromptDecoder(backbone.decoder, backbone.embed_tokens, prompt.prefix, trained=trained)
            for stage, prompt in writer.prompts.items()
        }

    # Training

    def begin_stage(self, stage: str) -> list[nn.Parameter] | list[dict[str, Any]]:
        """Freeze and free parameters for a stage.

        Stage 2 (``item_text_alignment``) trains the item projector and the GLLM, stage 3 (``user_item_alignment``) the
        user projector and the GLLM, which is carried over; the item projector only without stage 2 or where asked. An
        adapter trains in both.

        Returns:
            The parameters that the stage trains, as an optimizer takes them; an adapter's are a group apart, with a
            learning rate of its own.
        """
        items = stage == ALIGN_ITEMS or not self.config["item_alignment"] or self.config["train_item_projector"]
        groups = [
            (self.item_projector, items),
            (self.user_projector, stage == ALIGN_USERS),
            (self.gllm, True),
            (self.adapter, True),
        ]
        for module, trained in groups:
            if module is not None:
                module.requires_grad_(trained)
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return trained if self.adapter is None else self.adapter.groups(trained)

    def read_once(self, stage: str) -> None:
        """Read what one reading of serves a whole stage: what its prompts open with."""
        reader = self._readers[stage]
        if isinstance(reader, SoftPromptDecoder):
            reader.read_prefix()

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
        return self._writer.alignment_batch(items, generator)

    def user_batch(self, users: Tensor, generator: Generator) -> PromptBatch:
        """Template (b) for users int64 ``[B]``, with a sampled history and targets out of their train items."""
        own, config = self.histories.take(users), self.config
        if self.by_time:
            window = config["target_window"] or self.slots
            sample = sampling.next_sample(own, window, self.history_length, generator)
        else:
            sample = sampling.random_sample(own, self.slots, self.history_length, generator)
        sample = sample.drop(config["history_dropout"], generator)
        hidden = None
        if config["user_dropout"]:
            hidden = torch.rand(len(users), generator=generator) < config["user_dropout"]
        return self._writer.user_batch(users, sample, hidden, following=self.supervise_history)

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
        writer = self._writer
        prompt = writer.user_prompts(users, history)
        suffix, soft = prompt.suffix, self._soft_tokens(prompt.users.to(self.device), prompt.items.to(self.device))
        reader = self._readers[ALIGN_USERS]
        # Where each slot reads the item before, the first reads what it did in training.
        slots = self.slots if self.config["inference"] == "first_k" else 1
        ids, slot_places = writer.with_slots(suffix, writer.slot_ids(len(users), slots, prompt), slots)
        if self.config["inference"] == "ar":
            stream = reader.stream(ids.to(self.device), soft, (slot_places[:, 0] + 1).to(self.device))
            return self._autoregressive_scores(stream, allowed)
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
