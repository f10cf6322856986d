"""Exports in another version of sentence-transformers, whose Python a variable names.

CONTRIBUTING.md has the command that makes such an environment.
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import small

from piccolo_jax import build, export
from piccolo_jax.exporting.layout import Options
from piccolo_jax.exporting.reference import Reference
from piccolo_jax.verifying import served

VARIABLE = "PICCOLO_PYTHON_ST5"
SCRIPT = Path(__file__).with_name("served_elsewhere.py")
pytestmark = pytest.mark.usefixtures("quick_compiling")


@pytest.fixture
def python():
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"{VARIABLE} names no Python with sentence-transformers 5.1")
    return path


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    made = {}
    for pooling, embed_dim, dtype in (
        ("mean", 30, "float32"),
        ("cls", 0, "float32"),
        ("last", 24, "float32"),
        ("mean", 24, "bfloat16"),
        ("mean", 24, "float16"),
    ):
        config = small.config(pooling=pooling, embed_dim=embed_dim)
        config.data.datasets[0].passage_prompt = "文："
        parts = build.build(config)
        made[pooling, embed_dim, dtype] = folder / f"{pooling}_{embed_dim}_{dtype}"
        export.write(
            folder / f"{pooling}_{embed_dim}_{dtype}", small.params(parts), parts, config,
            options=Options(dtype=dtype),
        )  # fmt: skip
    return made


def test_the_layout_of_2024_is_the_same_model_in_5_1(python, exports):
    done = subprocess.run(
        [python, SCRIPT, *exports.values()],
        env={**os.environ, "PYTHONPATH": str(small.ROOT)},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0][:2] for line in lines] == ["5."] * len(exports)
    for directory in exports.values():
        reference = Reference.read(directory)
        here = served.embeddings(served.load(directory), reference)
        np.testing.assert_allclose(np.load(directory.with_suffix(".npy")), here, atol=1e-4)
