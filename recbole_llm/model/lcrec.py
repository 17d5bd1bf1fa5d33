"""LC-Rec: a causal language model that reads and generates items as indices made of their texts.

Items become tokens by an RQ-VAE of their texts' embeddings, the last level assigned evenly by Sinkhorn's algorithm
(``properties/item_tokens/lcrec.yaml``). The language model is fine-tuned on six tasks that tie these tokens to language
(``recbole_llm/tasks``), worded in ``properties/prompts/lcrec.yaml``.

Source: Zheng et al., "Adapting Large Language Models by Integrating Collaborative Semantics for Recommendation", ICDE
2024, arXiv 2311.09049. What differs from the authors' program, and why, stands in ``properties/model/LCRec.yaml``.
"""

from __future__ import annotations

from recbole_llm.model.aligntokenrec import AlignTokenRec


class LCRec(AlignTokenRec):
    """LC-Rec (arXiv 2311.09049) as a RecBole recommender: AlignTokenRec's parts with other tokens, tasks and words."""
