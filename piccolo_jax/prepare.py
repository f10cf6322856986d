"""Prepares the datasets of a config for training, which otherwise does so on first use.

    python -m piccolo_jax.prepare --config=configs/NAME.py --workdir=DIR [--config.FIELD=VALUE ...]
        [--decontaminate=PATH ...]

Needs no accelerator. Writes what is not there yet to config.data.prepared_dir, or WORKDIR/prepared.
--decontaminate drops rows whose texts occur in evaluation sets: files, directories or patterns, in
addition to config.data.decontaminate.paths. What was dropped is in the folders' dropped.jsonl.
"""

import dataclasses
import os.path
import shlex
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from piccolo_jax import build, cli, metrics
from piccolo_jax import config as config_lib
from piccolo_jax.config import Config
from piccolo_jax.data.decontaminate import REPORT
from piccolo_jax.data.prepare import prepare_datasets
from piccolo_jax.errors import UserError
from piccolo_jax.tasks import TASKS


def main(argv: list[str]) -> None:
    """The command."""
    usage, required = __doc__ or "", ("config", "workdir")
    config, values = cli.parse(_spread(argv), usage, required, _define)
    workdir = Path(str(values["workdir"].value))
    added = _paths(values["decontaminate"].value or ())
    if added:
        decontaminate = config.data.decontaminate
        paths = tuple(dict.fromkeys((*decontaminate.paths, *added)))
        config.data.decontaminate = dataclasses.replace(decontaminate, paths=paths)
        config_lib.validate(config)
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
    if added:
        print(f"train with --config.data.decontaminate.paths={_flag(config)}")


def _paths(given: Sequence[str]) -> list[str]:
    """The paths given; what is none, with commas, is several."""
    return [p for path in given for p in ([path] if os.path.exists(path) else path.split(","))]


def _flag(config: Config) -> str:
    """The config's evaluation sets as a shell writes them for a flag."""
    return shlex.quote(repr(config.data.decontaminate.paths))


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_multi_string(
        "decontaminate", None, "Evaluation sets whose texts are dropped.", flag_values=values
    )


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


if __name__ == "__main__":
    cli.run(main)
