"""Readers of raw training files: JSONL, Parquet and Arrow become a stream of typed examples.

Columns of three origins are understood (`_LAYOUTS`): the reference implementation of Piccolo2
(github.com/hjq133/piccolo-embedding), FlagEmbedding and sentence-transformers; and plain texts with
labels. A row that cannot be used is yielded as `Rejected` with its place and reason, and never
silently changed or dropped; a file that cannot be read is a `UserError`.
"""

import codecs
import dataclasses
import hashlib
import itertools
import json
import math
import os.path  # its tests are False, not an error, where a path can't be looked up
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from piccolo_jax.config import TASK_NAMES
from piccolo_jax.data import labels
from piccolo_jax.errors import UserError


@dataclasses.dataclass(frozen=True, slots=True)
class RetrievalExample:
    """A query, one or more texts that answer it, and any number that don't."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class SimilarityExample:
    """Two texts and their similarity on the dataset's own scale, a finite number."""

    first: str
    second: str
    score: float


@dataclasses.dataclass(frozen=True, slots=True)
class ClassificationExample:
    """A text, the text of its label (or labels), and label texts that are not its own."""

    text: str
    labels: tuple[str, ...]
    other_labels: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used."""

    place: str  # "FILE:LINE" in JSONL, "FILE:row N" in Arrow and Parquet, both from 1
    reason: str


Example = RetrievalExample | SimilarityExample | ClassificationExample
_Row = dict[str, Any]

_TYPES = {"retri_contrast": "retrieval", "cls_contrast": "classification", "cosent": "similarity"}
_PEEKED_ROWS = 100  # the task is decided by the first of these whose columns fit a layout
_ROWS_AT_ONCE = 1024  # of Arrow and Parquet, turned into Python objects
_LARGEST_SCORE = 3.4e38  # scores are kept as 32-bit floats
_SKIPPED_NAMES = re.compile(r"\..*|cache-.*\.arrow")  # hidden files; leftovers of datasets.map


@dataclasses.dataclass(frozen=True, slots=True)
class _Layout:
    """Column names of one format and the tasks they serve.

    `columns` are (text, positives) or (first text, second text, score). The first of `tasks` is
    meant where neither `type` nor the config says it, unless the columns are `ambiguous`.
    """

    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    negatives: str = ""  # an optional column, or several: NAME_1, NAME_2, ...
    ambiguous: bool = False

    def __str__(self) -> str:
        return ", ".join(self.columns) + (f"[, {self.negatives}]" if self.negatives else "")

    def likely_tasks(self, row: _Row) -> tuple[str, ...]:
        if not self.ambiguous:
            return self.tasks[:1]
        # Label indices beside the label texts mean classification.
        return ("classification",) if isinstance(row.get("label"), int | str) else self.tasks

    def negative_columns(self, row: _Row) -> list[str]:
        columns = (name for name in row if re.fullmatch(rf"{self.negatives}(_\d+)?", name))
        return sorted(columns, key=lambda name: (len(name), name))


_SCORED, _CONTRAST = ("similarity",), ("retrieval", "classification")
_LAYOUTS = (  # where a row fits several that serve its task, the first counts
    _Layout(("text", "text_pos"), _CONTRAST, "text_neg", ambiguous=True),
    _Layout(("text", "text_pair", "label"), _SCORED),
    _Layout(("query", "pos"), _CONTRAST, "neg"),
    _Layout(("query", "positive"), _CONTRAST, "negative"),
    _Layout(("anchor", "positive"), _CONTRAST, "negative"),
    _Layout(("sentence1", "sentence2", "score"), _SCORED),
    _Layout(("sentence1", "sentence2", "label"), _SCORED),
)
# A text and its label or labels: where no other layout fits, or the labels are named in a file.
_LABELLED = tuple(
    _Layout(columns, ("classification",))
    for columns in (("text", "label"), ("text", "labels"), ("sentence", "label"))
)


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One dataset of one task. Iterating reads its files anew each time, in bounded memory.

    Iteration raises UserError where a file turns out to be broken.
    """

    path: str
    files: tuple[Path, ...]
    task: str  # one of config.TASK_NAMES
    layout: _Layout
    names: labels.LabelNames | None = None
    keep: Callable[["Placed"], Iterator[Example | Rejected]] | None = None  # drops some examples

    def __iter__(self) -> Iterator[Example | Rejected]:
        return self.keep(self._placed()) if self.keep else (item for _, item in self._placed())

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The texts of all labels that the file of label names has."""
        return tuple(dict.fromkeys(self.names.values())) if self.names else ()

    def _placed(self) -> "Placed":
        for place, row in _rows(self.files):
            try:
                yield place, self._example(row)
            except _UnusableRowError as reason:
                yield place, Rejected(place, str(reason))

    def _example(self, row: _Row) -> Example:
        if _typed_task(row) not in ("", self.task):
            raise _UnusableRowError(f"type is {row['type']}, but the dataset's task is {self.task}")
        if self.task == "similarity":
            first, second, score = self.layout.columns
            return SimilarityExample(
                _text(row.get(first), first), _text(row.get(second), second), _score(row, score)
            )
        query, positive = self.layout.columns
        text = _text(row.get(query), query)
        if self.layout in _LABELLED:
            try:
                own = labels.own_labels(row.get(positive), positive, self.names)
            except ValueError as reason:
                raise _UnusableRowError(str(reason)) from None
            return ClassificationExample(text, own, ())
        positives = _texts(row, positive)
        if not positives:
            raise _UnusableRowError(f"no positive in {positive}")
        columns = self.layout.negative_columns(row)
        negatives = tuple(dict.fromkeys(n for column in columns for n in _texts(row, column)))
        if self.task == "retrieval":
            return RetrievalExample(text, positives, negatives)
        others = tuple(label for label in negatives if label not in positives)
        return ClassificationExample(text, positives, others)


Placed = Iterator[tuple[str, Example | Rejected]]  # with the places of their rows


class _UnusableRowError(Exception):
    pass


def open_source(
    path: str, task: str = "", label_names: str = "", label_language: str = ""
) -> Source:
    """Finds the files of a dataset and its task: from `type`, else the columns, else `task`.

    `label_names`: a file that names the labels of `text, label` rows (see data/labels.py).

    Raises UserError if the path is missing, empty, of no known format, if its first rows leave the
    task open, or if they contradict `task`.
    """
    names = labels.LabelNames(label_names, label_language) if label_names else None
    if task not in ("", *TASK_NAMES):
        raise UserError(f"{path}: task = {task!r}: must be one of {', '.join(TASK_NAMES)}")
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or directory")
    files = tuple(_data_files(Path(path)) if os.path.isdir(path) else [Path(path)])
    for file in files:
        if file.suffix.lower() not in _READERS:
            raise UserError(f"{file}: not a data file; known are {', '.join(_READERS)}")
        if not os.path.isfile(file):
            raise UserError(f"{file}: listed by the dataset but missing; copy the dataset again")
    peeked = list(itertools.islice(_rows(files), _PEEKED_ROWS))
    if not peeked:
        raise UserError(f"{path}: holds no rows")
    for place, row in peeked:
        if served := _served_tasks(row, _LABELLED if names else _LAYOUTS):
            chosen = _choose_task(path, place, row, served, task)
            return Source(path, files, chosen, served[chosen], names)
    for place, row in peeked:
        if served := _served_tasks(row, _LABELLED):
            chosen = _choose_task(path, place, row, served, task)
            if not labels.is_named(row[served[chosen].columns[1]]):
                raise UserError(
                    f"{place}: {served[chosen].columns[1]} is a number; name the labels in a file:"
                    f" label_names=FILE in the DatasetConfig of {path!r}"
                )
            return Source(path, files, chosen, served[chosen])
    place, row = peeked[0]
    formats = "; ".join(map(str, _LABELLED if names else (*_LAYOUTS, *_LABELLED)))
    raise UserError(f"{place}: columns {_describe(row)} fit no known format; rename to: {formats}")


def is_data_file(file: Path) -> bool:
    """Whether rows can be read from a file."""
    return os.path.isfile(file) and file.suffix.lower() in _READERS


def file_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    """(place, row) of a data file, whatever its columns. Raises UserError where it is broken."""
    return _rows((file,))


def digest_of(file: Path) -> str:
    """SHA-256 of a file. Raises UserError if it can't be read."""
    try:
        with file.open("rb") as data:
            return hashlib.file_digest(data, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror})") from None


def count_rows(files: Iterable[Path]) -> int | None:
    """Rows of data files, blank lines too: for progress bars. None where a file is damaged."""
    try:
        return sum(_COUNTERS[file.suffix.lower()](file) for file in files)
    except (OSError, pa.ArrowException):
        return None


def expand_meta_list(path: str) -> list[tuple[str, float]] | None:
    """The (directory, repeats) of a meta list; None for a directory, data file or missing path.

    Lines are `DIRECTORY REPEATS`, `#` begins a comment. A relative directory is looked for beside
    the meta list first, then in the current directory. Raises UserError naming the line.
    """
    meta = Path(path)
    if not os.path.isfile(path) or meta.suffix.lower() in _READERS:
        return None
    expected = f"`DIRECTORY REPEATS`, repeats above 0 (data files end in {', '.join(_READERS)})"
    try:
        lines = meta.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a text file of lines {expected}: {error}") from None
    entries = []
    for number, line in enumerate(lines, 1):
        entry = re.sub(r"(^|\s)#.*", "", line).strip()
        if not entry:
            continue
        fields = re.fullmatch(r"(.*\S)\s+(\d*\.?\d+)", entry)
        if not fields or not 0 < float(fields[2]) < math.inf:
            raise UserError(f"{path}:{number}: {entry[:80]!r} is not {expected}")
        places = dict.fromkeys((str(meta.parent / fields[1]), fields[1]))
        found = next(filter(os.path.exists, places), None)
        if found is None:
            raise UserError(f"{path}:{number}: no directory {' or '.join(places)}")
        entries.append((found, float(fields[2])))
    if not entries:
        raise UserError(f"{path}: empty; write a line `DIRECTORY REPEATS` per dataset")
    return entries


def _served_tasks(row: _Row, layouts: Iterable[_Layout]) -> dict[str, _Layout]:
    """The tasks a row could be read for and by which layout; its `type` leaves one at most."""
    columns = {name for name, value in row.items() if value is not None}
    served: dict[str, _Layout] = {}
    for layout in layouts:
        if columns.issuperset(layout.columns):
            for task in layout.tasks:
                served.setdefault(task, layout)
    typed = _typed_task(row)
    return {task: layout for task, layout in served.items() if typed in ("", task)}


def _choose_task(path: str, place: str, row: _Row, served: dict[str, _Layout], task: str) -> str:
    typed = _typed_task(row)
    if task and task not in served:
        found = f"type {row['type']}" if typed else f"columns {_describe(row)}"
        raise UserError(
            f"{place}: {found} means {' or '.join(served)}, but the DatasetConfig of {path!r} says"
            f' task="{task}"; correct it or leave it empty'
        )
    if typed or task:
        return typed or task
    likely = {t for layout in served.values() for t in layout.likely_tasks(row)}
    if len(likely) > 1:
        choices = [f'task="{t}"' for t in TASK_NAMES if t in likely]
        raise UserError(
            f"{place}: columns {_describe(row)} leave the task open; write {' or '.join(choices)}"
            f" in the DatasetConfig of {path!r}"
        )
    return likely.pop()


def _typed_task(row: _Row) -> str:
    """The task that `type` names; empty for none, or for a value of another project's."""
    kind = row.get("type")
    return _TYPES.get(kind, "") if isinstance(kind, str) else ""


def _describe(row: _Row) -> str:
    names = [name if value is not None else f"{name} (null)" for name, value in row.items()]
    if kind := _typed_task(row):
        names.append(f"with type for {kind}")
    return ", ".join(names).encode(errors="backslashreplace").decode()


def _text(value: Any, field: str) -> str:
    if value is None:
        raise _UnusableRowError(f"{field} is missing")
    if not isinstance(value, str):
        raise _UnusableRowError(f"{field} is {type(value).__name__}, not text")
    if not value or value.isspace():
        raise _UnusableRowError(f"{field} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _UnusableRowError(f"{field} holds a lone surrogate, which is no character") from None
    return value


def _texts(row: _Row, field: str) -> tuple[str, ...]:
    """The distinct texts of a column that is a text, a list of texts or null, in their order."""
    value = row.get(field)
    if value is None:
        return ()
    if not isinstance(value, list):
        return (_text(value, field),)
    return tuple(dict.fromkeys(_text(item, f"{field}[{i}]") for i, item in enumerate(value)))


def _score(row: _Row, field: str) -> float:
    value = row.get(field)
    if value is None:
        raise _UnusableRowError(f"{field} is missing")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _UnusableRowError(f"{field} is {type(value).__name__}, not a number")
    try:
        score = float(value)
    except OverflowError:  # JSON integers have no limit
        score = math.inf
    if not math.isfinite(score):
        raise _UnusableRowError(f"{field} is {'NaN' if math.isnan(score) else 'infinite'}")
    if abs(score) > _LARGEST_SCORE:
        raise _UnusableRowError(f"{field} is larger than a 32-bit float can be")
    return score


def _data_files(directory: Path) -> list[Path]:
    """Files of a saved `datasets` directory, or all of a directory with one kind of data file."""
    if not os.path.isdir(directory):
        raise UserError(f"{directory}: no such directory")
    splits, state = directory / "dataset_dict.json", directory / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_bytes())["splits"]
            return [file for name in names for file in _data_files(directory / name)]
        if state.is_file():
            saved = json.loads(state.read_bytes())
            if saved.get("_indices_data_files"):
                raise UserError(f"{state}: rows are selected by an index file, which is not read;"
                                " save the dataset again with datasets 2 or later")  # fmt: skip
            return [directory / file["filename"] for file in saved["_data_files"]]
        kinds: dict[str, list[Path]] = {}
        for file in sorted(directory.iterdir()):
            kind = file.suffix.lower()
            if kind in _DIRECTORY_KINDS and not _SKIPPED_NAMES.fullmatch(file.name):
                kinds.setdefault(kind, []).append(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: not a readable dataset ({error!r}); save it again") from None
    if len(kinds) != 1:
        found = f"files of several kinds: {', '.join(kinds)}" if kinds else "no data files"
        raise UserError(f"{directory}: holds {found}; name a directory with one of"
                        f" {', '.join(_DIRECTORY_KINDS)}, or a single file")  # fmt: skip
    return next(iter(kinds.values()))


def _rows(files: tuple[Path, ...]) -> Iterator[tuple[str, _Row]]:
    """(place, row) of all rows, in file order."""
    for file in files:
        try:
            yield from _READERS[file.suffix.lower()](file)
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise UserError(
                f"{file}: damaged or unreadable ({error}); make or copy it again"
            ) from error


def _jsonl_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            place = f"{file}:{number}"
            line = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
            if not line:
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise UserError(f"{place}: not UTF-8 ({error}); convert the file") from None
            except (ValueError, RecursionError) as error:
                what = str(error).replace("line 1 ", "")
                raise UserError(f"{place}: broken JSON ({what}); mend or delete the line") from None
            if not isinstance(row, dict):
                raise UserError(f"{place}: not a JSON object; write one object per line")
            yield place, row


def _count_lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for _ in lines)


def _parquet_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    with pq.ParquetFile(file) as parquet:
        yield from _table_rows(file, parquet.iter_batches(batch_size=_ROWS_AT_ONCE))


def _arrow_rows(file: Path) -> Iterator[tuple[str, _Row]]:
    yield from _table_rows(file, _arrow_batches(file))


def _arrow_batches(file: Path) -> Iterator[pa.RecordBatch]:
    """Of the stream format, which `datasets` writes, or the file format, which has a magic word."""
    with pa.memory_map(str(file)) as data:
        if data.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(data)
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            data.seek(0)
            yield from pa.ipc.open_stream(data)


def _table_rows(file: Path, batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[str, _Row]]:
    number = itertools.count(1)
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for row in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                yield f"{file}:row {next(number)}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, _Row]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".arrow": _arrow_rows,
}
_COUNTERS: dict[str, Callable[[Path], int]] = {
    ".jsonl": _count_lines,
    ".json": _count_lines,
    ".parquet": lambda file: pq.read_metadata(file).num_rows,
    ".arrow": lambda file: sum(batch.num_rows for batch in _arrow_batches(file)),
}
_DIRECTORY_KINDS = (".jsonl", ".parquet", ".arrow")  # .json beside data is metadata
