import json
from pathlib import Path

import numpy as np
import pytest

from piccolo_jax.data import packing
from piccolo_jax.data.packing import Shape, num_segments, plan_layout

QUICKSTART = Path(__file__).resolve().parents[2] / "configs" / "quickstart_data"

# (number of texts, longest, row length, shards)
CASES = [
    (1, 20, 32, 1), (1, 20, 32, 8), (5, 64, 64, 8), (8, 1, 64, 8), (100, 3, 64, 3),
    (257, 64, 64, 3), (500, 100, 128, 1), (500, 5, 128, 8), (999, 512, 512, 8), (40, 6, 7, 2),
]  # fmt: skip


def random_texts(n, longest, seed=0):
    rng = np.random.default_rng(seed)
    texts = [rng.integers(1, 1000, rng.integers(1, longest + 1)) for _ in range(n)]
    return texts, np.asarray([len(text) for text in texts], np.int32)


def smallest_shape(layout, length):
    return Shape(length=length, rows=layout.rows_needed + 1, texts=layout.texts_needed + 2)


def read(arrays, slot):
    """The tokens of the text in a slot of the [R, S] grid, and their columns in the row."""
    row, segment = divmod(int(slot), num_segments(arrays["tokens"].shape[1]))
    (columns,) = np.nonzero(arrays["segments"][row] == segment + 1)
    return arrays["tokens"][row, columns], columns


@pytest.mark.parametrize(("n", "longest", "length", "shards"), CASES)
def test_every_text_lies_whole_in_a_slot_of_its_own(n, longest, length, shards):
    texts, lengths = random_texts(n, longest)
    layout = plan_layout(lengths, length, shards)
    shape = smallest_shape(layout, length)
    arrays = packing.fill(layout, lengths, lambda m: [texts[i] for i in m], shape, range(shards))
    slots = packing.text_slots(layout, shape, shards)
    index = packing.text_index(layout, shape)
    assert slots.dtype == index.dtype == np.int32
    assert slots.shape == (shards * shape.texts,)
    assert len(set(slots[index])) == n
    for number, (text, i) in enumerate(zip(texts, index, strict=True)):
        tokens, columns = read(arrays, slots[i])
        assert (tokens == text).all()
        row = slots[i] // num_segments(length)
        assert (np.diff(columns) == 1).all()
        assert (arrays["positions"][row, columns] == np.arange(len(text))).all()
        assert (arrays["text_numbers"][row, columns] == number).all()
        assert i // shape.texts == row // shape.rows  # text and row are on one shard
    assert (arrays["segments"] > 0).sum() == lengths.sum()  # and nothing else is there
    assert not arrays["tokens"][arrays["segments"] == 0].any()
    assert not arrays["positions"][arrays["segments"] == 0].any()
    for name in ("tokens", "segments", "positions", "text_numbers"):
        assert arrays[name].dtype == np.int32
        assert arrays[name].shape == (shards * shape.rows, length)


@pytest.mark.parametrize(("n", "longest", "length", "shards"), CASES)
def test_rows_hold_at_most_s_texts_numbered_from_1(n, longest, length, shards):
    _, lengths = random_texts(n, longest)
    layout = plan_layout(lengths, length, shards)
    used = set()
    for shard, row in set(zip(layout.shard, layout.row, strict=True)):
        members = np.flatnonzero((layout.shard == shard) & (layout.row == row))
        members = members[np.argsort(layout.segment[members])]
        ends = np.cumsum(lengths[members])
        assert layout.segment[members].tolist() == list(range(1, len(members) + 1))
        assert layout.start[members].tolist() == [0, *ends[:-1]]
        assert ends[-1] <= length
        assert len(members) <= num_segments(length)
        used.add(int(row))
    assert used == set(range(layout.rows_needed))


@pytest.mark.parametrize(("n", "longest", "length", "shards"), CASES)
def test_shards_hold_equally_many_texts_and_like_many_tokens(n, longest, length, shards):
    _, lengths = random_texts(n, longest)
    layout = plan_layout(lengths, length, shards)
    counts = np.bincount(layout.shard, minlength=shards)
    tokens = np.bincount(layout.shard, weights=lengths, minlength=shards)
    assert counts.max() - counts.min() <= 1
    assert layout.texts_needed == counts.max()
    assert tokens.max() - tokens.min() <= lengths.max()


def test_no_shard_gets_the_longer_texts():
    _, lengths = random_texts(800, 100)
    layout = plan_layout(lengths, 128, 8)
    tokens = np.bincount(layout.shard, weights=lengths)
    assert tokens.max() - tokens.min() < 15


@pytest.mark.parametrize("shards", [[0], [1, 2], [2, 0], [3]])
def test_a_process_fills_its_part_of_the_whole_and_reads_no_other_text(shards):
    texts, lengths = random_texts(50, 60)
    layout = plan_layout(lengths, 64, 4)
    shape = smallest_shape(layout, 64)
    were_read = []

    def read_tokens(members):
        were_read.extend(members.tolist())
        return [texts[i] for i in members]

    whole = packing.fill(layout, lengths, lambda m: [texts[i] for i in m], shape, range(4))
    part = packing.fill(layout, lengths, read_tokens, shape, shards)
    for name, array in part.items():
        assert (array.reshape(-1, shape.rows, 64) == whole[name].reshape(4, -1, 64)[shards]).all()
    assert sorted(were_read) == np.flatnonzero(np.isin(layout.shard, shards)).tolist()


def test_unused_slots_stay_within_their_shard():
    _, lengths = random_texts(7, 64)
    layout = plan_layout(lengths, 64, 4)
    shape = Shape(length=64, rows=5, texts=6)
    slots = packing.text_slots(layout, shape, 4).reshape(4, 6)
    per_shard = 5 * num_segments(64)
    assert (slots // per_shard == np.arange(4)[:, None]).all()
    assert (slots[:, 2:] == np.arange(4)[:, None] * per_shard).all()


def test_layouts_are_the_same_every_time_and_depend_on_lengths_alone():
    _, lengths = random_texts(300, 100)
    a, b = plan_layout(lengths, 128, 3), plan_layout(lengths.astype(np.int64), 128, 3)
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        assert (np.asarray(x) == np.asarray(y)).all()


def test_a_text_goes_to_the_fullest_row_with_room():
    layout = plan_layout(np.asarray([3, 10, 6, 17, 9, 32]), 32, 1)
    # 32 | 17 10 3 (2 left) | 9 6
    assert layout.row.tolist() == [1, 1, 2, 1, 2, 0]
    assert layout.rows_needed == 3


@pytest.mark.parametrize(("row_length", "shards", "least"), [(256, 1, 0.96), (256, 8, 0.93)])
def test_rows_of_real_texts_are_nearly_full(row_length, shards, least):
    """Texts of the quickstart's retrieval file, a character as a token."""
    lines = (QUICKSTART / "retrieval.train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:512]
    texts = {t for row in rows for t in (row["text"], *np.atleast_1d(row["text_pos"]))}
    lengths = np.asarray(sorted(min(len(text) + 2, row_length) for text in texts))
    layout = plan_layout(lengths, row_length, shards)
    assert lengths.sum() / (shards * layout.rows_needed * row_length) > least


def test_a_text_longer_than_a_row_is_an_error():
    with pytest.raises(ValueError, match="65 tokens, rows of 64"):
        plan_layout(np.asarray([3, 65]), 64, 1)
