"""What a model of the ablation gets on the test files, kept example by example.

The measures are those of CMTEB on fewer rows: Spearman's correlation, average precision, MAP,
nDCG@10, accuracy of a logistic regression on 8 training texts per label (mean of 5 draws) and the
V-measure of k-means. Examples are kept so that figures can be resampled.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats
from ablation_data import read_jsonl

from piccolo_jax.evaluation import encoder
from piccolo_jax.evaluation.encoder import cut

# Category and file (below --data) of each test; of labelled ones also where to fit.
TESTS = {
    "tnews": ("Cls", "research/classification/tnews.test.jsonl"),
    "waimai": ("Cls", "research/classification/waimai.test.jsonl"),
    "csl": ("Clu", "open/clustering/csl_category_title.test.jsonl"),
    "csldcp": ("Clu", "research/clustering/csldcp.test.jsonl"),
    "ocnli": ("Pair", "research/pair/ocnli.dev.jsonl"),
    "qbqtc": ("Rer", "research/reranking/qbqtc.dev.jsonl"),
    "cmrc2018": ("Ret", "open/retrieval/cmrc2018"),
    "stsb": ("STS", "research/sts/stsb_zh.test.jsonl"),
    "afqmc": ("STS", "research/sts/afqmc.dev.jsonl"),
}
CATEGORIES = ("Cls", "Clu", "Pair", "Rer", "Ret", "STS")
METRICS = {
    "Cls": "accuracy", "Clu": "v_measure", "Pair": "ap", "Rer": "map", "Ret": "ndcg_at_10",
    "STS": "spearman",
}  # fmt: skip
_SHOTS, _DRAWS = 8, 5
_DISTRACTORS = 4  # other passages for each query of retrieval
Scores = dict[str, np.ndarray]  # TEST|gold, and TEST|DIM: see metric()
Test = dict[str, Any]


def read_tests(data: Path, rows: int) -> dict[str, Test]:
    """The first `rows` examples of each test (drawn by a seed, so that all labels occur)."""
    tests = {}
    for name, (category, file) in TESTS.items():
        rng = np.random.default_rng(0)
        if category == "Ret":
            tests[name] = _read_retrieval(data / file, rows, rng)
            continue
        examples = _draw(list(read_jsonl(data / file)), rows, rng)
        test: Test = {"examples": examples}
        if category == "Cls":
            train = read_jsonl(data / file.replace(".test.", ".train."))
            test["shots"] = _draw_shots(list(train), rng)
        tests[name] = test
    return tests


def _draw(rows: list[Any], count: int, rng: np.random.Generator) -> list[Any]:
    return [rows[i] for i in np.sort(rng.permutation(len(rows))[:count])]


def _draw_shots(rows: list[Any], rng: np.random.Generator) -> list[Any]:
    """_DRAWS times _SHOTS rows of each label, in that order."""
    by_label: dict[Any, list[Any]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row)
    return [
        members[i]
        for _ in range(_DRAWS)
        for members in by_label.values()
        for i in rng.permutation(len(members))[:_SHOTS]
    ]


def _read_retrieval(folder: Path, count: int, rng: np.random.Generator) -> Test:
    """Queries, and a pool of their passages and as many others as _DISTRACTORS says."""
    relevant: dict[str, set[str]] = {}
    for line in (folder / "qrels.test.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        query, document, _ = line.split("\t")
        relevant.setdefault(query, set()).add(document)
    queries = [row for row in read_jsonl(folder / "queries.test.jsonl") if row["id"] in relevant]
    queries = _draw(queries, count // 2, rng)
    corpus = {
        row["id"]: f"{row['title']} {row['text']}" for row in read_jsonl(folder / "corpus.jsonl")
    }
    wanted = set().union(*(relevant[row["id"]] for row in queries))
    others = _draw(sorted(corpus.keys() - wanted), _DISTRACTORS * len(queries), rng)
    pool = [*sorted(wanted), *others]
    return {
        "queries": [row["text"] for row in queries],
        "passages": [corpus[document] for document in pool],
        "relevant": [[d in relevant[row["id"]] for d in pool] for row in queries],
    }


def evaluate(
    model: Path, tests: dict[str, Test], dims: Sequence[int], max_length: int, path: Path
) -> Scores:
    """What the model in a directory gets at each prefix (none: at its width); written to `path`.

    Reads `path` if it is there.
    """
    if not path.exists():
        embedder, params = encoder.load(model)
        embedder.max_length = max_length
        dims = dims or [embedder.width]
        vectors = {
            prompt: dict(
                zip(texts, embedder.encode(params, texts, prompt, "encoding"), strict=True)
            )
            for prompt, texts in _texts(tests).items()
        }

        def encode(texts: Sequence[str], prompt: str = "query: ") -> np.ndarray:
            return np.stack([vectors[prompt][text] for text in texts])

        scores: Scores = {}
        for name, (category, _) in TESTS.items():
            found = _RUN[category](tests[name], encode, dims)
            scores |= {f"{name}|{key}": value for key, value in found.items()}
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez(file, **scores)  # type: ignore[arg-type]
        os.replace(partial, path)
    return dict(np.load(path))


def _texts(tests: dict[str, Test]) -> dict[str, list[str]]:
    """Every text once, by its prompt: a batch of the encoder is then full."""
    found: dict[str, dict[str, None]] = {"query: ": {}, "passage: ": {}}
    for test in tests.values():
        found["passage: "] |= dict.fromkeys(test.get("passages", ()))
        found["query: "] |= dict.fromkeys(test.get("queries", ()))
        for row in (*test.get("examples", ()), *test.get("shots", ())):
            one = [row[key] for key in ("text", "text_pair", "query") if key in row]
            lists = [*row.get("positive", ()), *row.get("negative", ())]
            found["query: "] |= dict.fromkeys([*one, *lists])
    return {prompt: list(texts) for prompt, texts in found.items()}


def metric(category: str, gold: np.ndarray, values: np.ndarray) -> float:
    """The measure of a category, in percent, of examples (a whole test, or a resample of it).

    `gold` and `values` of each example: scores and cosines (STS, Pair), labels and clusters (Clu);
    elsewhere `values` are the measure of each example.
    """
    if category == "STS":
        return 100 * float(scipy.stats.spearmanr(values, gold).statistic)
    if category == "Pair":
        from sklearn.metrics import average_precision_score

        return 100 * float(average_precision_score(gold, values))
    if category == "Clu":
        from sklearn.metrics import v_measure_score

        return 100 * float(v_measure_score(gold, values))
    return 100 * float(values.mean())


Encode = Callable[..., np.ndarray]


def _pairs(test: Test, encode: Encode, dims: Sequence[int]) -> Scores:
    rows = test["examples"]
    first, second = (encode([row[k] for row in rows]) for k in ("text", "text_pair"))
    cosines = {str(d): (cut(first, d) * cut(second, d)).sum(axis=1) for d in dims}
    return {"gold": np.asarray([row["label"] for row in rows], np.float64), **cosines}


def _retrieval(test: Test, encode: Encode, dims: Sequence[int]) -> Scores:
    queries, passages = encode(test["queries"]), encode(test["passages"], "passage: ")
    relevant = np.asarray(test["relevant"])
    discounts = 1 / np.log2(np.arange(2, 12))
    ideal = np.asarray([discounts[: min(n, 10)].sum() for n in relevant.sum(axis=1)])
    scores = {"gold": np.zeros(len(relevant))}
    for dim in dims:
        order = np.argsort(-cut(queries, dim) @ cut(passages, dim).T, axis=1, kind="stable")
        hits = np.take_along_axis(relevant, order[:, :10], axis=1)
        scores[str(dim)] = (hits * discounts[: hits.shape[1]]).sum(axis=1) / ideal
    return scores


def _reranking(test: Test, encode: Encode, dims: Sequence[int]) -> Scores:
    rows = test["examples"]
    queries = encode([row["query"] for row in rows])
    lists = [[*row["positive"], *row["negative"]] for row in rows]
    documents = encode([text for texts in lists for text in texts])
    bounds = np.cumsum([0, *map(len, lists)])
    scores: Scores = {"gold": np.zeros(len(rows))}
    for dim in dims:
        q, d = cut(queries, dim), cut(documents, dim)
        scores[str(dim)] = np.asarray([
            _average_precision(d[bounds[i] : bounds[i + 1]] @ q[i], len(row["positive"]))
            for i, row in enumerate(rows)
        ])  # fmt: skip
    return scores


def _average_precision(similarities: np.ndarray, positives: int) -> float:
    """Of a ranked list whose first `positives` members are relevant; ties count against them."""
    relevant = np.arange(len(similarities)) < positives
    order = np.lexsort((relevant, -similarities))
    ranks = 1 + np.flatnonzero(relevant[order])
    return float(np.mean(np.arange(1, positives + 1) / ranks))


def _classification(test: Test, encode: Encode, dims: Sequence[int]) -> Scores:
    from sklearn.linear_model import LogisticRegression

    rows, shots = test["examples"], test["shots"]
    gold = np.asarray([row["label"] for row in rows])
    labels = np.asarray([row["label"] for row in shots])
    texts, examples = encode([r["text"] for r in rows]), encode([r["text"] for r in shots])
    scores = {"gold": gold}
    for dim in dims:
        x, known = cut(texts, dim), cut(examples, dim)
        correct = np.zeros(len(rows))
        for part in np.array_split(np.arange(len(shots)), _DRAWS):
            # As mteb's: 100 iterations of the default solver.
            classifier = LogisticRegression(max_iter=100).fit(known[part], labels[part])
            correct += classifier.predict(x) == gold
        scores[str(dim)] = correct / _DRAWS
    return scores


def _clustering(test: Test, encode: Encode, dims: Sequence[int]) -> Scores:
    from sklearn.cluster import KMeans

    rows = test["examples"]
    gold = np.asarray([row["label"] for row in rows])
    texts = encode([row["text"] for row in rows])
    scores = {"gold": gold}
    for dim in dims:
        means = KMeans(len(set(gold.tolist())), n_init=10, random_state=0)
        scores[str(dim)] = means.fit_predict(cut(texts, dim))
    return scores


_RUN: dict[str, Callable[[Test, Encode, Sequence[int]], Scores]] = {
    "Cls": _classification, "Clu": _clustering, "Pair": _pairs, "Rer": _reranking,
    "Ret": _retrieval, "STS": _pairs,
}  # fmt: skip
