import math
import re

import jax
import numpy as np
import optax
import pytest
import tiny
import torch

from piccolo_jax.config import OptimConfig
from piccolo_jax.errors import UserError
from piccolo_jax.optim import frozen, learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("quick_compiling")

PEAK, TOTAL = 0.4, 10


def expected_rate(schedule, warmup, step):
    if step < warmup:
        return PEAK * (step + 1) / (warmup + 1)
    progress = (step - warmup) / (TOTAL - warmup)
    return (
        PEAK
        * {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "constant": 1.0,
        }[schedule]
    )


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_of_every_step(schedule, warmup):
    config = OptimConfig(learning_rate=PEAK, schedule=schedule, warmup_steps=warmup)
    actual = [float(learning_rate(config, TOTAL)(step)) for step in range(TOTAL)]
    expected = [expected_rate(schedule, warmup, step) for step in range(TOTAL)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert min(actual) > 0  # no step is wasted, neither the first nor the last


def paths_of(tree):
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(tree)
    ]


def config_of(**fields):
    config = tiny.config()
    config.optim = OptimConfig(**fields)
    return config


@pytest.mark.parametrize("clip_norm", [0.0, 0.5, 1e3])
def test_five_steps_equal_those_of_torch(clip_norm):
    config = config_of(
        learning_rate=1e-2, schedule="linear", weight_decay=0.1, clip_norm=clip_norm, b1=0.8,
        b2=0.95, eps=1e-6,
    )  # fmt: skip
    config.total_steps = 8
    params = tiny.params(tiny.embedder())
    names = paths_of(params)
    trained = [n for n in names if "position_embeddings" not in n]
    theirs = {n: torch.tensor(p) for n, p in zip(names, jax.tree.leaves(params), strict=True)}
    spared = [n for n in trained if re.search("bias|norm", n)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [theirs[n] for n in trained if n not in spared], "weight_decay": 0.1},
            {"params": [theirs[n] for n in spared], "weight_decay": 0.0},
        ],
        lr=1e-2, betas=(0.8, 0.95), eps=1e-6,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)

    ours = make_optimizer(config, params)
    state = ours.init(params)
    update = jax.jit(ours.update)
    rng = np.random.default_rng(0)
    for _ in range(5):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in zip(names, jax.tree.leaves(grads), strict=True):
            theirs[name].grad = torch.tensor(grad)
        if clip_norm:
            torch.nn.utils.clip_grad_norm_([theirs[n] for n in trained], clip_norm)
        optimizer.step()
        schedule.step()
    for name, actual in zip(names, jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(actual, theirs[name], rtol=0, atol=2e-6, err_msg=name)


def test_weight_decay_spares_biases_and_layer_norms_of_the_stacked_layers_too():
    params = tiny.params(tiny.embedder())
    optimizer = make_optimizer(config_of(learning_rate=0.1, weight_decay=0.5), params)
    no_grads = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(no_grads, optimizer.init(params), params)
    decayed = {
        n for n, u in zip(paths_of(updates), jax.tree.leaves(updates), strict=True) if u.any()
    }
    assert decayed == {
        "backbone/word_embeddings/embedding",
        "backbone/token_type_embeddings/embedding",
        *(
            f"backbone/layers/{name}/kernel"
            for name in ("query", "key", "value", "attention_output", "intermediate", "output")
        ),
        "scaling/kernel",
    }


def test_frozen_parameters_never_change_and_have_no_state():
    params = tiny.params(tiny.embedder())
    config = config_of(learning_rate=0.1, weight_decay=0.5)
    config.model.freeze = ("embeddings/", "^scaling/bias$")
    optimizer = make_optimizer(config, params)
    state = optimizer.init(params)
    stays = dict(
        zip(paths_of(params), jax.tree.leaves(frozen(params, config.model.freeze)), strict=True)
    )
    assert sorted(n for n, s in stays.items() if s) == [
        "backbone/position_embeddings/embedding",
        "backbone/token_type_embeddings/embedding",
        "backbone/word_embeddings/embedding",
        "scaling/bias",
    ]
    grads = jax.tree.map(np.ones_like, params)
    updates, _ = optimizer.update(grads, state, params)
    for name, update in zip(paths_of(updates), jax.tree.leaves(updates), strict=True):
        assert np.any(update) != stays[name]
    trained = sum(
        p.size for n, p in zip(stays, jax.tree.leaves(params), strict=True) if not stays[n]
    )
    moments = [leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sum(moments) == 2 * trained


def test_frozen_parameters_have_no_part_in_the_norm_that_is_clipped():
    params = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    config = config_of(learning_rate=1.0, schedule="constant", clip_norm=1.0, eps=1.0)
    config.model.freeze = ("b",)
    optimizer = make_optimizer(config, params)

    def update_of_a(grad_of_b):
        grads = {"a": np.full(4, 2, np.float32), "b": np.full(4, grad_of_b, np.float32)}
        return optimizer.update(grads, optimizer.init(params), params)[0]["a"]

    np.testing.assert_array_equal(update_of_a(0.0), update_of_a(1e6))
    np.testing.assert_allclose(update_of_a(0.0), -0.5 / (0.5 + 1.0), rtol=1e-5)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (("position_embeddings", "positon"), r"model\.freeze.*'positon' matches no parameter.*"
         "backbone/word_embeddings/embedding"),
        ((".",), r"model\.freeze.*nothing is left to train"),
    ],
)  # fmt: skip
def test_freezing_nothing_that_exists_or_everything_is_an_error(freeze, message):
    config = config_of()
    config.model.freeze = freeze
    with pytest.raises(UserError, match=message):
        make_optimizer(config, tiny.params(tiny.embedder()))
