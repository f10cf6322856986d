"""Processes that find each other, agree and take turns: real ones, started by the launcher."""

import os
import socket
import subprocess
import sys

import pytest
import small
from small import ROOT

from piccolo_jax import build, export

pytestmark = pytest.mark.usefixtures("quick_compiling")

LAUNCHER = ROOT / "launch" / "local_processes.py"

HEADER = """
import os, sys
from pathlib import Path
import jax, numpy as np, pytest
from piccolo_jax import cli, distributed
from piccolo_jax.errors import UserError
"""


@pytest.fixture
def launch(tmp_path):
    """launch(program, *arguments): the program in two processes of 4 devices; what they said."""

    def launch(program, *arguments):
        (tmp_path / "program_in_processes.py").write_text(HEADER + program)
        return subprocess.run(
            [sys.executable, LAUNCHER, "--module=program_in_processes", "--", *arguments],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}:{ROOT / 'tests'}"},
            capture_output=True, text=True, timeout=200, check=False,
        )  # fmt: skip

    return launch


TURNS = """
distributed.start()
me, base = jax.process_index(), Path(sys.argv[1])
assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
assert distributed.of_first(np.asarray([me + 5, 7])).tolist() == [5, 7]

with distributed.agreed("resting"):
    pass
for failing in (0, 1):
    with pytest.raises(UserError) as error, distributed.agreed("testing"):
        if me == failing:
            raise UserError("mine")
    other = f"process {failing} failed while testing; its own message says why"
    assert str(error.value) == ("mine" if me == failing else other)

distributed.check_same(config="a", checkpoint=None)
with pytest.raises(UserError, match="process 1 has another training config than process 0"):
    distributed.check_same(training_config=f"a{me}")

own = base / str(me)
own.mkdir()
assert distributed.sees_first(base)
assert distributed.sees_first(own) == (me == 0)
assert not list(own.iterdir())

def work(folder):
    # The marker is of the process that found none: it did the work.
    made = not (folder / "made").exists()
    (folder / "made").touch()
    return made

shared = base / "not" / "there"
assert distributed.first_then_rest(shared, "x", lambda: work(shared)) == (me == 0)
assert distributed.first_then_rest(own, "x", lambda: work(own))

def fail():
    assert me == 0
    raise UserError("no room")

with pytest.raises(UserError, match="no room" if me == 0 else "process 0 failed while preparing"):
    distributed.first_then_rest(shared, "preparing", fail)
"""


def test_processes_agree_and_take_turns(launch, tmp_path):
    done = launch(TURNS, str(tmp_path))
    assert done.returncode == 0, done.stderr


ALONE = """
distributed._LEAVING_SECONDS, distributed._SHUTDOWN_SECONDS = 2, 4
def main(argv):
    distributed.start()
    if jax.process_index() == int(argv[1]):
        raise UserError("only I")
    distributed.of_first(np.zeros(1))
    raise AssertionError("the other one took part")
cli.run(main)
"""


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_process_that_fails_alone_ends_all_with_its_code(launch, failing):
    done = launch(ALONE, failing)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("error: only I") == 1
    assert "took part" not in done.stderr


START = """
from piccolo_jax import cli, distributed
def main(argv):
    distributed.start()
    import jax
    print("processes", jax.process_count(), jax.process_index())
cli.run(main)
"""


@pytest.mark.parametrize("variables", [{"JAX_NUM_PROCESSES": ""}, {"JAX_NUM_PROCESSES": "1"}])
def test_a_single_process_needs_nothing(run_python, variables):
    assert run_python("-c", START, env=variables).stdout.split() == ["processes", "1", "0"]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES = 'two': must be a number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "can't be joined (coordinator_address"),
        ({"JAX_NUM_PROCESSES": "2"}, "can't be joined (coordinator_address"),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": ""},
            "can't be joined (Number of processes",
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2",
             "JAX_PROCESS_ID": "2"},
            "process_id=2, num_processes=2",
        ),
    ],
)  # fmt: skip
def test_variables_that_do_not_fit_together_are_named(run_python, variables, message):
    done = run_python("-c", START, env=variables, check=False)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_the_tasks_of_a_slurm_step_find_each_other():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    slurm = {
        "SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1", "JAX_COORDINATOR_PORT": str(port),
        "JAX_NUM_PROCESSES": "",
    }  # fmt: skip
    tasks = [
        subprocess.Popen(
            [sys.executable, "-c", START],
            env={**os.environ, **slurm, "SLURM_PROCID": i, "SLURM_LOCALID": i,
                 "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE, text=True,
        )
        for i in "01"
    ]  # fmt: skip
    outputs = [task.communicate(timeout=100)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0]
    assert all(f"processes 2 {i}" in output for i, output in enumerate(outputs))


WARM_START = """
import collections, math
import safetensors
import small
from piccolo_jax import build, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.models import pretrained

read, sizes = collections.Counter(), {}

class Recorded:
    def __init__(self, name, tensor):
        self.name, self.tensor = name, tensor
        self.get_shape, self.get_dtype = tensor.get_shape, tensor.get_dtype
        sizes[name] = math.prod(tensor.get_shape())
    def __getitem__(self, index):
        value = self.tensor[index]
        read[self.name] += value.size
        return value

class File:
    def __init__(self, *args, **options):
        self.file = safetensors.safe_open(*args, **options)
        self.keys = self.file.keys
    def get_slice(self, name):
        return Recorded(name, self.file.get_slice(name))

distributed.start()
pretrained.safe_open = File
config = small.config()
config.model.init, config.model.tokenizer = sys.argv[1], ""
parts = build.build(config)
whole = pretrained.load_params(parts.init, parts.model.backbone, parts.model.embed_dim)
assert read == sizes

# Process 0 holds the first half of fsdp and process 1 the second, or both all of fsdp.
for mesh, share in ((MeshConfig(1, 8, 1), 2), (MeshConfig(2, 4, 1), 1), (MeshConfig(1, 4, 2), 2)):
    read.clear()
    mesh = sharding.make_mesh(mesh)
    shardings = build.param_shardings(parts.model, mesh)
    params = build.make_params(parts, 0, shardings)
    for path, leaf in jax.tree.leaves_with_path(params):
        expected = whole
        for key in path:
            expected = expected[key.key]
        assert leaf.dtype == expected.dtype and leaf.shape == expected.shape
        for shard in leaf.addressable_shards:
            assert (np.asarray(shard.data) == expected[shard.index]).all(), path
    for name, size in sizes.items():
        split = name.endswith("weight") and "Norm" not in name and "token_type" not in name
        # Each shard is read once, though several devices may hold it.
        assert read[name] == (size // share if split else read[name]), (name, read[name], size)
        assert 0 < read[name] <= size, (name, read[name], size)
"""


def test_a_warm_start_reads_only_the_shards_of_its_own_devices(launch, tmp_path):
    config = small.config(embed_dim=24)
    parts = build.build(config)
    export.write(tmp_path / "model", small.params(parts), parts, config)
    done = launch(WARM_START, str(tmp_path / "model"))
    assert done.returncode == 0, done.stderr
