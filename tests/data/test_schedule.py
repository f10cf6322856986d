import itertools
import time

import numpy as np
import pytest

from piccolo_jax.data.schedule import Schedule


def make(weights, seed=0, batch_size=4, sizes=None, totals=()):
    sizes = tuple(sizes or [10] * len(weights))
    return Schedule(seed, (batch_size,) * len(sizes), sizes, tuple(weights), tuple(totals))


def in_order(schedule, steps):
    """(dataset, k) of the first steps, by sorting every dataset's virtual times."""
    shares = np.asarray(schedule.weights) / sum(schedule.weights)
    turns = []
    for d, (share, phase) in enumerate(zip(shares, schedule._phases, strict=True)):
        k = np.arange(int(steps * share) + 2 * len(shares) + 2)
        turns.append(np.stack([(k + phase) / share, np.full(len(k), d), k]))
    time_, dataset, k = np.concatenate(turns, axis=1)
    order = np.lexsort((dataset, time_))[:steps]
    return np.stack([dataset, k], axis=1)[order].astype(int)


@pytest.mark.parametrize("seed", range(6))
def test_any_step_can_be_asked_for_directly(seed):
    rng = np.random.default_rng(seed)
    weights = rng.lognormal(0, 2, rng.integers(1, 40))
    schedule = make(weights, seed)
    steps = 100_000
    expected = in_order(schedule, steps)
    for step in [*range(100), *rng.integers(0, steps, 300).tolist(), steps - 1]:
        assert schedule.at(step) == tuple(expected[step])
        assert make(weights, seed).at(step) == schedule.at(step)
    for step in (0, 1, 17, steps):
        counted = np.bincount(expected[:step, 0], minlength=len(weights))
        assert schedule.uses(step) == counted.tolist()


@pytest.mark.parametrize("datasets", [1, 2, 3, 7, 40])
def test_equal_weights_are_a_round_robin(datasets):
    schedule = make([0.3] * datasets)
    turns = [schedule.at(step) for step in range(5 * datasets)]
    order = [d for d, _ in turns[:datasets]]
    assert sorted(order) == list(range(datasets))
    assert turns == [(d, k) for k in range(5) for d in order]


def test_datasets_get_their_shares_at_every_moment():
    weights = np.asarray([1.0, 2.0, 0.01, 7.0, 1.0])
    schedule, shares = make(weights), weights / weights.sum()
    for step in (1, 10, 101, 1234, 10**5, 10**9):
        assert sum(schedule.uses(step)) == step
        assert (np.abs(schedule.uses(step) - step * shares) < 1 + 5 * shares).all()


def test_weights_are_relative():
    a, b = make([1, 3, 2]), make([10, 30, 20])
    assert [a.at(step) for step in range(60)] == [b.at(step) for step in range(60)]


@pytest.mark.parametrize("step", [10**6, 10**9, 10**11])
def test_far_steps_are_as_quick_as_near_ones(step):
    schedule = make(np.linspace(0.1, 3, 30))
    begin = time.perf_counter()
    before, (dataset, use), after = (
        schedule.uses(step),
        schedule.at(step),
        schedule.uses(step + 1),
    )
    assert time.perf_counter() - begin < 1
    assert before[dataset] == use
    assert [n - m for n, m in zip(after, before, strict=True)] == [
        int(d == dataset) for d in range(30)
    ]


@pytest.mark.parametrize(("size", "batch_size"), [(10, 4), (7, 7), (23, 5), (5, 4)])
def test_each_epoch_has_every_row_once_and_the_rest_begins_the_next_batch(size, batch_size):
    schedule = make([1.0], batch_size=batch_size, sizes=[size])
    rows = np.concatenate([schedule.rows(0, use) for use in range(3 * size)])
    epochs = rows.reshape(-1, size)
    assert len(epochs) == 3 * batch_size
    assert (np.sort(epochs, axis=1) == np.arange(size)).all()
    assert len(set(map(tuple, epochs[:3]))) == 3  # shuffled anew


@pytest.mark.parametrize("size", range(1, 20))
def test_no_batch_has_a_row_twice_and_each_epoch_has_every_row_once(size):
    for batch_size in range(1, size + 1):
        schedule = make([1.0], seed=size, batch_size=batch_size, sizes=[size])
        batches = [schedule.rows(0, use).tolist() for use in range(3 * size)]
        assert all(len(set(rows)) == batch_size for rows in batches)
        epochs = np.concatenate(batches).reshape(-1, size)
        assert (np.sort(epochs, axis=1) == np.arange(size)).all()


def test_batches_across_the_end_of_an_epoch_are_as_random_as_others():
    # 7 rows in batches of 5: rows 5, 6 | 0, 1, 2 in the order of two epochs; every seed another.
    seeds = range(3000)
    across = np.array([make([1.0], seed, 5, [7]).rows(0, 1) for seed in seeds])
    for places, expected in ((slice(0, 2), 2 / 7), (slice(2, 5), 3 / 7)):
        shares = np.bincount(across[:, places].reshape(-1), minlength=7) / len(seeds)
        assert (np.abs(shares - expected) < 0.05).all()
    assert len({tuple(sorted(rows)) for rows in across.tolist()}) == 21  # all sets of 5 of 7


def test_the_rows_of_different_epochs_are_in_different_orders():
    for size, batch_size in ((30, 7), (30, 19), (30, 29), (30, 30)):
        schedule = make([1.0], batch_size=batch_size, sizes=[size])
        rows = np.concatenate([schedule.rows(0, use) for use in range(40)])
        epochs = rows[: len(rows) // size * size].reshape(-1, size)
        assert len(set(map(tuple, epochs.tolist()))) == len(epochs)


def test_heads_of_epochs_twice_as_large_as_a_batch_are_independent():
    schedule = make([1.0], batch_size=50, sizes=[101])
    heads = [set(schedule._head(0, epoch).tolist()) for epoch in range(1, 20)]
    for a, b in itertools.pairwise(heads):
        assert a - b
        assert b - a


@pytest.mark.parametrize(("size", "batch_size"), [(1000, 8), (1001, 8), (1001, 700), (11, 9)])
def test_rows_of_a_far_batch_need_no_earlier_one(size, batch_size):
    schedule = make([1.0], batch_size=batch_size, sizes=[size])
    other = make([1.0], batch_size=batch_size, sizes=[size])
    rows = [other.rows(0, 10**9 + 1), schedule.rows(0, 10**9 + 1)]
    schedule.rows(0, 3)
    rows.append(schedule.rows(0, 10**9 + 1))
    assert all((r == rows[0]).all() for r in rows)
    assert not (schedule.rows(0, 3) == rows[0]).all()
    assert len(set(rows[0].tolist())) == batch_size


def test_a_cap_uses_the_same_random_rows_in_every_epoch():
    schedule = make([1, 1, 1], batch_size=6, sizes=[10, 10, 40], totals=[40, 40, 40])
    used = []
    for dataset in range(3):
        rows = np.concatenate([schedule.rows(dataset, use) for use in range(20)])
        epochs = np.sort(rows.reshape(-1, schedule.sizes[dataset]), axis=1)
        assert (epochs == epochs[0]).all()
        used.append(set(epochs[0].tolist()))
    assert [len(rows) for rows in used] == [10, 10, 40]
    assert used[0] != used[1]
    assert all(rows <= set(range(40)) for rows in used)
    others = [make([1], seed, 10, [10], [40]).rows(0, 0) for seed in range(200)]
    assert len({tuple(sorted(rows.tolist())) for rows in others}) > 190
    assert set(np.concatenate(others).tolist()) == set(range(40))


def test_seeds_datasets_and_uses_have_random_numbers_of_their_own():
    def numbers(seed, dataset, use):
        return tuple(make([1, 1], seed).rng(dataset, use).integers(0, 2**32, 4))

    def rows(seed, dataset):
        return tuple(make([1, 1], seed, sizes=[100, 100], batch_size=100).rows(dataset, 0))

    keys = list(itertools.product(range(3), range(2), range(3)))
    assert len({numbers(*key) for key in keys}) == len(keys)
    assert numbers(1, 1, 2) == numbers(1, 1, 2)
    assert len({rows(seed, dataset) for seed, dataset, _ in keys}) == 6


def test_epochs_are_passes_over_each_dataset():
    schedule = make([1, 3], batch_size=5, sizes=[10, 100])
    assert schedule.uses(80) == [20, 60]
    assert schedule.epochs(80) == [10.0, 3.0]
    different = Schedule(0, (5, 20), (10, 100), (1, 3))
    assert different.epochs(80) == [10.0, 12.0]
    assert different.rows(1, 0).shape == (20,)
