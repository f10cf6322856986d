"""Runs of the main program that keep an average of their weights."""

import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import load_file
from small import one_error, run_command

from piccolo_jax import averaging, export, metrics, runs, train, verify
from piccolo_jax.config import MeshConfig
from piccolo_jax.evaluation import models

pytestmark = pytest.mark.usefixtures("quick_compiling")
FLAGS = (
    "--config.optim.ema_decay=0.8", "--config.checkpoint.keep=9",
    "--config.eval.datasets[0].max_rows=100",
)  # fmt: skip


@pytest.fixture(scope="module")
def run_here(tmp_path_factory):
    """run_here(workdir, *flags): exit code of the main program in this process."""
    files = small.write_training_files(tmp_path_factory.mktemp("files"), ["similarity"])

    def run_here(workdir, *flags):
        config = f"--config={files / 'tiny.py'}"
        return run_command(train.main, config, f"--workdir={workdir}", *FLAGS, *flags)

    return run_here


@pytest.fixture(scope="module")
def straight(run_here, tmp_path_factory):
    """The workdir of an uninterrupted run of 12 steps, with checkpoints at 4, 8 and 12."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(train, "say", said.append)
        assert run_here(workdir) == 0
    return SimpleNamespace(workdir=workdir, said="\n".join(said))


def tensors(directory):
    return load_file(directory / "model.safetensors") | load_file(
        directory / "2_Dense" / "model.safetensors"
    )


def same(first, second):
    return all(np.array_equal(second[name], value) for name, value in first.items())


def test_last_and_averaged_weights_are_both_evaluated(straight):
    scores = metrics.read(straight.workdir / "eval.jsonl")
    assert [(s["step"], s["weights"]) for s in scores] == [
        (step, weights) for step in (0, 6, 12) for weights in ("last", "average")
    ]
    by_key = {(s["step"], s["weights"]): s for s in scores}
    assert by_key[0, "last"] == by_key[0, "average"] | {"weights": "last"}
    assert by_key[12, "last"]["16"] != by_key[12, "average"]["16"]
    lines = [line for line in straight.said.splitlines() if line.startswith("similarity.test")]
    assert [line.split("  ")[0] for line in lines] == [
        "similarity.test spearman", "similarity.test spearman, average",
    ]  # fmt: skip
    for line, weights in zip(lines, ("last", "average"), strict=True):
        for dim in ("16", "48"):
            assert f"{by_key[0, weights][dim]:.3f} -> {by_key[12, weights][dim]:.3f}" in line


def test_the_export_holds_the_averaged_weights_unless_told_otherwise(straight, tmp_path, capsys):
    for weights in ("average", "last"):
        assert run_command(
            export.main, f"--workdir={straight.workdir}", f"--output={tmp_path / weights}",
            f"--weights={weights}",
        ) == 0  # fmt: skip
    average, last = tensors(tmp_path / "average"), tensors(tmp_path / "last")
    assert same(average, tensors(straight.workdir / "export"))
    assert not any(
        np.array_equal(average[name], value)
        for name, value in last.items()
        if "position" not in name and value.size > 1
    )
    _, config, _, params = runs.read(straight.workdir, weights="last")
    assert config.optim.ema_decay == 0.8
    scaling = params["scaling"]["kernel"].T
    np.testing.assert_array_equal(last["linear.weight"], scaling)
    # verify follows: what it compares with are the weights that are exported by default.
    assert run_command(verify.main, tmp_path / "average", f"--workdir={straight.workdir}") == 0
    assert run_command(verify.main, tmp_path / "last", f"--workdir={straight.workdir}") == 1
    assert run_command(
        verify.main, tmp_path / "last", f"--workdir={straight.workdir}", "--weights=last"
    ) == 0  # fmt: skip


def test_an_evaluated_workdir_is_what_its_export_is(straight, tmp_path):
    flags = (f"--workdir={straight.workdir}", f"--output={tmp_path / 'last'}", "--weights=last")
    assert run_command(export.main, *flags) == 0
    texts, found = ["今天天气很好", "A text"], {}
    for weights, exported in (
        (None, straight.workdir / "export"),
        ("average", straight.workdir / "export"),
        ("last", tmp_path / "last"),
    ):
        ours = models.load(str(straight.workdir), MeshConfig(data=1), weights=weights)
        theirs = models.load(str(exported), MeshConfig(data=1))
        np.testing.assert_allclose(ours.encode(texts), theirs.encode(texts), atol=1e-6)
        found[weights] = ours.revision
    assert found["average"] == found[None]
    assert found["last"] == f"{found[None]}-last"  # or one's results would be taken for the other's


def test_a_resumed_run_ends_with_the_same_average_to_the_bit(run_here, straight, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight.workdir, workdir)
    shutil.rmtree(workdir / "export")
    for step in ("8", "12"):
        shutil.rmtree(workdir / "checkpoints" / step)
    assert run_here(workdir) == 0
    assert same(tensors(workdir / "export"), tensors(straight.workdir / "export"))
    for weights in ("average", "last"):
        ours, theirs = (runs.read(base, weights=weights)[3] for base in (workdir, straight.workdir))
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    evals = [metrics.read(base / "eval.jsonl") for base in (workdir, straight.workdir)]
    assert evals[0] == evals[1]


def test_the_average_does_not_change_what_is_learnt(run_here, straight, tmp_path):
    workdir = tmp_path / "run"
    assert run_here(workdir, "--config.optim.ema_decay=0", "--config.eval.dims=(16,)") == 0
    last = runs.read(straight.workdir, weights="last")[3]
    jax.tree.map(np.testing.assert_array_equal, runs.read(workdir)[3], last)


@pytest.mark.parametrize(("decay", "change"), [("0", "0.8 -> 0.0"), ("0.9", "0.8 -> 0.9")])
def test_a_run_keeps_its_average_to_its_end(run_here, straight, capsys, decay, change):
    assert run_here(straight.workdir, f"--config.optim.ema_decay={decay}") == 2
    assert f"  optim.ema_decay: {change}\n" in one_error(capsys)


def test_an_average_that_no_run_kept_cannot_be_exported(tmp_path, capsys):
    config = small.config()
    parts = small.build.build(config)
    small.save_run(tmp_path, config, parts, small.params(parts))
    flags = (f"--workdir={tmp_path}", f"--output={tmp_path / 'out'}")
    assert run_command(export.main, *flags, "--weights=average") == 2
    assert "keeps no average of its weights (config.optim.ema_decay = 0)" in one_error(capsys)
    assert run_command(export.main, *flags) == 0
    assert averaging.averaged(config, small.params(parts)) is None
