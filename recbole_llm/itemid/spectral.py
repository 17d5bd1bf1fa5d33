"""Items in a tree of clusters, by whose histories they stand in together.

Source: Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, arXiv 2305.06569,
section "Collaborative Indexing": spectral clustering of the co-occurrence graph, again within each cluster that is
larger than a leaf may be.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import SpectralClustering


def co_occurrence(items: np.ndarray, offsets: np.ndarray, n_items: int) -> sp.csr_matrix:
    """How many users have both of two items.

    Args:
        items: int64 ``[n]``, users' items one user after the other; an item counts once for each.
        offsets: where a user's begin, int64 ``[n_users + 1]``.
        n_items: number of internal item ids, the padding item included.

    Returns:
        float64 ``[n_items, n_items]``, symmetric, nothing on the diagonal.
    """
    shape = len(offsets) - 1, n_items
    had = sp.csr_matrix((np.ones(len(items)), items, offsets), shape=shape, copy=True)
    had.sum_duplicates()
    had.data[:] = 1
    both = (had.T @ had).tocsr()
    both.setdiag(0)
    both.eliminate_zeros()
    return both


def cluster_paths(affinity: sp.csr_matrix, clusters: int, leaf_items: int, seed: int) -> list[tuple[int, ...]]:
    """The way to each item's leaf through a tree of clusters.

    Args:
        affinity: float64 ``[n, n]``, symmetric, at least 0. Who wants the same tree whatever way items are numbered
            gives them in an order of their own.
        clusters: a node is divided into so many at most, 2 or more.
        leaf_items: a node of more items is divided; at least ``clusters``.
        seed: of the eigensolver's start.

    Returns:
        By item the number of the cluster at each level; empty where all items are one leaf.
    """
    paths: list[tuple[int, ...]] = [()] * affinity.shape[0]
    waiting: list[tuple[np.ndarray, tuple[int, ...]]] = [(np.arange(affinity.shape[0]), ())]
    while waiting:
        items, path = waiting.pop()
        if len(items) <= leaf_items:
            for item in items.tolist():
                paths[item] = path
            continue
        labels = _divided(affinity[items][:, items].tocsr(), clusters, seed)
        found = np.unique(labels)
        waiting += [(items[labels == label], (*path, number)) for number, label in enumerate(found)]
    return paths


def _divided(affinity: sp.csr_matrix, clusters: int, seed: int) -> np.ndarray:
    """The cluster of each item of a node, int64 ``[n]``, at least two of them."""
    count, component = connected_components(affinity, directed=False)
    if count > 1:
        # Nothing ties components to each other, and the eigenvectors of such a graph only tell them apart.
        return _packed(component, count, clusters)
    # SuperLU, behind the eigensolver, takes indices of 32 bits.
    affinity.indices, affinity.indptr = affinity.indices.astype(np.int32), affinity.indptr.astype(np.int32)
    labels = SpectralClustering(
        n_clusters=clusters, affinity="precomputed", assign_labels="cluster_qr", random_state=seed
    ).fit_predict(affinity)
    if (labels == labels[0]).all():
        # Alike in every direction (all items in all histories): any division does.
        return np.arange(len(labels)) * clusters // len(labels)
    return np.asarray(labels, dtype=np.int64)


def _packed(component: np.ndarray, count: int, clusters: int) -> np.ndarray:
    """Whole components in as many groups of like size as may be: the largest first, each to the smallest group."""
    sizes = np.bincount(component, minlength=count)
    group_of, held = np.zeros(count, dtype=np.int64), np.zeros(min(clusters, count), dtype=np.int64)
    for one in np.argsort(-sizes, kind="stable"):
        group_of[one] = held.argmin()
        held[held.argmin()] += sizes[one]
    return group_of[component]
