"""The encoder in bfloat16, with the operations for CPUs, on a mesh against one device.

    python bfloat16_on_a_mesh.py

Prints the largest difference of the gradients, relative to the largest of each, and how many
collectives of each kind the program of float32 has and that of bfloat16.
"""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.models.bert import BERT_RULES, BertConfig, BertEncoder

CONFIG = BertConfig(
    vocab_size=64,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    intermediate_size=128,
    max_positions=32,
)


def main():
    tokens = np.random.default_rng(0).integers(5, 60, (8, 32)).astype(np.int32)
    segments, positions = np.ones_like(tokens), np.arange(32, dtype=np.int32)[None].repeat(8, 0)
    key = jax.random.key(0)
    mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=2, tensor=2))
    collectives = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        model = BertEncoder(CONFIG, dtype=dtype, remat="dots", for_cpu=True)
        params = jax.jit(model.init)(key, tokens, segments, positions)["params"]

        def loss(params, model=model):
            hidden = model.apply({"params": params}, tokens, segments, positions, None, key)
            return (hidden.astype(jnp.float32) ** 2 * jnp.arange(64)).mean()

        expected = jax.jit(jax.grad(loss))(params)
        shardings = sharding.param_shardings(mesh, params, BERT_RULES)
        with jax.sharding.set_mesh(mesh):
            split = jax.tree.map(sharding.place, jax.device_get(params), shardings)
            program = jax.jit(jax.grad(loss)).lower(split).compile()
            actual = program(split)
        kinds = r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)\("
        collectives[dtype] = collections.Counter(re.findall(kinds, program.as_text()))

    def difference(actual, expected):
        actual, expected = np.asarray(actual), np.asarray(expected)
        return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-3)

    print(max(map(difference, jax.tree.leaves(actual), jax.tree.leaves(expected))))
    for counted in collectives.values():
        print(sorted(counted.items()))


if __name__ == "__main__":
    main()
