"""The nearest of very many keys, exactly: products in tiles, and the k largest of each row.

A product is always of one query block and one tile of `TILE` keys, whatever the mesh, so that a
score has the same bits wherever its key lies. Of equal scores that of the lower index comes first.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from piccolo_jax.sharding import AXES

TILE = 2048  # keys
_TILES_AT_ONCE = 32  # whose scores exist at the same time on a device


def nearest(
    queries: Float[Array, "queries width"],
    tiles: Float[Array, "tiles keys width"],
    num_keys: Int[Array, ""],
    k: int,
) -> tuple[Float[Array, "queries k"], Int[Array, "queries k"]]:
    """The k largest inner products of each query, falling, and the places of their keys.

    Keys are counted through the tiles; those from `num_keys` on are padding. Where there are fewer
    than k, the rest scores -inf. `tiles` are split over all devices of the mesh in context, which
    must divide the number of queries.

    Collectives: one all-to-all, of each device's k largest; every device then merges those of its
    part of the queries.
    """

    def local(queries: jax.Array, tiles: jax.Array, num_keys: jax.Array) -> tuple[Array, Array]:
        first = jax.lax.axis_index(AXES) * tiles.shape[0] * tiles.shape[1]
        best = _nearest_here(queries, tiles, num_keys - first, k)
        scores, places = best[0], best[1] + first
        scores, places = (
            jax.lax.all_to_all(x, AXES, split_axis=0, concat_axis=1, tiled=True)
            for x in (scores, places)
        )
        return _largest(scores, places, k)

    split = P(AXES)
    run = jax.shard_map(local, in_specs=(P(), split, P()), out_specs=(split, split))
    return run(queries, tiles, num_keys)


def _nearest_here(
    queries: jax.Array, tiles: jax.Array, num_keys: jax.Array, k: int
) -> tuple[jax.Array, jax.Array]:
    """As nearest(), among the tiles of one device, chunk after chunk, with a running merge."""
    tile = tiles.shape[1]
    number, chunk = chunks_of(len(tiles))
    missing = number * chunk - len(tiles)
    tiles = jnp.pad(tiles, ((0, missing), (0, 0), (0, 0)))  # a copy, unless nothing is missing
    chunks = tiles.reshape(-1, chunk, *tiles.shape[1:])

    def add(best: tuple[jax.Array, jax.Array], xs: tuple[jax.Array, jax.Array]) -> tuple:
        tiles, first = xs
        scores = jnp.moveaxis(_products(queries, tiles), 0, 1).reshape(len(queries), -1)
        places = first + jnp.arange(chunk * tile, dtype=jnp.int32)
        scores = jnp.where(places < num_keys, scores, -jnp.inf)
        values, found = largest_by_groups(scores, min(k, scores.shape[1]))
        merged = jnp.concatenate((best[0], values), axis=1)
        merged_places = jnp.concatenate((best[1], found + first), axis=1)
        return _largest(merged, merged_places, k), None

    start = jax.lax.pcast(
        (jnp.full((len(queries), k), -jnp.inf), jnp.zeros((len(queries), k), jnp.int32)),
        AXES,
        to="varying",
    )
    firsts = jnp.arange(len(chunks), dtype=jnp.int32) * chunk * tile
    return jax.lax.scan(add, start, (chunks, firsts))[0]


def chunks_of(tiles: int) -> tuple[int, int]:
    """Chunks that a device's tiles are searched in: their number, and the tiles of each."""
    number = math.ceil(tiles / _TILES_AT_ONCE)
    return number, math.ceil(tiles / number)


def largest_by_groups(
    x: Float[Array, "rows n"], k: int
) -> tuple[Float[Array, "rows k"], Int[Array, "rows k"]]:
    """The k largest of each row and their places, as jax.lax.top_k, sorting far fewer numbers.

    Rows are cut into groups. The k groups with the largest maxima hold the k largest numbers: a
    number in another group is no larger than k others. So the maxima are sorted, then the members
    of k groups, instead of all. Of equal numbers the first ones win, since so do groups.
    """
    rows, n = x.shape
    size = _group_size(n, k)
    if size == 1:
        values, places = jax.lax.top_k(x, k)
        return values, places
    groups = jnp.pad(x, ((0, 0), (0, -n % size)), constant_values=-jnp.inf)
    groups = groups.reshape(rows, -1, size)
    _, chosen = jax.lax.top_k(groups.max(-1), k)
    chosen = jnp.sort(chosen, axis=-1)
    members = jnp.take_along_axis(groups, chosen[:, :, None], axis=1)
    values, place = jax.lax.top_k(members.reshape(rows, -1), k)
    places = jnp.take_along_axis(chosen, place // size, axis=1) * size + place % size
    return values, places


def _group_size(n: int, k: int) -> int:
    """The power of two that makes n / size + k * size about least; 1 where that is no gain."""
    size = 2 ** max(round(math.log2(n / k) / 2), 0)
    return size if n >= k * size and n / size + k * size < n else 1


def _products(queries: jax.Array, tiles: jax.Array) -> jax.Array:
    def product(tile: jax.Array) -> jax.Array:
        return jnp.einsum("qd,kd->qk", queries, tile, precision=jax.lax.Precision.HIGHEST)

    return jax.lax.map(product, tiles)


def _largest(scores: jax.Array, places: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest, with their places; of equal ones the first."""
    values, order = jax.lax.top_k(scores, k)
    return values, jnp.take_along_axis(places, order, axis=1)
