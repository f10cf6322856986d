import json
import shutil

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import load_file, save_file
from small import one_error, run_command, snapshot

from piccolo_jax import build, export, merge, verify

WEIGHTS = ("model.safetensors", "2_Dense/model.safetensors")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three exports of one architecture, far from each other."""
    folder = tmp_path_factory.mktemp("models")
    config = small.config()
    parts = build.build(config)
    params = small.params(parts)
    for number, name in enumerate("ABC"):
        rng = np.random.default_rng(number)

        def moved(x, rng=rng):
            return x + rng.normal(size=x.shape, scale=0.2).astype(np.float32)

        export.write(folder / name, jax.tree.map(moved, params), parts, config)
    return [folder / name for name in "ABC"]


@pytest.fixture
def copied(models, tmp_path):
    shutil.copytree(models[1], tmp_path / "B")
    return tmp_path / "B"


def tensors(directory):
    return {f"{p}:{k}": v for p in WEIGHTS for k, v in load_file(directory / p).items()}


def run(output, *arguments):
    return run_command(merge.main, f"--output={output}", *arguments)


@pytest.mark.parametrize(
    ("flags", "weights"),
    [
        ((), (1 / 3,) * 3),
        (("--weights=3,1,0",), (0.75, 0.25, 0)),
        (("--weights=0,1,1",), (0, 0.5, 0.5)),
    ],
)
def test_a_linear_merge_is_the_weighted_mean(models, tmp_path, flags, weights):
    assert run(tmp_path / "out", *models, *flags) == 0
    inputs = [tensors(model) for model in models]
    merged = tensors(tmp_path / "out")
    assert merged.keys() == inputs[0].keys()
    for name, value in merged.items():
        expected = sum(w * x[name].astype(np.float64) for w, x in zip(weights, inputs, strict=True))
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7, err_msg=name)


def formula(x, y, part):
    x, y = x.astype(np.float64), y.astype(np.float64)
    angle = np.arccos((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y))
    return (np.sin((1 - part) * angle) * x + np.sin(part * angle) * y) / np.sin(angle)


def test_a_spherical_merge_follows_the_arc_of_each_tensor(models, tmp_path, capsys):
    assert run(tmp_path / "out", *models, "--method=slerp", "--weights=2,1,1") == 0
    first, second, third = map(tensors, models)
    differ = 0
    for name, value in tensors(tmp_path / "out").items():
        expected = formula(formula(first[name], second[name], 1 / 3), third[name], 1 / 4)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6, err_msg=name)
        linear = 0.5 * first[name] + 0.25 * second[name] + 0.25 * third[name]
        differ += bool(np.abs(value - linear).max() > 1e-3)
    assert differ > 10
    assert "0 of" in capsys.readouterr().err


def test_the_arc_keeps_the_length_of_vectors_of_one_length():
    x, y = np.float32([[3, 0]]), np.float32([[0, 3]])
    for part in (0.25, 0.5):
        angle = part * np.pi / 2
        expected = [[3 * np.cos(angle), 3 * np.sin(angle)]]
        np.testing.assert_allclose(merge.slerp(x, y, part), expected, rtol=1e-7)
    np.testing.assert_allclose(merge.slerp(x, y, 0.0), x)
    np.testing.assert_allclose(merge.slerp(x, y, 1.0), y, atol=1e-7)


@pytest.mark.parametrize("end", [[0, 0], [3, 1e-3], [-3, 1e-3], [3, 0.09]])
def test_there_is_no_arc_between_parallel_opposite_and_zero_tensors(end):
    assert merge.slerp(np.float32([3, 0]), np.float32(end), 0.5) is None
    assert merge.slerp(np.float32([3, 0]), np.float32([3, 0.1]), 0.5) is not None


def test_what_has_no_arc_is_merged_linearly(models, copied, tmp_path, capsys):
    path = copied / "2_Dense" / "model.safetensors"
    values = load_file(path)
    values["linear.bias"] = np.zeros_like(values["linear.bias"])
    save_file(values, path, metadata={"format": "pt"})
    assert run(tmp_path / "out", models[0], copied, "--method=slerp") == 0
    assert "1 of" in capsys.readouterr().err
    name = "2_Dense/model.safetensors:linear.bias"
    np.testing.assert_allclose(
        tensors(tmp_path / "out")[name], tensors(models[0])[name] / 2, rtol=1e-6
    )


@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_a_model_merged_with_itself_is_that_model(models, tmp_path, method):
    assert run(tmp_path / "out", models[0], models[0], f"--method={method}") == 0
    expected = tensors(models[0])
    for name, value in tensors(tmp_path / "out").items():
        np.testing.assert_array_equal(value, expected[name])


def test_the_merge_loads_in_sentence_transformers_as_in_jax(models, copied, tmp_path):
    # As directories from elsewhere have it, which are cut by sentence_bert_config.json.
    edit(copied / "tokenizer_config.json", lambda values: values.update(model_max_length=512))
    assert run(tmp_path / "out", copied, *models) == 0
    assert run_command(verify.main, tmp_path / "out") == 0


def as_no_export_is(directory):
    """Normalize, no bias, a default prompt, and Transformer and Pooling in folders of their own."""
    modules = json.loads((directory / "modules.json").read_text("utf-8"))
    (directory / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "sentence_bert_config.json",
                 "tokenizer.json", "tokenizer_config.json", "vocab.txt"):  # fmt: skip
        (directory / name).rename(directory / "0_Transformer" / name)
    modules[0]["path"] = "0_Transformer"
    (directory / "1_Pooling").rename(directory / "pooling")
    modules[1]["path"] = "pooling"
    kind = "sentence_transformers.models.Normalize"
    modules.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": kind})
    (directory / "modules.json").write_text(json.dumps(modules))
    path = directory / "2_Dense" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bias": False}))
    path = directory / "2_Dense" / "model.safetensors"
    save_file({"linear.weight": load_file(path)["linear.weight"]}, path)
    path = directory / "config_sentence_transformers.json"
    about = json.loads(path.read_text("utf-8")) | {"default_prompt_name": "query"}
    path.write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")


def test_directories_from_elsewhere_are_merged_in_their_own_layout(models, tmp_path, capsys):
    for name, model in zip("AB", models, strict=False):
        shutil.copytree(model, tmp_path / name)
        as_no_export_is(tmp_path / name)
    assert run(tmp_path / "out", tmp_path / "A", tmp_path / "B") == 0
    assert "a Normalize module, a default prompt, its Transformer in a folder, its Pooling in" in (
        capsys.readouterr().err
    )
    assert load_file(tmp_path / "out" / "2_Dense" / "model.safetensors").keys() == {"linear.weight"}
    assert (tmp_path / "out" / "0_Transformer" / "model.safetensors").exists()
    assert run_command(verify.main, tmp_path / "out") == 0
    assert "same vectors in sentence-transformers and JAX" in capsys.readouterr().out
    shutil.copytree(models[0], tmp_path / "C")
    assert run(tmp_path / "other", tmp_path / "A", tmp_path / "C") == 2
    message = one_error(capsys)
    assert "Normalize module: True in" in message
    assert "default_prompt_name: 'query' in" in message


def test_what_was_made_of_the_weights_of_an_input_is_not_copied(models, copied, tmp_path):
    (copied / "onnx").mkdir()
    (copied / "onnx" / "config.json").write_text("{}")
    (copied / "piccolo_jax.safetensors").write_bytes(b"vectors of B")
    shard = copied / "model-00001-of-00001.safetensors"
    (copied / "model.safetensors").rename(shard)
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(shard), shard.name)}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    edit(copied / "config.json", lambda values: values.update(torch_dtype="float16"))
    assert run(tmp_path / "out", copied, models[0]) == 0
    files = set(snapshot(tmp_path / "out"))
    expected = set(snapshot(models[1]))
    assert files == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"


def edit(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")


def use_cls(model):
    flags = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    edit(model / "1_Pooling" / "config.json", lambda values: values.update(flags))


def swap_tokens(model):
    def swap(values):
        vocabulary = values["model"]["vocab"]
        vocabulary["的"], vocabulary["一"] = vocabulary["一"], vocabulary["的"]

    edit(model / "tokenizer.json", swap)


CHANGES = {
    "pooling: 'mean' in": use_cls,
    "prompts: {'query': '查询：'} in": lambda model: edit(
        model / "config_sentence_transformers.json", lambda v: v.update(prompts={"query": "问："})
    ),
    "max_seq_length: 32 in": lambda model: edit(
        model / "sentence_bert_config.json", lambda v: v.update(max_seq_length=16)
    ),
    "matryoshka_dims: [8, 20, 24] in": lambda model: edit(
        model / "config_sentence_transformers.json", lambda v: v.update(matryoshka_dims=[8])
    ),
    "truncate_dim: None in": lambda model: edit(
        model / "config_sentence_transformers.json", lambda v: v.update(truncate_dim=8)
    ),
    "similarity_fn_name: 'cosine' in": lambda model: edit(
        model / "config_sentence_transformers.json", lambda v: v.update(similarity_fn_name="dot")
    ),
    "config.json num_heads: 2 in": lambda model: edit(
        model / "config.json", lambda v: v.update(num_attention_heads=4)
    ),
    "tokenizer's model: WordPiece of": swap_tokens,
}


@pytest.mark.parametrize("message", CHANGES)
def test_models_that_differ_are_refused_with_the_field(models, copied, tmp_path, capsys, message):
    CHANGES[message](copied)
    assert run(tmp_path / "out", models[0], copied) == 2
    said = one_error(capsys)
    assert said.startswith("models that differ can't be merged:\n")
    assert f"  {message}" in said
    assert said.count("\n") == 2  # no other field
    assert str(copied) in said
    assert not (tmp_path / "out").exists()


def test_models_may_differ_in_dropout(models, copied, tmp_path):
    path = copied / "config.json"
    values = json.loads(path.read_text()) | {"hidden_dropout_prob": 0.3}
    path.write_text(json.dumps(values))
    assert run(tmp_path / "out", models[0], copied) == 0


def test_models_of_other_sizes_are_refused(models, tmp_path, capsys):
    config = small.config(embed_dim=0)
    config.loss.dims = (8, 20, 24)
    parts = build.build(config)
    export.write(tmp_path / "D", small.params(parts), parts, config)
    assert run(tmp_path / "out", models[0], tmp_path / "D") == 2
    assert "  width of the Dense module: 24 in" in one_error(capsys)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--weights=1", "has 1 numbers for 2 models"),
        ("--weights=1,-1", "must be 0 or greater"),
        ("--weights=0,0", "not all 0"),
        ("--weights=1,nan", "must be 0 or greater"),
        ("--weights=1,inf", "must be 0 or greater"),
        ("--weights=1e308,1e308", "of a finite sum"),
        ("--weights=1,x", "must be numbers"),
        ("--eval=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_flags_that_cannot_be_are_errors_and_nothing_is_written(
    models, tmp_path, capsys, flag, message
):
    assert run(tmp_path / "out", *models[:2], flag) == 2
    assert message in one_error(capsys)
    assert list(tmp_path.iterdir()) == []


def test_one_model_alone_is_no_merge(models, tmp_path, capsys):
    assert run(tmp_path / "out", models[0]) == 2
    assert "two models or more" in one_error(capsys)


def test_weights_that_are_not_finite_are_named(models, copied, tmp_path, capsys):
    path = copied / "model.safetensors"
    values = load_file(path)
    values["embeddings.LayerNorm.weight"][3] = np.nan
    save_file(values, path, metadata={"format": "pt"})
    assert run(tmp_path / "out", models[0], copied) == 2
    message = one_error(capsys)
    assert f"{copied}: tensor backbone/embeddings.LayerNorm.weight has values" in message
    assert not (tmp_path / "out").exists()


def test_what_is_there_stays_without_overwrite(models, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run(tmp_path / "out", *models) == 2
    assert "--overwrite replaces it" in one_error(capsys)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
    assert run(tmp_path / "out", *models, "--overwrite") == 0
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_inputs_and_merge_are_compared_at_every_prefix(models, tmp_path, capsys):
    file = small.TOKENIZER.parent / "similarity.test.jsonl"
    rows = tmp_path / "dev.jsonl"
    rows.write_text("".join(file.read_text("utf-8").splitlines(keepends=True)[:12]), "utf-8")
    assert run(tmp_path / "out", *models[:2], f"--eval={rows}", "--weights=0,1") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["dataset", "model", "8", "20", "24"]
    scores = {line[2]: line[3:] for line in lines[1:4]}
    assert all(line[:2] == ["dev", "spearman"] for line in lines[1:4])
    assert list(scores) == ["A", "B", "merged"]
    assert scores["merged"] == scores["B"] != scores["A"]
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "- A: 0\n- B: 1\n" in card
    assert "(linear)" in card
    assert " ".join(scores["merged"]) in " ".join(card.split())
    assert str(models[0].parent) not in card  # no paths of this machine
