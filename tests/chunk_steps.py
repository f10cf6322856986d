"""A step with dropout on one mesh of 8 devices, encoded at once and in chunks, layer by layer.

    python chunk_steps.py 2x2x2 OUT.npz

OUT.npz holds WAY/TASK/loss, per parameter WAY/TASK/PATH the gradient, and all_reduces/WAY/TASK the
bytes of its all-reduces; WAY: whole or chunks.
"""

import sys

import jax
import numpy as np
import tiny
from mesh_steps import flat

from piccolo_jax import build, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.data.loader import Batches
from piccolo_jax.models.embedder import encode
from piccolo_jax.planning import hlo_cost
from piccolo_jax.planning.topology import CHIPS
from piccolo_jax.tasks import TASKS

# Numbers of chunks, so that each has several rows. Compiling a step takes long: one loss is tried
# on every mesh, and every loss on the mesh that splits rows and weights.
CHUNKED = {(1, 1, 1): 3, (2, 2, 2): 2, (4, 1, 1): 2}
TASKS_OF = {sizes: ("retrieval",) for sizes in CHUNKED} | {(2, 2, 2): tuple(TASKS)}


def main(sizes, out):
    config, model = tiny.config(), tiny.embedder(dropout=0.2, for_cpu=True)
    ways = {"whole": (model, 1), "chunks": (model.clone(unrolled=True), CHUNKED[sizes])}
    for loss in (config.loss.retrieval, config.loss.similarity, config.loss.classification):
        # Divides the rounding of cosines, which is no matter of chunks. With larger ones gradients
        # are small sums of large terms: 1.2e-6 at 0.2, 0.8e-6 at 0.5, 1.7e-6 at 1.
        loss.temperature = 0.5
    mesh = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
    params = jax.tree.map(jax.device_put, tiny.params(model), build.param_shardings(model, mesh))
    arrays = {}
    for task in TASKS_OF[sizes]:
        config.batch_size = 39  # every device has several packed rows, and so has every chunk
        for way, (model, chunks) in ways.items():
            config.train.micro_batches = chunks
            batch = Batches(
                config, [tiny.dataset(task)], TASKS, 32,
                sharding.batch_shards_of(mesh), sharding.local_shards(mesh),
            ).at(0)  # fmt: skip
            values = sharding.global_batch(mesh, batch.sharded, batch.replicated)

            def loss(params, model=model, chunks=chunks, values=values, task=task):
                embeddings = encode(model, params, values, jax.random.key(3), chunks)
                return TASKS[task].loss(embeddings, values, config.loss)[0]

            with jax.set_mesh(mesh):
                step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
            value, grads = step(params)
            name = f"{way}/{task}"
            arrays |= {f"{name}/loss": value} | flat(name, grads)
            moved = hlo_cost.read(step.as_text(), CHIPS["v5e"]).collectives
            arrays[f"all_reduces/{name}"] = sum(
                c.bytes for (kind, _), c in moved.items() if kind == "all-reduce"
            )
    np.savez(out, **arrays)


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1].split("x"))), sys.argv[2])
