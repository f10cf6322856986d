"""Exact search on CPUs, by numpy: each thread takes a block of queries past tile after tile."""

import concurrent.futures
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
) -> np.ndarray:
    """Packed neighbours (see select.pack), uint64 [queries, k], sorted.

    A product is always of the same queries and one tile, and one thread computes it, so that no bit
    depends on the number of threads or on how many tiles make a block.

    Args:
      queries: float32 [queries, width].
      blocks: first keys of the tiles that are in memory at a time, rising.
      read: gives the tile, float32 [keys, width], that begins with a key.
      progress: is told how many queries have passed a block.
    """
    best = np.full((len(queries), k), select.NONE)
    own = threading.local()

    def pass_tiles(start: int, tiles: list[tuple[int, np.ndarray]]) -> None:
        rows = slice(start, min(start + _QUERIES, len(queries)))
        largest = select.Largest(best[rows])
        for first_key, keys in tiles:
            largest.add(_product(queries[rows], keys, own), first_key)
        best[rows] = largest.best()
        progress(rows.stop - start)

    # Threads that each compute products of their own wait less than those that share each product.
    threads = os.cpu_count()
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),
        concurrent.futures.ThreadPoolExecutor(threads) as pool,
    ):
        for block in blocks:
            tiles = list(zip(block, pool.map(read, block), strict=True))
            starts = range(0, len(queries), _QUERIES)
            for _ in pool.map(lambda start, tiles=tiles: pass_tiles(start, tiles), starts):
                pass
    return best


def _product(queries: np.ndarray, keys: np.ndarray, own: threading.local) -> np.ndarray:
    """queries @ keys.T in memory that the thread uses again: new memory costs page faults."""
    size = len(queries) * len(keys)
    if getattr(own, "scores", np.empty(0)).size < size:
        own.scores = np.empty(size, np.float32)
    out = own.scores[:size].reshape(len(queries), len(keys))
    return np.matmul(queries, keys.T, out=out)
