import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import CLASS_ROW, PAIR_ROW, RETRIEVAL_ROW, only, write_arrow, write_jsonl

from piccolo_jax.data.formats import (
    ClassificationExample,
    Rejected,
    RetrievalExample,
    SimilarityExample,
    open_source,
)
from piccolo_jax.errors import UserError

SHARED_DATA = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


# Plain labels


@pytest.fixture
def labelled(tmp_path):
    """labelled(*rows, names=None) -> examples of a file of rows."""

    def read(*rows, names=None):
        file = ""
        if names is not None:
            file = str(tmp_path / "names.json")
            (tmp_path / "names.json").write_text(json.dumps(names), "utf-8")
        path = write_jsonl(tmp_path / "labelled.jsonl", *rows)
        source = open_source(path, label_names=file)
        assert source.task == "classification"
        assert source.label_texts == tuple(dict.fromkeys((names or {}).values()))
        return list(source)

    return read


@pytest.mark.parametrize("columns", [("text", "label"), ("sentence", "label"), ("text", "labels")])
def test_texts_with_labels_become_classification(labelled, columns):
    rows = [
        dict(zip(columns, row, strict=True))
        for row in (("球赛", "体育"), ("股市", ["财经", "国际"]))
    ]
    assert labelled(*rows) == [
        ClassificationExample("球赛", ("体育",), ()),
        ClassificationExample("股市", ("财经", "国际"), ()),
    ]


def test_label_ids_become_the_names_of_a_file(labelled):
    names = {"0": "体育", "1": "财经", "2": "体育"}
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": [0, 1]}, {"text": "c", "label": "2"}]
    assert [example.labels for example in labelled(*rows, names=names)] == [
        ("财经",), ("体育", "财经"), ("体育",),
    ]  # fmt: skip


def test_a_file_of_names_is_used_in_place_of_listed_label_texts(labelled):
    row = {**CLASS_ROW, "label": 0}
    assert labelled(row) == [ClassificationExample("球赛", ("体育",), ("财经",))]
    assert labelled(row, names={"0": "sports"}) == [ClassificationExample("球赛", ("sports",), ())]


def test_numbers_without_a_file_of_names_are_an_error_that_names_it(labelled):
    for column, label in (("label", 3), ("label", [3]), ("label", 0.5), ("labels", [3, 4])):
        with pytest.raises(
            UserError, match=rf"labelled\.jsonl:1: {column} is a number; .*label_names="
        ):
            labelled({"text": "a", column: label})


def test_rows_with_a_label_that_cannot_be_used_are_rejected(labelled):
    rows = [{"text": "a", "label": v} for v in (0, 9, None, [], True, "")] + [
        {"text": "", "label": 0}
    ]
    example, *rejected = labelled(*rows, names={"0": "体育"})
    assert example.labels == ("体育",)
    assert [r.reason.split(" in ")[0] for r in rejected] == [
        "label '9' is not", "label is missing", "label is an empty list",
        "label is bool, not an integer or text", "label is empty", "text is empty",
    ]  # fmt: skip


def test_pairs_with_a_label_stay_pairs(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "甲", "text_pair": "乙", "label": 1})
    assert open_source(path).task == "similarity"


def rejection(tmp_path, bad, good=RETRIEVAL_ROW):
    """The reason given for a bad second row."""
    first, second = open_source(write_jsonl(tmp_path / "rows.jsonl", good, bad))
    assert not isinstance(first, Rejected)
    assert isinstance(second, Rejected)
    assert second.place == f"{tmp_path / 'rows.jsonl'}:2"
    return second.reason


# Columns


def test_reads_the_reference_columns_by_type(tmp_path):
    path = tmp_path / "a.jsonl"
    assert only(write_jsonl(path, RETRIEVAL_ROW)) == RetrievalExample("问题", ("答案",), ("无关",))
    assert only(write_jsonl(path, CLASS_ROW)) == ClassificationExample("球赛", ("体育",), ("财经",))
    pair = only(write_jsonl(path, PAIR_ROW))
    assert pair == SimilarityExample("甲", "乙", 1.0)
    assert isinstance(pair.score, float)


def test_reads_similarity_columns_without_type(tmp_path):
    row = {"text": "a", "text_pair": "b", "label": 0.5}
    assert only(write_jsonl(tmp_path / "a.jsonl", row)) == SimilarityExample("a", "b", 0.5)


def test_reads_flagembedding_rows_as_retrieval_and_ignores_its_own_columns(tmp_path):
    row = {"query": "q", "pos": ["p", "p2"], "neg": ["n"], "pos_scores": [1, 2], "neg_scores": [0],
           "type": "normal", "prompt": "Find: "}  # fmt: skip
    path = write_jsonl(tmp_path / "a.jsonl", row)
    assert only(path) == RetrievalExample("q", ("p", "p2"), ("n",))


def test_reads_flagembedding_rows_as_classification_when_told(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"], "neg": ["n"]})
    assert only(path, "classification") == ClassificationExample("q", ("p",), ("n",))


@pytest.mark.parametrize("query", ["anchor", "query"])
def test_reads_sentence_transformers_triplets(tmp_path, query):
    path = tmp_path / "a.jsonl"
    assert only(write_jsonl(path, {query: "a", "positive": "p"})) == RetrievalExample(
        "a", ("p",), ()
    )
    triplet = {query: "a", "positive": "p", "negative": "n"}
    assert only(write_jsonl(path, triplet)) == RetrievalExample("a", ("p",), ("n",))


def test_reads_numbered_negatives_in_numeric_order_without_the_null_ones(tmp_path):
    numbered = {f"negative_{i}": f"n{i}" for i in (10, 2, 1)}
    row = {"anchor": "a", "positive": "p", **numbered, "negative_3": None, "negative_x": "no"}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    assert only(path).negatives == ("n1", "n2", "n10")


def test_reads_a_list_of_negatives_in_the_plural(tmp_path):
    row = {"anchor": "q", "positive": "p", "negatives": ["n", "m"], "negative_1": "o"}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    assert list(open_source(path)) == [RetrievalExample("q", ("p",), ("n", "m", "o"))]


@pytest.mark.parametrize("query", ["anchor", "query"])
@pytest.mark.parametrize(
    "grades",
    [
        {"label": 0}, {"label": True}, {"labels": [1, 0]}, {"score": 0.5}, {"scores": [0.9, 0.1]},
        {"label": 1, "negative": "n"},
    ],
)  # fmt: skip
def test_positives_with_grades_are_an_error_as_some_may_be_negatives(tmp_path, query, grades):
    path = write_jsonl(tmp_path / "a.jsonl", {query: "q", "positive": ["p", "r"]} | grades)
    with pytest.raises(UserError, match=rf":1: {next(iter(grades))} beside {query}, positive "):
        open_source(path)


def test_grades_of_triplets_are_left_alone(tmp_path):
    row = {"anchor": "q", "positive": "p", "negative_1": "n", "scores": [0.9, 0.1], "label": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    assert list(open_source(path)) == [RetrievalExample("q", ("p",), ("n",))]


@pytest.mark.parametrize("score", ["score", "label"])
def test_reads_sentence_transformers_pairs(tmp_path, score):
    path = write_jsonl(tmp_path / "a.jsonl", {"sentence1": "a", "sentence2": "b", score: 3})
    assert only(path) == SimilarityExample("a", "b", 3.0)


def test_score_counts_before_label(tmp_path):
    row = {"sentence1": "a", "sentence2": "b", "label": 1, "score": 0.25}
    assert only(write_jsonl(tmp_path / "a.jsonl", row)).score == 0.25


@pytest.mark.parametrize("negatives", [{}, {"text_neg": None}, {"text_neg": []}])
def test_negatives_may_be_missing(tmp_path, negatives):
    row = {"text": "q", "text_pos": ["p"], "type": "retri_contrast", **negatives}
    assert only(write_jsonl(tmp_path / "a.jsonl", row)) == RetrievalExample("q", ("p",), ())


def test_lists_lose_duplicates_and_keep_their_order(tmp_path):
    row = {**RETRIEVAL_ROW, "text_pos": ["b", "a", "b"], "text_neg": ["z", "y", "z", "x"]}
    example = only(write_jsonl(tmp_path / "a.jsonl", row))
    assert example.positives == ("b", "a")
    assert example.negatives == ("z", "y", "x")


def test_a_label_is_not_among_the_other_labels(tmp_path):
    row = {**CLASS_ROW, "text_pos": ["a", "b"], "text_neg": ["c", "b", "d", "a"]}
    example = only(write_jsonl(tmp_path / "a.jsonl", row))
    assert example.labels == ("a", "b")
    assert example.other_labels == ("c", "d")


def test_a_positive_may_equal_the_query_and_texts_are_kept_as_they_are(tmp_path):
    row = {**RETRIEVAL_ROW, "text": " q\u2028 ", "text_pos": " q\u2028 ", "text_neg": "n"}
    example = only(write_jsonl(tmp_path / "a.jsonl", row))
    assert example == RetrievalExample(" q\u2028 ", (" q\u2028 ",), ("n",))


# Task type


def test_unclear_columns_are_an_error_that_says_what_to_write(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "text_pos": "b", "text_neg": ["c"]})
    with pytest.raises(UserError) as error:
        open_source(path)
    for part in (f"{path}:1", 'task="retrieval"', 'task="classification"', "DatasetConfig"):
        assert part in str(error.value)
    assert isinstance(only(path, "retrieval"), RetrievalExample)
    assert isinstance(only(path, "classification"), ClassificationExample)


@pytest.mark.parametrize("label", [3, "sports"])
def test_a_label_beside_the_label_text_means_classification_unless_told(tmp_path, label):
    row = {"text": "a", "text_pos": "b", "text_neg": ["c"], "label": label}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    assert open_source(path).task == "classification"
    assert open_source(path, "retrieval").task == "retrieval"


def test_columns_of_two_task_types_leave_the_task_open(tmp_path):
    row = {"text": "a", "text_pos": "b", "text_pair": "c", "label": 1}
    path = write_jsonl(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError, match='task="similarity" or task="classification"'):
        open_source(path)
    assert only(path, "similarity") == SimilarityExample("a", "c", 1.0)


def test_null_columns_of_a_merged_table_do_not_count(tmp_path):
    row = {"text": "a", "text_pos": None, "text_neg": None, "text_pair": "b", "label": 1}
    assert only(write_jsonl(tmp_path / "a.jsonl", row)) == SimilarityExample("a", "b", 1.0)


def test_a_task_that_type_contradicts_is_an_error_that_names_both(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", RETRIEVAL_ROW)
    with pytest.raises(UserError, match=r'retri_contrast.*retrieval.*task="classification"'):
        open_source(path, "classification")


def test_a_task_that_the_columns_cannot_serve_is_an_error_that_names_both(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"query": "q", "pos": ["p"]})
    with pytest.raises(UserError, match=r'query, pos.*retrieval.*task="similarity"'):
        open_source(path, "similarity")


def test_an_unknown_task_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"'rerank'.*retrieval, similarity, classification"):
        open_source(write_jsonl(tmp_path / "a.jsonl", RETRIEVAL_ROW), "rerank")


def test_the_first_row_that_fits_decides_and_the_ones_before_it_are_rejected(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a"}, {"text_pos": None}, CLASS_ROW)
    source = open_source(path)
    assert source.task == "classification"
    assert [type(example) for example in source] == [Rejected, Rejected, ClassificationExample]


def test_later_rows_of_another_type_or_other_columns_are_rejected(tmp_path):
    assert rejection(tmp_path, CLASS_ROW) == (
        "type is cls_contrast, but the dataset's task is retrieval"
    )
    other_columns = {"text": "a", "text_pair": "b", "label": 1}
    assert rejection(tmp_path, other_columns) == "no positive in text_pos"


def test_columns_of_no_format_are_an_error_that_lists_them_and_the_known_formats(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", r'{"id": 1, "title": null, "\ud800": 2, "正文": "x"}')
    with pytest.raises(UserError) as error:
        open_source(path)
    message = str(error.value)
    assert f"{path}:1: columns id, title (null), \\ud800, 正文 fit no known format" in message
    for known in ("text, text_pos[, text_neg]", "query, pos[, neg]", "sentence1, sentence2, score"):
        assert known in message
    message.encode()


def test_a_type_whose_columns_are_missing_fits_no_format(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "a", "text_pos": "b", "type": "cosent"})
    with pytest.raises(UserError, match="text_pos, type, with type for similarity fit no known"):
        open_source(path)


# Rows that cannot be used


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text": ""}, "text is empty"),
        ({"text": " \t\n\u3000"}, "text is empty"),
        ({"text": None}, "text is missing"),
        ({"text": 7}, "text is int, not text"),
        ({"text": ["a"]}, "text is list, not text"),
        ({"text_pos": None}, "no positive in text_pos"),
        ({"text_pos": []}, "no positive in text_pos"),
        ({"text_pos": ""}, "text_pos is empty"),
        ({"text_pos": 1.5}, "text_pos is float, not text"),
        ({"text_pos": ["a", " "]}, "text_pos[1] is empty"),
        ({"text_pos": [None]}, "text_pos[0] is missing"),
        ({"text_pos": {"a": "b"}}, "text_pos is dict, not text"),
        ({"text_neg": ["a", ["b"]]}, "text_neg[1] is list, not text"),
        ({"text_neg": ["a", ""]}, "text_neg[1] is empty"),
        ({"text_pos": "\ufeff\u200b \x00"}, "text_pos is empty"),
        ({"text_neg": True}, "text_neg is bool, not text"),
    ],
)
def test_a_row_with_unusable_text_is_rejected_with_field_and_reason(tmp_path, change, reason):
    assert rejection(tmp_path, {**RETRIEVAL_ROW, **change}) == reason
    assert rejection(tmp_path, {**CLASS_ROW, **change}, good=CLASS_ROW) == reason


def test_a_lone_surrogate_is_rejected(tmp_path):
    bad = r'{"text": "a\ud800b", "text_pos": "p", "type": "retri_contrast"}'
    assert rejection(tmp_path, bad).startswith("text holds a lone surrogate")
    bad = r'{"text": "a", "text_pos": "p", "text_neg": ["\ud83d\ude00", "\udc00"]}'
    assert rejection(tmp_path, bad).startswith("text_neg[1] holds a lone surrogate")


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("NaN", "label is NaN"),
        ("Infinity", "label is infinite"),
        ("-1e999", "label is infinite"),
        ("1" + "0" * 400, "label is infinite"),
        ("null", "label is missing"),
        ("true", "label is bool, not a number"),
        ('"1.0"', "label is str, not a number"),
        ("[1]", "label is list, not a number"),
    ],
)
def test_a_row_with_an_unusable_score_is_rejected(tmp_path, label, reason):
    bad = f'{{"text": "a", "text_pair": "b", "label": {label}, "type": "cosent"}}'
    assert rejection(tmp_path, bad, good=PAIR_ROW) == reason


@pytest.mark.parametrize("field", ["text", "text_pair"])
def test_both_texts_of_a_pair_are_checked(tmp_path, field):
    assert rejection(tmp_path, {**PAIR_ROW, field: " "}, good=PAIR_ROW) == f"{field} is empty"


def test_wrong_column_types_in_every_row_reject_every_row(tmp_path):
    rows = [{"query": i, "pos": ["p"]} for i in range(3)]
    source = open_source(write_jsonl(tmp_path / "a.jsonl", *rows))
    assert [example.reason for example in source] == ["query is int, not text"] * 3


def test_rows_of_tables_are_rejected_with_their_number_across_batches(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": s} for s in (1.0, 2.0, float("nan"))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    write_arrow(tmp_path / "a.arrow", rows)
    for file in (tmp_path / "a.parquet", tmp_path / "a.arrow"):
        assert list(open_source(str(file)))[2] == Rejected(f"{file}:row 3", "score is NaN")


# Everything


def test_importing_the_readers_does_not_import_jax():
    code = "import sys, piccolo_jax.data.formats; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_shared_training_file_is_read_whole():
    if not SHARED_DATA.is_dir():
        pytest.skip("needs the folder `shared` beside the repository")
    tasks = {
        "retri_contrast": "retrieval",
        "cls_contrast": "classification",
        "cosent": "similarity",
        None: "retrieval",  # the reranking files
    }
    entries = [
        entry
        for entry in json.loads((SHARED_DATA / "manifest.json").read_text())["files"]
        if "train" in Path(entry["file"]).name
        and not Path(entry["file"]).name.startswith(("queries", "qrels"))
    ]
    assert len(entries) > 15
    for entry in entries:
        task = tasks[entry.get("type")]
        source = open_source(str(SHARED_DATA / entry["file"]), task)
        examples = list(source)
        rejected = [example for example in examples if isinstance(example, Rejected)]
        assert source.task == task, entry["file"]
        assert (len(examples), rejected) == (entry["rows"], []), entry["file"]
