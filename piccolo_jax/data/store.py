"""A prepared dataset on disk: tokenised unique texts, and index arrays over them.

DIR/manifest.json         schema, fingerprint, counts, rejected rows (written last)
DIR/texts.array_record    record n: the int32 token ids of text n
DIR/lengths.npy           int32 [texts], tokens per text
DIR/COLUMN.npy            one text id (or score) per row
DIR/COLUMN.values.npy     text ids of the row's lists, end to end, and
DIR/COLUMN.offsets.npy    int64 [rows + 1], where each list begins
                          (labels beyond the last list are named, but no row's)
"""

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain
import numpy as np

from piccolo_jax.errors import UserError

MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class TextColumn:
    """A column of texts: its prompt, whether the queries' length limit applies, lists or not."""

    name: str
    prompt: str  # "query" or "passage"
    is_query: bool = False
    ragged: bool = False


@dataclasses.dataclass(frozen=True)
class Ragged:
    """One list per row: row i's members are values[offsets[i]:offsets[i + 1]]."""

    values: np.ndarray
    offsets: np.ndarray

    def sizes(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of members, int64 [len(rows)]."""
        return self.offsets[rows + 1] - self.offsets[rows]

    @functools.cached_property
    def distinct(self) -> np.ndarray:
        """All values, each once, increasing."""
        return np.unique(self.values)

    def by_key(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row ids in the order of the rows' keys, which never change, and the keys in it."""
        if "_by_key" not in self.__dict__:  # sorted once, for every step
            order = np.argsort(keys, kind="stable")
            self.__dict__["_by_key"] = order, keys[order]
        return self.__dict__["_by_key"]


Columns = dict[str, Any]  # column name -> int32 [rows], float32 [rows] (scores) or Ragged


class Store:
    """Read access to a prepared dataset; `columns` and `lengths` are memory-mapped.

    Raises UserError if the directory is not a complete prepared dataset.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        try:
            self.manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
            self.lengths = np.load(directory / "lengths.npy", mmap_mode="r")
            self.columns: Columns = {}
            for name, ragged in self.manifest["columns"].items():
                self.columns[name] = (
                    Ragged(_load(directory, f"{name}.values"), _load(directory, f"{name}.offsets"))
                    if ragged
                    else _load(directory, name)
                )
            self.name: str = self.manifest["name"]
            self.task: str = self.manifest["task"]
            self.num_rows: int = self.manifest["rows"]
            for name, column in self.columns.items():
                rows = len(column.offsets) - 1 if isinstance(column, Ragged) else len(column)
                if rows != self.num_rows:
                    raise ValueError(f"{rows} rows in {name}, {self.num_rows} in {MANIFEST}")
            self._texts = grain.sources.ArrayRecordDataSource(str(directory / "texts.array_record"))
            if len(self._texts) != len(self.lengths):
                raise ValueError(f"{len(self._texts)} texts, {len(self.lengths)} lengths")
        except (
            OSError, EOFError, ValueError, TypeError, AttributeError, LookupError, RuntimeError
        ) as error:  # fmt: skip
            raise self._broken(error) from None

    def tokens(self, texts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids, int32 [length], of each text id. Raises UserError if the file is damaged."""
        if not len(texts):
            return []
        try:
            records = self._texts.__getitems__([int(i) for i in texts])
        except RuntimeError as error:
            raise self._broken(error) from None
        return [np.frombuffer(record, np.int32) for record in records]

    def _broken(self, error: Exception) -> UserError:
        return UserError(
            f"{self._directory}: not a complete prepared dataset ({error}); delete it, and it is"
            " made again"
        )


def _load(directory: Path, name: str) -> np.ndarray:
    return np.load(directory / f"{name}.npy", mmap_mode="r")
