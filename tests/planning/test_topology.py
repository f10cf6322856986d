import jax
import pytest

from piccolo_jax.errors import UserError
from piccolo_jax.planning import topology


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("v5e:1x1", "TPU v5 lite", 1),
        ("v5e:8x8", "TPU v5 lite", 64),
        ("v6e:16x16", "TPU v6 lite", 256),
        ("v4:2x2x1", "TPU v4", 4),  # a device is a chip, though it has two cores
        ("v5p:4x4x8", "TPU v5", 128),
    ],
)
def test_a_slice_has_a_device_per_chip_and_leaves_the_platform_alone(name, kind, count):
    chip, devices = topology.devices(name)
    assert chip is topology.CHIPS[name.partition(":")[0]]
    assert {device.device_kind for device in devices} == {kind}
    assert len(devices) == count
    assert jax.default_backend() == "cpu"


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("v5e", "must be CHIP:SHAPE, e.g. v5e:8x8, with CHIP one of v4, v5e, v5p, v6e"),
        ("v9:2x2", "must be CHIP:SHAPE"),
        ("v5e:3x3", "no such slice; those of v5e are 1x1, 2x2, 2x4, 4x4"),
        ("v5e:2x2x2", "no such slice"),
        ("v5p:8x4x4", "AxBxC with A <= B <= C, multiples of 4, of at most 8960 chips"),
        ("v5p:4x4x6", "no such slice"),
        ("v4:20x20x20", "of at most 4096 chips"),
        ("v5e:0x0", "no such slice"),
    ],
)
def test_a_slice_that_does_not_exist_is_named_with_those_that_do(name, remedy):
    with pytest.raises(UserError, match="--topology=") as raised:
        topology.devices(name)
    assert name in str(raised.value)
    assert remedy in str(raised.value)


def test_peaks_are_what_the_clock_and_the_matrix_units_give():
    # v5e and v6e have one core, v4 and v5p two; 4 units a core of side x side, 2 operations each.
    units = {"v4": (8, 128), "v5e": (4, 128), "v5p": (8, 128), "v6e": (4, 256)}
    for name, (count, side) in units.items():
        chip = topology.CHIPS[name]
        # Clocks and peaks are published to two or three digits.
        assert chip.clock * count * side * side * 2 == pytest.approx(chip.peak, rel=0.005), name
