"""Settings with which every model of ours, and some of RecBole's, trains in seconds on a few users."""

from __future__ import annotations

from typing import Any

SMALL: dict[str, dict[str, Any]] = {
    "SASRec": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "BERT4Rec": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "BERT4RecWindows": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "SASRecAllPositions": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "FMLP": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "FMLPAllPositions": {"hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "GRU4Rec": {"embedding_size": 16, "hidden_size": 16, "MAX_ITEM_LIST_LENGTH": 10},
    "SASRecCodes": {
        "hidden_size": 16, "inner_size": 16, "MAX_ITEM_LIST_LENGTH": 10, "llm_train_steps": 2, "llm_hidden_size": 16,
        "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400, "embedding_model.epochs": 1,
        "embedding_model.eval_step": 0, "code_levels": 4, "code_size": 8, "code_epochs": 3,
    },
    "AlignTokenRec": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "code_levels": 4, "code_size": 8, "code_epochs": 3,
        "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "negative_ratio": 1, "beams": 20,
    },
    "LCRec": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "code_levels": 4, "code_size": 8, "code_epochs": 3, "code_layers": [16], "code_dim": 8, "history_length": 5,
        "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "text_tokens": 16, "beams": 20,
    },
    "P5": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "id_clusters": 4, "id_leaf_items": 20, "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2,
        "beams": 20,
    },
    "GLTA": {
        "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
        "alignment_epochs": 1, "graph_model.epochs": 1, "graph_model.eval_step": 0,
    },
}  # fmt: skip
SMALL["LETTER"] = SMALL["LCRec"] | {
    "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "embedding_model.hidden_size": 8,
    "embedding_model.inner_size": 16, "embedding_model.MAX_ITEM_LIST_LENGTH": 10, "code_cf_weight": 0.1,
    "code_diversity_weight": 0.1, "code_diversity_clusters": 3,
}  # fmt: skip
SMALL["LightGCNPlus"] = SMALL["HCCFPlus"] = SMALL["RLMRecCon"] = SMALL["RLMRecGen"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
}  # fmt: skip
SMALL["TALLRec"] = SMALL["BIGRec"] = SMALL["MSL"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "history_length": 5, "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "adapter_learning_rate": 0.01, "beams": 20,
    "long_titles": "truncate",
}  # fmt: skip
SMALL["LLaRA"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "embedding_model.epochs": 1, "embedding_model.eval_step": 0, "embedding_model.hidden_size": 16,
    "embedding_model.inner_size": 16, "embedding_model.MAX_ITEM_LIST_LENGTH": 10, "history_length": 3,
    "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 1, "beams": 20, "title_tokens": 8, "long_titles": "truncate",
}  # fmt: skip
SMALL["CoLLM"] = SMALL["LLaRA"] | {"text_epochs": 1}
SMALL["TIGER"] = {
    "llm_train_steps": 2, "llm_hidden_size": 16, "llm_heads": 2, "llm_layers": 1, "llm_vocab_size": 400,
    "t5_layers": 1, "t5_hidden_size": 16, "t5_inner_size": 32, "t5_heads": 2, "t5_head_size": 8, "user_tokens": 20,
    "code_size": 8, "code_epochs": 3, "code_layers": [16], "code_dim": 8, "history_length": 5,
    "MAX_ITEM_LIST_LENGTH": 5, "prefixes_per_user": 2, "beams": 20,
}  # fmt: skip
SMALL["TCA4Rec"] = SMALL["AlignTokenRec"] | {
    "alpha": 0.5, "cf_model.epochs": 1, "cf_model.eval_step": 0, "cf_model.hidden_size": 16, "cf_model.inner_size": 16,
    "cf_model.MAX_ITEM_LIST_LENGTH": 10,
}  # fmt: skip
