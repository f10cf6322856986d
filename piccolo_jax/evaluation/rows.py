"""Rows of evaluation sets, checked: what each of the six task types is made of.

Every reader raises UserError naming the file, the line and the fix for a row that can't be used:
evaluation takes every row or none.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from piccolo_jax.data import containers
from piccolo_jax.errors import UserError

_LARGEST = sys.float_info.max
VERSION = 1  # raised whenever the same files give other data


@dataclasses.dataclass(frozen=True)
class Data:
    """What a task evaluates. Which fields are set depends on the type.

    texts, labels: the rows; of STS and PairClassification `texts` and `others` are the pairs, and
      `labels` their scores or 0 and 1.
    sets: where each clustering begins in the rows, and the end.
    train_texts, train_labels: of Classification.
    queries, documents, relevant, candidates: of Retrieval and Reranking: texts (title, text) by id,
      gain by query and document, and documents to rerank by query.
    """

    texts: Sequence[str] = ()
    others: Sequence[str] = ()
    labels: Sequence[Any] = ()
    sets: Sequence[int] = ()
    train_texts: Sequence[str] = ()
    train_labels: Sequence[Any] = ()
    queries: dict[str, str] = dataclasses.field(default_factory=dict)
    documents: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    relevant: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)
    candidates: dict[str, list[str]] | None = None


def rows_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of a data file. Raises UserError if there is none or a place has none."""
    empty = True
    try:
        kind = containers.container_of(path)
        if kind is None:
            raise UserError(f"{path}: is not one of {containers.KNOWN_SUFFIXES}")
        for place, row in kind.rows(path):
            if isinstance(row, containers.NoRow):
                raise UserError(f"{place}: {row.reason}")
            empty = False
            yield place, row
    except (OSError, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"{path}: can't be read ({error})") from None
    if empty:
        raise UserError(f"{path}: holds no rows; write one object per line")


def first_row(path: Path) -> dict[str, Any]:
    """The first row of a file."""
    return next(rows_of(path))[1]


def is_binary(path: Path) -> bool:
    """Whether all labels are 0 or 1."""
    return all(row.get("label") in (0, 1) for _, row in rows_of(path))


def read_pairs(path: Path, limit: int = 0) -> Data:
    """Of STS: {text, text_pair, label} or {sentence1, sentence2, score}."""
    first, second, labels = [], [], []
    for place, row in rows_of(path):
        score = row.get("label", row.get("score"))
        if isinstance(score, containers.NumberLike):
            score = float(score)
        if (
            isinstance(score, bool)
            or not isinstance(score, int | float)
            or not -_LARGEST <= score <= _LARGEST
        ):
            raise UserError(f"{place}: label is {score!r}; write a number")
        first.append(text_in(row, place, "text" if "text" in row else "sentence1"))
        second.append(text_in(row, place, "text_pair" if "text_pair" in row else "sentence2"))
        labels.append(float(score))
    keep = _spread(len(labels), limit)
    labels = [labels[i] for i in keep]
    if len(set(labels)) < 2:
        raise UserError(
            f"{path}: all {len(labels)} rows used have the same label; there is nothing to measure"
            + ("; raise --limit" if limit else "")
        )
    return Data([first[i] for i in keep], [second[i] for i in keep], labels)


def read_binary_pairs(path: Path, limit: int = 0) -> Data:
    """Of PairClassification: as read_pairs, and each label 0 or 1."""
    for place, row in rows_of(path):
        if row.get("label", row.get("score")) not in (0, 1):
            raise UserError(
                f"{place}: label is {row.get('label')!r}; a pair's label is 0 or 1 (graded pairs"
                " belong in a folder `sts`)"
            )
    data = read_pairs(path, limit)
    return dataclasses.replace(data, labels=[int(label) for label in data.labels])


def read_clustering(path: Path, limit: int = 0) -> Data:
    """{text, label}: one clustering of all rows; {sentences, labels}: one of each row."""
    texts: list[str] = []
    labels: list[Any] = []
    sets = [0]
    for place, row in rows_of(path):
        if "sentences" in row:
            members, names = row["sentences"], row.get("labels")
            lists = isinstance(members, list) and isinstance(names, list)
            if not (lists and len(members) == len(names or ())):
                raise UserError(f"{place}: sentences and labels must be lists of equal length")
            texts += [text_in({"text": text}, place, "text") for text in members]
            labels += [_label({"label": label}, place) for label in names or ()]
            sets.append(len(texts))
        else:
            texts.append(text_in(row, place, "text"))
            labels.append(_label(row, place))
    if len(sets) == 1:
        keep = _spread(len(texts), limit)
        texts, labels = [texts[i] for i in keep], [labels[i] for i in keep]
        sets.append(len(texts))
    elif limit:
        sets = sets[:2]
        keep = _spread(sets[1], limit)
        texts, labels, sets = [texts[i] for i in keep], [labels[i] for i in keep], [0, len(keep)]
    for start, end in itertools.pairwise(sets):
        if len(set(map(str, labels[start:end]))) < 2:
            hint = "; raise --limit" if limit else ""
            raise UserError(f"{path}: the {end - start} texts of a clustering have one label{hint}")
    return Data(texts, labels=_numbered(labels, labels), sets=sets)


def read_classification(train: Path, test: Path, limit: int = 0) -> Data:
    """{text, label} of both splits. All train rows stay: a classifier sees 8 of each label."""
    texts, labels = _labelled(test)
    train_texts, train_labels = _labelled(train)
    if len(set(map(str, train_labels))) < 2:
        raise UserError(f"{train}: all rows have the same label; there is nothing to learn")
    keep = _spread(len(texts), limit)
    labels = [labels[i] for i in keep]
    numbers = _numbered([*labels, *train_labels], [*labels, *train_labels])
    # mteb scores two labels as a binary task, whose labels must be 0 and 1.
    if len(two := sorted(set(numbers[: len(labels)]))) == 2 and two != [0, 1]:
        order = {n: i for i, n in enumerate([*two, *sorted(set(numbers) - set(two))])}
        numbers = [order[n] for n in numbers]
    return Data(
        [texts[i] for i in keep],
        labels=numbers[: len(labels)],
        train_texts=train_texts,
        train_labels=numbers[len(labels) :],
    )


def _labelled(path: Path) -> tuple[list[str], list[Any]]:
    rows = [(text_in(row, place, "text"), _label(row, place)) for place, row in rows_of(path)]
    return [text for text, _ in rows], [label for _, label in rows]


def _numbered(labels: Sequence[Any], known: Sequence[Any]) -> list[int]:
    """Labels as numbers: their own if all are whole numbers, else by the order of their names."""
    if all(isinstance(label, int) for label in known):
        return list(labels)
    number = {name: i for i, name in enumerate(sorted(set(map(str, known))))}
    return [number[str(label)] for label in labels]


def _label(row: dict[str, Any], place: str) -> Any:
    """`label`, or the label text of a training file's row."""
    label = row.get("label", row.get("text_pos"))
    if isinstance(label, bool) or not isinstance(label, int | str) or label == "":
        raise UserError(f"{place}: label is {label!r}; write a whole number or a name")
    if isinstance(label, int) and not -(2**63) <= label < 2**63:
        raise UserError(f"{place}: label is {label!r}; write a smaller number, or a name")
    return label


def text_in(row: dict[str, Any], place: str, field: str) -> str:
    """A field that must be a text. Raises UserError if it isn't, or is empty or not encodable."""
    text = row.get(field)
    if not isinstance(text, str):
        raise UserError(f"{place}: {field} is {_kind(text)}; write a text")
    if not text.strip():
        raise UserError(f"{place}: {field} is empty; mend or delete the line")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{place}: {field} holds half a character (a lone surrogate)") from None
    return text


def texts_in(
    row: dict[str, Any], place: str, field: str, default: list[str] | None = None
) -> list[str]:
    """A field that must be a text or a list of texts; `default` if it is absent."""
    members = row.get(field, default)
    members = [members] if isinstance(members, str) else members
    if not isinstance(members, list):
        raise UserError(f"{place}: {field} is {_kind(members)}; write a list of texts")
    return [text_in({field: member}, place, field) for member in members]


def _kind(value: Any) -> str:
    return "missing" if value is None else type(value).__name__


def _spread(count: int, limit: int) -> list[int]:
    """Rows of a limited look, evenly over the file, which may be sorted by label; 0: all."""
    if not limit or limit >= count:
        return list(range(count))
    return np.linspace(0, count - 1, limit).astype(int).tolist()
