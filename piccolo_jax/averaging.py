"""An exponential moving average of the weights over the steps of a run.

It starts from the initial weights. After step t = 1, 2, ...

    average = d average + (1 - d) weights,    d = min(decay, (1 + t) / (10 + t)),

the decay of TensorFlow's tf.train.ExponentialMovingAverage with `num_updates`: small at first, so
that a short run too forgets where it began. Only what is trained has an average of its own.
"""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from piccolo_jax import optim
from piccolo_jax.config import Config
from piccolo_jax.types import Params

LAST, AVERAGE = "last", "average"  # names of the weights that are evaluated and exported


def default_weights(config: Config) -> str:
    """The name of the weights that a run exports unless told otherwise."""
    return AVERAGE if config.optim.ema_decay else LAST


def averaged(config: Config, params: Params) -> Params:
    """The part of `params` of which a run keeps an average: what config.model.freeze leaves.

    None if config.optim.ema_decay is 0. `params` may be abstract.
    """
    if not config.optim.ema_decay:
        return None
    is_frozen = flatten_dict(optim.frozen(params, config.model.freeze))
    return unflatten_dict(
        {path: leaf for path, leaf in flatten_dict(params).items() if not is_frozen[path]}
    )


def update(average: Params, params: Params, step: jax.Array, decay: float) -> Params:
    """The average after step `step`, counted from 1, which left `params`. In float32."""
    if average is None:
        return None
    weight = jnp.maximum(1 - decay, 9 / (10.0 + step))  # 1 - d
    by_path = flatten_dict(params)
    return unflatten_dict(
        {path: old + weight * (by_path[path] - old) for path, old in flatten_dict(average).items()}
    )


def weights_of(average: Params, params: Params) -> Params:
    """All weights of the averaged model, with frozen ones from `params`; those without average."""
    if average is None:
        return params
    return unflatten_dict(flatten_dict(params) | flatten_dict(average))
