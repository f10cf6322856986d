"""Three steps of every task on several meshes of 8 devices.

    python mesh_steps.py OUT.npz

OUT.npz holds MESH/TASK/STEP/METRIC, and per parameter MESH/TASK/grads/PATH of the first step and
MESH/TASK/params/PATH after the last; MESH/random/params/PATH are weights drawn by the seed.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tiny

from piccolo_jax import build, optim, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.data.loader import Batches
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps

MESHES = ((1, 1, 1), (8, 1, 1), (2, 2, 2), (1, 4, 2))
RANDOM = ((1, 1, 1), (2, 2, 2))


def recording(optimizer):
    """The optimizer, keeping the last gradient in its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda grads, _, params=None: (grads, grads),
    )
    return optax.chain(keep, optimizer)


def main(out):
    arrays = {}
    for sizes in MESHES:
        config = tiny.config(mesh=MeshConfig(*sizes))
        # Where a gradient is 0 but for rounding, Adam's steps would be rounding made large.
        config.optim.eps = 1e-3
        # At 1e-2 the gradient falls from 200 to 0.1: a difference of large terms, and of rounding.
        config.optim.learning_rate = 1e-3
        mesh = sharding.make_mesh(config.mesh, jax.devices()[: int(np.prod(sizes))])
        model = tiny.embedder(layers=4, dropout=0.1, for_cpu=True)
        shardings = build.param_shardings(model, mesh)
        params = jax.tree.map(jax.device_put, tiny.params(model), shardings)
        if sizes in RANDOM:
            parts = build.Parts(model, None, None, False)
            random = build.make_params(parts, 3, shardings)
            arrays |= flat(f"{'x'.join(map(str, sizes))}/random/params", random)
        optimizer = recording(optim.make_optimizer(config, params))
        start = build.make_state(params, optimizer, mesh)
        places = jax.tree.map(lambda leaf: leaf.sharding, start)
        start = jax.device_get(start)
        for task in TASKS:
            state = jax.device_put(start, places)
            batches = Batches(
                config, [tiny.dataset(task)], TASKS, 32,
                sharding.batch_shards_of(mesh), sharding.local_shards(mesh),
            )  # fmt: skip
            steps = CompiledSteps(model, TASKS, config, optimizer, mesh, places)
            name = f"{'x'.join(map(str, sizes))}/{task}"
            for step in range(config.total_steps):
                batch = batches.at(step)
                values = sharding.global_batch(mesh, batch.sharded, batch.replicated)
                state, metrics = steps.get(task, batch.shape, state, values)[0](state, values)
                arrays |= {f"{name}/{step}/{key}": value for key, value in metrics.items()}
                if step == 0:
                    arrays |= flat(f"{name}/grads", state.opt_state[0])
            arrays |= flat(f"{name}/params", state.params)
    np.savez(out, **arrays)


def flat(name, tree):
    return {
        f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}": leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


if __name__ == "__main__":
    main(sys.argv[1])
