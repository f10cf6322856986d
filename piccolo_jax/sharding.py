"""The device mesh, where parameters lie on it, and pins for activations.

Every array of a step is global; rows and texts are split over `BATCH_AXES`, parameters over `fsdp`
and `tensor` by rules (regex on the parameter's path, PartitionSpec), first match wins.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

Rules = tuple[tuple[str, PartitionSpec], ...]

_MOST_REPLICATED = 0.05  # of the parameters' bytes, where fsdp > 1
_MOST_NAMED = 5


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all of all processes), -1 filled in.

    Devices are arranged by the slice's topology, so that neighbours on `tensor` and then on `fsdp`
    are near each other; where JAX finds no such arrangement (some slices with a side of 20 or 28),
    they stay in their order, which goes host by host. Over several slices, `data` alone goes from
    slice to slice. Raises UserError if the sizes don't multiply to the number of devices, or `data`
    doesn't fit the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = {axis: getattr(config, axis) for axis in AXES}
    unknown = [axis for axis in AXES if sizes[axis] == -1]
    for axis in AXES:
        if sizes[axis] != -1 and sizes[axis] < 1:
            raise UserError(f"config.mesh.{axis} = {sizes[axis]}: must be -1 or greater than 0")
    if len(unknown) > 1:
        fields = ", ".join(f"config.mesh.{axis} = -1" for axis in unknown)
        raise UserError(f"{fields}: at most one axis can be what remains")
    known = math.prod(sizes[axis] for axis in AXES if axis not in unknown)
    if len(devices) % known or (not unknown and known != len(devices)):
        fields = ", ".join(f"config.mesh.{axis} = {sizes[axis]}" for axis in AXES)
        divisors = [str(n) for n in range(1, len(devices) + 1) if len(devices) % n == 0]
        raise UserError(
            f"{fields}: the sizes must multiply to the number of devices, {len(devices)}, so each"
            f" is one of {', '.join(divisors)} (-1 on one axis: all that remain)"
        )
    for axis in unknown:
        sizes[axis] = len(devices) // known
    return Mesh(_arrange(sizes, devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arrange(sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    slices = collections.defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    counts = [len(members) for members in slices.values()]
    if len(set(counts)) > 1:
        raise UserError(
            f"slices of {', '.join(map(str, counts))} devices: a mesh needs slices of one size"
        )
    if sizes["data"] % len(slices):
        inside = len(devices) // len(slices)
        raise UserError(
            f"config.mesh.data = {sizes['data']}: the devices are in {len(slices)} slices, and only"
            " the data axis goes from one to another, so it must be a multiple of that: fsdp *"
            f" tensor must divide the {inside} devices of a slice (fsdp = {sizes['fsdp']}, tensor ="
            f" {sizes['tensor']})"
        )
    shape = (sizes["data"] // len(slices), sizes["fsdp"], sizes["tensor"])
    return np.concatenate([_arrange_slice(shape, slices[number]) for number in sorted(slices)])


def _arrange_slice(shape: tuple[int, int, int], devices: Sequence[jax.Device]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (TypeError, ValueError):  # it loses prime factors of sizes such as 10 and 28
        return np.array(devices).reshape(shape)


def batch_shards_of(mesh: Mesh | jax.sharding.AbstractMesh) -> int:
    """Number of parts into which rows and texts are split on `mesh`."""
    return math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def batch_shards() -> int:
    """Number of parts into which rows and texts are split on the mesh in context; 1 without one.

    Inside over_data() these are the parts of one part of `data`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES if axis in mesh.auto_axes)


def is_split() -> bool:
    """Whether the compiler splits arrays over devices of the mesh in context."""
    mesh = jax.sharding.get_abstract_mesh()
    return any(mesh.shape[axis] > 1 for axis in mesh.auto_axes)


def constrain(x: jax.Array, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Pins `x` to PartitionSpec(*spec) on the mesh in context; without one, returns `x`.

    An entry whose mesh size doesn't divide its dimension is dropped: x is whole along it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.auto_axes:
        return x
    entries = (((e,) if isinstance(e, str) else e or ()) for e in spec)
    auto = [tuple(axis for axis in entry if axis in mesh.auto_axes) or None for entry in entries]
    return jax.lax.with_sharding_constraint(x, _divisible(mesh, x.shape, auto))


def over_data(f: Callable[..., jax.Array], whole: int) -> Callable[..., jax.Array]:
    """f, run by each part of the mesh's axis `data` on its own part of the arrays' first axis.

    Its first `whole` arguments are not split; their gradients are summed over the parts at the end,
    by one all-reduce. The result is split like the arrays. Other axes stay the compiler's.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.shape["data"] == 1:
        return f
    split, rest = PartitionSpec("data"), (PartitionSpec(),) * whole

    def run(*arguments: Any) -> jax.Array:
        specs = (*rest, *[split] * (len(arguments) - whole))
        return jax.shard_map(
            f, in_specs=specs, out_specs=split, axis_names={"data"}, check_vma=False
        )(*arguments)

    return run


def param_shardings(
    mesh: Mesh | jax.sharding.AbstractMesh, abstract_params: Any, rules: Rules
) -> Any:
    """A NamedSharding per parameter, in the tree of `abstract_params`.

    The first rule whose regex is found in the "/"-joined path decides; a parameter without one is
    on every device whole, as is a dimension that its mesh axes don't divide.
    """

    def choose(path: Any, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, _divisible(mesh, leaf.shape, spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map_with_path(choose, abstract_params)


def check_split(mesh: Mesh | jax.sharding.AbstractMesh, abstract_params: Any, rules: Rules) -> None:
    """Raises UserError if fsdp > 1 leaves more than 5 % of the parameters' bytes on every device.

    Names the largest of those parameters, their bytes, and the sizes of fsdp that would do.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    whole, total = _whole(mesh, abstract_params, rules)
    if fsdp == 1 or sum(whole.values()) <= _MOST_REPLICATED * total:
        return
    rest = mesh.shape["data"] * fsdp
    possible = []
    for size in range(1, rest + 1):
        if rest % size == 0:
            other = jax.sharding.AbstractMesh((rest // size, size, tensor), AXES)
            left = sum(_whole(other, abstract_params, rules)[0].values())
            if size == 1 or left <= _MOST_REPLICATED * total:
                possible.append(str(size))
    largest = sorted(whole, key=lambda name: -whole[name])[:_MOST_NAMED]
    names = ", ".join(f"{name} ({whole[name]:,} bytes)" for name in largest)
    raise UserError(
        f"config.mesh.fsdp = {fsdp}: {sum(whole.values()):,} of {total:,} bytes of parameters would"
        f" stay whole on every device, because {fsdp} doesn't divide their dimensions (config.model"
        f" sizes): {names}{', ...' if len(whole) > len(largest) else ''}. On these devices fsdp can"
        f" be {', '.join(possible)} for this model"
    )


def _whole(
    mesh: Mesh | jax.sharding.AbstractMesh, abstract_params: Any, rules: Rules
) -> tuple[dict[str, int], int]:
    """Bytes of each parameter that fsdp doesn't split, by path; and of all parameters."""
    shardings = param_shardings(mesh, abstract_params, rules)
    whole, total = {}, 0
    for (path, leaf), s in zip(
        jax.tree.leaves_with_path(abstract_params), jax.tree.leaves(shardings), strict=True
    ):
        size = leaf.size * leaf.dtype.itemsize
        total += size
        if not any("fsdp" in ((e,) if isinstance(e, str) else e or ()) for e in s.spec):
            whole[jax.tree_util.keystr(path, simple=True, separator="/")] = size
    return whole, total


def _divisible(
    mesh: Mesh | jax.sharding.AbstractMesh, shape: tuple[int, ...], spec: Iterable[Any]
) -> PartitionSpec:
    entries = tuple(spec)
    if len(entries) > len(shape):
        raise ValueError(f"{spec} has more entries than the array of shape {shape}")
    kept = []
    for entry, size in zip(entries, shape, strict=False):
        axes = (entry,) if isinstance(entry, str) else tuple(entry or ())
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        kept.append(entry if divides else None)
    return PartitionSpec(*kept)


def local_shards(mesh: Mesh) -> tuple[int, ...]:
    """The shards of rows and texts that this process's devices hold, in order."""
    shards = batch_shards_of(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    slices = sharding.addressable_devices_indices_map((shards,)).values()
    return tuple(sorted({range(shards)[index[0]][0] for index in slices if index is not None}))


def place(value: Any, sharding: NamedSharding) -> jax.Array:
    """The global array of `value` in its sharding.

    `value` has a shape and gives its parts by index, a slice per dimension; every process asks for
    the parts of its own devices, and for each of them once.
    """
    parts: dict[tuple[Any, ...], np.ndarray] = {}

    def read(index: Any) -> np.ndarray:
        key = tuple((part.start, part.stop) for part in index)
        if key not in parts:
            parts[key] = value[index]
        return parts[key]

    return jax.make_array_from_callback(value.shape, sharding, read)


def global_batch(
    mesh: Mesh, sharded: dict[str, np.ndarray], replicated: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """Global arrays of a batch.

    `sharded` holds this process's shards along axis 0, in the order of local_shards(); `replicated`
    is the same whole on every process.
    """
    local, shards = local_shards(mesh), batch_shards_of(mesh)
    arrays: dict[str, jax.Array] = {}
    for name, value in sharded.items():
        part = len(value) // len(local)
        shape = (part * shards, *value.shape[1:])

        def read(index: Any, value: np.ndarray = value, part: int = part) -> np.ndarray:
            place = local.index((index[0].start or 0) // part)
            return value[place * part : (place + 1) * part]

        sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
        arrays[name] = jax.make_array_from_callback(shape, sharding, read)
    for name, value in replicated.items():
        arrays[name] = place(value, NamedSharding(mesh, PartitionSpec()))
    return arrays
