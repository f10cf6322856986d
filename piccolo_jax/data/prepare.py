"""Raw files to prepared datasets (store.py): every distinct text is tokenised once.

A prepared dataset is named by a fingerprint of everything it depends on, written beside its final
place and renamed when complete, so one that is stale or half-written is never read.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import formats, tfds_rows
from piccolo_jax.data.collect import TaskColumns, check_labels, collect
from piccolo_jax.data.partial import remove_abandoned, written_whole
from piccolo_jax.data.store import MANIFEST, Ragged, Store
from piccolo_jax.data.texts import TextTable
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UserError

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset and its share of the steps."""

    store: Store
    weight: float


def prepare_datasets(
    config: Config,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    root: Path,
    quiet: bool = False,
) -> list[Dataset]:
    """Opens every dataset of the config, preparing under `root` those not there yet.

    `quiet`: without progress bars.

    Raises UserError for files that can't be used; what was finished before stays.
    """
    remove_abandoned(root)
    prepared = []
    for dataset in config.data.datasets:
        listed = formats.expand_meta_list(dataset.path)
        paths = [(dataset.path, 1.0)] if listed is None else listed
        stores = [
            _prepare(dataclasses.replace(dataset, path=path), config, tokenizer, tasks, root, quiet)
            for path, _ in paths
        ]
        # The datasets of a meta list are one pool of rows, as in REF: they share the list's weight,
        # times their number, by rows times REPEATS.
        sizes = [s.num_rows * repeats for s, (_, repeats) in zip(stores, paths, strict=True)]
        for store, size in zip(stores, sizes, strict=True):
            prepared.append(Dataset(store, dataset.weight * len(stores) * size / sum(sizes)))
    return prepared


def _prepare(
    dataset: DatasetConfig,
    config: Config,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    root: Path,
    quiet: bool,
) -> Store:
    source = formats.open_source(dataset.path, dataset.task)
    task = tasks[source.task]
    description = {
        "schema": SCHEMA_VERSION,
        "task": source.task,
        "text_columns": [dataclasses.asdict(column) for column in task.columns],
        "tokenizer": tokenizer.fingerprint,
        "prompts": {"query": dataset.query_prompt, "passage": dataset.passage_prompt},
        "query_max_length": config.data.query_max_length,
        "max_length": config.data.max_length,
        "sources": source.rows.content(),
    }
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    name = name_of(dataset.path)
    directory = root / f"{name}-{fingerprint}"
    if not directory.exists():
        manifest = {"name": name, "fingerprint": fingerprint} | description
        try:
            with written_whole(directory) as folder:
                _write(source, task, tokenizer, manifest, folder, quiet)
        except OSError as error:
            raise UserError(
                f"{root}: the prepared form of {dataset.path} can't be written here ({error}); make"
                " room, or name another folder in config.data.prepared_dir"
            ) from None
    return Store(directory)


def name_of(path: str) -> str:
    """The name of the dataset at a path."""
    if tfds_rows.is_name(path):
        return re.sub(r"[^\w.+-]+", "-", path)
    return os.path.basename(os.path.abspath(path))


def _write(
    source: formats.Source,
    task: TaskColumns,
    tokenizer: Tokenizer,
    manifest: dict[str, Any],
    directory: Path,
    quiet: bool,
) -> None:
    # Compressed, the file is half as large and takes six times as long to write, twice to read.
    path, options = directory / "texts.array_record", "group_size:1,uncompressed"
    with _os_errors(), contextlib.closing(ArrayRecordWriter(str(path), options)) as writer:
        texts = TextTable(
            tokenizer,
            manifest["prompts"],
            manifest["query_max_length"],
            manifest["max_length"],
            writer.write,
        )
        collected = collect(source, task, texts, f"preparing {manifest['name']}", quiet)
    check_labels(source, collected)
    for column in task.columns:
        values = collected.columns[column.name]
        if isinstance(values, Ragged):
            np.save(directory / f"{column.name}.values.npy", values.values)
            np.save(directory / f"{column.name}.offsets.npy", values.offsets)
        else:
            np.save(directory / f"{column.name}.npy", values)
    if task.score_column:
        np.save(directory / f"{task.score_column}.npy", collected.columns[task.score_column])
    np.save(directory / "lengths.npy", texts.lengths)
    rejected = collected.rejected
    manifest |= {
        "columns": {c.name: c.ragged for c in task.columns}
        | ({task.score_column: False} if task.score_column else {}),
        "rows": collected.num_rows,
        "texts": len(texts.lengths),
        "truncated_texts": texts.truncated,
        "mean_tokens": round(float(texts.lengths.mean()), 2),
        "longest_tokens": int(texts.lengths.max()),
        "rejected": rejected.count,
        "rejected_reasons": dict(rejected.reasons.most_common(50)),
        "rejected_rows": [{"place": r.place, "reason": r.reason} for r in rejected.first],
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """ArrayRecord says by RuntimeError that a file can't be written."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None
