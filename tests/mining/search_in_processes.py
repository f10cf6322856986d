"""A search, by every process of a run; the first argument is where process 0 saves what it found.

A module of its own name for launch/local_processes.py, which starts several.
"""

import sys

import jax
import numpy as np

from piccolo_jax import distributed, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.mining.search import search
from piccolo_jax.ops.top_k import TILE

distributed.start()
rng = np.random.default_rng(0)
queries = rng.normal(size=(30, 16)).astype(np.float32)
corpus = rng.normal(size=(2 * TILE + 50, 16)).astype(np.float32)
mesh = sharding.make_mesh(MeshConfig(data=-1, fsdp=4))
found = search(queries, corpus, 60, mesh, device_bytes=4 * TILE * 16, on_host=False)
distributed.check_same(scores=found.scores.tobytes(), indices=found.indices.tobytes())
if jax.process_index() == 0:
    np.savez(sys.argv[1], scores=found.scores, indices=found.indices)
    print(jax.process_count(), "processes")
