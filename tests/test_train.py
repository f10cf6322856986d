"""Whole runs of the main program, as processes of their own and in this one."""

import fcntl
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import small
from small import ROOT, TASKS, one_error, run_command, snapshot

from piccolo_jax import build, metrics, runs, train
from piccolo_jax import config as config_lib
from piccolo_jax.checkpoint import Checkpoints
from piccolo_jax.evaluation import local

pytestmark = pytest.mark.usefixtures("quick_compiling")

NO_EVALS = "--config.eval.datasets=()"
# The main program, which gets a signal when it has logged a step and checkpoint 4 is complete.
WITH_A_SIGNAL = """
import os, pathlib, sys, time
from piccolo_jax import cli, metrics, train
number, step, checkpoint = int(sys.argv.pop(1)), int(sys.argv.pop(1)), pathlib.Path(sys.argv.pop(1))
write = metrics.JsonLines.write
def write_and_die(self, values):
    write(self, values)
    if self.path.name == "metrics.jsonl" and values["step"] == step:
        while not checkpoint.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)
metrics.JsonLines.write = write_and_die
cli.run(train.main)
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small.write_training_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def run(files):
    """run(workdir, *flags, program=...): the main program in a process of its own."""

    def run(workdir, *flags, program=("-m", "piccolo_jax.train")):
        command = [sys.executable, *map(str, program), f"--config={files / 'tiny.py'}"]
        return subprocess.run(
            [*command, f"--workdir={workdir}", *flags],
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def run_here(files):
    """run_here(workdir, *flags): exit code of the main program in this process."""

    def run_here(workdir, *flags):
        config = f"--config={files / 'tiny.py'}"
        return run_command(train.main, config, f"--workdir={workdir}", *flags)

    return run_here


@pytest.fixture(scope="module")
def straight(run, tmp_path_factory):
    """An uninterrupted run: its workdir and process."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return SimpleNamespace(workdir=workdir, process=run(workdir))


@pytest.fixture
def copied(straight, tmp_path):
    shutil.copytree(straight.workdir, tmp_path / "run")
    return tmp_path / "run"


def rows(workdir, name="metrics.jsonl"):
    return metrics.read(workdir / name)


def losses(workdir):
    return {row["step"]: (row["dataset"], row["loss"], row["grad_norm"]) for row in rows(workdir)}


def assert_same_end(workdir, straight):
    """The run ended bit by bit as the uninterrupted one, and reported the same on the way."""
    for path in ("model.safetensors", "2_Dense/model.safetensors"):
        one, other = (base / "export" / path for base in (workdir, straight.workdir))
        assert one.read_bytes() == other.read_bytes(), path
    steps = [row["step"] for row in rows(workdir)]
    assert steps == sorted(set(steps))
    assert losses(workdir).items() <= losses(straight.workdir).items()
    tokens = {row["step"]: row["total_tokens"] for row in rows(straight.workdir)}
    assert all(row["total_tokens"] == tokens[row["step"]] for row in rows(workdir))
    assert rows(workdir, "eval.jsonl") == rows(straight.workdir, "eval.jsonl")


def test_the_card_of_the_export_has_the_figures_of_the_run(straight):
    first, *others = rows(straight.workdir)
    assert first["hardware"] == {"device": "cpu", "devices": 1, "processes": 1}
    assert not any("hardware" in row for row in others)
    tokens, seconds = ([row[f"total_{unit}"] for row in (first, *others)]
                       for unit in ("tokens", "seconds"))  # fmt: skip
    assert all(a < b for a, b in itertools.pairwise([0, *tokens]))
    assert seconds == sorted(seconds)  # two steps may take less than a hundredth
    card = (straight.workdir / "export" / "README.md").read_text("utf-8")
    assert f"{others[-1]['total_tokens']:,} tokens" in card
    assert "| 1 x cpu, 1 process(es) | 1 |" in card
    for dataset in ("retrieval.jsonl | retrieval | 20 |", "similarity.test spearman |"):
        assert f"| {dataset}" in card
    assert "12 of 12 steps of 4 rows" in card


def test_a_run_ends_with_checkpoints_metrics_scores_and_an_export(straight):
    process, workdir = straight.process, straight.workdir
    assert process.returncode == 0, process.stderr
    assert "Traceback" not in process.stderr
    assert sorted(p.name for p in workdir.iterdir()) == [
        "checkpoints", "config.json", "eval.jsonl", "export", "lock", "metrics.jsonl",
        "prepared", "tokenizer",
    ]  # fmt: skip
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["12", "8"]
    assert [row["step"] for row in rows(workdir)] == list(range(1, 13))
    assert {row["task"] for row in rows(workdir)} == set(TASKS)
    needed = {"step", "task", "dataset", "loss", "grad_norm", "learning_rate", "epoch"}
    assert all(needed <= row.keys() for row in rows(workdir))
    scores = rows(workdir, "eval.jsonl")
    assert [(s["step"], s["dataset"], s["metric"]) for s in scores] == [
        (step, "similarity.test", "spearman") for step in (0, 6, 12)
    ]
    assert all(-1 <= score[dim] <= 1 for score in scores for dim in ("16", "48"))
    config = config_lib.from_json((workdir / "config.json").read_text("utf-8"), "config.json")
    assert (config.total_steps, config.model.embed_dim) == (12, 48)
    assert Checkpoints(workdir).about().model == build.describe(build.build(config))
    for place in (workdir / "checkpoints" / "12", workdir / "export"):
        assert str(place) in process.stderr


def test_a_second_process_in_the_same_folder_is_refused(run_here, copied, capsys):
    before = snapshot(copied)
    with (copied / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run_here(copied) == 2
    assert "another process trains there" in one_error(capsys)
    assert snapshot(copied) == before


def test_a_folder_that_cannot_be_locked_is_an_error(run_here, tmp_path, capsys):
    (tmp_path / "lock").mkdir()
    assert run_here(tmp_path, NO_EVALS) == 2
    assert f"--workdir={tmp_path}: can't be used (Is a directory)" in one_error(capsys)


def test_the_mixture_is_said_before_training_and_in_the_first_line_of_metrics(straight):
    first, *others = rows(straight.workdir)
    assert not any("mixture" in row for row in others)
    assert [(m["dataset"], m["batch_size"], m["steps"]) for m in first["mixture"]] == [
        (f"{task}.jsonl", 4, 4) for task in TASKS
    ]
    last = {row["dataset"]: row["epoch"] for row in others}
    assert {m["dataset"]: m["epochs"] for m in first["mixture"]} == last
    assert set(last.values()) == {4 * 4 / 20}
    table, _, after = straight.process.stderr.partition("0.80\n")
    assert "share  steps  epochs" in table
    assert "compiled" not in table
    assert "compiled" in after


def test_a_dataset_smaller_than_the_batch_is_trained_in_batches_of_its_own(
    run_here, tmp_path, capsys
):
    flags = ("--config.data.datasets[1].max_rows=3", "--config.data.mixing_temperature=1")
    assert run_here(tmp_path / "run", NO_EVALS, *flags, "--config.total_steps=11") == 0
    said = capsys.readouterr().err
    assert "similarity.jsonl: 3 rows, fewer than config.batch_size = 4: all of them" in said
    logged = rows(tmp_path / "run")
    mixture = {m["dataset"]: m for m in logged[0]["mixture"]}
    small = mixture["similarity.jsonl"]
    assert (small["rows"], small["used"], small["batch_size"]) == (20, 3, 3)
    assert small["share"] == pytest.approx(3 / 43, abs=1e-6)
    assert small["steps"] == [r["dataset"] for r in logged].count("similarity.jsonl") == 1
    assert small["epochs"] == 1


def test_a_killed_run_goes_on_and_ends_bit_by_bit_the_same(run, straight, tmp_path):
    workdir = tmp_path / "run"
    deadly = ("-c", WITH_A_SIGNAL, signal.SIGKILL, 7, workdir / "checkpoints" / "4")
    killed = run(workdir, program=deadly)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "ta')
    resumed = run(workdir)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after step 4" in resumed.stderr
    assert losses(workdir) == losses(straight.workdir)
    assert_same_end(workdir, straight)


def test_a_run_asked_to_stop_saves_and_goes_on_where_it_stopped(
    run, run_here, straight, tmp_path, capsys
):
    workdir = tmp_path / "run"
    stopping = ("-c", WITH_A_SIGNAL, signal.SIGTERM, 5, workdir / "checkpoints" / "4")
    stopped = run(workdir, program=stopping)
    assert stopped.returncode == 128 + signal.SIGTERM == 143, stopped.stderr
    assert "stopped after step 6; the same command goes on from there" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert (workdir / "checkpoints" / "6").is_dir()
    assert not (workdir / "export").exists()
    assert run_here(workdir, "--config.log.every=3") == 0
    assert "resuming after step 6" in capsys.readouterr().err
    # Checkpoints are after 4, 8 and 12: their totals are logged, for who goes on from there.
    assert [row["step"] for row in rows(workdir)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 12]
    assert_same_end(workdir, straight)


def test_a_damaged_checkpoint_is_refused_and_the_one_before_goes_on(
    run_here, straight, copied, capsys
):
    shutil.rmtree(copied / "export")
    latest = copied / "checkpoints" / "12"
    largest = max((latest / "state").rglob("?" * 32), key=lambda path: path.stat().st_size)
    os.truncate(largest, 1000)
    before = snapshot(copied)
    assert run_here(copied) == 2
    message = one_error(capsys)
    assert f"{latest}: this checkpoint can't be read" in message
    assert "delete it" in message
    assert snapshot(copied) == before
    shutil.rmtree(latest)
    assert run_here(copied) == 0
    assert "resuming after step 8" in capsys.readouterr().err
    assert_same_end(copied, straight)


def test_a_finished_run_started_again_changes_nothing(run_here, copied, capsys):
    before = snapshot(copied)
    (copied / "export.partial-0123").mkdir()  # of a process that was killed
    assert run_here(copied) == 0
    assert snapshot(copied) == before
    assert not (copied / "export.partial-0123").exists()
    assert str(copied / "export") in capsys.readouterr().err


def test_a_constant_schedule_lets_the_run_become_longer(run_here, straight, copied, capsys):
    assert run_here(copied, "--config.total_steps=14") == 0
    assert [row["step"] for row in rows(copied)] == list(range(1, 15))
    assert losses(straight.workdir).items() < losses(copied).items()
    path = Path("export") / "model.safetensors"
    assert (copied / path).read_bytes() != (straight.workdir / path).read_bytes()
    assert run_here(copied) == 2
    assert "config.total_steps = 12: " in one_error(capsys)


@pytest.mark.parametrize(
    ("flag", "difference"),
    [
        ("optim.learning_rate=1e-4", "optim.learning_rate: 0.001 -> 0.0001"),
        ("optim.schedule=cosine", "optim.schedule: 'constant' -> 'cosine'"),
        ("loss.dims=(48,)", "loss.dims: (16, 48) -> (48,)"),
        ("model.hidden_size=64", "model.hidden_size: 32 -> 64"),
        ("data.datasets[1].weight=2", "data.datasets[1].weight: 1.0 -> 2.0"),
        ("seed=1", "seed: 0 -> 1"),
    ],
)
def test_another_config_is_refused_with_the_difference(
    run_here, straight, capsys, flag, difference
):
    before = snapshot(straight.workdir)
    assert run_here(straight.workdir, f"--config.{flag}") == 2
    message = one_error(capsys)
    assert f"{straight.workdir / 'config.json'} is of a run with another config" in message
    assert f"  {difference}\n" in message
    assert "another --workdir" in message
    assert snapshot(straight.workdir) == before


def test_other_training_data_are_refused(run_here, files, copied, tmp_path, capsys):
    path = files / "similarity.jsonl"
    text = path.read_text("utf-8")
    before = snapshot(copied)
    try:
        path.write_text(text.replace('"label": 2', '"label": 1', 1), encoding="utf-8")
        assert run_here(copied) == 2
    finally:
        path.write_text(text, encoding="utf-8")
    assert "content of dataset: similarity.jsonl-" in one_error(capsys)
    assert before.items() <= snapshot(copied).items()  # beside them, the newly prepared data


def test_checkpoints_of_another_model_are_refused(run_here, straight, tmp_path, capsys):
    shutil.copytree(straight.workdir / "checkpoints", tmp_path / "run" / "checkpoints")
    assert run_here(tmp_path / "run", "--config.model.hidden_size=64") == 2
    message = one_error(capsys)
    assert f"{tmp_path / 'run' / 'checkpoints'} is of a run with another config" in message
    assert "model.hidden_size: 32 -> 64" in message
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.fixture
def step_by_step(monkeypatch):
    """Steps that change nothing and give the metrics that `results` holds for their numbers."""
    results = {}

    def get(self, task, shape, state, arrays):
        def step(state, arrays):
            done = int(state.step) + 1
            values = results.get(done, {"loss": 0.5, "grad_norm": 1.0})
            return state.replace(step=state.step + 1), values

        return step, 0.0

    monkeypatch.setattr(train.CompiledSteps, "get", get)
    return results


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(
    run_here, step_by_step, tmp_path, capsys, name, value
):
    step_by_step[8] = {"loss": 0.5, "grad_norm": 1.0, name: value}
    assert run_here(tmp_path, NO_EVALS) == 2
    message = one_error(capsys)
    assert "step 8, dataset " in message
    assert "Lower optim.learning_rate" in message
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["4"]
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 8))
    assert not (tmp_path / "export").exists()


def test_a_run_that_has_learnt_nothing_yet_may_change_its_config(
    run_here, step_by_step, tmp_path, capsys
):
    step_by_step[2] = {"loss": float("nan"), "grad_norm": 1.0}
    assert run_here(tmp_path, NO_EVALS) == 2
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")  # that of the other config
    step_by_step.clear()
    assert run_here(tmp_path, NO_EVALS, "--config.optim.learning_rate=1e-4") == 0
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 13))
    assert json.loads((tmp_path / "config.json").read_text())["optim"]["learning_rate"] == 1e-4
    assert runs.read(tmp_path).step == 12


def test_metrics_are_logged_every_so_many_steps_and_at_both_ends(run_here, step_by_step, tmp_path):
    assert run_here(tmp_path, NO_EVALS, "--config.log.every=5", "--config.checkpoint.every=0") == 0
    assert [row["step"] for row in rows(tmp_path)] == [1, 5, 10, 12]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["12"]


def test_an_evaluation_that_was_cut_short_is_made_up_for(
    run_here, step_by_step, tmp_path, monkeypatch, capsys
):
    scores = iter(range(100))
    monkeypatch.setattr(
        local.EvalDataset, "evaluate", lambda self, encode, dims: dict.fromkeys(dims, next(scores))
    )
    assert run_here(tmp_path, "--config.eval.every=4") == 0
    assert [(r["step"], r["16"]) for r in rows(tmp_path, "eval.jsonl")] == [
        (0, 0), (4, 1), (8, 2), (12, 3),
    ]  # fmt: skip
    path = tmp_path / "eval.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    shutil.rmtree(tmp_path / "checkpoints" / "12")  # as if killed while it evaluated step 8
    assert run_here(tmp_path, "--config.eval.every=4") == 0
    assert [(r["step"], r["16"]) for r in rows(tmp_path, "eval.jsonl")] == [
        (0, 0), (4, 1), (8, 4), (12, 5),
    ]  # fmt: skip
    capsys.readouterr()
    assert run_here(tmp_path, "--config.eval.dims=(48,)") == 0
    assert "0.000 -> 5.000" in capsys.readouterr().err
    assert run_here(tmp_path, "--config.eval.dims=(32,)") == 0  # step 0 has no such score
    assert [r.get("32") for r in rows(tmp_path, "eval.jsonl")] == [None] * 4 + [6]
