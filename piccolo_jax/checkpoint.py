"""Checkpoints: the state of a run, its config and data. The only file that knows orbax."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from piccolo_jax import averaging, distributed
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError
from piccolo_jax.types import Params, TrainState

DIRECTORY, BEST = "checkpoints", "best"


@dataclasses.dataclass(frozen=True)
class About:
    """What a run is, kept with its states.

    data: names and fingerprints of its datasets; model: what build.describe() says.
    """

    config: Config
    data: list[str]
    model: dict[str, Any]

    def check_model(self, place: Path, now: dict[str, Any]) -> None:
        """Raises UserError if `now`, what build.describe() says today, is another model."""
        changes = [
            f"{name}: {self.model.get(name)!r} -> {now.get(name)!r}"
            for name in sorted(self.model.keys() | now.keys())
            if self.model.get(name) != now.get(name)
        ]
        if changes:
            what = "model in config.model.init or config.model.tokenizer"
            raise UserError(config_lib.refusal(place, changes, what))


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
        self, step: int, state: TrainState, about: About, negatives: dict[str, Any] | None = None
    ) -> None:
        """Saves in the background.

        `negatives`: numpy arrays by dataset and name, where they change while training.
        """
        items = _items(_without_average(state), state.average, about)
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

    def check(self, about: About) -> None:
        """Raises UserError if the latest checkpoint is of a run that learns something else."""
        saved = self.about()
        if changes := config_lib.diff(saved.config, about.config):
            raise UserError(config_lib.refusal(self.directory, changes))
        saved.check_model(self.directory, about.model)
        pairs = itertools.zip_longest(saved.data, about.data)
        if changes := [f"content of dataset: {old} -> {new}" for old, new in pairs if old != new]:
            raise UserError(config_lib.refusal(self.directory, changes, "data"))
        steps = about.config.total_steps
        if self.latest and self.latest > steps:
            raise UserError(
                f"config.total_steps = {steps}: {self.directory} has gone on to step"
                f" {self.latest} already; give that many or more, or another --workdir"
            )

    def about(self) -> About:
        """What run the latest checkpoint is of."""
        about = self._about()
        source = str(self.directory / str(self.latest) / "about")
        config = config_lib.from_json(json.dumps(about["config"]), source)
        return About(config, about["data"], about["model"])

    def _about(self) -> dict[str, Any]:
        about = self._restore(about=ocp.args.JsonRestore())["about"]
        with self._readable_errors("read", self._remedy, self.latest):
            if not isinstance(about, dict) or not {"config", "data", "model"} <= about.keys():
                raise ValueError("about/metadata lacks config, data or model")
        return about

    def restore(self, abstract_state: TrainState) -> TrainState:
        """The latest state, in the shardings of `abstract_state`."""
        items = {"state": ocp.args.StandardRestore(_without_average(abstract_state))}
        if abstract_state.average is not None:
            items["average"] = ocp.args.StandardRestore(abstract_state.average)
        restored = self._restore(**items)
        self._check_sums(**restored)
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
        restored = self._restore(state=args)
        self._check_sums(**restored)
        return restored["state"]["params"]

    def restore_average(self, abstract_average: Params) -> Params:
        """The latest average of the weights alone."""
        restored = self._restore(average=ocp.args.StandardRestore(abstract_average))
        self._check_sums(**restored)
        return restored["average"]

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

    def _check_sums(self, **items: Any) -> None:
        """Raises UserError if arrays aren't those that were saved."""
        saved = self._about().get("sums", {})
        found = _sums(items)
        with self._readable_errors("read", self._remedy, self.latest):
            for name in saved.keys() & found.keys():
                if saved[name] != found[name]:
                    raise ValueError(f"{name} is not what was saved")

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

    def offer(self, step: int, score: float, state: TrainState, about: About) -> bool:
        """Keeps the weights in place of the best so far if their score is larger; says whether.

        All processes call it alike; process 0 decides. Saves in the background.
        """
        new = score > self.score and step != self.latest
        better = distributed.of_first(np.asarray([new], bool))
        if not better[0]:
            return False
        kept = {"step": state.step, "params": state.params}
        # Also if it is of an earlier step: a run may have gone back to an earlier checkpoint.
        items = _items(kept, state.average, about)
        self._save(step, items, metrics={self.metric: score}, force=True)
        self.score = score
        return True


def _items(state: dict[str, Any], average: Params, about: About) -> dict[str, Any]:
    arrays = {"state": state} if average is None else {"state": state, "average": average}
    values = {
        "config": json.loads(config_lib.to_json(about.config)),
        "data": about.data,
        "model": about.model,
        "sums": _sums(arrays),
    }
    items = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items()}
    return items | {"about": ocp.args.JsonSave(values)}


def _sums(tree: Any) -> dict[str, int]:
    """The sum of each array's bits, as whole numbers modulo 2**32, by its path.

    A bit that flips on a disk would become a weight: restoring notices none by itself.
    """
    named = jax.tree_util.tree_leaves_with_path(tree)
    sums = jax.device_get(_sum_bits([leaf for _, leaf in named]))
    paths = (jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in named)
    return {path: int(value) for path, value in zip(paths, sums, strict=True)}


@jax.jit
def _sum_bits(leaves: list[jax.Array]) -> list[jax.Array]:
    kinds = (jnp.dtype(f"uint{8 * leaf.dtype.itemsize}") for leaf in leaves)
    bits = (
        jax.lax.bitcast_convert_type(leaf, kind) for leaf, kind in zip(leaves, kinds, strict=True)
    )
    return [jnp.sum(leaf, dtype=jnp.uint32) for leaf in bits]


def _without_average(state: TrainState) -> dict[str, Any]:
    """The part of the state that every run has; the average is an item of its own."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}
