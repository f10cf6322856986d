import numpy as np

from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining import corpus as corpus_lib
from piccolo_jax.mining import positives
from piccolo_jax.mining.queries import Query

CORPUS = corpus_lib.of_texts(["甲", "乙", "丙", "丁"], "test")
QUERIES = [Query("问一", ("乙", "外")), Query("问二", ("甲",), (0, 3)), Query("问三", ("外",))]


def test_texts_that_the_corpus_has_not_are_named_once_where_ids_dont_say_the_rows():
    assert positives.not_in(CORPUS, QUERIES) == ["外"]
    assert positives.not_in(CORPUS, [Query("问", ("外",), (2,))]) == []


def test_the_positive_of_the_lowest_cosine_counts_at_the_prefix_searched():
    rng = np.random.default_rng(0)
    rows, others, queries = (rng.normal(size=(n, 6)).astype(np.float32) for n in (4, 1, 3))
    found = positives.lowest_scores(QUERIES, cut(queries, 4), CORPUS, rows, ["外"], others)

    def cosine(a, b):
        return a[:4] @ b[:4] / np.linalg.norm(a[:4]) / np.linalg.norm(b[:4])

    expected = [
        min(cosine(queries[0], rows[1]), cosine(queries[0], others[0])),
        min(cosine(queries[1], rows[0]), cosine(queries[1], rows[3])),
        cosine(queries[2], others[0]),
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
