"""mteb's tasks by the names of benchmarks and tasks.

Importing this imports mteb, which takes seconds: only `evaluate` does.
"""

import difflib
import re
import warnings
from collections.abc import Sequence
from typing import Any

import mteb

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.benchmarks import ALSO_2024

CMTEB_2024_NAME = "cmteb-2024"
_CMTEB_2025_NAME = "MTEB(cmn, v1)"
_WITH_SUBSET = re.compile(r"(?P<name>[^()]+)\((?P<subset>[^()]+)\)")


def select(benchmark: str, names: Sequence[str]) -> list[Any]:
    """The tasks of a benchmark, of those only `names`; without a benchmark, the tasks of the names.

    A name may choose a language of a task: STS22(zh). Raises UserError for unknown names.
    """
    if not benchmark:
        return [_task(name) for name in names]
    tasks = _benchmark(benchmark)
    known = {task.metadata.name: task for task in tasks}
    for name in names:
        if name not in known:
            raise UserError(
                f"--tasks={name}: not in {benchmark}{_near(name, known)}; it has {', '.join(known)}"
            )
    return [known[name] for name in names] if names else tasks


def _benchmark(name: str) -> list[Any]:
    if name.lower() == CMTEB_2024_NAME:
        also = [
            mteb.get_task(task, eval_splits=["test"], hf_subsets=[subset])
            for task, (_, subset) in ALSO_2024.items()
        ]
        return [*mteb.get_benchmark(_CMTEB_2025_NAME).tasks, *also]
    try:
        return list(mteb.get_benchmark(name).tasks)
    except KeyError as error:
        raise UserError(
            f"--benchmark={name}: mteb {mteb.__version__} has no such benchmark"
            f"{_meant(error)}; e.g. {_CMTEB_2025_NAME!r} or {CMTEB_2024_NAME}"
        ) from None


def _task(name: str) -> Any:
    match = _WITH_SUBSET.fullmatch(name)
    task, subsets = (match["name"], [match["subset"]]) if match else (name, None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return mteb.get_task(task, hf_subsets=subsets)
    except KeyError as error:
        raise UserError(
            f"--tasks={name}: mteb {mteb.__version__} has no such task{_meant(error)}"
        ) from None
    except ValueError:
        has = ", ".join(mteb.get_task(task).metadata.hf_subsets)
        raise UserError(f"--tasks={name}: {task} has no such subset, only {has}") from None


def _meant(error: KeyError) -> str:
    """What mteb suggests."""
    meant = re.search(r"Did you mean: '?(.+?)'?\?", str(error.args[0]))
    return f" (did you mean {meant[1]}?)" if meant else ""


def _near(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
