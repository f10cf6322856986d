"""Matrix products that XLA for CPUs computes fast.

Processors with instructions for bfloat16 (AVX-512, AMX) use them in XLA where the result is float32
and no factor is to be transposed: other products of bfloat16 take as long as those of float32, or
longer (docs/benchmarks.md).
"""

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from piccolo_jax.sharding import is_split


def product_on_cpu(x: Float[Array, "*B N K"], y: Float[Array, "*B K M"]) -> Float[Array, "*B N M"]:
    """x @ y in float32, of factors in either type."""
    return jnp.matmul(in_memory(x), in_memory(y), preferred_element_type=jnp.float32)


def in_memory(x: jax.Array) -> jax.Array:
    """x; in bfloat16 written as it is, so that no product takes it transposed.

    Not where arrays are split over devices, which would gather x.
    """
    if x.dtype == jnp.float32 or is_split():
        return x
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))
