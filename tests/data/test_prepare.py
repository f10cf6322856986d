import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from preparing import PAIRS, RETRIEVAL, TOKENIZER, folders, write

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import collect, formats, prepare
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UnusableDatasetError, UserError
from piccolo_jax.tasks import TASKS


def members_of(column, row):
    return column.values[column.offsets[row] : column.offsets[row + 1]]


def texts_of(store, ids, tokenizer):
    return ["".join(tokenizer.hf.convert_ids_to_tokens(t)[1:-1]) for t in store.tokens(ids)]


# What is written


def test_rows_become_ids_of_texts_that_decode_to_them(prepared, tokenizer):
    store = prepared(RETRIEVAL)
    columns = store.columns
    assert texts_of(store, columns["query"], tokenizer) == [row["query"] for row in RETRIEVAL]
    for name, field in (("positives", "pos"), ("negatives", "neg")):
        for i, row in enumerate(RETRIEVAL):
            members = members_of(columns[name], i)
            assert texts_of(store, members, tokenizer) == row.get(field, [])
    assert store.lengths.tolist() == [len(t) for t in store.tokens(range(len(store.lengths)))]
    assert (store.task, store.num_rows, store.name) == ("retrieval", 3, "rows.jsonl")


def test_a_name_as_long_as_file_systems_take_is_cut_in_the_folder_s(prepared, tmp_path):
    name = "长" * 80 + ".jsonl"  # 246 bytes
    assert prepared(RETRIEVAL, name=name).name == name
    assert [folder.startswith("长" * 50 + "-") for folder in folders(tmp_path)] == [True]


def test_each_distinct_text_is_tokenised_and_stored_once(prepared, monkeypatch):
    given = []
    encode = Tokenizer.encode

    def counting(self, texts, max_length):
        given.extend(texts)
        return encode(self, texts, max_length)

    monkeypatch.setattr(Tokenizer, "encode", counting)
    monkeypatch.setattr(collect, "_ROWS_AT_ONCE", 2)
    store = prepared([{"query": "有雨", "pos": "天气好", "neg": ["中国", "天气好"]}] * 5)
    assert sorted(given) == sorted(["有雨", "天气好", "中国"])
    assert store.manifest["texts"] == len(store.lengths) == 3
    assert store.columns["positives"].values.tolist() == [1] * 5


def test_texts_with_the_same_tokens_are_one_text(prepared):
    config = Config()
    config.data.max_length = 5
    store = prepared(
        [{"query": "ABC", "pos": "天气好朗今天"}, {"query": "abc", "pos": "天气好明天"}],
        config=config,
    )
    assert store.columns["query"].tolist() == [0, 0]
    assert store.columns["positives"].values.tolist() == [1, 1]
    assert len(store.lengths) == 2


def test_prompts_and_limits_apply_to_queries_and_passages_of_their_own(prepared, tokenizer):
    config = Config()
    config.data.query_max_length, config.data.max_length = 6, 9
    store = prepared(
        [{"query": "天" * 20, "pos": "雨" * 20, "neg": "有" * 20}],
        config=config, query_prompt="问:", passage_prompt="文",
    )  # fmt: skip
    assert texts_of(store, [0, 1, 2], tokenizer) == ["问:天天", "文雨雨雨雨雨雨", "文有有有有有有"]
    assert store.lengths.tolist() == [6, 9, 9]
    assert store.manifest["truncated_texts"] == 3
    assert store.manifest["longest_tokens"] == 9
    both = prepared([{"query": "天" * 20, "pos": "天" * 20}], config=config)
    assert both.lengths.tolist() == [6, 9]
    pairs = prepared([{"sentence1": "天" * 20, "sentence2": "雨", "score": 1}], config=config)
    assert pairs.lengths.tolist() == [9, 3]  # both texts of a pair have the long limit
    assert pairs.manifest["truncated_texts"] == 1


def test_scores_are_kept_as_they_are(prepared):
    store = prepared(PAIRS)
    assert store.columns["score"].tolist() == [0.5, -1, 3]
    assert store.columns["score"].dtype == np.float32
    assert store.task == "similarity"


def test_a_dataset_without_any_negative_can_be_opened(prepared):
    store = prepared([{"query": "天气", "pos": "好"}, {"query": "首都", "pos": "北京"}])
    assert members_of(store.columns["negatives"], 1).tolist() == []
    assert store.tokens([]) == []


def test_rows_that_cannot_be_used_are_counted_and_listed_with_file_and_line(prepared, tmp_path):
    bad = [{"query": "", "pos": "好"}, {"query": "天气", "pos": []}, {"query": 3, "pos": "好"}]
    manifest = prepared([RETRIEVAL[0], *bad, "", RETRIEVAL[1]]).manifest
    file = tmp_path / "rows.jsonl"
    assert manifest["rows"] == 2
    assert manifest["rejected"] == 3
    assert manifest["rejected_rows"] == [
        {"place": f"{file}:2", "reason": "query is empty"},
        {"place": f"{file}:3", "reason": "no positive in pos"},
        {"place": f"{file}:4", "reason": "query is int, not text"},
    ]
    assert manifest["rejected_reasons"]["query is empty"] == 1


def test_scores_beyond_32_bits_are_rejected(prepared):
    rows = [*PAIRS, {"sentence1": "天", "sentence2": "有", "score": 1e300}]
    assert prepared(rows).manifest["rejected"] == 1


def test_the_progress_bar_knows_how_many_rows_there_are(prepared, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.n = total, 0
            bars.append(self)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, n):
            self.n += n

    monkeypatch.setattr(collect.tqdm, "tqdm", Bar)
    monkeypatch.setattr(collect, "_ROWS_AT_ONCE", 2)
    prepared(RETRIEVAL)
    assert [(bar.total, bar.n) for bar in bars] == [(3, 3)]


@pytest.mark.parametrize("kind", ["stream", "file", "parquet", "json"])
def test_rows_of_every_kind_of_file_are_counted_before_reading(tmp_path, kind):
    table = pa.Table.from_pylist(PAIRS * 4)
    path = tmp_path / {"parquet": "x.parquet", "json": "x.json"}.get(kind, "x.arrow")
    if kind == "parquet":
        pa.parquet.write_table(table, path)
    elif kind == "json":
        path.write_text("\n".join(json.dumps(row) for row in PAIRS * 4))  # no newline at the end
    else:
        new = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=5)
    assert formats.FileRows((path, path)).count() == 24
    path.write_bytes(b"ARROW1 but damaged")
    assert kind == "json" or formats.FileRows((path,)).count() is None


# Plain labels


def test_names_that_no_row_has_are_kept_beyond_the_rows(prepared, tmp_path, tokenizer):
    names = write(tmp_path / "names.json", [["体育", "财经", "国际"]])
    store = prepared(
        [{"text": "球赛", "label": [0, 1]}, {"text": "股市", "label": 1}], label_names=names
    )
    labels = store.columns["labels"]
    assert [len(members_of(labels, row)) for row in (0, 1)] == [2, 1]
    assert texts_of(store, labels.distinct, tokenizer) == ["体育", "财经", "国际"]
    assert members_of(store.columns["other_labels"], 0).tolist() == []


def test_one_label_is_enough_where_others_are_named(prepared, tmp_path):
    names = write(tmp_path / "names.json", [["体育", "财经"]])
    rows = [{"text": "球赛", "label": 0}] * 3
    assert prepared(rows, label_names=names).num_rows == 3
    with pytest.raises(UserError, match="at least two labels"):
        prepared(rows, label_names=write(tmp_path / "names.json", [["体育"]]))


# Decontamination


def test_rows_that_occur_in_evaluation_sets_are_dropped_and_reported(prepared, tmp_path, tokenizer):
    config = Config()
    dev = write(tmp_path / "dev.jsonl", [{"text": "。中国 的首都"}, {"text": "没有"}])
    config.data.decontaminate.paths = (dev,)
    rows = [*RETRIEVAL, {"query": "", "pos": "好"}]
    store = prepared(rows, config=config)
    assert texts_of(store, store.columns["query"], tokenizer) == ["北京的天气", "有雨"]
    assert (store.manifest["rows"], store.manifest["rejected"]) == (2, 1)
    assert store.manifest["dropped"] == {
        "rows": 1,
        "by": [{"evaluation": dev, "field": "text", "rule": "same text", "rows": 1}],
    }
    (name,) = folders(tmp_path)
    (row,) = map(json.loads, (tmp_path / "prepared" / name / "dropped.jsonl").open("rb"))
    assert row == {
        "place": f"{tmp_path / 'rows.jsonl'}:2", "field": "query", "text": "中国的首都",
        "rule": "same text", "overlap": 1.0, "evaluation": f"{dev}:1", "evaluation_field": "text",
    }  # fmt: skip


def test_evaluation_sets_are_part_of_the_fingerprint_and_read_only_if_needed(
    prepared, tmp_path, monkeypatch
):
    config = Config()
    clean = prepared(RETRIEVAL, config=config).manifest
    dev = write(tmp_path / "dev.jsonl", [{"text": "有雨"}])
    config.data.decontaminate.paths = (dev,)
    first = prepared(RETRIEVAL, config=config).manifest
    with monkeypatch.context() as patch:
        patch.setattr(prepare.Decontaminator, "keep", None)
        assert prepared(RETRIEVAL, config=config).manifest == first
    write(tmp_path / "dev.jsonl", [{"text": "有雨"}, {"text": "晴"}])
    second = prepared(RETRIEVAL, config=config).manifest
    assert len({m["fingerprint"] for m in (clean, first, second)}) == 3
    assert [m.get("dropped", {}).get("rows") for m in (clean, first, second)] == [None, 2, 2]


def test_a_dataset_that_is_its_own_evaluation_set_is_an_error(prepared, tmp_path):
    config = Config()
    config.data.decontaminate.paths = (str(tmp_path / "rows.jsonl"),)
    write(tmp_path / "rows.jsonl", RETRIEVAL)
    with pytest.raises(UserError, match="is trained on, but one of its files"):
        prepared(RETRIEVAL, config=config)
    assert folders(tmp_path) == []


@pytest.mark.parametrize("problem", ["one label", "no usable row", "all dropped"])
def test_datasets_that_can_teach_nothing_are_left_out_if_the_config_says_so(
    tmp_path, tokenizer, problem, capsys
):
    bad = {
        "one label": [{"text": "球赛", "text_pos": "体育", "type": "cls_contrast"}],
        "no usable row": [{"query": " ", "pos": "好"}],
        "all dropped": [{"query": "晴", "pos": "好"}],
    }[problem]
    config = Config()
    dev = write(tmp_path / "dev.jsonl", [{"text": "晴"}])
    config.data.decontaminate.paths = (dev,)
    for name, rows in (("a", RETRIEVAL), ("bad", bad)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "meta.txt").write_text("a 1\nbad 3\n")
    config.data.datasets = (DatasetConfig(str(tmp_path / "meta.txt")),)
    with pytest.raises(UnusableDatasetError, match="bad"):
        prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    config.data.skip_unusable = True
    (dataset,) = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    assert (dataset.store.name, dataset.weight) == ("a", 1.0)
    assert f"left out: {tmp_path / 'bad'}: " in capsys.readouterr().err
    prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared", quiet=True)
    assert capsys.readouterr().err == ""
    assert len(folders(tmp_path)) == 1


# Reuse


def test_a_prepared_dataset_is_used_again_without_tokenising(prepared, tmp_path, monkeypatch):
    prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "prepared" / name).iterdir()}
    monkeypatch.setattr(Tokenizer, "encode", None)
    store = prepared(RETRIEVAL, weight=3.0)
    assert folders(tmp_path) == [name]
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert store.num_rows == 3


@pytest.mark.parametrize(
    "change",
    [
        {"query_prompt": "问"}, {"passage_prompt": "问"}, {"query_max_length": 9},
        {"max_length": 100}, {"rows": RETRIEVAL[:2]}, {"rows": RETRIEVAL[::-1]},
        {"task": "classification"}, {"tokenizer": True}, {"schema": 99}, {"limit_of_query": True},
    ],
    ids=str,
)  # fmt: skip
def test_whatever_changes_the_result_changes_the_folder(
    tmp_path, tokenizer, prepared, change, monkeypatch
):
    rows = [{"query": r["query"], "pos": r["pos"], "neg": ["甲", "乙"]} for r in RETRIEVAL]
    first = prepared(rows, task="retrieval")
    config, tasks = Config(), dict(TASKS)
    for field in ("query_max_length", "max_length"):
        setattr(config.data, field, change.get(field, getattr(config.data, field)))
    if "tokenizer" in change:
        folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        (folder / "tokenizer.json").write_text(text.replace('"中"', '"㐀"'), encoding="utf-8")
        tokenizer = Tokenizer(folder)
    if "schema" in change:
        monkeypatch.setattr(prepare, "SCHEMA_VERSION", change["schema"])
    if "limit_of_query" in change:
        query, *others = TASKS["retrieval"].columns
        columns = (dataclasses.replace(query, is_query=False), *others)
        tasks["retrieval"] = dataclasses.replace(TASKS["retrieval"], columns=columns)
    prompts = {field: value for field, value in change.items() if field.endswith("prompt")}
    path = write(tmp_path / "rows.jsonl", change.get("rows", rows))
    config.data.datasets = (DatasetConfig(path, task=change.get("task", "retrieval"), **prompts),)
    (dataset,) = prepare_datasets(config, tokenizer, tasks, tmp_path / "prepared")
    assert dataset.store.manifest["fingerprint"] != first.manifest["fingerprint"]
    assert len(folders(tmp_path)) == 2


def test_a_copy_elsewhere_and_another_dataset_of_the_same_path_share_the_folder(
    tmp_path, tokenizer
):
    (tmp_path / "copy").mkdir()
    paths = [write(tmp_path / "a.jsonl", RETRIEVAL), write(tmp_path / "copy/a.jsonl", RETRIEVAL)]
    config = Config()
    config.data.datasets = tuple(DatasetConfig(p, weight=2.0) for p in [*paths, paths[0]])
    datasets = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    assert [d.weight for d in datasets] == [2, 2, 2]
    assert [d.store.name for d in datasets] == ["a.jsonl[0]", "a.jsonl[1]", "a.jsonl[2]"]
    assert len(folders(tmp_path)) == 1


def test_splits_whose_files_have_the_same_name_are_all_read(tmp_path, tokenizer):
    for split, rows in (("train", RETRIEVAL[:2]), ("test", RETRIEVAL[2:])):
        (tmp_path / "data" / split).mkdir(parents=True)
        rows = [{"query": r["query"], "pos": r["pos"]} for r in rows]
        table = pa.Table.from_pylist(rows)
        name = "data-00000-of-00001.arrow"
        with pa.ipc.new_stream(str(tmp_path / "data" / split / name), table.schema) as writer:
            writer.write_table(table)
        state = {"_data_files": [{"filename": name}]}
        (tmp_path / "data" / split / "state.json").write_text(json.dumps(state))
    (tmp_path / "data" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    config = Config()
    config.data.datasets = (DatasetConfig(f"{tmp_path}/data/."),)
    (dataset,) = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    assert texts_of(dataset.store, dataset.store.columns["query"], tokenizer) == [
        row["query"] for row in RETRIEVAL
    ]
    assert dataset.store.name == "data"


def test_datasets_of_a_meta_list_share_its_weight_by_rows_times_repeats(tmp_path, tokenizer):
    for name, rows in (("a", RETRIEVAL), ("b", PAIRS * 2), ("c", RETRIEVAL)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "rows.jsonl", rows)
    (tmp_path / "meta.txt").write_text("a 1\nb 0.25\n")
    config = Config()
    config.data.datasets = (
        DatasetConfig(str(tmp_path / "meta.txt"), weight=3.0), DatasetConfig(str(tmp_path / "c")),
    )  # fmt: skip
    datasets = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    assert [(d.store.name, d.weight) for d in datasets] == [("a", 4.0), ("b", 2.0), ("c", 1.0)]
