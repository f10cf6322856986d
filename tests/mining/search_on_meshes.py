"""Searches on several meshes, for a process with 8 devices: prints what differs, if anything."""

import itertools

import jax
import numpy as np

from piccolo_jax import sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.mining.search import search
from piccolo_jax.ops.top_k import TILE

QUERIES, KEYS, WIDTH = 270, 3 * TILE + 77, 24
MESHES = {
    "1": (MeshConfig(), 1),
    "8": (MeshConfig(data=8), 8),
    "2x4": (MeshConfig(data=2, fsdp=4), 8),
    "tensor": (MeshConfig(data=1, fsdp=2, tensor=3), 6),
}


def main():
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(QUERIES, WIDTH)).astype(np.float32)
    corpus = rng.normal(size=(KEYS, WIDTH)).astype(np.float32)
    corpus[5000:5100] = corpus[100]  # ties, over tiles and devices
    queries[7] = corpus[100]
    first = {}
    for (name, (mesh, devices)), host in itertools.product(MESHES.items(), (True, False)):
        mesh = sharding.make_mesh(mesh, jax.devices()[:devices])
        for budget in (0, TILE * WIDTH * 4):
            found = search(queries, corpus, 300, mesh, device_bytes=budget, on_host=host)
            same = first.setdefault(host, found)
            for field in ("scores", "indices"):
                if not np.array_equal(getattr(found, field), getattr(same, field)):
                    print("differs:", name, f"on_host={host}", f"budget={budget}", field)
    np.testing.assert_allclose(first[True].scores, first[False].scores, atol=1e-6)
    np.testing.assert_array_equal(first[True].indices[7, :101], [100, *range(5000, 5100)])
    print("compared")


main()
