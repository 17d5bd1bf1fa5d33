"""The stage that gives the texts of tasks their tokens: made once, on disk, opened without being read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.backbone.base import Backbone
from recbole_llm.data.token_table import TokenTable, fingerprint_of_texts
from recbole_llm.training.store import Stage, StageStore

# Raised when the code of the stage changes what it makes.
TEXT_TABLES_VERSION = 1


def text_tables(
    texts: Mapping[str, Sequence[str]], backbone: Backbone, limit: int, store: StageStore
) -> tuple[dict[str, TokenTable], list[Stage]]:
    """Tokens of texts, from the cache where the same ones were encoded by the same tokenizer before.

    Args:
        texts: by place of a template.
        backbone: whose tokenizer reads them.
        limit: each text is cut to so many tokens.
        store: the stage cache.

    Returns:
        The tables by place, and the stages that made them.
    """
    tables, stages = {}, []
    for place, own in texts.items():
        inputs = {"texts": fingerprint_of_texts(own), "tokenizer": backbone.tokenizer_fingerprint(), "limit": limit}

        def make(folder: Path, own: Sequence[str] = own) -> dict[str, Any]:
            table = TokenTable.write(folder, own, backbone.encode_batch, limit)
            return {"texts": len(table), "text_tokens": int(table.offsets[-1])}

        stage = store.run("text_tokens", TEXT_TABLES_VERSION, inputs, make)
        tables[place] = TokenTable.open(stage.folder)
        stages.append(stage)
    return tables, stages
