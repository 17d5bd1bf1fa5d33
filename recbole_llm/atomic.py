"""RecBole's atomic files, read exactly.

dataset.py:490 reads them with pandas' python engine, default quoting and default missing values: a title that opens
with a quote breaks the whole file, ``NA`` becomes an empty text, and a row with a field too many or too few is
shifted silently. Here every field is what stands between two separators, and a broken row is named.
"""

from __future__ import annotations

import codecs
import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recbole_llm.errors import UserError

FIELD_TYPES = ("token", "token_seq", "float", "float_seq")
LONGEST_NAME = 60  # letters of a column's name that an error shows


@dataclass(frozen=True)
class AtomicFile:
    """The bytes of one atomic file, checked for shape.

    Attributes:
        path: the file.
        names: its columns, in order.
        types: each column's RecBole type.
        data: the whole file in UTF-8, each line ended by a line feed.
        separator: between fields.
    """

    path: Path
    names: tuple[str, ...]
    types: tuple[str, ...]
    data: bytes
    separator: str

    def frame(self, columns: list[str]) -> pd.DataFrame:
        """Read columns: floats as float64 (empty: NaN), everything else as the exact text.

        Args:
            columns: names to read, in the file's order.

        Raises:
            UserError: a float column holds something that is no number (line and column named).
        """
        floats = {name for name, kind in zip(self.names, self.types, strict=True) if kind == "float"}
        # A carriage return inside a text must not end the line.
        lines = {"lineterminator": "\n"} if b"\r" in self.data else {}
        frame = pd.read_csv(
            io.BytesIO(self.data),
            sep=self.separator,
            header=0,
            names=list(self.names),
            usecols=columns,
            dtype={name: object for name in columns},
            quoting=csv.QUOTE_NONE,
            keep_default_na=False,
            encoding="utf-8",
            encoding_errors="strict",
            engine="c",
            index_col=False,
            **lines,
        )
        for name in columns:
            if name in floats:
                frame[name] = self._as_float(frame[name])
        return frame

    def _as_float(self, column: pd.Series) -> np.ndarray:
        texts = column.to_numpy(dtype=object)
        texts = np.where(texts == "", "nan", texts)
        try:
            return texts.astype(np.float64)
        except ValueError:
            for row, text in enumerate(texts):
                try:
                    float(text)
                except ValueError:
                    line = self._line_of_row(row)
                    raise UserError(
                        f"{self.path}, line {line}, column '{column.name}': {text!r} is no number"
                    ) from None
            raise

    def _line_of_row(self, row: int) -> int:
        """The line (from 1) of a data row: pandas skips empty lines."""
        seen = -1
        for number, line in enumerate(self.data.split(b"\n")[1:], start=2):
            seen += bool(line)
            if seen == row:
                return number
        return row + 2


def open_atomic(path: Path, separator: str = "\t", encoding: str = "utf-8") -> AtomicFile:
    """Open an atomic file and check that every row has the header's fields.

    Args:
        path: the file.
        separator: between fields.
        encoding: of the text.

    Raises:
        UserError: no such file, encoding or separator, a header that is not ``name:type``, bytes that are no text, or
            a row with too few or too many fields; the line is named.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    # Of more than one byte it would be more than one character to pandas.
    if not isinstance(separator, str) or len(separator) != 1 or separator in "\r\n" or not separator.isascii():
        raise UserError(f"field_separator should be one ASCII character, but is {separator!r}")
    data = path.read_bytes()
    try:
        text = data.decode(encoding)
        # In UTF-16 the bytes of a line feed or a separator are those of other letters too.
        data = data if codecs.lookup(encoding).name == "utf-8" else text.encode()
    except (LookupError, TypeError):
        raise UserError(f"encoding: there is no '{encoding}' of texts, e.g. utf-8 or latin-1") from None
    except UnicodeEncodeError:
        raise UserError(f"{path} is no {encoding} text") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: byte {data[error.start]:#04x} is no {encoding} text") from None
    if "\0" in text:
        # Whoever reads it after this would end the field there, and ids that differ behind it would be one.
        raise UserError(f"{path}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}: a null character in a field")
    header = text[: text.find("\n")] if "\n" in text else text
    # A carriage return before a line feed belongs to the line's end only where the header's own line ends so.
    if header.endswith("\r"):
        data = data.replace(b"\r\n", b"\n").removesuffix(b"\r")
    names, types = _parse_header(path, header.lstrip("\ufeff").removesuffix("\r"), separator)
    _check_rows(path, data, separator.encode(), len(names))
    return AtomicFile(path, names, types, data, separator)


def _parse_header(path: Path, header: str, separator: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    names, types = [], []
    for field in header.split(separator):
        name, colon, kind = field.rpartition(":")
        if not colon or kind not in FIELD_TYPES:
            # A file of another encoding may be one line.
            shown = field if len(field) <= LONGEST_NAME else f"{field[:LONGEST_NAME]}..."
            raise UserError(
                f"{path}, line 1: column {shown!r} should read name:type with type one of {', '.join(FIELD_TYPES)}"
            )
        if name in names:
            raise UserError(f"{path}, line 1: column '{name}' stands twice")
        names.append(name)
        types.append(kind)
    return tuple(names), tuple(types)


def _check_rows(path: Path, data: bytes, separator: bytes, fields: int) -> None:
    """Compare every line's number of separators with the header's, as array operations over the file's bytes."""
    codes = np.frombuffer(data, dtype=np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    if not len(codes) or codes[-1] != ord("\n"):
        ends = np.append(ends, len(codes))
    starts = np.concatenate(([0], ends[:-1] + 1))
    separators = np.flatnonzero(codes == separator[0])
    counts = np.searchsorted(separators, ends) - np.searchsorted(separators, starts)
    bad = np.flatnonzero((counts != fields - 1) & (ends > starts))
    if len(bad):
        line = int(bad[0])
        raise UserError(f"{path}, line {line + 1}: {counts[line] + 1} fields where the header has {fields}")
