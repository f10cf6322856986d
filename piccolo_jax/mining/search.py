"""Exact search in a corpus that lies in device memory, or passes through it block by block."""

import dataclasses
import functools
import math
from collections.abc import Iterator

import jax
import numpy as np
import tqdm
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import sharding
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import cut
from piccolo_jax.mining import host_search, select, subspace
from piccolo_jax.ops import top_k
from piccolo_jax.ops.top_k import TILE
from piccolo_jax.sharding import AXES

_QUERIES = 1024  # that devices see at a time
_HOST_BYTES = 2**28  # of keys that the host has in memory at a time
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
      on_host: whether to search by numpy, not on the devices; None: if they are CPUs of this
        process.

    In a run of several processes all must call this alike; all get the result. Raises UserError if
    the budget holds not one tile.
    """
    dim = dim or corpus.shape[1]
    if on_host is None:
        on_host = all(d.platform == "cpu" for d in mesh.devices.flat) and jax.process_count() == 1
    run = functools.partial(_on_host if on_host else _on_devices, k=k, mesh=mesh)
    queries = cut(queries, dim)
    bar = tqdm.tqdm(desc=progress, unit=" queries", disable=not progress, leave=False)
    with bar:
        # One process would not learn that another has met a vector outside of the subspace.
        alone = jax.process_count() == 1
        basis = subspace.find_basis(corpus, dim, len(queries)) if alone else None
        try:
            return run(queries, _Keys(corpus, dim, basis), device_bytes=device_bytes, bar=bar)
        except subspace.NotSpannedError:
            return run(queries, _Keys(corpus, dim), device_bytes=device_bytes, bar=bar)


class _Keys:
    """The rows of a corpus, cut and normalised, in the coordinates of a basis if there is one."""

    def __init__(self, corpus: np.ndarray, dim: int, basis: subspace.Basis | None = None):
        self._corpus, self._dim, self.basis = corpus, dim, basis
        self.width = dim if basis is None else basis.columns.shape[1]

    def __len__(self) -> int:
        return len(self._corpus)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop, float32 [stop - start, width]. Raises NotSpannedError."""
        return subspace.project(cut(np.asarray(self._corpus[start:stop]), self._dim), self.basis)


def _on_host(
    queries: np.ndarray, keys: _Keys, k: int, mesh: Mesh, device_bytes: int, bar: tqdm.tqdm
) -> Neighbours:
    most = _HOST_BYTES // (4 * TILE * keys.width) or 1
    rows = min(_tiles_that_fit(keys, mesh, device_bytes) * mesh.size, most) * TILE
    blocks = [
        range(start, min(start + rows, len(keys)), TILE) for start in range(0, len(keys), rows)
    ]
    bar.reset(len(blocks) * len(queries))
    queries = subspace.project(queries, keys.basis)

    def read(start: int) -> np.ndarray:
        return keys.read(start, min(start + TILE, len(keys)))

    return Neighbours(*host_search.nearest(queries, blocks, read, k, bar.update))


def _on_devices(
    queries: np.ndarray, keys: _Keys, k: int, mesh: Mesh, device_bytes: int, bar: tqdm.tqdm
) -> Neighbours:
    tiles = _tiles_per_block(keys, mesh, device_bytes)
    at_once = math.ceil(_QUERIES / mesh.size) * mesh.size
    blocks = _query_blocks(subspace.project(queries, keys.basis), at_once)
    best = np.full((len(blocks), at_once, k), select.NONE)
    starts = range(0, len(keys), tiles * TILE)
    bar.reset(len(starts) * len(queries))
    with jax.set_mesh(mesh):
        for start in starts:
            block = _Block(keys, start, tiles)
            placed = sharding.place(block, NamedSharding(mesh, PartitionSpec(AXES)))
            for i, found in enumerate(_one_block(blocks, placed, block, k)):
                best[i] = select.merge(best[i], found, k)
                bar.update(min(at_once, len(queries) - i * at_once))
            del placed
    return Neighbours(*select.unpack(best.reshape(-1, k)[: len(queries)]))


def _tiles_that_fit(keys: _Keys, mesh: Mesh, device_bytes: int) -> int:
    """The most tiles that may be on a device at a time."""
    limit = _MOST_KEYS // TILE // mesh.size
    if device_bytes:
        limit = min(limit, device_bytes // (4 * TILE * keys.width))
        if not limit:
            raise UserError(
                f"a budget of {device_bytes} bytes on a device: must hold {TILE} embeddings,"
                f" {4 * TILE * keys.width} bytes at {keys.width} dimensions"
            )
    return limit


def _tiles_per_block(keys: _Keys, mesh: Mesh, device_bytes: int) -> int:
    """Tiles that are on the devices at a time, as many on each."""
    limit = _tiles_that_fit(keys, mesh, device_bytes)
    each = min(math.ceil(max(len(keys), 1) / TILE / mesh.size), limit)
    # Equal chunks, where there is room for them: others are copied on the device.
    chunks = math.prod(top_k.chunks_of(each))
    return (chunks if chunks <= limit else each) * mesh.size


class _Block:
    """Consecutive keys as tiles [tiles, TILE, width]; 0 behind their end.

    Gives its parts by index, as sharding.place() asks for them.
    """

    def __init__(self, keys: _Keys, start: int, tiles: int):
        self._keys, self.start = keys, start
        self.rows = min(len(keys) - start, tiles * TILE)
        self.shape = (tiles, TILE, keys.width)

    def __getitem__(self, index: tuple[slice, ...]) -> np.ndarray:
        first, stop, _ = index[0].indices(self.shape[0])
        rows = np.zeros(((stop - first) * TILE, self.shape[2]), np.float32)
        begin = self.start + first * TILE
        end = min(begin + len(rows), self.start + self.rows)
        for at in range(begin, end, TILE):  # so that little is in memory beside the block
            part = self._keys.read(at, min(at + TILE, end))
            rows[at - begin : at - begin + len(part)] = part
        return rows.reshape(-1, TILE, self.shape[2])


def _query_blocks(queries: np.ndarray, size: int) -> list[np.ndarray]:
    blocks = [queries[start : start + size] for start in range(0, len(queries), size)]
    return [np.pad(block, ((0, size - len(block)), (0, 0))) for block in blocks]


def _one_block(
    queries: list[np.ndarray], tiles: jax.Array, block: _Block, k: int
) -> Iterator[np.ndarray]:
    """Packed neighbours of each query block; the next ones are computed meanwhile."""
    rows = np.int32(block.rows)
    pending = None
    for part in [*queries, None]:
        computed = None if part is None else _nearest(part, tiles, rows, k=k)
        if pending is not None:
            scores, places = map(np.asarray, pending)
            yield select.pack(scores, places.astype(np.int64) + block.start)
        pending = computed


@functools.partial(jax.jit, static_argnames="k")
def _nearest(
    queries: jax.Array, tiles: jax.Array, num_keys: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    found = top_k.nearest(queries, tiles, num_keys, k)
    return jax.lax.with_sharding_constraint(found, PartitionSpec())
