import gzip
import json
import shutil

import pytest
from evaluation import six_types
from evaluation.six_types import write_rows

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import files, rows

PAIR = {"text": "a", "text_pair": "b", "label": 1}
OTHER = {"text": "c", "text_pair": "d", "label": 0}
LABELLED = [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}]
RANKED = {"query": "q", "positive": ["p"], "negative": ["n", "m"]}


def found_in(folder, **choice):
    return [(f.name, f.type, s) for f, s in files.choose(files.find(folder), folder, **choice)]


def read(folder, limit=0, **choice):
    [(found, split)] = files.choose(files.find(folder), folder, **choice)
    return files.read(found, split, limit)


def test_a_folder_of_all_six_types_is_known_by_the_names_of_its_folders(tmp_path):
    found = found_in(six_types.write(tmp_path))
    assert [(kind, name) for name, kind, _ in found] == list(six_types.NAMES.items())
    assert {split for *_, split in found} == {"test"}


def test_without_such_folders_the_columns_say_it(tmp_path):
    write_rows(tmp_path / "binary.test.jsonl", PAIR, OTHER)
    write_rows(tmp_path / "graded.test.jsonl", PAIR, {**OTHER, "label": 2.5})
    write_rows(tmp_path / "scored.test.jsonl", {"sentence1": "a", "sentence2": "b", "score": 1})
    write_rows(tmp_path / "alone.test.jsonl", *LABELLED)
    write_rows(tmp_path / "sets.test.jsonl", {"sentences": ["a", "b"], "labels": [0, 1]})
    for split in ("train", "test"):
        write_rows(tmp_path / f"trained.{split}.jsonl", *LABELLED)
    write_rows(tmp_path / "ranked.test.jsonl", RANKED)
    write_rows(tmp_path / "passages.test.jsonl", {"text": "q", "text_pos": "p", "text_neg": []})
    assert {name: kind for name, kind, _ in found_in(tmp_path)} == {
        "binary": "PairClassification", "graded": "STS", "scored": "STS", "alone": "Clustering",
        "sets": "Clustering", "trained": "Classification", "ranked": "Reranking",
        "passages": "Retrieval",
    }  # fmt: skip


def test_the_manifest_comes_before_folders_and_columns(tmp_path):
    write_rows(tmp_path / "pair" / "a.test.jsonl", PAIR, OTHER)
    listed = [{"file": "pair/a.test.jsonl", "task": "STS"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"files": listed}))
    assert found_in(tmp_path) == [("a", "STS", "test")]
    for text in ("[]", "[" * 100_000):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json: must be an object with a list `file"):
            found_in(tmp_path)


def test_the_split_is_test_else_dev_unless_one_is_named(tmp_path):
    for name in ("a.test", "a.dev", "a.train", "b.dev", "c.train", "d.validation"):
        write_rows(tmp_path / "sts" / f"{name}.jsonl", PAIR, OTHER)
    assert found_in(tmp_path) == [
        ("a", "STS", "test"), ("b", "STS", "dev"), ("d", "STS", "validation")
    ]  # fmt: skip
    assert found_in(tmp_path, split="dev") == [("a", "STS", "dev"), ("b", "STS", "dev")]
    assert found_in(tmp_path, tasks=["a.dev"], split="dev") == [("a", "STS", "dev")]
    with pytest.raises(UserError, match=r"no evaluation set of split 'x' \(splits here: dev, test"):
        found_in(tmp_path, split="x")
    with pytest.raises(UserError, match=r"--split=test: b has no such split, only dev"):
        found_in(tmp_path, tasks=["b"], split="test")
    assert files.find(tmp_path).left_out == ((tmp_path / "sts" / "c", "has a train split only"),)


def test_sets_of_one_name_are_told_apart_by_type(tmp_path):
    write_rows(tmp_path / "sts" / "a.test.jsonl", PAIR, OTHER)
    write_rows(tmp_path / "pair" / "a.test.jsonl", PAIR, OTHER)
    assert [name for name, *_ in found_in(tmp_path)] == ["a-PairClassification", "a-STS"]
    write_rows(tmp_path / "more" / "sts" / "a.test.jsonl", PAIR, OTHER)
    with pytest.raises(UserError, match=r"a-STS is the name of a set in .*; rename one"):
        found_in(tmp_path)


def test_files_of_no_type_are_left_out_and_said_where_they_are_asked_for(tmp_path):
    write_rows(tmp_path / "a.test.jsonl", PAIR, OTHER)
    write_rows(tmp_path / "bitext.test.jsonl", {"zh": "a", "en": "b"})
    write_rows(tmp_path / "notes.jsonl", {"x": 1})
    assert [name for name, *_ in found_in(tmp_path)] == ["a"]
    reasons = {path.name: why for path, why in files.find(tmp_path).left_out}
    assert "columns zh, en are of none of the six types" in reasons["bitext.test.jsonl"]
    assert "doesn't end in .SPLIT" in reasons["notes.jsonl"]
    with pytest.raises(UserError, match=r"--tasks=bitext: .* has a; .*of none of the six types"):
        found_in(tmp_path, tasks=["bitext"])


def test_columns_that_are_not_what_the_folder_says_are_an_error(tmp_path):
    write_rows(tmp_path / "sts" / "a.test.jsonl", {"text": "a", "pair": "b", "label": 1})
    with pytest.raises(UserError, match=r"a\.test\.jsonl:1: the folder's name says STS, but its"):
        found_in(tmp_path)


@pytest.mark.parametrize("folder", ["none", "empty"])
def test_a_folder_without_sets_is_an_error_that_shows_the_layouts(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    message = "no such folder" if folder == "none" else "holds no evaluation set"
    with pytest.raises(UserError, match=f"--data=.*{folder}: .*{message}"):
        found_in(tmp_path / folder)


def test_pairs_and_their_labels(tmp_path):
    write_rows(tmp_path / "sts" / "a.test.jsonl", PAIR, {**OTHER, "label": 2.5})
    data = read(tmp_path)
    assert (data.texts, data.others, data.labels) == (["a", "c"], ["b", "d"], [1.0, 2.5])


def test_a_clustering_is_a_file_or_a_row(tmp_path):
    write_rows(tmp_path / "clustering" / "a.test.jsonl", *LABELLED, {"text": "c", "label": "x"})
    data = read(tmp_path)
    assert (data.labels, data.sets) == ([0, 1, 0], [0, 3])
    write_rows(
        tmp_path / "clustering" / "a.test.jsonl",
        {"sentences": ["a", "b"], "labels": [7, 3]}, {"sentences": ["c", "d"], "labels": [3, 7]},
    )  # fmt: skip
    data = read(tmp_path)
    assert (data.texts, data.labels, data.sets) == (["a", "b", "c", "d"], [7, 3, 3, 7], [0, 2, 4])


def test_labels_of_both_splits_are_numbered_alike(tmp_path):
    write_rows(tmp_path / "c.train.jsonl", *LABELLED, {"text": "z", "label": "w"})
    write_rows(tmp_path / "c.test.jsonl", *reversed(LABELLED))
    data = read(tmp_path)
    assert (data.train_labels, data.labels) == ([0, 1, 2], [1, 0])
    rows = [{"text": "a", "text_pos": "y", "type": "cls_contrast"}]
    write_rows(tmp_path / "c.test.jsonl", *rows)
    assert read(tmp_path).labels == [2]


def test_what_is_positive_and_negative_is_positive_and_a_text_is_one_document(tmp_path):
    write_rows(
        tmp_path / "r.test.jsonl", RANKED, {"query": "s", "positive": "n", "negative": ["n", "p"]}
    )
    data = read(tmp_path)
    assert data.documents == {"d0": ("", "p"), "d1": ("", "n"), "d2": ("", "m")}
    assert data.candidates == {"q0": ["d0", "d1", "d2"], "q1": ["d1", "d0"]}
    assert data.relevant == {"q0": {"d0": 1, "d1": 0, "d2": 0}, "q1": {"d1": 1, "d0": 0}}


def test_a_beir_folder_keeps_queries_with_a_relevant_document(tmp_path):
    folder = six_types.write(tmp_path) / "retrieval" / "titles"
    (folder / "qrels.test.tsv").write_text("q1\td1\t2\nq1\td0\t0\nq2\td1\t0\n")
    data = read(tmp_path, tasks=["titles"])
    assert list(data.queries) == ["q1"]
    assert data.relevant == {"q1": {"d1": 2, "d0": 0}}
    assert data.documents["d1"][0] == "论文"
    assert len(data.documents) == 24


def test_a_folder_as_beir_has_it_is_the_same(tmp_path):
    folder = six_types.write(tmp_path) / "retrieval" / "titles"
    before = read(tmp_path, tasks=["titles"])
    (folder / "qrels").mkdir()
    (folder / "qrels.test.tsv").rename(folder / "qrels" / "test.tsv")
    (folder / "queries.test.jsonl").rename(folder / "queries.jsonl")
    corpus = (folder / "corpus.jsonl").read_text("utf-8").replace('"id"', '"_id"')
    (folder / "corpus.jsonl").write_text(corpus, "utf-8")
    assert read(tmp_path, tasks=["titles"]) == before


def test_a_training_file_of_passages_is_retrieval_among_them(tmp_path):
    write_rows(
        tmp_path / "p.test.jsonl",
        {"text": "q", "text_pos": "a", "text_neg": ["b"], "type": "retri_contrast"},
        {"text": "r", "text_pos": ["b", "c"], "type": "retri_contrast"},
    )
    data = read(tmp_path)
    assert [text for _, text in data.documents.values()] == ["a", "b", "c"]
    assert data.relevant == {"q0": {"d0": 1}, "q1": {"d1": 1, "d2": 1}}


def test_a_limit_takes_few_rows_spread_over_the_file(tmp_path):
    six_types.write(tmp_path)
    for name, kind in (("grades", "STS"), ("same_paper", "PairClassification")):
        data = read(tmp_path, limit=4, tasks=[name])
        assert len(data.texts) == len(data.others) == len(data.labels) == 4, kind
        assert len(set(data.labels)) > 1
    assert len(read(tmp_path, limit=5, tasks=["areas"]).texts) == 5
    data = read(tmp_path, limit=5, tasks=["subjects"])
    assert (len(data.texts), len(data.train_texts) > 20) == (5, True)
    data = read(tmp_path, limit=2, tasks=["shortlist"])
    assert (len(data.queries), len(data.documents)) == (2, 5)
    data = read(tmp_path, limit=1, tasks=["titles"])
    assert (len(data.queries), len(data.documents)) == (1, 10)


def test_a_limit_that_leaves_one_label_says_so(tmp_path):
    write_rows(tmp_path / "sts" / "a.test.jsonl", PAIR, OTHER)
    write_rows(tmp_path / "clustering" / "b.test.jsonl", *LABELLED)
    for name in "ab":
        with pytest.raises(UserError, match="raise --limit"):
            read(tmp_path, limit=1, tasks=[name])


def test_labels_that_are_one_as_texts_are_one(tmp_path):
    labels = [{"text": "a", "label": n} for n in (0, "0")]
    write_rows(tmp_path / "c.train.jsonl", *labels)
    write_rows(tmp_path / "c.test.jsonl", *labels)
    with pytest.raises(UserError, match=r"c\.train\.jsonl: all rows have the same label"):
        read(tmp_path)


def test_two_labels_of_many_are_0_and_1(tmp_path):
    labels = [{"text": "a", "label": n} for n in (4, 2, 3, 4)]
    write_rows(tmp_path / "c.train.jsonl", *labels)
    write_rows(tmp_path / "c.test.jsonl", *labels[:2])
    data = read(tmp_path)
    assert (data.labels, data.train_labels) == ([1, 0], [1, 0, 2, 1])
    write_rows(tmp_path / "c.test.jsonl", *labels)
    data = read(tmp_path)
    assert (data.labels, data.train_labels) == ([4, 2, 3, 4], [4, 2, 3, 4])


def test_compressed_files_are_read(tmp_path):
    path = write_rows(tmp_path / "sts" / "a.test.jsonl", PAIR, OTHER)
    with gzip.open(f"{path}.gz", "wb") as file:
        file.write(path.read_bytes())
    with pytest.raises(UserError, match="is the same set and split; keep one"):
        found_in(tmp_path)
    path.unlink()
    assert len(read(tmp_path).texts) == 2


def test_the_fingerprint_is_of_content_split_and_limit(tmp_path):
    six_types.write(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def prints(folder, limit=0):
        chosen = files.choose(files.find(folder), folder)
        return [files.fingerprint(found, split, limit) for found, split in chosen]

    before = prints(tmp_path / "a")
    assert prints(tmp_path / "b") == before
    assert not set(prints(tmp_path / "a", limit=3)) & set(before)
    for place in ("retrieval/titles/corpus.jsonl", "classification/subjects.train.jsonl"):
        with (tmp_path / "b" / place).open("a") as file:
            file.write("\n")
    assert [x == y for x, y in zip(prints(tmp_path / "b"), before, strict=True)] == [
        False, True, True, True, False, True
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "lines", "message"),
    [
        ("sts/a.test.jsonl", ["{"], r"a\.test\.jsonl:1: broken JSON"),
        ("sts/a.test.jsonl", [], r"a\.test\.jsonl: holds no rows"),
        ("sts/a.test.jsonl", [PAIR, {**PAIR, "label": "x"}], r":2: label is 'x'; write a number"),
        ("sts/a.test.jsonl", [PAIR, {**PAIR, "label": True}], r":2: label is True"),
        ("sts/a.test.jsonl", [PAIR, '{"text": "a", "text_pair": "b", "label": NaN}'], ":2: label"),
        ("sts/a.test.jsonl", [PAIR, {**PAIR, "text": " "}], ":2: text is empty; mend or delete"),
        ("sts/a.test.jsonl", [PAIR, {**PAIR, "text": 3}], ":2: text is int; write a text"),
        ("sts/a.test.jsonl", [PAIR, '{"text": "\\ud800", "text_pair": "b", "label": 1}'], ":2: te"),
        ("sts/a.test.jsonl", [PAIR, PAIR], "all 2 rows used have the same label"),
        ("sts/a.test.jsonl", [PAIR, {**PAIR, "label": 10**400}], r":2: label is 10{400}; write"),
        ("pair/a.test.jsonl", [PAIR, {**PAIR, "label": 2}], r":2: label is 2; a pair's label is 0"),
        ("clustering/a.test.jsonl", [LABELLED[0]] * 2, "texts of a clustering have one label$"),
        ("clustering/a.test.jsonl", [{**LABELLED[0], "label": x} for x in (0, "0")], "one label$"),
        ("clustering/a.test.jsonl", [{"text": "a", "label": 10**30}], ":1: label is 10{30}; write"),
        ("clustering/a.test.jsonl", [{"text": "a", "label": 0.5}], r":1: label is 0\.5; write a w"),
        ("clustering/a.test.jsonl", [{"sentences": ["a"], "labels": []}], ":1: .* equal length"),
        ("classification/a.test.jsonl", LABELLED, r"a\.train\.jsonl, which is not beside it"),
        ("reranking/a.test.jsonl", [{**RANKED, "positive": []}], ":1: positive is empty"),
        ("reranking/a.test.jsonl", [RANKED, {**RANKED, "negative": 1}], ":2: negative is int"),
        ("reranking/a.test.jsonl", [RANKED, {**RANKED, "positive": None}], ":2: positive is miss"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_named_by_file_and_line(tmp_path, place, lines, message):
    write_rows(tmp_path / place, *lines)
    with pytest.raises(UserError, match=message):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("qrels.test.tsv", "q0\td0\t1\nq0 d1 1\n", r"qrels\.test\.tsv:2: must be QUERY-ID, CORPUS"),
        ("qrels.test.tsv", "q0\td0\t0.5\nq0\td0\tx\n", r"qrels\.test\.tsv:2: must be QUERY-ID"),
        ("qrels.test.tsv", "q0\td0\t1\nq0\td1\t--1\n", r"qrels\.test\.tsv:2: must be QUERY-ID"),
        ("qrels.test.tsv", f"q0\td0\t1\nq0\td1\t{10**30}\n", r"tsv:2: .* at most 9 digits"),
        ("qrels.test.tsv", f"q0\td0\t{10**30}\nq0\td1\t1\n", r"tsv:1: .* at most 9 digits"),
        ("corpus.jsonl", '{"id": "\\ud800", "text": "a"}\n', r"corpus\.jsonl:1: id holds half"),
        ("qrels.test.tsv", "q0\td99\t1\n", r"qrels\.test\.tsv:1: document 'd99' is not in corpus"),
        ("qrels.test.tsv", "q99\td0\t1\n", r"qrels\.test\.tsv:1: query 'q99' is not in queries"),
        ("qrels.test.tsv", "q0\td0\t0\n", r"no query of queries\.test\.jsonl has a document"),
        ("corpus.jsonl", '{"id": "d0", "text": "a"}\n' * 2, r"corpus\.jsonl:2: id 'd0' is also at"),
        ("corpus.jsonl", '{"id": 1, "text": "a"}\n', r"corpus\.jsonl:1: id is 1; write a text"),
        ("queries.test.jsonl", '{"id": "q0"}\n', r"queries\.test\.jsonl:1: text is missing"),
        ("qrels.test.tsv", None, r"qrels\.test\.tsv: no such file; queries\.test\.jsonl needs it"),
        ("queries.test.jsonl", None, r"corpus\.jsonl: needs queries\.SPLIT\.jsonl and qrels"),
    ],
)
def test_a_broken_retrieval_folder_is_an_error(tmp_path, name, content, message):
    folder = six_types.write(tmp_path) / "retrieval" / "titles"
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read(tmp_path, tasks=["titles"])


def test_labels_of_pairs_in_csv_are_numbers_however_they_are_written(tmp_path):
    (tmp_path / "a.csv").write_text("text,text_pair,label\na,b,1e-1\na,c,0.5\na,d,2\n")
    assert rows.read_pairs(tmp_path / "a.csv").labels == [0.1, 0.5, 2.0]


def test_the_real_data_are_all_readable(shared):
    listing = files.find(shared / "data")
    chosen = files.choose(listing, shared / "data")
    assert {found.type for found, _ in chosen} == set(files.TYPES)
    assert len(chosen) == 25
    for found, split in chosen:
        files.read(found, split, limit=3)
