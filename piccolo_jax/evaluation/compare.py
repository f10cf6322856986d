"""Models side by side on the same data, with paired bootstrap intervals of their differences.

Each resample draws a dataset's examples (queries, pairs, texts) with replacement, the same ones for
all models, and computes the dataset's main score anew; classifiers and clusterings stay what they
were. An interval of a mean then says how it varies with the examples of these datasets. Where a
dataset has no scores of examples, datasets are drawn instead. Intervals hold 95% of resamples.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax import metrics
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import examples as examples_lib
from piccolo_jax.evaluation import report
from piccolo_jax.evaluation.benchmarks import CATEGORIES
from piccolo_jax.evaluation.report import Entry

_INTERVAL = (2.5, 97.5)
_WEIGHTS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model's entry and the folder that its examples are in."""

    entry: Entry
    folder: Path


@dataclasses.dataclass(frozen=True)
class Row:
    """A dataset's or group's scores, and the differences to the first model's.

    resampled: what the intervals are over; empty: there are none.
    """

    name: str
    scores: list[float]
    differences: list[float]
    intervals: list[tuple[float, float]]
    resampled: str


def load(folders: Sequence[Path]) -> list[Loaded]:
    """All models of some output folders. Raises UserError if there are fewer than two."""
    found: dict[str, Loaded] = {}
    for folder in folders:
        for entry in report.read(folder / report.FILE):
            found.setdefault(report.label(entry), Loaded(entry, folder))
    if len(found) < 2:
        raise UserError(
            f"--compare {' '.join(map(str, folders))}: holds the results of {len(found)} model;"
            " evaluate another with the same data, into one of these folders or a new one"
        )
    return list(found.values())


def shared_tasks(models: Sequence[Loaded]) -> tuple[list[str], list[str]]:
    """Names of tasks that all have with the same data, and reasons why others are left out."""
    first = models[0].entry["tasks"]
    shared, notes = [], []
    for name in sorted({name for model in models for name in model.entry["tasks"]}):
        tasks = [model.entry["tasks"].get(name) for model in models]
        if not all(tasks):
            notes.append(f"{name}: not evaluated with all models")
        elif any(_data_of(task) != _data_of(first[name]) for task in tasks if task):
            notes.append(f"{name}: evaluated on different data")
        else:
            shared.append(name)
    if not shared:
        raise UserError("--compare: the models have no task in common: " + "; ".join(notes))
    return shared, notes


def shared(models: Sequence[Loaded], names: Sequence[str]) -> list[Entry]:
    """The models' entries with these tasks alone."""
    return [
        model.entry | {"tasks": {name: model.entry["tasks"][name] for name in names}}
        for model in models
    ]


def dims_of(models: Sequence[Loaded], wanted: Sequence[int]) -> list[tuple[str, list[int]]]:
    """What is compared: a name, and each model's dimension. The full widths come first."""
    each = [set(model.entry["dims"]) for model in models]
    common = sorted(set.intersection(*each), reverse=True)
    for dim in wanted:
        if dim not in common:
            raise UserError(f"--dims: {dim} was not evaluated with all models; all have {common}")
    rows = [(str(dim), [dim] * len(models)) for dim in (wanted or common)]
    widest = [max(model.entry["dims"]) for model in models]
    if not wanted and len(set(widest)) > 1:
        rows.insert(0, ("each at its widest, " + ", ".join(map(str, widest)), widest))
    return rows


def compare(
    models: Sequence[Loaded], names: Sequence[str], dims: Sequence[int], resamples: int, seed: int
) -> list[Row]:
    """Rows for each dataset, each category, and the mean, the last also over datasets."""
    tasks = [model.entry["tasks"] for model in models]
    rows, drawn, kinds = [], {}, {}
    for name in names:
        scores = [report.score(t[name], dim) for t, dim in zip(tasks, dims, strict=True)]
        kinds[name] = tasks[0][name]["type"]
        drawn[name] = _resampled(models, name, dims, resamples, seed)
        words = "queries" if kinds[name] in ("Retrieval", "Reranking") else "examples"
        label = f"{CATEGORIES.get(kinds[name], kinds[name])} {name}"
        rows.append(_row(label, scores, drawn[name], words))
    rows.sort(key=lambda row: _order(row.name.split()[0]))
    of_datasets = {n: [report.score(t[n], d) for t, d in zip(tasks, dims, strict=True)]
                   for n in names}  # fmt: skip
    groups = {
        f"{CATEGORIES.get(kind, kind)}, mean": [n for n in names if kinds[n] == kind]
        for kind in (*CATEGORIES, *sorted(set(kinds.values()) - set(CATEGORIES)))
        if kind in kinds.values()
    }
    for label, members in [*groups.items(), (f"mean of {len(names)}", list(names))]:
        scores = np.mean([of_datasets[name] for name in members], axis=0).tolist()
        parts = [drawn[name] for name in members]
        of_all = [part for part in parts if part is not None]
        if len(of_all) == len(parts):
            rows.append(_row(label, scores, np.mean(of_all, axis=0), "examples"))
        if len(of_all) < len(parts) or label.startswith("mean"):
            values = np.asarray([of_datasets[name] for name in members])
            rows.append(_row(label, scores, _over_datasets(values, resamples, seed), "datasets"))
    return rows


def text(models: Sequence[Loaded], title: str, rows: Sequence[Row]) -> str:
    """A table of one dimension, in percent."""
    others = range(2, len(models) + 1)
    header = ("dataset", *range(1, len(models) + 1))
    header += tuple(x for n in others for x in (f"{n} - 1", "95%"))
    lines = []
    for row in rows:
        cells = [row.name, *(f"{100 * score:.2f}" for score in row.scores)]
        for i, difference in enumerate(row.differences):
            low, high = row.intervals[i] if row.resampled else (np.nan, np.nan)
            interval = f"[{100 * low:+.2f}, {100 * high:+.2f}]" if row.resampled else "-"
            cells += [f"{100 * difference:+.2f}", interval]
        lines.append((*cells, row.resampled or "-"))
    return f"at {title} dimensions\n\n" + metrics.table((*header, "resampled"), lines)


def _row(name: str, scores: list[float], drawn: np.ndarray | None, words: str) -> Row:
    differences = [score - scores[0] for score in scores[1:]]
    if drawn is None:
        return Row(name, scores, differences, [], "")
    low, high = np.percentile(drawn[1:] - drawn[0], _INTERVAL, axis=1)
    intervals = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    return Row(name, scores, differences, intervals, words)


def _resampled(
    models: Sequence[Loaded], name: str, dims: Sequence[int], resamples: int, seed: int
) -> np.ndarray | None:
    """The models' scores on each resample, [models, resamples]; None without scores of examples."""
    parts = []
    for part in _parts(models[0].entry["tasks"][name]):
        loaded = [
            _examples(model, name, part, dim) for model, dim in zip(models, dims, strict=True)
        ]
        found = [examples for examples in loaded if examples is not None]
        if len(found) < len(loaded) or len({examples_lib.identity(e) for e in found}) > 1:
            return None
        rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{part}".encode())])
        count = examples_lib.count(found[0])
        scorers = [examples_lib.scorer(examples) for examples in found]
        columns: list[list[float]] = []
        for start in range(0, resamples, _WEIGHTS_AT_ONCE):
            size = min(_WEIGHTS_AT_ONCE, resamples - start)
            weights = rng.multinomial(count, np.full(count, 1 / count), size).astype(np.float64)
            columns += [[score(w) for score in scorers] for w in weights]
        parts.append(np.asarray(columns).T)
    return np.mean(parts, axis=0)


def _over_datasets(scores: np.ndarray, resamples: int, seed: int) -> np.ndarray | None:
    """Means over datasets drawn with replacement, [models, resamples]; `scores` are their rows."""
    if len(scores) < 2:
        return None
    rng = np.random.default_rng([seed, len(scores)])
    return scores[rng.integers(0, len(scores), (resamples, len(scores)))].mean(axis=1).T


def _examples(model: Loaded, name: str, part: str, dim: int) -> dict[str, np.ndarray] | None:
    folder = Path(model.entry["folders"][str(dim)])
    return examples_lib.load(model.folder / "examples" / folder / name / f"{part}.npz")


def _parts(task: Mapping[str, Any]) -> list[str]:
    return [f"{split}.{subset}" for split in task["splits"] for subset in task["subsets"]]


def _data_of(task: Mapping[str, Any]) -> tuple[Any, ...]:
    return task["revision"], task["splits"], task["subsets"]


def _order(category: str) -> int:
    known = list(CATEGORIES.values())
    return known.index(category) if category in known else len(known)
