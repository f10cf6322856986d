"""Publishes training data as a versioned TFDS dataset, which configs name by `tfds:`.

    python -m piccolo_jax.publish --name=my_pairs --version=1.0.0 --data_dir=DIR --split=train=PATH
        [--split=test=PATH ...] [--config=NAME] [--task=TASK] [--label_names=FILE]
        [--label_language=NAME] [--description=TEXT] [--notes=TEXT]

PATH is what DatasetConfig.path may be, but no meta list. Writes DIR/NAME[/CONFIG]/VERSION, to be
read with TFDS_DATA_DIR=DIR and DatasetConfig("tfds:my_pairs:1.0.0:train"). A version that is there
is never changed: give changed data a new one.
"""

import argparse
import re
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from piccolo_jax import cli
from piccolo_jax.data import formats, tfds_builder
from piccolo_jax.data.collect import RejectedRows
from piccolo_jax.errors import UserError

_ALL_IS_HERE = tfds.download.DownloadConfig(try_download_gcs=False)
_FORMATS = {
    "name": (r"[a-z][a-z0-9_]*", "small letters, digits and _, as my_pairs"),
    "config": (r"([A-Za-z0-9_][A-Za-z0-9_.\-]*)?", "letters, digits, _, - and ."),
    "version": (r"\d+\.\d+\.\d+", "three numbers, as 1.0.0"),
}


def main(argv: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="piccolo_jax.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--name", required=True, help="of the dataset")
    parser.add_argument("--version", required=True, help="as 1.0.0")
    parser.add_argument("--config", default="", help="of the dataset; default: it has none")
    parser.add_argument("--data_dir", type=Path, required=True, help="folder of TFDS datasets")
    parser.add_argument("--split", action="append", required=True, help="NAME=PATH, repeatable")
    parser.add_argument("--task", default="", help="where the columns leave it open")
    parser.add_argument("--label_names", default="", help="file that names label ids")
    parser.add_argument("--label_language", default="", help="which of its names to publish")
    parser.add_argument("--description", default="", help="what the data are")
    parser.add_argument("--notes", default="", help="what is new in this version")
    args = parser.parse_args(argv[1:])
    for flag, (pattern, expected) in _FORMATS.items():
        if not re.fullmatch(pattern, getattr(args, flag)):
            raise UserError(f"--{flag}={getattr(args, flag)}: must be {expected}")
    logging.set_verbosity(logging.ERROR)  # TFDS warns of what is as it should be
    rejected = RejectedRows()
    splits = _open_splits(args)
    builder = _builder(args, splits, rejected)
    reference = f"tfds:{args.name}{'/' * bool(args.config)}{args.config}:{args.version}"
    try:
        builder.download_and_prepare(download_config=_ALL_IS_HERE)
    except OSError as error:
        raise UserError(f"--data_dir={args.data_dir}: can't be written to ({error})") from error
    for row in rejected.first[:20]:
        print(f"rejected {row.place}: {row.reason}")
    for name, split in builder.info.splits.items():
        print(f"{reference}:{name}  {split.num_examples} rows")
    print(f"{rejected.count} rows rejected; in {builder.data_dir}")
    print(f"to read it: TFDS_DATA_DIR={args.data_dir}")


def _open_splits(args: argparse.Namespace) -> dict[str, formats.Source]:
    splits: dict[str, formats.Source] = {}
    for value in args.split:
        name, _, path = value.partition("=")
        if not path or not re.fullmatch(r"[A-Za-z_]\w*", name) or name in splits:
            raise UserError(f"--split={value}: must be NAME=PATH, each name once, as train=a.jsonl")
        if formats.expand_meta_list(path) is not None:
            raise UserError(f"--split={value}: is a meta list; publish each of its datasets")
        splits[name] = formats.open_source(
            path, args.task, label_names=args.label_names, label_language=args.label_language
        )
    tasks = {source.task for source in splits.values()}
    if len(tasks) > 1:
        raise UserError(f"--split: are for different tasks ({', '.join(sorted(tasks))}); publish"
                        " them under different names or configs")  # fmt: skip
    return splits


def _builder(
    args: argparse.Namespace, splits: dict[str, formats.Source], rejected: RejectedRows
) -> tfds_builder.EmbeddingDataset:
    builder = tfds_builder.EmbeddingDataset(
        name=args.name,
        version=args.version,
        config=args.config,
        data_dir=args.data_dir,
        splits=splits,
        description=args.description,
        release_notes={args.version: args.notes} if args.notes else None,
        reject=rejected.add,
    )
    if builder.is_prepared():
        raise UserError(f"{builder.data_dir}: is there already; give another --version")
    return builder


if __name__ == "__main__":
    cli.run(main)
