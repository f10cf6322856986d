"""Similarities over the global batch, at every Matryoshka prefix (arXiv 2205.13147).

Prefixes are nested, so the product over the first d coordinates is the product over the previous
prefix plus that of the coordinates between them; cosines follow by dividing by the norms of the
prefixes: one product of the full width for all prefixes. Products are float32 at the highest
precision, since a similarity is divided by temperatures as low as 0.01.

Arrays are global. On a mesh, rows (of queries, keys, embeddings, indices) are split over BATCH_AXES
and the functions run under shard_map with the collectives that they name; any number of rows works,
and one that the shards divide moves nothing else. Without a mesh in context there are none.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from piccolo_jax.sharding import BATCH_AXES, batch_shards

# A vector shorter than this is treated as being of this length, like torch's normalize.
_MIN_NORM = 1e-12
_ROWS = P(BATCH_AXES)

# A logit for every cosine, elementwise.
Score = Callable[[Float[Array, "..."]], Float[Array, "..."]]


class LogSumExp(NamedTuple):
    """What nested_log_sum_exp() finds for each query among its keys.

    value: log of the weighted sum, -inf without a key; nearest: the largest cosine at the last
    prefix, -inf without a key; too_near: how many keys lay above the limit.
    """

    value: Float[Array, "dims queries"]
    nearest: Float[Array, " queries"]
    too_near: Int[Array, " queries"]


def take(embeddings: Float[Array, "texts width"], index: Int[Array, "rows ..."]) -> Array:
    """embeddings[index], one row per index.

    Collectives: one all-gather of the embeddings; backward, one reduce-scatter.
    """

    def local(embeddings: jax.Array, index: jax.Array) -> jax.Array:
        return _gather(embeddings)[index]

    rows = len(index)
    embeddings, index = _pad(embeddings, batch_shards()), _pad(index, batch_shards())
    return _over_shards(local, (_ROWS, _ROWS), _ROWS)(embeddings, index)[:rows]


def paired_cosines(
    x: Float[Array, "*batch width"], y: Float[Array, "*batch width"], dims: tuple[int, ...]
) -> Float[Array, " dims *batch"]:
    """Cosine of each vector of x with its partner in y, at each prefix. x and y may broadcast."""
    return _prefix_sums(x * y, dims) * inverse_norms(x, dims) * inverse_norms(y, dims)


def nested_log_sum_exp(
    queries: Float[Array, "queries width"],
    keys: Float[Array, "keys width"],
    weights: Float[Array, " keys"],
    keep: Bool[Array, "queries keys"],
    limit: Float[Array, " queries"] | None = None,
    *,
    dims: tuple[int, ...],
    score: Score,
    block_size: int,
) -> LogSumExp:
    """log of the sum over the keys k that a query q keeps of weights[k] * exp(score(cos(q, k))).

    Keys pass in blocks of `block_size` (0: all at once), whose similarities are forgotten and
    computed again in the backward pass; beside the gathered keys, a device holds dims x its queries
    x block_size numbers.

    Args:
      weights: a key's multiplicity; 0: it is no key, whatever its vector.
      keep: which keys count for a query.
      limit: leaves out keys whose cosine with the query, at the last prefix, is above it.
      score: from cosines at all prefixes to logits.

    Collectives: one all-gather of the keys, block by block; backward, one reduce-scatter.
    """
    shards = batch_shards()
    num_queries, num_keys = len(queries), math.ceil(len(keys) / shards)  # of keys, of a shard
    num_blocks = math.ceil(num_keys / max(block_size // shards, 1)) if block_size else 1
    # In float32, or in float64 if they are.
    queries, keys = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (queries, keys))
    block = math.ceil(num_keys / num_blocks)

    def in_blocks(x: jax.Array) -> jax.Array:
        """[*, keys] to [blocks, *, keys of a block]; a block has the same part of each shard."""
        x = _pad(x, num_keys * shards, axis=-1).reshape(*x.shape[:-1], shards, num_keys)
        x = _pad(x, block * num_blocks, axis=-1).reshape(*x.shape[:-1], num_blocks, block)
        x = jnp.moveaxis(x, -2, 0)
        return x.reshape(*x.shape[:-2], -1)

    def local(
        queries: jax.Array, keys: jax.Array, weights: jax.Array, keep: jax.Array, limit: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        keys = _pad(keys, block * num_blocks).reshape(num_blocks, block, -1)

        def add(carry: Any, xs: Any) -> Any:
            largest, total, nearest, too_near = carry
            keys, weights, keep = xs
            keys = checkpoint_name(_gather(keys), "gathered")
            # An unused vector may hold a NaN.
            keys = jnp.where(weights[:, None] > 0, keys, 0)
            cosines = nested_cosines(queries, keys, dims)
            above = cosines[-1] > limit[:, None]
            kept = keep & (weights > 0)
            too_near += (kept & above).sum(-1, dtype=jnp.int32)
            kept &= ~above
            nearest = jnp.maximum(nearest, jnp.where(kept, cosines[-1], -jnp.inf).max(-1))
            logits = jnp.where(kept, score(cosines), -jnp.inf)
            before = largest
            largest = jax.lax.stop_gradient(jnp.maximum(largest, logits.max(-1)))
            terms = weights * jnp.exp(logits - largest[..., None])
            total = total * jnp.exp(before - largest) + terms.sum(-1)
            return (largest, total, jax.lax.stop_gradient(nearest), too_near), None

        policy = jax.checkpoint_policies.save_only_these_names("gathered")
        shape = (len(dims), len(queries))
        start = _varying((
            jnp.full(shape, jnp.finfo(queries.dtype).min),
            jnp.zeros(shape, queries.dtype),
            jnp.full(shape[1:], -jnp.inf, queries.dtype),
            jnp.zeros(shape[1:], jnp.int32),
        ))  # fmt: skip
        (largest, total, nearest, too_near), _ = jax.lax.scan(
            jax.checkpoint(add, policy=policy, prevent_cse=False),
            start,
            (keys, in_blocks(weights), in_blocks(keep)),
        )
        some = total > 0
        value = jnp.where(some, largest + jnp.log(jnp.where(some, total, 1)), -jnp.inf)
        return value, nearest, too_near

    if limit is None:
        limit = jnp.full(num_queries, jnp.inf, queries.dtype)
    run = _over_shards(
        local, (_ROWS, _ROWS, P(), _ROWS, _ROWS), (P(None, BATCH_AXES), _ROWS, _ROWS)
    )
    value, nearest, too_near = run(
        _pad(queries, shards), _pad(keys, shards), weights, _pad(keep, shards), _pad(limit, shards)
    )
    return LogSumExp(value[:, :num_queries], nearest[:num_queries], too_near[:num_queries])


def nested_cosines(
    queries: Float[Array, "queries width"],
    keys: Float[Array, "keys width"],
    dims: tuple[int, ...],
) -> Float[Array, "dims queries keys"]:
    """Cosine of every query with every key, at each prefix."""
    blocks = (
        jnp.einsum(
            "qd,kd->qk",
            queries[:, start:stop],
            keys[:, start:stop],
            precision=jax.lax.Precision.HIGHEST,
        )
        for start, stop in _blocks(dims)
    )
    products = jnp.stack(list(itertools.accumulate(blocks)))
    query_scales, key_scales = inverse_norms(queries, dims), inverse_norms(keys, dims)
    return products * query_scales[:, :, None] * key_scales[:, None, :]


def cumulative_log_sum_exp(x: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """log of the sum of exp(x[..., :i + 1]), for every i.

    By doubling (Hillis and Steele 1986), a loop of log2(n) rounds. The gradient of
    jax.lax.cumlogsumexp is such rounds unrolled, which take ten times as long to compile.
    """
    n = x.shape[-1]
    position = jnp.arange(n)

    def add_those_before(x: jax.Array, distance: jax.Array) -> tuple[jax.Array, None]:
        before = jnp.where(position >= distance, jnp.roll(x, distance, axis=-1), -jnp.inf)
        return jnp.logaddexp(x, before), None

    return jax.lax.scan(add_those_before, x, 2 ** jnp.arange((n - 1).bit_length()))[0]


def inverse_norms(
    x: Float[Array, "*batch width"], dims: tuple[int, ...]
) -> Float[Array, " dims *batch"]:
    """1 / Euclidean norm of the prefixes `dims` of the last axis.

    Factors, since the gradient of a quotient by two tiny norms would overflow to NaN.
    """
    return 1 / jnp.sqrt(jnp.maximum(_prefix_sums(x * x, dims), _MIN_NORM**2))


def _blocks(dims: tuple[int, ...]) -> list[tuple[int, int]]:
    return list(itertools.pairwise((0, *dims)))


def _prefix_sums(
    x: Float[Array, "*batch width"], dims: tuple[int, ...]
) -> Float[Array, " dims *batch"]:
    blocks = [x[..., start:stop].sum(-1) for start, stop in _blocks(dims)]
    return jnp.cumsum(jnp.stack(blocks), axis=0)


def _pad(x: jax.Array, multiple: int, axis: int = 0) -> jax.Array:
    """x with zeros (False) behind, so that `multiple` divides the size of `axis`."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths)


def _over_shards(f: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    if jax.sharding.get_abstract_mesh().empty:
        return f
    return jax.shard_map(f, in_specs=in_specs, out_specs=out_specs)


def _gather(x: jax.Array) -> jax.Array:
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.all_gather(x, BATCH_AXES, tiled=True)


def _varying(tree: Any) -> Any:
    """Marks constants as differing between shards, as what a loop adds to them does."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(functools.partial(jax.lax.pcast, axis_name=BATCH_AXES, to="varying"), tree)
