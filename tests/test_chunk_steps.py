"""Gradient caching: a step in chunks of rows is that of the whole, on one device and on several."""

from pathlib import Path

import numpy as np
import pytest
from chunk_steps import CHUNKED, TASKS_OF


@pytest.fixture(scope="module", params=CHUNKED, ids=lambda sizes: "x".join(map(str, sizes)))
def steps(request, run_python, tmp_path_factory):
    """The tasks that chunk_steps.py tried on a mesh, what it wrote, and its stderr."""
    out = tmp_path_factory.mktemp("chunks") / "out.npz"
    # Rounding differs with the code that XLA chooses. In retrieval chunks are from the whole, on
    # 1x1x1 and 2x2x2: 0.81e-6 and 0.76e-6 with these flags; with the older code of fusions 1.23e-6
    # and 0.88e-6; with that and AVX-512, 0.47e-6 and 1.06e-6; with YNNPACK's products, XLA's
    # default, up to 1.3e-6.
    flags = "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID"
    flags += " --xla_cpu_max_isa=AVX2"
    script = Path(__file__).with_name("chunk_steps.py")
    mesh = "x".join(map(str, request.param))
    done = run_python(script, mesh, out, devices=8, xla_flags=flags)
    return TASKS_OF[request.param], dict(np.load(out)), done.stderr


def test_chunks_of_rows_give_the_loss_and_gradients_of_the_whole(steps):
    tasks, arrays, _ = steps
    for task in tasks:
        assert_chunks_are_the_whole(arrays, task)


def assert_chunks_are_the_whole(arrays, task):
    """The norm of the difference, relative; and each array as between meshes."""
    whole = {name: a for name, a in arrays.items() if name.startswith(f"whole/{task}/")}
    assert len(whole) > 20
    difference = total = 0.0
    for name, expected in whole.items():
        actual = arrays[name.replace("whole", "chunks")]
        scale = np.abs(expected).max()
        if name.endswith("layers/key/bias"):  # 0 but for rounding
            scale = np.abs(arrays[name.replace("key", "query")]).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale, err_msg=name)
        if not name.endswith("/loss"):
            difference += ((actual - expected) ** 2).sum()
            total += (expected**2).sum()
    assert difference**0.5 < 1e-6 * total**0.5


# Where all devices hold the same weights.
@pytest.mark.parametrize("steps", [(4, 1, 1)], indirect=True, ids=["4x1x1"])
def test_gradients_are_added_over_devices_once_and_not_with_every_chunk(steps):
    _, arrays, _ = steps
    whole, chunks = (arrays[f"all_reduces/{way}/retrieval"] for way in ("whole", "chunks"))
    gradients = sum(
        a.nbytes for name, a in arrays.items()
        if name.startswith("whole/retrieval/") and not name.endswith("/loss")
    )  # fmt: skip
    assert gradients <= whole == chunks < 1.1 * gradients


def test_no_activation_is_gathered_whole_to_be_split_anew(steps):
    assert "Involuntary full rematerialization" not in steps[2]
