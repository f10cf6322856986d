import json
import math
import warnings

import numpy as np
import pytest
import scipy.stats

from piccolo_jax.config import EvalDatasetConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import local
from piccolo_jax.evaluation.encoder import cut


def unit(*rows):
    return cut(np.asarray(rows, np.float32), len(rows[0]))


def write_jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def dataset(path, **fields):
    return local.EvalDataset(EvalDatasetConfig(path=str(path), **fields))


def test_spearman_is_the_rank_correlation_of_cosines_and_scores():
    rng = np.random.default_rng(0)
    x, y = unit(*rng.normal(size=(50, 8))), unit(*rng.normal(size=(50, 8)))
    scores = rng.integers(0, 4, 50)
    expected = scipy.stats.spearmanr(np.einsum("nd,nd->n", x, y), scores).statistic
    assert local.spearman(x, y, scores) == pytest.approx(expected, abs=1e-6)
    x = unit([1, 0], [1, 0], [1, 0])
    y = unit([1, 0], [1, 1], [0, 1])
    assert local.spearman(x, y, np.array([5, 3, 1])) == 1
    assert local.spearman(x, y, np.array([1, 3, 5])) == -1


def test_spearman_of_equal_cosines_is_0_and_no_warning():
    x = unit([1, 0], [1, 0], [1, 0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert local.spearman(x, x, np.array([1, 2, 3])) == 0


def test_ndcg_by_hand():
    documents = unit([1, 0], [1, 0.1], [1, 0.2], [0, 1])
    queries = unit([1, 0], [1, 0])  # ranks the documents 0, 1, 2, 3
    assert local.ndcg_at_10(queries[:1], documents, [{0: 1.0}]) == pytest.approx(1)
    assert local.ndcg_at_10(queries[:1], documents, [{1: 1.0}]) == pytest.approx(1 / math.log2(3))
    graded = (2 / math.log2(3) + 1 / math.log2(4)) / (2 + 1 / math.log2(3))
    assert local.ndcg_at_10(queries[:1], documents, [{1: 2.0, 2: 1.0}]) == pytest.approx(graded)
    both = local.ndcg_at_10(queries, documents, [{0: 1.0}, {1: 1.0}])
    assert both == pytest.approx((1 + 1 / math.log2(3)) / 2)


def test_ndcg_equals_the_library_s():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    queries, documents = unit(*rng.normal(size=(300, 6))), unit(*rng.normal(size=(40, 6)))
    gains = rng.integers(0, 3, (300, 40)) * (rng.random((300, 40)) < 0.4)
    gains[:, 7] = 1  # at least one
    expected = metrics.ndcg_score(gains, queries @ documents.T, k=10)
    relevant = [{int(d): float(row[d]) for d in np.flatnonzero(row)} for row in gains]
    assert local.ndcg_at_10(queries, documents, relevant) == pytest.approx(expected, abs=1e-6)


def test_what_is_found_after_the_tenth_place_counts_nothing():
    documents = unit(*[[1, 0.01 * i] for i in range(12)])
    assert local.ndcg_at_10(unit([1, 0]), documents, [{10: 1.0}]) == 0
    assert local.ndcg_at_10(unit([1, 0]), documents, [{9: 1.0}]) == pytest.approx(1 / math.log2(11))


def test_label_accuracy_is_the_share_whose_nearest_label_is_their_own():
    labels = unit([1, 0], [0, 1])
    texts = unit([2, 1], [1, 2], [3, 1], [1, 3])
    assert local.label_accuracy(texts, labels, [{0}, {1}, {1}, {0, 1}]) == 0.75


def by_first_letters(vectors):
    """An encoder of texts by what they begin with; notes (text, prompt)."""
    seen = []

    def encode(texts, prompt):
        seen.extend((text, prompt) for text in texts)
        return np.asarray([vectors[text.split()[0]] for text in texts], np.float32)

    return encode, seen


def test_similarity_is_scored_at_every_prefix_with_the_query_prompt(tmp_path):
    path = write_jsonl(
        tmp_path / "sts.dev.jsonl",
        {"text": "a 1", "text_pair": "a 2", "label": 2},
        {"text": "a 3", "text_pair": "b", "label": 1},
        {"text": "a 4", "text_pair": "c", "label": 0},
    )
    made = dataset(path, query_prompt="Q", passage_prompt="P")
    assert (made.name, made.task) == ("sts.dev", "similarity")
    encode, seen = by_first_letters({"a": [1, 0, 0], "b": [0.2, 1, 0], "c": [0.4, 0, 3]})
    # At 2 the cosine with b is 0.2 and that with c is 1; at 3 the first is larger.
    assert made.evaluate(encode, (2, 3)) == {
        2: pytest.approx(scipy.stats.spearmanr([1, 0.2, 1], [2, 1, 0]).statistic),
        3: pytest.approx(1.0),
    }
    assert [prompt for _, prompt in seen] == ["Q"] * 6


def test_retrieval_ranks_all_texts_of_the_file_each_once(tmp_path):
    path = write_jsonl(
        tmp_path / "r.jsonl",
        {"text": "a q", "text_pos": ["a", "b"], "text_neg": ["c"], "type": "retri_contrast"},
        {"text": "c q", "text_pos": "b", "text_neg": ["a", "c"], "type": "retri_contrast"},
    )
    made = dataset(path, query_prompt="Q", passage_prompt="P")
    encode, seen = by_first_letters({"a": [1, 0], "b": [1, 0.5], "c": [0, 1]})
    second = 1 / math.log2(3)  # c, b, a
    assert made.evaluate(encode, (2,)) == {2: pytest.approx((1 + second) / 2)}
    assert seen == [("a q", "Q"), ("c q", "Q"), ("a", "P"), ("b", "P"), ("c", "P")]


def test_classification_chooses_among_all_labels_of_the_file(tmp_path):
    path = write_jsonl(
        tmp_path / "c.jsonl",
        {"text": "a 1", "text_pos": "a", "text_neg": ["b"], "type": "cls_contrast"},
        {"text": "b 2", "text_pos": "b", "text_neg": [], "type": "cls_contrast"},
        {"text": "b 3", "text_pos": "c", "text_neg": [], "type": "cls_contrast"},
    )
    encode, seen = by_first_letters({"a": [1, 0], "b": [1, 0.5], "c": [0, 1]})
    assert dataset(path).evaluate(encode, (2,)) == {2: pytest.approx(2 / 3)}
    assert [text for text, _ in seen[3:]] == ["a", "b", "c"]


def beir(path, queries=None, qrels=None):
    path.mkdir()
    write_jsonl(
        path / "corpus.jsonl",
        {"id": "d1", "title": "b", "text": "one"},
        {"id": "d2", "title": "", "text": "c two"},
        {"id": "d3", "text": "a three"},
    )
    write_jsonl(
        path / "queries.dev.jsonl",
        *(queries or [{"id": f"q{i}", "text": f"{name} q"} for i, name in enumerate("abcc")]),
    )
    lines = qrels or ["query-id\tcorpus-id\tscore", "q0\td3\t1", "q0\td1\t2", "q2\td2\t1",
                      "q3\td1\t0"]  # fmt: skip
    (path / "qrels.dev.tsv").write_text("\n".join(lines) + "\n")
    return path


def test_a_directory_in_beir_layout_is_a_retrieval_set(tmp_path):
    made = dataset(beir(tmp_path / "cmrc"), split="dev")
    assert (made.name, made.task) == ("cmrc", "retrieval")
    encode, seen = by_first_letters({"a": [1, 0], "b": [1, 0.5], "c": [0, 1]})
    # q0 ranks d3, d1 of gains 1, 2; q1 and q3 have no relevant document.
    first = (1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3))
    assert made.evaluate(encode, (2,)) == {2: pytest.approx((first + 1) / 2)}
    assert [text for text, _ in seen] == ["a q", "c q", "b one", "c two", "a three"]


def test_max_rows_takes_the_first_rows_or_queries(tmp_path):
    encode, seen = by_first_letters({"a": [1, 0], "b": [1, 0.5], "c": [0, 1]})
    dataset(beir(tmp_path / "cmrc"), split="dev", max_rows=1).evaluate(encode, (2,))
    assert [text for text, _ in seen][:2] == ["a q", "b one"]
    rows = [{"text": f"a {i}", "text_pair": "b", "label": i} for i in range(5)]
    encode, seen = by_first_letters({"a": [1, 0], "b": [1, 0.5]})
    dataset(write_jsonl(tmp_path / "s.jsonl", *rows), max_rows=3).evaluate(encode, (2,))
    assert [text for text, _ in seen] == ["a 0", "a 1", "a 2", "b", "b", "b"]


def test_sets_of_the_same_name_are_told_apart(tmp_path):
    rows = [{"text": "a", "text_pair": "b", "label": i} for i in range(2)]
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "dev.jsonl", *rows)
    write_jsonl(tmp_path / "test.jsonl", *rows)
    paths = [tmp_path / name for name in ("x/dev.jsonl", "test.jsonl", "y/dev.jsonl")]
    made = local.open_datasets([EvalDatasetConfig(path=str(path)) for path in paths])
    assert [d.name for d in made] == ["dev[0]", "test", "dev[2]"]


SCORED = {"text": "a", "text_pair": "b", "label": 1}
LABELLED = {"text": "a", "text_pos": "b", "text_neg": [], "type": "cls_contrast"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([SCORED, "{"], r"set\.jsonl:2: broken JSON"),
        ([SCORED, SCORED | {"label": "x"}], r"set\.jsonl:2: label is str, not a number.*every row"),
        ([SCORED, SCORED | {"text": ""}], r"set\.jsonl:2: text is empty"),
        ([SCORED, SCORED], "all 2 rows used have the same score"),
        ([LABELLED, LABELLED], "all 2 rows used have the same label and list no other"),
        ([{"words": "a"}], r"set\.jsonl:1: columns words fit no known format"),
        ([], r"set\.jsonl: holds no rows"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_that_names_the_line(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        dataset(write_jsonl(tmp_path / "set.jsonl", *rows))


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: no such file"):
        dataset(tmp_path / "none.jsonl")


QUERY = {"id": "q0", "text": "a"}


@pytest.mark.parametrize(
    ("queries", "qrels", "fields", "message"),
    [
        (["{"], None, {}, r"queries\.dev\.jsonl:1: must be an object with `id` and `text`"),
        ([QUERY, {"id": 1, "text": "a"}], None, {}, r"queries\.dev\.jsonl:2: .*strings"),
        ([QUERY, {"id": "q1"}], None, {}, r"queries\.dev\.jsonl:2: "),
        (None, ["q0\td1\t1", "q0\td9\t1"], {}, r"qrels\.dev\.tsv:2: must be QUERY-ID"),
        (None, ["q0\td1\t1", "q0 d1 1"], {}, r"qrels\.dev\.tsv:2: "),
        (None, ["q9\td1\t1"], {}, r"qrels\.dev\.tsv: no query of queries\.dev\.jsonl has"),
        (None, ["q0\td1\t0"], {}, r"qrels\.dev\.tsv: no query"),
        (None, None, {"split": "test"}, r"qrels\.test\.tsv: can't be read"),
        (None, None, {"task": "similarity"}, "is for task 'retrieval'"),
    ],
)
def test_a_broken_beir_directory_is_an_error_that_names_the_line(
    tmp_path, queries, qrels, fields, message
):
    path = beir(tmp_path / "cmrc", queries, qrels)
    with pytest.raises(UserError, match=message):
        dataset(path, **{"split": "dev", **fields})


def test_embeddings_that_are_not_finite_are_an_error(tmp_path):
    path = write_jsonl(tmp_path / "s.jsonl", SCORED, SCORED | {"label": 2})
    encode, _ = by_first_letters({"a": [1, 0], "b": [math.nan, 0]})
    with pytest.raises(UserError, match=r"s\.jsonl: the model's embeddings are not finite"):
        dataset(path).evaluate(encode, (2,))
