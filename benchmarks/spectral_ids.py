"""Clusters of items for collaborative ids: the largest eigenvectors of the walk against scikit-learn's two solvers.

Data: histories of 8 items, six of them of one of 40 groups; what they stand in together is tied. Reference:
``SpectralClustering`` on the same graph with ``lobpcg``, its fastest solver here, which stops at a tolerance.
``default_solver`` is the ratio to ``arpack``, which factorises the Laplacian: it grows with the catalogue, as a
factorisation fills in. ``equal`` says that ours and the default solver's clusters are the same.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import numpy as np
from _harness import measure_pairs, parser, ratios_of, report

from recbole_llm.itemid.spectral import cluster_paths, co_occurrence

GROUPS, CLUSTERS = 40, 20


def histories(n_items: int, seed: int = 0) -> np.ndarray:
    """Items from 1 on, int64 ``[2 * n_items, 8]``, a row a user."""
    rng = np.random.default_rng(seed)
    group = rng.integers(GROUPS, size=2 * n_items)
    own = rng.integers(n_items // GROUPS, size=(len(group), 6)) * GROUPS + group[:, None]
    return np.concatenate([own, rng.integers(n_items, size=(len(group), 2))], axis=1) + 1


def main() -> None:
    """Run it."""
    args = parser(__doc__).parse_args()
    from sklearn.cluster import SpectralClustering
    from sklearn.metrics import adjusted_rand_score

    n_items = 1200 if args.quick else 4000
    had = histories(n_items)
    graph = co_occurrence(had.ravel(), np.arange(len(had) + 1) * had.shape[1], n_items + 1)[1:][:, 1:].tocsr()
    graph.indices, graph.indptr = graph.indices.astype(np.int32), graph.indptr.astype(np.int32)
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = [path[0] for path in cluster_paths(graph, CLUSTERS, n_items - 1, seed=0)]

    def by(solver: str) -> None:
        made = SpectralClustering(
            CLUSTERS, eigen_solver=solver, affinity="precomputed", assign_labels="cluster_qr", random_state=0
        )
        found[solver] = made.fit_predict(graph)

    mine, theirs = measure_pairs(ours, lambda: by("lobpcg"), pairs=5)
    again, default = measure_pairs(ours, lambda: by("arpack"), pairs=1 if args.quick else 2)
    agreed = {solver: float(adjusted_rand_score(found["ours"], found[solver])) for solver in ("lobpcg", "arpack")}
    detail = {
        "items": n_items, "ties": int(graph.nnz), "clusters": CLUSTERS, "rand_index": agreed,
        "default_solver": round(median(ratios_of(again, default)), 2),
    }  # fmt: skip
    error = 1 - agreed["arpack"]
    report("spectral_ids", mine, theirs, equal=error == 0, max_error=error, detail=detail)


if __name__ == "__main__":
    main()
