"""Evaluation between the steps of a run, of the last weights and of their average."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from piccolo_jax import averaging, distributed, metrics
from piccolo_jax.averaging import AVERAGE, LAST
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError
from piccolo_jax.evaluation.encoder import Encoder
from piccolo_jax.evaluation.local import METRICS, EvalDataset
from piccolo_jax.metrics import say
from piccolo_jax.types import Params, TrainState


class Evaluations:
    """The evaluation sets of a run: what is due, and what they say.

    Every process encodes its share of the texts on the run's mesh, gets all embeddings and computes
    all scores, so that none waits while another scores. Process 0 writes the log.
    """

    def __init__(
        self, config: Config, datasets: Sequence[EvalDataset], encoder: Encoder, path: Path, at: int
    ):
        """`path`: the log, whose lines of steps after `at` are dropped, see metrics.JsonLines."""
        self._config, self._datasets, self._encoder = config.eval, datasets, encoder
        self._total_steps = config.total_steps
        self._weights = (LAST, AVERAGE) if config.optim.ema_decay else (LAST,)
        self._dims = dims_of(config)
        self._log = metrics.JsonLines(path, at)

    def due(self, step: int) -> bool:
        """Whether the weights after `step` steps are to be evaluated."""
        every = self._config.every
        return step in (0, self._total_steps) or (every > 0 and step % every == 0)

    def run(self, step: int, state: TrainState) -> dict[str, float]:
        """Evaluates the weights after `step` steps; what the log has of them is not done again.

        Returns the scores by the names that config.checkpoint.best_metric has for them.
        """
        rows = self._logged(step)
        for dataset in self._datasets:
            for weights in self._weights:
                if (dataset.name, weights) in rows:
                    continue
                if weights == AVERAGE and step == 0:  # the initial weights, as the last are
                    row = rows[dataset.name, LAST] | {"weights": AVERAGE}
                else:
                    params = state.params
                    if weights == AVERAGE:
                        params = averaging.weights_of(state.average, params)
                    row = self._evaluate(dataset, params, {"step": step, "weights": weights})
                rows[dataset.name, weights] = row
                self._log.write(row)
        return _by_name(rows, self._dims)

    def _logged(self, step: int) -> dict[tuple[str, str], dict[str, Any]]:
        """What was written before this run was resumed, by dataset and weights."""
        needed = {str(dim) for dim in self._dims}
        rows = {
            (row["dataset"], row.get("weights", LAST)): row
            for row in self._log.kept
            if row["step"] == step and needed <= row.keys()
        }
        keys = [(dataset.name, w) for dataset in self._datasets for w in self._weights]
        known = distributed.of_first(np.asarray([key in rows for key in keys], bool))
        return {key: rows[key] for key, is_known in zip(keys, known, strict=True) if is_known}

    def _evaluate(
        self, dataset: EvalDataset, params: Params, about: dict[str, Any]
    ) -> dict[str, Any]:
        progress = f"evaluating {dataset.name}" if jax.process_index() == 0 else ""
        encode = functools.partial(self._encoder.encode, params, progress=progress)
        scores = dataset.evaluate(encode, self._dims)
        metric = METRICS[dataset.task]
        of_average = ", average of the weights" if about["weights"] == AVERAGE else ""
        say(
            f"step {about['step']}: {dataset.name} {metric}{of_average} "
            + ", ".join(f"{score:.4f} at {dim}" for dim, score in scores.items())
        )
        values = {str(dim): round(score, 5) for dim, score in scores.items()}
        return {**about, "dataset": dataset.name, "metric": metric, **values}


def dims_of(config: Config) -> tuple[int, ...]:
    """The prefixes that are evaluated."""
    return config.eval.dims or config.loss.dims


def check_best_metric(config: Config, datasets: Sequence[EvalDataset]) -> None:
    """Raises UserError if config.checkpoint.best_metric names nothing that is evaluated."""
    metric = config.checkpoint.best_metric
    every = (LAST, AVERAGE) if config.optim.ema_decay else (LAST,)
    rows = {
        (d.name, w): {"metric": METRICS[d.task], **{str(dim): 0.0 for dim in dims_of(config)}}
        for d in datasets
        for w in every
    }
    names = _by_name(rows, dims_of(config))
    if metric and metric not in names:
        known = f"one of {', '.join(names)}" if names else "empty where eval.datasets is"
        raise UserError(f"config.checkpoint.best_metric = {metric!r}: must be {known}")


def _by_name(rows: dict[tuple[str, str], dict[str, Any]], dims: Sequence[int]) -> dict[str, float]:
    """The scores in the log's rows, and their means over the datasets."""
    scores: dict[str, list[float]] = {}
    for (dataset, weights), row in rows.items():
        prefix = f"{AVERAGE}/" if weights == AVERAGE else ""
        for dim in dims:
            for name in (f"{dataset}/{row['metric']}", "mean"):
                scores.setdefault(f"{prefix}{name}@{dim}", []).append(row[str(dim)])
    return {name: sum(values) / len(values) for name, values in scores.items()}


def before_and_after(path: Path, config: Config) -> str:
    """A table of the scores before and after training, from the log; empty if it has none."""
    by_step: dict[int, dict[tuple[str, str], dict[str, Any]]] = {}
    for row in metrics.read(path):
        key = (row["dataset"], row.get("weights", LAST))
        by_step.setdefault(row["step"], {})[key] = row
    before, after = by_step.get(0, {}), by_step.get(config.total_steps, {})
    dims = [str(dim) for dim in dims_of(config)]
    rows = [
        [f"{name} {after[name, weights]['metric']}" + (", average" if weights == AVERAGE else "")]
        + [f"{before[name, weights][d]:.3f} -> {after[name, weights][d]:.3f}" for d in dims]
        for name, weights in after
        if (name, weights) in before
        and set(dims) <= before[name, weights].keys() & after[name, weights].keys()
    ]
    return metrics.table(["before -> after, by prefix", *dims], rows) if rows else ""
