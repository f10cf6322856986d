"""What all contenders share: the datasets, the rows of a step, what a step reports."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from piccolo_jax.data.schedule import Schedule

DATASETS = {
    "afqmc": ("similarity", "research/sts/afqmc.train.jsonl"),
    "stsb": ("similarity", "research/sts/stsb_multi_zh.train.jsonl"),
    "ocnli": ("similarity", "research/pair/ocnli.train.jsonl"),
    "cmrc": ("retrieval", "open/retrieval/cmrc2018/train_triplets.jsonl"),
    "simclue": ("retrieval", "research/retrieval/simclue_rank.train.jsonl"),
    "tnews": ("classification", "research/classification/tnews.train.jsonl"),
    "iflytek": ("classification", "research/classification/iflytek.train.jsonl"),
    "csl": ("classification", "open/clustering/csl_category_title.train.jsonl"),
}
DIMS = (256, 512, 768, 1024, 1280, 1536, 1792)
LEARNING_RATE = 2e-5
QUERY_LENGTH, LENGTH = 64, 192  # tokens
# A step with more token slots than this encodes again in the backward pass, whoever computes it:
# the activations of 256 long texts would not fit.
MOST_SLOTS_KEPT = 24_000
_PEAK_SIZE, _PEAK_ROUNDS = 3072, 5


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the command line says, as every contender gets it."""

    model: str
    data: str
    batch: int
    threads: int
    datasets: tuple[str, ...]
    seed: int = 0


@dataclasses.dataclass
class StepReport:
    """One step: what it took and what it computed.

    slots: token slots encoded, padding included; tokens: those of them that hold a token; flops:
    of the encoder's matrix products over those slots, forward and backward, without recomputation.
    """

    loss: float
    seconds: float
    cpu_seconds: float
    compile_seconds: float = 0.0
    slots: int = 0
    tokens: int = 0
    flops: float = 0.0


class Rows:
    """The rows of each step, the same for every contender: those of this project's schedule."""

    def __init__(self, settings: Settings):
        self.rows = {name: read(settings, name) for name in settings.datasets}
        self._names = settings.datasets
        sizes = tuple(len(rows) for rows in self.rows.values())
        self._schedule = Schedule(
            settings.seed, (settings.batch,) * len(sizes), sizes, (1.0,) * len(sizes)
        )

    def of(self, dataset: str, use: int) -> list[dict[str, Any]]:
        """The rows of a dataset's batch number `use`."""
        chosen = self._schedule.rows(self._names.index(dataset), use)
        return [self.rows[dataset][row] for row in chosen]

    def rng(self, dataset: str, use: int) -> np.random.Generator:
        """Random numbers for the draws of one batch."""
        return self._schedule.rng(self._names.index(dataset), use)


def read(settings: Settings, dataset: str) -> list[dict[str, Any]]:
    """The rows of a dataset's file."""
    with (Path(settings.data) / DATASETS[dataset][1]).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def encoder_flops(config: dict[str, Any], shapes: list[tuple[int, int]]) -> float:
    """Matrix products of a training step over [rows, length] grids; `config` is config.json's."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    total = 0.0
    for rows, length in shapes:
        products = 2 * (4 * hidden**2 + 2 * hidden * inner)
        attention = 4 * length * hidden
        total += rows * length * (products + attention)
    return 3 * config["num_hidden_layers"] * total


def best_rate(multiply: Any) -> float:
    """FLOP per second of multiply(), a product of two square matrices of peak_size(), at best."""
    seconds = []
    for _ in range(_PEAK_ROUNDS):
        started = time.perf_counter()
        multiply()
        seconds.append(time.perf_counter() - started)
    return 2 * _PEAK_SIZE**3 / min(seconds)


def peak_size() -> int:
    """Rows and columns of the matrices whose product stands for the machine's peak."""
    return _PEAK_SIZE
