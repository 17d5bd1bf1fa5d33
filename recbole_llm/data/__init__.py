"""From atomic files to views: RecBole's loading, our one split, loaders for every kind of model."""

from __future__ import annotations

import importlib
from typing import Any

from recbole_llm import compat

compat.install()

from recbole_llm.data.dataset import SplitMixin  # noqa: E402
from recbole_llm.refusals import check_data  # noqa: E402


def dataset_class(config: Any) -> type:
    """The class that holds a model's data.

    Args:
        config: its ``model``, ``MODEL_TYPE`` and ``policy`` decide.

    Returns:
        Under ``policy: unified`` a RecBole dataset with our split, under ``policy: recbole`` RecBole's own; both are
        read exactly.
    """
    from recbole.utils import ModelType

    from recbole_llm.data.dataset import PairDataset, PrefixDataset

    datasets = importlib.import_module("recbole.data.dataset")
    own = getattr(datasets, f"{config['model']}Dataset", None)
    sequential = config["MODEL_TYPE"] == ModelType.SEQUENTIAL
    if config["MODEL_TYPE"] == ModelType.KNOWLEDGE:
        own = own or datasets.KnowledgeBasedDataset
    stock = own or (datasets.SequentialDataset if sequential else datasets.Dataset)
    if config["policy"] == "recbole":
        return type(stock.__name__, (compat.AtomicMixin, stock), {})
    if own is None:
        return PrefixDataset if sequential else PairDataset
    return type(stock.__name__, (PrefixDataset if sequential else SplitMixin, stock), {})


def create_dataset(config: Any) -> Any:
    """Load, filter and remap a data set; takes the argument of RecBole's ``create_dataset``.

    Args:
        config: a :class:`recbole_llm.config.Config`.

    Raises:
        UserError: no such data set, a broken file (line and column named), missing columns.
    """
    check_data(config)
    with compat.recbole_says():
        return dataset_class(config)(config)


def data_preparation(config: Any, dataset: Any) -> tuple[Any, Any, Any]:
    """Split a data set and make its loaders; takes the arguments of RecBole's ``data_preparation``.

    Args:
        config: a :class:`recbole_llm.config.Config`.
        dataset: from :func:`create_dataset`.

    Returns:
        Train, valid and test loaders; the last two yield RecBole's full-sort tuples. Under ``merge_valid`` the valid
        rows are train rows.
    """
    if config["policy"] == "recbole":
        from recbole.data import utils
        from recbole.data.utils import data_preparation as stock

        # It would unpickle whatever lies at the path that it takes for loaders of an earlier run.
        utils.load_split_dataloaders = lambda config: None
        with compat.recbole_says():
            return stock(config, dataset)
    from recbole_llm.data.loaders import make_loaders

    with compat.recbole_says():
        built = dataset.build()
        if config["merge_valid"]:
            built = dataset.cut(built[0].split.with_valid_in_train())
        return make_loaders(config, built)
