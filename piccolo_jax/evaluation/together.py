"""Several processes, one evaluation: process 0 evaluates, and all encode what it asks for.

Between its requests process 0 scores for minutes. The others wait for its word in JAX's key-value
store, where waiting takes as long as it takes; collectives on CPU give up after half a minute.
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # its key-value store has no public name
from jax.experimental import multihost_utils

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.vectors import Encode

_DONE, _FAILED = -1, -2  # in place of a message's length
_WAIT_MS = 60_000  # then it is asked again


def lead(encode: Encode, work: Callable[[Encode], None]) -> None:
    """On process 0, runs `work` with an `encode` that all processes share; on others, helps.

    Returns on all when `work` has; if it fails, UserError is raised on the others.
    """
    if jax.process_count() == 1:
        work(encode)
        return
    if jax.process_index() == 0:
        end, messages = _FAILED, itertools.count()

        def ask(texts: Sequence[str]) -> np.ndarray:
            content = json.dumps(list(texts)).encode()
            _tell(next(messages), len(content))
            _of_first(np.frombuffer(content, np.uint8))
            return encode(texts)

        try:
            work(ask)
            end = _DONE
        finally:
            _tell(next(messages), end)
        return
    for message in itertools.count():
        size = _hear(message)
        if size < 0:
            break
        content = _of_first(np.zeros(size, np.uint8)).tobytes()
        encode(json.loads(content))
    if size == _FAILED:
        raise UserError("process 0 failed while evaluating; its own message says why")


def _tell(message: int, size: int) -> None:
    _store().key_value_set(f"evaluate/{message}", str(size))


def _hear(message: int) -> int:
    while True:
        try:
            return int(_store().blocking_key_value_get(f"evaluate/{message}", _WAIT_MS))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


def _store() -> Any:
    return jax_distributed.global_state.client


def _of_first(values: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(values))
