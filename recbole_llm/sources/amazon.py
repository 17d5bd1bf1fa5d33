"""Amazon reviews, the editions of 2018 and of 2023: one JSON object a line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from recbole_llm.sources.base import (
    Columns,
    Described,
    Interaction,
    RawFile,
    RawFiles,
    Review,
    Source,
    categories_in,
    find_in,
    refuse_category,
)
from recbole_llm.sources.lines import json_object, required
from recbole_llm.sources.text import flat, headed, is_page_junk

_PRICE = re.compile(r"\$?\s*[\d,]*\.?\d+(\s*-\s*\$?\s*[\d,]*\.?\d+)?")
# Some brands of 2018 are what stood under a title, "by" and a line further the name.
_BY = re.compile(r"^\s*by\s*\n\s*")
_TEMPLATE = "{title}[ Brand: {brand};][ categories: {categories};][ {description}]"
_FALLBACK = "an untitled product"
# Categories have commas of their own ("Arts, Crafts & Sewing").
_BETWEEN = " | "


def _price(value: Any) -> str:
    """A price; in its place some rows of 2018 have a piece of a style sheet."""
    text = flat(value).strip()
    return text if _PRICE.fullmatch(text) else ""


def _categories(listed: Any) -> str:
    """Categories, the widest first; a bar of their own would read as one between two."""
    return flat(_without_bars(listed), _BETWEEN)


def _without_bars(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_bars(part) for part in value]
    return value.replace("|", "/") if isinstance(value, str) else value


class _Amazon(Source):
    """What both editions share; a subclass names files and fields.

    Attributes:
        ending: of a category's files.
        core: ending of the published 5-core's, where there is one.
        example: a category.
        fields: names of user, item, rating and time.
        units: of the time in a second.
        told: names of a review's heading and text.
        review_folders: below the input folder, where a category's reviews may be.
        meta_folders: the same of its metadata.
    """

    ending: str
    core = ""
    example: str
    fields: tuple[str, str, str, str]
    units = 1
    told: tuple[str, str]
    review_folders: tuple[str, ...] = (".",)
    meta_folders: tuple[str, ...] = (".",)

    def files(self, folder: Path, category: str) -> RawFiles:
        """See :meth:`Source.files`."""
        names = dict.fromkeys(f"{category}{core}{self.ending}" for core in ("", self.core))
        places = [place for name in self.review_folders if (place := folder / name).is_dir()]
        reviews = find_in(places, tuple(names)) if category else None
        if reviews is None:
            core = f"(?:{self.core})?" if self.core else ""
            known = categories_in(places, (rf"(?!meta_)(.+?){core}{re.escape(self.ending)}",))
            raise refuse_category(folder, category, known, f"{category or self.example}{self.ending}.gz", self)
        meta = find_in((folder / name for name in self.meta_folders), (f"meta_{category}{self.ending}",))
        return RawFiles(
            RawFile(reviews, self._interaction),
            items=RawFile(meta, self._item) if meta else None,
            reviews=RawFile(reviews, self._review),
        )

    def _interaction(self, line: str) -> Interaction:
        made = json_object(line)
        user, item, rating, time = (required(made, field) for field in self.fields)
        return Interaction(user, item, float(rating), float(time) / self.units)

    def _review(self, line: str) -> Review:
        made = json_object(line)
        user, item = self.fields[:2]
        heading, text = self.told
        return Review(made[user], made[item], headed(flat(made.get(heading)), flat(made.get(text))))

    def _item(self, line: str) -> Described:
        raise NotImplementedError


class Amazon2018(_Amazon):
    """Files ``CATEGORY.json.gz`` (or the published 5-core, ``CATEGORY_5.json.gz``) and ``meta_CATEGORY.json.gz``.

    Where both of the former are there all reviews are read: a 5-core is another one after items without metadata have
    gone. Times are days, so the order of a user's reviews of one day is the file's.
    """

    ending, core, example = ".json", "_5", "Musical_Instruments"
    fields = ("reviewerID", "asin", "overall", "unixReviewTime")
    told = ("summary", "reviewText")
    title = "Amazon reviews 2018"
    licence = (
        'research use. Cite J. Ni, J. Li and J. McAuley, "Justifying Recommendations using Distantly-Labeled Reviews '
        'and Fine-grained Aspects", EMNLP 2019'
    )
    download = "https://nijianmo.github.io/amazon/"
    columns = Columns(
        item={
            "title": "token_seq", "brand": "token", "categories": "token_seq", "description": "token_seq",
            "price": "token",
        },
        title="title", description="description", item_text=_TEMPLATE, fallback=_FALLBACK,
        categories="categories", category_separator=_BETWEEN,
    )  # fmt: skip

    def _item(self, line: str) -> Described:
        made = json_object(line)
        title = flat(made.get("title"))
        return Described(
            required(made, "asin"),
            {
                "title": "" if is_page_junk(title) else title,
                "brand": _BY.sub("", flat(made.get("brand"))),
                "categories": _categories(made.get("category")),
                "description": flat(made.get("description")),
                "price": _price(made.get("price")),
            },
        )


class Amazon2023(_Amazon):
    """Files ``CATEGORY.jsonl.gz`` and ``meta_CATEGORY.jsonl.gz``; an item is a ``parent_asin``, a time milliseconds.

    They may lie in one folder, or as the authors' repository of data sets has them: reviews in ``review_categories``,
    metadata in ``meta_categories`` beside it, both below ``raw``.
    """

    ending, example = ".jsonl", "Video_Games"
    fields = ("user_id", "parent_asin", "rating", "timestamp")
    units = 1000
    review_folders = (".", "review_categories", "raw/review_categories")
    meta_folders = (".", "meta_categories", "raw/meta_categories", "../meta_categories")
    told = ("title", "text")
    title = "Amazon reviews 2023"
    licence = (
        'research use. Cite Y. Hou, J. Li, Z. He, A. Yan, X. Chen and J. McAuley, "Bridging Language and Items for '
        'Retrieval and Recommendation", arXiv 2403.03952'
    )
    download = "https://amazon-reviews-2023.github.io/"
    columns = Columns(
        item={
            "title": "token_seq", "brand": "token", "categories": "token_seq", "features": "token_seq",
            "description": "token_seq", "price": "token",
        },
        title="title", description="description", item_text=_TEMPLATE, fallback=_FALLBACK,
        categories="categories", category_separator=_BETWEEN,
    )  # fmt: skip

    def _item(self, line: str) -> Described:
        made = json_object(line)
        return Described(
            required(made, "parent_asin"),
            {
                "title": flat(made.get("title")),
                "brand": flat(made.get("store")),
                "categories": _categories(made.get("categories")),
                "features": flat(made.get("features")),
                "description": flat(made.get("description")),
                "price": _price(made.get("price")),
            },
        )
