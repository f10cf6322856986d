"""Exact search in a corpus that lies in device memory, or passes through it block by block."""

import concurrent.futures
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import sharding
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining import select
from piccolo_jax.ops import top_k
from piccolo_jax.ops.top_k import TILE
from piccolo_jax.sharding import AXES

_HOST_QUERIES, _DEVICE_QUERIES = 256, 1024  # at a time
_HOST_TILES = 64  # whose scores are in memory at a time, where the host selects
_ROWS_PER_THREAD = 64
_MOST_KEYS = 2**31 - 1  # at a time: devices count in 32 bits


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """For each query the k nearest keys, the nearest first; of equal scores the lower index.

    scores: float32 [queries, k], cosines; indices: int64 [queries, k], rows of the corpus. -inf and
    -1 where the corpus has fewer than k.
    """

    scores: np.ndarray
    indices: np.ndarray


def search(
    queries: np.ndarray,
    corpus: np.ndarray,
    k: int,
    mesh: Mesh,
    dim: int = 0,
    device_bytes: int = 0,
    progress: str = "",
    on_host: bool | None = None,
) -> Neighbours:
    """The k rows of `corpus` with the largest cosine to each query, at the prefix `dim` (0: all).

    Args:
      queries, corpus: float32 [queries, width], [n, width], not normalised; `corpus` may be a
        memory map, of which a block at a time is read.
      device_bytes: budget for the corpus on a device (0: no limit). What doesn't fit at once passes
        through in blocks.
      progress: name of the progress bar; empty: none.
      on_host: whether the host selects from the scores, rather than the devices; None: if they are
        CPUs of this process.

    In a run of several processes all must call this alike; all get the result. Raises UserError if
    the budget holds not one tile.
    """
    dim = dim or corpus.shape[1]
    if on_host is None:
        on_host = all(d.platform == "cpu" for d in mesh.devices.flat) and jax.process_count() == 1
    tiles = _tiles_per_block(len(corpus), dim, mesh, device_bytes, on_host)
    at_once = _HOST_QUERIES if on_host else _DEVICE_QUERIES
    at_once = math.ceil(at_once / mesh.size) * mesh.size
    blocks = _query_blocks(cut(queries, dim), at_once)
    best: list[np.ndarray | None] = [None] * len(blocks)
    starts = range(0, len(corpus), tiles * TILE)
    bar = tqdm.tqdm(
        total=len(starts) * len(queries), desc=progress, unit=" queries", disable=not progress,
        leave=False,
    )  # fmt: skip
    run = _on_host if on_host else _on_devices
    with jax.set_mesh(mesh), bar:
        for start in starts:
            block = _Block(corpus, start, tiles, dim)
            placed = sharding.place(block, NamedSharding(mesh, PartitionSpec(AXES)))
            for i, found in enumerate(run(blocks, placed, block, k)):
                before = best[i]
                best[i] = found if before is None else select.merge(before, found, k)
                bar.update(min(at_once, len(queries) - i * at_once))
            del placed
    packed = np.full((len(blocks) * at_once, k), select.NONE)
    for i, rows in enumerate(best):
        if rows is not None:
            packed[i * at_once : (i + 1) * at_once, : rows.shape[1]] = rows
    return Neighbours(*select.unpack(packed[: len(queries)]))


def _tiles_per_block(n: int, dim: int, mesh: Mesh, device_bytes: int, on_host: bool) -> int:
    """Tiles that are on the devices at a time, as many on each."""
    limit = _MOST_KEYS // TILE // mesh.size
    if device_bytes:
        limit = min(limit, device_bytes // (4 * TILE * dim))
        if not limit:
            raise UserError(
                f"a budget of {device_bytes} bytes on a device: must hold {TILE} embeddings,"
                f" {4 * TILE * dim} bytes at {dim} dimensions"
            )
    each = min(math.ceil(max(n, 1) / TILE / mesh.size), limit)
    if on_host:
        return min(each, math.ceil(_HOST_TILES / mesh.size)) * mesh.size
    # Equal chunks, where there is room for them: others are copied on the device.
    chunks = math.prod(top_k.chunks_of(each))
    return (chunks if chunks <= limit else each) * mesh.size


class _Block:
    """Consecutive rows of a corpus as tiles [tiles, TILE, dim]: cut, normalised, 0 behind its end.

    Gives its parts by index, as sharding.place() asks for them.
    """

    def __init__(self, corpus: np.ndarray, start: int, tiles: int, dim: int):
        self._corpus, self.start = corpus, start
        self.rows = min(len(corpus) - start, tiles * TILE)
        self.shape = (tiles, TILE, dim)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(self.shape[0])
        rows = np.zeros(((stop - first) * TILE, self.shape[2]), np.float32)
        begin = self.start + first * TILE
        end = min(begin + len(rows), self.start + self.rows)
        for at in range(begin, end, TILE):  # so that little is in memory beside the block
            part = cut(np.asarray(self._corpus[at : min(at + TILE, end)]), self.shape[2])
            rows[at - begin : at - begin + len(part)] = part
        return rows.reshape(-1, TILE, self.shape[2])


def _query_blocks(queries: np.ndarray, size: int) -> list[np.ndarray]:
    blocks = [queries[start : start + size] for start in range(0, len(queries), size)]
    return [np.pad(block, ((0, size - len(block)), (0, 0))) for block in blocks]


def _on_host(
    blocks: list[np.ndarray], tiles: jax.Array, block: _Block, k: int
) -> Iterator[np.ndarray]:
    """Packed neighbours of each query block; the next one's scores are computed meanwhile."""
    sizes = np.clip(block.rows - np.arange(block.shape[0]) * TILE, 0, TILE)

    def select_rows(scores: list[np.ndarray], start: int) -> np.ndarray:
        rows = slice(start, start + _ROWS_PER_THREAD)
        parts = [tile[rows, :size] for tile, size in zip(scores, sizes, strict=True) if size]
        return select.largest(parts, block.start, k)

    def finish(computed: jax.Array) -> np.ndarray:
        shards = sorted(computed.addressable_shards, key=lambda shard: shard.index[0].start or 0)
        scores = [tile for shard in shards for tile in np.asarray(shard.data)]
        starts = range(0, len(scores[0]), _ROWS_PER_THREAD)
        parts = list(threads.map(functools.partial(select_rows, scores), starts))
        most = max(part.shape[1] for part in parts)
        return np.concatenate([
            np.pad(part, ((0, 0), (0, most - part.shape[1])), constant_values=select.NONE)
            for part in parts
        ])  # fmt: skip

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        yield from _one_ahead(lambda queries: _tile_scores(queries, tiles), finish, blocks)


def _on_devices(
    blocks: list[np.ndarray], tiles: jax.Array, block: _Block, k: int
) -> Iterator[np.ndarray]:
    def finish(computed: tuple[jax.Array, jax.Array]) -> np.ndarray:
        scores, places = map(np.asarray, computed)
        return select.pack(scores, places.astype(np.int64) + block.start)

    rows = np.int32(block.rows)
    return _one_ahead(lambda queries: _nearest(queries, tiles, rows, k=k), finish, blocks)


def _one_ahead(
    compute: Callable, finish: Callable, blocks: list[np.ndarray]
) -> Iterator[np.ndarray]:
    pending = None
    for queries in blocks:
        computed = compute(queries)
        if pending is not None:
            yield finish(pending)
        pending = computed
    if pending is not None:
        yield finish(pending)


_tile_scores = jax.jit(top_k.tile_scores)


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    queries: jax.Array, tiles: jax.Array, num_keys: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    found = top_k.nearest(queries, tiles, num_keys, k)
    return jax.lax.with_sharding_constraint(found, PartitionSpec())
