"""Evaluation on local files: similarity, retrieval and nearest label, at every prefix.

Each text is encoded once at full width; prefixes are cut from that and normalised.
"""

import collections
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax.config import EvalDatasetConfig
from piccolo_jax.data import formats
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import cut

Encode = Callable[[Sequence[str], str], np.ndarray]  # (texts, prompt) -> float32 [texts, D]
METRICS = {
    "similarity": "spearman",
    "retrieval": "ndcg_at_10",
    "classification": "label_accuracy",
}


def open_datasets(configs: Sequence[EvalDatasetConfig]) -> list["EvalDataset"]:
    """The evaluation sets of a config. Those of equal names get their place in it as a suffix."""
    datasets = [EvalDataset(config) for config in configs]
    names = collections.Counter(dataset.name for dataset in datasets)
    for i, dataset in enumerate(datasets):
        if names[dataset.name] > 1:
            dataset.name += f"[{i}]"
    return datasets


class EvalDataset:
    """One evaluation set in memory: `name`, `task`, and `evaluate`.

    Raises UserError for files that can't be used.
    """

    def __init__(self, config: EvalDatasetConfig):
        self._config = config
        path = Path(config.path)
        if (path / "corpus.jsonl").exists():
            self.task = "retrieval"
            if config.task not in ("", self.task):
                raise UserError(f"{path}: a directory with corpus.jsonl is for task 'retrieval'")
            queries, documents, gains = _read_beir(path, config.split, config.max_rows)
            self._texts, self._answer = (queries, documents), gains
        else:
            source = formats.open_source(
                config.path,
                config.task,
                label_names=config.label_names,
                label_language=config.label_language,
            )
            self.task = source.task
            examples = _examples(source, config.max_rows)
            self._texts, self._answer = _READERS[self.task](examples, source.label_texts)
            different = set(self._answer) if self.task == "similarity" else self._texts[1]
            if self.task != "retrieval" and len(different) < 2:
                what = "score" if self.task == "similarity" else "label and list no other"
                raise UserError(
                    f"{path}: all {len(self._answer)} rows used have the same {what}; there is"
                    " nothing to measure"
                )
        self.name = path.name.removesuffix(".jsonl")

    def evaluate(self, encode: Encode, dims: Sequence[int]) -> dict[int, float]:
        """The task's metric (METRICS) at each prefix.

        Raises UserError if the embeddings aren't finite.
        """
        first, second = self._texts
        # Both texts of a pair are of one kind.
        prompt = self._config.passage_prompt
        prompt = self._config.query_prompt if self.task == "similarity" else prompt
        x, y = encode(first, self._config.query_prompt), encode(second, prompt)
        if not (np.isfinite(x).all() and np.isfinite(y).all()):
            raise UserError(
                f"{self._config.path}: the model's embeddings are not finite; its weights are"
                " damaged, or too large for model.dtype"
            )
        score = _SCORERS[self.task]
        return {dim: score(cut(x, dim), cut(y, dim), self._answer) for dim in dims}


def spearman(first: np.ndarray, second: np.ndarray, scores: np.ndarray) -> float:
    """Rank correlation of the cosines of pairs with their scores; 0 if all cosines are the same."""
    cosines = (first * second).sum(axis=1)
    if np.ptp(cosines) == 0:
        return 0.0
    import scipy.stats  # takes a second

    return float(scipy.stats.spearmanr(cosines, scores).statistic)


def ndcg_at_10(
    queries: np.ndarray, documents: np.ndarray, gains: Sequence[dict[int, float]]
) -> float:
    """Mean nDCG@10 with linear gains (as in trec_eval); gains[q] maps documents to relevance."""
    discounts = 1 / np.log2(np.arange(2, 12))
    total = 0.0
    for start in range(0, len(queries), 256):
        similarities = queries[start : start + 256] @ documents.T
        nearest = np.argsort(-similarities, axis=1, kind="stable")[:, :10]
        for ranked, relevant in zip(nearest, gains[start : start + 256], strict=True):
            found = np.asarray([relevant.get(int(d), 0.0) for d in ranked])
            ideal = np.sort(np.asarray(list(relevant.values())))[::-1][:10]
            total += (found * discounts[: len(found)]).sum() / (
                ideal * discounts[: len(ideal)]
            ).sum()
    return total / len(queries)


def label_accuracy(texts: np.ndarray, labels: np.ndarray, answers: Sequence[set[int]]) -> float:
    """Share of texts whose nearest label text is one of their own."""
    nearest = (texts @ labels.T).argmax(axis=1)
    hits = [int(n) in own for n, own in zip(nearest, answers, strict=True)]
    return float(np.mean(hits))


_SCORERS: dict[str, Callable[..., float]] = {
    "similarity": spearman,
    "retrieval": ndcg_at_10,
    "classification": label_accuracy,
}


def _examples(source: formats.Source, max_rows: int) -> list[Any]:
    examples: list[Any] = []
    for item in source:
        if isinstance(item, formats.Rejected):
            raise UserError(f"{item.place}: {item.reason}; evaluation uses every row or none")
        examples.append(item)
        if len(examples) == max_rows:
            break
    if not examples:
        raise UserError(f"{source.path}: no rows")
    return examples


def _read_similarity(rows: list[formats.SimilarityExample], _: Any) -> tuple[Any, Any]:
    scores = np.asarray([row.score for row in rows])
    return ([row.first for row in rows], [row.second for row in rows]), scores


def _read_retrieval(rows: list[formats.RetrievalExample], _: Any) -> tuple[Any, Any]:
    index = _index(text for row in rows for text in (*row.positives, *row.negatives))
    gains = [{index[text]: 1.0 for text in row.positives} for row in rows]
    return ([row.query for row in rows], list(index)), gains


def _read_classification(
    rows: list[formats.ClassificationExample], named: tuple[str, ...]
) -> tuple[Any, Any]:
    index = _index([*(t for row in rows for t in (*row.labels, *row.other_labels)), *named])
    answers = [{index[text] for text in row.labels} for row in rows]
    return ([row.text for row in rows], list(index)), answers


_READERS: dict[str, Callable[[list[Any], tuple[str, ...]], tuple[Any, Any]]] = {
    "similarity": _read_similarity,
    "retrieval": _read_retrieval,
    "classification": _read_classification,
}


def _index(texts: Any) -> dict[str, int]:
    return {text: i for i, text in enumerate(dict.fromkeys(texts))}


def _read_beir(
    path: Path, split: str, max_rows: int
) -> tuple[list[str], list[str], list[dict[int, float]]]:
    corpus = _read_jsonl(path / "corpus.jsonl")
    index = {row["id"]: i for i, row in enumerate(corpus)}
    documents = [f"{row.get('title') or ''} {row['text']}".strip() for row in corpus]
    relevant: dict[str, dict[int, float]] = {}
    qrels = path / f"qrels.{split}.tsv"
    for number, line in enumerate(_lines(qrels), 1):
        parts = line.split("\t")
        if number == 1 and not _is_number(parts[-1]):
            continue
        if len(parts) != 3 or parts[1] not in index or not _is_number(parts[2]):
            raise UserError(f"{qrels}:{number}: must be QUERY-ID, a CORPUS-ID of the corpus, SCORE")
        if float(parts[2]) > 0:
            relevant.setdefault(parts[0], {})[index[parts[1]]] = float(parts[2])
    queries = [row for row in _read_jsonl(path / f"queries.{split}.jsonl") if row["id"] in relevant]
    queries = queries[: max_rows or None]
    if not queries:
        raise UserError(f"{qrels}: no query of queries.{split}.jsonl has a relevant document")
    return [row["text"] for row in queries], documents, [relevant[row["id"]] for row in queries]


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(_lines(path), 1):
        try:
            row = json.loads(line)
            if not (isinstance(row["id"], str) and isinstance(row["text"], str)):
                raise ValueError("id and text must be strings")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: must be an object with `id` and `text` ({error})"
            ) from None
        rows.append(row)
    return rows


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read ({error})") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
