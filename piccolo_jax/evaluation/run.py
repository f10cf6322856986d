"""Evaluates a model on mteb's tasks at several dimensions, through mteb's cache of results.

    OUTPUT/results/ORG__NAME/REVISION/TASK.json                            as mteb writes them
    OUTPUT/results/ORG__NAME/REVISION/experiments/embed_dim_256/TASK.json  at a prefix
    OUTPUT/examples/...                                                    scores of single examples

Importing this imports mteb, which takes seconds: only `evaluate` does.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import mteb
import numpy as np
import tqdm
from mteb.cache import ResultCache
from mteb.models import ModelMeta
from mteb.results import TaskResult

from piccolo_jax.errors import UserError
from piccolo_jax.evaluation import capture, mteb_encoder
from piccolo_jax.evaluation.models import Model
from piccolo_jax.evaluation.vectors import Vectors

_DATALOADER_ROWS = 1024  # passed to the encoder at once, which makes its own batches
_KEPT_SCORES = ("max_accuracy", "cosine_ap")  # of pairs, for the two conventions


@dataclasses.dataclass(frozen=True)
class Settings:
    """How tasks are evaluated. normalize: after cutting; None: as sentence-transformers does."""

    dims: tuple[int, ...]
    prompts: Mapping[str, str] | None = None  # None: the model's own
    normalize: bool | None = None
    limit: int = 0
    overwrite: bool = False

    def experiment(self, model: Model) -> dict[str, Any]:
        """What differs from the model's plain results, for mteb's cache to keep apart."""
        differs: dict[str, Any] = {}
        if self.limit:
            differs["limit"] = self.limit
        if self.normalize or (self.normalize is False and model.normalize):
            differs["normalize"] = self.normalize
        if self.prompts is not None and self.prompts != model.prompts:
            content = json.dumps(dict(self.prompts), sort_keys=True).encode()
            differs["prompts"] = hashlib.sha256(content).hexdigest()[:8]
        return differs


def evaluate(
    model: Model, vectors: Vectors, tasks: Sequence[Any], settings: Settings, output: Path
) -> dict[str, Any]:
    """The model's entry of a report: what it is, and its tasks with scores by dimension.

    Only what is missing in OUTPUT is evaluated. Raises UserError for data that can't be had.
    """
    cache = ResultCache(output)
    experiment = settings.experiment(model)
    normalize = model.normalize if settings.normalize is None else settings.normalize
    prompts = model.prompts if settings.prompts is None else settings.prompts
    results: dict[str, dict[str, Any]] = {}
    with _quiet(), tqdm.tqdm(total=len(tasks) * len(settings.dims), unit=" scores") as bar:
        for task in tasks:
            name = task.metadata.name
            of_dim: dict[int, TaskResult] = {}
            for dim in settings.dims:
                bar.set_description(f"{name} at {dim}")
                made = mteb_encoder.MtebEncoder(
                    model, vectors, dim, prompts, settings.normalize, experiment
                )
                of_dim[dim] = _one(task, made, cache, output, settings.overwrite)
                bar.update()
            if task.data_loaded:
                task.unload_data()
            results[name] = _summary(task, of_dim)
    metas = {dim: mteb_encoder.meta(model, dim, experiment) for dim in settings.dims}
    results_of = {dim: cache.get_task_result_path("task", meta) for dim, meta in metas.items()}
    return {
        "model": model.name,
        "revision": model.revision,
        "experiment": experiment,
        "width": model.width,
        "max_length": model.max_length,
        "prompts": dict(prompts),
        "normalize": normalize,
        "mteb": mteb.__version__,
        "dims": list(settings.dims),
        # Of each dimension, below `results` and below `examples`.
        "folders": {
            str(dim): str(path.parent.relative_to(output / "results"))
            for dim, path in results_of.items()
        },
        "tasks": results,
    }


def _one(
    task: Any,
    encoder: Any,
    cache: ResultCache,
    output: Path,
    overwrite: bool,
) -> TaskResult:
    """A task's result at one dimension: the stored one if it is whole and of these data."""
    meta = encoder.mteb_model_meta
    stored = None if overwrite else _stored(cache, task, meta)
    if stored and not stored.get_missing_evaluations(task):
        return stored
    if not task.data_loaded:
        _load(task)
    path = cache.get_task_result_path(task.metadata.name, meta)
    examples = output / "examples" / path.parent.relative_to(output / "results")
    with capture.captured(task, examples):
        found = mteb.evaluate(
            encoder,
            task,
            co2_tracker=False,
            cache=cache,
            overwrite_strategy="only-missing" if stored else "always",
            encode_kwargs={"batch_size": _DATALOADER_ROWS, "show_progress_bar": False},
            prediction_folder=examples,
            show_progress_bar=False,
        )
    return found.task_results[0]


def _stored(cache: ResultCache, task: Any, meta: ModelMeta) -> TaskResult | None:
    """What an earlier run left, unless it is of other data or was being written when it ended."""
    path = cache.get_task_result_path(task.metadata.name, meta)
    if not path.exists():
        return None
    try:
        stored = TaskResult.from_disk(path)
    except (ValueError, KeyError, TypeError):
        path.unlink()
        return None
    return stored if stored.dataset_revision == task.metadata.revision else None


def _load(task: Any) -> None:
    try:
        task.load_data()
    except UserError:
        raise
    except Exception as error:  # of as many kinds as hubs, networks and caches can fail
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        about = task.metadata.dataset
        raise UserError(
            f"{task.metadata.name}: its dataset {about['path']} (revision {about['revision'][:12]})"
            f" could not be had: {type(error).__name__}: {reason}\nIt comes from the Hugging Face"
            " hub: give this machine a network, or copy the cache (HF_HOME, by default"
            ' ~/.cache/huggingface) of one where `python -c "import mteb;'
            f" mteb.get_task('{task.metadata.name}').load_data()\"` has run, with the same version"
            " of `datasets`. --tasks chooses others, --data evaluates on local files; what is"
            " finished is kept"
        ) from error


def _summary(task: Any, results: Mapping[int, TaskResult]) -> dict[str, Any]:
    scores: dict[int, dict[str, float]] = {}
    for dim, result in results.items():
        # A stored result may hold other splits and subsets of the task too.
        found = [
            subset
            for split in task.eval_splits
            for subset in result.scores[split]
            if subset["hf_subset"] in task.hf_subsets
        ]
        names = ["main_score", *(name for name in _KEPT_SCORES if name in found[0])]
        scores[dim] = {name: float(np.mean([subset[name] for subset in found])) for name in names}
    return {
        "type": task.metadata.type,
        "metric": task.metadata.main_score,
        "revision": task.metadata.revision,
        "splits": list(task.eval_splits),
        "subsets": list(task.hf_subsets),
        "scores": scores,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the words of mteb and datasets on what they do, among them that a task has a v2."""
    logger, level = logging.getLogger("mteb"), logging.getLogger("mteb").level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        datasets.enable_progress_bars()
