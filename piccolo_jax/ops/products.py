"""Matrix products that XLA for CPUs computes fast.

Processors with instructions for bfloat16 (AVX-512, AMX) use them in XLA where the result is float32
and no factor is to be transposed: other products of bfloat16 take as long as those of float32, or
longer (docs/benchmarks.md).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from piccolo_jax.sharding import is_split

_FOR_EIGEN = 512  # tokens


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


def compiler_options(dtype: Any, for_cpu: bool, tokens: int) -> dict[str, str]:
    """Options of XLA's compiler for a program that encodes `tokens` at a time on a device.

    XLA for CPUs has two libraries for products. YNNPACK, its default, is the one with instructions
    for bfloat16. In float32 and where there is AVX-512, Eigen is faster for all but few tokens,
    most of all over the heads of attention (docs/benchmarks.md); YNNPACK then keeps sums and
    largest elements. Other devices have no such options.
    """
    if for_cpu and dtype == jnp.float32 and tokens >= _FOR_EIGEN and _has_avx512():
        return {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    return {}


@functools.cache
def _has_avx512() -> bool:
    config: Any = np.show_config(mode="dicts")
    found = config.get("SIMD Extensions", {}).get("found", [])
    return any(name == "X86_V4" or name.startswith("AVX512") for name in found)
