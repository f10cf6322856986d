import json
import shutil
import sys

import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file
from small import run_command

from piccolo_jax import build, export, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with a checkpoint and its export."""
    workdir = tmp_path_factory.mktemp("run")
    config = small.config(embed_dim=30)
    parts = build.build(config)
    params = small.params(parts)
    small.save_run(workdir, config, parts, params)
    export.write(workdir / "export", params, parts, config)
    return workdir


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "export")
    return tmp_path / "export"


def edit(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def flip_pooling(directory):
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(directory / "1_Pooling" / "config.json", lambda values: values.update(flags))


def remove_activation(directory):
    edit(directory / "2_Dense" / "config.json", lambda values: values.pop("activation_function"))


def remove_scaling_layer(directory):
    edit(directory / "modules.json", lambda modules: modules.pop())


def perturb_a_weight(directory):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    name = "encoder.layer.1.output.dense.weight"
    tensors[name] = tensors[name] + np.float32(0.05) * np.sign(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def swap_the_tokenizer(directory):
    def reverse(values):
        words = [word for word in values["model"]["vocab"] if not word.startswith("[")]
        ids = sorted((values["model"]["vocab"][word] for word in words), reverse=True)
        values["model"]["vocab"].update(zip(words, ids, strict=True))

    edit(directory / "tokenizer.json", reverse)
    (directory / "vocab.txt").unlink()


def cut_texts_shorter(directory):
    edit(directory / "sentence_bert_config.json", lambda values: values.update(max_seq_length=16))


def test_a_faithful_export_passes_at_every_trained_prefix(run, run_python):
    done = run_python("-m", "piccolo_jax.verify", run / "export", f"--workdir={run}")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["prefix", "8", "20", "24", "same"]
    assert all(float(line.split()[1]) < 1e-6 for line in lines[1:4])
    assert done.stderr == ""  # sentence-transformers reports no missing weights


def test_one_prefix_that_differs_is_enough(run, copied, capsys):
    path = copied / "2_Dense" / "model.safetensors"
    tensors = load_file(path)
    tensors["linear.bias"][29] += 5
    save_file(tensors, path, metadata={"format": "pt"})
    assert run_command(verify.main, copied, f"--workdir={run}", "--dims=8,30") == 1
    first, second, *_ = capsys.readouterr().out.splitlines()[1:]
    assert first.split()[0] == "8"
    assert float(first.split()[1]) < 1e-6
    assert float(second.split()[1]) > 1e-3


def test_without_the_workdir_both_sides_read_the_export(run, copied, capsys):
    assert run_command(verify.main, copied, "--dims=5,30") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["prefix", "5", "30", "same"]
    flip_pooling(copied)
    assert run_command(verify.main, copied) == 0


@pytest.mark.parametrize(
    "mutate",
    [
        flip_pooling,
        remove_activation,
        perturb_a_weight,
        swap_the_tokenizer,
        cut_texts_shorter,
        remove_scaling_layer,
    ],
)
def test_an_export_that_is_not_what_was_trained_is_exit_code_1(run, copied, capsys, mutate):
    mutate(copied)
    assert run_command(verify.main, copied, f"--workdir={run}") == 1
    out = capsys.readouterr().out
    assert "gives 24 dimensions, JAX 30" in out or "different: more than 0.0001" in out


def test_what_the_export_itself_must_not_say_is_an_error_that_names_it(copied, capsys):
    remove_activation(copied)
    assert run_command(verify.main, copied) == 2
    assert "2_Dense/config.json: activation_function" in capsys.readouterr().err


def test_an_export_that_names_no_prefixes_is_checked_at_eighths(copied):
    assert verify._trained_dims(copied, 30) == [8, 20, 24]
    edit(copied / "config_sentence_transformers.json", lambda v: v.pop("matryoshka_dims"))
    assert verify._trained_dims(copied, 30) == [3, 7, 11, 15, 18, 22, 26, 30]
    assert verify._trained_dims(copied, 2) == [1, 2]


@pytest.mark.parametrize("dims", ["0", "31", "8,31", "x", "8,,9"])
def test_prefixes_that_do_not_exist_are_an_error(run, capsys, dims):
    assert run_command(verify.main, run / "export", f"--dims={dims}") == 2
    assert f"--dims={dims}: " in capsys.readouterr().err


def test_missing_places_are_errors_that_name_them(run, tmp_path, capsys):
    for arguments, place in (
        ([tmp_path / "none"], "none/config.json"),
        ([run / "export", f"--workdir={tmp_path}"], "checkpoints"),
        ([tmp_path / "none", f"--workdir={run}"], "none"),
    ):
        assert run_command(verify.main, *arguments) == 2
        assert place in capsys.readouterr().err.split(": ")[1]


def test_a_broken_tokenizer_is_an_error(run, copied, capsys):
    (copied / "tokenizer.json").write_text("{")
    (copied / "vocab.txt").unlink()
    for flags in ([], [f"--workdir={run}"]):
        assert run_command(verify.main, copied, *flags) == 2
        assert str(copied) in capsys.readouterr().err


def test_without_sentence_transformers_it_says_how_to_install_it(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert run_command(verify.main, run / "export") == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
