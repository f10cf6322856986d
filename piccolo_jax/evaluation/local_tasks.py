"""mteb tasks from plain files: mteb's own task classes, with data that `files` has read.

Importing this imports mteb, which takes seconds: only `evaluate` does.
"""

import itertools
from typing import Any

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClusteringLegacy,
    AbsTaskPairClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
)

from piccolo_jax.evaluation import files
from piccolo_jax.evaluation.files import Found
from piccolo_jax.evaluation.rows import Data

# The class and the metric of a type, as the tasks of MTEB(cmn, v1) have them.
_CLASSES: dict[str, tuple[type[mteb.AbsTask], str]] = {
    "Retrieval": (AbsTaskRetrieval, "ndcg_at_10"),
    "Reranking": (AbsTaskRetrieval, "map_at_1000"),
    "PairClassification": (AbsTaskPairClassification, "max_accuracy"),
    "Clustering": (AbsTaskClusteringLegacy, "v_measure"),
    "Classification": (AbsTaskClassification, "accuracy"),
    "STS": (AbsTaskSTS, "cosine_spearman"),
}


def make(found: Found, split: str, limit: int = 0) -> mteb.AbsTask:
    """The task NAME.SPLIT of a set. Its files are read when it loads its data."""
    base, main_score = _CLASSES[found.type]
    metadata = mteb.TaskMetadata(
        name=f"{found.name}.{split}",
        description=f"The files of {found.name}",
        dataset={"path": found.name, "revision": files.fingerprint(found, split, limit)},
        type=found.type,  # type: ignore[arg-type]
        category="t2t",
        modalities=["text"],
        eval_splits=[split],
        eval_langs=["und-Zyyy"],  # the files don't say
        main_score=main_score,
    )

    def load_data(self: Any, *_: Any, **__: Any) -> None:
        if not self.data_loaded:
            _set_data(self, files.read(found, split, limit), split)
            self.data_loaded = True

    kind = type(f"Local{found.type}", (base,), {"metadata": metadata, "load_data": load_data})
    return kind()


def _set_data(task: Any, data: Data, split: str) -> None:
    kind = task.metadata.type
    columns: dict[str, Any]
    if kind in ("Retrieval", "Reranking"):
        corpus = [{"id": k, "title": title, "text": x} for k, (title, x) in data.documents.items()]
        queries = [{"id": key, "text": text} for key, text in data.queries.items()]
        parts = {
            "corpus": Dataset.from_list(corpus),
            "queries": Dataset.from_list(queries),
            "relevant_docs": data.relevant,
            "top_ranked": data.candidates,
        }
        task.dataset = {"default": {split: parts}}
        return
    if kind == "Clustering":
        sets = list(itertools.pairwise(data.sets))
        columns = {
            "sentences": [list(data.texts[a:b]) for a, b in sets],
            "labels": [list(data.labels[a:b]) for a, b in sets],
        }
    elif kind == "Classification":
        columns = {"text": data.texts, "label": data.labels}
    elif kind == "STS":
        task.min_score, task.max_score = min(data.labels), max(data.labels)
        columns = {"sentence1": data.texts, "sentence2": data.others, "score": data.labels}
    else:
        columns = {"sentence1": data.texts, "sentence2": data.others, "labels": data.labels}
    splits = {split: Dataset.from_dict(columns)}
    if kind == "Classification":
        train = {"text": data.train_texts, "label": data.train_labels}
        splits[task.train_split] = Dataset.from_dict(train)
    task.dataset = DatasetDict(splits)
