import dataclasses
import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import collect, formats, partial, prepare
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.store import Store
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UnusableDatasetError, UserError
from piccolo_jax.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "configs" / "quickstart_data" / "tokenizer"

RETRIEVAL = [
    {"query": "北京的天气", "pos": ["天气好", "有雨"], "neg": ["中国地图"]},
    {"query": "中国的首都", "pos": ["北京"], "neg": []},
    {"query": "有雨", "pos": ["天气好"]},
]
PAIRS = [{"sentence1": "天气好", "sentence2": "有雨", "score": s} for s in (0.5, -1, 3)]
LABELLED = [
    {"text": "球赛", "text_pos": "体育", "text_neg": ["财经"], "type": "cls_contrast"},
    {"text": "股市", "text_pos": "财经", "text_neg": [], "type": "cls_contrast"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(TOKENIZER)


@pytest.fixture
def prepared(tmp_path, tokenizer):
    """prepared(rows, **fields of DatasetConfig) -> Store, in tmp_path / "prepared"."""

    def run(rows, name="rows.jsonl", config=None, **fields):
        path = write(tmp_path / name, rows)
        config = config or Config()
        config.data.datasets = (DatasetConfig(path, **fields),)
        (dataset,) = prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
        return dataset.store

    return run


def write(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def folders(tmp_path):
    """Names of everything below tmp_path / "prepared"."""
    root = tmp_path / "prepared"
    return sorted(p.name for p in root.iterdir()) if root.exists() else []


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


# What can't be used, or breaks off


def test_a_file_without_a_usable_row_is_an_error_that_names_the_first(prepared, tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl: no usable row .* 2 rejected; .*:1: query"):
        prepared([{"query": " ", "pos": "好"}, {"query": "天", "pos": []}])
    assert folders(tmp_path) == []


def test_a_single_label_is_an_error(prepared, tmp_path):
    rows = [{"text": "球赛", "text_pos": "体育", "type": "cls_contrast"}] * 3
    with pytest.raises(UserError, match="at least two labels"):
        prepared(rows)
    # Labels that the tokenizer doesn't tell apart are one.
    with pytest.raises(UserError, match="at least two labels"):
        prepared([*rows, {**rows[0], "text_pos": "体 育"}])
    assert folders(tmp_path) == []
    assert prepared(LABELLED[:1]).num_rows == 1  # one label, but it lists another


def test_a_broken_line_leaves_nothing_and_what_was_finished_before_stays(
    tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr(collect, "_ROWS_AT_ONCE", 16)
    config = Config()
    config.data.datasets = (
        DatasetConfig(write(tmp_path / "good.jsonl", RETRIEVAL)),
        DatasetConfig(write(tmp_path / "bad.jsonl", [*RETRIEVAL * 50, '{"query": "天"'])),
    )
    with pytest.raises(UserError, match=r"bad\.jsonl:151: broken JSON"):
        prepare_datasets(config, tokenizer, TASKS, tmp_path / "prepared")
    (name,) = folders(tmp_path)
    assert name.startswith("good.jsonl-")


@pytest.mark.parametrize("method", ["write", "close", "save", "mkdir"])
def test_a_full_disk_is_an_error_that_leaves_nothing(prepared, tmp_path, monkeypatch, method):
    def fail(*_, **__):
        raise kind("No space left on device")

    kind = RuntimeError if method in ("write", "close") else OSError
    if method == "save":
        monkeypatch.setattr(np, "save", fail)
    elif method == "mkdir":
        monkeypatch.setattr(Path, "mkdir", fail)
    else:
        writer = type("Writer", (), {"__init__": lambda *_: None, "write": lambda *_: None,
                                     "close": lambda *_: None, method: fail})  # fmt: skip
        monkeypatch.setattr(prepare, "ArrayRecordWriter", writer)
    with pytest.raises(UserError, match=r"prepared: .*No space left on device.*prepared_dir"):
        prepared(RETRIEVAL)
    assert folders(tmp_path) == []


def test_a_limit_on_file_sizes_is_an_error_that_leaves_nothing(prepared, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    rows = [{"query": "天气", "pos": f"{i}" * 50} for i in range(4000)]
    write(tmp_path / "rows.jsonl", [])
    try:
        path = write(tmp_path / "rows.jsonl", rows)
        assert os.path.getsize(path) > 2**18
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        with pytest.raises(UserError, match="File too large"):
            prepare_datasets(
                Config(data=dataclasses.replace(Config().data, datasets=(DatasetConfig(path),))),
                Tokenizer(TOKENIZER), TASKS, tmp_path / "prepared",
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert folders(tmp_path) == []


def test_a_file_in_the_place_of_the_folder_is_an_error(prepared, tmp_path):
    (tmp_path / "prepared").write_text("")
    with pytest.raises(UserError, match=r"prepared: the prepared form of .* can't be written"):
        prepared(RETRIEVAL)


def test_a_second_process_that_is_faster_wins_and_both_read_the_same(
    prepared, tmp_path, monkeypatch
):
    rename = os.rename

    def rename_late(source, target):
        monkeypatch.setattr(os, "rename", rename)
        other = prepared(RETRIEVAL)  # begins after us and is ready before
        assert len(folders(tmp_path)) == 2
        assert other.num_rows == 3
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_late)
    store = prepared(RETRIEVAL)
    assert store.columns["query"].tolist() == prepared(RETRIEVAL).columns["query"].tolist()
    assert len(folders(tmp_path)) == 1


_SLOW = """
import sys, time
from pathlib import Path
from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import prepare, tokenizer
from piccolo_jax.tasks import TASKS
path, folder, root = sys.argv[1:]
config = Config()
config.data.datasets = (DatasetConfig(path),)
def wait(*arguments):
    print("waiting", flush=True)
    time.sleep(100)
prepare.check_labels = wait
prepare.prepare_datasets(config, tokenizer.Tokenizer(folder), TASKS, Path(root))
"""


def test_what_another_process_writes_is_left_alone_and_what_it_leaves_when_killed_is_removed(
    prepared, tmp_path
):
    path = write(tmp_path / "other.jsonl", RETRIEVAL)
    command = [sys.executable, "-c", _SLOW, path, TOKENIZER, tmp_path / "prepared"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, env=env) as process:
        assert process.stdout.readline() == b"waiting\n"
        (others,) = folders(tmp_path)
        assert "partial" in others
        prepared(RETRIEVAL[:2])
        assert others in folders(tmp_path)
        process.kill()
    assert others in folders(tmp_path)
    store = prepared(RETRIEVAL, name="other.jsonl")
    assert store.num_rows == 3
    assert [name for name in folders(tmp_path) if "partial" in name] == []


def test_what_another_machine_left_is_removed_after_days_only(prepared, tmp_path):
    for name in ("a-1.partial-0000beef-1", "b-2.partial-0000beef-2", "b-3.partial-old"):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        (tmp_path / "prepared" / name / partial._LOCK).touch()
    long_ago = time.time() - partial._FOREIGN_SECONDS - 60
    for name in ("b-2.partial-0000beef-2", "b-3.partial-old"):
        for path in (*(tmp_path / "prepared" / name).iterdir(), tmp_path / "prepared" / name):
            os.utime(path, (long_ago, long_ago))
    prepared(RETRIEVAL)
    assert [n for n in folders(tmp_path) if "partial" in n] == ["a-1.partial-0000beef-1"]


def test_a_file_system_without_locks_can_be_prepared_on_and_nothing_is_taken_for_abandoned(
    prepared, tmp_path, monkeypatch
):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(partial.fcntl, "flock", fail)
    with partial.written_whole(tmp_path / "prepared" / "x") as folder:
        assert prepared(RETRIEVAL).num_rows == 3
        assert folder.exists()
    assert (tmp_path / "prepared" / "x").exists()
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("size", [0, 5, 100, 0.5, 0.999])
@pytest.mark.parametrize(
    "file", ["manifest.json", "texts.array_record", "lengths.npy", "query.npy",
             "positives.values.npy", "positives.offsets.npy"],
)  # fmt: skip
def test_a_file_cut_short_is_an_error_that_names_the_folder(prepared, tmp_path, file, size):
    prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    path = tmp_path / "prepared" / name / file
    data = path.read_bytes()
    path.write_bytes(data[: size if isinstance(size, int) else int(size * len(data))])
    with pytest.raises(UserError, match=f"{name}: not a complete prepared dataset .* delete it"):
        prepared(RETRIEVAL)


@pytest.mark.parametrize("manifest", ["[]", "{}", "null", '{"columns": [], "name": "x"}'])
def test_a_foreign_manifest_is_an_error(prepared, tmp_path, manifest):
    prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    (tmp_path / "prepared" / name / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="not a complete prepared dataset"):
        prepared(RETRIEVAL)


def test_a_missing_manifest_is_an_error_before_anything_is_prepared(
    prepared, tmp_path, monkeypatch
):
    prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    (tmp_path / "prepared" / name / "manifest.json").unlink()
    monkeypatch.setattr(Tokenizer, "encode", None)
    with pytest.raises(UserError, match="not a complete prepared dataset"):
        prepared(RETRIEVAL)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("query", "2 rows in query, 3 in manifest"),
        ("positives.offsets", "1 rows in positives, 3 in manifest"),
        ("lengths", "6 texts, 2 lengths"),
    ],
)
def test_files_that_contradict_each_other_are_an_error(prepared, tmp_path, file, message):
    prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    np.save(tmp_path / "prepared" / name / f"{file}.npy", np.zeros(2, np.int32))
    with pytest.raises(UserError, match=message):
        prepared(RETRIEVAL)


def test_damage_found_when_texts_are_read_is_an_error_too(prepared, tmp_path):
    store = prepared(RETRIEVAL)
    (name,) = folders(tmp_path)
    path = tmp_path / "prepared" / name / "texts.array_record"
    data = bytearray(path.read_bytes())
    place = data.index(store.tokens([2])[0].tobytes())
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="not a complete prepared dataset"):
        Store(path.parent).tokens([0, 1, 2])


# Tokenizer


def test_encoding_says_what_was_cut_and_leaves_the_tokenizer_as_it_was(tokenizer):
    before = tokenizer.hf.backend_tokenizer.to_str()
    ids, cut = tokenizer.encode(["天气", "天" * 30, "天" * 6], 8)
    assert [len(i) for i in ids] == [4, 8, 8]
    assert cut == [False, True, False]
    assert all(i.dtype == np.int32 for i in ids)
    assert tokenizer.hf.backend_tokenizer.to_str() == before


def test_encoding_equals_that_of_transformers(tokenizer):
    texts = ["北京的天气，今天 23 度!", "Hello World", "㐀", "[SEP] 天"]
    expected = tokenizer.hf(texts, truncation=True, max_length=7)["input_ids"]
    assert [i.tolist() for i in tokenizer.encode(texts, 7)[0]] == expected


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": "1.0", "added_tokens": [], "model": {}}']
)
def test_a_broken_tokenizer_is_an_error(tmp_path, content):
    folder = shutil.copytree(TOKENIZER, tmp_path / "tokenizer")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="no tokenizer can be loaded from here"):
        Tokenizer(folder)


def test_a_missing_tokenizer_is_an_error(tmp_path):
    for path in (tmp_path, tmp_path / "none", ""):
        with pytest.raises(UserError, match="no tokenizer can be loaded from here"):
            Tokenizer(path)


def test_a_model_folder_without_its_tokenizer_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds no tokenizer .*name a directory .*tokenizer"):
        Tokenizer(tmp_path)
