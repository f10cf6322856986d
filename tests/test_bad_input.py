"""What a user can do wrong ends with exit code 2 and one message that names place and remedy."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
from safetensors.numpy import save_file
from small import one_error, run_command, snapshot

from piccolo_jax import build, export, prepare, train


@pytest.fixture
def files(tmp_path):
    (tmp_path / "files").mkdir()
    return small.write_training_files(tmp_path / "files")


@pytest.fixture
def refused(files, tmp_path, capsys):
    """refused(*flags): the message with which training is refused before anything is learnt."""

    def refused(*flags, command=train.main, workdir=tmp_path / "run"):
        config = f"--config={files / 'tiny.py'}"
        assert run_command(command, config, f"--workdir={workdir}", *flags) == 2
        message = one_error(capsys)
        left = snapshot(tmp_path / "run") if (tmp_path / "run").is_dir() else {}
        assert not [name for name in left if not name.startswith("prepared/")]
        assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]
        return message

    return refused


def set_lines(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def test_as_a_command_it_is_one_line_on_standard_error(files, tmp_path, run_python):
    flags = (f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    done = run_python("-m", "piccolo_jax.train", *flags, "--config.optim.lr=1", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: config.optim.lr: unknown config field 'lr': config.optim")
    assert done.stderr.count("\n") == 1
    lines = (files / "similarity.jsonl").read_text("utf-8").splitlines()
    set_lines(files / "similarity.jsonl", *lines[:6], lines[6][:-5], *lines[7:])
    done = run_python("-m", "piccolo_jax.prepare", *flags, check=False)
    assert done.returncode == 2
    place = f"error: {files / 'similarity.jsonl'}:7: broken JSON ("
    assert done.stderr.splitlines()[-1].startswith(place)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", [train.main, prepare.main])
def test_broken_json_is_named_by_file_and_line(refused, files, command):
    lines = (files / "similarity.jsonl").read_text("utf-8").splitlines()
    set_lines(files / "similarity.jsonl", *lines[:6], lines[6][:-5], *lines[7:])
    message = refused(command=command)
    assert message.startswith(f"{files / 'similarity.jsonl'}:7: broken JSON (")
    assert "mend or delete the line" in message


def test_a_missing_data_file(refused, files):
    (files / "similarity.jsonl").unlink()
    assert (
        refused() == f"{files / 'similarity.jsonl'}: no such file or directory; correct the path\n"
    )


def test_a_corrected_path_goes_on_in_the_same_workdir(refused, files, tmp_path, capsys):
    path = f"--config.data.datasets[1].path={files / 'none.jsonl'}"
    assert "none.jsonl: no such file" in refused(path)
    command = (prepare.main, f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    assert run_command(*command) == 0


def test_columns_of_the_wrong_type(refused, files):
    rows = [{"text": i, "text_pair": "b", "label": 1, "type": "cosent"} for i in range(5)]
    set_lines(files / "similarity.jsonl", *rows)
    message = refused()
    for part in (
        "similarity.jsonl: no usable row",
        "5 rejected",
        "similarity.jsonl:1: text is int",
    ):
        assert part in message


def test_labels_that_are_all_one(refused, files):
    row = {"text": "a", "text_pos": "体育", "text_neg": [], "type": "cls_contrast"}
    set_lines(files / "classification.jsonl", *[row | {"text": f"a{i}"} for i in range(8)])
    message = refused()
    assert "classification.jsonl: all 8 rows have the same label" in message
    assert "at least two labels" in message


def test_columns_that_leave_the_task_open(refused, files):
    set_lines(files / "similarity.jsonl", *[{"text": "a", "text_pos": "b", "text_neg": []}] * 8)
    assert 'write task="retrieval" or task="classification"' in refused()


def test_numbers_as_labels_without_names(refused, files):
    set_lines(files / "classification.jsonl", *[{"text": f"a{i}", "label": i} for i in range(8)])
    message = refused()
    assert "classification.jsonl:1: label is a number; name the labels" in message
    names = f"--config.data.datasets[2].label_names={files / 'none.json'}"
    assert f"{files / 'none.json'}: no readable file of label names" in refused(names)


def test_scores_that_are_all_one(refused, files):
    set_lines(
        files / "similarity.jsonl",
        *[{"text": f"a{i}", "text_pair": "b", "label": 1, "type": "cosent"} for i in range(8)],
    )
    message = refused()
    assert "dataset similarity.jsonl: all 8 rows have the score 1" in message
    assert "data.skip_unusable" in message


@pytest.mark.parametrize("command", [train.main, prepare.main])
def test_an_evaluation_set_that_is_not_there(refused, files, command):
    message = refused(
        f"--config.data.decontaminate.paths=('{files / 'no.jsonl'}',)", command=command
    )
    assert message.startswith(f"{files / 'no.jsonl'}: no such evaluation set")


def test_a_batch_larger_than_every_dataset(refused):
    message = refused("--config.batch_size=21")
    assert message.startswith("config.batch_size = 21: dataset retrieval.jsonl has only 20")
    assert "at most 20" in message


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--config.loss.dims=(16,49)"], ("config.loss.dims = (16, 49)", "49", "48 wide")),
        (["--config.loss.dims=(48,)", "--config.model.embed_dim=0"], ("48 is longer", "32 wide")),
        (["--config.eval.dims=(64,)"], ("config.eval.dims = (64,)", "48 wide")),
        (["--config.loss.dims=(48,16)"], ("config.loss.dims = (48, 16)", "increasing")),
        (["--config.optim.learning_rate=nan"], ("config.optim.learning_rate", "finite")),
        (["--config.data.max_length=33"], ("config.data.max_length = 33", "max_positions = 32")),
        (["--config.mesh.data=3"], ("config.mesh.data = 3", "number of devices")),
        (["--config.model.vocab_size=100"], ("config.model.tokenizer", "2585 token ids", "100")),
        (["--config.model.tokenizer=no/such"], ("no/such", "no tokenizer")),
        (["--config.model.init=no/such"], ("'no/such'", "not a directory", "model.safetensors")),
        (["--config.eval.datasets[0].path=no/dev.jsonl"], ("no/dev.jsonl: no such file",)),
    ],
)
def test_a_config_that_cannot_work(refused, tmp_path, flags, parts):
    message = refused(*flags)
    for part in parts:
        assert part in message
    assert not (tmp_path / "run" / "prepared").exists()


def test_a_broken_evaluation_set_is_found_before_training(refused, files, tmp_path):
    set_lines(files / "dev.jsonl", {"text": "a", "text_pair": "b", "label": 1}, "{")
    message = refused(f"--config.eval.datasets[0].path={files / 'dev.jsonl'}")
    assert message.startswith(f"{files / 'dev.jsonl'}:2: broken JSON")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = small.config(embed_dim=30)
    parts = build.build(config)
    path = tmp_path_factory.mktemp("model") / "init"
    export.write(path, small.params(parts), parts, config)
    return path


@pytest.fixture
def init(model, tmp_path):
    """A model directory 24 wide, with a scaling layer to 30."""
    return Path(shutil.copytree(model, tmp_path / "init"))


def test_a_prefix_longer_than_the_model_that_is_started_from(refused, init):
    flags = (
        f"--config.model.init={init}",
        "--config.model.tokenizer=",
        "--config.model.embed_dim=0",
    )
    message = refused(*flags)
    assert "config.loss.dims = (16, 48): prefix 48 is longer than the embedding, 24 wide" in message


def test_a_scaling_layer_of_another_width_than_the_model_s(refused, init):
    message = refused(f"--config.model.init={init}", "--config.model.tokenizer=")
    assert "config.model.embed_dim = 48, but" in message
    assert "2_Dense/config.json has out_features = 30" in message


def test_weights_that_are_not_safetensors(refused, init):
    shutil.rmtree(init / "2_Dense")
    (init / "model.safetensors").rename(init / "pytorch_model.bin")
    (init / "modules.json").unlink()
    message = refused(f"--config.model.init={init}", "--config.model.tokenizer=")
    assert message.startswith(f"{init / 'pytorch_model.bin'}: only safetensors weights are read")
    assert "save_pretrained()" in message


def test_weights_of_another_model_than_its_config(refused, init, tmp_path):
    shutil.rmtree(init / "2_Dense")
    (init / "modules.json").unlink()
    save_file({"embeddings.word_embeddings.weight": np.zeros((3, 4))}, init / "model.safetensors")
    message = refused(f"--config.model.init={init}", "--config.model.tokenizer=")
    assert f"{init / 'model.safetensors'}: " in message
    assert not (tmp_path / "run" / "prepared").exists()  # which can take hours


@pytest.mark.parametrize("below", ["", "below"])
def test_a_workdir_that_is_a_file(refused, tmp_path, below):
    (tmp_path / "file").write_text("mine")
    message = refused(workdir=tmp_path / "file" / below)
    assert message.startswith(f"--workdir={tmp_path / 'file' / below}: can't be used (")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_for_prepared_data_that_is_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert f"{tmp_path / 'file'}" in refused(f"--config.data.prepared_dir={tmp_path / 'file'}")


def test_a_config_json_that_is_not_one(refused, tmp_path, files, capsys):
    (tmp_path / "run" / "export").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text('{"seed": ')
    flags = (f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'run'}")
    assert run_command(train.main, *flags) == 2
    assert one_error(capsys).startswith(f"{tmp_path / 'run' / 'config.json'}: config = ")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("config.json", '{"model_type": "bert"}', ("config.json: config.model_type = 'bert'",)),
        ("config.json", "[]", ("config.json: config = ",)),
        ("metrics.jsonl", '{"loss": 1}', ("has metrics.jsonl but no config.json",)),
        ("export/mine.txt", "mine", ("has export but no config.json",)),
    ],
)
def test_a_folder_that_is_no_run_s_is_left_as_it_is(files, tmp_path, capsys, name, content, parts):
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text(content)
    flags = (f"--config={files / 'tiny.py'}", f"--workdir={tmp_path / 'mine'}")
    assert run_command(train.main, *flags) == 2
    message = one_error(capsys)
    for part in (*parts, "give another"):
        assert part in message
    assert snapshot(tmp_path / "mine") == {name: content.encode()}


def test_a_disk_without_room(refused, monkeypatch):
    def write_text(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_text", write_text)
    message = refused()
    assert "No space left on device" in message
    assert "room" in message
