"""Self-attention over packed rows: a token sees the tokens of its own text.

Two implementations of one function: operations of XLA, and a kernel for TPUs, which never writes
the scores to memory and recomputes them backwards. Both drop the same weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from piccolo_jax.ops.dropout import WEYL, drop, keep
from piccolo_jax.sharding import BATCH_AXES, batch_shards

_LANES = 128
# Longest rows of the kernel: it holds a few float32 arrays [length, length] in fast memory.
KERNEL_LENGTH = 512
# Queries whose scores are computed at a time where rows are: of 12 heads and a row of 512 tokens
# they take 1.5 MB, which stays near the core, where those of the row take 12.
_QUERIES = 64
_LOWEST = float(jnp.finfo(jnp.float32).min)
_LOG2_E = 1.4426950408889634


def attention(
    query: Float[Array, "R L H"],
    key: Float[Array, "R L H"],
    value: Float[Array, "R L H"],
    segments: Int[Array, "R L"],
    row_bits: UInt32[Array, " R"] | None,
    *,
    heads: int,
    rate: float,
    kernel: bool,
    row_chunk: int = 0,
) -> Float[Array, "R L H"]:
    """softmax(query key^T / sqrt(D)) value of each head, D = H / heads, within segments.

    Softmax is float32. A share `rate` of the weights is dropped by the rows' bits (None: none).
    `kernel`: where rows are short enough, the kernel; else XLA, `row_chunk` > 0 rows at a time,
    computed again backwards, where the rows are not split over devices; without dropout, some
    queries of long rows at a time.
    """
    if kernel and query.shape[1] <= KERNEL_LENGTH:
        return _over_mesh(query, key, value, segments, row_bits, heads, rate)
    rows, length, hidden = query.shape
    split = (rows, length, heads, hidden // heads)
    arrays = (*(x.reshape(split) for x in (query, key, value)), segments, row_bits)
    if row_chunk == 0 or batch_shards() > 1:
        return _attend(arrays, rate).reshape(query.shape)
    if row_bits is None:
        attend = _attend_in_blocks
    else:  # dropout's bits are those of a row's whole scores

        def attend(row: tuple[Any, ...]) -> Array:
            return _attend(jax.tree.map(lambda a: a[None], row), rate)[0]

    y = jax.lax.map(jax.checkpoint(attend), arrays, batch_size=row_chunk if row_chunk > 1 else None)
    return y.reshape(query.shape)


def _attend(arrays: tuple[Any, ...], rate: float) -> Float[Array, "R L N D"]:
    query, key, value, segments, row_bits = arrays
    # Padding sees padding: a row of scores is never empty, so softmax is finite.
    mask: Bool[Array, "R 1 L L"] = segments[:, None, :, None] == segments[:, None, None, :]
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("rqnd,rknd->rnqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores, _LOWEST), axis=-1)
    if row_bits is not None:
        weights = drop(weights, rate, row_bits)
    return jnp.einsum("rnqk,rknd->rqnd", weights.astype(value.dtype), value)


def _attend_in_blocks(row: tuple[Any, ...]) -> Float[Array, "L N D"]:
    """_attend of one row without dropout, for some of its queries at a time."""
    query, key, value, segments, _ = row
    length, heads, dim = query.shape
    block = max(n for n in range(1, _QUERIES + 1) if length % n == 0)
    # Heads go first once, not in every block.
    key, value = jnp.moveaxis(key, 0, 2), jnp.moveaxis(value, 0, 1)
    query = jnp.moveaxis((query * dim**-0.5).reshape(-1, block, heads, dim), 2, 1)

    def attend(part: tuple[Array, Array]) -> Array:
        query, query_segments = part
        scores = jnp.matmul(query, key, preferred_element_type=jnp.float32)
        scores = jnp.where(query_segments[:, None] == segments, scores, _LOWEST)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        y = jnp.matmul(weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
        return (y / weights.sum(-1, keepdims=True)).astype(value.dtype)

    y = jax.lax.map(attend, (query, segments.reshape(-1, block)))
    return jnp.moveaxis(y, 1, 2).reshape(length, heads, dim)


def _over_mesh(
    query: Array, key: Array, value: Array, segments: Array, row_bits: Array | None, heads: int,
    rate: float,
) -> Array:  # fmt: skip
    """The kernel on every device's rows and heads; no collectives."""
    if row_bits is None:
        row_bits, rate = jnp.zeros(len(query), jnp.uint32), 0.0
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return _attention(query, key, value, segments, row_bits, heads, rate)
    parts = mesh.shape.get("tensor", 1)
    if heads % parts:
        parts = 1
    here = heads // parts
    length = query.shape[1]

    def local(query: Array, key: Array, value: Array, segments: Array, row_bits: Array) -> Array:
        if parts > 1:  # the first head here is not the first
            first = (jax.lax.axis_index("tensor") * here * length * length).astype(jnp.uint32)
            row_bits = row_bits + first * WEYL
        return _attention(query, key, value, segments, row_bits, here, rate)

    split = tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
    rows = P(split)
    of_heads = P(split, None, "tensor" if parts > 1 else None)
    return jax.shard_map(
        local,
        in_specs=(of_heads, of_heads, of_heads, rows, rows),
        out_specs=of_heads,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )(query, key, value, segments, row_bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    query: Array, key: Array, value: Array, segments: Array, row_bits: Array, heads: int,
    rate: float,
) -> Array:  # fmt: skip
    arrays = (query, key, value)
    return _call(_forward, arrays, segments, row_bits, heads, rate, 1, 4)[0]


def _save(*arguments: Any) -> tuple[Array, tuple[Array, ...]]:
    return _attention(*arguments), arguments[:5]


def _pull_back(heads: int, rate: float, saved: tuple[Array, ...], gradient: Array) -> Any:
    *arrays, segments, row_bits = saved
    grads = _call(_backward, (*arrays, gradient), segments, row_bits, heads, rate, 3, 10)
    return *grads, None, None


_attention.defvjp(_save, _pull_back)


def _call(
    kernel: Any, arrays: tuple[Array, ...], segments: Array, row_bits: Array, heads: int,
    rate: float, outputs: int, products: int,
) -> Any:  # fmt: skip
    """Runs a kernel for each row and as many heads as fill the lanes (two of 64).

    `products`: operations per pair of tokens and hidden dimension.
    """
    rows, length, hidden = arrays[0].shape
    dim = hidden // heads
    width = next(
        (w for w in (_LANES, dim) if w % dim == 0 and w % _LANES == 0 and hidden % w == 0), hidden
    )
    block = pl.BlockSpec((1, length, width), lambda row, part: (row, 0, part))
    bytes_moved = (len(arrays) + outputs) * arrays[0].size * arrays[0].dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, dim=dim, rate=rate),
        grid=(rows, hidden // width),
        in_specs=[
            pl.BlockSpec((1, length, 1), lambda row, part: (row, 0, 0)),
            pl.BlockSpec((1, 1, length), lambda row, part: (row, 0, 0)),
            pl.BlockSpec((1, 1, 1), lambda row, part: (row, 0, 0)),
            *[block] * len(arrays),
        ],
        out_specs=[block] * outputs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays[:outputs]],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        cost_estimate=pl.CostEstimate(
            flops=products * rows * length * length * hidden,
            transcendentals=rows * heads * length * length,
            bytes_accessed=bytes_moved,
        ),
        name=f"attention{kernel.__name__}",
    )(segments[:, :, None], segments[:, None, :], row_bits[:, None, None], *arrays)


# In the kernels scores are [keys, queries]: sums over keys add whole registers, and of the big
# arrays none is transposed. Lanes of other heads are set to 0 instead of being cut off, which
# would move them.


def _forward(key_segments, query_segments, row_bits, query, key, value, out, *, dim, rate):  # type: ignore[no-untyped-def]
    query, key, value = query[0], key[0], value[0]
    same = key_segments[0] == query_segments[0]
    heads = query.shape[1] // dim
    lane_head, row_head = _head_of(query.shape[1], dim)
    y = jnp.zeros(query.shape[::-1], jnp.float32)
    for head in range(heads):
        weights, scale = _weights(query, key, same, lane_head == head, dim)
        if rate:
            weights = _drop(weights, row_bits[0], head, heads, rate)
        part = _dot(value, weights.astype(value.dtype), 0, 0) * scale
        y = jnp.where(row_head == head, part, y)
    out[0] = y.astype(out.dtype).T


def _backward(  # type: ignore[no-untyped-def]
    key_segments, query_segments, row_bits, query, key, value, gradient,
    query_grad, key_grad, value_grad, *, dim, rate,
):  # fmt: skip
    query, key, value, gradient = query[0], key[0], value[0], gradient[0]
    same = key_segments[0] == query_segments[0]
    heads = query.shape[1] // dim
    lane_head, row_head = _head_of(query.shape[1], dim)
    for_key = for_value = jnp.zeros(query.shape, jnp.float32)
    for_query = jnp.zeros(query.shape[::-1], jnp.float32)
    for head in range(heads):
        lanes = lane_head == head
        weights, scale = _weights(query, key, same, lanes, dim)
        weights = weights * scale
        kept = weights
        for_weights = _dot(value, jnp.where(lanes, gradient, 0), 1, 1)
        if rate:
            kept = _drop(weights, row_bits[0], head, heads, rate)
            for_weights = _drop(for_weights, row_bits[0], head, heads, rate)
        for_value = jnp.where(lanes, _dot(kept.astype(value.dtype), gradient, 1, 0), for_value)
        product = weights * for_weights
        for_scores = product - weights * product.sum(axis=0, keepdims=True)
        for_scores = for_scores.astype(query.dtype)
        for_key = jnp.where(lanes, _dot(for_scores, query, 1, 0), for_key)
        for_query = jnp.where(row_head == head, _dot(key, for_scores, 0, 0), for_query)
    query_grad[0] = (for_query * dim**-0.5).astype(query_grad.dtype).T
    key_grad[0] = (for_key * dim**-0.5).astype(key_grad.dtype)
    value_grad[0] = for_value.astype(value_grad.dtype)


def _head_of(width: int, dim: int) -> tuple[Array, Array]:
    """The head that a lane, or a row of a transposed array, belongs to."""
    lanes = jax.lax.broadcasted_iota(jnp.int32, (1, width), 1) // dim
    rows = jax.lax.broadcasted_iota(jnp.int32, (width, 1), 0) // dim
    return lanes, rows


def _weights(query: Array, key: Array, same: Array, lanes: Array, dim: int) -> tuple[Array, Array]:
    """exp(score - largest) [keys, queries] of one head, and 1 / its sum over the keys."""
    query = (query.astype(jnp.float32) * (dim**-0.5 * _LOG2_E)).astype(query.dtype)
    scores = jnp.where(same, _dot(key, jnp.where(lanes, query, 0), 1, 1), _LOWEST)
    weights = jnp.exp2(scores - scores.max(axis=0, keepdims=True))
    return weights, 1 / weights.sum(axis=0, keepdims=True)


def _drop(weights: Array, row_bits: Array, head: int, heads: int, rate: float) -> Array:
    """drop() of the scores of one head, at their places in [heads, queries, keys]."""
    length = len(weights)
    place = (pl.program_id(1) * heads + head) * length * length
    place += jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1) * length
    place += jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0)
    kept = keep(row_bits, place.astype(jnp.uint32), rate)
    return jnp.where(kept, weights * (1 / (1 - rate)), 0)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
