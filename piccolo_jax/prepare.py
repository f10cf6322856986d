"""Prepares the datasets of a config for training, which otherwise does so on first use.

    python -m piccolo_jax.prepare --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]
        [--decontaminate=PATH ...]
    python -m piccolo_jax.prepare --config=configs/NAME.py --check [--histogram=FILE.png]
        [--decontaminate=PATH ...]

Needs no accelerator. Writes what is not there yet to config.data.prepared_dir, or WORKDIR/prepared.
--decontaminate drops rows whose texts occur in evaluation sets: files, directories or patterns, in
addition to config.data.decontaminate.paths. What was dropped is in the folders' dropped.jsonl.

--check reads and tokenises everything, prints what it finds, and writes nothing but the PNG that
--histogram names (--overwrite: in place of another). Batches are planned for this machine's devices
where config.mesh.data is -1.
"""

import dataclasses
import os.path
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import jax
from absl import flags

from piccolo_jax import build, cli, metrics
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config, DatasetConfig, MeshConfig
from piccolo_jax.data import check_report, formats, mixing
from piccolo_jax.data.check import Checked, check_dataset
from piccolo_jax.data.decontaminate import REPORT, Decontaminator
from piccolo_jax.data.loader import Batches
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.errors import UnusableDatasetError, UserError
from piccolo_jax.tasks import TASKS


def main(argv: list[str]) -> None:
    """The command."""
    usage = __doc__ or ""
    config, values = cli.parse(_spread(argv), usage, required=("config",), define=_define)
    added = _paths(values["decontaminate"].value or ())
    if added:
        decontaminate = config.data.decontaminate
        paths = tuple(dict.fromkeys((*decontaminate.paths, *added)))
        config.data.decontaminate = dataclasses.replace(decontaminate, paths=paths)
        config_lib.validate(config)
    if values["check"].value:
        path = values["histogram"].value
        _check(config, Path(path) if path else None, bool(values["overwrite"].value))
        return
    for flag in ("histogram", "overwrite"):
        if values[flag].present:
            raise UserError(f"--{flag} goes with --check\n{usage}")
    if not values["workdir"].value:
        raise UserError(f"--workdir is missing\n{usage}")
    _prepare(config, Path(str(values["workdir"].value)))
    if added:
        flag = shlex.quote(repr(config.data.decontaminate.paths))
        print(f"train with --config.data.decontaminate.paths={flag}")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_bool("check", False, "Only look, and report.", flag_values=values)
    flags.DEFINE_string("histogram", "", "PNG of token lengths to write.", flag_values=values)
    flags.DEFINE_bool("overwrite", False, "Replace that PNG.", flag_values=values)
    flags.DEFINE_multi_string(
        "decontaminate", None, "Evaluation sets whose texts are dropped.", flag_values=values
    )


def _prepare(config: Config, workdir: Path) -> None:
    tokenizer = build.build(config).tokenizer
    root = Path(config.data.prepared_dir or workdir / "prepared")
    rows, dropped = [], []
    for dataset in prepare_datasets(config, tokenizer, TASKS, root):
        m = dataset.store.manifest
        rows.append([
            m["name"], m["task"], m["rows"], m["rejected"], m.get("dropped", {}).get("rows", 0),
            m["texts"], m["mean_tokens"], m["longest_tokens"], m["truncated_texts"],
            f"{m['name']}-{m['fingerprint']}",
        ])  # fmt: skip
        for item in m["rejected_rows"][:5]:
            print(f"rejected {item['place']}: {item['reason']}")
        dropped += [
            [m["name"], by["evaluation"], by["field"], by["rule"], by["rows"]]
            for by in m.get("dropped", {}).get("by", ())
        ]
    columns = (
        "dataset", "task", "rows", "rejected", "dropped", "texts", "tokens", "longest", "cut",
        "folder",
    )  # fmt: skip
    print(metrics.table(columns, rows))
    if dropped:
        header = ("rows dropped from", "that occur in", "column", "rule", "rows")
        print("\n" + metrics.table(header, dropped))
        print(f"each of them, with file and line: {root}/*/{REPORT}\n")
    print(f"prepared in {root}")


def _paths(given: Sequence[str]) -> list[str]:
    """The paths given; what is none, with commas, is several."""
    return [p for path in given for p in ([path] if os.path.exists(path) else path.split(","))]


def _spread(argv: list[str]) -> list[str]:
    """The arguments, with a flag for each path that follows --decontaminate."""
    flag, taking, spread = "--decontaminate", False, []
    for argument in argv:
        if taking and not argument.startswith("-"):
            spread.append(f"{flag}={argument}")
            continue
        taking = argument == flag or argument.startswith(f"{flag}=")
        if argument != flag:
            spread.append(argument)
    if flag in argv and not any(a.startswith(f"{flag}=") for a in spread):
        raise UserError(f"{flag} needs the paths of evaluation sets: {flag}=PATH ...")
    return spread


def _check(config: Config, histogram: Path | None, overwrite: bool) -> None:
    if histogram:
        if histogram.suffix.lower() != ".png" or histogram.is_dir():
            raise UserError(f"--histogram={histogram}: must be a file that ends in .png")
        if not histogram.absolute().parent.is_dir():
            raise UserError(f"--histogram={histogram}: the folder does not exist")
        if histogram.exists() and not overwrite:
            raise UserError(f"{histogram} exists; --overwrite replaces it")
    parts = build.build(config)
    evaluated = config.data.decontaminate
    decontaminator = Decontaminator(evaluated) if evaluated.paths else None
    all_checked, problems = [], []
    for dataset in config.data.datasets:
        try:
            members = _members(dataset)
        except UserError as error:
            print(f"== {dataset.path}\nerror: {error}\n")
            problems.append(str(error))
            continue
        for one in members:
            try:
                checked = check_dataset(
                    one, config, parts.tokenizer, TASKS, decontaminator=decontaminator
                )
            except UserError as error:
                left_out = isinstance(error, UnusableDatasetError) and config.data.skip_unusable
                print(f"== {one.path}\n{'left out' if left_out else 'error'}: {error}\n")
                problems += [] if left_out else [str(error)]
                continue
            all_checked.append(checked)
            print("\n".join(check_report.lines_of(checked)))
            if checked.dropped:
                print(f"dropped    {checked.dropped} rows that occur in evaluation sets")
            print(_batch(checked, one, config, parts.model.backbone.hidden_size) + "\n")
            damaged = [row for row in checked.collected.rejected.first if row.damaged]
            problems += [f"{row.place}: {row.reason}" for row in damaged]
    rows = [
        [c.name, c.task, c.num_rows, c.collected.rejected.count, c.num_texts, len(c.lengths),
         round(float(c.lengths.mean()), 1), sum(side.cut for side in c.sides),
         round(c.num_texts / max(c.seconds, 1e-9))]
        for c in all_checked
    ]  # fmt: skip
    header = ("dataset", "task", "rows", "rejected", "texts", "unique", "tokens", "cut", "texts/s")
    print(metrics.table(header, rows))
    if histogram and all_checked:
        check_report.save_histograms(histogram, all_checked)
        print(f"token lengths: {histogram}")
    if problems:
        raise UserError(
            f"{problems[0]}\n{len(problems)} problem{'s' * (len(problems) > 1)} as this would stop"
            " preparing; the report lists each"
        )


def _members(dataset: DatasetConfig) -> list[DatasetConfig]:
    listed = formats.expand_meta_list(dataset.path)
    if listed is None:
        return [dataset]
    return [dataclasses.replace(dataset, path=path) for path, _ in listed]


def _batch(checked: Checked, dataset: DatasetConfig, config: Config, hidden_size: int) -> str:
    shards = _shards(config.mesh)
    # Planning reads lengths and no tokens.
    planned = Dataset(cast(Any, checked), 1.0, dataset.max_rows, dataset.batch_size)
    size = min(dataset.batch_size or config.batch_size, planned.rows)
    try:
        mixing.check(config, planned, 0)
        planned = dataclasses.replace(planned, batch_size=size)
        batches = Batches(config, [planned], TASKS, hidden_size, shards, range(shards), quiet=True)
    except UserError as error:
        return f"batch      none: {error}"
    return check_report.batch_line(batches.plans[0], size, shards)


def _shards(mesh: MeshConfig) -> int:
    """Parts into which a batch is split, with as many devices as here where the mesh is open."""
    sizes = dataclasses.asdict(mesh)
    known = [size for size in sizes.values() if size > 0]
    rest = jax.device_count()
    for size in known:
        rest //= size
    sizes = {axis: size if size > 0 else max(rest, 1) for axis, size in sizes.items()}
    return int(sizes["data"] * sizes["fsdp"])


if __name__ == "__main__":
    cli.run(main)
