"""Whole runs of the main program in two processes, against the same in one."""

import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import small
from safetensors.numpy import load_file
from small import ROOT

from piccolo_jax import metrics
from piccolo_jax.checkpoint import Best

LAUNCHER = ROOT / "launch" / "local_processes.py"
FLAGS = (
    "--config.mesh.fsdp=4", "--config.mesh.tensor=2", "--config.checkpoint.keep=5",
    # Cosines differ in their last bit when sums are made in another order. A small temperature
    # makes that large, and so does Adam where a gradient is 0 but for rounding.
    *(f"--config.loss.{task}.temperature=1.0" for task in small.TASKS), "--config.optim.eps=1e-3",
    "--config.optim.ema_decay=0.9",
    "--config.checkpoint.best_metric=average/similarity.test/spearman@48",
)  # fmt: skip
# The main program, of which process 1 gets SIGTERM when step 3 is logged. JAX looks for it every
# second, so that the steps after it must not be over sooner.
STOPPING = """
import os, signal, time
from piccolo_jax import cli, metrics, train
write = metrics.JsonLines.write
def write_and_signal(self, values):
    write(self, values)
    if self.path.name == "metrics.jsonl" and values["step"] >= 3:
        if values["step"] == 3 and os.environ["JAX_PROCESS_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
metrics.JsonLines.write = write_and_signal
cli.run(train.main)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """alone(workdir, *flags): a run in one process; both(workdir, *flags, module): in two."""
    files = small.write_training_files(tmp_path_factory.mktemp("files"))
    (files / "stopping.py").write_text(STOPPING)
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{files}",
    }
    quick = f"--xla_backend_optimization_level=0 {small.OLDER_FUSIONS}"

    def run(command, flags, workdir, xla_flags):
        return subprocess.run(
            [sys.executable, *command, f"--config={files / 'tiny.py'}", f"--workdir={workdir}",
             *FLAGS, *flags],
            cwd=ROOT, env={**environment, "XLA_FLAGS": xla_flags},
            capture_output=True, text=True, timeout=500, check=False,
        )  # fmt: skip

    def alone(workdir, *flags):
        devices = "--xla_force_host_platform_device_count=8"
        return run(("-m", "piccolo_jax.train"), flags, workdir, f"{quick} {devices}")

    def both(workdir, *flags, module="piccolo_jax.train"):
        command = (LAUNCHER, "--processes=2", "--devices=4", f"--module={module}", "--")
        return run(command, flags, workdir, quick)

    return SimpleNamespace(alone=alone, both=both)


@pytest.fixture(scope="module")
def straight(runs, tmp_path_factory):
    """The workdir of an uninterrupted run in one process, with checkpoints at 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = runs.alone(workdir)
    assert done.returncode == 0, done.stderr
    return workdir


def assert_same(workdir, straight):
    """Losses, scores and exported weights, up to the order of sums in float32.

    A gradient's norm is of sums whose terms nearly cancel: ten times as much is rounding there.
    """
    limits = {"grad_norm": 1e-5}
    ours, theirs = (metrics.read(base / "metrics.jsonl") for base in (workdir, straight))
    assert [row["step"] for row in ours] == list(range(1, 13))
    for a, b in zip(ours, theirs, strict=True):
        # `hardware` is in the first line of each start, and a run stopped has one more.
        assert a.keys() - {"hardware"} == b.keys() - {"hardware"}
        for key in a.keys() - {"rows_per_second", "tokens_per_second", "total_seconds", "hardware"}:
            close = isinstance(b[key], float)
            limit = limits.get(key, 1e-6)
            expected = pytest.approx(b[key], rel=limit) if close else b[key]
            assert a[key] == expected, (key, a, b)
    assert metrics.read(workdir / "eval.jsonl") == metrics.read(straight / "eval.jsonl")
    ours, theirs = (Best(base) for base in (workdir, straight))
    assert (ours.latest, ours.score) == (theirs.latest, theirs.score)
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        ours, theirs = (load_file(base / "export" / path) for base in (workdir, straight))
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # 12 steps moved them by up to 6e-3.
            np.testing.assert_allclose(ours[name], value, atol=1e-7, rtol=1e-6, err_msg=name)


def test_two_processes_go_on_with_the_run_of_one_and_learn_the_same(runs, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    shutil.rmtree(workdir / "export")
    for step in ("8", "12"):
        shutil.rmtree(workdir / "checkpoints" / step)
    done = runs.both(workdir)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("resuming after step 4") == 1  # process 0 alone says it
    assert_same(workdir, straight)
    assert sorted(p.name for p in workdir.iterdir()) == sorted(p.name for p in straight.iterdir())


def test_two_processes_stop_when_one_is_told_to_and_one_process_ends_the_run(
    runs, straight, tmp_path
):
    workdir = tmp_path / "run"
    stopped = runs.both(workdir, module="stopping")
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    for bar in ("preparing retrieval.jsonl", "planning batches", "training"):
        assert stopped.stderr.count(f"{bar}:   0%") == 1, stopped.stderr
    last = metrics.read(workdir / "metrics.jsonl")[-1]["step"]
    assert f"stopped after step {last}; the same command" in stopped.stderr
    assert last < 12
    assert (workdir / "checkpoints" / str(last)).is_dir()
    done = runs.alone(workdir)
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {last}" in done.stderr
    assert_same(workdir, straight)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.mesh.data=3", "config.mesh.data = 3, config.mesh.fsdp = 4"),
        ("--config.batch_size=21", "config.batch_size = 21: dataset"),
        ("--config.model.hidden_size=34", "config.mesh.fsdp = 4: "),
    ],
)
def test_a_user_error_ends_both_processes_with_one_message_each(runs, tmp_path, flag, message):
    done = runs.both(tmp_path / "run", flag)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count(f"error: {message}") == 2, done.stderr
    assert "Traceback" not in done.stderr
