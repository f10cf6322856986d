import dataclasses
import functools
import json

import ml_dtypes
import numpy as np
import pytest
import small
from safetensors import safe_open

from piccolo_jax import build, export
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.exporting import layout
from piccolo_jax.exporting.layout import Options

pytestmark = pytest.mark.usefixtures("quick_compiling")
TEXTS = [
    "今天天气很好",
    "A short English sentence",
    "量子计算机利用叠加与纠缠并行地处理信息。" * 20,
]


def exported(**fields):
    config = small.config(**fields)
    parts = build.build(config)
    return export.exported_of(small.params(parts), parts, config)


@pytest.fixture(scope="module")
def model():
    return exported(embed_dim=30)


def read(path):
    return json.loads(path.read_text("utf-8"))


def load(directory):
    from sentence_transformers import SentenceTransformer

    options = {"add_pooling_layer": False}
    return SentenceTransformer(str(directory), device="cpu", model_kwargs=options)


@pytest.mark.parametrize(("pooling", "embed_dim"), [("mean", 30), ("cls", 0), ("last", 24)])
def test_layout_6_is_what_sentence_transformers_6_itself_writes(tmp_path, pooling, embed_dim):
    model = exported(pooling=pooling, embed_dim=embed_dim)
    for name in layout.LAYOUTS:
        (tmp_path / name).mkdir()
        layout.write(tmp_path / name, model, Options(layout=name))
    served = load(tmp_path / "6")
    served.save_pretrained(str(tmp_path / "theirs"))
    files = ["modules.json", "sentence_bert_config.json", "1_Pooling/config.json"]
    for file in files + ["2_Dense/config.json"] * bool(embed_dim):
        assert read(tmp_path / "6" / file) == read(tmp_path / "theirs" / file)
    assert (tmp_path / "6" / "2_Dense").exists() == bool(embed_dim)
    ours, theirs = (read(tmp_path / name / "config.json") for name in ("6", "theirs"))
    assert {name: theirs[name] for name in ours} == ours
    assert ours["dtype"] == "float32"
    about, other = (
        read(tmp_path / name / "config_sentence_transformers.json") for name in ("6", "theirs")
    )
    for field in ("model_type", "default_prompt_name", "similarity_fn_name"):
        assert about[field] == other[field]
    assert served.max_seq_length == 32
    # And it is the model of the other layout, to the bit.
    old = load(tmp_path / "2024")
    np.testing.assert_array_equal(served.encode(TEXTS), old.encode(TEXTS))


@pytest.mark.parametrize("name", ["2024", "6"])
def test_lower_case_goes_with_the_model(tmp_path, model, name):
    for folder in ("cased", "out"):
        (tmp_path / folder).mkdir()
    layout.write(tmp_path / "cased", model, Options())
    small.make_cased(tmp_path / "cased")
    lower = Tokenizer(tmp_path / "cased", lower_case=True)
    made = dataclasses.replace(model, tokenizer=lower)
    layout.write(tmp_path / "out", made, Options(layout=name))
    embedder, params = encoder.load(tmp_path / "out")
    for encode in (load(tmp_path / "out").encode, functools.partial(embedder.encode, params)):
        upper, plain = encode(["ABC Abc", "abc abc"])
        np.testing.assert_allclose(upper, plain, atol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["2024", "6"])
def test_half_precision_is_stored_and_loaded_as_such(tmp_path, model, name, dtype):
    import torch

    layout.write(tmp_path, layout.rounded(model, dtype), Options(layout=name, dtype=dtype))
    for file in ("model.safetensors", "2_Dense/model.safetensors"):
        with safe_open(tmp_path / file, "np") as tensors:
            kinds = {str(tensors.get_tensor(name).dtype) for name in tensors.keys()}  # noqa: SIM118
        assert kinds == {dtype}
    served = load(tmp_path)
    assert {parameter.dtype for parameter in served.parameters()} == {getattr(torch, dtype)}
    assert np.isfinite(served.encode(TEXTS)).all()


def test_rounding_gives_the_nearest_values_and_nothing_for_float32(model):
    assert layout.rounded(model, "float32") is model
    kernel = model.params["scaling"]["kernel"]
    rounded = layout.rounded(model, "bfloat16").params["scaling"]["kernel"]
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, kernel.astype(ml_dtypes.bfloat16).astype(np.float32))
    assert 0 < np.abs(rounded - kernel).max() <= 2**-8 * np.abs(kernel).max()


def test_a_weight_beyond_float16_is_refused_by_name_and_nothing_is_written(tmp_path):
    config = small.config(embed_dim=30)
    parts = build.build(config)
    params = small.params(parts)
    params["scaling"]["kernel"][3, 5] = 70000
    with pytest.raises(UserError, match=r"--dtype=float16: 1 values of scaling/kernel .* 7e\+04"):
        export.write(tmp_path / "out", params, parts, config, options=Options(dtype="float16"))
    assert not list(tmp_path.iterdir())
    params["scaling"]["kernel"][3, 5] = 65000
    export.write(tmp_path / "out", params, parts, config, options=Options(dtype="float16"))
    assert (tmp_path / "out" / "modules.json").exists()


def test_both_kinds_of_texts_get_their_prompts_in_sentence_transformers(tmp_path):
    config = small.config()
    config.data.datasets[0].passage_prompt = "文："
    parts = build.build(config)
    model = export.exported_of(small.params(parts), parts, config)
    layout.write(tmp_path, model, Options())
    served = load(tmp_path)
    plain = [served.encode([prompt + text for text in TEXTS]) for prompt in ("查询：", "文：")]
    np.testing.assert_allclose(served.encode_query(TEXTS), plain[0], atol=1e-5)
    np.testing.assert_allclose(served.encode_document(TEXTS), plain[1], atol=1e-5)


def test_a_tokenizer_that_pads_on_the_left_is_written_to_pad_on_the_right(tmp_path, model):
    model.tokenizer.hf.padding_side = "left"
    try:
        layout.write(tmp_path, model, Options())
    finally:
        model.tokenizer.hf.padding_side = "right"
    assert load(tmp_path).tokenizer.padding_side == "right"
