"""Training of recommenders that take in profiles of users and items, otherwise as any model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from recbole_llm.data.profiles import read_wording
from recbole_llm.training.described import DescribedMixin
from recbole_llm.training.item_tokens import Sources, vectors_of
from recbole_llm.training.language import named_backbone, take_backbone
from recbole_llm.training.profiles import make_profiles
from recbole_llm.training.store import StageStore


class ProfiledMixin(DescribedMixin):
    """Makes (or finds) the profiles and their vectors before RecBole's ``fit``.

    The model says what it is by ``take_profiles``, and by ``stages`` as a staged recommender does.
    """

    def _read(self, dataset: Any, store: StageStore, sources: Sources) -> Callable[[], None]:
        config, item_text = self.config, sources.item_text
        assert item_text is not None
        # What the user may have got wrong comes before a language model is made.
        wording = read_wording(config["profile_prompts"])
        sources.reader, sources.reader_mark, sources.lines = take_backbone(
            config, dataset, item_text, store, named_backbone(config)
        )
        made = make_profiles(config, dataset, wording, item_text, store, sources.reader, sources.reader_mark)
        sources.lines += [stage.as_dict() for stage in made.stages]
        items = torch.from_numpy(vectors_of(config, store, sources, made.items))
        users = torch.from_numpy(vectors_of(config, store, sources, made.users, "user_texts"))
        self.artefacts = {f"{stage.name}.json": stage.folder / f"{stage.name}.json" for stage in made.stages}
        told = [torch.tensor([bool(text) for text in texts]) for texts in (made.users, made.items)]
        return lambda: self.model.take_profiles(users, items, *told)
