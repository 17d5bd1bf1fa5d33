"""What recommenders share whose prompts hold a collaborative model's vectors, projected, beside the titles.

The vectors are tokens behind the language model's vocabulary (:mod:`recbole_llm.backbone.projected_tokens`): an item of
a history is its title and its vector, and a prompt may have one for the user. Prompts without vectors (``text``) are
the same with the vectors left out. The recommender whose vectors they are is trained first and frozen; the projector
trains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recbole_llm.backbone.projected_tokens import ProjectedTokens, read_projected
from recbole_llm.data.instructions import InstructionWriter, TokenBatch
from recbole_llm.data.prompts import Ragged, join
from recbole_llm.data.templates import templates_of
from recbole_llm.data.token_table import TokenTable
from recbole_llm.errors import UserError
from recbole_llm.model.generative import GenerativeRecommender
from recbole_llm.model.titles import TitleRecommender
from recbole_llm.tasks.base import USER
from recbole_llm.tasks.behaviour import SEQUENTIAL

if TYPE_CHECKING:
    from recbole_llm.training.collaborative_vectors import CollaborativeVectors, Users

TEXT, HYBRID = "text", "hybrid"
# The number of a user that no prompt is of: the padding user of a table, a first interaction among states.
NOBODY = torch.zeros((), dtype=torch.long)


class HybridRecommender(TitleRecommender):
    """A recommender that reads titles with vectors and answers with a title.

    A subclass says which batches are of which prompts (:meth:`kind_of_batch`), whether prompts tell of the user
    (``tells_user``) and the projector's usual hidden width.

    Args:
        config: the run's configuration.
        dataset: RecBole-like, with ``train_histories``.

    Raises:
        UserError: the prompts do not fit the model.
    """

    parts: tuple[str, ...] = ("embedding_model", *GenerativeRecommender.guides)
    item_parts = ("embedding_model",)
    vectors_of = "embedding_model"

    projected: ProjectedTokens
    users: Users | None = None

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        own = {key: config[key] for key in ("prompts", "official_prompt", "domain")}
        self.text_templates = templates_of({**own, "prompts": config["text_prompts"] or config["prompts"]}, self.tasks)
        if self.templates.shown is None or self.text_templates.shown is None:
            raise UserError(f"prompts: {config['model']} needs a file that says under 'shown' how an item is shown")
        self._check_titles(self.text_templates)
        if any(USER in wording.places for wordings in self.text_templates.tasks.values() for wording in wordings):
            raise UserError(f"text_prompts: prompts without vectors have no {{{USER}}}; name a file without")

    def take_vectors(self, vectors: CollaborativeVectors) -> None:
        """Note what the prompts' vectors are; before :meth:`prepare`.

        Args:
            vectors: of a frozen recommender.

        Raises:
            UserError: users are told of and the recommender has no vectors of them, or of another width.
        """
        # Not a submodule: nothing of it trains, and its weights are its own stage's.
        self.__dict__["vectors"] = vectors
        if self.tells_user:
            self.__dict__["users"] = vectors.users(self.max_seq_length)

    def prepare(self, *, backbone: Any, texts: Mapping[str, Sequence[str] | TokenTable], **made: Any) -> None:
        """See :meth:`~recbole_llm.model.generative.GenerativeRecommender.prepare`."""
        self._first_vector = backbone.embed_tokens.num_embeddings
        if self.tells_user:
            # Of no user: each prompt gets the number of its own once it is written.
            texts = {**texts, USER: TokenTable.of([[int(self._user_ids(NOBODY))]])}
        super().prepare(backbone=backbone, texts=texts, **made)

    def _take_tokens(self, item_tokens: Any, head_model: Any, codebook: Tensor | None) -> None:
        super()._take_tokens(item_tokens, head_model, codebook)
        config, items = self.config, self.vectors.items
        hidden = config["projector_width"] or self.usual_width(items.shape[1], self.backbone.hidden_size)
        self.projected = read_projected(self.backbone.decoder, items, self.users, config["projector"], hidden)

    @staticmethod
    def usual_width(vector: int, hidden: int) -> int:
        """The projector's hidden width where no setting names one.

        Args:
            vector: width of the vectors.
            hidden: of the language model.
        """
        raise NotImplementedError

    # Prompts

    def _make_writer(self) -> None:
        write, text = self._write_for, self.text_templates
        asked = {SEQUENTIAL: text.instructions(SEQUENTIAL, [], only_first=self.config["prompt_set"] == "first")}
        own = {**write.keywords, "separator": text.separator}
        # What is asked when items are ranked has vectors; the writer of text is for training alone.
        kinds = {TEXT: partial(InstructionWriter, asked, *write.args[1:], **own), HYBRID: write}
        self._writers: dict[str, InstructionWriter] = {}
        for self._kind, self._write_for in kinds.items():
            super()._make_writer()
            self._writers[self._kind] = self.writer
        self._writers[TEXT].too_long = self.writer.too_long

    def _shown(self) -> Ragged:
        """Titles as ``shown`` of the prompts' file says, with each item's vector or without."""
        titles = super()._shown()
        templates = self.text_templates if self._kind == TEXT else self.templates
        assert templates.shown is not None
        before, between, behind = templates.shown
        vectors = [[] if self._kind == TEXT else [self._first_vector + item] for item in range(len(titles))]
        fixed = self.backbone.encode_batch([before, between, behind])
        whole = [Ragged.from_lists([tokens] * len(titles)) for tokens in fixed]
        return join([whole[0], titles, whole[1], Ragged.from_lists(vectors), whole[2]])

    def wording(self, searched: bool = True) -> list[Any]:
        """What the prompts are made of, for a fingerprint."""
        text = self.text_templates
        return [*super().wording(searched), self.templates.shown, text.wrapper, text.separator, text.shown, text.tasks]

    def _user_ids(self, numbers: Tensor) -> Tensor:
        return self._first_vector + self.n_items + numbers

    # Training

    def kind_of_batch(self) -> str:
        """Whether the next batch of training has prompts of ``text`` or ``hybrid`` ones."""
        raise NotImplementedError

    def training_batch(self, interaction: Any) -> TokenBatch:
        """Prompts and answers of the train loader's samples, with vectors or without."""
        kind = self.kind_of_batch()
        self.writer = self._writers[kind]
        try:
            batch = super().training_batch(interaction)
        finally:
            self.writer = self._writers[HYBRID]
        if kind == TEXT or self.users is None:
            return batch
        # The user as he was right before the interaction that the prompt asks for.
        return replace(batch, ids=self._told_users(batch.ids, self.users.at(batch.moments).unsqueeze(1)))

    def _told_users(self, ids: Tensor, numbers: Tensor) -> Tensor:
        """Prompts with users' own ids in the place of nobody's."""
        return torch.where(ids == self._user_ids(NOBODY), self._user_ids(numbers), ids)

    # Inference

    def _users_of(self, interaction: Any) -> Tensor | None:
        """See the base class; a user's vector is of the history that the interaction holds."""
        return None if self.users is None else self.users.asked(interaction)

    def _ask(self, history: Ragged, users: Tensor | None) -> Ragged:
        # In the prompts' text there is nobody: each gets the number of its own user once it is written.
        asked = super()._ask(history, None)
        return asked if users is None else Ragged(self._told_users(asked.values, users[asked.rows]), asked.offsets)
