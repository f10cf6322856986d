"""The k largest scores of each row, on the host: for CPUs, where XLA's top_k sorts whole rows.

A score and the index of its key are one unsigned number, smaller for a larger score and, of equal
scores, for a smaller index: sorting and merging need nothing else.
"""

import itertools

import numpy as np

NONE = np.uint64(2**64 - 1)  # behind every pair

_BINS_PER_K = 8  # maxima that a row's threshold is taken from


def pack(scores: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """uint64 of float32 scores and the indices (below 2^32 - 1) of their keys, of equal shape.

    -inf becomes NONE.
    """
    bits = (scores + np.float32(0)).view(np.uint32)  # -0 becomes 0
    falling = np.where(bits >> 31, bits, bits ^ np.uint32(0x7FFFFFFF))
    packed = (falling.astype(np.uint64) << np.uint64(32)) | indices.astype(np.uint64)
    return np.where(np.isneginf(scores), NONE, packed)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Float32 scores and int64 indices; -inf and -1 for NONE."""
    falling = (packed >> np.uint64(32)).astype(np.uint32)
    bits = np.where(falling >> 31, falling, falling ^ np.uint32(0x7FFFFFFF))
    indices = (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)
    empty = packed == NONE
    scores = np.where(empty, np.float32(-np.inf), bits.view(np.float32))
    return scores, np.where(empty, -1, indices)


def merge(first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """The k first of two packed arrays [rows, *], sorted."""
    both = np.concatenate((first, second), axis=1)
    both.sort(axis=1)
    return both[:, :k]


def largest(tiles: list[np.ndarray], first_index: int, k: int) -> np.ndarray:
    """Packed [rows, <= k], sorted: the largest scores of each row over all tiles.

    `tiles` are float32 [rows, keys] each, of consecutive keys from `first_index` on. Every row gets
    a threshold that at least k of its scores reach, from maxima over strided bins; only what
    reaches it is looked at further and sorted.
    """
    rows = len(tiles[0])
    starts = np.cumsum([0, *(tile.shape[1] for tile in tiles)])
    threshold = _threshold(tiles, k)[:, None]
    found, counts = [], []
    for tile, start in zip(tiles, starts[:-1], strict=True):
        flat = np.flatnonzero(tile >= threshold)
        row = flat // tile.shape[1]
        key = flat - row * tile.shape[1]
        found.append((row, pack(tile[row, key], key + (first_index + start))))
        counts.append(np.bincount(row, minlength=rows))
    most = int(np.sum(counts, axis=0).max())
    packed = np.full((rows, most), NONE)
    filled = np.zeros(rows, np.int64)
    for (row, values), count in zip(found, counts, strict=True):
        before = np.cumsum(count) - count
        packed[row, np.arange(len(row)) + np.repeat(filled - before, count)] = values
        filled += count
    packed.sort(axis=1)
    return packed[:, :k]


def _threshold(tiles: list[np.ndarray], k: int) -> np.ndarray:
    """For each row a number that at least k of its scores reach; -inf if there are fewer."""
    widest = max(tile.shape[1] for tile in tiles)
    whole = [tile for tile in tiles if tile.shape[1] == widest]
    bins = min(len(whole), -(-_BINS_PER_K * k // widest))
    if bins * widest < k:
        return np.full(len(tiles[0]), -np.inf, np.float32)
    maxima = np.concatenate([_maximum(whole[start::bins]) for start in range(bins)], axis=1)
    place = maxima.shape[1] - k
    maxima.partition(place, axis=1)
    return maxima[:, place]


def _maximum(tiles: list[np.ndarray]) -> np.ndarray:
    result = tiles[0].copy()
    for tile in itertools.islice(tiles, 1, None):
        np.maximum(result, tile, out=result)
    return result
