"""Columns of rows, and the typed examples they become.

Six origins of columns are understood: the reference implementation of Piccolo2
(github.com/hjq133/piccolo-embedding), FlagEmbedding, sentence-transformers, Tevatron, the names of
the examples' own fields, and plain texts with labels. Adding one is adding a `Layout` to LAYOUTS.
"""

import dataclasses
import decimal
import math
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Any

from piccolo_jax.data import labels
from piccolo_jax.data.containers import NumberLike, Row


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


class ContradictingExample(ClassificationExample):
    """One whose row lists a label of its own among the others too; there it is left out."""

    __slots__ = ()


Example = RetrievalExample | SimilarityExample | ClassificationExample


class UnusableRowError(Exception):
    """Why a row can't be an example."""


TYPES = {"retri_contrast": "retrieval", "cls_contrast": "classification", "cosent": "similarity"}
_INVISIBLE = {"Zs", "Zl", "Zp", "Cc", "Cf"}  # Unicode categories: spaces, control and format
_LARGEST_SCORE = 3.4e38  # scores are kept as 32-bit floats


def _members(value: Any) -> list[Any]:
    """Members of a column that is a text, a list of texts or null."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _passages(value: Any) -> list[Any]:
    """Texts of Tevatron's passages {docid, title, text}, title first; lists of each do as well."""
    if isinstance(value, dict):  # what TFDS and `datasets` make of a list of objects
        lists = {name: v for name, v in value.items() if isinstance(v, list)}
        value = [dict(zip(lists, row, strict=False)) for row in zip(*lists.values(), strict=False)]
    texts = []
    for passage in _members(value):
        if not isinstance(passage, dict):
            raise UnusableRowError(f"a passage is {type(passage).__name__}, not an object")
        title, text = passage.get("title"), passage.get("text")
        titled = isinstance(title, str) and isinstance(text, str) and title.strip()
        texts.append(f"{title} {text}" if titled else text)
    return texts


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """Column names of one format and the tasks they serve.

    `columns` are (text, positives) or (first text, second text, score). The first of `tasks` is
    meant where neither `type` nor the config says it, unless the columns are `ambiguous`.
    """

    columns: tuple[str, ...]
    tasks: tuple[str, ...]
    negatives: str = ""  # an optional column, or several: NAME_1, NAME_2, ...
    ambiguous: bool = False
    members: Callable[[Any], list[Any]] = _members  # texts of a column of positives or negatives

    def __str__(self) -> str:
        return ", ".join(self.columns) + (f"[, {self.negatives}]" if self.negatives else "")

    def likely_tasks(self, row: Row) -> tuple[str, ...]:
        """The tasks that a row of these columns may mean."""
        if not self.ambiguous:
            return self.tasks[:1]
        # Label indices beside the label texts mean classification.
        return ("classification",) if isinstance(row.get("label"), int | str) else self.tasks

    def example(self, row: Row, task: str) -> Example:
        """What a row says. Raises UnusableRowError."""
        if typed_task(row) not in ("", task):
            raise UnusableRowError(f"type is {row['type']}, but the dataset's task is {task}")
        if task == "similarity":
            first, second, score = self.columns
            return SimilarityExample(
                _text(row.get(first), first), _text(row.get(second), second), _score(row, score)
            )
        query, positive = self.columns
        text = _text(row.get(query), query)
        positives = self._texts(row, positive)
        if not positives:
            raise UnusableRowError(f"no positive in {positive}")
        columns = self.negative_columns(row)
        negatives = tuple(dict.fromkeys(n for column in columns for n in self._texts(row, column)))
        if task == "retrieval":
            return RetrievalExample(text, positives, negatives)
        others = tuple(label for label in negatives if label not in positives)
        kind = ClassificationExample if others == negatives else ContradictingExample
        return kind(text, positives, others)

    def negative_columns(self, row: Row) -> list[str]:
        """The row's columns of negatives, in their order."""
        names = rf"{self.negatives}(s|_\d+)?"
        columns = (name for name in row if self.negatives and re.fullmatch(names, name))
        return sorted(columns, key=lambda name: (len(name), name))

    def _texts(self, row: Row, field: str) -> tuple[str, ...]:
        """The distinct texts of a column, in their order."""
        value = row.get(field)
        members = self.members(value)
        if members == [value]:
            return (_text(value, field),)
        return tuple(dict.fromkeys(_text(item, f"{field}[{i}]") for i, item in enumerate(members)))


_SCORED, _CONTRAST = ("similarity",), ("retrieval", "classification")
LAYOUTS = (  # where a row fits several that serve its task, the first counts
    Layout(("text", "text_pos"), _CONTRAST, "text_neg", ambiguous=True),
    Layout(("text", "text_pair", "label"), _SCORED),
    Layout(("query", "pos"), _CONTRAST, "neg"),
    Layout(("query", "positive"), _CONTRAST, "negative"),
    Layout(("anchor", "positive"), _CONTRAST, "negative"),
    Layout(("sentence1", "sentence2", "score"), _SCORED),
    Layout(("sentence1", "sentence2", "label"), _SCORED),
    Layout(("query", "positive_passages"), ("retrieval",), "negative_passages", members=_passages),
    Layout(("query", "positives"), ("retrieval",), "negatives"),
    Layout(("first", "second", "score"), _SCORED),
    Layout(("text", "labels"), ("classification",), "other_labels"),
)
# A text and its label or labels: where no other layout fits, or the labels are named in a file.
LABELLED = tuple(
    Layout(columns, ("classification",))
    for columns in (("text", "label"), ("text", "labels"), ("sentence", "label"))
)


def labelled_example(
    layout: Layout, row: Row, names: labels.LabelNames | None
) -> ClassificationExample:
    """What a row of LABELLED says. Raises UnusableRowError."""
    if typed_task(row) not in ("", "classification"):
        raise UnusableRowError(f"type is {row['type']}, but the dataset's task is classification")
    text, label = layout.columns
    try:
        own = labels.own_labels(row.get(label), label, names)
    except ValueError as reason:
        raise UnusableRowError(str(reason)) from None
    return ClassificationExample(_text(row.get(text), text), own, ())


def grades(layout: Layout, row: Row) -> list[str]:
    """Columns that grade what the layout takes for positives: not all of them may be some.

    sentence-transformers' mine_hard_negatives writes `label` or `labels` beside `anchor, positive`
    where `positive` holds negatives too, and `score` or `scores`, which grade negatives as well
    where there are columns of those.
    """
    if layout.columns[1:] != ("positive",):
        return []
    names = ["label", "labels"]
    if not layout.negative_columns(row):
        names += ["score", "scores"]
    return [
        name
        for name in names
        if (values := _members(row.get(name)))
        and all(isinstance(value, int | float | NumberLike) for value in values)
    ]


def typed_task(row: Row) -> str:
    """The task that `type` names; empty for none, or for a value of another project's."""
    kind = row.get("type")
    return TYPES.get(kind, "") if isinstance(kind, str) else ""


def served_tasks(row: Row, layouts: Iterable[Layout] = LAYOUTS) -> dict[str, Layout]:
    """The tasks a row could be read for and by which layout; its `type` leaves one at most."""
    columns = {name for name, value in row.items() if value is not None}
    served: dict[str, Layout] = {}
    for layout in layouts:
        if columns.issuperset(layout.columns):
            for task in layout.tasks:
                served.setdefault(task, layout)
    typed = typed_task(row)
    return {task: layout for task, layout in served.items() if typed in ("", task)}


def describe(row: Row) -> str:
    """The names of a row's columns, for messages."""
    names = [name if value is not None else f"{name} (null)" for name, value in row.items()]
    if kind := typed_task(row):
        names.append(f"with type for {kind}")
    return ", ".join(names).encode(errors="backslashreplace").decode()


def _text(value: Any, field: str) -> str:
    if value is None:
        raise UnusableRowError(f"{field} is missing")
    if not isinstance(value, str):
        raise UnusableRowError(f"{field} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UnusableRowError(f"{field} holds a lone surrogate, which is no character") from None
    if all(unicodedata.category(character) in _INVISIBLE for character in value):
        raise UnusableRowError(f"{field} is empty")
    return value


def _score(row: Row, field: str) -> float:
    value = row.get(field)
    if value is None:
        raise UnusableRowError(f"{field} is missing")
    if isinstance(value, NumberLike | decimal.Decimal):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UnusableRowError(f"{field} is {type(value).__name__}, not a number")
    try:
        score = float(value)
    except OverflowError:  # JSON integers have no limit
        score = math.inf
    if not math.isfinite(score):
        raise UnusableRowError(f"{field} is {'NaN' if math.isnan(score) else 'infinite'}")
    if abs(score) > _LARGEST_SCORE:
        raise UnusableRowError(f"{field} is larger than a 32-bit float can be")
    return score + 0.0  # of -0 and 0 one
