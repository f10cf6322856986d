"""A run's folder, read back wherever it has moved to, without the model that it started from."""

import argparse
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from piccolo_jax import averaging, build, sharding
from piccolo_jax.checkpoint import Best, Checkpoints
from piccolo_jax.config import Config, MeshConfig
from piccolo_jax.errors import UserError
from piccolo_jax.types import Params

TOKENIZER = "tokenizer"


class Run(NamedTuple):
    """What a run has trained."""

    step: int
    config: Config
    parts: build.Parts
    params: Params


def keep_tokenizer(workdir: Path, parts: build.Parts) -> None:
    """Puts the tokenizer into the run's folder, in place of one that is there."""
    partial = workdir / f"{TOKENIZER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    parts.tokenizer.hf.save_pretrained(partial)
    shutil.rmtree(workdir / TOKENIZER, ignore_errors=True)
    os.replace(partial, workdir / TOKENIZER)


def read(
    workdir: Path, checkpoint: str = "latest", weights: str | None = None, mesh: Mesh | None = None
) -> Run:
    """A run's "latest" or "best" checkpoint, on `mesh` (default: this process's first device).

    `weights`: "average", "last", or None: the average if the run keeps one. Raises UserError if the
    average is asked for and there is none, and if the folder lacks a checkpoint or the tokenizer.
    """
    checkpoints = Best(workdir) if checkpoint == "best" else Checkpoints(workdir)
    about = checkpoints.about()
    if not (workdir / TOKENIZER).is_dir():
        raise UserError(
            f"{workdir / TOKENIZER}: no such folder; copy the whole workdir, or start `train` again"
            " with the command of this run, which writes it"
        )
    try:
        parts = build.rebuild(about.config, about.model, workdir / TOKENIZER)
    except KeyError as error:
        raise UserError(
            f"{checkpoints.directory / str(checkpoints.latest)}: doesn't say {error} of its model;"
            " read it with the version of piccolo_jax that trained it"
        ) from None
    if mesh is None:
        mesh = sharding.make_mesh(MeshConfig(), jax.local_devices()[:1])
    shardings = build.param_shardings(parts.model, mesh)
    abstract = build.abstract_params(parts.model, shardings)
    params = checkpoints.restore_weights(about.config, abstract, weights)
    return Run(checkpoints.latest or 0, about.config, parts, params)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say which weights of a run are meant: the arguments of read()."""
    parser.add_argument(
        "--checkpoint",
        choices=("latest", "best"),
        default="latest",
        help="of WORKDIR; best: by config.checkpoint.best_metric",
    )
    parser.add_argument(
        "--weights",
        choices=(averaging.AVERAGE, averaging.LAST),
        help="of WORKDIR: the average over the steps, or the last; default: average, if kept",
    )
