"""What there is to know of a dataset before training on it; nothing is written.

Everything is read and tokenised as for preparing, and counted: on arrays of text ids, so that a
dataset of millions of rows takes no more memory than preparing it.
"""

import collections
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import formats
from piccolo_jax.data.collect import Collected, TaskColumns, check_labels, collect
from piccolo_jax.data.decontaminate import Decontaminator, Report
from piccolo_jax.data.prepare import name_of
from piccolo_jax.data.store import Columns, Ragged, TextColumn
from piccolo_jax.data.texts import TextTable
from piccolo_jax.data.tokenizer import Tokenizer

_MOST_LABELS_NAMED = 1_000_000  # whose texts are in memory
_EXAMPLES_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Side:
    """One column of texts. `lengths`: tokens of each distinct text, as it will be trained on."""

    name: str
    limit: int  # tokens
    texts: int
    cut: int  # of these, longer than the limit
    lengths: np.ndarray


@dataclasses.dataclass
class Problem:
    """Something that is often a mistake: how often, and the first texts with it."""

    what: str
    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found in one dataset. As a Store, as far as planning batches needs one."""

    name: str
    path: str
    task: str
    collected: Collected
    sides: tuple[Side, ...]
    problems: tuple[Problem, ...]
    labels: dict[str, int] | None  # of classification: rows by label text, most frequent first
    label_counts: np.ndarray  # rows of each label, of those without a name too
    scores: dict[float, int] | None  # of similarity: rows by score
    lengths: np.ndarray  # int32 [texts], tokens of each distinct text
    tokenised: int  # texts that differ as text (some become the same tokens)
    seconds: float
    dropped: int = 0  # rows that occur in evaluation sets

    @property
    def columns(self) -> Columns:
        """As Store has them."""
        return self.collected.columns

    @property
    def num_rows(self) -> int:
        """Rows that can be used."""
        return self.collected.num_rows

    @property
    def manifest(self) -> dict[str, Any]:
        """What planning asks a Store's manifest for."""
        return {"longest_tokens": int(self.lengths.max())}

    @property
    def num_texts(self) -> int:
        """Texts of all rows, each time they occur."""
        return sum(side.texts for side in self.sides)


def check_dataset(
    dataset: DatasetConfig,
    config: Config,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    quiet: bool = False,
    decontaminator: Decontaminator | None = None,
) -> Checked:
    """Reads a dataset (no meta list) to its end. Damaged places are among the rejected rows.

    Raises UserError for a dataset that can't be read or trained on at all.
    """
    source = formats.open_source(
        dataset.path,
        dataset.task,
        lenient=True,
        download=False,
        label_names=dataset.label_names,
        label_language=dataset.label_language,
    )
    report = Report()
    if decontaminator:
        decontaminator.check(dataset.path, [digest for _, digest in source.rows.content()])
        keep = functools.partial(decontaminator.keep, dataset.path, report=report)
        source = dataclasses.replace(source, keep=keep)
    task: TaskColumns = tasks[source.task]
    texts = TextTable(
        tokenizer,
        {"query": dataset.query_prompt, "passage": dataset.passage_prompt},
        config.data.query_max_length,
        config.data.max_length,
    )
    counter = _Counter(source.task)
    name = name_of(dataset.path)
    begin = time.monotonic()
    collected = collect(source, task, texts, f"checking {name}", quiet, counter.add)
    seconds = time.monotonic() - begin
    check_labels(source, collected)
    lengths, columns = texts.lengths, collected.columns
    labels, label_counts = None, np.zeros(0, np.int64)
    if source.task == "classification":
        own = columns["labels"].values[: columns["labels"].offsets[-1]]
        counts = np.bincount(own, minlength=len(lengths))
        label_counts = counts[counts > 0]
        order = np.argsort(-counts, kind="stable")
        named = (int(i) for i in order if int(i) in counter.label_names)
        labels = {counter.label_names[i]: int(counts[i]) for i in named}
    scores = None
    if source.task == "similarity":
        values, counts = np.unique(columns["score"], return_counts=True)
        scores = dict(zip(values.tolist(), counts.tolist(), strict=True))
    return Checked(
        name=name,
        path=dataset.path,
        task=source.task,
        collected=collected,
        sides=tuple(_side(column, columns, lengths, counter, config) for column in task.columns),
        problems=(*_repeated(columns), *counter.problems, *_contradictions(source.task, columns)),
        labels=labels,
        label_counts=label_counts,
        scores=scores,
        lengths=lengths,
        tokenised=texts.tokenised,
        seconds=seconds,
        dropped=report.count,
    )


class _Counter:
    """Counts while examples pass by."""

    def __init__(self, task: str):
        looks: dict[str, Callable[[Any], None]] = {
            "retrieval": self._retrieval,
            "similarity": self._similarity,
            "classification": self._classification,
        }
        self._look = looks[task]
        self.texts: collections.Counter[str] = collections.Counter()
        self.cut: collections.Counter[str] = collections.Counter()
        self.label_names: dict[int, str] = {}
        whats = {
            "retrieval": (
                "a positive is the query itself", "a positive is also a negative",
                "a negative is the query itself",
            ),
            "similarity": ("both texts are the same",),
            "classification": ("the text is its own label", "a label is also among the others"),
        }  # fmt: skip
        self._problems = {what: Problem(f"rows: {what}") for what in whats[task]}

    @property
    def problems(self) -> tuple[Problem, ...]:
        return tuple(self._problems.values())

    def add(self, examples: Sequence[Any], ids: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
        for name, (of_texts, cut) in ids.items():
            self.texts[name] += len(of_texts)
            self.cut[name] += int(cut.sum())
        for example in examples:
            self._look(example)
        if "labels" in ids and len(self.label_names) < _MOST_LABELS_NAMED:
            labels = (label for example in examples for label in example.labels)
            for number, label in zip(ids["labels"][0].tolist(), labels, strict=True):
                self.label_names.setdefault(number, label)

    def _retrieval(self, example: formats.RetrievalExample) -> None:
        if example.query in example.positives:
            self._found("a positive is the query itself", example.query)
        if both := [text for text in example.negatives if text in example.positives]:
            self._found("a positive is also a negative", both[0])
        if example.query in example.negatives:
            self._found("a negative is the query itself", example.query)

    def _similarity(self, example: formats.SimilarityExample) -> None:
        if example.first == example.second:
            self._found("both texts are the same", example.first)

    def _classification(self, example: formats.ClassificationExample) -> None:
        if example.text in example.labels:
            self._found("the text is its own label", example.text)
        if isinstance(example, formats.ContradictingExample):
            self._found("a label is also among the others", example.text)

    def _found(self, what: str, text: str) -> None:
        problem = self._problems[what]
        problem.count += 1
        if len(problem.first) < _EXAMPLES_SHOWN:
            problem.first.append(text)


def _side(
    column: TextColumn, columns: Columns, lengths: np.ndarray, counter: _Counter, config: Config
) -> Side:
    limit = config.data.query_max_length if column.is_query else config.data.max_length
    present = np.unique(_values(columns[column.name]))
    name = column.name
    return Side(name, limit, counter.texts[name], counter.cut[name], lengths[present])


def _values(column: Any) -> np.ndarray:
    return column.values if isinstance(column, Ragged) else column


def _repeated(columns: Columns) -> tuple[Problem, ...]:
    """Rows that are equal to an earlier one, but for the order of lists."""
    key = np.zeros(0, np.uint64)
    for salt, column in enumerate(columns.values()):
        if isinstance(column, Ragged):
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(column.values, salt))])
            part = sums[column.offsets[1:]] - sums[column.offsets[:-1]]  # modulo 2**64
        else:
            part = _mixed(column.view(np.int32), salt)
        key = part if not key.size else _mixed(key, 0) + part
    return (Problem("rows: the same as an earlier row", len(key) - len(np.unique(key))),)


def _mixed(values: np.ndarray, salt: int) -> np.ndarray:
    """Well-spread uint64 of integers (the finaliser of MurmurHash3, by A. Appleby)."""
    mixed = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15 * (salt + 1) % 2**64)
    for multiplier in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        mixed ^= mixed >> np.uint64(33)
        mixed *= np.uint64(multiplier)
    return mixed ^ (mixed >> np.uint64(33))


def _contradictions(task: str, columns: Columns) -> tuple[Problem, ...]:
    """What one row says and another denies. Texts are compared by their tokens."""
    if task == "retrieval":
        positives, negatives = (
            np.unique(_paired(columns["query"], columns[name]))
            for name in ("positives", "negatives")
        )
        both = np.intersect1d(positives, negatives, assume_unique=True)
        what = "pairs: a document is positive and negative for the same query"
        return (Problem(what, len(both)),)
    if task == "similarity":
        first, second = (columns[name].astype(np.uint64) for name in ("first", "second"))
        pairs = (np.minimum(first, second) << np.uint64(32)) | np.maximum(first, second)
        what = "pairs: the same texts with contradicting scores"
        return (Problem(what, _with_several(pairs, columns["score"].view(np.int32))),)
    labels = columns["labels"]
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mixed(labels.values, 0))])
    sets = sums[labels.offsets[1:]] - sums[labels.offsets[:-1]]
    what = "texts: with different labels in different rows"
    return (Problem(what, _with_several(columns["text"].astype(np.uint64), sets)),)


def _paired(text: np.ndarray, lists: Ragged) -> np.ndarray:
    """(row's text, list member) as one number each."""
    of_row = np.repeat(text.astype(np.uint64), np.diff(lists.offsets))
    return (of_row << np.uint64(32)) | lists.values.astype(np.uint64)


def _with_several(keys: np.ndarray, values: np.ndarray) -> int:
    """How many keys occur with more than one value."""
    order = np.lexsort((values, keys))
    keys, values = keys[order], values[order]
    same_key = keys[1:] == keys[:-1]
    return len(np.unique(keys[1:][same_key & (values[1:] != values[:-1])]))
