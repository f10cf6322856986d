import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from piccolo_jax.data.overlap import normalise
from piccolo_jax.errors import UserError
from piccolo_jax.mining import corpus as corpus_lib


def write(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="")
    return path


def test_a_passage_is_its_title_and_its_text(tmp_path):
    path = write(
        tmp_path / "corpus.jsonl",
        {"id": "a", "title": "题", "text": "甲乙"}, {"_id": "b", "text": "丙"}, "",
        {"id": 3, "title": None, "text": "x\u2028y"},
    )  # fmt: skip
    corpus = corpus_lib.read(path, {"a", "3", "other"})
    assert list(corpus.texts) == ["题 甲乙", "丙", "x\u2028y"]
    assert corpus.texts[-1] == "x\u2028y"
    assert corpus.index == {"a": 0, "3": 2}
    assert corpus.lengths.tolist() == [4, 1, 3]
    assert corpus.exact.tolist() == [corpus_lib.digest(text) for text in corpus.texts]


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}')
    assert list(corpus_lib.read(path).texts) == ["a", "b"]


def test_passages_that_are_no_text_are_left_out_and_said(tmp_path):
    path = write(
        tmp_path / "corpus.jsonl", {"text": " "}, {"text": "a"}, {"id": "x"}, {"text": 5},
        '{"text": "\\ud800"}', {"text": "b"},
    )  # fmt: skip
    corpus = corpus_lib.read(path)
    assert list(corpus.texts) == ["a", "b"]
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in corpus.unusable] == [*"1345"]
    assert "empty" in corpus.unusable[0]
    assert "surrogate" in corpus.unusable[3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"text": "a"}', '{"text": '], r"corpus.jsonl:2: broken JSON"),
        (["[1]"], r"corpus.jsonl:1: not a JSON object"),
        ([], r"holds no passages"),
        ([{"text": ""}], r"holds no passages.*the first: .*:1: the text is empty"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], r":2: id 'a' occurs twice"),
        ([{"id": [1], "text": "x"}], r":1: the id must be"),
    ],
)
def test_a_corpus_that_cant_be_used_says_where(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        corpus_lib.read(write(tmp_path / "corpus.jsonl", *rows), {"a"})


def test_a_file_that_changes_while_it_is_read_is_said(tmp_path):
    path = write(tmp_path / "corpus.jsonl", {"text": "a"}, {"text": "bcdef"})
    corpus = corpus_lib.read(path)
    write(path, {"text": "longer than before"})
    with pytest.raises(UserError, match=r"corpus\.jsonl"):
        _ = corpus.texts[1]


@pytest.mark.parametrize(
    ("one", "other"),
    [("Ａｂｃ，１２３！", "abc 123"), ("你好。世界", "你好 世界\n"), ("Straße", "STRASSE"),
     ("é", "e\u0301"), ("㍿", "株式会社"), ("ｶﾞ", "ガ")],
)  # fmt: skip
def test_case_width_punctuation_and_spaces_are_normalised_away(one, other):
    assert normalise(one) == normalise(other)


def test_other_words_stay_different():
    assert normalise("10公里") != normalise("19公里")
    assert normalise("！！") != normalise("？？")


def test_equal_texts_in_memory_are_one_passage():
    corpus = corpus_lib.of_texts(["b", "a", "b"], "x")
    assert list(corpus.texts) == ["b", "a"]
    assert corpus.exact.dtype == np.uint64
    with pytest.raises(UserError, match="no passages"):
        corpus_lib.of_texts([], "x")


def test_the_fingerprint_tells_texts_and_their_order():
    prints = [corpus_lib.of_texts(t, "x").fingerprint() for t in (["a", "b"], ["b", "a"], ["a"])]
    assert len(set(prints)) == 3
    assert prints[0] == corpus_lib.of_texts(["a", "b"], "y").fingerprint()


def test_a_corpus_may_be_any_kind_of_file_or_a_folder_of_them(tmp_path):
    rows = [{"_id": 1, "title": "题", "text": "文"}, {"_id": 2, "title": None, "text": ""},
            {"_id": 3, "title": "", "text": "字"}]  # fmt: skip
    plain = write(tmp_path / "plain.jsonl", *rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "named.jsonl").write_bytes(gzip.compress(plain.read_bytes()))
    (tmp_path / "a.csv").write_text("_id,title,text\n1,题,文\n2,,\n3,,字\n4\n", "utf-8")
    (tmp_path / "parts").mkdir()
    pq.write_table(pa.Table.from_pylist(rows[:1]), tmp_path / "parts" / "a.parquet")
    pq.write_table(pa.Table.from_pylist(rows[1:]), tmp_path / "parts" / "b.parquet")
    expected = corpus_lib.read(plain, {"3"})
    for name in ("a.jsonl.gz", "named.jsonl", "a.csv", "parts"):
        corpus = corpus_lib.read(tmp_path / name, {"3"}, progress=False)
        assert list(corpus.texts) == list(expected.texts) == ["题 文", "字"]
        assert corpus.fingerprint() == expected.fingerprint()
        assert corpus.index == {"3": 1}
        assert len(corpus.unusable) == (2 if name == "a.csv" else 1)
