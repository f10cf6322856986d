"""TPU slices by name, and what their chips can do: devices to compile for, none to run on."""

import dataclasses
import itertools
import math
import os
import re
from typing import Any

import jax

from piccolo_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU chip, as a device of JAX (both cores of v4 and v5p together).

    peak: bfloat16 operations a second; hbm: bytes; hbm_bandwidth: bytes a second; clock: cycles a
    second, of the cycles that the compiler estimates; link: bytes a second one way over one link to
    a neighbour; dimensions: of the torus; largest: chips of the largest slice.
    """

    peak: float
    hbm: int
    hbm_bandwidth: float
    clock: float
    link: float
    dimensions: int
    largest: int


# peak, HBM: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}; jax._src.pallas.mosaic.tpu_info agrees.
# link: jax-ml.github.io/scaling-book/tpus. clock: v5e 1.5 GHz (ibid.), v4 1.05 GHz (arXiv
# 2304.01433, table 4); the peak of both is that times 32,768 operations per 128 x 128 matrix unit,
# 4 units a core, and the others' clocks are set by the same rule (v6e: of 256 x 256).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1.23e12, 1.05e9, 4.5e10, 3, 4096),
    "v5e": Chip(197e12, 16 * 2**30, 8.2e11, 1.5e9, 4.5e10, 2, 256),
    "v5p": Chip(459e12, 95 * 2**30, 2.77e12, 1.75e9, 9.0e10, 3, 8960),
    "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 1.75e9, 9.0e10, 2, 256),
}
_SLICES_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL_3D = ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4")

# What libtpu asks of the machine, which is no TPU: read when it is loaded.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a lock file keeps a second process out
}
# The compiler recurses where softmax lies between two products: its stacks of 64 KiB overflow.
_COMPILER_FLAGS = "--fibers_default_thread_stack_size=4194304"


def devices(name: str) -> tuple[Chip, list[jax.Device]]:
    """The chip and the devices of the slice `name`, e.g. v5e:8x8; needs no TPU, but libtpu.

    Raises UserError if there is no such slice, or libtpu can't be loaded.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if not match or match[1] not in CHIPS:
        raise UserError(
            f"--topology={name}: must be CHIP:SHAPE, e.g. v5e:8x8, with CHIP one of"
            f" {', '.join(CHIPS)}; the shapes of v5e and v6e are {', '.join(_SLICES_2D)}"
        )
    chip, shape = CHIPS[match[1]], match[2]
    if not _exists(chip, shape):
        small = _SLICES_2D if chip.dimensions == 2 else _SMALL_3D
        rule = (
            ""
            if chip.dimensions == 2
            else f", and AxBxC with A <= B <= C, multiples of 4, of at most {chip.largest} chips"
        )
        raise UserError(
            f"--topology={name}: there is no such slice; those of {match[1]} are"
            f" {', '.join(small)}{rule}"
        )
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    flags = os.environ.get("LIBTPU_INIT_ARGS", "")
    if _COMPILER_FLAGS not in flags:
        os.environ["LIBTPU_INIT_ARGS"] = f"{flags} {_COMPILER_FLAGS}".strip()
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if math.prod(map(int, shape.split("x"))) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    if match[1] == "v4":
        options["chip_config_name"] = "megacore"
    try:
        topology = topologies.get_topology_desc(name, platform="tpu", **options)
    except Exception as error:  # of several kinds, with the platform's own messages
        raise UserError(
            f"--topology={name}: the TPU compiler can't be loaded"
            f" ({str(error).strip().splitlines()[0]}): pip install libtpu==0.0.42.1"
        ) from error
    return chip, list(topology.devices)


def _exists(chip: Chip, shape: str) -> bool:
    if chip.dimensions == 2:
        return shape in _SLICES_2D
    if shape in _SMALL_3D:
        return True
    sizes = [int(n) for n in shape.split("x")]
    return (
        len(sizes) == 3
        and all(n > 0 and n % 4 == 0 for n in sizes)
        and all(a <= b for a, b in itertools.pairwise(sizes))
        and math.prod(sizes) <= chip.largest
    )
