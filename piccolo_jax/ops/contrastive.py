"""Similarities at every Matryoshka prefix (arXiv 2205.13147) for the price of the full width.

Prefixes are nested, so the product over the first d coordinates is the product over the previous
prefix plus that of the coordinates between them; cosines follow by dividing by the norms of the
prefixes. All arrays are global; products are float32 at the highest precision, since a similarity
is divided by temperatures as low as 0.01.
"""

import itertools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A vector shorter than this is treated as being of this length, like torch's normalize.
_MIN_NORM = 1e-12


def paired_cosines(
    x: Float[Array, "*batch width"], y: Float[Array, "*batch width"], dims: tuple[int, ...]
) -> Float[Array, " dims *batch"]:
    """Cosine of each vector of x with its partner in y, at each prefix. x and y may broadcast."""
    return _prefix_sums(x * y, dims) * _inverse_norms(x, dims) * _inverse_norms(y, dims)


def nested_cosines(
    queries: Float[Array, "queries width"],
    keys: Float[Array, "keys width"],
    dims: tuple[int, ...],
) -> Iterator[Float[Array, "queries keys"]]:
    """Yields the cosine of every query with every key, prefix by prefix."""
    query_scales, key_scales = _inverse_norms(queries, dims), _inverse_norms(keys, dims)
    products = jnp.zeros((), queries.dtype)
    for i, (start, stop) in enumerate(_blocks(dims)):
        products += jnp.einsum(
            "qd,kd->qk",
            queries[:, start:stop],
            keys[:, start:stop],
            precision=jax.lax.Precision.HIGHEST,
        )
        yield products * query_scales[i][:, None] * key_scales[i][None, :]


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


def _inverse_norms(
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
