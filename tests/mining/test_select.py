import numpy as np
import pytest

from piccolo_jax.mining import select


def test_packing_keeps_every_bit_and_the_order():
    scores = np.float32([np.inf, 1.5, 1.5, 1e-40, 0.0, -0.0, -1e-40, -1.5, -3e38])
    indices = np.array([7, 3, 4, 0, 1, 2**32 - 2, 5, 6, 9])
    packed = select.pack(scores, indices)
    assert (np.diff(packed.astype(object)) > 0).all()
    back, places = select.unpack(packed)
    np.testing.assert_array_equal(places, indices)
    np.testing.assert_array_equal(back, scores)


def test_what_scores_minus_infinity_is_nobody():
    packed = select.pack(np.float32([-np.inf, -3e38]), np.array([3, 4]))
    scores, indices = select.unpack(packed)
    assert indices.tolist() == [-1, 4]
    assert scores[0] == -np.inf
    assert packed[0] == packed.max()


@pytest.mark.parametrize("k", [1, 5, 64, 150, 400, 1000])
@pytest.mark.parametrize("kind", ["distinct", "ties", "equal", "rising", "negative"])
def test_the_largest_over_all_tiles_are_found_ties_by_index(k, kind):
    rng = np.random.default_rng(k)
    x = {
        "distinct": lambda: rng.normal(size=(6, 500)),
        "ties": lambda: rng.integers(0, 9, (6, 500)),
        "equal": lambda: np.zeros((6, 500)),
        "rising": lambda: np.arange(3000).reshape(6, 500),
        "negative": lambda: -rng.random((6, 500)) - 1,
    }[kind]()
    x = x.astype(np.float32)
    largest = select.Largest(np.full((6, k), select.NONE))
    for start in range(0, 300, 64):
        largest.add(x[:, start : min(start + 64, 300)].copy(), 1000 + start)
    largest = select.Largest(largest.best())  # goes on from where another stopped
    largest.add(x[:, 300:].copy(), 1300)
    scores, indices = select.unpack(largest.best())
    order = np.argsort(-x, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(indices[:, : order.shape[1]], order + 1000)
    np.testing.assert_array_equal(scores[:, : order.shape[1]], np.take_along_axis(x, order, axis=1))
    assert (indices[:, order.shape[1] :] == -1).all()


@pytest.fixture
def packed_numbers(monkeypatch):
    """How many numbers are packed, call by call."""
    pack, sizes = select.pack, []
    monkeypatch.setattr(select, "pack", lambda x, at: sizes.append(x.size) or pack(x, at))
    return sizes


def test_little_is_kept_of_what_is_looked_at(packed_numbers):
    x = np.random.default_rng(0).normal(size=(8, 20_000)).astype(np.float32)
    floor = select.floor(x[:, 15::31].copy(), x.shape[1], 200)
    best = np.full((8, 200), select.NONE)
    for half in (0, 10_000):  # the second goes on from the thresholds of the first
        largest = select.Largest(best, floor)
        for start in range(half, half + 10_000, 1000):
            largest.add(x[:, start : start + 1000].copy(), start)
        best = largest.best()
    assert largest.full()
    # Six of the sample belong to the 200; the floor is at its 21st. Without, 10,000 come by above a
    # threshold before the first is taken at 600.
    assert sum(packed_numbers) / 8 < 800
    np.testing.assert_array_equal(select.unpack(best)[0], -np.sort(-x, axis=1)[:, :200])


@pytest.mark.parametrize(("num_keys", "k"), [(20_000, 100), (100_000, 1000), (1_000_000, 5000)])
def test_a_floor_is_below_the_kth_largest_but_once_in_100_000_rows(num_keys, k):
    rng = np.random.default_rng(0)
    # Of uniform scores the r-th largest of n in a sample is Beta(n + 1 - r, r): how many of the
    # others are above it is binomial.
    sample = rng.random((1000, 2048)).astype(np.float32)
    above = rng.binomial(num_keys, 1 - select.floor(sample, num_keys, k))
    assert above.min() >= k
    assert above.mean() < 6 * k


def test_no_floor_where_the_sample_is_too_small():
    assert select.floor(np.zeros((3, 10), np.float32), 320, 100) is None
    assert select.floor(np.zeros((3, 0), np.float32), 20, 1) is None


def test_equal_scores_that_come_too_late_are_not_looked_at(packed_numbers):
    largest = select.Largest(np.full((4, 10), select.NONE))
    for start in range(0, 640, 64):
        largest.add(np.zeros((4, 64), np.float32), start)
    assert sum(packed_numbers) == 4 * 64


def test_merging_keeps_the_first_of_both():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, (3, 60)).astype(np.float32)
    packed = select.pack(scores, np.tile(np.arange(60), (3, 1)))
    parts = [np.sort(packed[:, :25], axis=1), np.sort(packed[:, 25:], axis=1)]
    np.testing.assert_array_equal(select.merge(*parts, 10), np.sort(packed, axis=1)[:, :10])
