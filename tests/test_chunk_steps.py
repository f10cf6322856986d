"""Gradient caching: a step in chunks of rows is that of the whole, on one device and on several."""

from pathlib import Path

import numpy as np
import pytest
from chunk_steps import CHUNKED
from small import OLDER_FUSIONS

from piccolo_jax.tasks import TASKS


@pytest.fixture(scope="module", params=["x".join(map(str, sizes)) for sizes in CHUNKED])
def steps(request, run_python, tmp_path_factory):
    """What chunk_steps.py wrote of a mesh, and its stderr."""
    out = tmp_path_factory.mktemp("chunks") / "out.npz"
    # YNNPACK's products, XLA's default, round more: with AVX2 chunks were 1.3e-6 from the whole,
    # with XLA's own 0.9e-6, and 0.75e-6 with its older code of fusions.
    flags = f"--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_INVALID {OLDER_FUSIONS}"
    script = Path(__file__).with_name("chunk_steps.py")
    done = run_python(script, request.param, out, devices=8, xla_flags=flags)
    return dict(np.load(out)), done.stderr


@pytest.mark.parametrize("task", TASKS)
def test_chunks_of_rows_give_the_loss_and_gradients_of_the_whole(steps, task):
    # With dropout. The norm of the difference, relative; and each array as between meshes.
    arrays, _ = steps
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
@pytest.mark.parametrize("steps", ["4x1x1"], indirect=True)
@pytest.mark.parametrize("task", TASKS)
def test_gradients_are_added_over_devices_once_and_not_with_every_chunk(steps, task):
    arrays, _ = steps
    whole, chunks = (arrays[f"all_reduces/{way}/{task}"] for way in ("whole", "chunks"))
    gradients = sum(
        a.nbytes for name, a in arrays.items()
        if name.startswith(f"whole/{task}/") and not name.endswith("/loss")
    )  # fmt: skip
    assert gradients <= whole == chunks < 1.1 * gradients


def test_no_activation_is_gathered_whole_to_be_split_anew(steps):
    assert "Involuntary full rematerialization" not in steps[1]
