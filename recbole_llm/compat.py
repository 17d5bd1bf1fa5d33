"""RecBole 1.2.1 on today's NumPy, SciPy, pandas and torch: the only place that mends it.

Each piece names the RecBole line it mends. Nothing in site-packages is edited, and neither ``ray`` nor
``recbole.quick_start`` (the only module of RecBole that imports ray) is ever imported.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
import tempfile
import traceback
import urllib.error
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from filelock import FileLock
from recbole.utils import FeatureSource, FeatureType

from recbole_llm.atomic import open_atomic
from recbole_llm.errors import UserError, did_you_mean

RECBOLE_VERSION = "1.2.1"

# config/configurator.py:625-635 sets these from np.float_, np.complex_ and np.unicode_, which NumPy 2 removed; RecBole
# reads np.float (evaluator/metrics.py, data/interaction.py:31, dataset.py:652) and np.str (hyper_tuning.py:386).
_NUMPY_ALIASES = {
    "bool": np.bool_,
    "int": np.int_,
    "float": np.float64,
    "complex": np.complex128,
    "object": np.object_,
    "str": np.str_,
    "long": np.int_,
    "unicode": np.str_,
}


def install() -> None:
    """Make RecBole 1.2.1 importable and runnable here; calling it again changes nothing.

    Raises:
        UserError: when another version of RecBole is installed.
    """
    found = importlib.metadata.version("recbole")
    if found != RECBOLE_VERSION:
        raise UserError(f"recbole {found} is installed; recbole_llm mends exactly recbole {RECBOLE_VERSION}")
    for name, target in _NUMPY_ALIASES.items():
        if name not in np.__dict__:
            setattr(np, name, target)
    # lightgcn.py:111, ngcf.py:110, ncl.py:131, gcmc.py:174, spectralcf.py:123: SciPy 1.13 dropped dok_matrix._update.
    if not hasattr(sp.dok_matrix, "_update"):
        sp.dok_matrix._update = lambda self, data: self._dict.update(data)
    # trainer.py:235 torch.cuda.amp, lightgcn.py:125 torch.sparse.FloatTensor: deprecated spellings that still work.
    warnings.filterwarnings("ignore", message=r".*torch\.cuda\.amp\.(GradScaler|autocast).*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=r".*torch\.sparse\.SparseTensor.*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*(Sparse CSR|sparse csr).*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*Sparse invariant checks.*", category=UserWarning)
    warnings.filterwarnings("ignore", message=r".*non-writable.*", category=UserWarning)


@contextlib.contextmanager
def anomaly_mode_kept() -> Iterator[None]:
    """Leave torch's anomaly mode as it was found.

    sequential_recommender/sine.py:25 turns it on for the whole process, and importing any sequential model imports it:
    every later training step of any model then costs about twice its time.
    """
    import torch

    before = torch.is_anomaly_enabled()
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(before)


@contextlib.contextmanager
def recbole_says() -> Iterator[None]:
    """Pass on what RecBole itself refuses while it loads data as the user's mistake that it is.

    dataset.py raises ValueError for a field that does not exist, a bad interval and their like; one from anywhere but
    RecBole's own code stays what it is.
    """
    try:
        yield
    except (ValueError, NotImplementedError, ImportError, KeyError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1].filename
        if "recbole" not in Path(last).parts or isinstance(error, UserError):
            raise
        raise UserError(f"RecBole refuses this: {type(error).__name__}, {error}") from error


@contextlib.contextmanager
def tensorboard_in(folder: Path | None) -> Iterator[None]:
    """Give the trainers built inside the block a tensorboard folder of their own.

    trainer.py:120 calls utils.get_tensorboard, which always writes to ``./log_tensorboard`` and names the folder after
    the first log file of the process, so two runs in one process share it.

    Args:
        folder: where the events go; ``None`` writes none.
    """
    import recbole.trainer.trainer as recbole_trainer

    def writer(_logger: Any) -> Any:
        if folder is None:
            return _NoTensorboard()
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(folder))

    before = recbole_trainer.get_tensorboard
    recbole_trainer.get_tensorboard = writer
    try:
        yield
    finally:
        recbole_trainer.get_tensorboard = before


class _NoTensorboard:
    """Stands where a SummaryWriter is expected and writes nothing."""

    def add_scalar(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignore a scalar."""

    def add_hparams(self, *_args: Any, **_kwargs: Any) -> None:
        """Ignore a row of hyper-parameters."""

    def close(self) -> None:
        """Nothing is open."""


class AtomicMixin:
    """Mends RecBole's loading for pandas 2.3 and 3 and for exact texts; values are otherwise RecBole's."""

    config: Any
    logger: Any
    uid_field: str
    iid_field: str
    inter_feat: Any
    field2type: dict[str, FeatureType]
    field2source: dict[str, Any]
    field2seqlen: dict[str, int]
    field2bucketnum: dict[str, int]
    field2id_token: dict[str, np.ndarray]
    field2token_id: dict[str, dict[str, int]]

    def _load_feat(self, filepath: str, source: Any) -> pd.DataFrame | None:
        """Replaces dataset.py:427-512 (python engine, default quoting, chained fillna that pandas 3 ignores)."""
        load_col, unload_col = self._get_load_and_unload_col(source)  # type: ignore[attr-defined]
        if load_col == set():
            if source == FeatureSource.INTERACTION:
                ids = f"[{self.config['USER_ID_FIELD']}, {self.config['ITEM_ID_FIELD']}, ...]"
                raise UserError(
                    f"load_col leaves out the interactions; add inter: {ids}, or inter: '*' for every column"
                )
            return None
        file = open_atomic(Path(filepath), self.config["field_separator"], self.config["encoding"] or "utf-8")
        columns = [
            name
            for name in file.names
            if (load_col is None or name in load_col) and not (unload_col is not None and name in unload_col)
        ]
        for name, kind in zip(file.names, file.types, strict=True):
            if name in columns:
                self._register_field(name, FeatureType(kind), source)
        self._require_ids(file.path, file.names, columns, source)
        self._require_types(file.path, columns, source)
        self._require_named(file.path, file.names, source)
        if not columns:
            return None
        frame = file.frame(columns)
        # Of files that are split already only the first, the train rows, has to hold some.
        splits = self.config["benchmark_filename"]
        needed = not splits or file.path.name.endswith(f".{splits[0]}.inter")
        if source == FeatureSource.INTERACTION and needed and frame.empty:
            raise UserError(f"{file.path} has a header and no interaction")
        for name in columns:
            self._convert(frame, name)
        return frame

    def _register_field(self, name: str, kind: FeatureType, source: Any) -> None:
        if not isinstance(source, FeatureSource) and source == "link":
            return
        self.field2source[name] = source
        self.field2type[name] = kind
        if not kind.value.endswith("seq"):
            self.field2seqlen[name] = 1
        if "float" in kind.value:
            self.field2bucketnum[name] = 2

    def _require_ids(self, path: Path, names: tuple[str, ...], columns: list[str], source: Any) -> None:
        wanted = {
            FeatureSource.INTERACTION: ("USER_ID_FIELD", "ITEM_ID_FIELD"),
            FeatureSource.USER: ("USER_ID_FIELD",),
            FeatureSource.ITEM: ("ITEM_ID_FIELD",),
        }.get(source, ())
        for key in wanted:
            field = self.config[key]
            if field is not None and field not in columns:
                raise UserError(f"{path} has no loaded column '{field}' ({key}){_nearest_of(field, names)}")

    def _require_types(self, path: Path, columns: list[str], source: Any) -> None:
        """An id is a token and a time a number: of other types RecBole loads them too, and orders by what it made."""
        wanted = {"USER_ID_FIELD": FeatureType.TOKEN, "ITEM_ID_FIELD": FeatureType.TOKEN}
        if source == FeatureSource.INTERACTION:
            wanted["TIME_FIELD"] = FeatureType.FLOAT
        for key, kind in wanted.items():
            field = self.config[key]
            if field in columns and self.field2type[field] != kind:
                found = self.field2type[field].value
                raise UserError(
                    f"{path}, line 1: column '{field}' ({key}) should be {field}:{kind.value}, not :{found}"
                )

    def _require_named(self, path: Path, names: tuple[str, ...], source: Any) -> None:
        """What the user asks for by name is there; a data set's shipped settings may name more than his file has."""
        suffix = getattr(source, "value", source)
        for key in ("load_col", "unload_col"):
            columns = (self.config.external_config_dict.get(key) or {}).get(suffix) or ()
            for name in columns if columns != "*" else ():
                if name not in names:
                    raise UserError(f"{path} has no column '{name}' ({key}.{suffix}){_nearest_of(name, names)}")

    def _load_data(self, token: str, dataset_path: str) -> None:
        """RecBole's; then what ``seq_len`` names is there to be cut."""
        super()._load_data(token, dataset_path)  # type: ignore[misc]
        for field in self.config.external_config_dict.get("seq_len") or {}:
            kind = self._kind_of(field, "seq_len")
            if kind not in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
                raise UserError(f"seq_len.{field}: {field}:{kind.value} holds one value a row, and none is cut")

    def _kind_of(self, field: str, setting: str) -> FeatureType:
        if field not in self.field2type:
            near = did_you_mean(field, list(self.field2type))
            raise UserError(f"{setting}.{field}: no such column is loaded (load_col){near}")
        kind: FeatureType = self.field2type[field]
        return kind

    def _convert(self, frame: pd.DataFrame, name: str) -> None:
        kind = self.field2type[name]
        if kind == FeatureType.TOKEN:
            values = frame[name].to_numpy(dtype=object)
            # An empty id is a missing one, as in RecBole; the letters "NA" are not.
            frame[name] = pd.Series(np.where(values == "", None, values), index=frame.index, dtype=object)
        elif kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
            separator = self.config["seq_separator"]
            to = np.str_ if kind == FeatureType.TOKEN_SEQ else np.float64
            limit = (self.config["seq_len"] or {}).get(name)
            parts = [[part for part in text.split(separator) if part][:limit] for text in frame[name]]
            try:
                rows = [np.array(row, dtype=to) for row in parts]
            except ValueError as error:
                raise UserError(f"column '{name}' ({kind.value}) holds something that is no number: {error}") from None
            self.field2seqlen[name] = max((len(row) for row in rows), default=0)
            column = np.empty(len(rows), dtype=object)
            column[:] = rows
            frame[name] = pd.Series(column, index=frame.index, dtype=object)

    def _filter_nan_user_or_item(self) -> None:
        """Replaces dataset.py:814-838: once rows are gone it takes labels for places, and drops good rows."""
        for name, fields in (
            ("user_feat", [self.uid_field]),
            ("item_feat", [self.iid_field]),
            ("inter_feat", [self.uid_field, self.iid_field]),
        ):
            feat = getattr(self, name)
            fields = [field for field in fields if field is not None]
            if feat is None or not fields:
                continue
            missing = feat[fields].isna().any(axis=1)
            if missing.any():
                self.logger.warning("%d rows of %s have no id and are left out", missing.sum(), name)
                feat.drop(feat.index[missing], inplace=True)

    def _benchmark_presets(self) -> None:
        """What sequential models read of files that are split already (sequential_dataset.py:154 takes it as given)."""
        wanted = f"{self.iid_field}{self.config['LIST_SUFFIX']}"
        if wanted not in self.inter_feat:
            raise UserError(
                f"benchmark_filename: sequential models read histories from a column '{wanted}' of files that are "
                "split already, and these have none; leave benchmark_filename out, or take a general model"
            )
        super()._benchmark_presets()  # type: ignore[misc]

    def _filter_by_field_value(self) -> None:
        """``val_interval``, with what RecBole (dataset.py:1030) takes for granted looked at.

        Interactions stay of the users and items whose value is in it: RecBole leaves that to
        ``filter_inter_by_user_or_item``, without which only the features of the others went.

        Raises:
            UserError: a column is not loaded, or not of the kind that the value filters.
        """
        asked = self.config["val_interval"] or {}
        for field, value in asked.items():
            self._check_filtered(field, value)
        super()._filter_by_field_value()  # type: ignore[misc]
        sources = {self.field2source[field] for field in asked}
        rows = self.inter_feat
        for source, field in ((FeatureSource.USER, self.uid_field), (FeatureSource.ITEM, self.iid_field)):
            if source in sources:
                kept = getattr(self, f"{source.value}_feat")[field]
                rows.drop(rows.index[~rows[field].isin(kept)], inplace=True)

    def _check_filtered(self, field: str, value: Any) -> None:
        kind = self._kind_of(field, "val_interval")
        column = f"{field}:{kind.value}"
        if kind in (FeatureType.TOKEN_SEQ, FeatureType.FLOAT_SEQ):
            raise UserError(f"val_interval.{field}: {column} holds several values a row; RecBole filters by one")
        if (kind == FeatureType.TOKEN) != isinstance(value, list):
            wanted = "a list of values" if kind == FeatureType.TOKEN else "an interval such as [5,inf)"
            raise UserError(f"val_interval.{field} should be {wanted}, as the column is {column}, but is {value!r}")

    def _fill_nan(self) -> None:
        """Replaces dataset.py:640-657: under pandas 3 its chained fillna changes nothing and corrupts features."""
        for feat_name in self.feat_name_list:  # type: ignore[attr-defined]
            feat = getattr(self, feat_name)
            for name in feat:
                kind = self.field2type[name]
                if kind == FeatureType.TOKEN:
                    feat[name] = feat[name].fillna(0).astype(np.int64)
                elif kind == FeatureType.FLOAT:
                    feat[name] = feat[name].fillna(feat[name].mean())
                else:
                    empty = np.array([], dtype=np.int64 if kind == FeatureType.TOKEN_SEQ else np.float64)
                    column = np.empty(len(feat), dtype=object)
                    column[:] = [empty if isinstance(value, float) else value for value in feat[name]]
                    feat[name] = pd.Series(column, index=feat.index, dtype=object)

    def _preload_weight_matrix(self) -> None:
        """The vectors of dataset.py:575 in the precision of weights: ksr.py:153 multiplies the two."""
        super()._preload_weight_matrix()  # type: ignore[misc]
        weights = self._preloaded_weight  # type: ignore[attr-defined]
        weights.update({name: matrix.astype(np.float32) for name, matrix in weights.items()})

    def _concat_remaped_tokens(self, remap_list: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Replaces dataset.py:1175-1194: ``Series.agg(np.concatenate)`` no longer sees the whole column in pandas 3."""
        tokens = []
        for feat, name, kind in remap_list:
            if kind == FeatureType.TOKEN:
                tokens.append(feat[name].to_numpy(dtype=object))
            else:
                tokens.append(
                    np.concatenate([np.asarray(row, dtype=object) for row in feat[name]] or [np.array([], object)])
                )
        return np.concatenate(tokens), np.cumsum([len(part) for part in tokens])[:-1]

    def _remap(self, remap_list: list[Any]) -> None:
        """Replaces dataset.py:1196-1218, whose ``Series.agg(len)`` raises in pandas 3; the ids are the same."""
        if not remap_list:
            return
        tokens, split_point = self._concat_remaped_tokens(remap_list)
        codes, uniques = pd.factorize(tokens)
        tokens_by_id = np.array(["[PAD]", *uniques])
        id_by_token = {token: number for number, token in enumerate(tokens_by_id)}
        for (feat, name, kind), ids in zip(remap_list, np.split(codes + 1, split_point), strict=True):
            self.field2id_token.setdefault(name, tokens_by_id)
            self.field2token_id.setdefault(name, id_by_token)
            if kind == FeatureType.TOKEN:
                feat[name] = ids
            else:
                ends = np.cumsum([len(row) for row in feat[name]])[:-1]
                column = np.empty(len(feat), dtype=object)
                column[:] = np.split(ids, ends)
                feat[name] = pd.Series(column, index=feat.index, dtype=object)

    def _download(self) -> None:
        """Replaces dataset.py:236-255, whose first attempt always fails.

        It calls ``torch.distributed.barrier()`` without a process group, and asks a question where nobody
        may be there to answer.
        """
        download(self.dataset_name, Path(self.dataset_path))  # type: ignore[attr-defined]


def _nearest_of(name: str, columns: tuple[str, ...]) -> str:
    """The columns that a wrong name may mean, or all that there are."""
    return did_you_mean(name, columns) or f"; its columns: {', '.join(columns)}"


def download(name: str, folder: Path) -> None:
    """Fetch a data set that RecBole knows, whole or not at all; where another process does so, wait for it.

    Args:
        name: of the data set.
        folder: where its files go.

    Raises:
        UserError: RecBole knows none of that name, or it cannot be fetched.
    """
    from recbole.utils.url import download_url, extract_zip, rename_atomic_files

    where = f"put {name}.inter (and .item, .user) into {folder.parent / name}/, or set --data_path"
    url = _urls().get(name)
    if url is None:
        places = " or ".join(dict.fromkeys(("dataset", str(folder.parent))))
        raise UserError(
            f"no data set '{name}' in {places}, and RecBole knows none of that name"
            f"{did_you_mean(name, known_datasets(folder.parent))}; {where}"
        )
    made = not folder.parent.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{name}.lock")
    try:
        with FileLock(str(lock)):
            if folder.is_dir():
                return
            # Beside the others only when it is whole: an interrupted download must not look like a data set.
            with tempfile.TemporaryDirectory() as scratch:
                archive = download_url(url, scratch)
                extract_zip(archive, scratch)
                Path(archive).unlink()
                rename_atomic_files(scratch, Path(archive).stem, name)
                part = folder.with_name(f"{name}.part")
                shutil.rmtree(part, ignore_errors=True)
                shutil.copytree(scratch, part)
                part.rename(folder)
    except (urllib.error.URLError, OSError, zipfile.BadZipFile) as error:
        raise UserError(f"data set '{name}' is not here and could not be downloaded ({error}); {where}") from None
    finally:
        lock.unlink(missing_ok=True)
        if made and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def _urls() -> dict[str, str]:
    """Where RecBole's data sets can be fetched, by name."""
    import recbole
    import yaml

    file = Path(recbole.__file__).parent / "properties" / "dataset" / "url.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def known_datasets(data_path: Path) -> set[str]:
    """Names of the data sets that are here, that come with RecBole, or that it can download."""
    folders = {Path("dataset"), Path(__file__).parent.parent / "dataset", data_path}
    here = {entry.name for folder in folders if folder.is_dir() for entry in folder.iterdir() if entry.is_dir()}
    return here | {"ml-100k"} | set(_urls())
