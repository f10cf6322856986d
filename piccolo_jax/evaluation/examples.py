"""Scores of single examples, and metrics of weighted examples: what a paired bootstrap resamples.

An example is a query, a pair or a text. A task's examples are numpy arrays, stored beside its
results; `metric` gives the task's main score from them, with a weight (a count) on each example.
"""

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

Examples = Mapping[str, np.ndarray]
Scorer = Callable[[np.ndarray], float]  # weights [n] -> score
# Pairs are scored by cosine, product, and two distances; mteb takes the best of the accuracies.
_PAIR_SCORES = ("cosine", "dot", "manhattan", "euclidean")


def metric(examples: Examples, weights: np.ndarray | None = None) -> float:
    """The main score of a task: weights [n] stand for how often each of its n examples occurs.

    Which score it is follows from the arrays: `score` [n], a mean; `cosine`, `gold` [n], Spearman's
    rank correlation; `cosine`, `dot`, `manhattan`, `euclidean`, `label` [n], the best accuracy;
    `cluster`, `label`, `set` [n], the mean V-measure over sets.
    """
    return scorer(examples)(np.ones(count(examples)) if weights is None else weights)


def scorer(examples: Examples) -> Scorer:
    """metric() of these examples as a function of weights, for many of them."""
    if "score" in examples:
        return lambda weights: float(np.average(examples["score"], weights=weights))
    if "gold" in examples:
        return _spearman(examples["cosine"], examples["gold"])
    if "cluster" in examples:
        sets = [np.flatnonzero(examples["set"] == n) for n in np.unique(examples["set"])]
        of_sets = [(s, _v_measure(examples["label"][s], examples["cluster"][s])) for s in sets]
        return lambda weights: float(
            np.mean([score(weights[s]) for s, score in of_sets if weights[s].any()])
        )
    of_scores = [_best_accuracy(examples[name], examples["label"]) for name in _PAIR_SCORES]
    return lambda weights: max(score(weights) for score in of_scores)


def count(examples: Examples) -> int:
    """The number of examples."""
    return len(next(iter(examples.values())))


def identity(examples: Examples) -> bytes:
    """What two models' examples of a task must have in common to be paired."""
    same = [examples[name].tobytes() for name in ("gold", "label", "set") if name in examples]
    return b"".join((str(count(examples)).encode(), *same))


def _spearman(x: np.ndarray, y: np.ndarray) -> Scorer:
    """Pearson's correlation of ranks; those of equal values are their mean. 0 if all are equal."""
    places = [np.unique(values, return_inverse=True)[1] for values in (x, y)]

    def score(weights: np.ndarray) -> float:
        ranks = []
        for place in places:
            counts = np.bincount(place, weights)
            rank = (np.cumsum(counts) - (counts - 1) / 2)[place]
            ranks.append(rank - np.average(rank, weights=weights))
        a, b = ranks
        spread = np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
        return float((weights * a * b).sum() / spread) if spread > 0 else 0.0

    return score


def _best_accuracy(scores: np.ndarray, labels: np.ndarray) -> Scorer:
    """The largest share of pairs told right by a threshold, above which pairs are 1.

    `scores` are higher for more similar pairs. As in mteb a threshold lies between two different
    scores, so that 0 is what equal scores give.
    """
    order = np.argsort(-scores, kind="stable")
    falling, is_one = scores[order], labels[order] == 1

    def score(weights: np.ndarray) -> float:
        used = weights[order]
        there = used > 0
        ones, zeros = used[there] * is_one[there], used[there] * ~is_one[there]
        right = np.cumsum(ones) + zeros.sum() - np.cumsum(zeros)
        between = np.diff(falling[there]) != 0
        return float(right[:-1][between].max() / used.sum()) if between.any() else 0.0

    return score


def _v_measure(labels: np.ndarray, clusters: np.ndarray) -> Scorer:
    """Harmonic mean of homogeneity and completeness (Rosenberg and Hirschberg, 2007)."""
    _, rows = np.unique(labels, return_inverse=True)
    _, columns = np.unique(clusters, return_inverse=True)
    shape = (rows.max() + 1, columns.max() + 1)
    cells = np.ravel_multi_index((rows, columns), shape)

    def score(weights: np.ndarray) -> float:
        table = np.bincount(cells, weights, shape[0] * shape[1]).reshape(shape) / weights.sum()
        of_label, of_cluster = _entropy(table.sum(axis=1)), _entropy(table.sum(axis=0))
        shared = of_label + of_cluster - _entropy(table.ravel())
        homogeneity = shared / of_label if of_label > 0 else 1.0
        completeness = shared / of_cluster if of_cluster > 0 else 1.0
        total = homogeneity + completeness
        return float(2 * homogeneity * completeness / total) if total > 0 else 0.0

    return score


def save(path: Path, examples: Examples) -> None:
    """Writes a task's examples, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        np.savez_compressed(file, **dict(examples))  # type: ignore[arg-type]
    os.replace(partial, path)


def load(path: Path) -> dict[str, np.ndarray] | None:
    """A task's examples; None if there are none, or they are damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return None


def _entropy(shares: np.ndarray) -> float:
    shares = shares[shares > 0]
    return float(-(shares * np.log(shares)).sum())
