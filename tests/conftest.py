"""Settings and fixtures of all tests: on CPU, without a network."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TQDM_DISABLE"] = "1"
os.environ["JAX_NUM_PROCESSES"] = "1"  # also where a cluster could be found
# What many tests compile is compiled once, for all workers and the programs that tests start; and
# for the next time where the environment names a folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        compiled = tempfile.TemporaryDirectory(prefix="compiled-")
        os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2**32)  # jax locks only a limited one
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]
# Files that take minutes, of few tests: begun first, so that no worker is left alone with one.
LONGEST = ("test_chunk_steps.py", "test_train.py", "test_train_processes.py", "test_train_step.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session")
def shared():
    """The folder `shared` beside the repository: reference figures, models and data."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"there is no folder {folder.name!r} beside the repository")
    return folder


@pytest.fixture(scope="session")
def run_python():
    """run_python(*arguments, devices=1, check=True, env={}, xla_flags=""): Python in a process."""

    def run(*arguments, devices=1, check=True, env=None, xla_flags=""):
        env = {
            **os.environ,
            **(env or {}),
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {xla_flags}",
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stderr[-5000:]
        return done

    return run


@pytest.fixture(scope="module")
def quick_compiling():
    """For tests whose time is the compiler's: it leaves out optimisations within this module.

    Also in the processes that they start.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
