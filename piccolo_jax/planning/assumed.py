"""Datasets of assumed lengths, for plans without data: as prepared ones, but in memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from piccolo_jax.config import TASK_NAMES, Config
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.store import Columns, Ragged
from piccolo_jax.tasks import TASKS

LABELS = 128  # distinct label texts of an assumed dataset


class AssumedStore:
    """A dataset of so many rows, all texts distinct, in the place of data.store.Store.

    Text lengths are spread evenly between half and one and a half times the mean, within the
    config's limits; all at the limit if the mean is.
    """

    def __init__(
        self, name: str, task: str, rows: int, config: Config, query_tokens: int, text_tokens: int
    ):
        self.name, self.task, self.num_rows = name, task, rows
        self.columns: Columns = {}
        rng = np.random.default_rng(0)
        lengths: list[np.ndarray] = []

        def texts(count: int, is_query: bool) -> np.ndarray:
            mean = query_tokens if is_query else text_tokens
            limit = config.data.query_max_length if is_query else config.data.max_length
            spread = 0 if mean >= limit else mean // 2
            drawn = rng.integers(mean - spread, mean + spread + 1, count)
            begin = sum(map(len, lengths))
            lengths.append(np.clip(drawn, 3, limit).astype(np.int32))
            return np.arange(begin, begin + count, dtype=np.int32)

        labels = texts(min(LABELS, rows), False) if task == "classification" else None
        for column in TASKS[task].columns:
            counts = {"positives": config.data.positives, "negatives": config.data.negatives}
            members = counts.get(column.name, 1)
            if column.name == "other_labels" and labels is not None:
                members = min(config.loss.classification.max_negatives, len(labels) - 1)
                place = np.arange(rows)[:, None] + 1 + np.arange(members)
                values = labels[place % len(labels)].reshape(-1)
            elif column.name == "labels" and labels is not None:
                values = labels[np.arange(rows) % len(labels)]
            else:
                values = texts(rows * members, column.is_query)
            offsets = np.arange(rows + 1, dtype=np.int64) * members
            self.columns[column.name] = Ragged(values, offsets) if column.ragged else values
        if score := TASKS[task].score_column:
            self.columns[score] = np.arange(rows, dtype=np.float32)
        self.lengths = np.concatenate(lengths)
        self.manifest: dict[str, Any] = {"longest_tokens": int(self.lengths.max())}

    def tokens(self, texts: Sequence[int] | np.ndarray) -> list[np.ndarray]:
        """Token ids of each text: zeros, of its length."""
        return [np.zeros(self.lengths[i], np.int32) for i in texts]


def assumed_datasets(config: Config, query_tokens: int, text_tokens: int) -> list[Dataset]:
    """A dataset for each of the config's, with its weight x repeats and the rows of its batches.

    One that names no task becomes one of each task, which share its weight. Those of one task and
    batch size have the same texts, so that they share a program.
    """
    datasets = []
    for number, given in enumerate(config.data.datasets):
        rows = given.batch_size or config.batch_size
        rows = max(min(rows, given.max_rows or rows), 2)  # a single row has no other to differ from
        tasks = [given.task] if given.task else list(TASK_NAMES)
        for task in tasks:
            store: Any = AssumedStore(
                f"assumed data.datasets[{number}]", task, rows, config, query_tokens, text_tokens
            )
            weight = given.weight * given.repeats / len(tasks)
            datasets.append(Dataset(store, weight, given.max_rows, given.batch_size))
    return datasets
