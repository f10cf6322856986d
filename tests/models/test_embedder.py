import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder, pooling_weights

pytestmark = pytest.mark.usefixtures("quick_compiling")

TINY = BertConfig(
    vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, max_positions=40
)
SEGMENTS = np.array([[1, 1, 1, 2, 2, 0], [1, 0, 0, 0, 0, 0], [0] * 6, [1, 2, 3, 3, 3, 3]], np.int32)

FORMULAS = {
    "mean": lambda hidden: hidden.mean(0),
    "cls": lambda hidden: hidden[0],
    "last": lambda hidden: hidden[-1],
}


@pytest.mark.parametrize("pooling", FORMULAS)
def test_pooling_weights_give_the_plain_formula_for_every_segment(pooling):
    hidden = np.random.default_rng(0).normal(size=(4, 6, 8))
    weights = np.asarray(pooling_weights(SEGMENTS, pooling, 4))
    assert weights.shape == (4, 4, 6)
    pooled = weights @ hidden
    for row, segment in np.ndindex(4, 4):
        own = hidden[row][SEGMENTS[row] == segment + 1]
        expected = FORMULAS[pooling](own) if len(own) else np.zeros(8)
        np.testing.assert_allclose(pooled[row, segment], expected, atol=1e-6)


def arrays_of(texts, rows, length):
    arrays = np.zeros((3, len(rows), length), np.int32)
    for r, row in enumerate(rows):
        start = 0
        for s, t in enumerate(row, 1):
            end = start + len(texts[t])
            for array, values in zip(arrays, (texts[t], s, range(len(texts[t]))), strict=True):
                array[r, start:end] = values
            start = end
    return arrays


def jitted(model):
    return (jax.jit(f, static_argnames="num_segments") for f in (model.init, model.apply))


@pytest.mark.parametrize(
    ("pooling", "embed_dim"), [("mean", 0), ("mean", 20), ("cls", 20), ("last", 20)]
)
def test_packing_changes_no_embedding(pooling, embed_dim):
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, 60, n) for n in (5, 1, 9, 4, 12)]
    model = Embedder(TINY, pooling=pooling, embed_dim=embed_dim)
    alone = (*arrays_of(texts, [[0], [1], [2], [3], [4]], 12), np.arange(5, dtype=np.int32))
    init, apply = jitted(model)
    params = init(jax.random.key(0), *alone, num_segments=1)
    assert ("scaling" in params["params"]) == bool(embed_dim)
    expected = apply(params, *alone, num_segments=1)
    assert expected.shape == (5, embed_dim or 32)
    assert expected.dtype == jnp.float32
    assert np.abs(expected[0] - expected[3]).max() > 0.1

    slots = np.array([4, 5, 0, 1, 8], np.int32)  # of texts 0 to 4 in a [3, 4] grid
    together = arrays_of(texts, [[2, 3], [0, 1], [4]], 16)
    actual = apply(params, *together, slots, num_segments=4)
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0)


def test_an_unused_slot_is_finite_wherever_it_points():
    texts = [np.arange(4)]
    model = Embedder(TINY, embed_dim=20)
    slots = np.array([0, 1, 3, 1000, -7], np.int32)
    arrays = arrays_of(texts, [[0], []], 4)
    init, apply = jitted(model)
    params = init(jax.random.key(0), *arrays, slots, num_segments=2)
    assert np.isfinite(apply(params, *arrays, slots, num_segments=2)).all()


def test_unknown_pooling_is_refused():
    with pytest.raises(ValueError, match="'max': must be one of mean, cls, last"):
        pooling_weights(SEGMENTS, "max", 3)


def test_a_new_scaling_layer_keeps_the_cosines_of_the_backbone():
    texts = [np.arange(3, 9), np.arange(5, 17), np.arange(40, 44)]
    arrays = (*arrays_of(texts, [[0], [1], [2]], 12), np.arange(3, dtype=np.int32))
    wide, bare = Embedder(TINY, embed_dim=72), Embedder(TINY)
    init, _ = jitted(wide)
    params = init(jax.random.key(0), *arrays, num_segments=1)["params"]

    def cosines(model, params):
        _, apply = jitted(model)
        x = apply({"params": params}, *arrays, num_segments=1)
        x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
        return x @ x.T

    expected = cosines(bare, {"backbone": params["backbone"]})
    assert 1 - expected.min() > 0.01
    np.testing.assert_allclose(cosines(wide, params), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [72, 8])
def test_a_new_scaling_layer_has_weights_as_large_as_pytorch_s(width):
    texts = (*arrays_of([np.arange(3, 9)], [[0]], 12), np.arange(1, dtype=np.int32))
    init, _ = jitted(Embedder(TINY, embed_dim=width))
    ours = init(jax.random.key(0), *texts, num_segments=1)["params"]["scaling"]["kernel"]
    theirs = torch.nn.Linear(TINY.hidden_size, 10_000).weight.detach().numpy()
    np.testing.assert_allclose(np.square(ours).mean(), np.square(theirs).mean(), rtol=0.02)
