import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from piccolo_jax.errors import UserError
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.models.pretrained import load_params, read_spec, resolve, to_hf

CONFIG = BertConfig(
    vocab_size=20, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12, max_positions=16
)
IDENTITY = "torch.nn.modules.linear.Identity"
LAYOUT = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")]


def random_params(embed_dim=6):
    tokens = jnp.zeros((1, 4), jnp.int32)
    model = Embedder(CONFIG, embed_dim=embed_dim)
    params = model.init(
        jax.random.key(0), tokens, tokens, tokens, jnp.zeros(1, jnp.int32), num_segments=1
    )["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)


PARAMS = random_params()


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def write_modules(directory, layout=LAYOUT, prefix="sentence_transformers.models."):
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": prefix + kind}
        for i, (path, kind) in enumerate(layout)
    ]
    write_json(directory / "modules.json", modules)


@pytest.fixture
def directory(tmp_path):
    """A sentence-transformers directory with a scaling layer from 8 to 6."""
    backbone, dense = to_hf(PARAMS, CONFIG)
    write_json(tmp_path / "config.json", CONFIG.to_hf())
    save_file(backbone, tmp_path / "model.safetensors")
    write_json(tmp_path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    write_json(
        tmp_path / "2_Dense" / "config.json",
        {"in_features": 8, "out_features": 6, "bias": True, "activation_function": IDENTITY},
    )
    save_file(dense, tmp_path / "2_Dense" / "model.safetensors")
    write_modules(tmp_path)
    return tmp_path


def assert_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, e)


def test_weights_survive_the_way_to_hugging_face_and_back_bit_for_bit(directory):
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)
    backbone, dense = to_hf(load_params(directory, CONFIG, 6), CONFIG)
    for tensors, file in ((backbone, "model.safetensors"), (dense, "2_Dense/model.safetensors")):
        assert_equal(tensors, load_file(directory / file))
    assert backbone["encoder.layer.1.output.dense.weight"].shape == (8, 12)
    assert dense["linear.weight"].shape == (6, 8)


def test_the_spec_tells_backbone_pooling_width_prompts_and_length(directory):
    write_json(
        directory / "config_sentence_transformers.json", {"prompts": {"query": "q: ", "doc": None}}
    )
    write_json(directory / "sentence_bert_config.json", {"max_seq_length": 12})
    spec = read_spec(directory)
    assert (spec.path, spec.backbone) == (directory, CONFIG)
    assert (spec.pooling, spec.embed_dim) == ("cls", 6)
    assert (spec.prompts, spec.max_seq_length) == ({"query": "q: ", "doc": ""}, 12)


def test_a_plain_transformers_directory_says_nothing_of_pooling(directory):
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json"):
        (directory / name).unlink()
    (directory / "2_Dense" / "model.safetensors").unlink()
    (directory / "1_Pooling").rmdir()
    (directory / "2_Dense").rmdir()
    spec = read_spec(directory)
    assert (spec.pooling, spec.embed_dim, spec.prompts) == (None, 0, {})
    assert load_params(directory, CONFIG, 6).keys() == {"backbone"}


def test_folders_of_modules_are_those_that_modules_json_names(directory):
    (directory / "1_Pooling").rename(directory / "pool")
    (directory / "2_Dense").rename(directory / "3_Dense")
    layout = [("", "Transformer"), ("pool", "Pooling"), ("3_Dense", "Dense"), ("4", "Normalize")]
    write_modules(directory, layout, prefix="sentence_transformers.base.modules.x.")
    spec = read_spec(directory)
    assert (spec.pooling, spec.embed_dim) == ("cls", 6)
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)


@pytest.mark.parametrize(
    ("values", "pooling"),
    [
        ({"pooling_mode": "mean", "embedding_dimension": 8}, "mean"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_mean_tokens": True, "include_prompt": True}, "mean"),
        ({"word_embedding_dimension": 8}, "mean"),
    ],
)
def test_pooling_is_read_from_both_layouts(directory, values, pooling):
    write_json(directory / "1_Pooling" / "config.json", values)
    assert read_spec(directory).pooling == pooling


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode": "max"}, "pooling mode max: must be one of mean"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "mode cls + mean"),
        ("1_Pooling/config.json",
         {"pooling_mode_cls_token": True, "pooling_mode_weightedmean_tokens": True},
         "pooling mode cls + weightedmean"),
        ("1_Pooling/config.json", {"include_prompt": False}, "include_prompt = False"),
        ("2_Dense/config.json", {"in_features": 8, "out_features": 6}, "Tanh if absent"),
        ("2_Dense/config.json",
         {"in_features": 9, "out_features": 6, "activation_function": IDENTITY}, "in_features = 9"),
        ("2_Dense/config.json",
         {"out_features": 6, "activation_function": IDENTITY, "use_residual": True},
         "use_residual = True"),
        ("config.json", {"model_type": "t5"}, "model_type = 't5': must be one of bert, roberta"),
        ("config.json", {"model_type": ["bert"]}, "model_type = ['bert']: must be one of bert"),
        ("config.json", CONFIG.to_hf() | {"hidden_act": ["gelu"]}, "hidden_act = ['gelu']: must"),
        ("config.json", CONFIG.to_hf() | {"hidden_dropout_prob": 1.0}, "dropout_prob = 1.0: must"),
        ("config.json", CONFIG.to_hf() | {"layer_norm_eps": "1e-12"}, "layer_norm_eps = '1e-12'"),
        ("config.json", [], "must be a JSON object"),
        ("modules.json", {}, "not a list of modules"),
        ("modules.json", [{"type": "a.Dense", "path": "2"}], "module a.Dense: not supported"),
        ("modules.json", [{"type": "sentence_transformers.models.LSTM", "path": "1"}],
         "module sentence_transformers.models.LSTM: not supported"),
        ("modules.json", [{"type": 3, "path": "1"}], "not a list of modules"),
        ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}},
         "prompt 'query' holds half a character (a lone surrogate)"),
        ("config_sentence_transformers.json",
         {"prompts": {"query": "q"}, "default_prompt_name": ["query"]},
         "default_prompt_name = ['query']: must be null or one of prompts"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_with_file_and_name(directory, file, values, message):
    write_json(directory / file, values)
    with pytest.raises(UserError) as error:
        read_spec(directory)
    assert str(error.value).startswith(f"{directory / file}: ")
    assert message in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "modules.json"])
def test_what_is_too_deep_for_python_is_a_user_error(directory, file):
    (directory / file).write_text("[" * 100_000)
    with pytest.raises(UserError, match=f"{file}: not "):
        read_spec(directory)


@pytest.mark.parametrize("text", [None, "{"])
def test_a_missing_or_broken_config_is_a_user_error(directory, text):
    (directory / "config.json").unlink()
    if text:
        (directory / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json: (no such file|not readable as JSON)"):
        read_spec(directory)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_weights_become_float32(directory, dtype):
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v.astype(dtype) for k, v in tensors.items()}, directory / "model.safetensors")
    expected = jax.tree.map(lambda p: p.astype(dtype).astype(np.float32), PARAMS["backbone"])
    assert_equal(load_params(directory, CONFIG)["backbone"], expected)


@pytest.mark.parametrize("prefix", ["bert.", "roberta."])
def test_prefixes_and_heads_of_other_models_are_passed_over(directory, prefix):
    tensors = {prefix + k: v for k, v in load_file(directory / "model.safetensors").items()}
    tensors[f"{prefix}pooler.dense.weight"] = np.zeros((8, 8), np.float32)
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(16)
    tensors["cls.predictions.bias"] = np.zeros(20, np.float32)
    save_file(tensors, directory / "model.safetensors")
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)


def test_the_layer_norms_of_old_checkpoints_have_other_names(directory):
    tensors = load_file(directory / "model.safetensors")
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): value
        for name, value in tensors.items()
    }
    assert len([name for name in old if name.endswith(("gamma", "beta"))]) == 10
    save_file(old, directory / "model.safetensors")
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)


def test_a_pooling_that_is_given_counts_whatever_the_directory_says(directory):
    for values in ({"pooling_mode": "max"}, {"include_prompt": False}):
        write_json(directory / "1_Pooling" / "config.json", values)
        assert read_spec(directory, pooling="mean").pooling == "mean"


def test_a_scaling_layer_that_is_not_listed_is_for_training_alone(directory):
    write_modules(directory, LAYOUT[:2])
    assert read_spec(directory).embed_dim == 0
    assert read_spec(directory, unlisted_dense=True).embed_dim == 6
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)


def test_sharded_weights_are_read_through_their_index(directory):
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    write_json(directory / "model.safetensors.index.json", index)
    assert_equal(load_params(directory, CONFIG, 6), PARAMS)
    for file in (None, 3):
        broken = {"weight_map": index["weight_map"] | {names[0]: file}}
        write_json(directory / "model.safetensors.index.json", broken)
        with pytest.raises(UserError, match=r"index\.json: weight_map: must be an object of file"):
            load_params(directory, CONFIG)
    write_json(directory / "model.safetensors.index.json", index)
    (directory / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors: not a readable safetensors file"):
        load_params(directory, CONFIG)


def test_missing_and_misshapen_tensors_are_named_with_file_and_shapes(directory):
    file = directory / "model.safetensors"
    tensors = load_file(file)
    name = "encoder.layer.1.intermediate.dense.weight"
    save_file({**tensors, name: np.zeros((8, 12), np.float32)}, file)
    with pytest.raises(UserError) as error:
        load_params(directory, CONFIG)
    assert f"{file}: tensor {name!r} has shape [8, 12]" in str(error.value)
    assert "must be [12, 8]" in str(error.value)
    save_file({**tensors, name: np.zeros((12, 8), np.int8)}, file)
    with pytest.raises(UserError, match="is I8: must be one of F32, F16, BF16"):
        load_params(directory, CONFIG)
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(UserError) as error:
        load_params(directory, CONFIG)
    assert f"{file}: no tensor {name!r} of shape [12, 8]" in str(error.value)


@pytest.mark.parametrize("folder", ["", "2_Dense"])
def test_weights_that_are_not_safetensors_never_become_a_random_start(directory, folder):
    file = directory / folder / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: only safetensors .* save_pretrained"):
        load_params(directory, CONFIG, 6)
    file.with_name("pytorch_model.bin").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_params(directory, CONFIG, 6)
    file.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="not a readable safetensors file"):
        load_params(directory, CONFIG, 6)


def test_another_width_than_that_of_the_dense_module_is_refused(directory):
    with pytest.raises(UserError, match=r"config\.model\.embed_dim = 7, but .*out_features = 6"):
        load_params(directory, CONFIG, 7)
    assert load_params(directory, CONFIG, 0).keys() == {"backbone"}


def test_a_dense_module_without_bias_has_bias_zero(directory):
    values = {"out_features": 6, "bias": False, "activation_function": IDENTITY}
    write_json(directory / "2_Dense" / "config.json", values)
    kernel = {"linear.weight": load_file(directory / "2_Dense/model.safetensors")["linear.weight"]}
    save_file(kernel, directory / "2_Dense" / "model.safetensors")
    expected = {**PARAMS["scaling"], "bias": np.zeros(6, np.float32)}
    assert_equal(load_params(directory, CONFIG, 6)["scaling"], expected)


def test_init_is_a_directory_or_else_a_hub_id(directory, monkeypatch):
    assert resolve(str(directory)) == directory
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda init, **_: f"/cache/{init}")
    assert str(resolve("owner/model")) == "/cache/owner/model"


@pytest.mark.parametrize("init", ["./no/such/directory", "no-such-owner/no-such-model"])
def test_neither_directory_nor_hub_id_says_that_both_were_tried(init, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="is not a directory here, and could not be had from the"):
        resolve(init)
