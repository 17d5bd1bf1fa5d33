"""Settings that only the search for items reads: another value moves rankings, and no weight."""

from __future__ import annotations

# How the search is guided; these mean nothing where it is not.
GUIDED = ("cf_guidance", "cf_guidance_beta", "cf_model")
SEARCH_KEYS = frozenset({
    "ranking", "beams", "normaliser", "score_end", "constraint", "filter_items", "inference_prompts",
    "grounding", "generation_beams", "popularity_gamma", "title_match", *GUIDED,
})  # fmt: skip
