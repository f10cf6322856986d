import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from piccolo_jax.errors import UserError
from piccolo_jax.models.bert import BertConfig, BertEncoder, _dense_on_cpu, unstack
from piccolo_jax.models.pretrained import load_params, read_spec
from piccolo_jax.ops.dropout import dropout

pytestmark = pytest.mark.usefixtures("quick_compiling")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
TINY = BertConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=40
)


def packed(texts, length, rows):
    """Texts as arrays [rows, length]; `rows` lists which texts are in each row, in order."""
    arrays = np.zeros((3, len(rows), length), np.int32)
    places = {}
    for r, row in enumerate(rows):
        start = 0
        for s, t in enumerate(row, 1):
            end = start + len(texts[t])
            for array, values in zip(arrays, (texts[t], s, range(len(texts[t]))), strict=True):
                array[r, start:end] = values
            places[t] = r, slice(start, end)
            start = end
    return arrays, places


def random_model(kind, tmp_path, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **changes})
    model = getattr(transformers, f"{kind}Model")(config).eval()
    for parameter in model.parameters():  # far from the start, where biases are 0
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path)
    return model


def torch_hidden(model, texts, length):
    """Hidden states of each text alone, padded to `length` with a word that is not the pad."""
    hidden = []
    for text in texts:
        ids = torch.full((1, length), model.config.pad_token_id)
        ids[0, : len(text)] = torch.tensor(text)
        mask = (torch.arange(length) < len(text)).long()[None]
        with torch.no_grad():
            hidden.append(model(ids, attention_mask=mask).last_hidden_state[0, : len(text)].numpy())
    return hidden


def assert_equals_torch(model, directory, texts, length, rows):
    spec = read_spec(directory)
    params = load_params(directory, spec.backbone)["backbone"]
    expected = torch_hidden(model, texts, length)
    encode = jax.jit(BertEncoder(spec.backbone).apply)
    alone = [[t] for t in range(len(texts))]
    for layout in (alone, rows + [[]] * (len(alone) - len(rows))):
        arrays, places = packed(texts, length, layout)
        hidden = encode({"params": params}, *arrays)
        for t, (row, span) in places.items():
            np.testing.assert_allclose(hidden[row, span], expected[t], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Bert", {}),
        ("Bert", {"hidden_act": "gelu_new", "layer_norm_eps": 1e-3}),
        ("Bert", {"hidden_act": "relu", "type_vocab_size": 1}),
        ("Roberta", {"pad_token_id": 1, "type_vocab_size": 1}),
        ("XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}),
    ],
)
def test_hidden_states_equal_those_of_transformers_packed_and_unpacked(kind, changes, tmp_path):
    model = random_model(kind, tmp_path, **changes)
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, 60, n).tolist() for n in (9, 1, 20, 5, 30)]
    assert_equals_torch(model, tmp_path, texts, 32, [[2, 0, 1], [4], [3]])


def test_hidden_states_of_a_real_model_equal_those_of_transformers(shared):
    directory = shared / "models" / "e5-small-zh"
    model = transformers.BertModel.from_pretrained(directory, dtype=torch.float32).eval()
    rng = np.random.default_rng(1)
    texts = [[0, *rng.integers(4, 43238, n).tolist(), 2] for n in (30, 3, 14)]
    assert_equals_torch(model, directory, texts, 64, [[0, 1, 2]])


@pytest.fixture(scope="module")
def params():
    tokens = jnp.zeros((1, 16), jnp.int32)
    return jax.jit(BertEncoder(TINY).init)(jax.random.key(0), tokens, tokens, tokens)


def test_a_text_may_contain_the_pad_token(params):
    encode = jax.jit(BertEncoder(TINY).apply)
    texts = [[5, 0, 6, 0], [5, 0, 9, 0], [7, 8]]
    together, places = packed(texts, 10, [[0, 2], [1]])
    hidden = encode(params, *together)
    alone, _ = packed(texts[:1], 4, [[0]])
    expected = encode(params, *alone)[0]
    np.testing.assert_allclose(hidden[places[0]], expected, atol=1e-5, rtol=0)
    # The last token, a pad, sees and is seen.
    assert np.abs(hidden[places[1]][3] - expected[3]).max() > 1e-4


@pytest.fixture(scope="module")
def loss():
    """Loss on the hidden states of texts, two rows being empty: params, **options -> scalar."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 60, n).tolist() for n in (5, 7, 3, 12)]
    arrays, _ = packed(texts, 16, [[0, 1], [2], [], [3], []])
    target = jnp.asarray(rng.normal(size=(5, 16, 32)), jnp.float32)

    def loss(params, dropout=False, config=TINY, **options):
        key = jax.random.key(1) if dropout else None
        if options.get("unrolled"):
            params = {"params": unstack(params["params"], config.num_layers)}
        hidden = BertEncoder(config, **options).apply(params, *arrays, key=key)
        return jnp.where(arrays[1][..., None] > 0, hidden * target, 0).sum()

    return loss


@pytest.fixture(scope="module")
def plain(loss, params):
    return value_and_grad(loss, params)


def value_and_grad(loss, params, **options):
    """With dropout, whose numbers must not depend on the options either."""
    function = functools.partial(loss, dropout=True, **options)
    return jax.jit(jax.value_and_grad(function))(params)


def assert_same(actual, expected, tolerance=1e-5):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, atol=tolerance * largest, rtol=0)


@pytest.mark.parametrize(
    "options",
    [
        {"remat": "dots"},
        {"remat": "full", "for_cpu": True},
        {"remat": "dots", "for_cpu": True},
        {"for_cpu": True},
        {"unrolled": True, "remat": "dots"},
    ],
)
def test_rematerialisation_operations_for_cpus_and_unrolling_change_no_value_and_no_gradient(
    loss, params, plain, options
):
    assert_same(value_and_grad(loss, params, **options), plain)


def test_gradients_are_finite_and_reach_every_parameter_that_is_used(plain):
    grads = plain[1]["params"]
    assert all(bool(jnp.isfinite(g).all()) for g in jax.tree.leaves(grads))
    for path, grad in jax.tree.leaves_with_path(grads):
        if "'key'" not in str(path):  # softmax doesn't see the bias of the keys
            assert float(jnp.abs(grad).max()) > 1e-3, path


def test_dropout_of_each_kind_acts_in_training_only(loss, params):
    loss = jax.jit(loss, static_argnames=("dropout", "config"))
    still = loss(params, config=TINY)
    none = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = dataclasses.replace(TINY, **none)
    assert loss(params, dropout=True, config=config) == still
    for field in none:
        config = dataclasses.replace(TINY, **{**none, field: 0.5})
        assert loss(params, dropout=False, config=config) == still
        assert abs(loss(params, dropout=True, config=config) - still) > 1e-3


def test_dropout_zeroes_its_share_and_keeps_the_mean():
    x = jnp.ones((64, 40, 50))
    for rate in (0.1, 0.5):
        y = np.asarray(
            jax.jit(dropout, static_argnums=1)(
                x, rate, jax.random.key(0), jnp.arange(64 * 40).reshape(64, 40)
            )
        )
        assert set(np.unique(y)) == {0, np.float32(1) / np.float32(1 - rate)}
        # 5 standard deviations of a share of independent draws: of all, of a row, of a place.
        for axes, count in (((0, 1, 2), x.size), ((1, 2), 2000), (0, 64)):
            off = np.abs((y == 0).mean(axes) - rate)
            assert off.max() < 5 * np.sqrt(rate * (1 - rate) / count)


def test_dropout_of_tokens_places_and_keys_is_independent():
    x = jnp.ones((2, 100_000))

    def zeros(seed, tokens=(0, 1)):
        return np.asarray(dropout(x, 0.5, jax.random.key(seed), jnp.array(tokens))) == 0

    first = zeros(0)
    pairs = {
        "tokens": (first[0], first[1]),
        "distant tokens": (first[0], zeros(0, (2**20, 3))[0]),
        "keys": (first[0], zeros(1)[0]),
        "neighbours": (first[0, 1:], first[0, :-1]),
        "even and odd places": (first[0, ::2], first[0, 1::2]),
        "halves": (first[0, :50_000], first[0, 50_000:]),
    }
    for name, (a, b) in pairs.items():
        # The share of equal bits lies within 5 standard deviations of a half.
        assert abs((a == b).mean() - 0.5) < 5 * 0.5 / np.sqrt(a.size), name


def test_tokens_of_a_text_drop_different_values(params):
    table = params["params"]["position_embeddings"]["embedding"]
    same = {"params": params["params"] | {"position_embeddings": {"embedding": table * 0}}}
    arrays, _ = packed([[5, 5, 5]], 4, [[0]])
    encode = jax.jit(BertEncoder(TINY).apply)
    still, dropped = encode(same, *arrays)[0], encode(same, *arrays, key=jax.random.key(0))[0]
    for place in (1, 2):
        np.testing.assert_allclose(still[place], still[0], rtol=0, atol=1e-5)
        assert np.abs(dropped[place] - dropped[0]).max() > 0.1


def test_a_text_keeps_its_dropout_in_any_company(params):
    texts, key = [[5, 9, 6, 3], [7, 8], [1, 2, 3]], jax.random.key(2)
    encode = jax.jit(functools.partial(BertEncoder(TINY).apply, key=key))
    found = []
    for length, rows in ((4, [[0], [1], [2]]), (16, [[2, 1], [0]]), (9, [[1, 2, 0]])):
        arrays, places = packed(texts, length, rows)
        numbers = np.zeros(arrays[0].shape, np.int32)
        for number, place in places.items():
            numbers[place] = number
        hidden = encode(params, *arrays, numbers)
        found.append([np.asarray(hidden[places[number]]) for number in range(3)])
    for others in found[1:]:
        for expected, actual in zip(found[0], others, strict=True):
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    assert np.abs(encode(params, *arrays, numbers + 1) - hidden).max() > 0.1


@pytest.mark.parametrize("options", [{}, {"for_cpu": True}, {"for_cpu": True, "remat": "dots"}])
def test_bfloat16_products_stay_near_float32_and_gradients_are_float32(
    loss, params, plain, options
):
    _, grads = value_and_grad(loss, params, dtype=jnp.bfloat16, **options)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    assert_same(grads, plain[1], tolerance=0.05)
    with pytest.raises(AssertionError):
        assert_same(grads, plain[1], tolerance=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_remat_of_dots_computes_no_product_with_a_parameter_again(loss, params, dtype):
    def products(remat):
        step = functools.partial(loss, dtype=dtype, remat=remat, for_cpu=True)
        return str(jax.make_jaxpr(jax.grad(step))(params)).count(" dot_general[")

    assert products("dots") == products("none") < products("full")


def test_on_a_cpu_bfloat16_is_kept_as_integers_and_what_products_take_in_memory(loss, params):
    """docs/benchmarks.md: what XLA for CPUs is slow without."""

    def program(dtype):
        step = functools.partial(loss, dtype=dtype, remat="dots", for_cpu=True)
        return str(jax.make_jaxpr(jax.grad(step))(params))

    # Of both layers, [2, rows, length, hidden or inner].
    assert "u16[2,5,16,32]" in program(jnp.bfloat16)
    assert "u16[2,5,16,48]" in program(jnp.bfloat16)
    assert "layout_constraint" in program(jnp.bfloat16)
    assert "layout_constraint" not in program(jnp.float32)


def test_bfloat16_on_a_mesh_of_cpus_needs_the_collectives_of_float32(run_python):
    script = Path(__file__).with_name("bfloat16_on_a_mesh.py")
    difference, *collectives = run_python(script, devices=4).stdout.splitlines()
    assert float(difference) < 0.02  # sums of rounded numbers in another order
    assert len(collectives) == 2
    assert collectives[0] == collectives[1] != "[]"


@pytest.mark.parametrize("shape", [(2, 16, 24, 40), (1, 1, 8, 1), (1, 5, 3, 7)])
def test_the_dense_layer_for_cpus_is_exact_but_for_the_rounding_of_its_results(shape):
    rows, length, inputs, outputs = shape
    rng = np.random.default_rng(0)

    def draw(*sizes, dtype=jnp.float32):
        return jnp.asarray(rng.normal(size=sizes), dtype)

    x = draw(rows, length, inputs, dtype=jnp.bfloat16)
    kernel, bias = draw(inputs, outputs), draw(outputs)
    gradient = draw(rows, length, outputs, dtype=jnp.bfloat16)
    y, pull_back = jax.vjp(jax.jit(_dense_on_cpu), x, kernel, bias)
    actual = (y, *pull_back(gradient))
    assert [a.dtype for a in actual] == [jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32]
    rounded = kernel.astype(jnp.bfloat16)
    x, kernel, gradient, bias = (np.float64(a) for a in (x, rounded, gradient, bias))
    expected = (
        (x @ kernel + bias, 2**-8),  # bfloat16 rounds by 2^-9 of a number, sums are float32
        (gradient @ kernel.T, 2**-8),
        (np.einsum("rli,rlo->io", x, gradient), 1e-5),
        (gradient.sum((0, 1)), 1e-5),
    )
    for a, (e, tolerance) in zip(actual, expected, strict=True):
        np.testing.assert_allclose(np.float64(a), e, rtol=0, atol=tolerance * np.abs(e).max())


def hf_config(**changes):
    return {"model_type": "bert", "type_vocab_size": 2, **SIZES, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type = 'gpt2': must be one of 'bert', 'roberta', 'xlm-rob"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"is_decoder": True}, "is_decoder = True"),
        ({"hidden_act": "silu"}, "hidden_act = 'silu': must be one of 'gelu'"),
        ({"vocab_size": None}, "vocab_size = None: must be an integer"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5: must be a divisor"),
        ({"model_type": "roberta", "pad_token_id": 39}, "max_position_embeddings = 40: must be"),
        ({"model_type": "roberta", "pad_token_id": None}, "pad_token_id = None: must be an int"),
        ({"pad_token_id": "1"}, "pad_token_id = '1': must be an integer"),
        ({"pad_token_id": -1}, "pad_token_id = -1: must be an integer"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True: must be an integer"),
        ({"initializer_range": "x"}, "initializer_range = 'x': must be a number"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=r"^a/config\.json: ") as error:
        BertConfig.from_hf(hf_config(**changes), source="a/config.json")
    assert message in str(error.value)


def test_a_pad_token_that_is_not_said_is_that_of_the_model_type():
    for model_type, pad in (("bert", 0), ("roberta", 1), ("xlm-roberta", 1)):
        values = hf_config(model_type=model_type)
        values.pop("pad_token_id", None)
        theirs = transformers.AutoConfig.for_model(**values).pad_token_id
        assert BertConfig.from_hf(values).pad_token_id == theirs == pad
    assert BertConfig.from_hf(hf_config(pad_token_id=None)).pad_token_id == 0


def test_config_survives_the_way_to_hugging_face_and_back():
    values = hf_config(model_type="xlm-roberta", pad_token_id=1, hidden_dropout_prob=0.25)
    config = BertConfig.from_hf(values)
    assert (config.position_offset, config.max_positions) == (2, 38)
    assert BertConfig.from_hf(config.to_hf()) == config
    theirs = transformers.AutoConfig.for_model(**config.to_hf())
    assert theirs.max_position_embeddings == 40
    assert theirs.architectures == ["XLMRobertaModel"]
    assert theirs.hidden_dropout_prob == 0.25
