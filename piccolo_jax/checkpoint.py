"""Checkpoints: parameters, optimizer state, step and config. The only file that knows orbax."""

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.errors import UserError
from piccolo_jax.types import Params, TrainState

DIRECTORY = "checkpoints"


class Checkpoints:
    """The checkpoints of a workdir. A checkpoint at t means: batch t is not yet used."""

    def __init__(self, workdir: Path, keep: int | None = None):
        self.directory = workdir.absolute() / DIRECTORY
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False)
        if keep is not None and jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, config: Config, data: list[str]) -> None:
        """Saves in the background; `data` are fingerprints of the datasets. Once per step."""
        if step == self.latest:
            return
        about = {"config": json.loads(config_lib.to_json(config)), "data": data}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), about=ocp.args.JsonSave(about)
            ),
        )

    def wait(self) -> None:
        """Returns when everything is on disk."""
        self._manager.wait_until_finished()

    def check(self, config: Config, data: list[str] | None = None) -> None:
        """Raises UserError if the latest checkpoint is of a run that learns something else."""
        saved, saved_data = self.about()
        changes = config_lib.diff(saved, config)
        if not changes and data is not None and saved_data != data:
            changes = ["the content of the training data"]
        if changes:
            raise UserError(
                f"{self.directory} is from a run with another config:\n  "
                + "\n  ".join(changes)
                + "\nChange the config back to go on with that run, or give another --workdir"
            )

    def about(self) -> tuple[Config, list[str]]:
        """Config and data fingerprints of the latest checkpoint."""
        about = self._restore(about=ocp.args.JsonRestore())["about"]
        return config_lib.from_json(json.dumps(about["config"])), about["data"]

    def restore(self, abstract_state: TrainState) -> TrainState:
        """The latest state, in the shardings of `abstract_state`."""
        return self._restore(state=ocp.args.StandardRestore(abstract_state))["state"]

    def restore_params(self, abstract_params: Params) -> Params:
        """The latest parameters alone."""
        args = ocp.args.PyTreeRestore(
            {"params": abstract_params},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"params": abstract_params}),
            partial_restore=True,
        )
        return self._restore(state=args)["state"]["params"]

    def _restore(self, **args: Any) -> Any:
        step = self.latest
        if step is None:
            raise UserError(f"{self.directory}: holds no complete checkpoint")
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except UserError:
            raise
        except Exception as error:  # orbax and tensorstore raise many kinds for a broken file
            reason = str(error).strip().splitlines()[0][:300]
            raise UserError(
                f"{self.directory / str(step)}: this checkpoint can't be read ({reason}). If it is"
                " damaged, delete it: the run then goes on from the one before"
            ) from error
