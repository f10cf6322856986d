import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piccolo_jax.ops.contrastive import cumulative_log_sum_exp, nested_cosines, paired_cosines

ALL_DIMS = [(10,), (1, 2, 10), (3, 4, 9)]


def vectors(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 10)).astype(np.float32)


def cosines(x, y, d):
    x, y = (v[..., :d].astype(np.float64) for v in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


@pytest.mark.parametrize("dims", ALL_DIMS)
def test_cosines_at_nested_prefixes_are_those_of_the_cut_vectors(dims):
    x, y = vectors(5, 0), vectors(7, 1)
    nested = list(nested_cosines(x, y, dims))
    paired = paired_cosines(x[:, None], y[None], dims)
    assert len(nested) == len(paired) == len(dims)
    for d, a, b in zip(dims, nested, paired, strict=True):
        expected = cosines(x[:, None], y[None], d)
        np.testing.assert_allclose(a, expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(b, expected, rtol=0, atol=1e-6)


def test_pairs_broadcast():
    x, y = vectors(4, 0), vectors(12, 1).reshape(4, 3, 10)
    actual = paired_cosines(x[:, None, :], y, (10,))
    assert actual.shape == (1, 4, 3)
    np.testing.assert_allclose(actual[0], cosines(x[:, None, :], y, 10), atol=1e-6)


def test_coordinates_beyond_the_last_prefix_play_no_part():
    x, y = vectors(3, 0), vectors(3, 1)

    def total(x, y):
        nested = sum(c.sum() for c in nested_cosines(x, y, (2, 6)))
        return nested + paired_cosines(x, y, (2, 6)).sum()

    for gradient in jax.jit(jax.grad(total, (0, 1)))(x, y):
        assert np.any(gradient[:, :6])
        assert not np.any(gradient[:, 6:])


def test_a_zero_vector_has_cosine_0_and_a_finite_gradient():
    x, y = vectors(3, 0), vectors(3, 1)
    x[1], y[2, :4] = 0, 0

    def stacked(x, y):
        return jnp.stack(list(nested_cosines(x, y, (4, 10)))), paired_cosines(x, y, (4, 10))

    nested, paired = stacked(x, y)
    assert not np.any(nested[:, 1])
    assert not np.any(nested[0, :, 2])
    assert not np.any(paired[:, 1])
    assert paired[0, 2] == 0
    jacobians = jax.jit(jax.jacrev(stacked, (0, 1)))(x, y)
    assert all(np.isfinite(j).all() for j in jax.tree.leaves(jacobians))


def test_vectors_of_any_length_have_the_same_cosines():
    x, y = vectors(4, 0), vectors(4, 1)
    scale = np.float32(10.0) ** np.array([-8, -3, 4, 12])[:, None]
    plain, scaled = paired_cosines(x, y, (5, 10)), paired_cosines(x * scale, y, (5, 10))
    np.testing.assert_allclose(plain, scaled, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 13])
def test_cumulative_log_sum_exp_adds_up_numbers_of_any_size(n):
    x = np.random.default_rng(n).uniform(-100, 100, (2, n)).astype(np.float32)
    weight = np.random.default_rng(0).normal(size=(2, n))
    value, gradient = jax.jit(
        jax.value_and_grad(lambda x: (cumulative_log_sum_exp(x) * weight).sum())
    )(x)
    expected = np.logaddexp.accumulate(x.astype(np.float64), axis=1)
    np.testing.assert_allclose(cumulative_log_sum_exp(x), expected, rtol=1e-6)
    np.testing.assert_allclose(value, (expected * weight).sum(), rtol=1e-5)
    share = np.tril(np.exp(x[:, None, :] - expected[:, :, None]))  # of term j in sum i
    np.testing.assert_allclose(gradient, np.einsum("bi,bij->bj", weight, share), atol=1e-4)
