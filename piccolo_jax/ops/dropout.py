"""Dropout whose random numbers don't depend on what is computed together, or where."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

WEYL = np.uint32(0x9E3779B9)


def bits_of(key: Array, tokens: Int[Array, "..."] | UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The random bits of each token, from the key and the token's number."""
    key_bits = jax.random.bits(key, (2,), jnp.uint32)
    return _hash(_hash(tokens.astype(jnp.uint32) + key_bits[0]) + key_bits[1])


def dropout(
    x: Float[Array, "*T H"], rate: float, key: Array, tokens: Int[Array, "*T"] | UInt32[Array, "*T"]
) -> Float[Array, "*T H"]:
    """Zeroes a share `rate` of x and divides the rest by 1 - rate.

    Which ones depends on the key, the token's number and the place within its vector alone: not on
    which tokens are computed together, or on which device. The random bits are a hash of these
    three (lowbias32, see github.com/skeeto/hash-prospector), which compilers fuse with what
    surrounds it; those of jax.random take several times as long on CPU and pass through memory on
    TPU.
    """
    if rate == 0:
        return x
    place = jax.lax.iota(jnp.uint32, x.shape[-1])
    return jnp.where(keep(bits_of(key, tokens)[..., None], place, rate), x / (1 - rate), 0)


def keep(
    bits: UInt32[Array, "..."], place: UInt32[Array, "..."], rate: float
) -> Bool[Array, "..."]:
    """Whether the element at `place` of what a token with `bits` has stays."""
    # A Weyl sequence from the token's own start, so that tokens aren't reorderings of each other.
    return _hash(bits + place * WEYL) >= jnp.uint32(rate * 2**32)


def _hash(x: Array) -> Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
