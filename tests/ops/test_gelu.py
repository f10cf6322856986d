"""GELU against the error function in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from piccolo_jax.ops.gelu import gelu

X = np.linspace(-40, 40, 80_001).astype(np.float32)
EXACT = X.astype(np.float64) * 0.5 * (1 + erf(X.astype(np.float64) / np.sqrt(2)))
SLOPE = 0.5 * (1 + erf(X.astype(np.float64) / np.sqrt(2)))
SLOPE += X * np.exp(-0.5 * X.astype(np.float64) ** 2) / np.sqrt(2 * np.pi)


def test_in_float32_value_and_gradient_are_gelu_s_to_rounding():
    y, slope = jax.vmap(jax.value_and_grad(gelu))(jnp.asarray(X))
    # The distribution is a sum with 0.5: its rounding, times x.
    assert (np.abs(y - EXACT) <= 2e-7 * np.abs(X)).all()
    np.testing.assert_allclose(slope, SLOPE, rtol=0, atol=5e-7)


def test_its_gradient_in_bfloat16_is_gelu_s_within_one_rounding():
    x = jnp.asarray(X, jnp.bfloat16)
    slope = np.asarray(jax.vmap(jax.grad(gelu))(x), np.float64)
    wide = np.asarray(x, np.float64)
    exact = 0.5 * (1 + erf(wide / np.sqrt(2)))
    exact += wide * np.exp(-0.5 * wide**2) / np.sqrt(2 * np.pi)
    assert (np.abs(slope - exact) <= 2**-8 * np.abs(exact) + 6e-5).all()


def test_in_bfloat16_it_is_gelu_within_one_rounding():
    x = jnp.asarray(X, jnp.bfloat16)
    y = gelu(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    exact = wide * 0.5 * (1 + erf(wide / np.sqrt(2)))
    # Half a unit in the last of 8 bits, and the approximation's error.
    assert (np.abs(np.asarray(y, np.float64) - exact) <= 2**-8 * np.abs(exact) + 2.6e-5).all()
