"""The attention kernel on a mesh against plain XLA.

    python attention_on_meshes.py 1x2x2

Prints the largest difference, relative, of the value and of each gradient.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.ops.attention import attention
from piccolo_jax.ops.dropout import bits_of

ROWS, LENGTH, HIDDEN, HEADS = 4, 16, 256, 4


def main(sizes):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(3, ROWS, LENGTH, HIDDEN)).astype(np.float32)
    cotangent = rng.normal(size=(ROWS, LENGTH, HIDDEN)).astype(np.float32)
    segments = np.repeat([[1] * 5 + [2] * 11], ROWS, 0).astype(np.int32)
    bits = bits_of(jax.random.key(0), jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH))

    def run(kernel):
        def loss(query, key, value):
            y = attention(
                query, key, value, segments, np.asarray(bits), heads=HEADS, rate=0.3, kernel=kernel
            )
            return (y * cotangent).sum(), y

        (_, y), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(*inputs)
        return jax.device_get((y, *gradients))

    expected = run(False)
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh), pltpu.force_tpu_interpret_mode():
        actual = run(True)
    for a, e in zip(actual, expected, strict=True):
        print(np.abs(a - e).max() / np.abs(e).max())


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1].split("x"))))
