import dataclasses
import json
import random
import shutil

import jax
import numpy as np
import pytest
import small

from piccolo_jax import build, export
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder
from piccolo_jax.models.embedder import Embedder

pytestmark = pytest.mark.usefixtures("quick_compiling")

MAX_LENGTH = 48
TEXTS = [
    "检索重排相似度分类与聚类都用同一个向量模型"[: 1 + i % 21] * (1 + i % 7) for i in range(150)
]
ON_8_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np
from piccolo_jax.config import MeshConfig
from piccolo_jax.evaluation import encoder
from evaluation.test_encoder import TEXTS
assert len(jax.devices()) == 8
out = {}
for name, sizes in {"8x1x1": (8, 1, 1), "2x2x2": (2, 2, 2)}.items():
    made, params = encoder.load(sys.argv[2], MeshConfig(*sizes))
    out[name] = made.encode(params, TEXTS)
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """An export of a model whose longest texts have MAX_LENGTH tokens."""
    config = small.config(embed_dim=30)
    config.data.max_length = MAX_LENGTH
    parts = build.build(config)
    path = tmp_path_factory.mktemp("run") / "export"
    export.write(path, small.params(parts), parts, config)
    return path


@pytest.fixture(scope="module")
def loaded(directory):
    return encoder.load(directory)


@pytest.fixture(scope="module")
def rows(loaded):
    made, params = loaded
    return made.encode(params, TEXTS)


def alone(loaded, text, max_length=MAX_LENGTH):
    """The embedding of one text in a row of its own, by the model itself."""
    made, params = loaded
    tokens = made.tokenizer.encode([text], max_length)[0][0][None]
    model = Embedder(made.model.backbone, pooling="mean", embed_dim=30)
    ones, positions = np.ones_like(tokens), np.arange(tokens.size, dtype=np.int32)[None]
    slot = np.zeros(1, np.int32)
    return model.apply({"params": params}, tokens, ones, positions, slot, num_segments=1)[0]


def test_row_n_is_the_embedding_of_text_n(loaded, rows):
    assert (rows.dtype, rows.shape) == (np.float32, (150, 30))
    for n in (0, 7, 76, 149):
        np.testing.assert_allclose(rows[n], alone(loaded, TEXTS[n]), atol=1e-4)


def test_the_order_of_the_texts_does_not_matter(loaded, rows):
    order = list(range(len(TEXTS)))
    random.Random(0).shuffle(order)
    made, params = loaded
    shuffled = made.encode(params, [TEXTS[n] for n in order])
    np.testing.assert_allclose(shuffled, rows[order], atol=1e-5)


def test_devices_and_meshes_do_not_matter(directory, rows, run_python, tmp_path):
    out = tmp_path / "rows.npz"
    run_python("-c", ON_8_DEVICES, small.ROOT / "tests", directory, out, devices=8)
    with np.load(out) as found:
        assert sorted(found) == ["2x2x2", "8x1x1"]
        for values in found.values():
            np.testing.assert_allclose(values, rows, rtol=1e-5, atol=1e-5)


def test_long_texts_are_cut(loaded):
    made, params = loaded
    long = "量子计算机" * 40
    assert made.max_length == MAX_LENGTH
    found = made.encode(params, [long, long + "更多", long[:40]])
    np.testing.assert_allclose(found[0], alone(loaded, long), atol=1e-4)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 1e-3


def test_the_prompt_is_put_before_every_text(loaded):
    made, params = loaded
    found = made.encode(params, ["天气"], "查询：")
    np.testing.assert_allclose(found[0], alone(loaded, "查询：天气"), atol=1e-4)


def test_a_short_text_alone_is_one_short_row(loaded, monkeypatch):
    made, params = loaded
    shapes = []
    start = made._start
    monkeypatch.setattr(
        made, "_start", lambda *args: shapes.append(args[2]["tokens"].shape) or start(*args)
    )
    made.encode(params, ["天气"])
    made.encode(params, ["检索重排相似度分类与聚类都用同一个向量模型"])
    assert shapes == [(1, 16), (1, 32)]


def test_the_compiler_gets_the_options_for_the_tokens_of_a_batch(loaded, monkeypatch):
    made, params = loaded
    fresh = encoder.Encoder(made.model, made.tokenizer, made.mesh, MAX_LENGTH)
    asked = []
    unknown = {"xla_no_such_option": "1"}
    monkeypatch.setattr(encoder, "compiler_options", lambda *of: asked.append(of) or unknown)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        fresh.encode(params, ["天气"])
    assert asked == [(made.model.dtype, True, 16)]


def test_no_text_gives_no_row(loaded):
    made, params = loaded
    assert made.encode(params, []).shape == (0, 30)


def test_many_batches_of_rows_are_one_answer(loaded, rows, monkeypatch):
    monkeypatch.setattr(encoder, "_TEXTS_AT_ONCE", 40)
    made = encoder.Encoder(loaded[0].model, loaded[0].tokenizer, loaded[0].mesh, MAX_LENGTH)
    made.ladder = dataclasses.replace(made.ladder, tokens=192)
    np.testing.assert_allclose(made.encode(loaded[1], TEXTS), rows, atol=1e-5)


def test_cut_takes_the_prefix_and_then_normalises():
    rows = np.array([[3, 4, 12], [0, 0, 5]], np.float32)
    np.testing.assert_allclose(encoder.cut(rows, 2), [[0.6, 0.8], [0, 0]], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(encoder.cut(rows, 3), axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(rows, [[3, 4, 12], [0, 0, 5]])


def test_a_length_limit_beyond_the_positions_is_lowered(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "m")
    path = tmp_path / "m" / "sentence_bert_config.json"
    path.write_text(json.dumps({"max_seq_length": 9999}))
    assert encoder.load(tmp_path / "m")[0].max_length == 64
    path.unlink()
    made, params = encoder.load(tmp_path / "m")
    assert made.max_length == MAX_LENGTH  # of tokenizer_config.json
    assert isinstance(made.tokenizer, Tokenizer)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_token_ids_beyond_the_vocabulary_are_an_error(directory, tmp_path):
    shutil.copytree(directory, tmp_path / "m")
    path = tmp_path / "m" / "tokenizer.json"
    values = json.loads(path.read_text("utf-8"))
    values["model"]["vocab"]["kühl"] = 2600
    path.write_text(json.dumps(values), "utf-8")
    with pytest.raises(UserError, match=r"m: its tokenizer has 2601 token ids, but .* = 2600"):
        encoder.load(tmp_path / "m")


def test_products_are_of_the_type_asked_for(directory, rows):
    assert encoder.load(directory)[0].model.dtype == np.float32
    assert encoder.load(directory, dtype="auto")[0].model.dtype == np.float32  # on a CPU
    made, params = encoder.load(directory, dtype="bfloat16")
    found = encoder.cut(made.encode(params, TEXTS[:8]), 30)
    cosines = (found * encoder.cut(rows[:8], 30)).sum(axis=1)
    assert found.dtype == np.float32
    assert 0 < np.max(1 - cosines) < 1e-2
