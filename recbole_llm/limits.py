"""What of RecBole's own models does not run here, or asks for more than interactions; plain data, listed without torch.

A test runs every refused model past its refusal and fails where one would run.
"""

from __future__ import annotations

import importlib.util

# Models that our views, ranking and checkpoints do not serve: why, and the nearest that they do.
REFUSED = {
    "DIEN": ("it needs a negative history beside the history", "DIN reads the history alone"),
    "GRU4RecCPR": ("its ranking reads the item that is to be found", "GRU4Rec does not"),
    "RaCT": ("it trains in three phases with files between them", "MultiVAE is the model that it refines"),
    "S3Rec": ("it trains in two phases with a file between them", "SASRecF reads the same item features"),
    "SASRecCPR": ("its ranking reads the item that is to be found", "SASRec does not"),
    "lightgbm": ("boosted trees learn ratings and rank no catalogue", "DeepFM reads the same features"),
    "xgboost": ("boosted trees learn ratings and rank no catalogue", "DeepFM reads the same features"),
}
# Imported by RecBole where a model is built, and none of its requirements or ours.
PACKAGES = {"KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter"}

# What models read beyond interactions, by kind or name, for listings.
NEEDS = {
    "knowledge": ("knowledge graph",), "context": ("user and item columns",),
    "GRU4RecKG": ("knowledge graph", "entity vectors"), "KSR": ("knowledge graph", "entity and relation vectors"),
    "FDSA": ("item columns",), "GRU4RecF": ("item columns",), "SASRecF": ("item columns",),
}  # fmt: skip
# Models that run, but not at every setting or on data of every size, for listings.
AT_SOME_SETTINGS = {
    "DGCF": "draws as many users as items a step; refused where `train_batch_size` makes these more than there are",
    "KTUP": "draws Gumbel noise while it ranks, so a user's scores depend on who is ranked beside him",
    "LDiffRec": "`n_cate` above 1 needs the package `kmeans_pytorch`, which nothing here installs",
    "NNCF": "`neigh_info_method: louvain` needs the package `community`, which nothing here installs",
    "NCL": "refused where `num_clusters` is above the users or the items",
}


def packages_missing(model: str) -> str:
    """The package that a model needs and that is not installed; empty where nothing is missing."""
    package = PACKAGES.get(model, "")
    return package if package and importlib.util.find_spec(package) is None else ""
