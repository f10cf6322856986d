"""Packing: which text goes to which row, from token lengths alone, and the arrays that follow.

Texts are dealt to the shards of the mesh in order of length, so that shards hold equally many texts
(within one) and nearly equal tokens; inside a shard they are packed by best fit decreasing. Every
process computes the same layout and fills only the rows of its own shards.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, order=True)
class Shape:
    """Static sizes of a batch, per shard: rows, tokens per row, text slots.

    The rows are encoded in that many `chunks`, which divide them.
    """

    length: int
    rows: int
    texts: int
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each of n texts goes. All arrays are int32 [n]; `segment` counts from 1."""

    shard: np.ndarray
    row: np.ndarray  # within the shard
    segment: np.ndarray
    start: np.ndarray  # first token within the row
    slot: np.ndarray  # within the shard's text slots
    rows_needed: int  # per shard, the largest
    texts_needed: int


def num_segments(length: int) -> int:
    """The most texts in a row of `length` tokens, S; fixed, since shapes are static."""
    return max(length // 8, 1)


def plan_layout(lengths: np.ndarray, row_length: int, shards: int) -> Layout:
    """Packs texts of the given token lengths [n] into rows of `row_length` tokens.

    Raises ValueError if a text is longer than a row.
    """
    n = len(lengths)
    if n and lengths.max() > row_length:
        raise ValueError(f"a text of {lengths.max()} tokens, rows of {row_length}")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    turn, place = np.divmod(np.arange(n), shards)
    shard = np.empty(n, np.int32)
    shard[order] = np.where(turn % 2 == 0, place, shards - 1 - place)  # there and back again
    slot = np.empty(n, np.int32)
    slot[order] = turn

    row, segment, start = (np.zeros(n, np.int32) for _ in range(3))
    rows_needed = 0
    for s in range(shards):
        members = order[shard[order] == s]
        packed = _best_fit_decreasing(lengths[members].tolist(), row_length)
        row[members], segment[members], start[members], used = packed
        rows_needed = max(rows_needed, used)
    return Layout(shard, row, segment, start, slot, rows_needed, -(-n // shards))


def _best_fit_decreasing(
    lengths: list[int], capacity: int
) -> tuple[list[int], list[int], list[int], int]:
    """Rows, segments and starts of texts sorted by falling length, and the number of rows.

    Each text goes to the fullest row that has room. Rows are kept by free tokens, and the bits of
    `nonempty` say for which numbers there are any: finding a row takes one shift.
    """
    most = num_segments(capacity)
    by_free: list[list[int]] = [[] for _ in range(capacity + 1)]
    nonempty = 0
    texts_in: list[int] = []
    rows, segments, starts = [], [], []
    for length in lengths:
        candidates = nonempty >> length
        if candidates:
            free = length + (candidates & -candidates).bit_length() - 1
            row = by_free[free].pop()
            if not by_free[free]:
                nonempty &= ~(1 << free)
        else:
            free, row = capacity, len(texts_in)
            texts_in.append(0)
        texts_in[row] += 1
        rows.append(row)
        segments.append(texts_in[row])
        starts.append(capacity - free)
        left = free - length
        if texts_in[row] < most and left > 0:
            by_free[left].append(row)
            nonempty |= 1 << left
    return rows, segments, starts, len(texts_in)


def fill(
    layout: Layout,
    lengths: np.ndarray,
    read_tokens: Callable[[np.ndarray], Sequence[np.ndarray]],
    shape: Shape,
    shards: Sequence[int],
) -> dict[str, np.ndarray]:
    """The token arrays of some shards' rows, reading no other text.

    Args:
      layout, lengths: of the n texts of the global batch.
      read_tokens: maps indices of texts to their token ids.
      shape: sizes per shard, no smaller than the layout needs.
      shards: which shards to fill, R = shape.rows * len(shards).

    Returns: `tokens`, `segments`, `positions`, and the `text_numbers` of each token's text among
    the n, int32 [R, L].
    """
    of_shard = [np.flatnonzero(layout.shard == shard) for shard in shards]
    members = np.concatenate(of_shard)
    block = np.repeat(np.arange(len(shards)), [len(texts) for texts in of_shard])
    begin = (block * shape.rows + layout.row[members]) * shape.length + layout.start[members]
    sizes = lengths[members]
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    place = np.repeat(begin, sizes) + position  # in the flat grid, of each token

    tokens, segments, positions, numbers = (
        np.zeros(len(shards) * shape.rows * shape.length, np.int32) for _ in range(4)
    )
    tokens[place] = np.concatenate([np.zeros(0, np.int32), *read_tokens(members)])
    segments[place] = np.repeat(layout.segment[members], sizes)
    positions[place] = position
    numbers[place] = np.repeat(members, sizes)
    arrays = {
        "tokens": tokens, "segments": segments, "positions": positions, "text_numbers": numbers
    }  # fmt: skip
    return {name: array.reshape(-1, shape.length) for name, array in arrays.items()}


def text_slots(layout: Layout, shape: Shape, shards: int) -> np.ndarray:
    """int32 [N]: flat index into the global [R, S] grid for each text slot.

    Unused slots point at their shard's first row, so that gathering stays within the shard.
    """
    width = num_segments(shape.length)
    slots = np.repeat(np.arange(shards, dtype=np.int32) * shape.rows * width, shape.texts)
    row = layout.shard * shape.rows + layout.row
    slots[text_index(layout, shape)] = row * width + layout.segment - 1
    return slots.astype(np.int32)


def text_index(layout: Layout, shape: Shape) -> np.ndarray:
    """int32 [n]: the row of the embeddings [N, D] that holds each text."""
    return (layout.shard * shape.texts + layout.slot).astype(np.int32)
