"""The step of every task: its figures, on one device and on eight.

Run as a script, it writes fixtures/step_golden.json anew, for a change that is meant to change
them:  JAX_PLATFORMS=cpu PYTHONPATH=. python tests/test_train_step.py
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from mesh_steps import MESHES
from small import OLDER_FUSIONS

from piccolo_jax import build, losses, optim, sharding, tasks, train_step
from piccolo_jax.config import LossConfig, MeshConfig
from piccolo_jax.data.packing import Shape
from piccolo_jax.models.embedder import encode
from piccolo_jax.train_step import CompiledSteps, make_step

pytestmark = pytest.mark.usefixtures("quick_compiling")

GOLDEN = Path(__file__).parent / "fixtures" / "step_golden.json"
STEPS = 4

# Index arrays over twelve texts.
KEEP = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], bool)
BATCHES = {
    "retrieval": {
        "query": np.array([0, 1, 2, 3]),
        "positive": np.array([[4], [5], [6], [5]]),
        "positive_keep": np.ones((4, 1), bool),
        "negative": np.array([[7, 8], [6, 0], [0, 0], [0, 9]]),
        "negative_keep": KEEP,
    },
    "similarity": {
        "first": np.array([0, 1, 2, 3, 4, 5]),
        "second": np.array([6, 7, 8, 9, 10, 11]),
        "score": np.array([1, 0, 2, 1, 0, 2], np.float32),
    },
    "classification": {
        "text": np.array([0, 1, 2, 3]),
        "label": np.array([4, 5, 4, 6]),
        "other_labels": np.array([[5, 6], [4, 0], [0, 0], [0, 5]]),
        "other_labels_keep": KEEP,
    },
}


def batch(task):
    arrays = BATCHES[task] | tiny.one_text_a_row([3, 9, 4, 16, 7, 5, 12, 3, 6, 10, 8, 4])
    return {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in arrays.items()}


def train_config():
    config = tiny.config()
    config.total_steps = STEPS + 2
    config.optim.warmup_steps = 2
    config.optim.weight_decay = 0.1
    return config


def start(model, config, mesh=None):
    mesh = mesh or sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(jax.device_put, tiny.params(model), build.param_shardings(model, mesh))
    optimizer = optim.make_optimizer(config, params)
    return mesh, optimizer, build.make_state(params, optimizer, mesh)


@functools.cache
def run(task):
    """Metrics of each step, the seconds spent compiling for each, and the last state."""
    config, model = train_config(), tiny.embedder(for_cpu=True)
    mesh, optimizer, state = start(model, config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = CompiledSteps(model, tasks.TASKS, config, optimizer, mesh, shardings)
    metrics, compiling = [], []
    for _ in range(STEPS):
        program, seconds = programs.get(task, Shape(16, 12, 12), state, batch(task))
        state, values = program(state, batch(task))
        metrics.append({name: float(value) for name, value in values.items()})
        compiling.append(seconds)
    return metrics, compiling, state


@pytest.mark.parametrize("task", BATCHES)
def test_steps_give_the_figures_recorded_once(task):
    metrics, _, state = run(task)
    expected = json.loads(GOLDEN.read_text())[task]
    for actual, values in zip(metrics, expected, strict=True):
        assert actual == pytest.approx(values, rel=1e-4)
    assert state.step == STEPS


def test_a_task_and_shape_is_compiled_once():
    _, compiling, _ = run("retrieval")
    assert compiling[0] > 0
    assert compiling[1:] == [0.0] * (STEPS - 1)


def test_the_compiler_gets_the_options_for_the_tokens_of_a_chunk(monkeypatch):
    asked = []
    unknown = {"xla_no_such_option": "1"}
    monkeypatch.setattr(train_step, "compiler_options", lambda *of: asked.append(of) or unknown)
    config, model = train_config(), tiny.embedder(for_cpu=True)
    mesh, optimizer, state = start(model, config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = CompiledSteps(model, tasks.TASKS, config, optimizer, mesh, shardings)
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        programs.get("retrieval", Shape(16, 12, 12, chunks=3), state, batch("retrieval"))
    assert asked == [(model.dtype, True, 16 * 4)]


@pytest.mark.parametrize("task", BATCHES)
def test_frozen_parameters_stay_and_all_others_move(task):
    before, after = tiny.params(tiny.embedder()), run(task)[2].params
    for path, moved in jax.tree.leaves_with_path(
        jax.tree.map(lambda a, b: np.any(np.asarray(a) != b), after, before)
    ):
        assert moved == ("position_embeddings" not in jax.tree_util.keystr(path)), path


def test_grad_norm_is_that_of_the_trained_parameters_before_clipping():
    config, model, arrays = train_config(), tiny.embedder(layers=1), batch("retrieval")
    config.optim.clip_norm = 1e-3
    config.model.freeze = ("embeddings", "scaling")
    _, optimizer, state = start(model, config)
    step = make_step(model, tasks.TASKS["retrieval"], config, optimizer)

    def loss(layers, params):
        backbone = {**params["backbone"], "layers": layers}
        embeddings = encode(model, {**params, "backbone": backbone}, arrays)
        return tasks.TASKS["retrieval"].loss(embeddings, arrays, config.loss)[0]

    @jax.jit
    def both(state):
        grads = jax.grad(loss)(state.params["backbone"]["layers"], state.params)
        return step(state, arrays)[1]["grad_norm"], optax.tree.norm(grads)

    actual, expected = both(state)
    assert expected > 1
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_dropout_depends_on_the_seed_and_the_step_alone():
    model = tiny.embedder(layers=1, dropout=0.1)

    def losses_of(seed, *steps):
        config = train_config()
        config.seed = seed
        _, optimizer, state = start(model, config)
        step = make_step(model, tasks.TASKS["similarity"], config, optimizer)
        loss = jax.jit(lambda state, arrays: step(state, arrays)[1]["loss"])
        arrays = batch("similarity")
        return [float(loss(state.replace(step=jnp.int32(n)), arrays)) for n in steps]

    first, again, next_step = losses_of(0, 5, 5, 6)
    assert first == again
    assert first != next_step
    assert losses_of(1, 5) != [first]


@pytest.mark.parametrize("task", BATCHES)
def test_each_task_passes_its_own_options_to_its_loss(task):
    config = LossConfig(dims=(2, 5))
    for number, options in enumerate((config.retrieval, config.similarity, config.classification)):
        options.temperature, options.weight = 0.1 + 0.1 * number, 3.0 + number
    config.retrieval.candidates, config.retrieval.duplicates = "own_positive", "count"
    embeddings = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    options, (bare, names, extra) = {
        "retrieval": (config.retrieval, (
            losses.info_nce, ("query", "positive", "negative", "negative_keep"),
            {"candidates": "own_positive", "duplicates": "count"},
        )),
        "similarity": (config.similarity, (losses.cosent, ("first", "second", "score"), {})),
        "classification": (config.classification, (
            losses.label_contrast, ("text", "label", "other_labels", "other_labels_keep"), {},
        )),
    }[task]  # fmt: skip
    arrays = {name: jnp.asarray(value) for name, value in BATCHES[task].items()}
    actual, metrics = jax.jit(lambda e, a: tasks.TASKS[task].loss(e, a, config))(embeddings, arrays)
    expected, expected_metrics = jax.jit(
        lambda e, *a: bare(e, *a, dims=(2, 5), temperature=options.temperature, **extra)
    )(embeddings, *(arrays[name] for name in names))
    np.testing.assert_allclose(actual, options.weight * expected, rtol=1e-6)
    assert metrics == expected_metrics


@pytest.fixture(scope="module")
def on_meshes(run_python, tmp_path_factory):
    """What mesh_steps.py wrote, and its stderr."""
    out = tmp_path_factory.mktemp("mesh") / "out.npz"
    script = Path(__file__).with_name("mesh_steps.py")
    done = run_python(script, out, devices=8, xla_flags=OLDER_FUSIONS)
    return dict(np.load(out)), done.stderr


@pytest.mark.parametrize("task", BATCHES)
@pytest.mark.parametrize("mesh", ["x".join(map(str, sizes)) for sizes in MESHES[1:]])
def test_eight_devices_give_what_one_gives(on_meshes, mesh, task):
    # Relative to the largest entry of each array; batches of 13 rows, which no mesh divides.
    arrays, _ = on_meshes
    one = {name: value for name, value in arrays.items() if name.startswith(f"1x1x1/{task}/")}
    assert len(one) > 40
    for name, expected in one.items():
        actual = arrays[name.replace("1x1x1", mesh)]
        if name.endswith("grads/backbone/layers/key/bias"):
            # Softmax ignores what is added to all scores alike: 0 but for rounding.
            scale = np.abs(arrays[f"1x1x1/{task}/grads/backbone/layers/query/bias"]).max()
        else:
            scale = np.abs(expected).max()
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_random_weights_are_the_same_on_any_mesh(on_meshes):
    arrays, _ = on_meshes
    one = [name for name in arrays if name.startswith("1x1x1/random/")]
    assert len(one) > 20
    for name in one:
        actual = arrays[name.replace("1x1x1", "2x2x2")]
        np.testing.assert_allclose(actual, arrays[name], rtol=1e-6, err_msg=name)


def test_no_activation_is_gathered_whole_to_be_split_anew(on_meshes):
    assert "Involuntary full rematerialization" not in on_meshes[1]


def test_meshes_split_what_they_should():
    # Or else the test above compares copies: on 2x2x2 every matrix is split over fsdp or tensor.
    model = tiny.embedder(layers=4)
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
    whole = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, s in jax.tree.leaves_with_path(
            sharding.param_shardings(mesh, build._shapes(model), build.embedder_rules("bert"))
        )
        if s.is_fully_replicated
    ]
    assert not [path for path in whole if "kernel" in path or "word" in path]


if __name__ == "__main__":
    figures = {task: run(task)[0] for task in BATCHES}
    GOLDEN.write_text(json.dumps(figures, indent=1) + "\n")
