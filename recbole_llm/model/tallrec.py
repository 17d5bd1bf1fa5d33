"""TALLRec: a language model fine-tuned by LoRA on a prompt of text, here to generate the title of the next item.

Source: Bao et al., "TALLRec: An Effective and Efficient Tuning Framework to Align Large Language Model with
Recommendation", RecSys 2023, arXiv 2305.00447. There the prompt lists items that a user liked and disliked, names one
more, and the answer is "Yes" or "No". That ranks no catalogue, so TCA4Rec (Lin et al., WWW 2026, arXiv 2601.18457) has
TALLRec among its bases as what is kept of it: the prompt in plain text and LoRA, with the next item's title as the
answer, found by beam search among the titles. This is what stands here.
"""

from __future__ import annotations

from recbole_llm.model.titles import TitleRecommender


class TALLRec(TitleRecommender):
    """TALLRec (arXiv 2305.00447), generating titles, as a RecBole recommender."""
