import numpy as np

from piccolo_jax.mining import host_search, select


def test_tiles_may_be_of_any_size_and_in_any_number_of_blocks():
    rng = np.random.default_rng(0)
    queries, keys = (rng.integers(-3, 4, (n, 5)).astype(np.float32) for n in (7, 60))
    ends = {0: 5, 5: 50, 50: 60}
    passed = []
    found = host_search.nearest(
        queries, [[0], [5, 50]], lambda start: keys[start : ends[start]], 12, passed.append
    )
    products = queries @ keys.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :12]
    scores, indices = select.unpack(found)
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, order, axis=1))
    assert passed == [7, 7]
