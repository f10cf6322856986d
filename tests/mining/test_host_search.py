import numpy as np
import pytest

from piccolo_jax.mining import host_search, select


def test_tiles_may_be_of_any_size_and_in_any_number_of_blocks():
    rng = np.random.default_rng(0)
    queries, keys = (rng.integers(-3, 4, (n, 5)).astype(np.float32) for n in (7, 60))
    ends = {0: 5, 5: 50, 50: 60}
    passed = []
    scores, indices = host_search.nearest(
        queries, [[0], [5, 50]], lambda start: keys[start : ends[start]], 12, passed.append
    )
    products = queries @ keys.T
    order = np.argsort(-products, axis=1, kind="stable")[:, :12]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(scores, np.take_along_axis(products, order, axis=1))
    assert passed == [7, 7]


@pytest.mark.parametrize("blocks", [[[0, 2000, 4000]], [[0], [2000], [4000]]])
@pytest.mark.parametrize("best_keys", ["everywhere", "in the sample", "elsewhere"])
def test_neighbours_are_exact_wherever_the_best_keys_lie(best_keys, blocks, monkeypatch):
    rng = np.random.default_rng(0)
    num_keys, k = 6000, 60
    queries = np.eye(4, dtype=np.float32)
    keys = rng.random((num_keys, 4)).astype(np.float32)
    sampled = np.arange(num_keys) % 2000 % 32 == 16
    keys[{"everywhere": [], "in the sample": sampled, "elsewhere": ~sampled}[best_keys]] += 1
    made = []
    largest = select.Largest
    monkeypatch.setattr(select, "Largest", lambda *a: made.append(a) or largest(*a))
    _, indices = host_search.nearest(
        queries, blocks, lambda at: keys[at : at + 2000], k, lambda _: None
    )
    again = best_keys == "in the sample"  # where the first block's floor is too high
    assert len(made) == len(blocks) + again
    np.testing.assert_array_equal(indices, np.argsort(-keys.T, axis=1, kind="stable")[:, :k])
