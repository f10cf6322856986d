"""Checkpoints: the state of a run, its config and data. The only file that knows orbax."""

import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import absl.logging
import numpy as np
import orbax.checkpoint as ocp

from piccolo_jax import averaging, distributed
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError
from piccolo_jax.types import Params, TrainState

DIRECTORY, BEST = "checkpoints", "best"


class Checkpoints:
    """The checkpoints of a workdir. A checkpoint at t means: batch t is not yet used.

    To be read only, unless `keep` says how many to keep. Leaving it as a context waits until
    everything is on disk.
    """

    _remedy = "If it is damaged, delete it: the run then goes on from the one before"

    def __init__(self, workdir: Path, keep: int | None = None):
        self._open(workdir.absolute() / DIRECTORY, keep)

    def _open(self, directory: Path, keep: int | None, **options: Any) -> None:
        absl.logging.set_verbosity(absl.logging.FATAL)  # of orbax, which raises what it logs too
        self.directory = directory
        if keep is not None:
            self.directory.mkdir(parents=True, exist_ok=True)
        options |= {"max_to_keep": keep, "create": False}
        self._manager = ocp.CheckpointManager(
            self.directory, options=ocp.CheckpointManagerOptions(**options)
        )

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint: the one that is read."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: TrainState,
        config: Config,
        data: list[str],
        negatives: dict[str, Any] | None = None,
    ) -> None:
        """Saves in the background; `data` are names and fingerprints of the datasets.

        `negatives`: numpy arrays by dataset and name, where they change while training.
        """
        items = _items(_without_average(state), state.average, config, data)
        if negatives:
            items["negatives"] = ocp.args.StandardSave(negatives)
        self._save(step, items)

    def _save(self, step: int, items: dict[str, Any], **options: Any) -> None:
        arguments = ocp.args.Composite(**items)
        with self._readable_errors("written", "Make room there; the ones before it are kept"):
            self._manager.save(step, args=arguments, **options)

    def wait(self) -> None:
        """Returns when everything is on disk."""
        with self._readable_errors("written", "Make room there; the ones before it are kept"):
            self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def check(self, config: Config, data: list[str]) -> None:
        """Raises UserError if the latest checkpoint is of a run that learns something else."""
        saved, saved_data = self.about()
        changes = config_lib.diff(saved, config)
        if not changes:
            pairs = itertools.zip_longest(saved_data, data)
            changes = [f"content of dataset: {old} -> {new}" for old, new in pairs if old != new]
        if changes:
            raise UserError(config_lib.refusal(self.directory, changes))
        if self.latest and self.latest > config.total_steps:
            raise UserError(
                f"config.total_steps = {config.total_steps}: {self.directory} has gone on to step"
                f" {self.latest} already; give that many or more, or another --workdir"
            )

    def about(self) -> tuple[Config, list[str]]:
        """Config and data fingerprints of the latest checkpoint."""
        about = self._restore(about=ocp.args.JsonRestore())["about"]
        source = str(self.directory / str(self.latest) / "about")
        return config_lib.from_json(json.dumps(about["config"]), source), about["data"]

    def restore(self, abstract_state: TrainState) -> TrainState:
        """The latest state, in the shardings of `abstract_state`."""
        items = {"state": ocp.args.StandardRestore(_without_average(abstract_state))}
        if abstract_state.average is not None:
            items["average"] = ocp.args.StandardRestore(abstract_state.average)
        restored = self._restore(**items)
        return TrainState(**restored["state"], average=restored.get("average"))

    def restore_negatives(self) -> dict[str, Any]:
        """The latest negatives, as saved."""
        return self._restore(negatives=ocp.args.StandardRestore())["negatives"]

    def restore_params(self, abstract_params: Params) -> Params:
        """The latest parameters alone."""
        args = ocp.args.PyTreeRestore(
            {"params": abstract_params},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract_params}),
            partial_restore=True,
        )
        return self._restore(state=args)["state"]["params"]

    def restore_average(self, abstract_average: Params) -> Params:
        """The latest average of the weights alone."""
        return self._restore(average=ocp.args.StandardRestore(abstract_average))["average"]

    def restore_weights(
        self, config: Config, abstract_params: Params, weights: str | None = None
    ) -> Params:
        """The latest weights: "last", "average", or None: the average if the run keeps one.

        Raises UserError if the average is asked for and there is none.
        """
        params = self.restore_params(abstract_params)
        average = averaging.averaged(config, abstract_params)
        if weights == averaging.AVERAGE and average is None:
            raise UserError(
                f"--weights=average: the run in {self.directory.parent} keeps no average of its"
                " weights (config.optim.ema_decay = 0); --weights=last takes the last ones"
            )
        if weights != averaging.LAST and average is not None:
            params = averaging.weights_of(self.restore_average(average), params)
        return params

    def _restore(self, **args: Any) -> Any:
        step = self.latest
        if step is None:
            raise UserError(
                f"{self.directory}: holds no complete checkpoint; give the --workdir of a run that"
                " has saved one"
            )
        with self._readable_errors("read", self._remedy, step):
            return self._manager.restore(step, args=ocp.args.Composite(**args))

    @contextlib.contextmanager
    def _readable_errors(self, done: str, remedy: str, step: int | None = None) -> Iterator[None]:
        """What orbax and tensorstore raise for broken files and full disks, in one line."""
        # What they still do after one part has failed would end with tracebacks of its own.
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            reason = re.split(r" \[tensorstore_spec|\. See full TensorStore", reason)[0]
            if len(reason) > 300:
                reason = f"{reason[:120]} ... {reason[-160:]}"
            place = self.directory / str(step) if step is not None else self.directory
            raise UserError(
                f"{place}: this checkpoint can't be {done} ({reason}). {remedy}"
            ) from error
        sys.unraisablehook = hook


class Best(Checkpoints):
    """The weights of a run that are the best by a metric so far, in WORKDIR/best/STEP.

    To be read only, unless `metric` names one. The larger, the better.
    """

    _remedy = "If it is damaged, delete it: a checkpoint of the run can be taken instead"

    def __init__(self, workdir: Path, metric: str = ""):
        self.metric = metric

        def score(metrics: dict[str, float]) -> float:
            return metrics.get(metric, -math.inf) if metric else max(metrics.values())

        self._open(
            workdir.absolute() / BEST, 1 if metric else None, best_fn=score, best_mode="max",
            keep_checkpoints_without_metrics=False,
        )  # fmt: skip
        metrics = None if self.latest is None else self._manager.metrics(self.latest)
        self.score = score(metrics) if metrics else -math.inf

    @property
    def latest(self) -> int | None:
        """Step of the best weights."""
        return self._manager.best_step()

    def offer(
        self, step: int, score: float, state: TrainState, config: Config, data: list[str]
    ) -> bool:
        """Keeps the weights in place of the best so far if their score is larger; says whether.

        All processes call it alike; process 0 decides. Saves in the background.
        """
        new = score > self.score and step != self.latest
        better = distributed.of_first(np.asarray([new], bool))
        if not better[0]:
            return False
        kept = {"step": state.step, "params": state.params}
        # Also if it is of an earlier step: a run may have gone back to an earlier checkpoint.
        self._save(
            step,
            _items(kept, state.average, config, data),
            metrics={self.metric: score},
            force=True,
        )
        self.score = score
        return True


def _items(
    state: dict[str, Any], average: Params, config: Config, data: list[str]
) -> dict[str, Any]:
    about = {"config": json.loads(config_lib.to_json(config)), "data": data}
    items: dict[str, Any] = {
        "state": ocp.args.StandardSave(state),
        "about": ocp.args.JsonSave(about),
    }
    if average is not None:
        items["average"] = ocp.args.StandardSave(average)
    return items


def _without_average(state: TrainState) -> dict[str, Any]:
    """The part of the state that every run has; the average is an item of its own."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
