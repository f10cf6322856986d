"""Runs of the main program that keep their best weights; steps and scores are given."""

import shutil

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import load_file
from small import one_error, run_command

from piccolo_jax import export, metrics, runs, train
from piccolo_jax.checkpoint import Best
from piccolo_jax.config import MeshConfig
from piccolo_jax.evaluation import local, models

pytestmark = pytest.mark.usefixtures("quick_compiling")
METRIC = "--config.checkpoint.best_metric=similarity.test/spearman@48"
EVERY = ("--config.eval.every=2", "--config.checkpoint.every=4")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return small.write_training_files(tmp_path_factory.mktemp("files"), ["similarity"])


@pytest.fixture
def run_here(files, monkeypatch):
    """run_here(workdir, scores, *flags): exit code of a run whose step t adds 1 to all weights.

    After step t the evaluation set scores scores[t], or nothing if there is none: an error.
    """

    def get(self, task, shape, state, arrays):
        def step(state, arrays):
            add = lambda tree: jax.tree.map(lambda x: x + 1, tree)  # noqa: E731
            state = state.replace(step=state.step + 1, params=add(state.params))
            return state.replace(average=add(state.average)), {"loss": 0.5, "grad_norm": 1.0}

        return step, 0.0

    def encode(self, params, texts, prompt="", progress=""):
        return params["scaling"]["bias"][:1]

    monkeypatch.setattr(train.CompiledSteps, "get", get)
    monkeypatch.setattr(train.Encoder, "encode", encode)

    def run_here(workdir, scores, *flags):
        def evaluate(self, encode, dims):
            step = round(float(encode([])[0]))
            return {dim: scores[step] if dim == 48 else -step for dim in dims}

        monkeypatch.setattr(local.EvalDataset, "evaluate", evaluate)
        config = f"--config={files / 'tiny.py'}"
        prepared = f"--config.data.prepared_dir={files / 'prepared'}"
        return run_command(
            train.main, config, f"--workdir={workdir}", prepared, METRIC, *EVERY, *flags
        )

    return run_here


def best_of(workdir):
    """Step in the name, score, and steps that the weights have taken."""
    (name,) = (path.name for path in (workdir / "best").iterdir())
    params = runs.read(workdir, "best")[3]
    return int(name), Best(workdir).score, round(float(params["scaling"]["bias"][0]))


SCORES = {0: 0.1, 2: 0.5, 4: 0.3, 6: 0.8, 8: 0.7, 10: 0.8, 12: 0.2}


def test_the_best_weights_stay_and_can_be_exported(run_here, tmp_path, capsys):
    assert run_here(tmp_path / "run", SCORES, "--config.checkpoint.keep=1") == 0
    assert best_of(tmp_path / "run") == (6, 0.8, 6)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["12"]
    said = capsys.readouterr().err
    assert "step 6: the best so far, similarity.test/spearman@48 = 0.8000" in said
    assert f"best:       {tmp_path / 'run' / 'best' / '6'}" in said
    output = tmp_path / "out"
    flags = (f"--workdir={tmp_path / 'run'}", f"--output={output}")
    assert run_command(export.main, *flags, "--checkpoint=best") == 0
    assert "step 6 of" in capsys.readouterr().out
    bias = load_file(output / "2_Dense" / "model.safetensors")["linear.bias"]
    np.testing.assert_array_equal(bias, 6)
    best = models.load(str(tmp_path / "run"), MeshConfig(data=1), checkpoint="best")
    exported = models.load(str(output), MeshConfig(data=1))
    texts = ["今天天气很好", "A text"]
    np.testing.assert_allclose(best.encode(texts), exported.encode(texts), atol=1e-6)
    assert best.revision.startswith("step-6-")
    assert run_command(export.main, *flags, "--overwrite") == 0
    assert "step 12 of" in capsys.readouterr().out


@pytest.mark.parametrize(("scores", "step"), [({0: 0.9}, 0), ({12: 0.9}, 12)])
def test_first_and_last_weights_can_be_the_best(run_here, tmp_path, scores, step):
    assert run_here(tmp_path, SCORES | scores) == 0
    assert best_of(tmp_path) == (step, 0.9, step)


def test_a_resumed_run_knows_the_best_so_far(run_here, tmp_path, capsys):
    with pytest.raises(KeyError):  # as if it were killed while it evaluates step 10
        run_here(tmp_path, {step: s for step, s in SCORES.items() if step < 10})
    capsys.readouterr()
    assert run_here(tmp_path, SCORES | {12: 0.79}) == 0
    said = capsys.readouterr().err
    assert "resuming after step 8" in said
    assert "the best so far" not in said
    assert best_of(tmp_path) == (6, 0.8, 6)


def test_a_best_that_was_evaluated_but_not_kept_is_kept_when_the_run_goes_on(run_here, tmp_path):
    with pytest.raises(KeyError):
        run_here(tmp_path, {0: 0.1, 2: 0.2, 4: 0.3, 6: 0.4, 8: 0.9})
    shutil.rmtree(tmp_path / "best" / "8")  # as if killed before it was whole
    assert metrics.read(tmp_path / "eval.jsonl")[-1]["step"] == 8
    assert run_here(tmp_path, {10: 0.5, 12: 0.6}) == 0  # step 8 is not evaluated again
    assert best_of(tmp_path) == (8, 0.9, 8)


def test_the_metric_may_change_between_runs(run_here, tmp_path):
    with pytest.raises(KeyError):
        run_here(tmp_path, {step: s for step, s in SCORES.items() if step < 10})
    other = "--config.checkpoint.best_metric=mean@16"  # falls with the steps
    assert run_here(tmp_path, SCORES, other) == 0
    assert best_of(tmp_path) == (8, -8, 8)


def test_without_a_metric_no_best_is_kept(run_here, tmp_path, capsys):
    assert run_here(tmp_path / "run", SCORES, "--config.checkpoint.best_metric=") == 0
    assert not (tmp_path / "run" / "best").exists()
    assert "best:" not in capsys.readouterr().err
    flags = (f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}", "--checkpoint=best")
    assert run_command(export.main, *flags) == 2
    assert "best: holds no complete checkpoint" in one_error(capsys)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ((), "similarity.test/spearman@16, mean@16, similarity.test/spearman@48, mean@48"),
        (("--config.eval.dims=(16,)",), "similarity.test/spearman@16, mean@16"),
        (
            ("--config.eval.dims=(16,)", "--config.optim.ema_decay=0.9"),
            "similarity.test/spearman@16, mean@16, average/similarity.test/spearman@16,"
            " average/mean@16",
        ),
    ],
)
def test_a_metric_that_is_not_measured_is_refused_before_training(
    run_here, tmp_path, capsys, flags, names
):
    assert run_here(tmp_path / "run", SCORES, *flags, f"{METRIC}0") == 2
    message = one_error(capsys)
    assert "config.checkpoint.best_metric = 'similarity.test/spearman@480': must be" in message
    assert f"one of {names}\n" in message
    assert not (tmp_path / "run").exists()


def test_a_metric_without_evaluation_sets_is_refused(run_here, tmp_path, capsys):
    assert run_here(tmp_path / "run", SCORES, "--config.eval.datasets=()") == 2
    assert "must be empty where eval.datasets is" in one_error(capsys)
