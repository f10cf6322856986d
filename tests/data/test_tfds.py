import json

import pytest

from piccolo_jax import publish
from piccolo_jax.data import tfds_builder
from piccolo_jax.data.formats import Rejected, expand_meta_list, open_source
from piccolo_jax.data.prepare import name_of
from piccolo_jax.errors import UserError

RETRIEVAL = [
    {"query": f"问题{i}", "pos": [f"答{i}", "b"], "neg": ["n"] * (i % 2)} for i in range(7)
]
PAIRS = [{"sentence1": "甲", "sentence2": f"乙{i}", "score": i / 2} for i in range(5)]
LABELLED = [
    {"text": f"球赛{i}", "text_pos": "体育", "text_neg": ["财经"], "type": "cls_contrast"}
    for i in range(3)
]


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def publish_rows(tmp_path, rows, *flags, name="my_pairs", version="1.0.0", split="train"):
    path = write(tmp_path / "rows.jsonl", rows)
    arguments = ["publish", f"--name={name}", f"--version={version}", f"--split={split}={path}"]
    publish.main([*arguments, f"--data_dir={tmp_path / 'tfds'}", *flags])
    return path


@pytest.mark.parametrize("rows", [RETRIEVAL, PAIRS, LABELLED])
def test_what_is_published_is_read_back_in_order(tmp_path, data_dir, rows, monkeypatch):
    monkeypatch.setattr(tfds_builder, "_EXAMPLES_PER_SHARD", 2)
    path = publish_rows(tmp_path, rows)
    original = open_source(str(path))
    source = open_source("tfds:my_pairs:1.0.0:train")
    assert source.task == original.task
    assert list(source) == list(original)
    assert source.rows.count() == len(rows)
    shards = sorted((data_dir / "my_pairs" / "1.0.0").glob("*.array_record*"))
    assert len(shards) == -(-len(rows) // 2)


def test_splits_configs_and_versions_are_named(tmp_path, data_dir):
    publish_rows(tmp_path, RETRIEVAL[:2], "--config=small", version="1.0.0")
    other = write(tmp_path / "other.jsonl", RETRIEVAL)
    publish_rows(tmp_path, RETRIEVAL[:3], f"--split=test={other}", "--config=small",
                 version="1.1.0")  # fmt: skip

    def queries(name):
        return [example.query for example in open_source(name)]

    assert queries("tfds:my_pairs/small:1.0.0:train") == ["问题0", "问题1"]
    assert queries("tfds:my_pairs/small:1.0.0") == ["问题0", "问题1"]  # the only split
    assert queries("tfds:my_pairs/small:train") == ["问题0", "问题1", "问题2"]  # the newest
    assert len(queries("tfds:my_pairs/small:test")) == 7
    assert queries("tfds:my_pairs/small:1.1.0:test[5:]") == ["问题5", "问题6"]
    assert len(queries("tfds:my_pairs/small:train+test")) == 10


def test_the_content_of_a_name_depends_on_data_and_split(tmp_path, data_dir):
    publish_rows(tmp_path, RETRIEVAL)
    publish_rows(tmp_path, RETRIEVAL, name="copy")
    publish_rows(tmp_path, RETRIEVAL[:5], name="other")

    def content(name):
        return [digest for _, digest in open_source(f"tfds:{name}").rows.content()]

    assert content("my_pairs:train") == content("copy:train") == content("copy:1.0.0:train")
    assert content("my_pairs:train") != content("my_pairs:train[:3]")
    assert content("my_pairs:train") != content("other:train")


def test_rows_that_cannot_be_used_are_named_and_not_published(tmp_path, data_dir, capsys):
    path = publish_rows(tmp_path, [*RETRIEVAL, {"query": "", "pos": "x"}])
    out = capsys.readouterr().out
    assert f"rejected {path}:8: query is empty" in out
    assert "tfds:my_pairs:1.0.0:train  7 rows" in out
    assert not [x for x in open_source("tfds:my_pairs:train") if isinstance(x, Rejected)]


def test_label_ids_are_published_as_their_names(tmp_path, data_dir):
    names = tmp_path / "names.json"
    names.write_text('{"0": {"zh": "体育"}, "7": {"zh": "财经"}}', "utf-8")
    rows = [{"text": "a", "label": [7, 0]}, {"text": "b", "label": 0}]
    publish_rows(tmp_path, rows, f"--label_names={names}", "--label_language=zh")
    examples = list(open_source("tfds:my_pairs:1.0.0:train"))
    assert [example.labels for example in examples] == [("财经", "体育"), ("体育",)]


def test_a_version_that_is_there_is_never_changed(tmp_path, data_dir):
    publish_rows(tmp_path, RETRIEVAL)
    files = {p: p.read_bytes() for p in data_dir.rglob("*") if p.is_file()}
    with pytest.raises(UserError, match="is there already; give another --version"):
        publish_rows(tmp_path, PAIRS)
    assert {p: p.read_bytes() for p in data_dir.rglob("*") if p.is_file()} == files


def test_damage_leaves_nothing_that_can_be_read(tmp_path, data_dir):
    rows = [*RETRIEVAL * 20, {"query": "x"}]
    path = write(tmp_path / "rows.jsonl", rows)
    path.write_text(path.read_text() + '{"query"\n')
    arguments = ["publish", "--name=x", "--version=1.0.0", f"--split=train={path}"]
    with pytest.raises(UserError, match=r"rows\.jsonl:142: broken JSON"):
        publish.main([*arguments, f"--data_dir={data_dir}"])
    with pytest.raises(UserError, match="no such dataset"):
        open_source("tfds:x:train")
    assert not list(data_dir.rglob("*.array_record*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"name": "My-Pairs"}, "--name=My-Pairs: must be small letters"),
        ({"version": "1.0"}, "--version=1.0: must be three numbers"),
        ({"split": "train test"}, "--split=train test=.*: must be NAME=PATH"),
    ],
)
def test_flags_that_make_no_name_are_errors(tmp_path, data_dir, flags, message):
    with pytest.raises(UserError, match=message):
        publish_rows(tmp_path, RETRIEVAL, **flags)


def test_splits_of_different_tasks_and_meta_lists_are_errors(tmp_path, data_dir):
    other = write(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(UserError, match=r"different tasks \(retrieval, similarity\)"):
        publish_rows(tmp_path, RETRIEVAL, f"--split=test={other}")
    (tmp_path / "meta.txt").write_text("pairs.jsonl 1\n")
    with pytest.raises(UserError, match="meta list"):
        publish_rows(tmp_path, RETRIEVAL, f"--split=test={tmp_path / 'meta.txt'}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:nothing:train", r"no such dataset in .*tfds.*TFDS_DATA_DIR"),
        ("tfds:my_pairs:2.0.0:train", "no such dataset"),
        ("tfds:my_pairs:dev", "has the splits train, test, not 'dev'"),
        ("tfds:my_pairs", "has the splits train, test; name one"),
        ("tfds:my_pairs:train[:x]", "not 'train"),
        ("tfds:", "write tfds:NAME/CONFIG:SPLIT"),
        ("tfds:a b:train", "write tfds:NAME/CONFIG:SPLIT"),
        ("tfds:mnist:train", "not in .* yet; prepare without --check downloads it"),
    ],
)
def test_a_name_of_nothing_is_an_error_that_says_what_there_is(tmp_path, data_dir, name, message):
    other = write(tmp_path / "other.jsonl", RETRIEVAL)
    publish_rows(tmp_path, RETRIEVAL, f"--split=test={other}")
    with pytest.raises(UserError, match=message):
        open_source(name, download=False)


def test_a_damaged_file_of_a_dataset_is_an_error_that_names_it(tmp_path, data_dir):
    publish_rows(tmp_path, RETRIEVAL)
    (file,) = data_dir.rglob("*.array_record*")
    data = bytearray(file.read_bytes())
    data[data.index("问题0".encode())] ^= 0xFF
    file.write_bytes(data)
    with pytest.raises(UserError, match="tfds:my_pairs:train"):
        list(open_source("tfds:my_pairs:train"))


def test_a_meta_list_may_name_tfds_datasets(tmp_path, data_dir):
    (tmp_path / "meta.txt").write_text("tfds:my_pairs:1.0.0:train 2\n")
    entries = expand_meta_list(str(tmp_path / "meta.txt"))
    assert entries == [("tfds:my_pairs:1.0.0:train", 2.0)]
    assert name_of("tfds:my_pairs/small:train[:10%]") == "tfds-my_pairs-small-train-10-"


def test_tfds_is_read_and_written_without_tensorflow(tmp_path, data_dir, run_python):
    path = write(tmp_path / "rows.jsonl", RETRIEVAL)
    code = (
        "import sys\n"
        "from piccolo_jax.data import formats, prepare\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "from piccolo_jax import publish\n"
        f"publish.main(['publish', '--name=a', '--version=1.0.0', '--split=train={path}',"
        f" '--data_dir={data_dir}'])\n"
        "print(len(list(formats.open_source('tfds:a:train'))), 'tensorflow' in sys.modules)"
    )
    done = run_python("-c", code, env={"TFDS_DATA_DIR": str(data_dir)})
    assert done.stdout.splitlines()[-1] == "7 False"
