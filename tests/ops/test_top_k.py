import jax
import jax.numpy as jnp
import numpy as np
import pytest

from piccolo_jax.ops import top_k


@pytest.mark.parametrize(("n", "k"), [(1000, 3), (4097, 40), (130, 120), (700, 700), (5000, 1)])
@pytest.mark.parametrize("different", [7, 500, 10**6])
def test_groups_find_what_sorting_all_finds_ties_included(n, k, different):
    rng = np.random.default_rng(n + k)
    x = rng.integers(0, different, (5, n)).astype(np.float32)
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    values, places = jax.jit(top_k.largest_by_groups, static_argnums=1)(jnp.asarray(x), k)
    np.testing.assert_array_equal(places, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


def test_large_rows_are_cut_into_groups_and_small_ones_are_not():
    assert top_k._group_size(65536, 100) > 1
    assert top_k._group_size(65536, 4000) > 1
    assert top_k._group_size(100, 60) == 1
    for n, k in ((65536, 100), (65536, 4000), (9000, 3000), (33, 32)):
        assert n // top_k._group_size(n, k) >= k
