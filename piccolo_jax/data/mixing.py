"""The mixture: which share of the steps each dataset gets, and how many rows its batches have.

The share of a dataset is weight x repeats x rows^(1/T), over the sum of all datasets'; rows are
those used (max_rows) and T is `data.mixing_temperature`: temperature-scaled mixing of T5 (arXiv
1910.10683, section 3.5.2). T = 1 is proportional to rows. Without T, which is T at infinity,
weights alone count: equal ones give equal shares. `repeats` r is as if listed r times.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from piccolo_jax.config import Config, DatasetConfig
from piccolo_jax.data.schedule import Schedule, used_rows
from piccolo_jax.data.store import Store
from piccolo_jax.errors import UnusableDatasetError, UserError

_MANY_EPOCHS, _UNEVEN = 10, 20  # said: more passes than this, and so many times the least


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A prepared dataset and its place in the mixture."""

    store: Store
    weight: float  # share of the steps, relative to the others
    max_rows: int = 0  # rows that are used, drawn by the seed; 0: all
    batch_size: int = 0  # 0: the config's, or all rows if there are fewer

    @property
    def rows(self) -> int:
        """The number of rows used."""
        return min(self.store.num_rows, self.max_rows or self.store.num_rows)


def share_out(
    config: Config, prepared: Sequence[tuple[DatasetConfig, Sequence[tuple[Store, float]]]]
) -> list[Dataset]:
    """The mixture of the config's datasets, each with its (store, repeats), several of a meta list.

    Without a temperature the datasets of a meta list are one pool of rows, as in REF: they share
    the list's weight, times their number, by rows times REPEATS.
    """
    mixture = []
    temperature = config.data.mixing_temperature
    for dataset, stores in prepared:
        weight = dataset.weight * dataset.repeats
        members = [
            Dataset(store, weight, dataset.max_rows, dataset.batch_size) for store, _ in stores
        ]
        sizes = [m.rows * repeats for m, (_, repeats) in zip(members, stores, strict=True)]
        for member, size, (_, repeats) in zip(members, sizes, stores, strict=True):
            if temperature is None:
                share = len(stores) * size / sum(sizes)
            else:
                share = repeats * member.rows ** (1 / temperature)
            mixture.append(dataclasses.replace(member, weight=weight * share))
    return mixture


def usable(config: Config, mixture: Sequence[Dataset]) -> tuple[list[Dataset], list[str]]:
    """The datasets with the rows of their batches, and what is to be said about them.

    A dataset with fewer rows than config.batch_size has batches of all its rows.

    Raises UserError if none fills a batch, or for one that can't be used, unless the config says
    that it is left out.
    """
    kept: list[Dataset] = []
    notes, smaller = [], 0
    for dataset in mixture:
        try:
            check(config, dataset, len(kept))
        except UnusableDatasetError as error:
            if not config.data.skip_unusable:
                raise
            notes.append(f"left out: {error}")
            continue
        wanted = dataset.batch_size or config.batch_size
        if dataset.rows < wanted:
            smaller += 1
            notes.append(
                f"{dataset.store.name}: {dataset.rows} rows, fewer than config.batch_size ="
                f" {wanted}: all of them are its batch"
            )
        kept.append(dataclasses.replace(dataset, batch_size=min(wanted, dataset.rows)))
    if not kept:
        raise UserError(f"no dataset can be used: {'; '.join(notes) or 'all are left out'}")
    if smaller == len(kept):
        largest = max(kept, key=lambda dataset: dataset.rows)
        raise UserError(
            f"config.batch_size = {config.batch_size}: dataset {largest.store.name} has only"
            f" {largest.rows} usable rows, and no other has more; a batch comes from one dataset,"
            f" so make it at most {largest.rows}"
        )
    return kept, notes


def check(config: Config, dataset: Dataset, number: int) -> None:
    """Raises UnusableDatasetError if no step on dataset `number` could teach anything."""
    name, rows, total = dataset.store.name, dataset.rows, dataset.store.num_rows
    if rows < dataset.batch_size:
        raise UnusableDatasetError(
            f"dataset {name} has only {rows} rows to use, fewer than the batch_size ="
            f" {dataset.batch_size} of its DatasetConfig; make that at most {rows}"
        )
    least = min(config.data.min_batch_size, dataset.batch_size or config.batch_size)
    if rows < least:
        raise UnusableDatasetError(
            f"dataset {name} has only {rows} usable rows, fewer than config.data.min_batch_size ="
            f" {config.data.min_batch_size}; lower that, add rows, or leave the dataset out"
            " (data.skip_unusable leaves out all such)"
        )
    if dataset.store.task == "retrieval":
        columns = (dataset.store.columns[name].values for name in ("positives", "negatives"))
        if len({int(end) for ids in columns if len(ids) for end in (ids.min(), ids.max())}) == 1:
            raise UnusableDatasetError(
                f"dataset {name}: all {total} rows have the same positive and no negative, so there"
                " is nothing to tell apart. Add rows or negatives, or leave the dataset out"
                " (data.skip_unusable leaves out all such)"
            )
    scores = dataset.store.columns.get("score")
    if dataset.store.task == "similarity" and scores is not None:
        if rows < total:
            scores = scores[used_rows(config.seed, number, rows, total)]
        if np.ptp(scores) > 0:
            return
        what = "rows used" if rows < total else "rows"
        raise UnusableDatasetError(
            f"dataset {name}: all {rows} {what} have the score {scores[0]:g};"
            " CoSENT compares rows of different scores. Add rows with another score, or leave the"
            " dataset out (data.skip_unusable leaves out all such)"
        )


def epochs_table(
    mixture: Sequence[Dataset], schedule: Schedule, steps: int
) -> list[dict[str, Any]]:
    """What the first `steps` steps take of each dataset, as in metrics.jsonl.

    `share` of the steps by weight, `steps` in fact, `epochs`: passes over the `used` rows.
    """
    total = sum(dataset.weight for dataset in mixture)
    columns = zip(mixture, schedule.uses(steps), schedule.epochs(steps), strict=True)
    return [
        {
            "dataset": dataset.store.name,
            "task": dataset.store.task,
            "rows": dataset.store.num_rows,
            "used": dataset.rows,
            "batch_size": dataset.batch_size,
            "share": round(dataset.weight / total, 6),
            "steps": uses,
            "epochs": round(epochs, 4),
        }
        for dataset, uses, epochs in columns
    ]


def remarks(table: Sequence[dict[str, Any]], total_steps: int) -> list[str]:
    """What should be said of an epochs table: datasets without a step, or with too many passes."""
    notes = [
        f"{row['dataset']}: none of the {total_steps} steps is on it; raise its weight"
        for row in table
        if not row["steps"]
    ]
    fewest = min((row["epochs"] for row in table if row["steps"]), default=0.0)
    return notes + [
        f"{row['dataset']}: {row['epochs']:.0f} passes over its {row['used']} rows, while another"
        f" dataset gets {fewest:.2g}; data.mixing_temperature makes shares follow sizes"
        for row in table
        if row["epochs"] > max(_MANY_EPOCHS, _UNEVEN * fewest)
    ]
