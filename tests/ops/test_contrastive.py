import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contrastive_on_meshes import BLOCKS, DIMS, KEYS, MESHES, TEMPERATURE, arrays
from small import OLDER_FUSIONS

from piccolo_jax.ops.contrastive import (
    cumulative_log_sum_exp,
    nested_cosines,
    nested_log_sum_exp,
    paired_cosines,
    take,
)

ALL_DIMS = [(10,), (1, 2, 10), (3, 4, 9)]


def vectors(n, seed):
    return np.random.default_rng(seed).normal(size=(n, 10)).astype(np.float32)


def cosines(x, y, d):
    x, y = (v[..., :d].astype(np.float64) for v in (x, y))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


@pytest.mark.parametrize("dims", ALL_DIMS)
def test_cosines_at_nested_prefixes_are_those_of_the_cut_vectors(dims):
    x, y = vectors(5, 0), vectors(7, 1)
    nested = nested_cosines(x, y, dims)
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
        nested = nested_cosines(x, y, (2, 6)).sum()
        return nested + paired_cosines(x, y, (2, 6)).sum()

    for gradient in jax.jit(jax.grad(total, (0, 1)))(x, y):
        assert np.any(gradient[:, :6])
        assert not np.any(gradient[:, 6:])


def test_a_zero_vector_has_cosine_0_and_a_finite_gradient():
    x, y = vectors(3, 0), vectors(3, 1)
    x[1], y[2, :4] = 0, 0

    def stacked(x, y):
        return nested_cosines(x, y, (4, 10)), paired_cosines(x, y, (4, 10))

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


def naive(queries, keys, weights, keep, dims, temperature):
    """log of the weighted sum of exp(cosine / temperature), written out; [dims, queries]."""
    values = []
    for d in dims:
        x, y = queries[:, :d], keys[:, :d]
        x = x / jnp.sqrt((x * x).sum(1, keepdims=True))
        y = y / jnp.sqrt((y * y).sum(1, keepdims=True))
        logits = jnp.where(keep, x @ y.T / temperature + jnp.log(weights), -jnp.inf)
        values.append(jax.nn.logsumexp(logits, axis=1))
    return jnp.stack(values)


@functools.cache
def in_float64(keys):
    """Value, and gradients of a weighted sum of it, of naive() on the arrays."""
    with jax.enable_x64(True):
        queries, all_keys, weights, keep, factors = (np.asarray(a, np.float64) for a in arrays())

        def scalar(q, k):
            value = naive(q, k, weights[:keys], keep[:, :keys] > 0, DIMS, TEMPERATURE)
            return (value * factors).sum(), value

        run = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))
        (_, value), gradients = run(queries, all_keys[:keys])
        return [np.asarray(x) for x in (value, *gradients)]


@pytest.fixture(scope="module")
def on_meshes(run_python, tmp_path_factory):
    """What contrastive_on_meshes.py wrote, and its stderr."""
    out = tmp_path_factory.mktemp("contrastive") / "out.npz"
    script = Path(__file__).with_name("contrastive_on_meshes.py")
    done = run_python(script, out, devices=8, xla_flags=OLDER_FUSIONS)
    return dict(np.load(out)), done.stderr


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("mesh", MESHES)
def test_blocks_and_meshes_give_the_log_sum_exp_and_gradient_of_the_plain_formula(
    on_meshes, mesh, block, keys
):
    # float32 has 24 bits, 6e-8: a few of them per result.
    for name, expected in zip(("value", "queries", "keys"), in_float64(keys), strict=True):
        actual = on_meshes[0][f"{mesh}/{block}/{keys}/{name}"]
        np.testing.assert_allclose(
            actual, expected, rtol=0, atol=1e-6 * np.abs(expected).max(), err_msg=name
        )


def test_the_programs_hold_the_collectives_that_the_docstrings_name(on_meshes):
    found, errors = on_meshes
    assert "Involuntary full rematerialization" not in errors
    moves = {name: set(v.tolist()) for name, v in found.items() if name.endswith("collectives")}
    gather, scatter = "all-gather 1", "reduce-scatter 1"
    expected = {
        f"{block}/{way}/collectives": collectives
        for block in BLOCKS
        for way, collectives in (("value", {gather}), ("gradient", {gather, scatter}))
    } | {
        "take/value/collectives": {gather},
        "take/gradient/collectives": {scatter},
        # The compiler sees that take() and one block of keys gather the same.
        "info_nce/value/collectives": {gather, "all-reduce 1"},
        "info_nce/gradient/collectives": {gather, "reduce-scatter 2"},
        "cosent/value/collectives": {"all-gather 2"},
        "cosent/gradient/collectives": {"all-gather 2", scatter},
        "label_contrast/value/collectives": {gather, "all-reduce 1"},
        "label_contrast/gradient/collectives": {gather, scatter},
    }
    assert moves == expected


def test_a_key_without_weight_may_hold_anything():
    x, y = vectors(3, 0), vectors(4, 1)
    weights, keep = np.array([1, 0, 2, 1], np.float32), np.ones((3, 4), bool)

    def value(y):
        found = nested_log_sum_exp(
            x, y, weights, keep, dims=(4, 10), score=lambda c: c / 0.1, block_size=2
        )
        return found.value.sum(), found.nearest

    expected = jax.value_and_grad(value, has_aux=True)(y)
    y[1] = np.nan
    actual = jax.value_and_grad(value, has_aux=True)(y)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_vectors_in_bfloat16_are_computed_with_in_float32():
    x = np.random.default_rng(0).normal(size=(7, 6)).astype(jnp.bfloat16)

    @jax.jit
    def run(x):
        return nested_log_sum_exp(
            x[:3], x, jnp.ones(7), jnp.ones((3, 7), bool), dims=(2, 6), score=lambda c: 9 * c,
            block_size=2,
        ).value  # fmt: skip

    np.testing.assert_array_equal(run(x), run(x.astype(np.float32)))


def test_a_query_without_keys_has_no_sum_and_moves_nothing():
    x, y, keep = vectors(2, 0), vectors(3, 1), np.array([[0, 0, 0], [1, 0, 1]], bool)

    def value(x, y):
        found = nested_log_sum_exp(
            x, y, np.ones(3, np.float32), keep, dims=(10,), score=lambda c: c / 0.1, block_size=0
        )
        return jnp.logaddexp(0.0, found.value).sum(), found

    (_, found), gradients = jax.value_and_grad(value, (0, 1), has_aux=True)(x, y)
    assert found.value[0, 0] == found.nearest[0] == -np.inf
    assert np.isfinite(found.value[0, 1])
    assert all(np.isfinite(g).all() for g in gradients)
    assert not np.any(gradients[0][0])


@pytest.mark.parametrize("block", [0, 2])
def test_a_limit_leaves_out_what_is_nearer_and_counts_it(block):
    x, y = vectors(6, 0), vectors(9, 1)
    exact, keep = cosines(x[:, None], y[None], 10), np.arange(9)[None] != np.arange(6)[:, None]
    limit = np.linspace(-0.2, 0.4, 6).astype(np.float32)
    weights = np.ones(9, np.float32)
    found = nested_log_sum_exp(
        x, y, weights, keep, limit, dims=(3, 10), score=lambda c: c / 0.1, block_size=block
    )
    kept = keep & (exact <= limit[:, None])
    assert 0 < kept.sum() < keep.sum()
    expected = naive(x, y, weights, kept, (3, 10), 0.1)
    np.testing.assert_allclose(found.value, expected, rtol=1e-5)
    np.testing.assert_array_equal(found.too_near, (keep & ~kept).sum(1))
    np.testing.assert_allclose(found.nearest, np.where(kept, exact, -np.inf).max(1), atol=1e-6)


def test_take_is_indexing():
    x, index = vectors(5, 0), np.array([[4, 0], [2, 2], [1, 3]])
    np.testing.assert_array_equal(take(x, index), x[index])
