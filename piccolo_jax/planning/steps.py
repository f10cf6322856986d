"""Steps compiled for TPU chips that aren't there, and what they need and cost."""

import contextlib
import copy
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import averaging, build, metrics, optim, sharding
from piccolo_jax.config import Config
from piccolo_jax.data.loader import Batches, HostBatch
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.planning import hlo_cost
from piccolo_jax.planning.topology import Chip
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps
from piccolo_jax.types import Batch, TrainState

REMATERIALIZATION = "Involuntary full rematerialization"  # of XLA's partitioner, on stderr
_OUT_OF_MEMORY = (
    r"Used (?P<used>[\d.]+[KMG]) of [\d.]+[KMG] hbm",
    r"required for HLO temporaries \((?P<temporary>[\d.]+[KMG])\) exceeds available HBM",
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30}


@dataclasses.dataclass
class StepPlan:
    """What a step on a dataset costs, per chip; where it says so, on the whole slice."""

    dataset: str
    task: str
    steps: int = 0  # of the run
    batch_size: int = 0  # rows of the dataset
    rows: int = 0  # packed, of the slice, as texts and tokens
    length: int = 0
    texts: int = 0  # that are encoded
    tokens: int = 0  # without padding
    fill: float = 0  # share of the token slots that hold a token
    fits: bool = False
    hbm_used: int = 0  # bytes: all of the below, and the program
    hbm_arguments: int = 0
    hbm_temporary: int = 0
    hbm_output: int = 0  # that doesn't take the place of an argument
    model_operations: float = 0  # of the slice, on real tokens, nothing recomputed
    cycles: float = 0
    seconds: float = 0
    utilisation: float = 0  # model operations a second, of the slice's peak
    prefetch_seconds: float = 0  # of copies beside other work, at the whole memory bandwidth
    unknown_loops: int = 0  # counted as one trip
    compile_warnings: int = 0  # activations moved between chips whole
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unestimated: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def plan_steps(
    config: Config,
    model: Embedder,
    chip: Chip,
    devices: Sequence[jax.Device],
    datasets: Sequence[Dataset],
    doubtful: int | None = None,
) -> list[StepPlan]:
    """A plan for each dataset; datasets of one task and shape share their program.

    With a `doubtful` one, its number among those that are used, its plan comes first, and none
    after one that doesn't fit.

    Raises UserError if the config's mesh, batch or chunks don't fit the devices or the data.
    """
    mesh = sharding.make_mesh(config.mesh, devices)
    shards = sharding.batch_shards_of(mesh)
    hidden = model.backbone.hidden_size
    batches = Batches(config, datasets, TASKS, hidden, shards, tuple(range(shards)))
    params = build.abstract_params(model, build.param_shardings(model, mesh))
    optimizer = optim.make_optimizer(config, params)
    average = averaging.averaged(config, params)
    state = build.abstract_state(params, optimizer, mesh, average)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = CompiledSteps(model, TASKS, config, optimizer, mesh, places)
    uses = batches.schedule.uses(config.total_steps)
    compiled: dict[Any, StepPlan] = {}
    firsts = _first_uses(batches)
    plans: list[StepPlan] = []
    for dataset in sorted(range(len(firsts)), key=lambda dataset: dataset != doubtful):
        batch = batches.at(firsts[dataset])
        key = (batch.task, batch.shape, batch.rows)
        if key not in compiled:
            rows, length = batch.sharded["tokens"].shape
            metrics.say(f"compiling {batch.task}: {rows} rows of {length} tokens")
            compiled[key] = _compile(batch, programs, state, mesh, chip)
        plan = copy.copy(compiled[key])
        plan.dataset, plan.steps = batches.stores[dataset].name, uses[dataset]
        _measure(plan, batch, model, config.loss.dims[-1])
        if plan.seconds:
            rate = plan.model_operations / plan.seconds
            plan.utilisation = rate / (chip.peak * mesh.devices.size)
        plans.append(plan)
        if doubtful is not None and not plan.fits:
            break
    return plans


def _first_uses(batches: Batches) -> list[int]:
    firsts: dict[int, int] = {}
    step = 0
    while len(firsts) < len(batches.stores):
        firsts.setdefault(batches.schedule.at(step)[0], step)
        step += 1
    return [firsts[dataset] for dataset in range(len(batches.stores))]


def _measure(plan: StepPlan, batch: HostBatch, model: Embedder, width: int) -> None:
    """Puts in the plan the batch in numbers, and the operations that a step on it needs.

    `width`: of the vectors that the loss compares, its longest prefix.
    """
    segments = batch.sharded["segments"]
    row, _ = np.nonzero(segments)
    text_of_token = segments[segments > 0] + row * (segments.max(initial=0) + 1)
    lengths = np.unique(text_of_token, return_counts=True)[1].astype(np.float64)
    plan.batch_size = batch.rows
    plan.rows, plan.length = segments.shape
    plan.texts, plan.tokens = len(lengths), int(lengths.sum())
    plan.fill = float(lengths.sum() / segments.size)
    config = model.backbone
    hidden, layers = config.hidden_size, config.num_layers
    matrices = layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)
    # 2 operations per parameter and token forwards and 4 backwards; attention within a text: two
    # products of 2 hidden_size operations per pair of tokens, thrice.
    operations = 6 * matrices * lengths.sum() + 12 * layers * hidden * (lengths**2).sum()
    operations += 6 * hidden * model.embed_dim * len(lengths)
    if batch.task == "retrieval":  # the other losses compare few texts with each
        arrays = batch.replicated
        documents = arrays["positive_keep"].sum() + arrays["negative_keep"].sum()
        operations += 6 * arrays["query"].size * documents * width
    plan.model_operations = float(operations)


def _compile(
    batch: HostBatch, programs: CompiledSteps, state: TrainState, mesh: Mesh, chip: Chip
) -> StepPlan:
    arrays = abstract_batch(batch, mesh)
    plan = StepPlan(batch.dataset, batch.task)
    plan.hbm_arguments = sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves((state, arrays))
    )
    try:
        with stderr_of_compiler() as said:
            program, _ = programs.get(batch.task, batch.shape, state, arrays)
    except jax.errors.JaxRuntimeError as error:
        wanted = _memory_wanted(str(error))
        if wanted is None:
            raise
        plan.hbm_used = wanted.get("used") or plan.hbm_arguments + wanted["temporary"]
        plan.hbm_temporary = plan.hbm_used - plan.hbm_arguments
        return plan
    plan.compile_warnings = said().count(REMATERIALIZATION)
    memory, text = program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    plan.hbm_arguments = memory.argument_size_in_bytes
    plan.hbm_temporary = memory.temp_size_in_bytes
    plan.hbm_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    plan.hbm_used = (
        plan.hbm_arguments + plan.hbm_temporary + plan.hbm_output
        + memory.generated_code_size_in_bytes
    )  # fmt: skip
    # The compiler lets some programs pass whose parts are larger than the chip.
    plan.fits = plan.hbm_used <= chip.hbm
    cost = hlo_cost.read(text, chip)
    plan.cycles, plan.seconds = cost.cycles, cost.seconds(chip)
    plan.prefetch_seconds = cost.prefetch_bytes / chip.hbm_bandwidth
    plan.unknown_loops = cost.unknown_loops
    plan.collectives = [dataclasses.asdict(c) for c in cost.collectives.values()]
    plan.unestimated = [dataclasses.asdict(c) for c in cost.unestimated.values()]
    return plan


def _memory_wanted(message: str) -> dict[str, int] | None:
    """Bytes per chip that a program which doesn't fit wants: all ("used") or "temporary" ones."""
    for pattern in _OUT_OF_MEMORY:
        if found := re.search(pattern, message):
            return {
                name: int(float(size[:-1]) * _UNITS[size[-1]])
                for name, size in found.groupdict().items()
            }
    return None


def abstract_batch(batch: HostBatch, mesh: Mesh) -> Batch:
    """Shapes, types and shardings of a batch that holds every shard."""

    def abstract(value: np.ndarray, spec: PartitionSpec) -> Any:
        dtype = jax.dtypes.canonicalize_dtype(value.dtype)
        return jax.ShapeDtypeStruct(value.shape, dtype, sharding=NamedSharding(mesh, spec))

    split, whole = PartitionSpec(sharding.BATCH_AXES), PartitionSpec()
    return {k: abstract(v, split) for k, v in batch.sharded.items()} | {
        k: abstract(v, whole) for k, v in batch.replicated.items()
    }


@contextlib.contextmanager
def stderr_of_compiler() -> Iterator[Any]:
    """Keeps what native code writes to standard error; yields a function that returns it."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        text = ""

        def said() -> str:
            if file.closed:
                return text
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            text = said()
