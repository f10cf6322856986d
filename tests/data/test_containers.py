import decimal
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from piccolo_jax.data.containers import NoRow
from piccolo_jax.data.formats import (
    FileRows,
    Rejected,
    RetrievalExample,
    SimilarityExample,
    expand_meta_list,
    open_source,
)
from piccolo_jax.errors import UserError

ROWS = [{"query": f"问题{i}", "pos": [f"答案{i}"]} for i in range(50)]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def compressed(data, how):
    if how == "pzstd":  # which begins with a frame to be skipped
        return b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + compressed(data, "zstd")
    if how == "gzip":
        return gzip.compress(data[:100]) + gzip.compress(data[100:])  # as bgzip and cat write it
    return pa.compress(data, codec="zstd", asbytes=True) if how == "zstd" else data


def queries(path, **options):
    return [example.query for example in open_source(str(path), **options)]


def rows_of(path):
    return [row for _, row in FileRows((path,))]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


# Compression and sniffing


@pytest.mark.parametrize(
    ("name", "how"),
    [("a.jsonl.gz", "gzip"), ("a.jsonl.zst", "zstd"), ("A.JSONL.GZ", "gzip"), ("a.gz", "gzip"),
     ("a.zst", "zstd"), ("a.jsonl.zst", "pzstd"), ("a.jsonl", "gzip"), ("a.jsonl.gz", "none"),
     ("a.dat", "zstd"), ("noname", "none"), ("a.train", "none"), ("a.ndjson", "none")],
)  # fmt: skip
def test_json_lines_are_read_whatever_their_compression_and_name(tmp_path, name, how):
    (tmp_path / name).write_bytes(compressed(JSONL, how))
    assert queries(tmp_path / name) == [row["query"] for row in ROWS]
    assert FileRows((tmp_path / name,)).count() == 50
    assert expand_meta_list(str(tmp_path / name)) is None


def test_lines_are_numbered_in_compressed_files_too(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(JSONL + b'\n{"query": "", "pos": "x"}\n'))
    *_, last = open_source(str(tmp_path / "a.jsonl.gz"))
    assert last == Rejected(f"{tmp_path / 'a.jsonl.gz'}:52", "query is empty")


@pytest.mark.parametrize("how", ["gzip", "zstd"])
@pytest.mark.parametrize("keep", [-30, 60])
def test_a_compressed_file_cut_short_is_an_error_that_names_it(tmp_path, how, keep):
    (tmp_path / "a.jsonl.x").write_bytes(compressed(JSONL * 20, how)[:keep])
    with pytest.raises(UserError, match=r"a\.jsonl\.x: .*Truncated"):
        list(open_source(str(tmp_path / "a.jsonl.x")))


def test_tables_are_known_by_their_first_bytes(tmp_path):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "p")
    for name, new in (("s", pa.ipc.new_stream), ("f.bin", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("p", "s", "f.bin"):
        assert len(queries(tmp_path / name)) == 50


def test_a_directory_may_hold_compressed_files_but_not_the_same_data_twice(tmp_path):
    for name in ("1", "2"):
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(JSONL))
    assert len(queries(tmp_path)) == 100
    (tmp_path / "1.jsonl").write_bytes(JSONL)
    with pytest.raises(UserError, match=r"several kinds: \.jsonl, \.jsonl\.gz"):
        open_source(str(tmp_path))


def test_tables_of_text_beside_other_data_are_notes_about_them(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(JSONL)
    write(tmp_path / "counts.tsv", "name\trows\na\t50\n")
    assert len(queries(tmp_path)) == 50


# CSV and TSV


def test_reads_csv_with_quoted_separators_line_ends_and_quotes(tmp_path):
    path = write(
        tmp_path / "a.csv",
        '\ufeffquery,pos,neg\r\n"a, b","line 1\nline 2","say ""no"""\r\n\r\nc,d,\r\n,e,\r\n',
    )
    assert list(open_source(path)) == [
        RetrievalExample("a, b", ("line 1\nline 2",), ('say "no"',)),
        RetrievalExample("c", ("d",), ()),
        Rejected(f"{path}:6", "query is missing"),
    ]


def test_a_row_that_takes_several_lines_is_named_by_its_first(tmp_path):
    path = write(tmp_path / "a.csv", 'query,pos\na,b\n"",\n"x\ny\nz",\nq,p\n')
    rejected = [row for row in open_source(path) if isinstance(row, Rejected)]
    assert [row.place for row in rejected] == [f"{path}:3", f"{path}:4"]


@pytest.mark.parametrize("separator", [";", ",", "\t"])
def test_the_header_says_what_separates_cells(tmp_path, separator):
    lines = [("sentence1", "sentence2", "score"), ("a", "b", "2.5"), ("c", "d", "-1")]
    text = "\n".join(separator.join(cells) for cells in lines)
    expected = [SimilarityExample("a", "b", 2.5), SimilarityExample("c", "d", -1.0)]
    for name in ("a.csv", "a.tsv", "a.txt", "a"):
        assert list(open_source(write(tmp_path / name, text))) == expected


def test_tsv_keeps_stray_quotes_and_takes_off_proper_ones(tmp_path):
    path = write(
        tmp_path / "a.tsv",
        'query\tpos\n"quoted, ""all"""\t"p"\n"no" he said\tp\n"open\tp\nsay "x"\tp\n',
    )
    assert queries(path) == ['quoted, "all"', '"no" he said', '"open', 'say "x"']


def test_tsv_quotes_around_a_tab_belong_to_the_text_where_the_header_says_so(tmp_path):
    path = write(tmp_path / "a.tsv", 'query\tpos\tneg\n"a\tb"\tc\n')
    assert list(open_source(path)) == [RetrievalExample('"a', ('b"',), ("c",))]


def test_a_row_with_too_many_or_too_few_cells_is_rejected(tmp_path):
    for name, s in (("a.tsv", "\t"), ("a.csv", ",")):
        path = write(tmp_path / name, f"query{s}pos\na{s}b\na{s}b{s}c\nd\ne{s}f\n")
        _, more, fewer, last = open_source(path)
        assert more.place == f"{path}:3"
        assert more.reason.startswith("3 cells, but the header has 2")
        assert fewer.place == f"{path}:4"
        assert last.query == "e"


def test_cells_are_numbers_in_score_columns_and_lists_where_they_are_json_lists_of_texts(tmp_path):
    path = tmp_path / "a.csv"
    write(path, 'text,label,score\n7,7,1e3\n[1],007,x\n"[""a"",""b""]",0.50,nan\n[a],,-0\n')
    first, second, third, fourth = rows_of(path)
    assert first == {"text": "7", "label": 7, "score": 1000.0}
    assert second == {"text": "[1]", "label": "007", "score": "x"}
    assert isinstance(first["label"], int)
    assert third["text"] == ["a", "b"]
    assert third["label"] == 0.5
    assert third["score"] != third["score"]
    assert fourth["text"] == "[a]"
    assert fourth["label"] is None


def test_labels_that_look_like_numbers_are_codes_or_words_and_scores_numbers(tmp_path):
    cells = ("1E2", "NaN", "inf", "A1")
    lines = "".join(f"文{i},{cell}\n" for i, cell in enumerate(cells))
    path = write(tmp_path / "a.csv", f"text,label\n{lines}")
    assert [example.labels for example in open_source(path)] == [(cell,) for cell in cells]
    path = write(tmp_path / "b.csv", "sentence1,sentence2,label\na,b,1e-1\na,c,0.5\na,d,nan\n")
    *examples, rejected = open_source(path)
    assert [example.score for example in examples] == [0.1, 0.5]
    assert rejected.reason == "label is NaN"


def test_a_table_may_hold_times_that_python_cannot(tmp_path):
    columns = {name: [row[name] for row in ROWS[:2]] for name in ("query", "pos")}
    for kind, most in (
        (pa.timestamp("us"), 2**62),
        (pa.date32(), 2**30),
        (pa.duration("s"), 2**62),
    ):
        table = pa.table(columns | {"made": pa.array([most] * 2, kind)})
        pq.write_table(table, tmp_path / "a.parquet")
        assert queries(tmp_path / "a.parquet") == columns["query"]


def test_a_column_that_a_table_names_twice_is_an_error(tmp_path):
    columns = [pa.array(["a"]) for _ in range(3)]
    table = pa.Table.from_arrays(columns, names=["query", "pos", "pos"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: the schema names a column twice"):
        open_source(str(tmp_path / "a.parquet"))


def test_a_score_may_be_a_decimal(tmp_path):
    score = pa.array([decimal.Decimal("2.5")], pa.decimal128(3, 1))
    table = pa.table({"sentence1": ["a"], "sentence2": ["b"], "score": score})
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet"))) == [SimilarityExample("a", "b", 2.5)]


def test_lists_of_negatives_are_read_from_csv(tmp_path):
    path = write(tmp_path / "a.csv", 'query,pos,neg\nq,p,"[""n1"", ""n2""]"\n')
    assert list(open_source(path)) == [RetrievalExample("q", ("p",), ("n1", "n2"))]


def test_lists_of_label_ids_are_read_from_csv(tmp_path):
    names = write(tmp_path / "names.json", '["zero", "one", "two"]')
    path = write(tmp_path / "a.csv", 'text,labels\na,"[1, 2]"\nb,0\nc,"[""2""]"\nd,[1.5]\n')
    *examples, rejected = open_source(path, label_names=names)
    assert [example.labels for example in examples] == [("one", "two"), ("zero",), ("two",)]
    assert rejected.reason == f"labels '[1.5]' is not in {names}"


def test_blank_lines_before_the_header_are_skipped(tmp_path):
    path = write(tmp_path / "a.csv", "\ufeff\n\r\nquery,pos\na,b\nc\n")
    first, second = open_source(path)
    assert first == RetrievalExample("a", ("b",), ())
    assert second.place == f"{path}:5"


def test_a_score_that_is_no_number_is_rejected(tmp_path):
    path = write(tmp_path / "a.csv", "sentence1,sentence2,score\na,b,1\na,b,high\na,b,\n")
    assert [r.reason for r in list(open_source(path))[1:]] == [
        "score is str, not a number", "score is missing"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"query,query\na,b\n", "1: the header names a column twice"),
        (b"query,pos\na,b\nc,\xff\n", "3: not UTF-8"),
        (b"\xff,pos\na,b\n", "1: not UTF-8"),
        (b"a,b\nc,d\n", "2: columns a, b fit no known format"),
        (b"query,pos\n", ": holds no rows"),
        (b"", ": holds no rows"),
        (b"query,pos\na\rb,c\n", "broken CSV"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_an_error_that_names_the_line(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text)
    with pytest.raises(UserError, match=message):
        list(open_source(str(tmp_path / "a.csv")))


def test_a_quote_that_is_never_closed_ends_in_an_error(tmp_path, monkeypatch):
    from piccolo_jax.data import containers

    monkeypatch.setattr(containers, "_LONGEST_CELL", 1000)
    path = write(tmp_path / "a.csv", 'query,pos\na,b\n"c,d\n' + "e,f\n" * 1000)
    with pytest.raises(UserError, match=r"broken CSV .*field limit"):
        list(open_source(path))


# Damage


def test_a_lenient_source_goes_on_after_damage_and_says_where_it_was(tmp_path):
    path = write(
        tmp_path / "a.jsonl", '{"query": "a", "pos": "b"}\n{"query"\n{"query": "c", "pos":"d"}'
    )
    with pytest.raises(UserError, match=rf"{path}:2: broken JSON"):
        open_source(path)
    first, damage, second = open_source(path, lenient=True)
    assert (first.query, second.query) == ("a", "c")
    assert damage.place == f"{path}:2"
    assert damage.damaged
    assert damage.reason.startswith("broken JSON")


def test_no_row_is_no_example(tmp_path):
    write(tmp_path / "a.jsonl", "[]\n")
    assert rows_of(tmp_path / "a.jsonl") == [
        NoRow("not a JSON object; write one object per line", damaged=True)
    ]


# Tevatron, and the examples' own names


def test_reads_tevatron_rows_with_titles_before_texts(tmp_path):
    row = {
        "query_id": "1",
        "query": "q",
        "positive_passages": [{"docid": "a", "title": "T", "text": "p"}],
        "negative_passages": [
            {"docid": "b", "title": "", "text": "n"},
            {"docid": "c", "text": "m"},
            {"docid": "d", "title": None, "text": "n"},
        ],
    }
    path = write(tmp_path / "a.jsonl", json.dumps(row) + "\n")
    assert list(open_source(path)) == [RetrievalExample("q", ("T p",), ("n", "m"))]
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert next(iter(open_source(str(tmp_path / "a.parquet")))).positives == ("T p",)
    # What `datasets` and TFDS make of a sequence of objects.
    row["positive_passages"] = {"docid": ["a", "b"], "title": ["T", ""], "text": ["p", "o"]}
    path = write(tmp_path / "b.jsonl", json.dumps(row) + "\n")
    assert next(iter(open_source(path))).positives == ("T p", "o")


@pytest.mark.parametrize(
    ("passages", "reason"),
    [
        ([], "no positive in positive_passages"),
        ([{"docid": "a"}], "positive_passages[0] is missing"),
        ([{"text": " "}], "positive_passages[0] is empty"),
        ([{"text": 3, "title": "x"}], "positive_passages[0] is int, not text"),
        (["text"], "a passage is str, not an object"),
    ],
)
def test_tevatron_rows_that_cannot_be_used_are_rejected(tmp_path, passages, reason):
    good = {"query": "q", "positive_passages": [{"text": "p"}]}
    rows = [good, {"query": "q", "positive_passages": passages}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(open_source(path))[1] == Rejected(f"{path}:2", reason)


@pytest.mark.parametrize(
    ("row", "task"),
    [
        ({"query": "q", "positives": ["p"], "negatives": ["n"]}, "retrieval"),
        ({"first": "a", "second": "b", "score": 0.5}, "similarity"),
        ({"text": "a", "labels": ["x"], "other_labels": ["y"]}, "classification"),
    ],
)
def test_the_names_of_the_examples_own_fields_say_the_task(tmp_path, row, task):
    source = open_source(write(tmp_path / "a.jsonl", json.dumps(row) + "\n"))
    (example,) = source
    assert source.task == task
    values = (list(v) if isinstance(v, tuple) else v for v in map(example.__getattribute__, row))
    assert dict(zip(row, values, strict=True)) == row
