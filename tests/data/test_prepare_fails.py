import dataclasses
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from preparing import LABELLED, RETRIEVAL, ROOT, TOKENIZER, folders, write

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import collect, partial, prepare
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.data.store import Store
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.tasks import TASKS


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


def test_rows_that_all_have_every_label_are_an_error(prepared):
    rows = [{"text": f"球赛{i}", "labels": ["体育", "财经"]} for i in range(3)]
    with pytest.raises(UserError, match="all 3 rows have the same 2 labels and list no other"):
        prepared(rows)
    assert prepared([*rows, {"text": "股市", "labels": ["财经"]}]).num_rows == 4


@pytest.mark.parametrize(("limit", "fits"), [(8, False), (9, True)])
def test_a_prompt_that_leaves_no_token_to_texts_is_an_error(prepared, tmp_path, limit, fits):
    config = Config()
    config.data.query_max_length = limit
    rows = [{"query": text, "pos": "好"} for text in ("天", "地")]
    if fits:
        store = prepared(rows, config=config, query_prompt="为这个问题:")
        assert store.lengths.max() == limit
        return
    with pytest.raises(UserError, match=r"query_prompt .* fills all 8 tokens .*query_max_length"):
        prepared(rows, config=config, query_prompt="为这个问题:")
    assert folders(tmp_path) == []


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
