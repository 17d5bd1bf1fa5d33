"""Items in a tree of clusters, by whose histories they stand in together.

Source: Hua et al., "How to Index Item IDs for Recommendation Foundation Models", SIGIR-AP 2023, arXiv 2305.06569,
section "Collaborative Indexing": spectral clustering of the co-occurrence graph, again within each cluster that is
larger than a leaf may be. Clusters are read off the eigenvectors as in Damle, Minden and Ying, "Simple, direct and
efficient multi-way spectral clustering", Information and Inference 8(1), 2019, which draws nothing at random.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import ArpackError, eigsh

# Up to so many items all eigenvectors are found at once, which takes tens of milliseconds.
_DENSE = 256


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
    labels = _nearest_directions(_directions(affinity, clusters, seed))
    if (labels == labels[0]).all():
        # Alike in every direction (all items in all histories): any division does.
        return np.arange(len(labels)) * clusters // len(labels)
    return labels


def _directions(affinity: sp.csr_matrix, clusters: int, seed: int) -> np.ndarray:
    """The smoothest functions on a connected graph.

    They are the eigenvectors of the random walk, which are those of :math:`D^{-1/2} A D^{-1/2}` over the root of the
    degree, of the largest eigenvalues. Looked for at that end of the spectrum nothing has to be factorised: on 12,000
    items of which each is tied to hundreds a factorisation fills in to gigabytes.

    Args:
        affinity: float64 ``[n, n]``, connected.
        clusters: how many.
        seed: of the start.

    Returns:
        float64 ``[n, min(clusters, n)]``.
    """
    size, wanted = affinity.shape[0], min(clusters, affinity.shape[0])
    root = np.sqrt(np.asarray(affinity.sum(axis=0)).ravel())
    walk = sp.diags_array(1 / root) @ affinity @ sp.diags_array(1 / root)
    if size > max(_DENSE, 2 * wanted):
        start = np.random.default_rng(seed).uniform(-1, 1, size)
        try:
            return np.asarray(eigsh(walk, k=wanted, which="LA", v0=start)[1] / root[:, None])
        except ArpackError:
            pass  # Too many eigenvalues too close to each other: all of them, then.
    # All of them, also for a few: where many eigenvalues are one, as a clique's are, what finds some loses its way.
    return np.asarray(np.linalg.eigh(walk.toarray())[1][:, size - wanted :] / root[:, None])


def _nearest_directions(vectors: np.ndarray) -> np.ndarray:
    """The cluster of each row, by the rows that point most apart.

    Args:
        vectors: float64 ``[n, k]``, eigenvectors.

    Returns:
        int64 ``[n]``, below ``k``.

    Source: Damle et al., algorithm 1: a pivoted QR chooses ``k`` rows, and the rotation that is nearest to them turns
    all rows so that each row's largest entry names its cluster.
    """
    chosen = scipy.linalg.qr(vectors.T, mode="r", pivoting=True)[1][: vectors.shape[1]]
    left, _, right = np.linalg.svd(vectors[chosen].T)
    return np.abs(vectors @ (left @ right)).argmax(axis=1).astype(np.int64)


def _packed(component: np.ndarray, count: int, clusters: int) -> np.ndarray:
    """Whole components in as many groups of like size as may be: the largest first, each to the smallest group."""
    sizes = np.bincount(component, minlength=count)
    group_of, held = np.zeros(count, dtype=np.int64), np.zeros(min(clusters, count), dtype=np.int64)
    for one in np.argsort(-sizes, kind="stable"):
        group_of[one] = held.argmin()
        held[held.argmin()] += sizes[one]
    return group_of[component]
