"""The search compiled for a TPU slice that isn't there: memory and estimated time of a query block.

    python tests/benchmarks/mining_on_tpu.py --topology=v5e:16x16 [--passages=1000000000]
        [--dim=256] [--ks=100,1000]

Needs libtpu; executes nothing. Passages are float32 vectors, all of them on the devices.
"""

import argparse
import math
import sys
from pathlib import Path

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from piccolo_jax import metrics, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.mining import search
from piccolo_jax.ops.top_k import TILE, chunks_of
from piccolo_jax.planning import hlo_cost, topology


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--passages", type=int, default=10**9)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--ks", default="100,1000")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, not used
    chip, devices = topology.devices(args.topology)
    mesh = sharding.make_mesh(MeshConfig(), devices)
    number, chunk = chunks_of(math.ceil(args.passages / TILE / len(devices)))
    tiles = number * chunk * len(devices)
    queries = search._DEVICE_QUERIES
    rows = []
    for k in map(int, args.ks.split(",")):

        def array(shape, spec, dtype="float32"):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

        with jax.set_mesh(mesh):
            program = search._nearest.lower(
                array((queries, args.dim), P()),
                array((tiles, TILE, args.dim), P(sharding.AXES)),
                array((), P(), "int32"),
                k=k,
            ).compile()
        memory, cost = program.memory_analysis(), hlo_cost.read(program.as_text(), chip)
        products = 2 * queries * tiles * TILE * args.dim / len(devices)
        moved = sum(item.bytes for item in cost.collectives.values())
        seconds = cost.seconds(chip)
        rows.append([
            k, f"{memory.argument_size_in_bytes / 2**30:.2f}",
            f"{memory.temp_size_in_bytes / 2**30:.2f}", f"{6 * products / chip.peak:.3f}",
            f"{seconds:.3f}", f"{moved / 2**20:.1f}", cost.unknown_loops,
            sum(item.count for item in cost.unestimated.values()), f"{queries / seconds:,.0f}",
        ])  # fmt: skip
        for item in cost.unestimated.values():
            print("without the compiler's estimate:", item, file=sys.stderr)
    print(
        f"{args.topology}: {len(devices)} chips, {tiles * TILE:,} places for passages of {args.dim}"
        f" dimensions, {queries} queries at a time; per chip"
    )
    print(metrics.table(
        ("k", "corpus GiB", "temporary GiB", "products s", "all s", "moved MiB", "unknown loops",
         "unestimated", "queries/s"), rows,
    ))  # fmt: skip


if __name__ == "__main__":
    main()
