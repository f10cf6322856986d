"""GELU by the tangent against the error function, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import erf

from piccolo_jax.ops.gelu import gelu

X = np.linspace(-40, 40, 80_001).astype(np.float32)
EXACT = X.astype(np.float64) * 0.5 * (1 + erf(X.astype(np.float64) / np.sqrt(2)))
SLOPE = 0.5 * (1 + erf(X.astype(np.float64) / np.sqrt(2)))
SLOPE += X * np.exp(-0.5 * X.astype(np.float64) ** 2) / np.sqrt(2 * np.pi)


def test_gelu_is_within_the_error_that_it_states():
    error = np.abs(gelu(jnp.asarray(X)) - EXACT)
    # Beside the approximation's, the rounding of a float32 as large as x.
    assert (error <= 2.6e-5 + 2e-7 * np.abs(X)).all()


def test_its_gradient_is_that_of_gelu():
    slope = jax.vmap(jax.grad(gelu))(jnp.asarray(X))
    np.testing.assert_allclose(slope, SLOPE, rtol=0, atol=6e-5)


def test_in_bfloat16_it_is_gelu_within_one_rounding():
    x = jnp.asarray(X, jnp.bfloat16)
    y = gelu(x)
    assert y.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    exact = wide * 0.5 * (1 + erf(wide / np.sqrt(2)))
    # Half a unit in the last of 8 bits, and the approximation's error.
    assert (np.abs(np.asarray(y, np.float64) - exact) <= 2**-8 * np.abs(exact) + 2.6e-5).all()
