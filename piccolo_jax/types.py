"""Types shared by every part: the error a user can cause, and the pytrees of a train step."""

from typing import Any

import flax.struct
import jax
import optax

Params = Any  # nested dict of jax.Array, as Flax makes it
Batch = dict[str, jax.Array]  # the arrays of one global batch, see data/packing.py
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class TrainState:
    """What a step reads and writes; `step` counts finished steps and determines the randomness."""

    step: Any  # jax.Array, int32 []; as the other fields, abstract or a sharding in trees of those
    params: Params
    opt_state: optax.OptState
    average: Params = None  # of the trained parameters, if one is kept (averaging.py)
