"""Raw training data become a stream of typed examples: `open_source` finds files, task and layout.

`containers` turns files into rows and `layouts` rows into examples; TFDS names are rows too. A row
that cannot be used is yielded as `Rejected` with its place and reason, and never silently changed
or dropped; a file that cannot be read is a `UserError`.
"""

import dataclasses
import itertools
import json
import math
import os.path  # its tests are False, not an error, where a path can't be looked up
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from piccolo_jax.config import TASK_NAMES
from piccolo_jax.data import labels, layouts, tfds_rows
from piccolo_jax.data.containers import (
    KNOWN_SUFFIXES,
    Container,
    NoRow,
    Row,
    Rows,
    container_of,
    digest_of,
    suffix_of,
)
from piccolo_jax.data.layouts import (
    ClassificationExample,
    ContradictingExample,
    Example,
    Layout,
    RetrievalExample,
    SimilarityExample,
)
from piccolo_jax.errors import UserError

__all__ = [
    "ClassificationExample", "ContradictingExample", "Example", "FileRows", "Placed", "Rejected",
    "RetrievalExample", "SimilarityExample", "Source", "digest_of", "expand_meta_list",
    "file_rows", "is_data_file", "open_files", "open_source",
]  # fmt: skip

_PEEKED_ROWS = 100  # the task is decided by the first of these whose columns fit a layout
# Hidden files; leftovers of datasets.map, and its notes.
_SKIPPED_NAMES = re.compile(r"\..*|cache-.*\.arrow|dataset_infos?\.json")
# Beside data of other kinds, notes about them: the first of these first.
_NOTES = (re.compile(r"\.json(\.\w+)?"), re.compile(r"\.[ct]sv(\.\w+)?"))


@dataclasses.dataclass(frozen=True, slots=True)
class Rejected:
    """A row that cannot be used. `damaged`: as containers.NoRow has it."""

    place: str  # "FILE:LINE" in text files, "FILE:row N" in others, both from 1
    reason: str
    damaged: bool = False


class RowReader(Protocol):
    """Where rows come from. Iterating reads them anew each time, in bounded memory."""

    def __iter__(self) -> Rows: ...
    def count(self) -> int | None:
        """Rows, about: for progress bars. None where they can't be counted."""

    def content(self) -> list[list[str]]:
        """(name, digest) of all that the rows depend on. Raises UserError."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileRows:
    """The rows of data files, in their order."""

    files: tuple[Path, ...]

    def __iter__(self) -> Rows:
        for file in self.files:
            try:
                if container := container_of(file):
                    yield from container.rows(file)
            except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
                raise UserError(
                    f"{file}: damaged or unreadable ({error}); make or copy it again"
                ) from error

    def count(self) -> int | None:
        """See RowReader."""
        try:
            kinds = [(container_of(file), file) for file in self.files]
            return sum(kind.count(file) for kind, file in kinds if kind)
        except (OSError, pa.ArrowException):
            return None

    def content(self) -> list[list[str]]:
        """See RowReader."""
        return [[file.name, digest_of(file)] for file in self.files]


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """One dataset of one task. Iterating reads its rows anew each time, in bounded memory.

    Iteration raises UserError where a file turns out to be damaged, unless `lenient`: then the
    place is a Rejected, and what follows is read if it can be.
    """

    path: str
    rows: RowReader
    task: str  # one of config.TASK_NAMES
    layout: Layout
    lenient: bool = False
    names: labels.LabelNames | None = None
    keep: Callable[["Placed"], Iterator[Example | Rejected]] | None = None  # drops some examples

    def __iter__(self) -> Iterator[Example | Rejected]:
        return self.keep(self._placed()) if self.keep else (item for _, item in self._placed())

    @property
    def label_texts(self) -> tuple[str, ...]:
        """The texts of all labels that the file of label names has."""
        return tuple(dict.fromkeys(self.names.values())) if self.names else ()

    def _placed(self) -> "Placed":
        for place, row in self.rows:
            if isinstance(row, NoRow):
                if row.damaged and not self.lenient:
                    raise UserError(f"{place}: {row.reason}")
                yield place, Rejected(place, row.reason, row.damaged)
                continue
            try:
                yield place, self._example(row)
            except layouts.UnusableRowError as reason:
                yield place, Rejected(place, str(reason))

    def _example(self, row: Row) -> Example:
        if self.layout in layouts.LABELLED:
            return layouts.labelled_example(self.layout, row, self.names)
        return self.layout.example(row, self.task)


Placed = Iterator[tuple[str, Example | Rejected]]  # with the places of their rows


def open_source(
    path: str,
    task: str = "",
    lenient: bool = False,
    download: bool = True,
    label_names: str = "",
    label_language: str = "",
) -> Source:
    """Finds the rows of a dataset and its task: from `type`, else the columns, else `task`.

    `path` is a file, a directory, or `tfds:NAME/CONFIG:SPLIT`, which TFDS downloads if it isn't on
    this machine and `download` is set. `lenient`: see Source. `label_names`: a file that names
    the labels of `text, label` rows (data/labels.py).

    Raises UserError if the path is missing, empty, of no known format, if its first rows leave the
    task open, or if they contradict `task`.
    """
    if task not in ("", *TASK_NAMES):
        raise UserError(f"{path}: task = {task!r}: must be one of {', '.join(TASK_NAMES)}")
    names = labels.LabelNames(label_names, label_language) if label_names else None
    rows: RowReader = (
        tfds_rows.open_rows(path, download) if tfds_rows.is_name(path) else open_files(path)
    )
    peeked = list(itertools.islice(rows, _PEEKED_ROWS))
    usable = [(place, row) for place, row in peeked if not isinstance(row, NoRow)]
    for place, row in peeked:
        if isinstance(row, NoRow) and ((row.damaged and not lenient) or not usable):
            raise UserError(f"{place}: {row.reason}")
    for place, row in usable:
        if served := layouts.served_tasks(row, layouts.LABELLED if names else layouts.LAYOUTS):
            chosen = _choose_task(path, place, row, served, task)
            if not names:
                _check_named(path, place, row, served[chosen])
            if chosen == "retrieval":
                _check_not_graded(place, row, served[chosen])
            return Source(path, rows, chosen, served[chosen], lenient, names)
    for place, row in usable:
        if served := layouts.served_tasks(row, layouts.LABELLED):
            chosen = _choose_task(path, place, row, served, task)
            _check_named(path, place, row, served[chosen])
            return Source(path, rows, chosen, served[chosen], lenient)
    if not usable:
        raise UserError(f"{path}: holds no rows; add some, or leave it out")
    place, row = usable[0]
    known = layouts.LABELLED if names else (*layouts.LAYOUTS, *layouts.LABELLED)
    columns, described = "; ".join(map(str, known)), layouts.describe(row)
    raise UserError(f"{place}: columns {described} fit no known format; rename to: {columns}")


def is_data_file(file: Path) -> bool:
    """Whether a file's name says that it holds rows."""
    return os.path.isfile(file) and suffix_of(file) != ""


def file_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of a data file, whatever its columns. Raises UserError where one is broken."""
    for place, row in FileRows((file,)):
        if isinstance(row, NoRow):
            raise UserError(f"{place}: {row.reason}")
        yield place, row


def expand_meta_list(path: str) -> list[tuple[str, float]] | None:
    """The (dataset, repeats) of a meta list; None for data, a directory or a missing path.

    Lines are `DIRECTORY REPEATS`, `#` begins a comment; what stands in place of DIRECTORY may be
    whatever open_source takes. A relative path is looked for beside the meta list first, then in
    the current directory. Raises UserError naming the line.
    """
    meta = Path(path)
    if not os.path.isfile(path) or _container(meta):
        return None
    expected = f"`DIRECTORY REPEATS`, repeats above 0 (data files end in {KNOWN_SUFFIXES})"
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
        if tfds_rows.is_name(fields[1]):
            found = fields[1]
        if found is None:
            where = " or ".join(places)
            raise UserError(f"{path}:{number}: no directory {where}; correct or delete the line")
        if os.path.isfile(found) and not _container(Path(found)):
            raise UserError(
                f"{path}:{number}: {found} is no data file ({KNOWN_SUFFIXES}); lists don't nest"
            )
        entries.append((found, float(fields[2])))
    if not entries:
        raise UserError(f"{path}: empty; write a line `DIRECTORY REPEATS` per dataset")
    return entries


def open_files(path: str) -> FileRows:
    """The rows of a file or directory, whatever their columns. Raises UserError."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file or directory; correct the path")
    files = tuple(_data_files(Path(path)) if os.path.isdir(path) else [Path(path)])
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{file}: listed by the dataset but missing; copy the dataset again")
        if not _container(file):
            raise UserError(f"{file}: not a data file; known are {KNOWN_SUFFIXES}")
    return FileRows(files)


def _container(file: Path) -> Container | None:
    try:
        return container_of(file)
    except OSError as error:
        raise UserError(f"{file}: can't be read ({error.strerror or error})") from None


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
            kind = suffix_of(file)
            if kind and not _SKIPPED_NAMES.fullmatch(file.name):
                kinds.setdefault(kind, []).append(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{directory}: not a readable dataset ({error!r}); save it again") from None
    for notes in _NOTES:
        data = {kind: files for kind, files in kinds.items() if not notes.fullmatch(kind)}
        kinds = data or kinds
    if len(kinds) != 1:
        found = f"files of several kinds: {', '.join(kinds)}" if kinds else "no data files"
        raise UserError(f"{directory}: holds {found}; name a directory with one kind of data file"
                        f" ({KNOWN_SUFFIXES}), or a single file")  # fmt: skip
    return next(iter(kinds.values()))


def _check_named(path: str, place: str, row: Row, layout: Layout) -> None:
    """Raises UserError for labels that are numbers, of which there are no names."""
    field = layout.columns[1]
    if field in ("label", "labels") and not labels.is_named(row[field]):
        raise UserError(
            f"{place}: {field} is a number; name the labels in a file: label_names=FILE in the"
            f" DatasetConfig of {path!r}"
        )


def _check_not_graded(place: str, row: Row, layout: Layout) -> None:
    """Raises UserError for positives with labels or scores, some of which may be negatives."""
    if graded := layouts.grades(layout, row):
        query, positive = layout.columns
        raise UserError(
            f"{place}: {graded[0]} beside {query}, {positive} leaves open which of {positive} are"
            f" positives; put the others into negative_1, negative_2, ... and leave out"
            f" {graded[0]}, or, for similarity, rename to sentence1, sentence2, score"
        )


def _choose_task(path: str, place: str, row: Row, served: dict[str, Layout], task: str) -> str:
    typed = layouts.typed_task(row)
    if task and task not in served:
        found = f"type {row['type']}" if typed else f"columns {layouts.describe(row)}"
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
            f"{place}: columns {layouts.describe(row)} leave the task open; write"
            f" {' or '.join(choices)} in the DatasetConfig of {path!r}"
        )
    return likely.pop()
