"""Raw files to prepared datasets (store.py): every distinct text is tokenised once.

A prepared dataset is named by a fingerprint of everything it depends on, written beside its final
place and renamed when complete, so one that is stale or half-written is never read.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
import sys
import uuid
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import tqdm
from array_record.python.array_record_module import ArrayRecordWriter

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data import formats, mixing
from piccolo_jax.data.decontaminate import REPORT, Decontaminator, Report
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.store import MANIFEST, Store, TextColumn
from piccolo_jax.data.tokenizer import Tokenizer
from piccolo_jax.errors import UnusableDatasetError, UserError

SCHEMA_VERSION = 1
_ROWS_AT_ONCE = 2048
_MOST_REJECTED_LISTED = 10_000


class TaskColumns(Protocol):
    """What preparation needs of a task: its text columns and its score column."""

    @property
    def columns(self) -> tuple[TextColumn, ...]: ...  # noqa: D102
    @property
    def score_column(self) -> str | None: ...  # noqa: D102


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
        "sources": [[file.name, formats.digest_of(file)] for file in source.files],
    }
    if source.names:
        description["label_names"] = dict(source.names)
    if decontaminator:
        decontaminator.check(dataset.path, [digest for _, digest in description["sources"]])
        description["decontaminate"] = decontaminator.description
    fingerprint = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    name = os.path.basename(os.path.abspath(dataset.path))
    directory = root / f"{name}-{fingerprint}"
    if not directory.exists():
        partial = root / f"{directory.name}.partial-{uuid.uuid4().hex[:8]}"
        try:
            partial.mkdir(parents=True)
            manifest = {"name": name, "fingerprint": fingerprint} | description
            with contextlib.ExitStack() as stack:
                texts = stack.enter_context(
                    contextlib.closing(_TextWriter(partial, tokenizer, manifest))
                )
                if decontaminator:
                    report = stack.enter_context(contextlib.closing(Report(partial / REPORT)))
                    manifest["dropped"] = report.summary
                    keep = functools.partial(decontaminator.keep, dataset.path, report=report)
                    source = dataclasses.replace(source, keep=keep)
                _write(source, task, texts, manifest, partial, quiet)
            try:
                os.rename(partial, directory)
            except OSError:
                if not directory.exists():  # not another process that was faster
                    raise
        except OSError as error:
            raise UserError(
                f"{root}: the prepared form of {dataset.path} can't be written here ({error}); make"
                " room, or name another folder in config.data.prepared_dir"
            ) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return Store(directory)


def _write(
    source: formats.Source,
    task: TaskColumns,
    texts: "_TextWriter",
    manifest: dict[str, Any],
    directory: Path,
    quiet: bool,
) -> None:
    columns = {column.name: _ColumnWriter() for column in task.columns}
    scores = array("f")
    rejected: list[formats.Rejected] = []
    total = formats.count_rows(source.files)
    with tqdm.tqdm(
        total=total, desc=f"preparing {manifest['name']}", unit=" rows", disable=quiet
    ) as bar:
        for chunk in _batched(source, _ROWS_AT_ONCE):
            examples: list[formats.Example] = []
            for item in chunk:
                (rejected if isinstance(item, formats.Rejected) else examples).append(item)
            for column in task.columns:
                lists = [getattr(example, column.name) for example in examples]
                lists = lists if column.ragged else [(text,) for text in lists]
                ids = texts.add([text for texts_ in lists for text in texts_], column)
                columns[column.name].add(ids, [len(texts_) for texts_ in lists])
            if task.score_column:
                scores.extend(getattr(example, task.score_column) for example in examples)
            bar.update(len(chunk))
    num_rows = columns[task.columns[0].name].num_rows
    for column in task.columns:
        if column.name == "labels":  # beyond the last row's: to be contrasted with
            columns["labels"].values.extend(texts.add(list(source.label_texts), column))
    _check(source, rejected, num_rows, task, columns)

    for column in task.columns:
        columns[column.name].save(directory, column)
    if task.score_column:
        np.save(directory / f"{task.score_column}.npy", np.frombuffer(scores, np.float32))
    lengths = np.frombuffer(texts.lengths, np.int32)
    np.save(directory / "lengths.npy", lengths)
    manifest |= {
        "columns": {c.name: c.ragged for c in task.columns}
        | ({task.score_column: False} if task.score_column else {}),
        "rows": num_rows,
        "texts": len(lengths),
        "truncated_texts": texts.truncated,
        "mean_tokens": round(float(lengths.mean()), 2),
        "longest_tokens": int(lengths.max()),
        "rejected": len(rejected),
        "rejected_reasons": dict(collections.Counter(r.reason for r in rejected).most_common(50)),
        "rejected_rows": [dataclasses.asdict(r) for r in rejected[:_MOST_REJECTED_LISTED]],
    }
    text = json.dumps(manifest, ensure_ascii=False, indent=1)
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def _check(
    source: formats.Source,
    rejected: list[formats.Rejected],
    num_rows: int,
    task: TaskColumns,
    columns: dict[str, "_ColumnWriter"],
) -> None:
    if num_rows == 0:
        first = f"; the first: {rejected[0].place}: {rejected[0].reason}" if rejected else ""
        raise UnusableDatasetError(
            f"{source.path}: no usable row for task {source.task!r},"
            f" {len(rejected)} rejected{first}"
        )
    if source.task == "classification":
        labels = set(columns["labels"].values) | set(columns["other_labels"].values)
        if len(labels) < 2:
            raise UnusableDatasetError(
                f"{source.path}: all {num_rows} rows have the same label and list no other;"
                " contrast against label texts needs at least two labels. Leave the dataset out"
                " (data.skip_unusable leaves out all such)"
            )


class _TextWriter:
    """Gives texts ids, tokenising and writing each distinct one once.

    Texts are the same if their tokens are: what the model can't tell apart is one text.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, manifest: dict[str, Any]):
        # Compressed, the file is half as large and takes six times as long to write, twice to read.
        path, options = directory / "texts.array_record", "group_size:1,uncompressed"
        with _os_errors():
            self._writer = ArrayRecordWriter(str(path), options)
        self._tokenizer, self._manifest = tokenizer, manifest
        self._by_text: dict[bytes, int] = {}
        self._by_tokens: dict[bytes, int] = {}
        self.lengths = array("i")
        self.truncated = 0

    def add(self, texts: list[str], column: TextColumn) -> list[int]:
        prompt = self._manifest["prompts"][column.prompt]
        limit = self._manifest["query_max_length" if column.is_query else "max_length"]
        keys = [_digest(f"{limit} {prompt}{text}".encode()) for text in texts]
        new = {key: i for i, key in enumerate(keys) if key not in self._by_text}
        encoded, cut = self._tokenizer.encode([prompt + texts[i] for i in new.values()], limit)
        self.truncated += sum(cut)
        with _os_errors():
            for key, ids in zip(new, encoded, strict=True):
                record = ids.tobytes()
                token_key = _digest(record)
                if token_key not in self._by_tokens:
                    self._by_tokens[token_key] = len(self.lengths)
                    self.lengths.append(len(ids))
                    self._writer.write(record)
                self._by_text[key] = self._by_tokens[token_key]
        return [self._by_text[key] for key in keys]

    def close(self) -> None:
        with _os_errors():
            self._writer.close()


class _ColumnWriter:
    def __init__(self) -> None:
        self.values = array("i")
        self._offsets = array("q", [0])

    @property
    def num_rows(self) -> int:
        return len(self._offsets) - 1

    def add(self, ids: list[int], sizes: list[int]) -> None:
        self.values.extend(ids)
        for size in sizes:
            self._offsets.append(self._offsets[-1] + size)

    def save(self, directory: Path, column: TextColumn) -> None:
        values = np.frombuffer(self.values, np.int32) if self.values else np.zeros(0, np.int32)
        if column.ragged:
            np.save(directory / f"{column.name}.values.npy", values)
            offsets = np.frombuffer(self._offsets, np.int64)
            np.save(directory / f"{column.name}.offsets.npy", offsets)
        else:
            np.save(directory / f"{column.name}.npy", values)


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    """ArrayRecord says by RuntimeError that a file can't be written."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from None


def _batched(items: Any, size: int) -> Iterator[tuple[Any, ...]]:
    iterator = iter(items)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()
