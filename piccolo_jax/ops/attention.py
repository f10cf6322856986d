"""Self-attention over packed rows: a token sees the tokens of its own text.

Three implementations of one function: operations of XLA for all rows at once; the same for one row
after the other, with a gradient written by hand, for CPUs; and a kernel for TPUs. The latter two
don't keep the scores and compute them again backwards. All drop the same weights.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt32

from piccolo_jax.ops.dropout import WEYL, keep
from piccolo_jax.ops.products import product_on_cpu
from piccolo_jax.sharding import BATCH_AXES, batch_shards

_LANES = 128
_A_HEAD = np.uint32(2**16)  # places of a head: more than twice as many as tokens in a row
# Longest rows of the kernel: it holds a few float32 arrays [length, length] in fast memory.
KERNEL_LENGTH = 512
# Queries whose scores are computed at a time where rows are: of 12 heads and a row of 512 tokens
# they take 3 MB, which stays near the core, where those of the row take 12.
_QUERIES = 128
_SCORES = 256**2  # of a head at a time, from as many rows as have them
SOFTMAX = "softmax"  # names what the backward pass of attention by rows keeps, [R, N, L]
_LOWEST = float(jnp.finfo(jnp.float32).min)
_LOG2_E = 1.4426950408889634


def attention(
    query: Float[Array, "R L H"],
    key: Float[Array, "R L H"],
    value: Float[Array, "R L H"],
    segments: Int[Array, "R L"],
    bits: UInt32[Array, "R L"] | None,
    *,
    heads: int,
    rate: float,
    kernel: bool,
    by_rows: bool = False,
) -> Float[Array, "R L H"]:
    """softmax(query key^T / sqrt(D)) value of each head, D = H / heads, within segments.

    Softmax is float32. A share `rate` of the weights is dropped: which depends on the bits of the
    query's token (None: none), the head, and how far from it the key's token is.
    `kernel`: where rows are short enough, the kernel; else XLA, for `by_rows` one row after the
    other where the rows are not split over devices.
    """
    if bits is None:
        rate = 0.0
    if kernel and query.shape[1] <= KERNEL_LENGTH:
        return _over_mesh(query, key, value, segments, bits, heads, rate)
    if by_rows and batch_shards() == 1:
        return _by_rows(query, key, value, segments, bits, heads, rate)
    rows, length, hidden = query.shape
    split = (rows, length, heads, hidden // heads)
    query, key, value = (x.reshape(split) for x in (query, key, value))
    # Padding sees padding: a row of scores is never empty, so softmax is finite.
    mask: Bool[Array, "R 1 L L"] = segments[:, None, :, None] == segments[:, None, None, :]
    query = query * query.shape[-1] ** -0.5
    scores = jnp.einsum("rqnd,rknd->rnqk", query, key, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(jnp.where(mask, scores, _LOWEST), axis=-1)
    if bits is not None and rate:
        kept = keep(bits[:, None, :, None], _places(weights.shape, 1, 2, 3), rate)
        weights = jnp.where(kept, weights / (1 - rate), 0)
    y = jnp.einsum("rnqk,rknd->rqnd", weights.astype(value.dtype), value)
    return y.reshape(rows, length, hidden)


# Attention by rows. Three things are measured of XLA for CPUs (docs/benchmarks.md). `x[:,
# None] == x` of a row that a loop cuts out takes ten times as long as exp, so the mask is made
# before the loop. An array of bfloat16 is written whole for each row of it, so what a loop
# gives is float32. A product moves a left factor that it adds over the rows of, so backwards
# scores are [keys, queries]: two products then take them as they are and the third as its
# right factor.


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _by_rows(
    query: Array, key: Array, value: Array, segments: Array, bits: Array | None, heads: int,
    rate: float,
) -> Array:  # fmt: skip
    return _forward_by_rows(query, key, value, segments, bits, heads, rate)[0]


def _forward_by_rows(
    query: Array, key: Array, value: Array, segments: Array, bits: Array | None, heads: int,
    rate: float,
) -> tuple[Float[Array, "R L H"], Float[Array, "R N L"], Float[Array, "R N L"]]:  # fmt: skip
    """The output, and of each query the largest score and the sum of exp(score - largest)."""
    _, length, hidden = query.shape
    dim = hidden // heads
    block = max(n for n in range(1, _QUERIES + 1) if length % n == 0)
    starts = jnp.arange(0, length, block, dtype=jnp.uint32)

    def of_row(row: tuple[Any, ...]) -> tuple[Array, ...]:
        query, key, value, same, bits = row
        key, value = _heads_first(key, heads, (1, 2, 0)), _heads_first(value, heads, (1, 0, 2))
        query = jnp.moveaxis((query * dim**-0.5).reshape(-1, block, heads, dim), 2, 1)

        def of_block(part: tuple[Array, ...]) -> tuple[Array, ...]:
            query, same, bits, start = part
            scores = product_on_cpu(query, key)
            scores = jnp.where(same, scores, _LOWEST)
            largest = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - largest)
            total = weights.sum(-1, keepdims=True)
            if rate:
                kept = keep(bits[:, None], _places(weights.shape, 0, 1, 2) - start, rate)
                weights = jnp.where(kept, weights, 0)
            y = product_on_cpu(weights.astype(value.dtype), value)
            return y / (total * (1 - rate)), largest[..., 0], total[..., 0]

        blocks = (
            same.reshape(-1, block, length),
            None if bits is None else bits.reshape(-1, block),
        )
        y, *sums = jax.lax.map(of_block, (query, *blocks, starts))
        sums = (jnp.moveaxis(x, 0, 1).reshape(heads, length) for x in sums)
        return jnp.moveaxis(y, 1, 2).reshape(length, hidden), *sums

    rows = (query, key, value, _same(segments), bits)
    y, *sums = jax.lax.map(of_row, rows, batch_size=_rows_at_once(length))
    return y.astype(value.dtype), *sums


def _save_by_rows(
    query: Array, key: Array, value: Array, segments: Array, bits: Array | None, heads: int,
    rate: float,
) -> tuple[Array, tuple[Any, ...]]:  # fmt: skip
    arrays = (query, key, value, segments, bits)
    y, *sums = _forward_by_rows(*arrays, heads, rate)
    return y, (*arrays, *(checkpoint_name(x, SOFTMAX) for x in sums))


def _pull_back_by_rows(heads: int, rate: float, saved: tuple[Any, ...], gradient: Array) -> Any:
    """From the sums of the softmax, as FlashAttention's (arXiv 2205.14135, algorithm 4)."""
    query, key, value, segments, bits, *sums = saved
    _, length, hidden = query.shape
    dim = hidden // heads

    def of_row(row: tuple[Any, ...]) -> tuple[Array, ...]:
        query, key, value, same, bits, largest, total, gradient = row
        first, last = (1, 0, 2), (1, 2, 0)  # [heads, length, dim], [heads, dim, length]
        query = query * dim**-0.5
        scores = product_on_cpu(_heads_first(key, heads, first), _heads_first(query, heads, last))
        weights = jnp.exp(jnp.where(same, scores, _LOWEST) - largest[:, None])
        weights = weights * (1 / total)[:, None]
        kept = weights
        if rate:
            mask = keep(bits, _places(weights.shape, 0, 2, 1), rate)
            kept = jnp.where(mask, weights / (1 - rate), 0)
        for_kept = product_on_cpu(
            _heads_first(value, heads, first), _heads_first(gradient, heads, last)
        )
        product = kept * for_kept
        for_scores = (product - weights * product.sum(1, keepdims=True)).astype(query.dtype)
        for_value = product_on_cpu(kept.astype(value.dtype), _heads_first(gradient, heads, first))
        for_key = product_on_cpu(for_scores, _heads_first(query, heads, first))
        for_query = product_on_cpu(_heads_first(key, heads, last), for_scores) * dim**-0.5
        grads = (for_query.mT, for_key, for_value)
        return tuple(jnp.moveaxis(x, 0, 1).reshape(length, hidden) for x in grads)

    rows = (query, key, value, _same(segments), bits, *sums, gradient)
    grads = jax.lax.map(of_row, rows, batch_size=_rows_at_once(length))
    return *(x.astype(query.dtype) for x in grads), None, None


_by_rows.defvjp(_save_by_rows, _pull_back_by_rows)


def _rows_at_once(length: int) -> int | None:
    """Of short rows many, else their arrays are too small for more than one core; None: one."""
    rows = _SCORES // length**2
    return rows if rows > 1 else None


def _same(segments: Int[Array, "R L"]) -> Bool[Array, "R L L"]:
    return segments[:, :, None] == segments[:, None, :]


def _heads_first(x: Float[Array, "L H"], heads: int, order: tuple[int, ...]) -> Array:
    return x.reshape(len(x), heads, -1).transpose(order)


def _places(
    shape: tuple[int, ...], head_axis: int, query_axis: int, key_axis: int
) -> UInt32[Array, "..."]:
    """For keep(): of scores of `shape`, the same wherever in a row the text lies."""
    head, query, key = (
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        for axis in (head_axis, query_axis, key_axis)
    )
    return head * _A_HEAD + key - query  # modulo 2**32


def _over_mesh(
    query: Array, key: Array, value: Array, segments: Array, bits: Array | None, heads: int,
    rate: float,
) -> Array:  # fmt: skip
    """The kernel on every device's rows and heads; no collectives."""
    if bits is None:
        bits, rate = jnp.zeros(segments.shape, jnp.uint32), 0.0
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return _attention(query, key, value, segments, bits, heads, rate)
    parts = mesh.shape.get("tensor", 1)
    if heads % parts:
        parts = 1
    here = heads // parts

    def local(query: Array, key: Array, value: Array, segments: Array, bits: Array) -> Array:
        if parts > 1:  # the first head here is not the first
            first = (jax.lax.axis_index("tensor") * here).astype(jnp.uint32) * _A_HEAD
            bits = bits + first * WEYL
        return _attention(query, key, value, segments, bits, here, rate)

    split = tuple(axis for axis in BATCH_AXES if axis in mesh.auto_axes)
    rows = P(split)
    of_heads = P(split, None, "tensor" if parts > 1 else None)
    return jax.shard_map(
        local,
        in_specs=(of_heads, of_heads, of_heads, rows, rows),
        out_specs=of_heads,
        axis_names=set(mesh.auto_axes),
        check_vma=False,
    )(query, key, value, segments, bits)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(
    query: Array, key: Array, value: Array, segments: Array, bits: Array, heads: int,
    rate: float,
) -> Array:  # fmt: skip
    arrays = (query, key, value)
    return _call(_forward, arrays, segments, bits, heads, rate, 1, 4)[0]


def _save(*arguments: Any) -> tuple[Array, tuple[Array, ...]]:
    return _attention(*arguments), arguments[:5]


def _pull_back(heads: int, rate: float, saved: tuple[Array, ...], gradient: Array) -> Any:
    *arrays, segments, bits = saved
    grads = _call(_backward, (*arrays, gradient), segments, bits, heads, rate, 3, 10)
    return *grads, None, None


_attention.defvjp(_save, _pull_back)


def _call(
    kernel: Any, arrays: tuple[Array, ...], segments: Array, bits: Array, heads: int,
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
            pl.BlockSpec((1, 1, length), lambda row, part: (row, 0, 0)),
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
    )(segments[:, :, None], segments[:, None, :], bits[:, None, :], *arrays)


# In the kernels scores are [keys, queries]: sums over keys add whole registers, and of the big
# arrays none is transposed. Lanes of other heads are set to 0 instead of being cut off, which
# would move them.


def _forward(key_segments, query_segments, bits, query, key, value, out, *, dim, rate):  # type: ignore[no-untyped-def]
    query, key, value = query[0], key[0], value[0]
    same = key_segments[0] == query_segments[0]
    heads = query.shape[1] // dim
    lane_head, row_head = _head_of(query.shape[1], dim)
    y = jnp.zeros(query.shape[::-1], jnp.float32)
    for head in range(heads):
        weights, scale = _weights(query, key, same, lane_head == head, dim)
        if rate:
            weights = _drop(weights, bits[0], head, heads, rate)
        part = _dot(value, weights.astype(value.dtype), 0, 0) * scale
        y = jnp.where(row_head == head, part, y)
    out[0] = y.astype(out.dtype).T


def _backward(  # type: ignore[no-untyped-def]
    key_segments, query_segments, bits, query, key, value, gradient,
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
            kept = _drop(weights, bits[0], head, heads, rate)
            for_weights = _drop(for_weights, bits[0], head, heads, rate)
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


def _drop(weights: Array, bits: Array, head: int, heads: int, rate: float) -> Array:
    """Dropout of the weights [keys, queries] of one head, at the _places() of scores."""
    place = (pl.program_id(1) * heads + head) * int(_A_HEAD)
    place += jax.lax.broadcasted_iota(jnp.int32, weights.shape, 0)
    place -= jax.lax.broadcasted_iota(jnp.int32, weights.shape, 1)
    kept = keep(bits, place.astype(jnp.uint32), rate)
    return jnp.where(kept, weights * (1 / (1 - rate)), 0)


def _dot(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    return jax.lax.dot_general(
        x, y, (((x_axis,), (y_axis,)), ((), ())), preferred_element_type=jnp.float32
    )
