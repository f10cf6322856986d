"""AdamW with the recipe's schedule; frozen parameters have no state and never change."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from piccolo_jax.config import Config, OptimConfig
from piccolo_jax.errors import UserError
from piccolo_jax.types import Params


def learning_rate(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Learning rate by step, counted from 0: linear warm-up, then the configured decay to 0."""
    decay_steps = total_steps - config.warmup_steps
    decay = {
        "cosine": optax.cosine_decay_schedule(config.learning_rate, decay_steps),
        "linear": optax.linear_schedule(config.learning_rate, 0.0, decay_steps),
        "constant": optax.constant_schedule(config.learning_rate),
    }[config.schedule]
    if not config.warmup_steps:
        return decay
    # Step t of the warm-up gets (t + 1) / (warmup_steps + 1) of the peak, so that none is lost.
    first = config.learning_rate / (config.warmup_steps + 1)
    warmup = optax.linear_schedule(first, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, decay], [config.warmup_steps])


def frozen(params: Params, patterns: tuple[str, ...]) -> Any:
    """A tree of booleans: whether a parameter's path matches one of the regexes."""
    return _by_path(params, lambda path: any(re.search(p, path) for p in patterns))


def make_optimizer(config: Config, params: Params) -> optax.GradientTransformation:
    """Clipping by global norm and AdamW (arXiv 1711.05101) on what config.model.freeze leaves.

    Weight decay spares biases and LayerNorm. `params` may be abstract. Raises UserError if a regex
    of config.model.freeze matches no parameter, or all are frozen.
    """
    c, patterns = config.optim, config.model.freeze
    is_frozen = frozen(params, patterns)
    for pattern in patterns:
        if not any(jax.tree.leaves(frozen(params, (pattern,)))):
            raise UserError(
                f"config.model.freeze = {patterns}: {pattern!r} matches no parameter; they are"
                f" {', '.join(jax.tree.leaves(_by_path(params, str)))}"
            )
    if all(jax.tree.leaves(is_frozen)):
        raise UserError(f"config.model.freeze = {patterns}: nothing is left to train")
    adamw = optax.adamw(
        learning_rate(c, config.total_steps),
        b1=c.b1,
        b2=c.b2,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mask=lambda tree: _by_path(tree, lambda path: not re.search(r"(bias|scale)$", path)),
    )
    clip = clip_by_global_norm(c.clip_norm) if c.clip_norm else optax.identity()
    labels = jax.tree.map(lambda stays: "frozen" if stays else "trained", is_frozen)
    return optax.multi_transform(
        {"trained": optax.chain(clip, adamw), "frozen": optax.set_to_zero()}, labels
    )


def clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Scales gradients whose norm is above `most` to it.

    As optax.clip_by_global_norm, which divides each gradient by the norm: XLA then writes and reads
    the results, where one factor for all becomes part of what follows.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        norm = optax.tree.norm(grads)
        factor = jnp.where(norm < most, 1.0, most / norm)
        return jax.tree.map(lambda grad: grad * factor, grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def _by_path(tree: Any, choose: Any) -> Any:
    return jax.tree.map_with_path(
        lambda path, _: choose(jax.tree_util.keystr(path, simple=True, separator="/")), tree
    )
