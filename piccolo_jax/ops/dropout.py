"""Dropout whose random numbers don't depend on what is computed together, or where."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

WEYL = np.uint32(0x9E3779B9)


def row_bits(key: Array, rows: Int[Array, " R"]) -> UInt32[Array, " R"]:
    """The random bits of each row, from the key and the row's number."""
    key_bits = jax.random.bits(key, (2,), jnp.uint32)
    return _hash(_hash(rows.astype(jnp.uint32) + key_bits[0]) + key_bits[1])


def dropout(
    x: Float[Array, "R ..."], rate: float, key: Array, rows: Int[Array, " R"]
) -> Float[Array, "R ..."]:
    """Zeroes a share `rate` of x and divides the rest by 1 - rate.

    Which ones depends on the key, the row's number and the place within the row alone: not on which
    rows are computed together. The random bits are a hash of these three (lowbias32, see
    github.com/skeeto/hash-prospector), which compilers fuse with what surrounds it; those of
    jax.random take several times as long on CPU and pass through memory on TPU.
    """
    return drop(x, rate, row_bits(key, rows))


def drop(x: Float[Array, "R ..."], rate: float, bits: UInt32[Array, " R"]) -> Float[Array, "R ..."]:
    """dropout() by the row_bits() of the rows."""
    if rate == 0:
        return x
    place = jax.lax.iota(jnp.uint32, math.prod(x.shape[1:])).reshape(1, *x.shape[1:])
    return jnp.where(keep(bits.reshape(-1, *[1] * (x.ndim - 1)), place, rate), x / (1 - rate), 0)


def keep(
    bits: UInt32[Array, "..."], place: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Whether the element at `place` of a row with `bits` stays."""
    # A Weyl sequence from the row's own start, so that rows aren't reorderings of each other.
    return _hash(bits + place * WEYL) >= jnp.uint32(rate * 2**32)


def _hash(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
