"""Several processes, one evaluation: process 0 evaluates, and all encode what it asks for."""

import json
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.vectors import Encode

_DONE, _FAILED = -1, -2  # in place of a message's length


def lead(encode: Encode, work: Callable[[Encode], None]) -> None:
    """On process 0, runs `work` with an `encode` that all processes share; on others, helps.

    Returns on all when `work` has; if it fails, UserError is raised on the others.
    """
    if jax.process_count() == 1:
        work(encode)
        return
    if jax.process_index() == 0:
        end = _FAILED

        def ask(texts: Sequence[str]) -> np.ndarray:
            content = json.dumps(list(texts)).encode()
            _of_first(np.asarray(len(content), np.int64))
            _of_first(np.frombuffer(content, np.uint8))
            return encode(texts)

        try:
            work(ask)
            end = _DONE
        finally:
            _of_first(np.asarray(end, np.int64))
        return
    while (size := int(_of_first(np.asarray(0, np.int64)))) >= 0:
        content = _of_first(np.zeros(size, np.uint8)).tobytes()
        encode(json.loads(content))
    if size == _FAILED:
        raise UserError("process 0 failed while evaluating; its own message says why")


def _of_first(values: np.ndarray) -> np.ndarray:
    return np.asarray(multihost_utils.broadcast_one_to_all(values))
