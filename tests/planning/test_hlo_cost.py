"""Costs read from programs that the TPU compiler makes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from piccolo_jax.planning import hlo_cost, topology

CHIP = topology.CHIPS["v5e"]
N = 1024


def compiled(f, *shapes, devices=1, specs=None, dtype=jnp.bfloat16):
    """Optimised HLO of f for 1 or 4 chips."""
    _, chips = topology.devices("v5e:1x1" if devices == 1 else "v5e:2x2")
    mesh = Mesh(np.array(chips), ("x",), axis_types=(AxisType.Auto,))
    specs = specs or [PartitionSpec()] * len(shapes)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*arguments).compile().as_text()


def estimates(text):
    return [int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', text)]


def test_a_fusion_counts_once_and_takes_at_least_the_time_of_its_product():
    text = compiled(lambda a, b: jax.nn.relu(a @ b) + 1, (N, N), (N, N))
    cost = hlo_cost.read(text, CHIP)
    assert cost.cycles == max(estimates(text)) > 0
    least = 2 * N**3 / CHIP.peak
    # The compiler expects between 40 and 100 % of the peak of a lone product of this size.
    assert least < cost.seconds(CHIP) < 2.5 * least
    assert not cost.collectives
    assert not cost.unestimated


def test_a_loop_counts_as_often_as_it_runs():
    def chain(trips):
        def f(a, b):
            return jax.lax.fori_loop(0, trips, lambda _, x: jnp.tanh(x @ b), a)

        return hlo_cost.read(compiled(f, (N, N), (N, N)), CHIP)

    few, many, more = chain(10), chain(30), chain(50)
    assert many.unknown_loops == 0
    # Outside the loop all do the same, so the differences are 20 trips each.
    assert more.cycles - many.cycles == many.cycles - few.cycles
    assert (many.cycles - few.cycles) / 20 > 0.7 * 2 * N**3 / CHIP.peak * CHIP.clock


def test_loops_in_loops_multiply():
    def f(a, b):
        def outer(x, _):
            return jax.lax.scan(lambda y, _: (jnp.tanh(y @ b), None), x, None, length=6)[
                0
            ] + a, None

        return jax.lax.scan(outer, a, None, length=5)[0]

    cost = hlo_cost.read(compiled(f, (N, N), (N, N)), CHIP)
    assert cost.cycles > 0.7 * 30 * 2 * N**3 / CHIP.peak * CHIP.clock
    assert cost.cycles < 3 * 30 * 2 * N**3 / CHIP.peak * CHIP.clock


@pytest.mark.parametrize(
    ("kind", "spec", "bytes_moved", "ring_passes"),
    [
        ("all-gather", PartitionSpec("x"), 2 * N * N, 3 / 4),
        ("all-reduce", PartitionSpec(None, "x"), 4 * N * N, 2 * 3 / 4),
        ("reduce-scatter", PartitionSpec(None, "x"), 4 * N * N, 3 / 4),
    ],
)
def test_collectives_count_their_bytes_and_the_time_of_their_ring(
    kind, spec, bytes_moved, ring_passes
):
    if kind == "all-gather":

        def f(a):
            return jax.lax.with_sharding_constraint(a, PartitionSpec())

        text = compiled(f, (N, N), devices=4, specs=[spec])
    else:

        def f(a, b):  # contracts the split axis
            product = jnp.einsum("ij,kj->ik", a, b, preferred_element_type=jnp.float32)
            kept = PartitionSpec("x") if kind == "reduce-scatter" else PartitionSpec()
            return jax.lax.with_sharding_constraint(product, kept)

        text = compiled(f, (N, N), (N, N), devices=4, specs=[spec, spec])
    (collective,) = hlo_cost.read(text, CHIP).collectives.values()
    assert (collective.kind, collective.group, collective.count) == (kind, 4, 1)
    padding = 1.1 if kind == "reduce-scatter" else 1  # of each chip's part, to whole tiles
    assert bytes_moved <= collective.bytes <= padding * bytes_moved
    seconds = collective.bytes * ring_passes / (2 * CHIP.link)
    assert collective.seconds == pytest.approx(seconds)


def test_collectives_in_a_loop_count_as_often():
    def f(a):
        def once(x, _):
            return jax.lax.psum(jnp.tanh(x), "x"), None

        def local(x):
            return jax.lax.scan(once, x, None, length=7)[0]

        return jax.shard_map(
            local, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"), check_vma=False
        )(a)

    text = compiled(f, (4 * N, N), devices=4, specs=[PartitionSpec("x")])
    (collective,) = hlo_cost.read(text, CHIP).collectives.values()
    assert (collective.kind, collective.count) == ("all-reduce", 7)
    assert collective.bytes == 7 * 2 * N * N


# What the TPU compiler makes of two gathers of weights under shard_map, each beside a product:
# shortened. Both have the channel 1. What isn't asynchronous is in no such triple.
ASYNCHRONOUS = (
    """
%start (p: bf16[256,1024]) -> (bf16[256,1024], bf16[1024,1024]) {
  %p = bf16[256,1024]{1,0} parameter(0)
  %all-gather.1 = bf16[1024,1024]{1,0} all-gather(%p), GATHER, backend_config={CONFIG}
  ROOT %s = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%beside (q: bf16[256,1024], r: bf16[1024,1024]) -> bf16[1024,1024] {
  %q = bf16[256,1024]{1,0} parameter(0)
  %r = bf16[1024,1024]{1,0} parameter(1)
  %all-gather.2 = bf16[1024,1024]{1,0} all-gather(%q), GATHER, backend_config={CONFIG}
  ROOT %c = bf16[1024,1024]{1,0} convolution(%r, %r), dim_labels=bf_io->bf
}

%done (t: bf16[256,1024]) -> bf16[1024,1024] {
  %t = bf16[256,1024]{1,0} parameter(0)
  %all-gather.3 = bf16[1024,1024]{1,0} all-gather(%t), GATHER, backend_config={CONFIG}
  ROOT %d = bf16[1024,1024]{1,0} custom-call(%t, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

%other (u: bf16[1024,1024]) -> bf16[256,1024] {
  %u = bf16[1024,1024]{1,0} parameter(0)
  ROOT %all-reduce = bf16[1024,1024]{1,0} all-reduce(%u), channel_id=2, \
replica_groups={{0,1,2,3}}, to_apply=%add
}

ENTRY %main (w: bf16[256,1024], x: bf16[1024,1024]) -> bf16[1024,1024] {
  %w = bf16[256,1024]{1,0} parameter(0)
  %x = bf16[1024,1024]{1,0} parameter(1)
  %start.1 = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) fusion(%w), calls=%start
  %beside.1 = bf16[1024,1024]{1,0} fusion(%w, %x), calls=%beside, CYCLES
  %beside.2 = bf16[1024,1024]{1,0} fusion(%w, %x), calls=%beside, CYCLES
  %done.1 = bf16[1024,1024]{1,0} fusion(%w), calls=%done
  %start.2 = (bf16[256,1024]{1,0}, bf16[1024,1024]{1,0}) fusion(%w), calls=%start
  %beside.3 = bf16[1024,1024]{1,0} fusion(%w, %x), calls=%beside, CYCLES
  %done.2 = bf16[1024,1024]{1,0} fusion(%w), calls=%done
  %all-gather.4 = bf16[1024,1024]{1,0} all-gather(%w), GATHER
  %reduced = bf16[256,1024]{1,0} fusion(%x), calls=%other
  ROOT %all-gather.5 = bf16[1024,1024]{1,0} all-gather(%reduced), GATHER
}
""".replace("GATHER", "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}")
    .replace("CONFIG", '"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}')
    .replace("CYCLES", 'backend_config={"window_config":{"estimated_cycles":"100"}}')
)


def test_an_asynchronous_collective_counts_once_though_several_fusions_hold_it():
    cost = hlo_cost.read(ASYNCHRONOUS, CHIP)
    size = 2 * 1024 * 1024
    gather, reduce = cost.collectives["all-gather", 4], cost.collectives["all-reduce", 4]
    assert (gather.count, gather.bytes) == (4, 4 * size)
    assert (reduce.count, reduce.bytes) == (1, size)
    assert cost.cycles == 300
    assert not cost.unestimated


def test_a_kernel_without_an_estimate_counts_by_operations_and_bytes():
    def double(x, y):
        y[...] = 2 * x[...]

    def f(a, operations):
        return pl.pallas_call(
            double,
            out_shape=jax.ShapeDtypeStruct(a.shape, a.dtype),
            cost_estimate=pl.CostEstimate(
                flops=operations, transcendentals=0, bytes_accessed=4 * N * N
            ),
            name="doubling",
        )(a)

    few = hlo_cost.read(compiled(lambda a: f(a, 10), (N, N)), CHIP).unestimated["doubling"]
    assert few.bytes == 4 * N * N
    assert few.seconds == pytest.approx(
        4 * N * N / (hlo_cost.KERNEL_BANDWIDTH_SHARE * CHIP.hbm_bandwidth)
    )
    many = hlo_cost.read(compiled(lambda a: f(a, 10**10), (N, N)), CHIP).unestimated["doubling"]
    assert many.operations == 10**10
    assert many.seconds == pytest.approx(10**10 / (hlo_cost.KERNEL_PEAK_SHARE * CHIP.peak))


@pytest.mark.parametrize(
    ("text", "group"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, x", 4),
        ("replica_groups=[8,2]<=[16], x", 2),
        ("replica_groups=[2,8]<=[2,8]T(1,0), x", 8),
        ("replica_groups=mesh['data'=8,'fsdp'=4,'tensor'=2] {'data','tensor'}, x", 16),
        ("source_target_pairs={{0,1},{1,0}}, x", 2),
    ],
)
def test_every_notation_of_groups_is_read(text, group):
    assert hlo_cost._group_size(text) == group


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)}", 2048),
        ("(f32[4]{0:T(128)}, pred[3,5]{1,0}, /*index=2*/s32[])", 16 + 15 + 4),
        ("token[]", 0),
    ],
)
def test_shapes_have_bytes(shape, size):
    assert hlo_cost.shape_bytes(shape) == size
