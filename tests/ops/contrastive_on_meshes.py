"""The contrastive operations on meshes of 8 devices.

    python contrastive_on_meshes.py OUT.npz

OUT.npz holds MESH/BLOCK/KEYS/NAME, values and gradients of nested_log_sum_exp(), and
NAME/{value,gradient}/collectives, what moves in the compiled programs: `all-gather 2` are two.
"""

import functools
import itertools
import re
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from piccolo_jax import losses, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.ops.contrastive import nested_log_sum_exp, take

DIMS = (3, 10, 24)
TEMPERATURE = 0.2
QUERIES, KEYS = 16, (48, 45)  # 45: what 8 devices don't divide
BLOCKS = (0, 5, 16, 48, 1000)
MESHES = ("1x1x1", "8x1x1", "2x4x1", "4x2x1", "2x2x2")


def arrays():
    """Queries, keys, weights (some 0), keep, and factors for a scalar of the results."""
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(QUERIES, 24)).astype(np.float32),
        rng.normal(size=(KEYS[0], 24)).astype(np.float32),
        rng.integers(0, 4, KEYS[0]).astype(np.float32),
        rng.random((QUERIES, KEYS[0])) < 0.7,
        rng.normal(size=(len(DIMS), QUERIES)).astype(np.float32),
    )


def log_sum_exp(queries, keys, block):
    _, _, weights, keep, _ = arrays()
    return nested_log_sum_exp(
        queries, keys, weights[: len(keys)], keep[:, : len(keys)],
        dims=DIMS, score=lambda c: c / TEMPERATURE, block_size=block,
    ).value  # fmt: skip


def scalar(queries, keys, block):
    value = log_sum_exp(queries, keys, block)
    return (value * arrays()[-1]).sum(), value


def collectives(program):
    found = re.findall(
        r"= \S+ (all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\(",
        program.compile({"xla_backend_optimization_level": 0}).as_text(),
    )
    return np.array([f"{kind} {count}" for kind, count in Counter(found).items()])


def values_and_gradients(mesh):
    queries, keys, *_ = arrays()
    rows, whole = NamedSharding(mesh, P(sharding.BATCH_AXES)), NamedSharding(mesh, P())
    for block, count in itertools.product(BLOCKS, KEYS):
        run = jax.value_and_grad(functools.partial(scalar, block=block), (0, 1), has_aux=True)
        # What the mesh divides comes split, as in training.
        args = jax.device_put((queries, keys[:count]), (rows, whole if count % 8 else rows))
        (_, value), gradients = jax.jit(run)(*args)
        names = ("value", "queries", "keys")
        for name, array in zip(names, (value, *gradients), strict=True):
            yield f"{block}/{count}/{name}", array


def moves(mesh):
    """Collectives of each function and of its gradient, cotangents given."""
    queries, keys, *_, factors = arrays()
    rows = NamedSharding(mesh, P(sharding.BATCH_AXES))
    columns = NamedSharding(mesh, P(None, sharding.BATCH_AXES))
    queries, keys = jax.device_put((queries, keys), rows)
    index = jnp.asarray(np.random.default_rng(1).permutation(KEYS[0])[:QUERIES])
    table = index, index[::-1], index[:, None], np.ones((QUERIES, 1), bool)
    options = {"dims": DIMS, "temperature": TEMPERATURE}

    def loss(function, *args):
        return (lambda x: function(x, *args, **options)[0]), (keys,), np.float32(1), None

    functions = {
        str(block): (functools.partial(log_sum_exp, block=block), (queries, keys), factors, columns)
        for block in BLOCKS
    } | {
        "take": ((lambda x: take(x, index)), (keys,), queries, rows),
        "info_nce": loss(losses.info_nce, *table),
        "cosent": loss(losses.cosent, *table[:2], jnp.arange(QUERIES)),
        "label_contrast": loss(losses.label_contrast, *table),
    }
    for name, (function, args, cotangent, spec) in functions.items():
        forward = jax.jit(function, out_shardings=spec)
        backward = jax.jit(
            lambda cotangent, *args, f=function: jax.vjp(f, *args)[1](cotangent),
            out_shardings=(rows,) * len(args),
        )
        yield f"{name}/value/collectives", collectives(forward.lower(*args))
        cotangent = jax.device_put(cotangent, spec)
        yield f"{name}/gradient/collectives", collectives(backward.lower(cotangent, *args))


def main(out):
    results = {}
    for name in MESHES:
        sizes = tuple(map(int, name.split("x")))
        mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(mesh):
            results |= {f"{name}/{key}": array for key, array in values_and_gradients(mesh)}
            if name == "2x4x1":
                results |= dict(moves(mesh))
    np.savez(out, **results)


if __name__ == "__main__":
    main(sys.argv[1])
