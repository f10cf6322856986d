"""How near a query is to what answers it."""

import numpy as np

from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining.corpus import Corpus, digest
from piccolo_jax.mining.queries import Query


def not_in(corpus: Corpus, queries: list[Query]) -> list[str]:
    """Texts of positives that are no passages of the corpus, each once."""
    texts = _known_by_text(queries)
    known = np.isin(_digests(texts), corpus.exact)
    return [text for text, is_known in zip(texts, known, strict=True) if not is_known]


def lowest_scores(
    queries: list[Query],
    query_rows: np.ndarray,
    corpus: Corpus,
    rows: np.ndarray,
    others: list[str],
    other_rows: np.ndarray,
) -> np.ndarray:
    """float32 [queries]: the lowest cosine of each query with one of its positives.

    Args:
      query_rows: [queries, dim], normalised.
      rows, other_rows: embeddings of the corpus and of `others` (see not_in()), at full width.
    """
    elsewhere = {text: i for i, text in enumerate(others)}
    first: dict[int, int] = {}
    for row in np.flatnonzero(np.isin(corpus.exact, _digests(_known_by_text(queries)))):
        first.setdefault(int(corpus.exact[row]), int(row))

    def vector(text: str) -> np.ndarray:
        return other_rows[elsewhere[text]] if text in elsewhere else rows[first[digest(text)]]

    scores = np.empty(len(queries), np.float32)
    for i, query in enumerate(queries):
        by_text = [] if query.rows else [vector(text) for text in query.positives]
        vectors = rows[list(query.rows)] if query.rows else np.stack(by_text)
        scores[i] = (cut(vectors, query_rows.shape[1]) @ query_rows[i]).min()
    return scores


def _known_by_text(queries: list[Query]) -> list[str]:
    texts = (text for query in queries if not query.rows for text in query.positives)
    return list(dict.fromkeys(texts))


def _digests(texts: list[str]) -> np.ndarray:
    return np.asarray([digest(text) for text in texts], np.uint64)
