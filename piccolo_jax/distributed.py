"""Several processes of one run: how they find each other, agree, and take turns.

With a single process everything here does nothing.
"""

import contextlib
import hashlib
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from piccolo_jax.errors import UserError

T = TypeVar("T")

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
# A process that has failed waits so long for others to fail alike, and leaves without them.
_LEAVING_SECONDS = 45
# So long after one process left, JAX ends those that stay.
_SHUTDOWN_SECONDS = 60


def start() -> None:
    """Joins the other processes of the run, if there are any. Comes before any other JAX call.

    JAX_COORDINATOR_ADDRESS (HOST:PORT of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID say where
    they are; what isn't set JAX takes from the environment: TPU VMs, GKE, SLURM, Open MPI.
    JAX_NUM_PROCESSES=1 alone stands for a run of this process only. Raises UserError if what is
    said doesn't fit together.
    """
    count, index = _integer(_COUNT), _integer(_INDEX)
    named = os.environ.get(_ADDRESS) or index is not None
    if (count == 1 and not named) or jax.distributed.is_initialized():
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Kubernetes without its package: then it is not it
            jax.distributed.initialize(
                num_processes=count, process_id=index, shutdown_timeout_seconds=_SHUTDOWN_SECONDS
            )
    except Exception as error:  # of as many kinds as there are clusters
        if not named and count is None and "coordinator_address" in str(error):
            return  # no cluster here
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise UserError(
            f"the processes of this run can't be joined ({reason}): set {_ADDRESS} to HOST:PORT of"
            f" process 0, {_COUNT} and {_INDEX}, or {_COUNT}=1 alone for a single process"
        ) from error


def leave(code: int) -> NoReturn:
    """Exits after an error: with the other processes if they do so too, else without them.

    Those are then ended by JAX, from within a collective too, at the latest after a minute.
    """
    if jax.distributed.is_initialized():
        leaving = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        leaving.start()
        leaving.join(_LEAVING_SECONDS)
        if leaving.is_alive():
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    sys.exit(code)


def _integer(name: str) -> int | None:
    value = os.environ.get(name)
    if not value:
        return None
    if not value.isdecimal():
        raise UserError(f"{name} = {value!r}: must be a number")
    return int(value)


@contextlib.contextmanager
def agreed(doing: str) -> Iterator[None]:
    """All processes leave this together; if one fails in it, UserError is raised on the others.

    What is done in it must not need the other processes.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failed = np.flatnonzero(_gather(np.int32(failure is not None)))
    if failure is not None:
        raise failure
    if failed.size:
        raise UserError(f"process {failed[0]} failed while {doing}; its own message says why")


def check_same(**values: Any) -> None:
    """Raises UserError on all processes if the text of a value isn't the same on all."""
    for name, value in values.items():
        digest = hashlib.sha256(str(value).encode()).digest()
        digests = _gather(np.frombuffer(digest, np.int32))
        others = np.flatnonzero((digests != digests[0]).any(axis=1))
        if others.size:
            raise UserError(
                f"process {others[0]} has another {name.replace('_', ' ')} than process 0: all"
                " processes need the same command, files and program"
            )


def of_first(values: np.ndarray) -> np.ndarray:
    """The values that process 0 has."""
    return np.asarray(_gather(values)[0])


def sees_first(folder: Path) -> bool:
    """Whether `folder`, which must exist, is the same folder as on process 0."""
    if jax.process_count() == 1:
        return True
    number = of_first(np.frombuffer(uuid.uuid4().bytes, np.int32)).tobytes().hex()
    marker = folder / f".is-shared-{number}"
    with agreed(f"writing to {folder}"):
        if jax.process_index() == 0:
            marker.touch()
    seen = marker.exists()
    with agreed(f"looking at {folder}"):
        pass
    if jax.process_index() == 0:
        marker.unlink()
    return seen


def first_then_rest(folder: Path, doing: str, work: Callable[[], T]) -> T:
    """The result of `work`, which leaves something in `folder` that is not made again.

    Process 0 goes first, and with it those that have another folder of that name; then the rest.
    """
    with contextlib.suppress(OSError):  # which `work` will meet too, and knows how to say
        folder.mkdir(parents=True, exist_ok=True)
    shared = sees_first(folder)
    first = jax.process_index() == 0 or not shared
    with agreed(doing):
        if first:
            result = work()
    with agreed(doing):
        if not first:
            result = work()
    return result


def _gather(values: Any) -> np.ndarray:
    """Equally shaped numpy arrays of all processes, stacked in a new axis 0."""
    return np.asarray(multihost_utils.process_allgather(np.asarray(values)))
