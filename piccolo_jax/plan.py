"""Compiles every step of a config for a TPU slice, and says whether it fits and how fast it goes.

    python -m piccolo_jax.plan --config=configs/NAME.py --topology=v5e:8x8 [--json]
        [--workdir=DIR] [--query_tokens=N --text_tokens=N] [--config.FIELD=VALUE ...]

Needs no TPU and no weights, but libtpu: nothing is executed. Batches have the shapes of the
config's data, where it can be read (prepared in --workdir, config.data.prepared_dir or a temporary
folder). Otherwise lengths are assumed: of queries and other texts the longest that the config
allows, or --query_tokens and --text_tokens on average.
"""

import contextlib
import dataclasses
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a plan uses what is here

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from piccolo_jax import build, cli, hlo_cost, metrics, optim, sharding, topology
from piccolo_jax.config import Config
from piccolo_jax.data.loader import Batches, HostBatch
from piccolo_jax.data.prepare import Dataset, prepare_datasets
from piccolo_jax.errors import UserError
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.plan_data import assumed_datasets
from piccolo_jax.tasks import TASKS
from piccolo_jax.train_step import CompiledSteps
from piccolo_jax.types import Batch, TrainState

REMATERIALIZATION = "Involuntary full rematerialization"  # of XLA's partitioner, on stderr
_EXECUTED = "Nothing was executed: times are the compiler's estimates, not measurements."


@dataclasses.dataclass
class StepPlan:
    """What one compiled step costs; bytes, operations and seconds are per chip or as named."""

    dataset: str
    task: str
    rows: int  # of the whole slice
    length: int
    texts: int  # that are encoded
    tokens: int  # without padding
    fill: float  # share of the token slots that hold a token
    fits: bool
    hbm_used: int = (
        0  # arguments, temporaries and what of the output is not in the arguments' place
    )
    hbm_arguments: int = 0
    hbm_temporary: int = 0
    hbm_output: int = 0
    model_operations: float = 0  # of the slice
    cycles: float = 0
    seconds: float = 0
    utilisation: float = 0
    prefetch_seconds: float = 0
    compile_warnings: int = 0
    collectives: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unestimated: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    steps: int = 0  # of the run


def main(argv: list[str]) -> int:
    """The command; returns the exit code: 0 if all steps fit, 2 if one doesn't."""
    config, values = cli.parse(argv, __doc__ or "", ("config", "topology"), _define)
    jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, not used
    as_json = bool(values["json"].value)
    name = str(values["topology"].value)
    chip, devices = topology.devices(name)
    mesh = sharding.make_mesh(config.mesh, devices)
    notes: list[str] = []
    model, tokenizer = _model(config, notes)
    shards = sharding.batch_shards_of(mesh)
    with tempfile.TemporaryDirectory() as scratch:
        workdir = values["workdir"].value
        root = Path(
            config.data.prepared_dir or (Path(workdir) / "prepared" if workdir else scratch)
        )
        datasets = _datasets(config, tokenizer, root, values, notes)
        batches = Batches(
            config, datasets, TASKS, model.backbone.hidden_size, shards, tuple(range(shards))
        )
        plans = _plans(config, model, mesh, chip, batches)
    result = {
        "topology": name,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "hbm_per_chip": chip.hbm,
        "peak_per_chip": chip.peak,
        "steps": [dataclasses.asdict(plan) for plan in plans],
        "total_steps": config.total_steps,
        "hours": sum(plan.seconds * plan.steps for plan in plans) / 3600,
        "fits": all(plan.fits for plan in plans),
        "notes": [*notes, *_advice(plans, config, chip, mesh)],
        "executed": False,
    }
    print(json.dumps(result, indent=2) if as_json else _report(result, plans, chip))
    return 0 if result["fits"] else 2


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_string("topology", None, "Slice, e.g. v5e:8x8.", flag_values=values)
    flags.DEFINE_bool("json", False, "Print JSON.", flag_values=values)
    for name, texts in (("query_tokens", "queries"), ("text_tokens", "other texts")):
        flags.DEFINE_integer(
            name, 0, f"Assumed mean tokens of {texts}; 0: the longest.", flag_values=values,
            lower_bound=0,
        )  # fmt: skip


def _model(config: Config, notes: list[str]) -> tuple[Embedder, Any]:
    """The model as on a TPU, and its tokenizer if it is here."""
    try:
        parts = build.build(config, "tpu")
        return parts.model, parts.tokenizer
    except UserError as error:
        notes.append(f"model: sizes of the config, since {error}")
        return build.make_model(config, build.spec_of_sizes(config), "tpu"), None


def _datasets(
    config: Config, tokenizer: Any, root: Path, values: flags.FlagValues, notes: list[str]
) -> list[Dataset]:
    query, text = (int(str(values[name].value)) for name in ("query_tokens", "text_tokens"))
    reason = "--query_tokens and --text_tokens are given"
    if not query and not text:
        try:
            if tokenizer is None:
                raise UserError("there is no tokenizer here")
            return list(prepare_datasets(config, tokenizer, TASKS, root))
        except UserError as error:
            reason = str(error)
    query, text = query or config.data.query_max_length, text or config.data.max_length
    notes.append(
        f"data: assumed, since {reason}: equally many steps of each task, all texts distinct,"
        f" queries of {query} and other texts of {text} tokens"
    )
    return assumed_datasets(config, query, text)


def _plans(
    config: Config, model: Embedder, mesh: Mesh, chip: topology.Chip, batches: Batches
) -> list[StepPlan]:
    """A plan for each dataset; datasets of one task and shape share their program."""
    shardings = build.param_shardings(model, mesh)
    params = build.abstract_params(model, shardings)
    optimizer = optim.make_optimizer(config, params)
    state = build.abstract_state(params, optimizer, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    programs = CompiledSteps(model, TASKS, config, optimizer, mesh, places)
    uses = batches.schedule.uses(config.total_steps)
    done: dict[Any, StepPlan] = {}
    plans = []
    for store, steps, first in zip(batches.stores, uses, _first_uses(batches), strict=True):
        batch = batches.at(first)
        plan = _measure(batch, model, mesh)
        key = (batch.task, batch.shape)
        if key not in done:
            metrics.say(f"compiling {batch.task}: {plan.rows} rows of {plan.length} tokens")
            done[key] = plan
            _compile(plan, batch, programs, state, mesh, chip)
        else:
            _copy_costs(done[key], plan)
        plan.steps, plan.dataset = steps, store.name
        if plan.seconds:
            rate = plan.model_operations / plan.seconds
            plan.utilisation = rate / (chip.peak * mesh.devices.size)
        plans.append(plan)
    return plans


def _first_uses(batches: Batches) -> list[int]:
    firsts: dict[int, int] = {}
    step = 0
    while len(firsts) < len(batches.stores):
        firsts.setdefault(batches.schedule.at(step)[0], step)
        step += 1
    return [firsts[dataset] for dataset in range(len(batches.stores))]


def _measure(batch: HostBatch, model: Embedder, mesh: Mesh) -> StepPlan:
    """The batch in numbers, and the operations that a step on it needs."""
    segments = batch.sharded["segments"]
    row, _ = np.nonzero(segments)
    used = segments[segments > 0] + row * (segments.max(initial=0) + 1)
    lengths = np.unique(used, return_counts=True)[1].astype(np.float64)
    rows, length = segments.shape
    config = model.backbone
    hidden, layers = config.hidden_size, config.num_layers
    matrices = layers * (4 * hidden * hidden + 2 * hidden * config.intermediate_size)
    width = model.embed_dim or hidden
    # Each product costs 2 operations forwards and 4 backwards; attention's are within a text.
    operations = 6 * matrices * lengths.sum() + 12 * layers * hidden * (lengths**2).sum()
    operations += 6 * hidden * model.embed_dim * len(lengths)
    arrays = batch.replicated
    if batch.task == "retrieval":
        keys = arrays["positive"].size + arrays["negative"].size
        operations += 6 * arrays["query"].size * keys * width
    return StepPlan(
        dataset=batch.dataset, task=batch.task, rows=rows, length=length, texts=len(lengths),
        tokens=int(lengths.sum()), fill=lengths.sum() / (rows * length), fits=False,
        model_operations=float(operations),
    )  # fmt: skip


def _compile(
    plan: StepPlan,
    batch: HostBatch,
    programs: CompiledSteps,
    state: TrainState,
    mesh: Mesh,
    chip: topology.Chip,
) -> None:
    with stderr_of_compiler() as said:
        try:
            program, _ = programs.get(batch.task, batch.shape, state, abstract_batch(batch, mesh))
        except jax.errors.JaxRuntimeError as error:
            needed = re.search(r"[Uu]sed ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", str(error))
            if not needed:
                raise
            units = {"K": 2**10, "M": 2**20, "G": 2**30}
            plan.hbm_used = int(float(needed[1]) * units[needed[2]])
            plan.compile_warnings = said().count(REMATERIALIZATION)
            return
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
    plan.fits = plan.hbm_used <= chip.hbm
    cost = hlo_cost.read(text, chip)
    plan.cycles, plan.seconds = cost.cycles, cost.seconds(chip)
    plan.prefetch_seconds = cost.prefetch_bytes / chip.hbm_bandwidth
    plan.collectives = [dataclasses.asdict(c) for c in cost.collectives.values()]
    plan.unestimated = [dataclasses.asdict(c) for c in cost.unestimated.values()]


def _copy_costs(source: StepPlan, target: StepPlan) -> None:
    """What one program costs, whichever dataset it runs on."""
    kept = {
        "dataset", "task", "rows", "length", "texts", "tokens", "fill", "model_operations",
        "utilisation", "steps",
    }  # fmt: skip
    for field in dataclasses.fields(StepPlan):
        if field.name not in kept:
            setattr(target, field.name, getattr(source, field.name))


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


def _advice(plans: list[StepPlan], config: Config, chip: topology.Chip, mesh: Mesh) -> list[str]:
    """What to change where a step doesn't fit, and what the compiler complained of."""
    lines = []
    if any(plan.compile_warnings for plan in plans):
        lines.append(
            f"the compiler said '{REMATERIALIZATION}': an activation is moved between chips whole;"
            " this is a bug of this program's shardings on this mesh"
        )
    worst = max((plan for plan in plans if not plan.fits), key=lambda p: p.hbm_used, default=None)
    if worst is None:
        return lines
    lines.append(
        f"{worst.task} needs {_gib(worst.hbm_used)} GiB of {_gib(chip.hbm)} per chip: it does not"
        " fit. What helps:"
    )
    if config.model.remat != "full":
        lines.append("  --config.model.remat=full: keeps one activation a layer")
    if mesh.shape["fsdp"] < mesh.devices.size:
        lines.append(
            f"  --config.mesh.data=1 --config.mesh.fsdp={mesh.devices.size}: parameters and"
            " optimizer state split over all chips"
        )
    factor = 2 ** int(np.ceil(np.log2(worst.hbm_used / chip.hbm)))
    smaller = config.batch_size // factor
    lines.append(f"  --config.batch_size={smaller}: fewer rows, and fewer negatives")
    return lines


def _report(result: dict[str, Any], plans: list[StepPlan], chip: topology.Chip) -> str:
    rows = [
        [
            f"{p.dataset} ({p.task})" if p.dataset != f"assumed {p.task}" else p.task,
            f"{p.rows} x {p.length}", f"{p.tokens:,}", f"{1 - p.fill:.1%}",
            _gib(p.hbm_arguments), _gib(p.hbm_temporary), _gib(p.hbm_output), _gib(p.hbm_used),
            f"{p.hbm_used / chip.hbm:.0%}", f"{p.model_operations:.3g}",
            f"{p.seconds:.3f}", f"{p.utilisation:.1%}", p.steps,
        ]
        for p in plans
    ]  # fmt: skip
    header = (
        "dataset", "rows", "tokens", "padding", "arguments", "temporary", "output", "GiB",
        "of chip", "FLOPs", "s/step", "MFU", "steps",
    )  # fmt: skip
    mesh = " x ".join(f"{axis} {size}" for axis, size in result["mesh"].items())
    parts = [
        f"{result['topology']}: {result['chips']} chips, {mesh}; {_gib(chip.hbm)} GiB and"
        f" {chip.peak / 1e12:.0f} TFLOP/s of bfloat16 each. {_EXECUTED}",
        metrics.table(header, rows),
    ]
    seen = set()
    for plan in plans:
        key = (plan.task, plan.rows, plan.length)
        if key in seen or not plan.seconds:
            continue
        seen.add(key)
        parts.append(_details(plan, chip))
    if result["fits"]:
        parts.append(
            f"{result['total_steps']} steps: {result['hours']:.2f} hours, without start, data,"
            " evaluation and checkpoints"
        )
    parts.append("\n".join(result["notes"]))
    return "\n\n".join(part for part in parts if part)


def _details(plan: StepPlan, chip: topology.Chip) -> str:
    lines = [f"{plan.task}, {plan.rows} rows of {plan.length} tokens: milliseconds a step"]
    parts = [
        ["operations that the compiler estimates", "", "", f"{plan.cycles / chip.clock * 1e3:.2f}"]
    ]
    for item in plan.collectives:
        parts.append([
            f"{item['kind']} over {item['group']} chips", f"{item['count']:.0f}",
            f"{item['bytes'] / 1e6:.1f}", f"{item['seconds'] * 1e3:.2f}",
        ])  # fmt: skip
    for item in plan.unestimated:
        parts.append([
            f"{item['name']} (by bytes and operations)", f"{item['count']:.0f}",
            f"{item['bytes'] / 1e6:.1f}", f"{item['seconds'] * 1e3:.2f}",
        ])  # fmt: skip
    parts.append([
        "prefetches, beside the rest: not added", "", "", f"{plan.prefetch_seconds * 1e3:.2f}",
    ])  # fmt: skip
    return "\n".join([*lines, metrics.table(("", "count", "MB", "ms"), parts)])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    cli.run(main)
