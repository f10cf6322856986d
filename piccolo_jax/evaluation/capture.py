"""Scores of single examples from mteb's tasks, which report means only.

mteb hands a task's predictions to a method that writes them as JSON, for a large retrieval set
gigabytes at each dimension. Here that method keeps what `examples.metric` needs instead.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax.evaluation import examples as examples_lib
from piccolo_jax.evaluation.examples import Examples

_TOLERANCE = 1e-3  # mteb rounds to five digits
_QUERY_SCORES = {"ndcg_at": "ndcg_cut", "map_at": "map_cut", "recall_at": "recall"}


@contextlib.contextmanager
def captured(task: Any, folder: Path) -> Iterator[Path]:
    """Within it, evaluating `task` writes FOLDER/TASK/SPLIT.SUBSET.npz; yields FOLDER.

    A file is written before mteb writes the result, and only if its examples give the task's main
    score: tasks of other types and other main scores have none.
    """
    evaluate = task._evaluate_subset
    seen: dict[str, Any] = {}

    def evaluate_subset(model: Any, data_split: Any, **arguments: Any) -> Any:
        seen.clear()
        scores = evaluate(model, data_split, **arguments)
        found = _examples(task, data_split, arguments["hf_split"], seen)
        main = scores.get(task.metadata.main_score)
        if found and main is not None and abs(examples_lib.metric(found) - main) < _TOLERANCE:
            name = f"{arguments['hf_split']}.{arguments['hf_subset']}.npz"
            examples_lib.save(folder / task.metadata.name / name, found)
        return scores

    def note_predictions(predictions: Any, *_: Any, **__: Any) -> None:
        seen["predictions"] = predictions

    def note_queries(scores: dict[str, dict[str, float]], *_: Any, **__: Any) -> dict[str, float]:
        seen["queries"] = scores
        return dict(specific(scores, *_, **__)) if specific else {}

    specific = getattr(task, "task_specific_scores", None)
    task._evaluate_subset, task._save_task_predictions = evaluate_subset, note_predictions
    if specific:
        task.task_specific_scores = note_queries
    try:
        yield folder
    finally:
        for name in ("_evaluate_subset", "_save_task_predictions", "task_specific_scores"):
            vars(task).pop(name, None)


def _examples(task: Any, data: Any, split: str, seen: dict[str, Any]) -> Examples | None:
    """The arrays of a subset's examples; None for a type that has none."""
    predictions, kind = seen.get("predictions"), task.metadata.type
    if "queries" in seen:
        measure, _, depth = task.metadata.main_score.rpartition("_")
        name = f"{_QUERY_SCORES.get(measure)}_{depth}"
        queries = sorted(seen["queries"].items())
        if not all(name in scores for _, scores in queries):
            return None
        return {
            "score": np.asarray([scores[name] for _, scores in queries]),
            "label": np.asarray([query for query, _ in queries]),
        }
    if kind == "STS" and predictions:
        gold = np.asarray(data["score"], np.float64)
        return {"cosine": np.asarray(predictions["cosine_scores"]), "gold": gold}
    if kind == "PairClassification" and predictions:
        labels = data[task.label_column_name]
        labels = labels[0] if len(data) == 1 else labels  # a set may be one row of lists
        return {
            "cosine": np.asarray(predictions["cosine_scores"]),
            "dot": np.asarray(predictions["dot_scores"]),
            "manhattan": -np.asarray(predictions["manhattan_distances"]),
            "euclidean": -np.asarray(predictions["euclidean_distances"]),
            "label": np.asarray(labels, np.int64),
        }
    if kind == "Classification" and predictions:
        labels = np.asarray(data[split][task.label_column_name])
        right = [np.asarray(predicted) == labels for predicted in predictions]
        return {"score": np.mean(right, axis=0), "label": labels}
    if kind == "Clustering" and predictions:
        labels = [np.asarray(row[task.label_column_name]) for row in data]
        if [len(x) for x in labels] != [len(x) for x in predictions]:
            return None  # mteb leaves out a clustering of one label
        return {
            "cluster": np.concatenate([np.asarray(x) for x in predictions]),
            "label": np.concatenate(labels),
            "set": np.repeat(np.arange(len(labels)), [len(x) for x in labels]),
        }
    return None
