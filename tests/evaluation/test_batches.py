import numpy as np
import pytest

from piccolo_jax.data import packing
from piccolo_jax.evaluation import encoder
from piccolo_jax.evaluation.batches import Ladder, plan

LADDER = Ladder((16, 32, 48, 64, 96, 128, 256), shared=128, tokens=512, attention=1400)


def shapes(lengths, shards=1, ladder=LADDER):
    return [(b.shape.length, b.shape.rows) for b in plan(np.asarray(lengths), ladder, shards)]


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 60, 500])
def test_each_text_has_a_place_of_its_own_in_one_batch(count, shards):
    rng = np.random.default_rng(count)
    lengths = rng.integers(0, 257, count).astype(np.int32)
    seen = []
    for batch in plan(lengths, LADDER, shards):
        seen += batch.members.tolist()
        assert len(set(batch.slots.tolist())) == len(batch.members)
        tokens = [np.full(n, i + 1, np.int32) for i, n in enumerate(lengths[batch.members])]
        arrays = packing.fill(
            batch.layout, lengths[batch.members], lambda m, t=tokens: [t[i] for i in m],
            batch.shape, range(shards),
        )  # fmt: skip
        grid = arrays["tokens"]
        assert grid.shape == (batch.shape.rows * shards, batch.shape.length)
        segments = packing.num_segments(batch.shape.length)
        for i, (slot, n) in enumerate(zip(batch.slots, lengths[batch.members], strict=True)):
            row, segment = divmod(int(slot), segments)
            mine = grid[row][arrays["segments"][row] == segment + 1]
            assert mine.tolist() == [i + 1] * n
    assert sorted(seen) == list(range(count))


def test_the_row_of_a_text_is_where_its_like_cost_the_least():
    assert [LADDER.row_length(n) for n in (16, 17, 30, 33, 40, 48, 61, 65, 97)] == [
        16, 128, 32, 128, 128, 48, 64, 96, 128,
    ]  # fmt: skip
    assert LADDER.row_length(129) == 256  # beyond `shared` a row holds one text
    dear = Ladder(LADDER.lengths, shared=128, tokens=512, attention=50)
    assert dear.row_length(40) == 48


def test_texts_longer_than_every_row_have_rows_of_a_few_lengths():
    assert {LADDER.row_length(n) for n in range(257, 513)} == {512}
    assert LADDER.row_length(513) == LADDER.few_length(513, 9999) == 768


def test_few_texts_share_a_batch_and_many_do_not():
    assert shapes([12]) == [(16, 1)]
    assert shapes([5, 12, 20]) == [(64, 1)]
    assert shapes([100, 5, 12, 40, 90]) == [(128, 4)]
    assert shapes([100, 5, 12, 40, 250]) == [(256, 2)]
    assert {length for length, _ in shapes([45] * 100 + [100] * 3)} == {48, 128}


def test_texts_too_many_for_one_batch_but_few_of_each_length_have_rows_of_powers_of_2():
    assert {length for length, _ in shapes([250, 12] + [100] * 4)} == {256, 128, 64}


def test_a_batch_is_full_when_every_shard_is():
    assert {length for length, _ in shapes([16] * 64)} == {16}
    assert {length for length, _ in shapes([16] * 64, shards=4)} == {64}


def test_small_calls_take_small_batches_and_no_batch_is_mostly_empty():
    assert LADDER.row_counts(16) == (32, 4, 1)
    assert LADDER.row_counts(256) == (2, 1)
    assert LADDER.row_counts(1024) == (1,)
    for count in range(1, 100):
        found = shapes([16] * count) if count >= 32 else shapes([60] * count)
        rows = sum(rows for _, rows in found)
        assert count <= rows <= 2 * count


def test_rows_are_counted_per_shard():
    assert shapes([60], shards=4) == [(64, 1)]
    assert shapes([60] * 15, shards=4) == [(64, 1)] * 4
    assert shapes([60] * 320, shards=4) == [(64, 8)] * 10


@pytest.mark.parametrize("ladder", [LADDER, encoder._ON_CPU, encoder._ELSEWHERE])
def test_there_are_no_more_shapes_than_said(ladder):
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(150):
        longest = rng.integers(3, 513)
        lengths = rng.integers(2, longest, int(2 ** rng.uniform(0, 9)))
        found |= set(shapes(lengths, 1 + int(rng.integers(3)), ladder))
    assert 10 < len(found) <= ladder.most_programs(512) <= 40


def test_long_rows_come_first():
    lengths = [length for length, _ in shapes([16] * 64 + [48] * 64 + [250] * 8)]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 3
