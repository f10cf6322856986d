import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import PartitionSpec as P
from small import OLDER_FUSIONS

from piccolo_jax import build, optim
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.sharding import (
    AXES,
    BATCH_AXES,
    batch_shards,
    check_split,
    constrain,
    make_mesh,
)


def test_without_a_mesh_nothing_is_pinned_and_there_is_one_shard():
    x = jnp.ones((3, 4))
    assert constrain(x, BATCH_AXES, "tensor") is x
    assert batch_shards() == 1


@pytest.mark.parametrize(
    "sizes",
    [{"data": 3}, {"data": -1, "tensor": 0}, {"data": -1, "fsdp": -1}, {"tensor": 2}],
)
def test_a_mesh_that_does_not_fit_the_devices_names_the_fields(sizes):
    with pytest.raises(UserError, match=r"config\.mesh\.(data|tensor) = "):
        make_mesh(MeshConfig(**sizes), jax.devices()[:1])


# Little is computed: unoptimised machine code compiles in a third of the time.
QUICK = """
import os
os.environ["XLA_FLAGS"] += " --xla_backend_optimization_level=0"
"""

MESHES = """
import jax, jax.numpy as jnp, pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.sharding import *
from piccolo_jax.sharding import BATCH_AXES

assert dict(make_mesh(MeshConfig()).shape) == {"data": 8, "fsdp": 1, "tensor": 1}
assert dict(make_mesh(MeshConfig(2, -1, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
assert make_mesh(MeshConfig(-1, 3, 1), jax.devices()[:6]).devices.shape == (2, 3, 1)
assert set(make_mesh(MeshConfig()).axis_types) == {AxisType.Auto}
for sizes in ((3, -1, 1), (2, 2, 1), (4, 4, 1)):
    with pytest.raises(UserError, match="must multiply to the number of devices, 8"):
        make_mesh(MeshConfig(*sizes))

mesh = make_mesh(MeshConfig(2, 2, 2))
assert batch_shards_of(mesh) == 4
with jax.set_mesh(mesh):
    assert batch_shards() == 4
    pin = jax.jit(lambda x: constrain(x, BATCH_AXES, "tensor"))
    for shape, spec in (
        ((8, 6), P(("data", "fsdp"), "tensor")),
        ((6, 6), P(None, "tensor")),  # 4 doesn't divide 6
        ((8, 3), P(("data", "fsdp"))),
    ):
        assert pin(jnp.ones(shape)).sharding.is_equivalent_to(NamedSharding(mesh, spec), 2), shape

rules = ((r"a/kernel", P("fsdp", "tensor")), (r"kernel", P("tensor", "fsdp")))
shapes = {"a": {"kernel": (4, 6), "bias": (6,)}, "b": {"kernel": (4, 6)}, "c": {"kernel": (3, 6)}}
abstract = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple)
)
chosen = jax.tree.map(lambda s: s.spec, param_shardings(mesh, abstract, rules))
assert chosen == {
    "a": {"kernel": P("fsdp", "tensor"), "bias": P()},
    "b": {"kernel": P("tensor", "fsdp")},
    "c": {"kernel": P(None, "fsdp")},
}
"""


def test_meshes_pins_and_rules_on_eight_devices(run_python):
    run_python("-c", MESHES, devices=8)


EMBEDDER = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from piccolo_jax.config import MeshConfig
from piccolo_jax.models.bert import BertConfig
from piccolo_jax.models.embedder import Embedder, embedder_rules
from piccolo_jax.sharding import BATCH_AXES, make_mesh, param_shardings

config = BertConfig(vocab_size=31, hidden_size=32, num_layers=2, num_heads=4,
                    intermediate_size=64, max_positions=32)
model = Embedder(config, embed_dim=20)
rng = np.random.default_rng(0)
R, L, S, N = 16, 12, 3, 40
tokens = rng.integers(0, 31, (R, L)).astype(np.int32)
segments = np.repeat([1, 2, 3, 0], 3)[None].repeat(R, 0).astype(np.int32)
positions = (np.arange(L) % 3)[None].repeat(R, 0).astype(np.int32)
# 5 of the 6 texts of each eighth of the rows, in any order
slots = np.stack([rng.permutation(6)[:5] + 6 * i for i in range(8)]).reshape(-1).astype(np.int32)
arrays = (tokens, segments, positions, slots)
target = rng.normal(size=(N, 20)).astype(np.float32)
init = lambda: model.init(jax.random.key(0), *arrays, num_segments=S)["params"]
abstract = jax.eval_shape(init)

def embed(params, arrays, key=None):
    return model.apply({"params": params}, *arrays, num_segments=S, dropout=key)

def loss(params, arrays):
    embeddings = embed(params, arrays, jax.random.key(1))
    return (embeddings[: len(target)] * target).sum() / N, embeddings

step = jax.value_and_grad(loss, has_aux=True)
params = jax.jit(init)()
expected = jax.jit(step)(params, arrays)
largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]))

def check(mesh, arrays, split, expected):
    shardings = param_shardings(mesh, abstract, embedder_rules("bert"))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings)
        arrays = jax.device_put(arrays, NamedSharding(mesh, split))
        (_, embeddings), grads = jax.jit(step)(placed, arrays)
    np.testing.assert_allclose(embeddings, expected[0][1], atol=1e-5, rtol=0)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(g, e, atol=1e-5 * largest, rtol=0)

for sizes in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
    check(make_mesh(MeshConfig(*sizes)), arrays, P(BATCH_AXES), expected)

# Sizes that 4 shards don't divide: 14 rows, 37 texts.
few = (tokens[:14], segments[:14], positions[:14], slots[slots < 42])
target = target[: few[3].size]
check(make_mesh(MeshConfig(2, 2, 2)), few, P(), jax.jit(step)(params, few))

mesh = make_mesh(MeshConfig(8, 1, 1))
rows = NamedSharding(mesh, P(BATCH_AXES))
with jax.set_mesh(mesh):
    embed = jax.jit(embed, in_shardings=(NamedSharding(mesh, P()), rows), out_shardings=rows)
    text = embed.lower(params, arrays).compile().as_text()
assert "f32[5,20]" in text, "the texts are not split over the devices"
moves = re.findall(r"all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter", text)
assert not moves, moves
"""


def test_embeddings_and_gradients_are_those_of_one_device_and_pooling_moves_nothing(run_python):
    errors = run_python("-c", QUICK + EMBEDDER, devices=8, xla_flags=OLDER_FUSIONS).stderr
    assert "Involuntary full rematerialization" not in errors


LARGE = Embedder(BertConfig(), embed_dim=1792)  # the sizes of configs/base.py


def bytes_of(tree, shape=lambda leaf: leaf.shape):
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(shape(leaf)) * leaf.dtype.itemsize for leaf in leaves)


@pytest.mark.parametrize("sizes", [(8, 8, 1), (1, 64, 1), (2, 8, 4), (4, 2, 8)])
def test_a_device_holds_its_share_of_the_large_model_and_its_optimizer_state(sizes):
    mesh = jax.sharding.AbstractMesh(sizes, AXES)
    params = build.abstract_params(LARGE, build.param_shardings(LARGE, mesh))
    optimizer = optim.make_optimizer(tiny.config(), params)
    state = build.abstract_state(params, optimizer, mesh)
    least = 1 / (sizes[1] * sizes[2])
    for tree in (params, state):
        share = bytes_of(tree, lambda leaf: leaf.sharding.shard_shape(leaf.shape)) / bytes_of(tree)
        # All is split but biases, LayerNorm and token types, 0.1 % of the bytes; and positions,
        # another 0.16 %, are over fsdp alone.
        assert least <= share < least + 0.0026


def test_a_model_that_fsdp_does_not_split_is_refused_with_what_would_do():
    model = Embedder(BertConfig(hidden_size=1020, num_heads=10), embed_dim=1792)
    for fsdp in (1, 2, 4):
        build.param_shardings(model, jax.sharding.AbstractMesh((64 // fsdp, fsdp, 1), AXES))
    with pytest.raises(UserError) as error:
        build.param_shardings(model, jax.sharding.AbstractMesh((8, 8, 1), AXES))
    message = str(error.value)
    assert message.startswith("config.mesh.fsdp = 8: 1,298,574,784 of 1,298,574,784 bytes")
    largest = f"backbone/layers/intermediate/kernel ({24 * 1020 * 4096 * 4:,} bytes)"
    assert f"(config.model sizes): {largest}, backbone/layers/output/kernel" in message
    assert message.endswith("fsdp can be 1, 2, 4 for this model")


@pytest.mark.parametrize(("rows", "refused"), [(4, False), (5, True)])
def test_five_percent_of_the_bytes_may_stay_whole(rows, refused):
    shapes = {"split": (80, 1), "whole": (rows, 1)}  # 80 + 4.2 is the limit
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    rules = ((r"split", P(BATCH_AXES)), (r"whole", P("data")))
    check_split(jax.sharding.AbstractMesh((4, 1, 2), AXES), params, ())
    mesh = jax.sharding.AbstractMesh((2, 2, 1), AXES)
    if refused:
        with pytest.raises(UserError, match=r"= 2: 20 of 340 bytes .*: whole \(20 bytes\)\. On"):
            check_split(mesh, params, rules)
    else:
        check_split(mesh, params, rules)


SLICES = """
import itertools, jax, pytest
from jax.experimental import topologies
from jax.sharding import AxisType
from piccolo_jax.config import MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.sharding import make_mesh

def devices(name, slices):
    several = {"num_slices": slices} if slices > 1 else {}
    return topologies.get_topology_desc(platform="tpu", topology_name=name, **several).devices

def place(device):
    return (getattr(device, "slice_index", 0), *device.coords)

def apart(a, b):
    return sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))

two = devices("v5e:2x2", 2)
for sizes in ((-1, 1, 1), (-1, 2, 1), (-1, 2, 2), (2, 4, 1), (4, 1, 2)):
    mesh = make_mesh(MeshConfig(*sizes), two)
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert {place(d) for d in mesh.devices.flat} == {place(d) for d in two}
    data = mesh.shape["data"]
    halves = mesh.devices.reshape(2, data // 2, -1)  # the data axis goes through slice after slice
    assert [{d.slice_index for d in half.flat} for half in halves] == [{0}, {1}]
given = [make_mesh(MeshConfig(2, 4, 1), order).devices.tolist() for order in (two, two[::-1])]
assert given[0] == given[1]
for sizes in ((1, 8, 1), (1, 4, 2), (-1, 1, 8)):
    with pytest.raises(UserError, match=r"mesh.data = 1: .* 2 slices.* divide the 4 devices of"):
        make_mesh(MeshConfig(*sizes), two)
with pytest.raises(UserError, match="slices of 4, 2 devices"):
    make_mesh(MeshConfig(-1, 1, 1), two[:6])

# One slice: groups of 4 on the fsdp axis are a line or a square of neighbours.
for name in ("v5e:4x4", "v6e:4x4", "v5p:2x2x4"):
    for group in make_mesh(MeshConfig(4, 4, 1), devices(name, 1)).devices.reshape(4, 4):
        assert max(apart(a, b) for a, b in itertools.combinations(group, 2)) <= 3, (name, group)
# Sizes for which an axis of the torus has to be cut.
assert make_mesh(MeshConfig(8, 8, 1), devices("v5p:4x4x4", 1)).devices.shape == (8, 8, 1)
# Sizes that JAX can't arrange: in the devices' order.
for name, slices, sizes in (
    ("v5p:4x4x20", 1, (10, 32, 1)), ("v5p:4x12x28", 1, (672, 1, 2)), ("v5p:4x4x20", 2, (20, 32, 1)),
):
    given = devices(name, slices)
    mesh = make_mesh(MeshConfig(*sizes), given)
    assert mesh.devices.shape == sizes
    assert mesh.devices.flatten().tolist() == list(given)
"""


def test_data_alone_goes_across_slices_and_fsdp_groups_lie_together(run_python):
    pytest.importorskip("libtpu", reason="describing TPU topologies needs libtpu")
    run_python("-c", SLICES)
