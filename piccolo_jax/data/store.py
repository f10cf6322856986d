"""A prepared dataset on disk: tokenised unique texts, and index arrays over them.

DIR/manifest.json         schema, fingerprint, counts, rejected rows (written last)
DIR/texts.array_record    record n: the int32 token ids of text n
DIR/lengths.npy           int32 [texts], tokens per text
DIR/COLUMN.npy            one text id (or score) per row
DIR/COLUMN.values.npy     text ids of the row's lists, end to end, and
DIR/COLUMN.offsets.npy    int64 [rows + 1], where each list begins
"""

import dataclasses
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

    def members(self, row: int) -> np.ndarray:
        """The members of one row's list."""
        return self.values[self.offsets[row] : self.offsets[row + 1]]


Columns = dict[str, Any]  # column name -> int32 [rows], float32 [rows] (scores) or Ragged


class Store:
    """Read access to a prepared dataset; `columns` and `lengths` are memory-mapped.

    Raises UserError if the directory is not a complete prepared dataset.
    """

    def __init__(self, directory: Path):
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
            self._texts = grain.sources.ArrayRecordDataSource(str(directory / "texts.array_record"))
            if len(self._texts) != len(self.lengths):
                raise ValueError(f"{len(self._texts)} texts, {len(self.lengths)} lengths")
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{directory}: not a complete prepared dataset ({error}); delete it, and it is"
                " made again"
            ) from None
        self.name: str = self.manifest["name"]
        self.task: str = self.manifest["task"]
        self.num_rows: int = self.manifest["rows"]

    def tokens(self, texts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids, int32 [length], of each text id."""
        records = self._texts.__getitems__([int(i) for i in texts]) if len(texts) else []
        return [np.frombuffer(record, np.int32) for record in records]


def _load(directory: Path, name: str) -> np.ndarray:
    return np.load(directory / f"{name}.npy", mmap_mode="r")
