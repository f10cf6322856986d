import itertools
import json
import os
import pickle
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rows import RETRIEVAL_ROW, queries, retrieval_rows, save_to_disk, write_arrow, write_jsonl

from piccolo_jax.data.formats import (
    RetrievalExample,
    SimilarityExample,
    expand_meta_list,
    open_source,
)
from piccolo_jax.errors import UserError


def test_jsonl_may_have_blank_lines_a_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "a.json"
    lines = [json.dumps(row).encode() for row in (*retrieval_rows("a", "b"), {"text": ""})]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n  \n".join(lines))
    *examples, rejected = open_source(str(path))
    assert [example.query for example in examples] == ["a", "b"]
    assert rejected.place == f"{path}:7"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a", ', r"broken JSON \(.*: column 14 "),
        (b"[" * 100_000, "broken JSON"),
        (b'{"label": 1' + b"0" * 5000 + b"}", "broken JSON"),
        (b'["a"]', "not a JSON object"),
        (b"3", "not a JSON object"),
        (b'{"text": "\xff"}', "not UTF-8"),
        ("{}".encode("utf-16"), "not UTF-8"),
    ],
)
def test_a_broken_line_is_an_error_that_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(RETRIEVAL_ROW).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(UserError, match=rf"a\.jsonl:3: {message}"):
        open_source(str(path))


def test_a_broken_line_far_into_the_file_is_met_while_iterating(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *[RETRIEVAL_ROW] * 300, '{"text"')
    rows = iter(open_source(path))
    assert len(list(itertools.islice(rows, 300))) == 300
    with pytest.raises(UserError, match=r"a\.jsonl:301: broken JSON"):
        next(rows)


def test_reads_parquet(tmp_path):
    rows = [{"query": f"q{i}", "pos": ["p"], "neg": ["n"]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    source = open_source(str(tmp_path / "a.parquet"))
    assert list(source) == [RetrievalExample(f"q{i}", ("p",), ("n",)) for i in range(5)]


@pytest.mark.parametrize("file_format", [False, True])
def test_reads_arrow_streams_and_arrow_files(tmp_path, file_format):
    write_arrow(tmp_path / "b.arrow", retrieval_rows("c"), file_format=file_format)
    write_arrow(tmp_path / "a.arrow", retrieval_rows("a", "b", "d"), file_format=file_format)
    write_arrow(tmp_path / "cache-1.arrow", retrieval_rows("no"))
    assert queries(open_source(str(tmp_path))) == ["a", "b", "d", "c"]


def test_reads_large_and_dictionary_encoded_strings(tmp_path):
    table = pa.table(
        {
            "sentence1": pa.array(["a", "b"], pa.large_string()),
            "sentence2": pa.array(["c", "c"]).dictionary_encode(),
            "score": pa.array([1, 2], pa.int8()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(open_source(str(tmp_path / "a.parquet"))) == [
        SimilarityExample("a", "c", 1.0),
        SimilarityExample("b", "c", 2.0),
    ]


def test_reads_a_saved_dataset_in_the_order_of_its_state_file(tmp_path):
    directory = save_to_disk(tmp_path / "d", retrieval_rows("a", "b", "c"), retrieval_rows("d"))
    write_arrow(directory / "data-left-over.arrow", retrieval_rows("no"))
    source = open_source(str(directory))
    assert queries(source) == ["a", "b", "c", "d"]
    assert source.path == str(directory)
    assert [file.name[:10] for file in source.rows.files] == ["data-00000", "data-00001"]


def test_concatenates_the_splits_of_a_dataset_dict(tmp_path):
    save_to_disk(tmp_path / "validation", retrieval_rows("c"))
    save_to_disk(tmp_path / "train", retrieval_rows("a", "b"))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    assert queries(open_source(str(tmp_path))) == ["a", "b", "c"]


def test_reads_what_the_datasets_library_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list(retrieval_rows("a", "b", "c"))
    splits = datasets.DatasetDict(train=rows.select([2, 0]), test=rows.select([1]))
    splits.save_to_disk(tmp_path / "d")
    assert queries(open_source(str(tmp_path / "d"))) == ["c", "a", "b"]


def test_reads_all_jsonl_or_parquet_files_of_a_directory_in_name_order(tmp_path):
    for folder in ("j", "p"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md").write_text("notes")
        (tmp_path / folder / "info.json").write_text("{}")
    write_jsonl(tmp_path / "j" / "2.jsonl", *retrieval_rows("b"))
    write_jsonl(tmp_path / "j" / "1.jsonl", *retrieval_rows("a"))
    (tmp_path / "j" / "0.jsonl").touch()
    (tmp_path / "j" / "._1.jsonl").write_bytes(b"\x00\x05")
    assert queries(open_source(str(tmp_path / "j"))) == ["a", "b"]
    for name in ("2", "1"):
        rows = pa.Table.from_pylist(retrieval_rows(name))
        pq.write_table(rows, tmp_path / "p" / f"{name}.parquet")
    assert queries(open_source(str(tmp_path / "p"))) == ["1", "2"]


@pytest.mark.parametrize("name", ["train.json", "train.csv"])
def test_notes_are_data_where_there_is_nothing_else(tmp_path, name):
    text = "text,text_pos\na,b\n" if name.endswith("csv") else '{"text": "a", "text_pos": "b"}\n'
    (tmp_path / name).write_text(text)
    (tmp_path / "dataset_info.json").write_text('{"description": ""}')
    assert queries(open_source(str(tmp_path), "retrieval")) == ["a"]


def test_a_directory_of_several_kinds_or_of_none_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no data files"):
        open_source(str(tmp_path))
    write_jsonl(tmp_path / "a.jsonl", RETRIEVAL_ROW)
    write_arrow(tmp_path / "a.arrow", [RETRIEVAL_ROW])
    with pytest.raises(UserError, match=r"several kinds: \.arrow, \.jsonl"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["missing", "a" * 5000, "a\0b"])
def test_a_missing_path_is_an_error(tmp_path, name):
    with pytest.raises(UserError, match="no such file or directory"):
        open_source(str(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl: holds no rows"):
        open_source(str(tmp_path / "a.jsonl"))


def test_a_file_of_unknown_kind_is_an_error_that_lists_the_known_ones(tmp_path):
    (tmp_path / "a.txt").write_text("just a text, with a comma\n")
    with pytest.raises(UserError, match=r"a\.txt: not a data file.*\.jsonl.*\.parquet.*\.arrow"):
        open_source(str(tmp_path / "a.txt"))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
@pytest.mark.parametrize("keep", [0, 20, -200])
def test_a_truncated_table_is_an_error_that_names_the_file(tmp_path, kind, keep):
    file = tmp_path / f"a.{kind}"
    rows = retrieval_rows(*map(str, range(2000)))
    if kind == "arrow":
        write_arrow(file, rows, batch_rows=1000)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=rf"a\.{kind}: damaged or unreadable"):
        list(open_source(str(file)))


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_invalid_utf8_in_a_table_is_an_error_that_names_the_file(tmp_path, kind):
    bad = pa.array([b"\xff"], pa.binary()).view(pa.string())
    table = pa.table({"query": bad, "pos": ["p"]})
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(UserError, match=rf"a\.{kind}: damaged"):
        list(open_source(str(file)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("state.json", "{", "not a readable dataset"),
        ("state.json", "{}", "not a readable dataset"),
        ("state.json", "[]", "not a readable dataset"),
        ("state.json", '{"_data_files": [{"filename": "x.arrow"}]}', "x.arrow: listed .* missing"),
        (
            "state.json",
            '{"_data_files": [{"filename": "data.arrow"}], "_indices_data_files": [{}]}',
            "index file",
        ),
        ("dataset_dict.json", "[]", "not a readable dataset"),
        ("dataset_dict.json", '{"splits": ["train"]}', "train: no such directory"),
    ],
)
def test_broken_metadata_of_a_saved_dataset_is_an_error(tmp_path, name, content, message):
    write_arrow(tmp_path / "data.arrow", [RETRIEVAL_ROW])
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path))


def test_a_source_can_be_read_again_in_parallel_and_after_pickling(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *retrieval_rows("a", "b", "c"))
    source = open_source(path)
    first = list(source)
    half_read = iter(source)
    next(half_read)
    assert list(source) == first
    assert list(half_read) == first[1:]
    assert list(pickle.loads(pickle.dumps(source))) == first


@pytest.mark.parametrize("kind", ["jsonl", "arrow", "parquet"])
def test_reading_streams_in_bounded_memory(tmp_path, kind):
    rows = [{**RETRIEVAL_ROW, "text": f"{i} " + "x" * 2000} for i in range(5000)]
    file = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_jsonl(file, *rows)
    elif kind == "arrow":
        write_arrow(file, rows, batch_rows=5000)
    else:
        pq.write_table(pa.Table.from_pylist(rows), file)
    del rows
    tracemalloc.start()
    try:
        assert sum(1 for _ in open_source(str(file))) == 5000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 7e6  # the texts alone are 10 MB


# Meta lists


def test_a_meta_list_gives_directories_and_repeats(tmp_path, monkeypatch):
    for name in ("meta/beside", "meta/with space", "cwd/here", "cwd/beside"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    meta = tmp_path / "meta" / "list.txt"
    meta.write_text(
        f"# datasets\n\nbeside 2\nwith space\t0.5  # half\n  here 1.0\n{tmp_path / 'cwd'} 3\n"
    )
    assert expand_meta_list(str(meta)) == [
        (str(tmp_path / "meta" / "beside"), 2.0),
        (str(tmp_path / "meta" / "with space"), 0.5),
        ("here", 1.0),
        (str(tmp_path / "cwd"), 3.0),
    ]


@pytest.mark.parametrize(
    "line", ["data", "data x", "data 0", "data -1", "data nan", "data inf", "7", '{"text": "a"}']
)
def test_a_line_that_is_not_directory_and_repeats_is_an_error_naming_it(tmp_path, line):
    (tmp_path / "data").mkdir()
    meta = tmp_path / "list.txt"
    meta.write_text(f"data 1\n# more\n{line}\n")
    with pytest.raises(UserError, match=r"list\.txt:3: .*DIRECTORY REPEATS"):
        expand_meta_list(str(meta))


def test_a_missing_directory_of_a_meta_list_is_an_error_naming_file_and_line(tmp_path):
    meta = tmp_path / "list.txt"
    meta.write_text("\ngone 1\n")
    with pytest.raises(UserError, match=rf"list\.txt:2: no directory .*{os.sep}gone or gone"):
        expand_meta_list(str(meta))


def test_a_meta_list_in_a_meta_list_is_an_error_naming_the_line(tmp_path):
    (tmp_path / "inner.txt").write_text("a 1\n")
    (tmp_path / "outer.txt").write_text("\ninner.txt 1\n")
    with pytest.raises(UserError, match=r"outer\.txt:2: .*inner\.txt is no data file.*nest"):
        expand_meta_list(str(tmp_path / "outer.txt"))


def test_an_empty_or_binary_meta_list_is_an_error(tmp_path):
    meta = tmp_path / "list.txt"
    meta.write_text("# nothing\n")
    with pytest.raises(UserError, match=r"list\.txt: empty"):
        expand_meta_list(str(meta))
    meta.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"list\.txt: not a text file"):
        expand_meta_list(str(meta))


def test_data_and_missing_paths_are_no_meta_lists(tmp_path):
    assert expand_meta_list(str(tmp_path)) is None
    assert expand_meta_list(str(tmp_path / "gone.txt")) is None
    assert expand_meta_list(write_jsonl(tmp_path / "a.jsonl", RETRIEVAL_ROW)) is None
