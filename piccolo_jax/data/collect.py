"""The examples of a dataset become columns of text ids: to be written, or only counted."""

import collections
import dataclasses
import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import tqdm

from piccolo_jax.data import formats
from piccolo_jax.data.store import Columns, Ragged, TextColumn
from piccolo_jax.data.texts import TextTable
from piccolo_jax.errors import UnusableDatasetError

_ROWS_AT_ONCE = 2048
_MOST_REJECTED_LISTED = 10_000


class TaskColumns(Protocol):
    """What preparation needs of a task: its text columns and its score column."""

    @property
    def columns(self) -> tuple[TextColumn, ...]: ...  # noqa: D102
    @property
    def score_column(self) -> str | None: ...  # noqa: D102


@dataclasses.dataclass
class RejectedRows:
    """How many rows can't be used, why, and the first of them."""

    count: int = 0
    reasons: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    first: list[formats.Rejected] = dataclasses.field(default_factory=list)

    def add(self, row: formats.Rejected) -> None:
        """Counts one row."""
        self.count += 1
        self.reasons[row.reason] += 1
        if len(self.first) < _MOST_REJECTED_LISTED:
            self.first.append(row)


@dataclasses.dataclass(frozen=True)
class Collected:
    """Columns as Store has them, of rows that can be used; and the rows that can't."""

    num_rows: int
    columns: Columns
    rejected: RejectedRows


# Called with examples, and by column their texts' ids and whether each was cut, end to end.
Observer = Callable[[Sequence[Any], dict[str, tuple[np.ndarray, np.ndarray]]], object]


def collect(
    source: formats.Source,
    task: TaskColumns,
    texts: TextTable,
    doing: str,
    quiet: bool = False,
    observe: Observer = lambda examples, ids: None,
) -> Collected:
    """Reads all of a dataset, with a progress bar that says what it is `doing` unless `quiet`.

    Raises UserError for files that can't be read, UnusableDatasetError for rows that can't be
    trained on.
    """
    columns = {column.name: _Column() for column in task.columns}
    scores, num_rows = array("f"), 0
    rejected = RejectedRows()
    with tqdm.tqdm(total=source.rows.count(), desc=doing, unit=" rows", disable=quiet) as bar:
        for num_read, examples in _usable(source, rejected):
            found = {}
            for column in task.columns:
                lists = [getattr(example, column.name) for example in examples]
                lists = lists if column.ragged else [(text,) for text in lists]
                found[column.name] = texts.add([t for texts_ in lists for t in texts_], column)
                columns[column.name].add(found[column.name][0], [len(texts_) for texts_ in lists])
            if task.score_column:
                scores.extend(getattr(example, task.score_column) for example in examples)
            num_rows += len(examples)
            observe(examples, found)
            bar.update(num_read)
    for column in task.columns:
        if column.name == "labels":  # beyond the last row's: to be contrasted with
            columns["labels"].add(texts.add(source.label_texts, column)[0], [])
    if num_rows == 0:
        first = f"; the first: {rejected.first[0].place}: {rejected.first[0].reason}"
        raise UnusableDatasetError(
            f"{source.path}: no usable row for task {source.task!r},"
            f" {rejected.count} rejected{first if rejected.first else ''}"
        )
    arrays: Columns = {c.name: columns[c.name].array(c.ragged) for c in task.columns}
    if task.score_column:
        arrays[task.score_column] = np.array(scores, np.float32)
    return Collected(num_rows, arrays, rejected)


def check_labels(source: formats.Source, collected: Collected) -> None:
    """Raises UnusableDatasetError if no row of classification has a label that isn't its own."""
    if source.task == "classification":
        own, others = (collected.columns[name] for name in ("labels", "other_labels"))
        distinct = len(np.unique(np.concatenate([own.values, others.values])))
        row = np.repeat(np.arange(collected.num_rows), np.diff(own.offsets))
        pairs = np.unique(row << 32 | own.values[: len(row)])
        if np.bincount(pairs >> 32).min() == distinct:
            labels = "label" if distinct == 1 else f"{distinct} labels"
            raise UnusableDatasetError(
                f"{source.path}: all {collected.num_rows} rows have the same {labels} and list no"
                " other; contrast against label texts needs at least two labels, one of them not"
                " the row's own. Leave the dataset out (data.skip_unusable leaves out all such)"
            )


def _usable(
    source: formats.Source, rejected: RejectedRows
) -> Iterator[tuple[int, list[formats.Example]]]:
    """(rows read, examples among them) in turn. What drops examples does it here, and says so."""
    rows = iter(source)
    while chunk := list(itertools.islice(rows, _ROWS_AT_ONCE)):
        examples = []
        for item in chunk:
            if isinstance(item, formats.Rejected):
                rejected.add(item)
            else:
                examples.append(item)
        yield len(chunk), examples


class _Column:
    """Lists of text ids, one a row, in the making."""

    def __init__(self) -> None:
        self._values, self._sizes = array("i"), array("i")

    def add(self, ids: np.ndarray, sizes: list[int]) -> None:
        self._values.frombytes(ids.tobytes())
        self._sizes.extend(sizes)

    def array(self, ragged: bool) -> np.ndarray | Ragged:
        values = np.array(self._values, np.int32)
        if not ragged:
            return values
        offsets = np.zeros(len(self._sizes) + 1, np.int64)
        np.cumsum(self._sizes, out=offsets[1:])
        return Ragged(values, offsets)
