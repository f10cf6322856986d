import json
import shutil
import sys

import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file
from small import run_command

from piccolo_jax import build, export, verify
from piccolo_jax.exporting.layout import Options
from piccolo_jax.verifying import served

pytestmark = pytest.mark.usefixtures("quick_compiling")
POSITIONS = "embeddings.position_embeddings.weight"


def make_run(workdir, seed=0):
    """A workdir with a checkpoint and its export, with prompts and an ONNX file."""
    config = small.config(embed_dim=30)
    parts = build.build(config)
    params = small.params(parts)
    if seed:
        rng = np.random.default_rng(seed)
        params["scaling"]["bias"] = params["scaling"]["bias"] + rng.normal(size=30)
    small.save_run(workdir, config, parts, params)
    export.write(workdir / "export", params, parts, config, options=Options(onnx_dim=20))
    return workdir


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def copied(run, tmp_path):
    shutil.copytree(run / "export", tmp_path / "export")
    return tmp_path / "export"


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def edit(path, change):
    values = read(path)
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def change_tensor(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name])
    save_file(tensors, path, metadata={"format": "pt"})


def flip_pooling(directory):
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(directory / "1_Pooling" / "config.json", lambda values: values.update(flags))


def name_no_pooling(directory):
    flags = {"pooling_mode_mean_tokens": False}
    edit(directory / "1_Pooling" / "config.json", lambda values: values.update(flags))


def pool_twice(directory):
    flags = {"pooling_mode_cls_token": True}
    edit(directory / "1_Pooling" / "config.json", lambda values: values.update(flags))


def leave_out_prompts(directory):
    edit(directory / "1_Pooling" / "config.json", lambda v: v.update(include_prompt=False))


def remove_activation(directory):
    edit(directory / "2_Dense" / "config.json", lambda values: values.pop("activation_function"))


def remove_scaling_layer(directory):
    edit(directory / "modules.json", lambda modules: modules.pop())


def change_a_scaling_weight(directory):
    path = directory / "2_Dense" / "model.safetensors"
    change_tensor(path, "linear.weight", lambda x: x + np.float32(0.1) * (x > 0.5))


def change_a_bias_a_little(directory):
    path = directory / "2_Dense" / "model.safetensors"
    change_tensor(path, "linear.bias", lambda x: x + np.float32(1e-6))


def say_that_there_is_no_bias(directory):
    edit(directory / "2_Dense" / "config.json", lambda values: values.update(bias=False))


def name_other_prefixes(directory):
    path = directory / "config_sentence_transformers.json"
    edit(path, lambda values: values.update(matryoshka_dims=[8, 16]))


def remove_what_names_the_prefixes(directory):
    (directory / "config_sentence_transformers.json").unlink()


def perturb_a_weight(directory):
    path, name = directory / "model.safetensors", "encoder.layer.1.output.dense.weight"
    change_tensor(path, name, lambda x: x + np.float32(0.05) * np.sign(x))


def change_a_position_that_no_text_has(directory):
    path = directory / "model.safetensors"
    change_tensor(path, POSITIONS, lambda x: np.concatenate([x[:-1], x[-1:] + np.float32(1)]))


def change_the_heads(directory):
    edit(directory / "config.json", lambda values: values.update(num_attention_heads=4))


def change_the_type_of_the_weights(directory):
    edit(directory / "config.json", lambda values: values.update(torch_dtype="float16"))


def swap_the_tokenizer(directory):
    def reverse(values):
        words = [word for word in values["model"]["vocab"] if not word.startswith("[")]
        ids = sorted((values["model"]["vocab"][word] for word in words), reverse=True)
        values["model"]["vocab"].update(zip(words, ids, strict=True))

    edit(directory / "tokenizer.json", reverse)
    (directory / "vocab.txt").unlink()


def swap_two_words_that_no_text_has(directory):
    def swap(values):
        words = values["model"]["vocab"]
        *_, one, other = sorted(words, key=words.__getitem__)
        words[one], words[other] = words[other], words[one]

    edit(directory / "tokenizer.json", swap)


def keep_case(directory):
    def change(values):
        values["normalizer"]["lowercase"] = False

    edit(directory / "tokenizer.json", change)


def keep_case_in_its_config(directory):
    edit(directory / "tokenizer_config.json", lambda values: values.update(do_lower_case=False))


def pad_on_the_left(directory):
    edit(directory / "tokenizer_config.json", lambda values: values.update(padding_side="left"))


def cut_texts_shorter(directory):
    edit(directory / "sentence_bert_config.json", lambda values: values.update(max_seq_length=16))


def cut_texts_shorter_in_the_tokenizer_s_config(directory):
    edit(directory / "tokenizer_config.json", lambda values: values.update(model_max_length=16))


def write_the_length_as_a_text(directory):
    edit(directory / "sentence_bert_config.json", lambda values: values.update(max_seq_length="32"))


def change_a_prompt(directory):
    path = directory / "config_sentence_transformers.json"
    edit(path, lambda values: values["prompts"].update(query="问题："))


def prompt_by_default(directory):
    path = directory / "config_sentence_transformers.json"
    edit(path, lambda values: values.update(default_prompt_name="query"))


def normalize(directory):
    about = {"idx": 3, "name": "3", "path": "3_Normalize"}
    kind = {"type": "sentence_transformers.models.Normalize"}
    (directory / "3_Normalize").mkdir()
    edit(directory / "modules.json", lambda modules: modules.append(about | kind))


def change_the_order(directory):
    edit(directory / "modules.json", lambda modules: modules.insert(1, modules.pop()))


def change_the_similarity(directory):
    path = directory / "config_sentence_transformers.json"
    edit(path, lambda values: values.update(similarity_fn_name="dot"))


def remove_the_onnx_file(directory):
    (directory / "onnx" / "model.onnx").unlink()


def test_a_faithful_export_passes_at_every_trained_prefix(run, run_python):
    done = run_python("-m", "piccolo_jax.verify", run / "export", f"--workdir={run}")
    checks, table = done.stdout.split("\n\n")
    assert "DIFFERENT" not in checks
    for part in ("tokenizer", "maximum length", "prompts", "similarity", "backbone", "pooling",
                 "scaling layer", "embeddings", "ONNX", "JAX"):  # fmt: skip
        assert f"\n{part} " in f"\n{checks}"
    lines = table.splitlines()
    assert [line.split()[0] for line in lines] == ["largest", "prefix", "8", "20", "24", "same"]
    assert lines[1].split() == ["prefix", "sentence-transformers", "JAX"]
    assert all(float(value) < 1e-6 for line in lines[2:5] for value in line.split()[1:])
    assert done.stderr == ""  # sentence-transformers reports no missing weights


@pytest.mark.parametrize(
    ("mutate", "parts"),
    [
        (flip_pooling, "pooling"),
        (name_no_pooling, "pooling"),
        (pool_twice, "pooling"),
        (leave_out_prompts, "pooling"),
        (remove_activation, "scaling layer"),
        (remove_scaling_layer, "scaling layer"),
        (change_a_scaling_weight, "scaling layer"),
        (change_a_bias_a_little, "scaling layer"),
        (say_that_there_is_no_bias, "scaling layer"),
        (name_other_prefixes, "prefixes"),
        (remove_what_names_the_prefixes, "prefixes, prompts"),
        (perturb_a_weight, "backbone"),
        (change_a_position_that_no_text_has, "backbone"),
        (change_the_heads, "backbone"),
        (change_the_type_of_the_weights, "backbone"),
        (swap_the_tokenizer, "tokenizer"),
        (swap_two_words_that_no_text_has, "tokenizer"),
        (keep_case, "tokenizer"),
        (keep_case_in_its_config, "tokenizer"),
        (pad_on_the_left, "tokenizer"),
        (cut_texts_shorter, "maximum length"),
        (cut_texts_shorter_in_the_tokenizer_s_config, "maximum length"),
        (write_the_length_as_a_text, "maximum length"),
        (change_a_prompt, "prompts"),
        (prompt_by_default, "prompts"),
        (normalize, "modules"),
        (change_the_order, "modules"),
        (change_the_similarity, "similarity"),
        (remove_the_onnx_file, "ONNX"),
    ],
)
def test_what_differs_is_named_from_the_directory_alone(copied, capsys, mutate, parts):
    mutate(copied)
    assert run_command(verify.main, copied) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"different: {parts}"


def test_all_parts_that_differ_are_named(copied, capsys):
    flip_pooling(copied)
    change_a_scaling_weight(copied)
    keep_case(copied)
    assert run_command(verify.main, copied) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert set(last.removeprefix("different: ").split(", ")) == {
        "pooling", "scaling layer", "tokenizer",
    }  # fmt: skip


def test_the_onnx_file_of_another_model_is_named(copied, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=1)
    shutil.copy(other / "export" / "onnx" / "model.onnx", copied / "onnx" / "model.onnx")
    assert run_command(verify.main, copied) == 1
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "different: ONNX"
    # Not by its digest alone.
    assert "DIFFERENT  13 texts at 20: differ by" in out
    (copied / "onnx" / "model.onnx").write_bytes(b"no model")
    assert run_command(verify.main, copied) == 1
    assert "onnxruntime can't run it" in capsys.readouterr().out


def test_with_the_workdir_the_reference_is_that_of_the_checkpoint(run, copied, tmp_path, capsys):
    other = make_run(tmp_path / "other", seed=1)
    assert run_command(verify.main, copied, f"--workdir={other}") == 1
    assert "scaling layer" in capsys.readouterr().out.splitlines()[-1]
    (copied / "piccolo_jax.safetensors").unlink()
    assert run_command(verify.main, copied, f"--workdir={run}", "--dims=8,30") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-4:]] == ["prefix", "8", "30", "same"]
    perturb_a_weight(copied)
    assert run_command(verify.main, copied, f"--workdir={run}") == 1
    assert capsys.readouterr().out.splitlines()[-1] == "different: backbone"


def test_without_a_reference_both_read_the_directory_and_no_more_is_said(copied, capsys):
    (copied / "piccolo_jax.safetensors").unlink()
    flip_pooling(copied)
    assert run_command(verify.main, copied, "--dims=5,30") == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()] == ["prefix", "5", "30", "same"]
    assert "there is no reference" in out
    remove_activation(copied)
    assert run_command(verify.main, copied) == 2
    assert "2_Dense/config.json: activation_function" in capsys.readouterr().err


@pytest.mark.parametrize("reference", [True, False])
@pytest.mark.parametrize(("part", "code"), [(0.5, 0), (2.0, 1)])
def test_vectors_may_differ_by_the_tolerance_and_no_more(
    copied, monkeypatch, capsys, part, code, reference
):
    if not reference:
        (copied / "piccolo_jax.safetensors").unlink()
    encode = served.encode

    def turned(*arguments):
        rows = encode(*arguments).astype(np.float64)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        aside = np.eye(rows.shape[1])[0] - rows[:, :1] * rows
        aside /= np.linalg.norm(aside, axis=1, keepdims=True)
        cosine = 1 - part * verify.TOLERANCE
        return (cosine * rows + np.sqrt(1 - cosine**2) * aside).astype(np.float32)

    monkeypatch.setattr(served, "encode", turned)
    assert run_command(verify.main, copied, "--dims=30") == code
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("different: " if code else "same vectors")


def test_a_reference_that_can_t_be_read_is_an_error(copied, capsys):
    path = copied / "piccolo_jax.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert run_command(verify.main, copied) == 2
    assert "piccolo_jax.safetensors: can't be read" in capsys.readouterr().err
    save_file({"x": np.zeros(1)}, path)
    assert run_command(verify.main, copied) == 2
    assert "piccolo_jax.safetensors: can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_of_half_precision_the_loss_is_told_and_the_rest_is_exact(
    run, tmp_path, capsys, caplog, dtype
):
    flags = (f"--workdir={run}", f"--output={tmp_path / 'out'}", f"--dtype={dtype}")
    other = ["--layout=6"] * (dtype == "bfloat16")
    assert run_command(export.main, *flags, *other) == 0
    assert ("torch_dtype" in read(tmp_path / "out" / "config.json")) == (not other)
    told = [line.split() for line in capsys.readouterr().out.splitlines()][2:5]
    assert run_command(verify.main, tmp_path / "out") == 0
    header, *lines = capsys.readouterr().out.splitlines()[-5:-1]
    assert f"{dtype} weights" in header
    assert header.endswith("as sentence-transformers loads it")
    unit = {"bfloat16": 2**-9, "float16": 2**-12}[dtype]
    for (dim, loss), line in zip(told, lines, strict=True):
        prefix, exact, jax_, weights, loaded = line.split()
        assert (prefix, weights) == (dim, loss)
        assert float(exact) < 1e-7
        assert float(jax_) < 1e-7
        assert unit**2 / 10 < float(weights) < 100 * unit**2
        assert unit**2 / 10 < float(loaded) < 200 * unit**2
    if other:
        edit(tmp_path / "out" / "config.json", lambda v: v.update(dtype="float32"))
        pooling = tmp_path / "out" / "1_Pooling" / "config.json"
        for change in (lambda v: v.update(pooling_mode="cls"), lambda v: v.pop("pooling_mode")):
            edit(pooling, change)
            assert run_command(verify.main, tmp_path / "out") == 1
            assert capsys.readouterr().out.splitlines()[-1] == "different: backbone, pooling"


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


def test_what_can_t_be_loaded_is_an_error_that_names_the_file(run, copied, capsys):
    (copied / "tokenizer.json").write_text("{")
    (copied / "vocab.txt").unlink()
    for flags in ([], [f"--workdir={run}"]):
        assert run_command(verify.main, copied, *flags) == 2
        assert str(copied) in capsys.readouterr().err
    shutil.copy(run / "export" / "tokenizer.json", copied / "tokenizer.json")
    (copied / "model.safetensors").write_bytes(b"no weights")
    assert run_command(verify.main, copied) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_what_is_known_to_differ_is_said_even_if_the_rest_can_t_be_loaded(copied, capsys):
    change_a_bias_a_little(copied)
    edit(copied / "config.json", lambda values: values.update(intermediate_size=50))
    assert run_command(verify.main, copied) == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == "different: scaling layer, backbone"
    assert "can't load it" in printed.err


@pytest.mark.parametrize("library", ["sentence_transformers", "onnxruntime"])
def test_without_a_library_it_says_how_to_install_it(run, monkeypatch, capsys, library):
    monkeypatch.setitem(sys.modules, library, None)
    assert run_command(verify.main, run / "export") == 2
    assert "pip install -r requirements-dev.txt" in capsys.readouterr().err
