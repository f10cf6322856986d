import dataclasses
import json
import random
import shutil

import numpy as np
import pytest
import small
from sentence_transformers import SentenceTransformer

import piccolo_jax
from piccolo_jax import build, export
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import encoder as functional

pytestmark = pytest.mark.usefixtures("quick_compiling")

TEXTS = [
    "今天天气很好",
    "",
    "好",
    "A short English sentence." * 9,
    "今天天气很好",
    "a\u2028b\x85c\0",
]
WIDTH = 30
ON_8_DEVICES = """
import sys
sys.path.insert(0, sys.argv[1])
import jax, numpy as np, piccolo_jax
from piccolo_jax.config import MeshConfig
from test_public_encoder import TEXTS
texts = [text[:n] for text in TEXTS for n in range(1, 40, 3)]
assert len(jax.devices()) == 8
out = {"8x1x1": piccolo_jax.Encoder.load(sys.argv[2]).encode(texts, dim=7)}
out["1x8x1"] = piccolo_jax.Encoder.load(sys.argv[2], mesh=MeshConfig(1, 8, 1)).encode(texts, dim=7)
np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    config = small.config(embed_dim=WIDTH)
    parts = build.build(config)
    path = tmp_path_factory.mktemp("run") / "export"
    export.write(path, small.params(parts), parts, config)
    return path


@pytest.fixture(scope="module")
def encoder(directory):
    return piccolo_jax.Encoder.load(directory)


@pytest.fixture(scope="module")
def raw(directory):
    """Embeddings of TEXTS, whole and not normalised."""
    made, params = functional.load(directory)
    return made.encode(params, TEXTS)


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def edited(directory, target, file, **values):
    """A copy with other values in a JSON file."""
    shutil.copytree(directory, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values))
    return target


def test_rows_are_float32_of_length_1(encoder, raw):
    rows = encoder.encode(TEXTS)
    assert (rows.dtype, rows.shape) == (np.float32, (len(TEXTS), WIDTH))
    np.testing.assert_allclose(rows, unit(raw), atol=1e-6)
    assert encoder.width == WIDTH


def test_a_normalize_module_acts_before_a_cut_that_is_not_normalised_again(
    directory, raw, tmp_path
):
    shutil.copytree(directory, tmp_path / "normalizing")
    modules = tmp_path / "normalizing" / "modules.json"
    listed = json.loads(modules.read_text("utf-8"))
    kind = "sentence_transformers.models.Normalize"
    listed.append({"idx": 3, "name": "3", "path": "3_Normalize", "type": kind})
    modules.write_text(json.dumps(listed))
    normalizing = piccolo_jax.Encoder.load(tmp_path / "normalizing")
    rows = normalizing.encode(TEXTS, dim=7, normalize=False)
    np.testing.assert_allclose(rows, unit(raw)[:, :7], atol=1e-6)
    np.testing.assert_allclose(normalizing.encode(TEXTS, dim=7), unit(raw[:, :7]), atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path / "normalizing"), truncate_dim=7).encode(TEXTS)
    np.testing.assert_allclose(rows, theirs, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 8, np.int64(29), WIDTH])
def test_a_prefix_is_cut_and_then_normalised_unless_told_otherwise(encoder, raw, dim):
    np.testing.assert_allclose(encoder.encode(TEXTS, dim=dim), unit(raw[:, :dim]), atol=1e-6)
    rows = encoder.encode(TEXTS, dim=dim, normalize=False)
    np.testing.assert_allclose(rows, raw[:, :dim], atol=1e-5)
    assert rows.flags.c_contiguous
    assert rows.base is None or rows.base.nbytes == rows.nbytes  # doesn't keep the whole


@pytest.mark.parametrize(("named", "kept"), [(7, 7), (WIDTH + 1, WIDTH), (None, WIDTH)])
def test_the_directory_says_which_prefix_is_kept(directory, raw, tmp_path, named, kept):
    shutil.copytree(directory, tmp_path / "model")
    about = tmp_path / "model" / "config_sentence_transformers.json"
    about.write_text(json.dumps(json.loads(about.read_text("utf-8")) | {"truncate_dim": named}))
    encoder = piccolo_jax.Encoder.load(tmp_path / "model")
    assert encoder.default_dim == kept
    np.testing.assert_allclose(encoder.encode(TEXTS), unit(raw[:, :kept]), atol=1e-6)
    theirs = SentenceTransformer(str(tmp_path / "model")).encode(TEXTS)
    assert theirs.shape[1] == kept


@pytest.mark.parametrize("dim", [0, -1, WIDTH + 1, 8.0, "8", True])
def test_a_prefix_that_does_not_exist_is_an_error(encoder, dim):
    with pytest.raises(UserError, match=f"dim = {dim!r}: must be from 1 to {WIDTH}"):
        encoder.encode(TEXTS, dim=dim)


def test_one_text_gives_one_vector_and_none_gives_no_row(encoder, raw):
    np.testing.assert_allclose(encoder.encode(TEXTS[3], dim=5), unit(raw[3, :5]), atol=1e-5)
    assert encoder.encode("", dim=5).shape == (5,)
    empty = encoder.encode([], dim=5)
    assert (empty.shape, empty.dtype) == ((0, 5), np.float32)


def test_texts_can_come_as_any_iterable(encoder, raw):
    for texts in (tuple(TEXTS), iter(TEXTS), np.asarray(TEXTS[:5]), np.asarray(TEXTS, object)):
        rows = encoder.encode(texts)
        np.testing.assert_allclose(rows, unit(raw)[: len(rows)], atol=1e-5)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a", 1.5], r"texts\[1\]: is a float: must be a text"),
        ([None], r"texts\[0\]: is a NoneType"),
        ([["a", "b"]], r"texts\[0\]: is a list"),
        (b"a", r"texts\[0\]: is a int"),
        (None, "texts: is a NoneType: must be a list of texts"),
        (["a", "b", "c\ud800"], r"texts\[2\]: has a lone surrogate at 1"),
        ("\udc80", "texts: has a lone surrogate at 0"),
    ],
)
def test_what_is_no_text_is_named(encoder, texts, message):
    with pytest.raises(UserError, match=message):
        encoder.encode(texts)


def test_long_texts_are_cut_at_the_models_limit_or_at_that_which_is_given(encoder, directory):
    assert encoder.max_length == 32
    rows = encoder.encode(["好" * 30, "好" * 30 + "天气"])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    shorter = piccolo_jax.Encoder.load(directory, max_length=12)
    rows = shorter.encode(["好" * 10, "好" * 10 + "天气", "好" * 9])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    assert np.abs(rows[0] - rows[2]).max() > 1e-4
    for wrong in (2, 65, 12.0, True):
        with pytest.raises(UserError, match=f"max_length = {wrong}: must be from 3 to 64"):
            piccolo_jax.Encoder.load(directory, max_length=wrong)


def test_a_prompt_is_a_text_or_the_name_of_one(encoder, directory, tmp_path):
    expected = encoder.encode(["查询：天气"])[0]
    assert encoder.prompts == {"query": "查询：", "document": ""}
    np.testing.assert_allclose(encoder.encode("天气", prompt="查询："), expected, atol=1e-6)
    np.testing.assert_allclose(encoder.encode("天气", prompt_name="query"), expected, atol=1e-6)
    plain = encoder.encode("天气")
    assert np.abs(plain - expected).max() > 1e-4
    np.testing.assert_allclose(encoder.encode("天气", prompt_name="document"), plain, atol=1e-6)

    file = "config_sentence_transformers.json"
    other = edited(directory, tmp_path / "m", file, default_prompt_name="query")
    other = piccolo_jax.Encoder.load(str(other))
    np.testing.assert_allclose(other.encode("天气"), expected, atol=1e-6)
    np.testing.assert_allclose(other.encode("天气", prompt=""), plain, atol=1e-6)


def test_prompts_that_cannot_be_used_are_named(encoder):
    with pytest.raises(UserError, match="prompt_name = 'web': must be one of 'query', 'document'"):
        encoder.encode("a", prompt_name="web")
    with pytest.raises(UserError, match="prompt = 'q' and prompt_name = 'query': give one"):
        encoder.encode("a", prompt="q", prompt_name="query")
    with pytest.raises(UserError, match="prompt: has a lone surrogate"):
        encoder.encode("a", prompt="\ud800")
    with pytest.raises(UserError, match="prompt: is a int"):
        encoder.encode("a", prompt=3)


def test_devices_do_not_matter(encoder, directory, run_python, tmp_path):
    out = tmp_path / "rows.npz"
    run_python("-c", ON_8_DEVICES, small.ROOT / "tests", directory, out, devices=8)
    texts = [text[:n] for text in TEXTS for n in range(1, 40, 3)]
    expected = encoder.encode(texts, dim=7)
    with np.load(out) as found:
        for rows in (found["8x1x1"], found["1x8x1"]):
            np.testing.assert_allclose(rows, expected, atol=1e-5)


def test_programs_stay_few_whatever_is_encoded(directory):
    encoder = piccolo_jax.Encoder.load(directory)
    inner = encoder._encoder
    inner.ladder = dataclasses.replace(inner.ladder, tokens=128)  # so that there are full batches
    rng = random.Random(0)
    for count in (1, 2, 3, 5, 8, 13, 50, 90, 4, 89, *range(1, 20)):
        texts = [rng.choice(TEXTS)[: rng.randint(0, 60)] for _ in range(count)]
        encoder.encode(texts, dim=1 + count % 7)
    assert encoder.most_programs == inner.ladder.most_programs(32) < 20
    compiled = sum(program._cache_size() for program in inner._programs.values())
    assert 3 < compiled <= encoder.most_programs


def test_weights_that_give_no_numbers_are_an_error(directory, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(directory, tmp_path / "m")
    path = tmp_path / "m" / "model.safetensors"
    tensors = load_file(path)
    tensors["encoder.layer.1.output.dense.bias"][3] = np.nan
    save_file(tensors, path)
    with pytest.raises(UserError, match="not finite"):
        piccolo_jax.Encoder.load(tmp_path / "m").encode("a")


def test_types_and_meshes_that_do_not_exist_are_errors(directory):
    with pytest.raises(UserError, match="dtype = 'float16': must be one of auto, float32"):
        piccolo_jax.Encoder.load(directory, dtype="float16")
    with pytest.raises(UserError, match=r"config\.mesh\.data = 3"):
        piccolo_jax.Encoder.load(directory, mesh=MeshConfig(3, 1, 1))
    encoder = piccolo_jax.Encoder.load(directory, dtype="bfloat16")
    assert encoder.encode("天气").dtype == np.float32


def test_the_package_alone_is_light(run_python):
    done = run_python(
        "-c",
        "import sys, piccolo_jax\n"
        "print('jax' in sys.modules, 'numpy' in sys.modules, hasattr(piccolo_jax, 'Encodr'))\n"
        "from piccolo_jax import Encoder\n"
        "print(Encoder.__name__, 'jax' in sys.modules, 'torch' in sys.modules)",
    )
    assert done.stdout.splitlines() == ["False False False", "Encoder True False"]
