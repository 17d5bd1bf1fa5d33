"""Keywords about users, computed from item texts without a language model.

They stand in for the tags and the words of interest that GLTA (arXiv 2502.18757, figure 3, "profile" and
"prediction") has its language model write: offline, deterministic, and from train interactions alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from recbole_llm.progress import progress

if TYPE_CHECKING:
    from recbole_llm.data.histories import Histories

# Scores of this many (user, item) pairs, or weights of this many (user, word) pairs, are held at once.
CHUNK_CELLS = 1 << 24
# Sums that differ by no more than rounding are ties, which the order of the words decides.
DECIMALS = 9


def profile_keywords(texts: Sequence[str], histories: Histories, count: int) -> list[str]:
    """The words that say most about what each user has had.

    Args:
        texts: one text an item, by internal id.
        histories: train interactions.
        count: words a user, at most.

    Returns:
        By internal user id, the words of the highest TF-IDF summed over the user's distinct train items, highest first
        (ties in the words' order), joined by ``", "``; ``""`` for a user without train items or words.
    """
    weights, words = _item_words(texts, histories)
    train = _train_matrix(histories, len(texts))
    rows = _chunk_rows(len(words), train.shape[0])
    found: list[str] = []
    for start in progress(range(0, train.shape[0], rows), "keywords of users' items"):
        found += _top_words(train[start : start + rows] @ weights, words, count)
    return found


def prediction_keywords(
    texts: Sequence[str],
    histories: Histories,
    user_embeddings: Any,
    item_embeddings: Any,
    count: int,
    neighbours: int,
) -> list[str]:
    """The words that say most about what each user may want next.

    Args:
        texts: one text an item, by internal id.
        histories: train interactions.
        user_embeddings: float [n_users, d], array or tensor.
        item_embeddings: float [n_items, d], array or tensor.
        count: words a user, at most.
        neighbours: how many items to look at: those of the highest dot product with the user that are not among the
            user's train items (ties by internal id).

    Returns:
        By internal user id, the words of the highest TF-IDF summed over those items, highest first (ties in the words'
        order), joined by ``", "``; ``""`` for the padding user.
    """
    users, items = _as_array(user_embeddings), _as_array(item_embeddings)
    train = _train_matrix(histories, len(texts))
    if train.shape != (len(users), len(items)):
        raise ValueError(
            f"embeddings of {len(users)} users and {len(items)} items, histories and texts of {train.shape}"
        )
    weights, words = _item_words(texts, histories)
    rows = _chunk_rows(max(len(words), len(items)), len(users))
    found: list[str] = []
    for start in progress(range(0, len(users), rows), "keywords of items nearest to users"):
        scores = users[start : start + rows] @ items.T
        scores[:, 0] = -np.inf
        scores[train[start : start + rows].nonzero()] = -np.inf
        nearest = sp.csr_matrix(_nearest(scores, neighbours), dtype=np.float64)
        found += _top_words(nearest @ weights, words, count)
    found[0] = ""
    return found


def _as_array(embeddings: Any) -> np.ndarray:
    if hasattr(embeddings, "detach"):
        embeddings = embeddings.detach().float().cpu().numpy()
    return np.asarray(embeddings, dtype=np.float32)


def _chunk_rows(columns: int, rows: int) -> int:
    return max(1, min(rows, CHUNK_CELLS // max(columns, 1)))


def _train_matrix(histories: Histories, n_items: int) -> sp.csr_matrix:
    """[n_users, n_items], 1 where the user has the item; an item had twice counts once."""
    n_users = len(histories.offsets) - 1
    ones = np.ones(len(histories.items))
    matrix = sp.csr_matrix((ones, histories.items, histories.offsets), shape=(n_users, n_items), copy=True)
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _item_words(texts: Sequence[str], histories: Histories) -> tuple[sp.csr_matrix, np.ndarray]:
    """TF-IDF of every item's words [n_items, n_words] and the words; frequencies are those among the train items."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # slow to import

    # Letters and digits only: no underscore, which \w would let in.
    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)[^\W_]{2,}")
    seen = np.unique(histories.items)
    analyse = vectorizer.build_analyzer()
    if not any(analyse(texts[item]) for item in seen):
        return sp.csr_matrix((len(texts), 0)), np.array([], dtype=object)
    vectorizer.fit([texts[item] for item in seen])
    return sp.csr_matrix(vectorizer.transform(texts)), vectorizer.get_feature_names_out()


def _nearest(scores: np.ndarray, count: int) -> np.ndarray:
    """bool, the shape of ``scores``: the ``count`` highest finite scores of each row, ties by column."""
    count = min(count, scores.shape[1])
    threshold = np.partition(scores, -count, axis=1)[:, [-count]]
    above = scores > threshold
    level = scores == threshold
    level &= np.cumsum(level, axis=1) <= count - above.sum(axis=1, keepdims=True)
    return (above | level) & np.isfinite(scores)


def _top_words(sums: sp.csr_matrix, words: np.ndarray, count: int) -> list[str]:
    """Each row's words of the highest weight, joined."""
    sums = sp.csr_matrix(sums)
    lengths = np.diff(sums.indptr)
    row = np.repeat(np.arange(sums.shape[0]), lengths)
    order = np.lexsort((sums.indices, -np.round(sums.data, DECIMALS), row))
    place = np.arange(len(row)) - np.repeat(sums.indptr[:-1], lengths)
    kept = place < count
    chosen = words[sums.indices[order[kept]]]
    ends = np.minimum(lengths, count).cumsum()
    return [", ".join(chosen[end - length : end]) for end, length in zip(ends, np.minimum(lengths, count), strict=True)]
