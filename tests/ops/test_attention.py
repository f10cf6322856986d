"""The attention kernel, in Pallas's interpreter, and attention by rows, against plain XLA."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from piccolo_jax.ops.attention import SOFTMAX, attention
from piccolo_jax.ops.dropout import bits_of

pytestmark = pytest.mark.usefixtures("quick_compiling")

ROWS, LENGTH = 2, 32


def arrays(hidden):
    rng = np.random.default_rng(0)
    query, key, value = rng.normal(size=(3, ROWS, LENGTH, hidden)).astype(np.float32)
    # Texts of several lengths, and padding.
    segments = np.array([[1] * 5 + [2] * 20 + [3] + [0] * 6, [1] * LENGTH], np.int32)
    cotangent = rng.normal(size=(ROWS, LENGTH, hidden)).astype(np.float32)
    return (query, key, value), segments, jnp.where(segments[..., None] > 0, cotangent, 0)


@pytest.mark.parametrize(("heads", "hidden"), [(4, 256), (2, 256), (3, 48)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_kernel_is_attention_in_value_and_gradient(heads, hidden, rate):
    inputs, segments, cotangent = arrays(hidden)
    bits = bits_of(jax.random.key(0), jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH))

    def run(kernel):
        def scalar(inputs):
            y = attention(*inputs, segments, bits, heads=heads, rate=rate, kernel=kernel)
            return (y * cotangent).sum(), jnp.where(segments[..., None] > 0, y, 0)

        (_, y), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)
        return y, *gradients

    expected = run(False)
    with pltpu.force_tpu_interpret_mode():
        actual = run(True)
    for a, e in zip(actual, expected, strict=True):
        # Sums of 32 terms in another order, exp2 in place of exp: a few bits of float32.
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("mesh", ["1x2x2", "1x1x3"])  # 4 heads, which 3 parts don't divide
def test_every_device_drops_what_its_own_heads_drop_on_one(run_python, mesh):
    script = Path(__file__).with_name("attention_on_meshes.py")
    differences = run_python(script, mesh, devices=4).stdout.split()
    assert len(differences) == 4
    assert max(map(float, differences)) < 1e-6  # a few bits of float32


# Of 3 rows, all (16, 134), 2 and 1, and 1 at a time.
@pytest.mark.parametrize("length", [16, 134, 170, 192])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_by_rows_is_attention_in_value_and_gradient(length, rate):
    rng = np.random.default_rng(0)
    inputs = tuple(rng.normal(size=(3, 3, length, 12)).astype(np.float32))
    segments = np.minimum(np.arange(length) // 11 + 1, 7)[None].repeat(3, 0)
    segments[1] = 1
    segments[2, length // 2 :] = 0
    cotangent = rng.normal(size=inputs[0].shape).astype(np.float32)

    bits = bits_of(jax.random.key(0), jnp.arange(3 * length).reshape(3, length))

    def run(by_rows):
        def scalar(inputs):
            y = attention(
                *inputs, segments, bits, heads=3, rate=rate, kernel=False, by_rows=by_rows
            )
            return (y * cotangent).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(scalar, has_aux=True))(inputs)
        return y, *gradients

    for a, e in zip(run(True), run(False), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


@pytest.mark.parametrize("by_rows", [False, True])
def test_a_text_keeps_its_dropped_weights_wherever_it_lies(by_rows):
    x = np.random.default_rng(0).normal(size=(1, 30, 12)).astype(np.float32)
    bits = bits_of(jax.random.key(0), jnp.arange(30))[None]
    places = np.r_[40:70]  # of the same text in a longer row

    def run(x, segments, bits):
        y = attention(x, x, x, segments, bits, heads=3, rate=0.5, kernel=False, by_rows=by_rows)
        return np.asarray(y)

    alone = run(x, np.ones((1, 30), np.int32), bits)
    row, row_bits = np.ones((1, 96, 12), np.float32), np.zeros((1, 96), np.uint32)
    row[:, places], row_bits[:, places] = x, bits
    segments = np.ones((1, 96), np.int32)
    segments[:, places] = 2
    np.testing.assert_allclose(run(row, segments, row_bits)[:, places], alone, rtol=0, atol=1e-5)
    assert np.abs(alone - run(x, segments[:, :30], bits + 1)).max() > 0.1


def test_attention_by_rows_in_bfloat16_is_attention_within_its_rounding():
    inputs, segments, cotangent = arrays(48)
    inputs = tuple(jnp.asarray(x, jnp.bfloat16) for x in inputs)

    def run(by_rows):
        def scalar(inputs):
            y = attention(*inputs, segments, None, heads=3, rate=0.3, kernel=False, by_rows=by_rows)
            assert y.dtype == jnp.bfloat16
            return (y * cotangent).sum()

        return jax.jit(jax.grad(scalar))(inputs)

    for a, e in zip(run(True), run(False), strict=True):
        assert a.dtype == jnp.bfloat16
        a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
        np.testing.assert_allclose(a, e, rtol=0, atol=2**-6 * np.abs(e).max())


def test_the_backward_pass_by_rows_computes_scores_once_from_what_is_kept():
    inputs, segments, _ = arrays(48)
    kept = jax.checkpoint_policies.save_only_these_names(SOFTMAX)

    def scalar(inputs):
        return attention(
            *inputs, segments, None, heads=3, rate=0.0, kernel=False, by_rows=True
        ).sum()

    def exps(policy):
        gradient = jax.grad(jax.checkpoint(scalar, policy=policy))
        return str(jax.make_jaxpr(gradient)(inputs)).count(" exp ")

    assert exps(jax.checkpoint_policies.nothing_saveable) == exps(kept) + 1
