"""Exact search on CPUs, by numpy: each thread takes a block of queries past tile after tile."""

import concurrent.futures
import functools
import os
import threading
from collections.abc import Callable, Sequence

import numpy as np
import threadpoolctl

from piccolo_jax.mining import select

_QUERIES = 1024  # of a thread at a time: their scores of a tile of 2048 keys, 8 MiB, stay in cache


def nearest(
    queries: np.ndarray,
    blocks: Sequence[Sequence[int]],
    read: Callable[[int], np.ndarray],
    k: int,
    progress: Callable[[int], object],
) -> tuple[np.ndarray, np.ndarray]:
    """Scores, float32 [queries, k], falling, and indices, int64, of the nearest keys.

    -inf and -1 where there are fewer.

    A product is always of the same queries and one tile, and one thread computes it, so that no bit
    depends on the number of threads or on how many tiles make a block. The scores of a sample say
    what is worth keeping (select.floor); if they deceive, the block is passed once more.

    Args:
      queries: float32 [queries, width].
      blocks: first keys of the tiles that are in memory at a time, rising.
      read: gives the tile, float32 [keys, width], that begins with a key.
      progress: is told how many queries have passed a block.
    """
    best = np.full((len(queries), k), select.NONE)
    scores, indices = np.full(best.shape, -np.inf, np.float32), np.full(best.shape, -1)
    own = _Own()

    def pass_tiles(
        start: int,
        tiles: list[tuple[int, np.ndarray]],
        sample: np.ndarray | None,
        num_keys: int,
        last: bool,
    ) -> None:
        rows = slice(start, min(start + _QUERIES, len(queries)))
        floor = None
        if sample is not None:
            floor = select.floor(_product(queries[rows], sample, own), num_keys, k)
        while True:
            largest = select.Largest(best[rows], floor)
            for first_key, keys in tiles:
                largest.add(_product(queries[rows], keys, own), first_key)
            if floor is None or largest.full():
                break
            floor = None
        best[rows] = largest.best()
        if last:
            scores[rows], indices[rows] = select.unpack(best[rows])
        progress(rows.stop - start)

    # Threads that each compute products of their own wait less than those that share each product.
    threads = os.cpu_count()
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        for block in blocks:
            tiles = list(zip(block, pool.map(read, block), strict=True))
            num_keys = sum(len(keys) for _, keys in tiles)
            # Later blocks begin with the thresholds of the first.
            sample = _sample(tiles, num_keys) if block is blocks[0] else None
            starts = range(0, len(queries), _QUERIES)
            passing = functools.partial(
                pass_tiles, tiles=tiles, sample=sample, num_keys=num_keys, last=block is blocks[-1]
            )
            for _ in pool.map(passing, starts):
                pass
    return scores, indices


def _sample(tiles: list[tuple[int, np.ndarray]], num_keys: int) -> np.ndarray:
    """Keys at equal distances, one of 32 or, of many, 2,048."""
    step = max(32, num_keys // 2048)
    return np.concatenate([keys[step // 2 :: step] for _, keys in tiles])


class _Own(threading.local):
    """What a thread uses again and again: new memory costs page faults."""

    scores = np.empty(0, np.float32)


def _product(queries: np.ndarray, keys: np.ndarray, own: _Own) -> np.ndarray:
    """queries @ keys.T, until the thread's next one."""
    size = len(queries) * len(keys)
    if own.scores.size < size:
        own.scores = np.empty(size, np.float32)
    out = own.scores[:size].reshape(len(queries), len(keys))
    return np.matmul(queries, keys.T, out=out)
