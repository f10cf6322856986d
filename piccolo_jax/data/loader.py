"""From a step's number to its batch: schedule, draw, pack, read; and shapes fixed before training.

A batch depends on (seed, step) and the number of shards alone. Each process builds the index arrays
of the whole batch, which are small, and reads the tokens of its own shards only.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
import tqdm

from piccolo_jax.config import Config
from piccolo_jax.data import mixing, packing
from piccolo_jax.data.mixing import Dataset
from piccolo_jax.data.schedule import Schedule
from piccolo_jax.data.store import Store
from piccolo_jax.errors import UserError

_ROW_LENGTHS = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
_GROWTH = 1.25  # of the shapes beyond the planned one, should a batch not fit


@dataclasses.dataclass(frozen=True)
class HostBatch:
    """A batch in the memory of this process.

    sharded: `tokens`, `segments`, `positions`, `text_numbers` [R, L] and `text_slots` [N], the
      parts of this process's shards, in their order; replicated: the task's arrays, whole.
    """

    step: int
    dataset: str
    task: str
    rows: int  # of the dataset, in the global batch
    epoch: float  # passes over the dataset that are made with this batch
    shape: packing.Shape
    sharded: dict[str, np.ndarray]
    replicated: dict[str, np.ndarray]
    num_tokens: int  # real ones in the global batch, without padding
    fill: float  # share of the global batch's token slots that hold one


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shape of a dataset's batches, and the share of its token slots that hold a token."""

    shape: packing.Shape
    fill: float


class Batches:
    """All batches of a run; `notes` is what should be said about its datasets.

    Args:
      tasks: the TASKS table; hidden_size: of the model, which weighs attention against products.
      shards: parts into which rows and texts are split; local_shards: those of this process.
      quiet: without a progress bar.

    Raises UserError if a dataset can't be used (mixing.usable), or the largest batch has fewer
    packed rows than config.train.micro_batches.
    """

    def __init__(
        self,
        config: Config,
        datasets: Sequence[Dataset],
        tasks: dict[str, Any],
        hidden_size: int,
        shards: int,
        local_shards: Sequence[int],
        quiet: bool = False,
    ):
        self._tasks = tasks
        self._shards, self._local_shards = shards, tuple(local_shards)
        self.mixture, self.notes = mixing.usable(config, datasets)
        self.stores = [dataset.store for dataset in self.mixture]
        self._config = _as_wide_as_lists(config, self.stores)
        self.schedule = Schedule(
            seed=config.seed,
            batch_sizes=tuple(dataset.batch_size for dataset in self.mixture),
            sizes=tuple(dataset.rows for dataset in self.mixture),
            weights=tuple(dataset.weight for dataset in self.mixture),
            totals=tuple(store.num_rows for store in self.stores),
        )
        bar = tqdm.tqdm(
            range(len(self.stores)), desc="planning batches", unit=" datasets", leave=False,
            disable=quiet,
        )  # fmt: skip
        self.plans = self._in_chunks([self._needed(d, hidden_size) for d in bar])

    def start(self, first_step: int, stop_step: int) -> Iterator[HostBatch]:
        """Batches of steps first_step..stop_step - 1, read ahead by threads."""
        steps = grain.MapDataset.range(first_step, stop_step).map(self.at)
        options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)
        return iter(steps.to_iter_dataset(options))

    def at(self, step: int) -> HostBatch:
        """The batch of one step, counted from 0."""
        dataset, use = self.schedule.at(int(step))
        store = self.stores[dataset]
        texts, arrays = self._draw(dataset, use)
        lengths = store.lengths[texts]
        planned = self.plans[dataset].shape
        layout = packing.plan_layout(lengths, planned.length, self._shards)
        shape = _smallest_fitting(planned, layout)
        index = packing.text_index(layout, shape)
        text_arrays = self._tasks[store.task].text_arrays
        sharded = packing.fill(
            layout, lengths, lambda members: store.tokens(texts[members]), shape, self._local_shards
        )
        slots = packing.text_slots(layout, shape, self._shards).reshape(self._shards, -1)
        sharded["text_slots"] = slots[list(self._local_shards)].reshape(-1)
        return HostBatch(
            step=int(step),
            dataset=store.name,
            task=store.task,
            rows=self.mixture[dataset].batch_size,
            epoch=(use + 1) * self.mixture[dataset].batch_size / self.mixture[dataset].rows,
            shape=shape,
            sharded=sharded,
            replicated={k: index[v] if k in text_arrays else v for k, v in arrays.items()},
            num_tokens=int(lengths.sum()),
            fill=float(lengths.sum()) / (self._shards * shape.rows * shape.length),
        )

    def _draw(self, dataset: int, use: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The batch's distinct texts (ids in the dataset) and arrays that point into them."""
        store, schedule = self.stores[dataset], self.schedule
        task = self._tasks[store.task]
        rows, rng = schedule.rows(dataset, use), schedule.rng(dataset, use)
        arrays = task.draw(store.columns, rows, rng, self._config)
        masked = {
            name: np.where(arrays[f"{name}_keep"], arrays[name], -1)
            if f"{name}_keep" in arrays
            else arrays[name]
            for name in task.text_arrays
        }
        everything = np.concatenate([ids.reshape(-1) for ids in masked.values()])
        texts = np.unique(everything)
        texts = texts[texts >= 0]
        # What is masked out points at text 0.
        pointers = {name: np.searchsorted(texts, ids) for name, ids in masked.items()}
        return texts, arrays | pointers

    def _needed(self, dataset: int, hidden_size: int) -> tuple[packing.Shape, float]:
        """The shape that holds a dataset's first batches at the least cost, and a shard's tokens.

        A token costs 6 hidden_size + row length, in units of 4 hidden_size operations a layer: its
        products, and attention over its row.
        """
        planned = _planned_batches(self.mixture[dataset].batch_size)
        batches = [self._draw(dataset, use)[0] for use in range(planned)]
        lengths = [self.stores[dataset].lengths[texts] for texts in batches]
        tokens = float(np.mean([n.sum() for n in lengths]))
        longest = self.stores[dataset].manifest["longest_tokens"]
        choices = []
        for length in [n for n in _ROW_LENGTHS if n >= longest][:3] or [longest]:
            layouts = [packing.plan_layout(n, length, self._shards) for n in lengths]
            rows = max(layout.rows_needed for layout in layouts)
            texts = _round_up(max(layout.texts_needed for layout in layouts))
            cost = _round_up(rows) * length * (6 * hidden_size + length)
            shape = packing.Shape(length=length, rows=rows, texts=texts)
            choices.append((cost, shape))
        shape = min(choices, key=lambda choice: choice[0])[1]
        return shape, tokens / self._shards

    def _in_chunks(self, needed: list[tuple[packing.Shape, float]]) -> list[Plan]:
        """Plans with rows in equal chunks: config.train.micro_batches of the largest batch.

        The others are in as many as keep their chunks no larger.
        """
        most = self._config.train.micro_batches
        largest = max(range(len(needed)), key=lambda d: _slots(needed[d][0]))
        rows, slots = needed[largest][0].rows, _slots(needed[largest][0])
        if rows < most:
            raise UserError(
                f"config.train.micro_batches = {most}: a batch of dataset"
                f" {self.stores[largest].name} fills only {rows} rows on a device, which are not"
                f" that many chunks; make it at most {rows}, or the batches of the dataset larger"
            )
        plans = []
        for shape, tokens in needed:
            chunks = min(math.ceil(most * _slots(shape) / slots), shape.rows)
            rows = _round_up(shape.rows, chunks)
            shape = dataclasses.replace(shape, rows=rows, chunks=chunks)
            plans.append(Plan(shape, tokens / _slots(shape)))
        return plans


def _as_wide_as_lists(config: Config, stores: Sequence[Store]) -> Config:
    """The config that draws no more than there is: a batch's arrays are as wide as it says."""
    config = copy.deepcopy(config)

    def longest(task: str, column: str) -> int:
        lists = [store.columns[column].offsets for store in stores if store.task == task]
        return max((int(np.diff(offsets).max(initial=0)) for offsets in lists), default=0)

    data, labels = config.data, config.loss.classification
    data.positives = max(min(data.positives, longest("retrieval", "positives")), 1)
    mined = data.remine_count if data.remine_every else 0
    data.negatives = min(data.negatives, max(longest("retrieval", "negatives"), mined))
    all_labels = (s.columns["labels"].distinct for s in stores if s.task == "classification")
    most = max(longest("classification", "other_labels"), *(len(x) for x in all_labels), 1)
    labels.max_negatives = min(labels.max_negatives, most)
    return config


def _slots(shape: packing.Shape) -> int:
    return shape.rows * shape.length


def _planned_batches(batch_size: int) -> int:
    return max(4, min(32, 2**16 // batch_size))


def _round_up(n: int, multiple: int = 1) -> int:
    """To four significant bits of `multiple`s: an eighth more, so that datasets share shapes."""
    units = math.ceil(n / multiple)
    unit = 2 ** max(units.bit_length() - 4, 0)
    return math.ceil(units / unit) * unit * multiple


def _smallest_fitting(planned: packing.Shape, layout: packing.Layout) -> packing.Shape:
    """The planned shape, or the first of a geometric ladder above it that holds the layout."""
    shape = planned
    while shape.rows < layout.rows_needed or shape.texts < layout.texts_needed:
        shape = dataclasses.replace(
            shape,
            rows=_round_up(math.ceil(shape.rows * _GROWTH), shape.chunks),
            texts=_round_up(math.ceil(shape.texts * _GROWTH)),
        )
    return shape
