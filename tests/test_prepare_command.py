import json
from pathlib import Path

import pytest

from piccolo_jax import prepare
from piccolo_jax.errors import UserError

DATA = Path(__file__).resolve().parents[1] / "configs" / "quickstart_data"
CONFIG = """
from piccolo_jax.config import Config, DatasetConfig


def get_config():
    config = Config(batch_size=2)
    config.model.tokenizer = {tokenizer!r}
    config.model.hidden_size, config.model.num_heads = 8, 2
    config.model.embed_dim, config.loss.dims = 0, (8,)
    config.model.vocab_size = 2585
    config.data.datasets = tuple(map(DatasetConfig, {paths!r}))
    return config
"""
ROWS = [{"query": f"天气{i}", "pos": "好", "neg": ["雨"]} for i in range(6)]


@pytest.fixture
def run(tmp_path, capsys):
    """run(files by name, *flags) -> what it printed."""

    def run(files, *flags, paths=None):
        for name, rows in files.items():
            lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
            (tmp_path / name).write_text("".join(line + "\n" for line in lines))
        paths = [str(tmp_path / name) for name in paths or files]
        config = tmp_path / "config.py"
        config.write_text(CONFIG.format(tokenizer=str(DATA / "tokenizer"), paths=paths))
        capsys.readouterr()
        prepare.main(["prepare", f"--config={config}", *flags])
        return capsys.readouterr().out

    return run


def everything(folder):
    return sorted(str(path) for path in folder.rglob("*"))


def test_check_reports_every_dataset_and_writes_nothing(run, tmp_path):
    files = {"a.jsonl": [*ROWS, {"query": "", "pos": "x"}], "b.jsonl": ROWS[:3]}
    run(files, "--check")
    before = everything(tmp_path)
    out = run(files, "--check", f"--workdir={tmp_path / 'work'}")
    assert everything(tmp_path) == before
    assert f"== a.jsonl: {tmp_path / 'a.jsonl'}" in out
    assert f"  {tmp_path / 'a.jsonl'}:7: query is empty" in out
    assert "batch      2 rows of data: " in out
    assert "% filled" in out
    assert out.count("texts per second") == 2
    *_, last, _ = out.split("\n")
    assert last.split()[:7] == ["b.jsonl", "retrieval", "3", "0", "9", "5", "4.2"]


def test_check_plans_batches_for_the_mesh_of_the_config(run):
    out = run({"a.jsonl": ROWS}, "--check", "--config.mesh.data=2")
    assert "on each of 2 devices" in out
    out = run({"a.jsonl": ROWS}, "--check", "--config.mesh.fsdp=3", "--config.batch_size=6")
    assert "on each of 3 devices" in out


def test_check_plans_a_smaller_batch_or_says_why_there_is_none(run):
    out = run({"a.jsonl": ROWS}, "--check", "--config.batch_size=7")
    assert "batch      6 rows of data" in out
    out = run({"a.jsonl": ROWS}, "--check", "--config.train.micro_batches=1000")
    assert "batch      none: config.train.micro_batches = 1000" in out


def test_check_plans_the_batch_that_the_dataset_will_have(run):
    own = ["--check", "--config.batch_size=5", "--config.data.datasets[0].batch_size=3"]
    assert "batch      3 rows of data" in run({"a.jsonl": ROWS}, *own)
    capped = ["--check", "--config.batch_size=5", "--config.data.datasets[0].max_rows=4"]
    assert "batch      4 rows of data" in run({"a.jsonl": ROWS}, *capped)
    assert "batch      none: dataset a.jsonl has only 1 usable" in run(
        {"a.jsonl": ROWS[:1]}, "--check"
    )


def test_check_says_what_training_leaves_out_and_goes_on_after_a_broken_meta_list(run, capsys):
    alike = [{"text": f"天气{i}", "label": "好"} for i in range(3)]
    out = run({"a.jsonl": alike}, "--check", "--config.data.skip_unusable=True")
    assert "left out: " in out
    with pytest.raises(UserError, match=r"meta\.txt:1: "):
        run({"meta.txt": ["?"], "b.jsonl": ROWS}, "--check")
    assert "b.jsonl  retrieval" in capsys.readouterr().out


def test_check_reads_each_dataset_of_a_meta_list(run, tmp_path):
    files = {"a.jsonl": ROWS, "b.jsonl": ROWS[:3], "meta.txt": ["a.jsonl 1", "b.jsonl 2"]}
    out = run(files, "--check", paths=["meta.txt"])
    assert f"== a.jsonl: {tmp_path / 'a.jsonl'}" in out
    assert f"== b.jsonl: {tmp_path / 'b.jsonl'}" in out


def test_check_goes_on_after_what_would_stop_preparing_and_then_fails(run, tmp_path, capsys):
    files = {"a.jsonl": [ROWS[0], '{"query"', ROWS[1]], "b.jsonl": [], "c.jsonl": ROWS}
    with pytest.raises(UserError) as error:
        run(files, "--check")
    out = capsys.readouterr().out
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}:2: broken JSON")
    assert "\n2 problems as this would stop preparing" in str(error.value)
    assert f"error: {tmp_path / 'b.jsonl'}: holds no rows" in out
    assert "rows       2 usable, 1 rejected" in out
    assert "== c.jsonl" in out
    with pytest.raises(UserError, match=r"a\.jsonl:2: broken JSON"):
        run(files, f"--workdir={tmp_path / 'work'}")


def test_the_picture_is_written_where_it_is_named_and_replaced_when_told(run, tmp_path):
    picture = tmp_path / "lengths.png"
    out = run({"a.jsonl": ROWS}, "--check", f"--histogram={picture}")
    assert f"token lengths: {picture}" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="--overwrite replaces it"):
        run({"a.jsonl": ROWS}, "--check", f"--histogram={picture}")
    picture.write_bytes(b"")
    run({"a.jsonl": ROWS}, "--check", f"--histogram={picture}", "--overwrite")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--check", "--histogram=lengths.jpg"], "must be a file that ends in .png"),
        (["--check", "--histogram=/nowhere/a.png"], "the folder does not exist"),
        (["--histogram=a.png", "--workdir=x"], "--histogram goes with --check"),
        ([], "--workdir is missing"),
    ],
)
def test_flags_that_make_no_sense_are_errors(run, flags, message):
    with pytest.raises(UserError, match=message):
        run({"a.jsonl": ROWS}, *flags)


def test_preparing_prints_what_was_prepared_and_rejected(run, tmp_path):
    files = {"a.jsonl": [*ROWS, {"query": "", "pos": "x"}]}
    out = run(files, f"--workdir={tmp_path / 'work'}")
    assert f"rejected {tmp_path / 'a.jsonl'}:7: query is empty" in out
    (folder,) = (tmp_path / "work" / "prepared").iterdir()
    assert folder.name in out
