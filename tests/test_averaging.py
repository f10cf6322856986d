import re

import jax
import numpy as np
import pytest
import tiny
from small import OLDER_FUSIONS

from piccolo_jax import averaging, build, optim, sharding

# Steps on a mesh, whose averages are those of their weights, made anew with numpy.
STEPS = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np, tiny
jax.config.update("jax_disable_most_optimizations", True)
from piccolo_jax import averaging, build, optim, sharding
from piccolo_jax.config import MeshConfig
from piccolo_jax.data.loader import Batches
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps

config, model = tiny.config(mesh=MeshConfig(1, 2, 2)), tiny.embedder(layers=1)
config.optim.ema_decay, config.total_steps, config.optim.schedule = 0.27, 5, "constant"
mesh = sharding.make_mesh(config.mesh)
params = jax.tree.map(jax.device_put, tiny.params(model), build.param_shardings(model, mesh))
optimizer = optim.make_optimizer(config, params)
state = build.make_state(params, optimizer, mesh, averaging.averaged(config, params))
places = jax.tree.map(lambda leaf: leaf.sharding, state)
batches = Batches(
    config, [tiny.dataset("similarity")], TASKS, 32,
    sharding.batch_shards_of(mesh), sharding.local_shards(mesh),
)
steps = CompiledSteps(model, TASKS, config, optimizer, mesh, places)
expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
for step in range(config.total_steps):
    batch = batches.at(step)
    arrays = sharding.global_batch(mesh, batch.sharded, batch.replicated)
    before = state
    state, _ = steps.get("similarity", batch.shape, state, arrays)[0](state, arrays)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.average)), "not donated"
    decay = min(0.27, (2 + step) / (11 + step))  # 2/11, 3/12, then 0.27
    expected = jax.tree.map(
        lambda old, new: decay * old + (1 - decay) * np.asarray(new), expected, state.params
    )
    actual = averaging.weights_of(state.average, state.params)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(np.asarray(a), e, rtol=1e-6, atol=1e-7)
moved = jax.tree.map(lambda a, b: float(abs(a - b).max()), actual, state.params)
assert max(jax.tree.leaves(moved)) > 1e-3, "the average is no other than the last weights"
assert jax.tree.map(lambda leaf: leaf.sharding, state) == places
"""


def test_the_average_on_a_mesh_is_that_of_the_weights_after_each_step(run_python):
    run_python("-c", STEPS, devices=4, xla_flags=OLDER_FUSIONS)


def config_with(decay, freeze=("position_embeddings",)):
    config = tiny.config()
    config.optim.ema_decay, config.model.freeze = decay, freeze
    return config


def paths(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


def test_only_what_is_trained_has_an_average_which_lies_where_its_parameter_does():
    model, config = tiny.embedder(), config_with(0.9, ("embeddings",))
    mesh = jax.sharding.AbstractMesh((2, 2, 2), sharding.AXES)
    params = build.abstract_params(model, build.param_shardings(model, mesh))
    optimizer = optim.make_optimizer(config, params)
    average = averaging.averaged(config, params)
    state = build.abstract_state(params, optimizer, mesh, average)
    trained = {path: leaf for path, leaf in paths(params).items() if "embeddings" not in path}
    assert len(trained) < len(paths(params))
    assert paths(state.average) == trained
    assert len({leaf.sharding.spec for leaf in trained.values()}) > 3


def test_without_a_decay_there_is_no_average_and_the_weights_are_the_last():
    params = tiny.params(tiny.embedder())
    assert averaging.averaged(config_with(0.0), params) is None
    assert averaging.update(None, params, 1, 0.0) is None
    assert averaging.weights_of(None, params) is params


def test_the_averaged_model_has_the_frozen_weights_of_the_last():
    params = tiny.params(tiny.embedder())
    config = config_with(0.9)
    average = jax.tree.map(lambda x: x + 1, averaging.averaged(config, params))
    weights = averaging.weights_of(average, params)
    assert jax.tree.structure(weights) == jax.tree.structure(params)
    for path, value in paths(weights).items():
        frozen = re.search("position_embeddings", path)
        np.testing.assert_array_equal(value, paths(params)[path] + (0 if frozen else 1))


@pytest.mark.parametrize("step", [1, 7, 100, 10**6])
def test_the_decay_is_small_at_first(step):
    average, params = {"a": np.float32([0.0])}, {"a": np.float32([1.0])}
    new = averaging.update(average, params, np.int32(step), 0.9999)["a"][0]
    np.testing.assert_allclose(new, 1 - min(0.9999, (1 + step) / (10 + step)), rtol=1e-6)


def test_weights_that_stay_have_themselves_as_average():
    value = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    average = {"a": value}
    for step in range(1, 50):
        average = averaging.update(average, {"a": value}, np.int32(step), 0.9)
    np.testing.assert_array_equal(average["a"], value)
