"""Rows of TFDS datasets by name, through `tfds.data_source`: without TensorFlow.

A name is `tfds:NAME[/CONFIG][:VERSION]:SPLIT`, with TFDS's own syntax of splits (`train[:10%]`).
Datasets lie in $TFDS_DATA_DIR, by default ~/tensorflow_datasets.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax.data.containers import NoRow, Row, Rows, digest_of
from piccolo_jax.errors import UserError

_NAME = re.compile(
    r"tfds:(?P<name>[A-Za-z_]\w*(/[\w.\-]+)?)(:(?P<version>\d+\.[\d*]+\.[\d*]+))?"
    r"(:(?P<split>[A-Za-z_].*))?"
)
_ROWS_AT_ONCE = 1024


def is_name(path: str) -> bool:
    """Whether a path names a TFDS dataset."""
    return path.startswith("tfds:")


def open_rows(path: str, download: bool) -> "TfdsRows":
    """Rows of a named dataset, which TFDS downloads and prepares if it isn't there.

    Raises UserError if there is no such dataset or split, or it isn't there and `download` isn't
    set.
    """
    parts = _NAME.fullmatch(path)
    if not parts:
        raise UserError(f"{path}: write tfds:NAME/CONFIG:SPLIT or tfds:NAME:VERSION:SPLIT,"
                        " e.g. tfds:my_pairs:1.0.0:train")  # fmt: skip
    name = parts["name"] + (f":{parts['version']}" if parts["version"] else "")
    rows = TfdsRows(path, name, parts["split"] or "", download)
    rows.open()
    return rows


@dataclasses.dataclass(frozen=True, slots=True)
class TfdsRows:
    """The rows of one split of a dataset, in the order of its files."""

    path: str
    name: str  # as TFDS has it: NAME/CONFIG:VERSION
    split: str
    download: bool

    def open(self) -> Any:
        """The split as tfds.data_source gives it: by random access. Raises UserError."""
        import tensorflow_datasets as tfds

        folder = os.environ.get("TFDS_DATA_DIR") or tfds.core.constants.DATA_DIR
        try:
            builder = tfds.builder(self.name, data_dir=folder)
        except Exception as error:
            raise UserError(
                f"{self.path}: no such dataset in {folder} or known to TFDS"
                f" ({_first_line(error)}); set TFDS_DATA_DIR to its folder"
            ) from None
        prepared = os.path.exists(builder.data_dir)
        if not prepared and not self.download:
            raise UserError(f"{self.path}: not in {folder} yet; prepare without --check"
                            " downloads it, or set TFDS_DATA_DIR to its folder")  # fmt: skip
        try:
            sources = tfds.data_source(self.name, data_dir=folder, download=not prepared)
            splits = ", ".join(sources)
            if not self.split and len(sources) > 1:
                raise UserError(f"{self.path}: has the splits {splits}; name one, as"
                                f" {self.path}:{next(iter(sources))}")  # fmt: skip
            if not self.split or self.split in sources:
                return sources[self.split or next(iter(sources))]
            try:
                return tfds.data_source(
                    self.name, split=self.split, data_dir=folder, download=False
                )
            except (ValueError, AssertionError, KeyError) as error:
                raise UserError(f"{self.path}: has the splits {splits}, not {self.split!r}"
                                f" ({_first_line(error)})") from None  # fmt: skip
        except NotImplementedError:
            raise UserError(f"{self.path}: lies in {folder} as TFRecord; prepare it again with"
                            " file_format=array_record") from None  # fmt: skip
        except UserError:
            raise
        except Exception as error:  # of as many kinds as there are datasets
            doing = "read" if prepared else "downloaded and prepared"
            raise UserError(
                f"{self.path}: can't be {doing} by TFDS"
                f" ({type(error).__name__}: {_first_line(error)})"
            ) from error

    def __iter__(self) -> Rows:
        source = self.open()
        for start in range(0, len(source), _ROWS_AT_ONCE):
            numbers = range(start, min(start + _ROWS_AT_ONCE, len(source)))
            try:
                examples = source.__getitems__(list(numbers))
            except (RuntimeError, ValueError, OSError) as error:
                raise UserError(f"{self.path}: damaged or unreadable ({_first_line(error)});"
                                " prepare it again") from error  # fmt: skip
            for number, example in zip(numbers, examples, strict=True):
                yield f"{self.path}:row {number + 1}", _row(example)

    def count(self) -> int | None:
        """See formats.RowReader."""
        return len(self.open())

    def content(self) -> list[list[str]]:
        """See formats.RowReader."""
        source = self.open()
        info = source.dataset_info
        split = source.split
        files = [Path(p) for p in info.splits[split].filepaths]
        return [["split", str(split)], *([file.name, digest_of(file)] for file in files)]


def _row(example: Any) -> Row | NoRow:
    if not isinstance(example, dict):
        return NoRow(f"{type(example).__name__}, not an object of named features")
    return {name: _plain(value) for name, value in example.items()}


def _plain(value: Any) -> Any:
    """Python's own types for numpy's, and text for UTF-8 bytes; other bytes stay."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if isinstance(value, list):
        return [_plain(member) for member in value]
    if isinstance(value, dict):
        return {name: _plain(member) for name, member in value.items()}
    return value


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
