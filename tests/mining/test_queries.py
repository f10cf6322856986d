import json

import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.mining import queries as queries_lib


def write(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def read(path, corpus="", split="train"):
    return queries_lib.read(str(path), str(corpus), split, progress=False)


@pytest.fixture
def beir(tmp_path):
    """A folder in the layout of this project."""
    write(tmp_path / "corpus.jsonl", *({"id": f"p{i}", "text": f"文{i}"} for i in range(5)))
    write(tmp_path / "queries.train.jsonl", *({"id": f"q{i}", "text": f"问{i}"} for i in range(3)))
    qrels = "query-id\tcorpus-id\tscore\nq0\tp1\t1\nq0\tp4\t2\nq1\tp0\t0\nq2\tp2\t1\n"
    (tmp_path / "qrels.train.tsv").write_text(qrels)
    return tmp_path


def test_a_training_file_gives_queries_and_its_passages(tmp_path):
    path = write(
        tmp_path / "train.jsonl",
        {"text": "问", "text_pos": ["甲", "乙"], "text_neg": ["丙"], "type": "retri_contrast"},
        {"text": "问2", "text_pos": "丙", "text_neg": ["丁", "甲"], "type": "retri_contrast"},
        {"text": "", "text_pos": "戊", "text_neg": [], "type": "retri_contrast"},
    )
    inputs = read(path)
    assert [(q.text, q.positives) for q in inputs.queries] == [
        ("问", ("甲", "乙")),
        ("问2", ("丙",)),
    ]
    assert list(inputs.corpus.texts) == ["甲", "乙", "丙", "丁"]
    assert len(inputs.notes) == 1
    assert "1 rows" in inputs.notes[0]
    assert "train.jsonl:3" in inputs.notes[0]


@pytest.mark.parametrize(
    "row",
    [{"query": "问", "pos": ["甲"], "neg": ["乙"]}, {"query": "问", "positive": "甲"},
     {"anchor": "问", "positive": "甲", "negative_1": "乙"}],
)  # fmt: skip
def test_other_layouts_are_read_as_training_reads_them(tmp_path, row):
    inputs = read(write(tmp_path / "train.jsonl", row))
    assert [(q.text, q.positives) for q in inputs.queries] == [("问", ("甲",))]


def test_a_corpus_may_be_a_corpus_or_another_training_file(tmp_path):
    queries = write(tmp_path / "train.jsonl", {"query": "问", "pos": ["甲"], "neg": ["乙"]})
    corpus = write(tmp_path / "corpus.jsonl", {"id": "1", "title": "题", "text": "文"})
    assert list(read(queries, corpus).corpus.texts) == ["题 文"]
    published = write(tmp_path / "own.jsonl", {"query": "问", "positives": ["丙"], "negatives": []})
    assert list(read(queries, published).corpus.texts) == ["丙"]
    other = write(tmp_path / "more.jsonl", {"query": "x", "pos": ["丙"], "neg": ["丁", "丙"]})
    assert list(read(queries, other).corpus.texts) == ["丙", "丁"]
    with pytest.raises(UserError, match="no such file"):
        read(queries, tmp_path / "nowhere.jsonl")


def test_the_ids_of_tevatron_s_positives_name_passages_of_the_corpus(tmp_path):
    passages = [{"docid": "1", "title": "", "text": "甲"}, {"docid": 2, "title": "", "text": "乙"},
                {"docid": "9", "title": "", "text": "丙"}]  # fmt: skip
    row = {"query": "问", "positive_passages": passages, "negative_passages": []}
    queries = write(tmp_path / "train.jsonl", row, {**row, "positive_passages": passages[:1]})
    corpus = write(
        tmp_path / "corpus.jsonl", *({"docid": i, "text": f"文{i}"} for i in ("0", "1", "2", "3"))
    )
    assert [query.rows for query in read(queries, corpus).queries] == [(1, 2), (1,)]
    assert [query.rows for query in read(queries).queries] == [(), ()]


def test_judgements_above_0_name_the_positives(beir):
    inputs = read(beir)
    assert [(q.text, q.positives, q.rows) for q in inputs.queries] == [
        ("问0", ("文1", "文4"), (1, 4)), ("问2", ("文2",), (2,)),
    ]  # fmt: skip
    assert "1 queries" in inputs.notes[0]


def test_the_layout_of_the_beir_benchmark_is_read_too(tmp_path):
    write(tmp_path / "corpus.jsonl", {"_id": "7", "title": "t", "text": "x"})
    write(tmp_path / "queries.jsonl", {"_id": "1", "text": "q", "metadata": {}})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n1\t7\t1\n")
    assert [q.positives for q in read(tmp_path, split="dev").queries] == [("t x",)]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("qrels.train.tsv", "q0\tp9\t1\n", r"qrels.train.tsv:1: passage 'p9' is not in"),
        ("qrels.train.tsv", "q9\tp1\t1\n", r"qrels.train.tsv:1: query 'q9' is not in"),
        ("qrels.train.tsv", "q0\tp1\t1\nq0 p1\n", r"qrels.train.tsv:2: must be QUERY-ID"),
        ("qrels.train.tsv", "q0\tp1\t0\n", r"no query has a relevant passage"),
        ("queries.train.jsonl", '{"id": "q0"}\n', r"queries.train.jsonl:1: must be an object"),
        ("queries.train.jsonl", '{"id": "q0", "text": " "}\n', r"queries.train.jsonl:1: must be"),
        ("corpus.jsonl", "", r"corpus.jsonl: holds no passages"),
    ],
)
def test_a_folder_that_doesnt_fit_together_says_where(beir, file, text, message):
    (beir / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read(beir)


def test_a_split_that_isnt_there_is_said_with_those_that_are(beir):
    with pytest.raises(UserError, match=r"--split names another.*qrels\.train\.tsv"):
        read(beir, split="test")
