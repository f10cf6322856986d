"""Raw files to prepared datasets (store.py): every distinct text is tokenised once.

A prepared dataset is named by a fingerprint of everything it depends on, written beside its final
place and renamed when complete, so one that is stale or half-written is never read.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import formats, mixing, tfds_rows
from piccolo_jax.data.collect import TaskColumns, check_labels, collect
from piccolo_jax.data.decontaminate import REPORT, Decontaminator, Report
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.partial import remove_abandoned, written_whole
from piccolo_jax.data.store import MANIFEST, Ragged, Store
from piccolo_jax.data.texts import TextTable
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UnusableDatasetError, UserError

SCHEMA_VERSION = 1
_LONGEST_NAME = 150  # bytes of a dataset's name in its folder's; most file systems take 255


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
    evaluated = config.data.decontaminate
    decontaminator = Decontaminator(evaluated, quiet) if evaluated.paths else None
    for dataset in config.data.datasets:
        listed = formats.expand_meta_list(dataset.path)
        paths = [(dataset.path, 1.0)] if listed is None else listed
        stores = []
        for path, repeats in paths:
            one = dataclasses.replace(dataset, path=path)
            try:
                store = _prepare(one, config, tokenizer, tasks, root, quiet, decontaminator)
            except UnusableDatasetError as error:
                if not config.data.skip_unusable:
                    raise
                if not quiet:
                    tqdm.tqdm.write(f"left out: {error}", file=sys.stderr)
            else:
                stores.append((store, repeats))
        prepared.append((dataset, stores))
    _tell_apart([store for _, stores in prepared for store, _ in stores])
    return mixing.share_out(config, prepared)


def _prepare(
    dataset: DatasetConfig,
    config: Config,
    tokenizer: Tokenizer,
    tasks: dict[str, Any],
    root: Path,
    quiet: bool,
    decontaminator: Decontaminator | None,
) -> Store:
    source = formats.open_source(
        dataset.path,
        dataset.task,
        label_names=dataset.label_names,
        label_language=dataset.label_language,
    )
    task = tasks[source.task]
    description: dict[str, Any] = {
        "schema": SCHEMA_VERSION,
        "task": source.task,
        "text_columns": [dataclasses.asdict(column) for column in task.columns],
        "tokenizer": tokenizer.fingerprint,
        "prompts": {"query": dataset.query_prompt, "passage": dataset.passage_prompt},
        "query_max_length": config.data.query_max_length,
        "max_length": config.data.max_length,
        "sources": source.rows.content(),
    }
    if source.names:
        description["label_names"] = dict(source.names)
    if decontaminator:
        decontaminator.check(dataset.path, [digest for _, digest in description["sources"]])
        description["decontaminate"] = decontaminator.description
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    name = name_of(dataset.path)
    short = name.encode()[:_LONGEST_NAME].decode(errors="ignore")
    directory = root / f"{short}-{fingerprint}"
    if not directory.exists():
        _check_prompts(dataset, task, config, tokenizer)
        manifest = {"name": name, "fingerprint": fingerprint} | description
        try:
            with written_whole(directory) as folder, contextlib.ExitStack() as stack:
                if decontaminator:
                    report = stack.enter_context(contextlib.closing(Report(folder / REPORT)))
                    manifest["dropped"] = report.summary
                    keep = functools.partial(decontaminator.keep, dataset.path, report=report)
                    source = dataclasses.replace(source, keep=keep)
                _write(source, task, tokenizer, manifest, folder, quiet)
        except OSError as error:
            raise UserError(
                f"{root}: the prepared form of {dataset.path} can't be written here ({error}); make"
                " room, or name another folder in config.data.prepared_dir"
            ) from None
    return Store(directory)


def _check_prompts(
    dataset: DatasetConfig, task: TaskColumns, config: Config, tokenizer: Tokenizer
) -> None:
    """Raises UserError for a prompt that leaves no token to the texts."""
    for column in task.columns:
        field = f"{column.prompt}_prompt"
        prompt = getattr(dataset, field)
        limit = "query_max_length" if column.is_query else "max_length"
        tokens = getattr(config.data, limit)
        if prompt and len(tokenizer.encode([prompt], tokens)[0][0]) == tokens:
            raise UserError(
                f"{dataset.path}: the {field} of its DatasetConfig fills all {tokens} tokens of"
                f" config.data.{limit}, so that nothing of a text is left; shorten it, or raise"
                " the limit"
            )


def _tell_apart(stores: Sequence[Store]) -> None:
    """Gives datasets of equal names their place among all as a suffix, as `train.jsonl[2]`."""
    names = collections.Counter(store.name for store in stores)
    for i, store in enumerate(stores):
        if names[store.name] > 1:
            store.name += f"[{i}]"


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
