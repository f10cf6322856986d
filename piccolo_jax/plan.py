"""Compiles every step of a config for a TPU slice, and says whether it fits and how fast it goes.

    python -m piccolo_jax.plan --config=configs/NAME.py --topology=v5e:8x8 [--json]
        [--workdir=DIR] [--query_tokens=N --text_tokens=N] [--config.FIELD=VALUE ...]

Needs no TPU and no weights, but libtpu: nothing is executed. Batches have the shapes of the
config's data, where it can be read (prepared in --workdir, config.data.prepared_dir or a temporary
folder). Otherwise lengths are assumed: of queries and other texts the longest that the config
allows, or --query_tokens and --text_tokens on average.
"""

import copy
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # a plan uses what is here

import jax
from absl import flags

from piccolo_jax import build, cli, metrics, sharding
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.errors import UserError
from piccolo_jax.models.embedder import Embedder
from piccolo_jax.planning import topology
from piccolo_jax.planning.assumed import assumed_datasets
from piccolo_jax.planning.steps import REMATERIALIZATION, StepPlan, plan_steps
from piccolo_jax.planning.topology import Chip
from piccolo_jax.tasks import TASKS

_EXECUTED = "Nothing was executed: times are the compiler's estimates, not measurements."


def main(argv: list[str]) -> int:
    """The command; returns the exit code: 0 if all steps fit, 2 if one doesn't."""
    config, values = cli.parse(argv, __doc__ or "", ("config", "topology"), _define)
    jax.config.update("jax_platforms", "cpu")  # the TPU is compiled for, not used
    name, workdir = str(values["topology"].value), values["workdir"].value
    chip, devices = topology.devices(name)
    mesh = sharding.make_mesh(config.mesh, devices)
    notes: list[str] = []
    model, tokenizer = _model(config, notes)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(config.data.prepared_dir or Path(str(workdir or scratch)) / "prepared")
        datasets = _datasets(config, tokenizer, root, values, notes)
        plans = plan_steps(config, model, chip, devices, datasets)
        notes += _advice(plans, config, model, chip, devices, datasets)
    fits = all(plan.fits for plan in plans)
    seconds = sum(plan.seconds * plan.steps for plan in plans)
    result = {
        "topology": name,
        "chips": len(devices),
        "mesh": dict(mesh.shape),
        "hbm_per_chip": chip.hbm,
        "peak_per_chip": chip.peak,
        "steps": [dataclasses.asdict(plan) for plan in plans],
        "total_steps": config.total_steps,
        "hours": seconds / 3600 if fits else None,
        "fits": fits,
        "notes": notes,
        "executed": False,
    }
    as_json = bool(values["json"].value)
    print(json.dumps(result, indent=2) if as_json else _report(result, plans, chip))
    return 0 if fits else 2


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
    most = config.data.query_max_length, config.data.max_length
    query, text = (min(n or m, m) for n, m in zip((query, text), most, strict=True))
    steps = "steps by weight x repeats"
    if not all(dataset.task for dataset in config.data.datasets):
        steps += ", equally many of each task where a dataset of the config names none"
    if config.data.mixing_temperature is not None:
        steps += ", without data.mixing_temperature, which needs numbers of rows"
    notes.append(
        f"data: assumed, since {reason}: {steps}, all texts distinct, queries of {query} and other"
        f" texts of {text} tokens"
    )
    return assumed_datasets(config, query, text)


def _advice(
    plans: list[StepPlan],
    config: Config,
    model: Embedder,
    chip: Chip,
    devices: list[jax.Device],
    datasets: list[Dataset],
) -> list[str]:
    """What the compiler complained of, and where a step doesn't fit, what does: also compiled."""
    lines = [
        f"{plan.task}: the compiler says {REMATERIALIZATION!r}: this program moves an activation"
        " between chips whole, which is slow, and a bug"
        for plan in plans
        if plan.compile_warnings
    ]
    lines += [
        f"{plan.task}: the program doesn't show how often {plan.unknown_loops} of its loops run:"
        " each is counted once, so the step takes longer than is said"
        for plan in plans
        if plan.unknown_loops
    ]
    if all(plan.fits for plan in plans):
        return lines
    worst = max(range(len(plans)), key=lambda i: (not plans[i].fits, plans[i].hbm_used))
    plan = plans[worst]
    lines.append(
        f"does not fit: {plan.task} needs {_gib(plan.hbm_used)} GiB per chip, of which arguments"
        f" {_gib(plan.hbm_arguments)}; a chip has {_gib(chip.hbm)}"
    )
    tried_too: list[str] = []
    mesh = sharding.make_mesh(config.mesh, devices)
    largest = max(plans, key=lambda plan: plan.rows * plan.length)
    own_batch = {dataset.store.name for dataset in datasets if dataset.batch_size}
    smaller_batch = not any(p.dataset in own_batch for p in plans if not p.fits)
    rows = largest.rows // sharding.batch_shards_of(mesh)
    for change in _changes(config, mesh, rows, smaller_batch):
        changed = copy.deepcopy(config)
        for field, value in change.items():
            section, _, name = field.rpartition(".")
            setattr(config_lib.get(changed, section) if section else changed, name, value)
        flags_of_change = " ".join(f"--config.{field}={value}" for field, value in change.items())
        metrics.say(f"trying {flags_of_change}")
        try:
            tried = plan_steps(changed, model, chip, devices, datasets, doubtful=worst)
        except UserError:  # chunks or rows that the data don't fill
            continue
        most = max(tried, key=lambda plan: (not plan.fits, plan.hbm_used))
        if most.fits:
            seconds = sum(plan.seconds * plan.steps for plan in tried) / config.total_steps
            lines.append(
                f"what fits (compiled): {flags_of_change}: at most {_gib(most.hbm_used)} GiB,"
                f" {seconds:.3f} s a step on average"
            )
            return lines
        tried_too.append(f"{flags_of_change}: {most.task} needs {_gib(most.hbm_used)} GiB")
    lines += [f"does not fit either (compiled): {change}" for change in tried_too]
    lines.append("take a larger slice, chips with more memory, or a smaller model or batch")
    return lines


def _changes(
    config: Config, mesh: jax.sharding.Mesh, rows: int, smaller_batch: bool
) -> Iterator[dict[str, Any]]:
    """Changes of a config that need less memory, the mildest first.

    `rows`: of a device, in the largest batch; smaller_batch: whether config.batch_size counts.
    """
    chunks = config.train.micro_batches
    more = sorted({min(chunks * factor, max(rows, chunks)) for factor in (4, 16)})
    split = {"mesh.data": 1, "mesh.fsdp": sharding.batch_shards_of(mesh)}
    for number in more:
        if number > chunks:
            yield {"train.micro_batches": number}
    for number in more:
        yield {**split, "train.micro_batches": number}
    if smaller_batch:
        fewer = {"train.micro_batches": min(chunks * 4, max(rows // 4, 1))}
        yield {**split, **fewer, "batch_size": max(config.batch_size // 4, 1)}


def _report(result: dict[str, Any], plans: list[StepPlan], chip: Chip) -> str:
    rows = [
        [
            f"{p.dataset} ({p.task})", f"{p.batch_size:,}", f"{p.rows} x {p.length}",
            f"{p.tokens:,}", f"{1 - p.fill:.1%}",
            _gib(p.hbm_arguments), _gib(p.hbm_temporary), _gib(p.hbm_output), _gib(p.hbm_used),
            f"{p.hbm_used / chip.hbm:.0%}", f"{p.model_operations:.3g}",
            f"{p.seconds:.3f}", f"{p.utilisation:.1%}", p.steps,
        ]
        for p in plans
    ]  # fmt: skip
    header = (
        "dataset", "batch", "packed rows", "tokens", "padding", "arguments", "temporary", "output",
        "GiB", "of chip", "FLOPs", "s/step", "MFU", "steps",
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


def _details(plan: StepPlan, chip: Chip) -> str:
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
